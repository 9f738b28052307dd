"""What an id stands for, as a person reads it: from the tokenizer that the store carries."""

import json
import re
from functools import cached_property
from typing import Any

from logit_store.reader import LogitStore, TokenStore

TOKENIZER = "tokenizer/tokenizer.json"
_BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")


class TokenText:
    r"""Texts of single ids, white space and all: ``' the'``, ``'\n'``, ``b'\xe2\x80'``, ``<|endoftext|>``.

    A tokenizer's own `decode` would drop leading spaces and show half a character as a question mark. Ids are shown as
    ``#17`` where there is no text: none in the vocabulary, or no tokenizer, and then ``missing`` says why.
    """

    def __init__(self, tokenizer_json: bytes | None) -> None:
        self.missing: str | None = None
        """Why there are no texts, in a sentence; None where there are."""
        self._tokenizer: Any = None
        if tokenizer_json is None:
            self.missing = f"ids instead of text: the store has no {TOKENIZER}"
            return
        try:
            from tokenizers import Tokenizer  # reads JSON; it runs no code of the store

            self._tokenizer = Tokenizer.from_str(tokenizer_json.decode("utf-8"))
        except ImportError:
            self.missing = "ids instead of text: pip install tokenizers"
        except Exception as error:  # noqa: BLE001 (the library raises nothing narrower)
            self.missing = f"ids instead of text: {TOKENIZER} of the store cannot be read ({error})"
        self._json = tokenizer_json

    @classmethod
    def of_store(cls, store: TokenStore | LogitStore) -> "TokenText":
        """Texts of the store's own tokenizer. Raises CorruptError where its files are damaged."""
        return cls(store.files().get(TOKENIZER))

    def __call__(self, token_id: int) -> str:
        """The text of an id, shown."""
        if token_id in self._added:
            return str(self._tokenizer.id_to_token(token_id))
        data = self.data(token_id)
        return f"#{token_id}" if data is None else _shown(data)

    def data(self, token_id: int) -> bytes | None:
        """The UTF-8 bytes that an id stands for, perhaps half a character; None where there is no text."""
        token = None if self._tokenizer is None else self._tokenizer.id_to_token(token_id)
        if token is None or token_id in self._added:
            return None if token is None else str(token).encode()
        if self._is_byte_level and all(character in _BYTE_OF for character in token):
            return bytes(_BYTE_OF[character] for character in token)
        if byte := _BYTE_TOKEN.fullmatch(token):
            return bytes.fromhex(byte[1])
        return str(token.replace("▁", " ") if self._marks_spaces else token).encode()

    @cached_property
    def _added(self) -> set[int]:
        return set() if self._tokenizer is None else set(self._tokenizer.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        parts = json.loads(self._json)
        return '"ByteLevel"' in json.dumps([parts.get("decoder"), parts.get("pre_tokenizer")])

    @cached_property
    def _marks_spaces(self) -> bool:
        parts = json.loads(self._json)
        return "▁" in json.dumps([parts.get("decoder"), parts.get("pre_tokenizer")], ensure_ascii=False)


def _shown(data: bytes) -> str:
    try:
        return repr(data.decode("utf-8"))
    except UnicodeDecodeError:
        return repr(data)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level token stands for (GPT-2's `bytes_to_unicode`, turned around)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
