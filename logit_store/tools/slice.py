"""`decant slice`: a smaller logit store from a larger one, without a teacher: fewer entries, fewer rows.

Shapes: P positions, N head entries of all positions, K the widest head, F forced ids.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store import writer
from logit_store.codec.levels import CodecConfig
from logit_store.config import parse_config
from logit_store.encode import text_sha256
from logit_store.errors import ConfigError, StoreError
from logit_store.format import MANIFEST
from logit_store.identity import HEADER_IDENTITY, labels_id, text_id
from logit_store.manifest import ADDED_TO_HEADER
from logit_store.reader import LogitStore
from logit_store.rows import SPLITS, LogitRow
from logit_store.storage import Storage
from logit_store.tools.outputs import require_outside
from logit_store.tools.progress import progress_bar
from logit_store.tools.spans import parse_span
from logit_store.tools.summary import print_summary


class Part(NamedTuple):
    """What a slice keeps of its parent, and how."""

    k: int | None = None
    """Most probable entries of each head; None for all."""
    rows: str | None = None
    """`START:STOP` by row number, either of which may be left out, or the name of a split; None for all."""
    codec: dict[str, Any] | None = None
    """Settings of the codec that differ from the parent's."""


class _Shard(NamedTuple):
    """A shard of the slice: rows of one shard of the parent, by their numbers there."""

    rows: NDArray[np.int64]
    text_sha256: str


CHUNK_ENTRIES = 2**22
"""Entries that are sorted at once: 100 MB of temporary arrays. A row of whole distributions can have 10⁸."""


def slice_store(url: str, out: str, part: Part) -> LogitStore:
    """Make the store ``out`` of a part of the finished logit store ``url``, or go on with it; return it opened.

    Rows keep their order and shards their boundaries; shards that lose all their rows are dropped, where rows are
    chosen. The mass of the entries that are cut becomes tail. Lossy labels are rounded a second time.
    Raises ConfigError: nothing is chosen, or what the parent does not have; StoreError.
    """
    parent, storage = LogitStore.open(url), Storage(out)
    require_outside(storage, parent.storage)
    if part == Part():
        raise ConfigError("nothing to slice: choose fewer entries (k), some rows, or another codec")
    rows = _chosen_rows(parent, part.rows)
    k = _checked_k(parent, part.k, rows)
    shards = _shards(parent, rows)
    header = _header(parent, part, rows, k, [shard.text_sha256 for shard in shards])
    header = writer.begin(storage, header, HEADER_IDENTITY["logits"])
    if not storage.exists(MANIFEST):
        done = writer.is_committed(storage, len(shards))
        with progress_bar("slice", sum(len(shard.rows) for shard in shards), "rows") as advance:
            for number, shard in enumerate(shards):
                if not done[number]:
                    kept = [cut(parent[int(row)], k, parent.manifest["forced_ids"]) for row in shard.rows]
                    places = enumerate(shard.rows.tolist())
                    left_out = {i: parent.left_out[row] for i, row in places if row in parent.left_out}
                    writer.commit_logits(storage, number, kept, header, left_out)
                advance(len(shard.rows))
        writer.finish(storage, header, parent.files())
    return LogitStore.open(out)


