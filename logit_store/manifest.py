"""The manifest: what a finished store says of itself, checked before anything of it is believed."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from logit_store.codec.blocks import Layout
from logit_store.codec.levels import CodecConfig
from logit_store.errors import FormatError, NotFinishedError
from logit_store.format import FILE_NAME, HEADER, MANIFEST, MAX_VOCABULARY_SIZE, unseal
from logit_store.shard import COLUMN_TYPES, RESERVED_COLUMNS
from logit_store.storage import Storage

ADDED_TO_HEADER = (
    "index", "shards_sha256", "files", "num_rows", "num_tokens", "num_positions", "num_bytes", "left_out"
)  # fmt: skip
"""What a manifest says beyond its header; of token stores also the text_id."""


class _Fields(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Index(_Fields):
    bytes: int = Field(ge=0)
    crc32: list[int]


class _Tokens(_Fields):
    """What readers of either kind rely on."""

    kind: str
    vocabulary_size: int = Field(ge=1, le=MAX_VOCABULARY_SIZE)
    num_shards: int = Field(ge=0)
    text_id: str
    columns: dict[str, str]
    tokenizer: dict[str, Any]
    window: int
    index: _Index
    shards_sha256: str
    files: dict[str, str]
    num_rows: int = Field(ge=0)


class _Logits(_Tokens):
    labels_id: str
    k: int = Field(ge=0, le=MAX_VOCABULARY_SIZE)
    temperatures: list[float] = Field(max_length=1024)
    forced_ids: list[Annotated[int, Field(ge=0, lt=MAX_VOCABULARY_SIZE)]] = Field(max_length=1024)
    codec: CodecConfig
    left_out: dict[Annotated[str, Field(pattern=r"^\d+$")], str] = {}


def layout_of(header: dict[str, Any]) -> Layout:
    """What the blocks of the store with this header or manifest hold."""
    if header["kind"] != "logits":
        return Layout(header["vocabulary_size"], has_labels=False)
    exact, temperatures = header["codec"]["kind"] == "exact", len(header["temperatures"])
    return Layout(header["vocabulary_size"], True, exact, temperatures, tuple(header["forced_ids"]))


def verb_of(header: dict[str, Any]) -> str:
    """The verb that makes the store with this header or manifest."""
    if header.get("kind") != "logits":
        return "tokenize"
    return "slice" if "parent" in (header.get("labels") or {}) else "cache"


def read_manifest(storage: Storage) -> dict[str, Any]:
    """The manifest of a finished store. Raises FormatError, NotFinishedError, CorruptError."""
    if storage.exists(MANIFEST):
        return _checked(unseal(storage.read(MANIFEST), "manifest", storage.path(MANIFEST)), storage.path(MANIFEST))
    if not storage.exists(HEADER):
        raise FormatError(f"{storage.url} holds no decant store (no {MANIFEST}, no {HEADER})")
    header = unseal(storage.read(HEADER), "header", storage.path(HEADER))
    total = header.get("num_shards")
    if not isinstance(total, int):
        raise FormatError(f"{storage.path(HEADER)} does not say how many shards the store has")
    names = storage.names("shards")
    done = sum(name.endswith(".json") for name in names)
    raise NotFinishedError(
        f"{storage.url} is not finished: {done} of {total} shards are committed. "
        f"Run the same `decant {verb_of(header)}` command again; it goes on from there"
    )


def _checked(manifest: dict[str, Any], name: str) -> dict[str, Any]:
    try:
        (_Logits if manifest.get("kind") == "logits" else _Tokens).model_validate(manifest)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise FormatError(f"{name} is no manifest of ours: {where}: {problem['msg']}. Make the store again") from None
    if manifest["kind"] not in ("tokens", "logits"):
        raise FormatError(f"{name} is of kind {manifest['kind']!r}; this version of decant knows tokens and logits")
    forced_ids = manifest.get("forced_ids", [])
    if len(set(forced_ids)) < len(forced_ids) or any(forced >= manifest["vocabulary_size"] for forced in forced_ids):
        raise FormatError(f"{name} has forced ids twice, or beyond the vocabulary: it is no manifest of ours")
    for column, kind in manifest["columns"].items():
        if column in RESERVED_COLUMNS:
            raise FormatError(f"{name} has a metadata column {column!r}, which is the store's own")
        if kind not in COLUMN_TYPES:
            raise FormatError(
                f"{name} has a column of type {kind!r}; this version of decant knows {list(COLUMN_TYPES)}"
            )
    for file in manifest["files"]:
        if not FILE_NAME.fullmatch(file):
            raise FormatError(f"{name} names a file {file!r} that no store has")
    return manifest
