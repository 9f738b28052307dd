"""Where sentences and lines end, by token ids alone: read off the vocabulary once."""

import re
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store import LogitStore, TokenStore
from logit_store.errors import StoreError
from logit_store.tools.token_text import TokenText

_CLOSING = "[\"'”’»)\\]]"
LINE = re.compile(r"\n[ \t\r]*\Z")
SENTENCE = re.compile(rf"([.!?…]{_CLOSING}*\s+|[。！？]{_CLOSING}*)\Z")
"""A token after which a sentence has ended, whatever comes next."""
PERHAPS = re.compile(rf"[.!?…]{_CLOSING}*\Z")
"""A token after which a sentence has ended if the next one begins with white space (not in `3.14`, `os.path`)."""
CLOSING = re.compile(rf"{_CLOSING}+\Z")
SPACE = re.compile(r"\s")


class Boundaries(NamedTuple):
    """What each id of a vocabulary of V says about ends of sentences or lines."""

    ends_V: NDArray[np.bool_]
    """A unit ends with this token."""
    may_end_V: NDArray[np.bool_]
    """A unit ends with this token if the next one opens."""
    closes_V: NDArray[np.bool_]
    """Quotes and brackets alone: after a token that may end a unit, this one may instead."""
    opens_V: NDArray[np.bool_]
    """This token begins with white space."""

    @classmethod
    def of_texts(
        cls, data: Callable[[int], bytes | None], vocabulary_size: int, unit: Literal["sentence", "line"]
    ) -> "Boundaries":
        r"""Boundaries from the UTF-8 bytes of each id. The end of a line is the end of a sentence as well.

        A line ends with a token whose text ends with a newline (and blanks after it). A sentence ends with `.`, `!`,
        `?` or `…`, closing quotes and brackets, where white space follows, or with `。`, `！`, `？`. Abbreviations
        ("e.g. this") count as ends: they are rare, and a prefix that ends there is a prefix still.
        """
        texts = [(data(i) or b"").decode("utf-8", errors="replace") for i in range(vocabulary_size)]
        line_V, sentence_V, perhaps_V, closing_V, opens_V = (
            np.array([find(text) is not None for text in texts], np.bool_)
            for find in (LINE.search, SENTENCE.search, PERHAPS.search, CLOSING.match, SPACE.match)
        )
        if unit == "line":
            nothing_V = np.zeros_like(line_V)
            return cls(line_V, nothing_V, nothing_V, nothing_V)
        return cls(line_V | sentence_V, perhaps_V, closing_V, opens_V)

    @classmethod
    def of_store(cls, store: LogitStore | TokenStore, unit: Literal["sentence", "line"]) -> "Boundaries":
        """Boundaries by the store's tokenizer. Raises StoreError where it does not tell tokens' text."""
        text = TokenText.of_store(store)
        if text.missing is not None:
            raise StoreError(f"curriculum.boundary={unit} needs the tokens' text ({text.missing}): use boundary=token")
        return cls.of_texts(text.data, int(store.manifest["vocabulary_size"]), unit)

    def last_end(self, ids_T: NDArray[np.int32], positions: int) -> int:
        """The most positions, up to ``positions``, whose last predicted token ends a unit; ``positions`` if none does.

        A prefix of p positions feeds ``ids[:p]`` and ends with predicting ``ids[p]``; that is where the unit ends.
        """
        ids_T = ids_T[: positions + 2]
        ends_T, may_end_T = self.ends_V[ids_T], self.may_end_V[ids_T]
        for t in np.flatnonzero(self.closes_V[ids_T[1:]]).tolist():
            may_end_T[t + 1] |= may_end_T[t]
        ends_T[:-1] |= may_end_T[:-1] & self.opens_V[ids_T[1:]]
        found = np.flatnonzero(ends_T[1 : positions + 1])
        return int(found[-1]) + 1 if len(found) else positions
