"""From rows to the bytes of a shard: blocks, the choice of levels, and the error that they cost, measured."""

import hashlib
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from logit_store.codec.blocks import (
    BLOCK_WORK,
    Elsewhere,
    Layout,
    Tokens,
    Widths,
    decode_block,
    decode_tokens,
    encode_block,
    held_elsewhere,
    next_ids,
    section_sizes,
)
from logit_store.codec.kernels import fastest
from logit_store.codec.levels import CELLS_PER_NAT, CodecConfig, Quantizer, levels
from logit_store.errors import StoreError
from logit_store.labels import check_sums, join_labels, join_rows, kept_sums, normalised, sum_error
from logit_store.rows import SPLITS, LogitRow, Targets, TokenRow, sum_entries
from logit_store.shard import Block, shard_schema, write_shard

SAMPLE_POSITIONS = 1024
"""Positions by which the steps of a shard are chosen, about. The bound is then measured on all of them."""

_FINEST, _COARSEST = -8 * 14, -8
"""Scales of steps, in 1/8 octaves: 2^-14 to 2^-1."""

_EXACT_LEVELS = np.zeros(1, np.float32)


class Encoded(NamedTuple):
    """A shard's bytes and what its commit record says of them."""

    data: bytes
    facts: dict[str, Any]


class _Part(NamedTuple):
    """The rows of a block before it is packed."""

    rows: Sequence[LogitRow]
    tokens: Tokens
    targets: Targets
    reference: Targets
    """The targets with sums of exactly one: what rounding is measured against."""
    elsewhere: Elsewhere
    """Which next and forced ids their heads hold already."""
    largest: float
    """Of their finite −log p."""
    sum_error: float
    """How far the sum of a position was from one, as the labels came."""


RowT = TypeVar("RowT", TokenRow, LogitRow)


def encode_tokens(
    rows: Sequence[TokenRow], layout: Layout, columns: dict[str, str], description: dict[str, Any]
) -> Encoded:
    """A token shard. ``columns``: names and types of the metadata; ``description``: what the shard says of itself."""
    blocks = []
    for part in _parts(rows, [16 * len(row.input_ids_T) for row in rows]):
        tokens = join_rows(layout, part)
        data, widths = encode_block(layout, tokens, Quantizer(_EXACT_LEVELS))
        _require_same(tokens, decode_tokens(layout, data, tokens.lengths_B, "a new block"), Tokens._fields)
        blocks.append(Block(part, data, widths))
    return _finish(rows, blocks, layout, columns, description, _EXACT_LEVELS, {})


def encode_logits(
    rows: Sequence[LogitRow], layout: Layout, codec: CodecConfig, columns: dict[str, str], description: dict[str, Any]
) -> Encoded:
    """A logit shard. Levels are the coarsest that keep the shard within ``codec``; every block is decoded again and
    compared before it leaves this function.

    Raises StoreError: the labels are no distributions, or cannot be stored within the codec's bounds.
    """
    work = [
        16 * len(row.targets.next_logprob_P) + len(row.targets.head_ids_N) + len(row.targets.sampled_ids_M)
        for row in rows
    ]
    parts = [_prepare(layout, part, codec) for part in _parts(rows, work)]
    scale = 0 if layout.exact else _choose_scale(layout, codec, parts)
    while True:
        levels_L = _EXACT_LEVELS if layout.exact else _levels(scale, codec, parts)
        blocks, mean_kl, largest = _encode_blocks(layout, parts, Quantizer(levels_L))
        if mean_kl <= codec.max_kl or scale < _FINEST:
            break
        scale -= 4  # half the divergence: the sample was kinder than the rest
    if mean_kl > codec.max_kl or largest > codec.max_error:
        raise StoreError(
            f"rounding the labels costs {mean_kl:.2g} nats of KL divergence and up to {largest:.2g} nats of a "
            f"log-probability, but the store allows {codec.max_kl:g} and {codec.max_error:g}: raise "
            "store.codec.max_kl or store.codec.max_error, or set store.codec.kind=exact"
        )
    kept = sum(float(-np.expm1(part.targets.tail_logmass_P.astype(np.float64)).sum()) for part in parts)
    facts = {
        "entries": sum(len(part.targets.head_ids_N) for part in parts),
        "draws": sum(len(part.targets.sampled_ids_M) for part in parts),
        "kept_mass": _shortened(kept, 9),
        "mean_kl": _shortened(max(mean_kl, 0.0), 3),  # below 0 by float noise at most: both distributions sum to one
        "max_error": _shortened(largest, 3),
        "sum_error": _shortened(max((part.sum_error for part in parts), default=0.0), 3),
    }
    return _finish([row.tokens for row in rows], blocks, layout, columns, description, levels_L, facts)


