"""A shard: an Arrow IPC file with one record batch, a row of which is a block.

    lengths      list<int32>     tokens of each of the block's rows
    document     list<int64>     first 63 bits of the SHA-256 of each row's document
    split        list<int8>      0 train, 1 held_out
    (metadata)   list<…>         the columns that the store carries, by their own names
    head_width, sampled_width    int32: the most entries of any of the block's positions
    crc32        uint32          of the bytes of `block`
    block        large_binary    tokens and labels, packed (see blocks.py)

Nothing in it is compressed by Arrow, so that a file can be mapped and a block be cut out of it. Everything before the
first block, the prefix, is small, has one checksum and is verified when the shard is first touched; a block is verified
whenever it is read. The footer serves other Arrow readers and is never read here.
"""

import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from logit_store.codec.blocks import Layout, Tokens, Widths, decode_block, decode_tokens
from logit_store.codec.levels import MAX_LEVELS, Quantizer
from logit_store.errors import CorruptError, FormatError, StoreError
from logit_store.identity import canonical_json
from logit_store.ipc import IPC_ERRORS, read_batch, write_batch
from logit_store.rows import SPLITS, LogitRow, Targets, TokenRow, offsets_of

COLUMN_TYPES = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_()}
"""Types of metadata columns."""

ArraysT = TypeVar("ArraysT", Tokens, Targets)

RESERVED_COLUMNS = ("lengths", "document", "split", "head_width", "sampled_width", "crc32", "block", "input_ids")
REDO = "Restore it from a copy, or drop it with `decant verify --drop-damaged` and run the command that made it again"


class Block(NamedTuple):
    """A packed block and what stands beside it."""

    tokens: Sequence[TokenRow]
    data: bytes
    widths: Widths


def shard_schema(description: dict[str, Any], columns: dict[str, str], levels_L: NDArray[np.float32]) -> pa.Schema:
    """The Arrow schema of a store's shards; ``description`` is what a shard says of itself."""
    carried = [pa.field(name, pa.list_(COLUMN_TYPES[kind])) for name, kind in sorted(columns.items())]
    return pa.schema(
        [
            pa.field("lengths", pa.list_(pa.int32())),
            pa.field("document", pa.list_(pa.int64())),
            pa.field("split", pa.list_(pa.int8())),
            *carried,
            pa.field("head_width", pa.int32()),
            pa.field("sampled_width", pa.int32()),
            pa.field("crc32", pa.uint32()),
            pa.field("block", pa.large_binary()),
        ],
        {"decant": canonical_json(description), "levels": levels_L.astype("<f4").tobytes()},
    )


def write_shard(schema: pa.Schema, blocks: Sequence[Block]) -> tuple[bytes, int]:
    """The bytes of a shard, and how many of them come before the first block."""
    rows = [[row for row in block.tokens] for block in blocks]
    columns: dict[str, list[Any]] = {
        "lengths": [[len(row.input_ids_T) for row in block] for block in rows],
        "document": [[row.document for row in block] for block in rows],
        "split": [[SPLITS.index(row.split) for row in block] for block in rows],
        "head_width": [block.widths.head for block in blocks],
        "sampled_width": [block.widths.sampled for block in blocks],
        "crc32": [zlib.crc32(block.data) for block in blocks],
        "block": [block.data for block in blocks],
    }
    carried = [name for name in schema.names if name not in columns]
    for block in rows:
        for row in block:
            if unknown := row.columns.keys() - set(carried):
                raise StoreError(f"a row carries {sorted(unknown)}, and the store has the columns {carried}")
    columns |= {name: [[row.columns.get(name) for row in block] for block in rows] for name in carried}
    try:
        arrays = [pa.array(columns[field.name], field.type) for field in schema]
    except (pa.ArrowException, OverflowError) as error:
        raise StoreError(f"a metadata column holds what is not of its type: {error}") from error
    data = pa.py_buffer(write_batch(pa.record_batch(arrays, schema=schema)))
    # A shard without rows has no first block, and Arrow's empty buffers lie anywhere.
    first_block = read_batch(data)["block"].buffers()[2].address - data.address if blocks else data.size
    return data.to_pybytes(), first_block


