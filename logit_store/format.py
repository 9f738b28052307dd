"""Names, version and sealed JSON of a store, format 1. FORMAT.md is its description."""

import json
import re
from typing import Any

from logit_store.errors import CorruptError, FormatError
from logit_store.identity import canonical_json, digest

VERSION = 1
MAX_VOCABULARY_SIZE = 2**24
HEADER, MANIFEST, INDEX, SHARDS = "header.json", "manifest.json", "index.arrow", "shards.arrow"
OBJECT_NAME = re.compile(r"\d{6}-[0-9a-f]{16}\.arrow")
RECORD_NAME = re.compile(r"\d{6}\.json")
FILE_NAME = re.compile(r"tokenizer/[A-Za-z0-9_][A-Za-z0-9_.-]*")
TEMPORARY_SUFFIX = ".tmp"

IN_TOKEN_SHARDS = ("kind", "vocabulary_size", "tokenizer", "window", "columns")
IN_LOGIT_SHARDS = (
    "kind", "vocabulary_size", "labels_id", "text_id", "k", "temperatures", "forced_ids", "codec", "columns"
)  # fmt: skip
"""Fields of the header that each shard repeats, so that a shard says whose it is."""


def record_name(shard: int) -> str:
    """Name of a shard's commit record."""
    return f"shards/{shard:06d}.json"


def object_name(shard: int, sha256: str) -> str:
    """Name of a shard's object: no two attempts with different bytes share one."""
    return f"shards/{shard:06d}-{sha256[:16]}.arrow"


def describe(header: dict[str, Any]) -> dict[str, Any]:
    """What each shard of the store with this header says of itself."""
    fields = IN_LOGIT_SHARDS if header["kind"] == "logits" else IN_TOKEN_SHARDS
    return {"format": VERSION, **{field: header[field] for field in fields}}


def seal(kind: str, body: dict[str, Any]) -> bytes:
    """JSON text of ``body`` that carries its format version and its own checksum."""
    text = canonical_json(body)
    return b'{"decant":"%s","format":%d,"sha256":"%s","body":%s}\n' % (
        kind.encode(), VERSION, digest(text).encode(), text
    )  # fmt: skip


def unseal(data: bytes, kind: str, name: str) -> dict[str, Any]:
    """The body of a sealed file.

    Raises FormatError: not such a file, or of another version; CorruptError: the checksum does not match.
    """
    try:
        sealed = json.loads(data)
    except (ValueError, RecursionError):
        raise CorruptError(f"{name} is damaged: it is not JSON. Restore it or make the store again") from None
    if not isinstance(sealed, dict) or sealed.get("decant") != kind:
        raise FormatError(f"{name} is not the {kind} of a decant store")
    if sealed.get("format") != VERSION:
        raise FormatError(
            f"{name} has format {sealed.get('format')!r}; this version of decant reads format {VERSION}. "
            "Use the version that wrote it, or make the store again"
        )
    body = sealed.get("body")
    try:
        is_whole = isinstance(body, dict) and data == seal(kind, body)
    except (UnicodeEncodeError, RecursionError):  # half of a surrogate pair, or nested deeper than it can be written
        is_whole = False
    if not is_whole or not isinstance(body, dict):
        raise CorruptError(f"{name} is damaged: its checksum does not match. Restore it or make the store again")
    return body
