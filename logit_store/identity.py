"""Content hashes: what decides the labels (labels_id), what decides who may train on them (text_id)."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from logit_store.errors import IdentityError

HEADER_IDENTITY = {
    "tokens": ("kind", "corpus", "tokenizer", "window", "pieces", "held_out", "num_shards", "columns"),
    "logits": ("kind", "labels_id", "labels", "codec", "tail", "num_shards", "columns"),
}
"""Fields of the header that are equal in all attempts at one store; the rest is provenance or follows from them."""


def canonical_json(value: Any) -> bytes:
    """JSON with sorted keys and no white space: equal values give equal bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(data: bytes) -> str:
    """SHA-256 as hexadecimal text."""
    return hashlib.sha256(data).hexdigest()


def digest_file(path: str | Path) -> str:
    """SHA-256 of a local file, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(value: Any) -> str:
    """SHA-256 of ``canonical_json(value)``."""
    return digest(canonical_json(value))


def text_id(vocabulary_sha256: str, text_sha256s: Iterable[str]) -> str:
    """Identity of tokenised text: the vocabulary map and the rows of the shards (`text_sha256`), in order."""
    return digest_json({"vocabulary": vocabulary_sha256, "shards": list(text_sha256s)})


def labels_id(fields: Mapping[str, Any]) -> str:
    """Identity of soft labels: the hash of ``fields``, each of which decides the labels."""
    return digest_json(dict(fields))


def require_equal(found: Mapping[str, Any], wanted: Mapping[str, Any], where: str, remedy: str) -> None:
    """Raise IdentityError naming every field in which ``found`` (stored) and ``wanted`` (asked for) differ."""
    lines = [f"{field} is {_short(a)} there and {_short(b)} here" for field, a, b in _differences(found, wanted)]
    if lines:
        raise IdentityError(f"{where} belongs to another run: {'; '.join(lines)}. {remedy}")


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any], within: str = ""
) -> Iterator[tuple[str, Any, Any]]:
    """Fields with different values, and both; of fields that hold fields, the ones in them that differ."""
    for field in sorted({*found, *wanted}):
        a, b = found.get(field), wanted.get(field)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            yield from _differences(a, b, f"{within}{field}.")
        elif a != b:
            yield f"{within}{field}", a, b


def _short(value: Any) -> str:
    text = json.dumps(value, sort_keys=True)
    return text if len(text) <= 80 else text[:77] + "..."