def _finish(
    rows: Sequence[TokenRow], blocks: Sequence[Block], layout: Layout, columns: dict[str, str],
    description: dict[str, Any], levels_L: NDArray[np.float32], facts: dict[str, Any],
) -> Encoded:  # fmt: skip
    data, prefix_bytes = write_shard(shard_schema(description, columns, levels_L), blocks)
    sections: dict[str, int] = {}
    for block in blocks:
        for section, size in section_sizes(layout, block.data, "").items():
            sections[section] = sections.get(section, 0) + size
    sections["rows"] = len(data) - sum(sections.values())
    lengths = [len(row.input_ids_T) for row in rows]
    counts = {
        "rows": len(rows),
        "tokens": sum(lengths),
        "positions": sum(max(length - 1, 0) for length in lengths),
        "prefix_bytes": prefix_bytes,
        "text_sha256": text_sha256(rows),
        "sections": sections,
    }
    return Encoded(data, counts | facts)


def text_sha256(rows: Sequence[TokenRow]) -> str:
    """Hash of the rows' tokens, masks, documents and splits: what a student learns from, however it is stored."""
    text = hashlib.sha256()
    for row in rows:
        ids = row.input_ids_T.astype("<i4", copy=False)
        text.update(np.array([len(ids), row.document, SPLITS.index(row.split)], "<i8").tobytes())
        text.update(ids.tobytes() + np.packbits(row.carries_loss_P, bitorder="little").tobytes())
    return text.hexdigest()


def _parts(rows: Sequence[RowT], work: Sequence[int]) -> list[Sequence[RowT]]:
    """Consecutive rows of at most ``BLOCK_WORK`` together, or one of more."""
    starts: list[int] = []
    total = 0
    for i, of_row in enumerate(work):
        if not starts or total + of_row > BLOCK_WORK:
            starts.append(i)
            total = 0
        total += of_row
    return [rows[start:stop] for start, stop in pairwise([*starts, len(rows)])]


def _prepare(layout: Layout, rows: Sequence[LogitRow], codec: CodecConfig) -> _Part:
    tokens, targets = join_labels(layout, rows)
    elsewhere = held_elsewhere(targets, next_ids(tokens), layout.forced_ids)
    sums_P = check_sums(targets, elsewhere)
    reference = targets if layout.exact else normalised(targets, sums_P, codec.max_error / 2)
    largest = 0.0
    for values in (targets.head_logprobs_N, targets.next_logprob_P, targets.forced_logprobs_PF):
        smallest = float(values.min(initial=0.0))
        largest = max(largest, -(smallest if smallest > -np.inf else values[np.isfinite(values)].min(initial=0.0)))
    return _Part(rows, tokens, targets, reference, elsewhere, largest, sum_error(targets, sums_P))


def _encode_blocks(layout: Layout, parts: Sequence[_Part], quantizer: Quantizer) -> tuple[list[Block], float, float]:
    """Blocks, the mean KL divergence that rounding cost them, and its largest error of a log-prob."""
    blocks, kl, positions, largest = [], 0.0, 0, 0.0
    for part in parts:
        data, widths = encode_block(layout, part.tokens, quantizer, (part.targets, part.elsewhere))
        kl_P, error = _measure(layout, part, data, widths, quantizer)
        blocks.append(Block([row.tokens for row in part.rows], data, widths))
        kl, positions, largest = kl + float(kl_P.sum()), positions + len(kl_P), max(largest, error)
    return blocks, kl / max(positions, 1), largest


def _measure(
    layout: Layout, part: _Part, data: bytes, widths: Widths, quantizer: Quantizer
) -> tuple[NDArray[np.float64], float]:
    """Decode a block as a reader will, and compare: KL divergence of each position from the reference, and largest
    error of a log-prob as it came, in nats. Raises StoreError where anything else is not what it was, or a position
    does not sum to one: better no shard than a wrong one.
    """
    tokens, targets = part.tokens, part.targets
    decoded_tokens, decoded = decode_block(layout, data, tokens.lengths_B, widths, quantizer, "a new block")
    _require_same(tokens, decoded_tokens, Tokens._fields)
    whole = ("head_counts_P", "head_ids_N", "tail_logmass_P", "log_partition_PS", "sampled_counts_P", "sampled_ids_M")
    _require_same(targets, decoded, Targets._fields if layout.exact else whole)
    if layout.exact:
        return np.zeros(len(decoded.next_logprob_P)), 0.0
    names = ("head_logprobs_N", "next_logprob_P", "forced_logprobs_PF")
    terms, largest = [], 0.0
    for name in names:
        came, true, stored = (getattr(labels, name) for labels in (targets, part.reference, decoded))
        largest = max(largest, float(np.abs(_differences(came, stored)).max(initial=0.0)))
        terms.append(np.exp(true) * _differences(true, stored))
    sums_P = kept_sums(targets, part.elsewhere, [np.exp(getattr(decoded, name)) for name in names])
    if (error := sum_error(decoded, sums_P)) > 1e-4:
        raise StoreError(
            f"a position's kept ids and tail sum to 1 ± {part.sum_error:.2g} as they come, and to 1 ± {error:.2g} when "
            "read: set store.codec.max_error higher, which bounds by how much a reader rescales, or kind=exact"
        )
    return kept_sums(targets, part.elsewhere, terms), largest


