"""From documents to rows: each document's tokens, cut into consecutive pieces that fit a teacher."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.config import SourceConfig
from cluster.corpus.documents import Document
from cluster.corpus.reader import carried_value
from logit_store import SPLITS, TokenRow
from logit_store.errors import ConfigError, CorpusError
from logit_store.identity import digest
from logit_store.vocabulary import vocabulary_size

SMALLEST_POWER = 8
"""Tokens of the smallest piece that is a power of two: the rest of a document, which would fall into pieces of 4, 2 and
1 that have hardly any context, is one piece."""


class Encoded(NamedTuple):
    """A document as tokens."""

    identity: bytes
    """What its hash is taken of: equal documents are in one split."""
    ids_T: NDArray[np.int32]
    carries_loss_T: NDArray[np.bool_] | None = None
    """Which tokens are to be learnt; None for all of them."""


class Encoder(Protocol):
    """How documents of one kind become tokens."""

    def __call__(self, documents: Sequence[Document]) -> list[Encoded | None]:
        """Tokens of each document, None of one without content. Raises CorpusError naming the document."""


def document_rows(
    documents: Sequence[Document],
    encoder: Encoder,
    window: int,
    held_out: float,
    carried: Mapping[str, str],
    pieces: str = "windows",
) -> list[TokenRow]:
    """Rows of the documents, in order; each carries its document's values of the columns ``carried`` (name → kind).

    A document's split is decided by its content alone, so that a duplicate of a held-out document is held out as
    well. Raises CorpusError.
    """
    rows: list[TokenRow] = []
    for document, encoded in zip(documents, encoder(documents), strict=True):
        if encoded is not None:
            values = {name: carried_value(kind, name, document) for name, kind in carried.items()}
            number = int(digest(encoded.identity)[:16], 16) >> 1  # 63 bits
            split = SPLITS[number < held_out * 2**63]
            lengths = piece_lengths(len(encoded.ids_T), window, pieces)
            rows += [TokenRow(number, split, ids, mask, values) for ids, mask in cut(encoded, lengths)]
    return rows


def piece_lengths(num_tokens: int, window: int, pieces: str) -> list[int]:
    """Tokens of each piece of a document, in order; they sum to ``num_tokens`` and none exceeds ``window``.

    ``windows``: all have ``window`` tokens but the last. ``powers_of_two``: the largest power of two that fits, again
    and again, as in dataset decomposition (Pouransari et al. 2024, arXiv 2405.13226); what is left when less than
    ``SMALLEST_POWER`` tokens are is one piece.
    """
    lengths: list[int] = []
    while num_tokens:
        length = min(num_tokens, window)
        if pieces == "powers_of_two" and length >= SMALLEST_POWER:
            length = 1 << (length.bit_length() - 1)
        lengths.append(length)
        num_tokens -= length
    return lengths


def cut(encoded: Encoded, lengths: Sequence[int]) -> Iterator[tuple[NDArray[np.int32], NDArray[np.bool_] | None]]:
    """Consecutive pieces of the tokens, of these lengths, and the masks of their positions.

    Position t of a piece predicts its token t + 1, so that its mask is that token's; nothing in a piece predicts
    its first token. Of a document with a mask, pieces in which no position carries loss are left out.
    """
    ids_T, carries_loss_T = encoded.ids_T, encoded.carries_loss_T
    for start, stop in pairwise(accumulate(lengths, initial=0)):
        ids = ids_T[start:stop]
        if carries_loss_T is None:
            yield ids, None
        elif (mask_P := carries_loss_T[start + 1 : start + len(ids)]).any():
            yield ids, mask_P


class TextEncoder:
    """Text: its tokens and one end-of-text token."""

    def __init__(self, source: SourceConfig, tokenizer: Any) -> None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(
                f"tokenizer {tokenizer.name_or_path!r} has no end-of-text token, and each document must end with one"
            )
        self.column, self.tokenizer = str(source.text_column), tokenizer

    def __call__(self, documents: Sequence[Document]) -> list[Encoded | None]:
        """See ``Encoder``."""
        texts = [self._text(document) for document in documents]
        filled = [text for text in texts if text]
        ids = iter(self.tokenizer(filled)["input_ids"] if filled else [])
        return [self._encoded(text, next(ids)) if text else None for text in texts]

    def _text(self, document: Document) -> str:
        text = document.values[self.column]
        if text is not None and not isinstance(text, str):
            raise CorpusError(
                f"{document.place}: the text is {type(text).__name__}, not a string: set tokens.source.text_column"
            )
        return text or ""

    def _encoded(self, text: str, ids: list[int]) -> Encoded:
        end = self.tokenizer.eos_token_id
        return Encoded(text.encode(), np.asarray(ids if ids and ids[-1] == end else [*ids, end], np.int32))


class IdsEncoder:
    """Token ids that somebody else has made, and perhaps a mask: taken as they are."""

    def __init__(self, source: SourceConfig, tokenizer: Any) -> None:
        self.column, self.mask_column = str(source.ids_column), source.mask_column
        self.vocabulary_size = vocabulary_size(tokenizer)

    def __call__(self, documents: Sequence[Document]) -> list[Encoded | None]:
        """See ``Encoder``."""
        return [self._encoded(document) for document in documents]

    def _encoded(self, document: Document) -> Encoded | None:
        ids = self._integers(document, self.column)
        mask = None if self.mask_column is None else self._integers(document, self.mask_column)
        if mask is not None and (len(mask) != len(ids) or not np.isin(mask, (0, 1)).all()):
            raise CorpusError(
                f"{document.place}: column {self.mask_column!r} must hold a 0 or a 1 for each of the "
                f"{len(ids):,} ids; it holds {len(mask):,} values"
            )
        if len(ids) == 0:
            return None
        if ids.min() < 0 or ids.max() >= self.vocabulary_size:
            wrong = ids[(ids < 0) | (ids >= self.vocabulary_size)][0]
            raise CorpusError(
                f"{document.place}: id {wrong} is outside of the vocabulary of {self.vocabulary_size:,}: the ids were "
                "made with another tokenizer than tokens.tokenizer"
            )
        return Encoded(ids.astype("<i4").tobytes(), ids.astype(np.int32), None if mask is None else mask == 1)

    def _integers(self, document: Document, column: str) -> NDArray[Any]:
        value = document.values[column]
        if value is None or value == []:
            return np.zeros(0, np.int64)
        if not isinstance(value, list) or not {*map(type, value)} <= {int, bool}:
            raise CorpusError(f"{document.place}: column {column!r} must hold a list of whole numbers")
        try:
            return np.asarray(value, np.int64)
        except OverflowError:
            raise CorpusError(f"{document.place}: column {column!r} holds numbers beyond 64 bits") from None