class Shard:
    """A mapped shard whose prefix is verified. Raises CorruptError, FormatError."""

    def __init__(self, data: pa.Buffer, name: str, prefix: tuple[int, int], layout: Layout, schema: pa.Schema) -> None:
        """``prefix``: its bytes and their CRC-32; ``schema``: what this store's shards have (levels aside)."""
        self.name, self.layout = name, layout
        size, checksum = prefix
        if not 0 < size <= data.size or zlib.crc32(data.slice(0, size)) != checksum:
            raise self._damaged("the checksum of its first bytes does not match")
        try:
            batch = read_batch(data)
            batch.validate(full=True)
        except IPC_ERRORS as error:
            raise self._damaged(f"it is no Arrow file of ours ({error})") from None
        if not batch.schema.equals(schema) or batch.schema.metadata.get(b"decant") != schema.metadata[b"decant"]:
            raise FormatError(f"{name} is a shard of another store: its columns or its identity differ. {REDO}")
        lists = ("lengths", "document", "split")
        if any(c.null_count for c in batch.columns) or any(batch[c].values.null_count for c in lists):
            raise self._damaged("it has holes where no shard has any")
        self.quantizer = Quantizer(_read_levels(batch.schema.metadata.get(b"levels", b""), self._damaged))
        self.batch = batch
        self._lengths = _lists(batch["lengths"])
        if self._lengths[0][0] != 0:
            raise self._damaged("its first block does not begin with its first row")
        self._sides = [_lists(batch[column]) for column in ("document", "split")]
        if any(not np.array_equal(offsets, self._lengths[0]) for offsets, _ in self._sides):
            raise self._damaged("it does not say the same of all its rows")
        if not np.isin(self._sides[1][1], range(len(SPLITS))).all():
            raise self._damaged("it has rows of a split that is none")
        self._carried = [column for column in batch.schema.names if column not in RESERVED_COLUMNS]
        self.first_rows = self._lengths[0]
        """Number within the shard of each block's first row, and the number of rows."""
        _, offsets, self._data = batch["block"].buffers()
        self._offsets = np.frombuffer(offsets, np.int64)
        self._checksums = batch["crc32"].to_numpy()
        self._widths = [batch[name].to_numpy() for name in ("head_width", "sampled_width")]

    def block_of(self, row: int) -> tuple[int, int]:
        """The block of a row (counted within the shard), and the row's place in it."""
        block = int(np.searchsorted(self.first_rows, row, side="right")) - 1
        return block, row - int(self.first_rows[block])

    def token_rows(self, block: int, tokens: Tokens) -> list[TokenRow]:
        """The block's rows with what stands beside them."""
        start, stop = self.first_rows[block : block + 2]
        at_T, at_P = offsets_of(tokens.lengths_B), offsets_of(np.maximum(tokens.lengths_B - 1, 0))
        documents, splits = (values[start:stop].tolist() for _, values in self._sides)
        carried = [self.batch[name][block].as_py() for name in self._carried]
        if any(len(values) != stop - start for values in carried):
            raise self._damaged(f"block {block} does not say the same of all its rows")
        masks = [tokens.loss_mask_P[at_P[i] : at_P[i + 1]] for i in range(stop - start)]
        return [
            TokenRow(
                documents[i],
                SPLITS[splits[i]],
                tokens.input_ids_T[at_T[i] : at_T[i + 1]],
                None if masks[i].all() else masks[i],
                {name: values[i] for name, values in zip(self._carried, carried, strict=True)},
            )
            for i in range(stop - start)
        ]

    def tokens(self, block: int) -> Tokens:
        """The tokens of a block, verified."""
        return _sealed(decode_tokens(self.layout, self._block(block), self._lengths_of(block), self._name(block)))

    def decode(self, block: int) -> tuple[Tokens, Targets]:
        """Tokens and labels of a block, verified."""
        widths = Widths(*(int(width[block]) for width in self._widths))
        data, lengths_B = self._block(block), self._lengths_of(block)
        tokens, targets = decode_block(self.layout, data, lengths_B, widths, self.quantizer, self._name(block))
        return _sealed(tokens), _sealed(targets)

    def _lengths_of(self, block: int) -> NDArray[np.int32]:
        offsets, values = self._lengths
        lengths_B = values[offsets[block] : offsets[block + 1]]
        if len(lengths_B) and lengths_B.min() < 0:
            raise self._damaged(f"block {block} has a row of negative length")
        return lengths_B

    def _block(self, block: int) -> pa.Buffer:
        start, stop = self._offsets[block : block + 2].tolist()
        data = self._data.slice(start, stop - start)
        if zlib.crc32(data) != self._checksums[block]:
            raise self._damaged(f"the checksum of block {block} does not match")
        return data

    def _name(self, block: int) -> str:
        return f"block {block} of {self.name}"

    def _damaged(self, reason: str) -> CorruptError:
        return CorruptError(f"{self.name} is damaged: {reason}. {REDO}")


def _sealed(arrays: ArraysT) -> ArraysT:
    """The same arrays, read-only: rows are views of a block that others read as well."""
    for array in arrays:
        array.setflags(write=False)
    return arrays


def split_rows(rows: Sequence[TokenRow], targets: Targets) -> Iterator[LogitRow]:
    """The rows of a block, each with its own targets."""
    if len(rows) == 1:
        yield LogitRow(rows[0], targets)
        return
    num_positions = [max(len(row.input_ids_T) - 1, 0) for row in rows]
    yield from map(LogitRow, rows, targets.split(num_positions))


def _read_levels(stored: bytes, damaged: Any) -> NDArray[np.float32]:
    if len(stored) % 4:
        raise damaged("its levels are cut off")
    levels_L = np.frombuffer(stored, "<f4").astype(np.float32)
    if (
        not 0 < len(levels_L) <= MAX_LEVELS
        or levels_L[0] != 0
        or not np.isfinite(levels_L).all()
        or (np.diff(levels_L) <= 0).any()
    ):
        raise damaged("its levels do not ascend from zero")
    return levels_L


def _lists(column: pa.ListArray) -> tuple[NDArray[np.int64], NDArray[Any]]:
    return column.offsets.to_numpy().astype(np.int64), column.values.to_numpy()