def cut(row: LogitRow, k: int, forced_ids: Sequence[int]) -> LogitRow:
    """The row with the ``k`` most probable entries of each head, ties to the lower id.

    The next token and forced ids stay kept; the mass of every other entry that goes is added to the tail. The
    log-partitions are those of the whole distribution and stay. Raises StoreError where ids were drawn from the tail.
    """
    targets = row.targets
    width = int(targets.head_counts_P.max(initial=0))
    if width <= k:
        return row
    if len(targets.sampled_ids_M):
        raise StoreError(
            "the labels hold ids drawn from the tail, and no draw from the larger tail can be made of them: "
            "slice rows only, or cache again with a smaller targets.k"
        )
    ids_PK, logprobs_PK = targets.padded_heads(width)
    num_positions = len(ids_PK)
    kept_PK, moved_P = np.zeros((num_positions, width), np.bool_), np.zeros(num_positions)
    for start in range(0, num_positions, max(1, CHUNK_ENTRIES // width)):
        p = slice(start, start + max(1, CHUNK_ENTRIES // width))
        kept_PK[p] = _most_probable(logprobs_PK[p], targets.head_counts_P[p], k)
        stays_kept_PK = np.isin(ids_PK[p], forced_ids) | (ids_PK[p] == row.tokens.input_ids_T[1:][p, None])
        moved_P[p] = np.exp(logprobs_PK[p].astype(np.float64)).sum(1, where=~kept_PK[p] & ~stays_kept_PK)
    with np.errstate(divide="ignore"):
        tail_P = np.log(np.minimum(np.exp(targets.tail_logmass_P.astype(np.float64)) + moved_P, 1.0))
    return row._replace(
        targets=targets._replace(
            head_counts_P=kept_PK.sum(1, dtype=np.int32),
            head_ids_N=ids_PK[kept_PK],
            head_logprobs_N=logprobs_PK[kept_PK],
            tail_logmass_P=tail_P.astype(np.float32),
        )
    )


def slice_command(
    url: str, out: str, k: int | None, rows: str | None, bounds: dict[str, float | None], exact: bool
) -> None:
    """`decant slice`: make the slice and show what it is. Raises ConfigError, StoreError."""
    codec: dict[str, Any] = {name: bound for name, bound in bounds.items() if bound is not None}
    if exact and codec:
        raise ConfigError("--exact stores log-probs as they are: --max-kl and --max-error bound rounding. Choose one")
    if exact or codec:
        codec["kind"] = "exact" if exact else "lossy"
    print_summary(slice_store(url, out, Part(k, rows, codec or None)))


def _most_probable(logprobs_PK: NDArray[np.float32], counts_P: NDArray[np.int32], k: int) -> NDArray[np.bool_]:
    """Which of the first ``counts_P`` places of each position hold its ``k`` largest log-probs, ties to the earlier."""
    order_PK = np.argsort(-logprobs_PK, axis=1, kind="stable")  # free places are −inf and come last
    kept_PK = np.zeros(logprobs_PK.shape, np.bool_)
    np.put_along_axis(kept_PK, order_PK[:, :k], True, axis=1)
    kept_PK &= np.arange(logprobs_PK.shape[1]) < counts_P[:, None]
    return kept_PK


def _chosen_rows(parent: LogitStore, rows: str | None) -> NDArray[np.int64]:
    """Numbers of the chosen rows, ascending; at least one of them where any are chosen."""
    if rows not in SPLITS:
        return np.array(parse_span(rows, len(parent), "--rows", f"rows in {parent.storage.url}"), np.int64)
    chosen = parent.rows(rows)
    if not len(chosen):
        raise ConfigError(f"no row of {parent.storage.url} is in the split {rows}")
    return chosen


def _checked_k(parent: LogitStore, k: int | None, rows: NDArray[np.int64]) -> int:
    """Entries to keep of each head. What the first row would raise is raised here, before anything is written."""
    stored = int(parent.manifest["k"])
    if k is None:
        return stored
    if not 1 <= k <= stored:
        raise ConfigError(f"k = {k}, but heads of {parent.storage.url} have {stored} entries: choose 1 to {stored}")
    with_positions = rows[parent.lengths_N[rows] > 1]
    if len(with_positions):
        cut(parent[int(with_positions[0])], k, parent.manifest["forced_ids"])
    return k


def _shards(parent: LogitStore, rows: NDArray[np.int64]) -> list[_Shard]:
    """The first of two passes: which rows each shard has, and the hash of their text, which all shards must name."""
    shards = []
    with progress_bar("slice: text", len(rows), "rows") as advance:
        for number in range(len(parent.shards)):
            within = parent.shard_rows(number)
            chosen = rows[np.searchsorted(rows, within.start) : np.searchsorted(rows, within.stop)]
            if len(chosen) == len(within):
                found = parent.shards.hash("text_sha256", number)
            else:
                found = text_sha256([parent.tokens(int(row)) for row in chosen])
            if len(chosen) or len(rows) == len(parent):
                shards.append(_Shard(chosen, found))
            advance(len(chosen))
    return shards


def _header(
    parent: LogitStore, part: Part, rows: NDArray[np.int64], k: int, text_sha256s: Sequence[str]
) -> dict[str, Any]:
    manifest = parent.manifest
    is_range = part.rows is not None and part.rows not in SPLITS
    labels = {
        "parent": manifest["labels_id"],
        "k": k,
        "rows": f"{rows[0]}:{rows[-1] + 1}" if is_range else part.rows,  # 0:10 and :10 are the same rows
    }
    codec = parse_config(CodecConfig, {**parent.codec.model_dump(), **(part.codec or {})}, "codec")
    return {
        **{field: value for field, value in manifest.items() if field not in ADDED_TO_HEADER},
        "labels_id": labels_id(labels),
        "labels": labels,
        "text_id": text_id(manifest["tokenizer"]["vocabulary_sha256"], text_sha256s),
        "k": k,
        "codec": codec.model_dump(),
        "num_shards": len(text_sha256s),
        "provenance": {"parent": {**manifest.get("provenance", {}), "labels": manifest.get("labels")}},
    }
