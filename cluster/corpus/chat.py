"""Conversations: rendered by a chat template that marks what the assistant said."""

import json
import re
from collections.abc import Sequence
from typing import Any

import fsspec
import numpy as np
from numpy.typing import NDArray

from cluster.config import TokensConfig
from cluster.corpus.documents import Document
from cluster.corpus.windows import Encoded
from logit_store.errors import ConfigError, CorpusError

GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
PROBE = [{"role": "user", "content": "decantasks"}, {"role": "assistant", "content": "decantanswers"}]
MARKERS = "{% generation %} … {% endgeneration %} around what the assistant says"


def chat_template(tokens: TokensConfig, tokenizer: Any) -> str | None:
    """Text of the template that renders conversations: the config's file, or else the tokenizer's; None for other data.

    Raises ConfigError: there is none, or it cannot mark what carries loss, or its text changes from day to day.
    """
    if tokens.source.messages_column is None:
        return None
    template = _own(tokenizer) if tokens.chat_template is None else _read(tokens.chat_template)
    where = _named(tokens)
    if tokens.loss_on == "assistant" and not GENERATION.search(template):
        raise ConfigError(
            f"{where} does not mark what the assistant says, so that no position would carry loss: give "
            f"tokens.chat_template a copy of it with {MARKERS}, or set tokens.loss_on=all"
        )
    if "strftime_now" in template:
        raise ConfigError(
            f"{where} writes today's date, so that the same corpus would give other tokens tomorrow: give "
            "tokens.chat_template a copy of it with a fixed date instead of strftime_now"
        )
    return template


class ChatEncoder:
    """Conversations as the template renders them. Nothing is put before or after what it gives."""

    def __init__(self, tokens: TokensConfig, tokenizer: Any, template: str) -> None:
        if tokens.loss_on == "assistant" and not tokenizer.is_fast:
            raise ConfigError(
                f"tokenizer {tokens.tokenizer!r} does not say which characters its tokens come from (it is no fast "
                "one), so that the assistant's cannot be told from the others: set tokens.loss_on=all"
            )
        self.column, self.loss_on = str(tokens.source.messages_column), tokens.loss_on
        self.tokenizer, self.template = tokenizer, template
        if tokens.loss_on == "assistant":
            self._check_marks(_named(tokens))

    def __call__(self, documents: Sequence[Document]) -> list[Encoded | None]:
        """See ``Encoder``."""
        return [self._encoded(document) for document in documents]

    def _encoded(self, document: Document) -> Encoded | None:
        messages = _messages(document, self.column)
        if not messages:
            return None
        try:
            text, spans = self._render(messages)
        except Exception as error:  # a template is a program, and raises what it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CorpusError(f"{document.place}: the chat template refuses the conversation: {reason}") from error
        asks_for_mask = self.loss_on == "assistant"
        out = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=asks_for_mask)
        ids_T = np.asarray(out["input_ids"], np.int32)
        if not asks_for_mask:
            return Encoded(_identity(messages), ids_T)
        mask_T = tokens_within(spans, np.asarray(out["offset_mapping"], np.int64).reshape(-1, 2))
        _check_mask(document, messages, mask_T)
        return Encoded(_identity(messages), ids_T, mask_T)

    def _render(self, messages: list[dict[str, Any]]) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and from which character to which the assistant speaks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, spans = render_jinja_template(
            [messages],
            chat_template=self.template,
            return_assistant_tokens_mask=self.loss_on == "assistant",
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], spans[0] if spans else []

    def _check_marks(self, where: str) -> None:
        """Refuse a template that marks the user's turns, or not the assistant's. Raises ConfigError.

        One that does not render a plain question with its answer is judged by the corpus alone.
        """
        try:
            text, spans = self._render(PROBE)
        except Exception:  # noqa: BLE001  (a template is a program, and raises what it likes)
            return
        marked = "".join(text[start:end] for start, end in spans)
        question, answer = (message["content"] for message in PROBE)
        if question in marked or (marked and answer in text and answer not in marked):
            raise ConfigError(
                f"{where} marks what the user says, or leaves out what the assistant says: it needs {MARKERS}, and "
                "around nothing else"
            )


def tokens_within(spans: Sequence[tuple[int, int]], offsets_T2: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which tokens share a character with one of the spans; ``offsets_T2`` is from where to where each token reaches.

    transformers' own mask asks for the token of a span's last character, which leaves out the later bytes of a
    character of several tokens, and marks everything to the end where that character belongs to no token.
    """
    mask_T = np.zeros(len(offsets_T2), np.bool_)
    for start, end in spans:
        mask_T |= (offsets_T2[:, 0] < end) & (offsets_T2[:, 1] > start)
    return mask_T


def _messages(document: Document, column: str) -> list[dict[str, Any]]:
    """The conversation without fields that hold nothing, which tables have where lines of JSON leave them out."""
    messages = document.values[column]
    if messages is None or messages == []:
        return []
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise CorpusError(
            f"{document.place}: column {column!r} must hold a list of messages, each with `role` and `content`"
        )
    if document.file.format in ("parquet", "arrow"):
        messages = [{k: _without_nothing(v) for k, v in message.items()} for message in messages]
    return [{k: v for k, v in message.items() if v is not None or k == "content"} for message in messages]


def _without_nothing(value: Any) -> Any:
    """A table's value without the fields of its structs that are null: each has all that any of the rows has."""
    if isinstance(value, dict):
        return {k: _without_nothing(v) for k, v in value.items() if v is not None}
    return [_without_nothing(v) for v in value] if isinstance(value, list) else value


def _identity(messages: list[dict[str, Any]]) -> bytes:
    """Canonical JSON; what JSON has no form for, such as a table's times of day, as Python writes it."""
    return json.dumps(messages, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str).encode()


def _check_mask(document: Document, messages: list[dict[str, Any]], mask_T: NDArray[np.bool_]) -> None:
    """Refuse a mask that says nothing of what the conversation says. Raises CorpusError."""
    speaks = {message["role"] == "assistant" for message in messages if _says_something(message)}
    if True in speaks and not mask_T.any():
        raise CorpusError(
            f"{document.place}: the assistant speaks, but the chat template marks nothing of it: it needs {MARKERS}"
        )
    if False in speaks and mask_T[1:].all():  # the first token is predicted by no position
        raise CorpusError(
            f"{document.place}: the chat template marks all of the conversation as the assistant's, though others "
            f"speak in it: it needs {MARKERS}, and around nothing else"
        )


def _says_something(message: dict[str, Any]) -> bool:
    content = message.get("content")
    return bool(content.strip() if isinstance(content, str) else content) or bool(message.get("tool_calls"))


def _named(tokens: TokensConfig) -> str:
    return tokens.chat_template or f"the chat template of tokenizer {tokens.tokenizer!r}"


def _own(tokenizer: Any) -> str:
    try:
        return str(tokenizer.get_chat_template())
    except ValueError as error:
        raise ConfigError(
            f"tokenizer {tokenizer.name_or_path!r} has no chat template to render conversations with: "
            "give one as tokens.chat_template"
        ) from error


def _read(path: str) -> str:
    try:
        with fsspec.open(path, "r", encoding="utf-8") as file:
            return str(file.read())
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"tokens.chat_template={path} cannot be read: {error}") from error