def _differences(a: NDArray[np.float32], b: NDArray[np.float32]) -> NDArray[np.float32]:
    """The first less the second, and 0 where both are −inf."""
    with np.errstate(invalid="ignore"):
        differences = a - b
    if not np.isfinite(differences).all():
        differences[np.isneginf(a) & np.isneginf(b)] = 0.0
    return differences


def _require_same(wanted: Any, found: Any, names: Sequence[str]) -> None:
    for name in names:
        a, b = np.ascontiguousarray(getattr(wanted, name)), np.ascontiguousarray(getattr(found, name))
        if a.shape != b.shape or not np.array_equal(a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)):
            raise StoreError(f"{name} of a new block would be read as something else: an error of the store itself")


def _choose_scale(layout: Layout, codec: CodecConfig, parts: Sequence[_Part]) -> int:
    """Scale of the steps, in 1/8 octaves, at which the heads of a sample lose 0.85 of what the codec allows.

    The divergence grows with the square of the scale, so that three looks find it. A pure function of the labels.
    """
    stride = max(1, sum(len(part.tokens.loss_mask_P) for part in parts) // SAMPLE_POSITIONS)
    sample = [part.targets for part in parts[::stride]]
    goal = 0.85 * codec.max_kl
    scale = round(8 * math.log2(math.sqrt(24 * goal / 32)))  # 32 entries of a full step's share
    counts_P = np.concatenate([np.zeros(0, np.int32), *(targets.head_counts_P for targets in sample)])
    true_N = np.concatenate([np.zeros(0, np.float32), *(targets.head_logprobs_N for targets in sample)])
    scale = max(_FINEST, min(_COARSEST, scale))
    for _ in range(3 if len(true_N) else 0):
        found = _divergence(counts_P, true_N, Quantizer(_levels(scale, codec, parts)))
        # To six digits: the last bits of sums differ between machines, and no shard's bytes may.
        octaves = math.log2(goal / _shortened(max(found, 1e-3 * goal), 6))
        scale = max(_FINEST, min(_COARSEST, scale + math.floor(4 * octaves)))
    return scale


def _divergence(counts_P: NDArray[np.int32], true_N: NDArray[np.float32], quantizer: Quantizer) -> float:
    """Mean KL divergence that rounding and rescaling the heads costs."""
    base_P, codes_N = np.empty(len(counts_P), np.uint16), np.empty(len(true_N), np.uint16)
    rounded_N, sums_P = np.empty(len(true_N), np.float32), np.empty(len(counts_P))
    fastest().encode_head(true_N, counts_P, quantizer.nearest, CELLS_PER_NAT, base_P, codes_N)
    fastest().decode_head(codes_N, base_P, counts_P, quantizer.logprobs_L, quantizer.probs_L, rounded_N, sums_P)
    p_N = np.exp(true_N)
    mass_P = sum_entries(p_N, counts_P, np.float64)
    kl_P = sum_entries(p_N * _differences(true_N, rounded_N), counts_P, np.float64)
    with np.errstate(invalid="ignore", divide="ignore"):
        kl_P -= mass_P * np.log(mass_P / sums_P)
    return float(np.nansum(kl_P)) / len(counts_P)


def _levels(scale: int, codec: CodecConfig, parts: Sequence[_Part]) -> NDArray[np.float32]:
    """Levels of a scale that reach as far as the parts' least probable entry."""
    largest = max((part.largest for part in parts), default=1.0)
    return levels(2.0 ** (scale / 8), codec.max_error - 2.0**-10, math.ceil(largest) + 1.0)


def _shortened(value: float, digits: int) -> float:
    """To so many significant digits: the last ones of a float64 depend on the machine, and no store's bytes may."""
    return float(f"{value:.{digits}g}")
