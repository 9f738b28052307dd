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
    Layout,
    Tokens,
    Widths,
    decode_block,
    encode_block,
    held_elsewhere,
    join_tokens,
    section_sizes,
    sort_targets,
)
from logit_store.codec.kernels import fastest
from logit_store.codec.levels import CELLS_PER_NAT, CodecConfig, Quantizer, levels
from logit_store.errors import StoreError
from logit_store.rows import SPLITS, LogitRow, Targets, TokenRow, offsets_of
from logit_store.shard import Block, shard_schema, write_shard

MAX_SUM_ERROR = 1e-2
"""How far kept mass and tail may be from one before they are refused: bfloat16 engines give 1e-3."""

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
    largest: float
    """Of their finite −log p."""


RowT = TypeVar("RowT", TokenRow, LogitRow)


def encode_tokens(
    rows: Sequence[TokenRow], layout: Layout, columns: dict[str, str], description: dict[str, Any]
) -> Encoded:
    """A token shard. ``columns``: names and types of the metadata; ``description``: what the shard says of itself."""
    blocks = []
    for part in _parts(rows, [16 * len(row.input_ids_T) for row in rows]):
        tokens = join_tokens(part)
        _check_ids(layout, tokens.input_ids_T)
        data, widths = encode_block(layout, tokens, None, Quantizer(_EXACT_LEVELS))
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
    parts = [_prepare(layout, part) for part in _parts(rows, work)]
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
        "mean_kl": _shortened(max(mean_kl, 0.0), 3),
        "max_error": _shortened(largest, 3),
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
        mask = np.ones(max(len(ids) - 1, 0), np.bool_) if row.loss_mask_P is None else row.loss_mask_P
        text.update(np.array([len(ids), row.document, SPLITS.index(row.split)], "<i8").tobytes())
        text.update(ids.tobytes() + np.packbits(mask, bitorder="little").tobytes())
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


def _prepare(layout: Layout, rows: Sequence[LogitRow]) -> _Part:
    tokens = join_tokens([row.tokens for row in rows])
    targets = _join_targets([row.targets for row in rows])
    _check_ids(layout, tokens.input_ids_T, targets.head_ids_N, targets.sampled_ids_M)
    targets = sort_targets(targets)
    _check(layout, tokens, targets)
    # Float noise may leave a tail a little more likely than certain; no reader should have to know.
    targets = targets._replace(tail_logmass_P=np.minimum(targets.tail_logmass_P, np.float32(0)))
    largest = 0.0
    for values in (targets.head_logprobs_N, targets.next_logprob_P, targets.forced_logprobs_PF):
        smallest = float(values.min(initial=0.0))
        largest = max(largest, -(smallest if smallest > -np.inf else values[np.isfinite(values)].min(initial=0.0)))
    return _Part(rows, tokens, targets, largest)


def _encode_blocks(layout: Layout, parts: Sequence[_Part], quantizer: Quantizer) -> tuple[list[Block], float, float]:
    """Blocks, the mean KL divergence that rounding cost them, and its largest error of a log-prob."""
    blocks, kl, positions, largest = [], 0.0, 0, 0.0
    for part in parts:
        data, widths = encode_block(layout, part.tokens, part.targets, quantizer)
        kl_P, error = _measure(layout, part.tokens, part.targets, data, widths, quantizer)
        blocks.append(Block([row.tokens for row in part.rows], data, widths))
        kl, positions, largest = kl + float(kl_P.sum()), positions + len(kl_P), max(largest, error)
    return blocks, kl / max(positions, 1), largest


def _join_targets(parts: Sequence[Targets]) -> Targets:
    return parts[0] if len(parts) == 1 else Targets(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def _check_ids(layout: Layout, *ids_of: NDArray[np.int32]) -> None:
    v = layout.vocabulary_size
    for ids in ids_of:
        if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < v:
            raise StoreError(f"ids from {ids.min()} to {ids.max()}: some are outside the vocabulary of {v}")


def _check(layout: Layout, tokens: Tokens, targets: Targets) -> None:
    """Refuse labels that are no distributions over the vocabulary. Raises StoreError."""
    p = len(tokens.loss_mask_P)
    shapes = [
        len(t)
        for t in (
            targets.head_counts_P,
            targets.next_logprob_P,
            targets.tail_logmass_P,
            targets.log_partition_PS,
            targets.forced_logprobs_PF,
            targets.sampled_counts_P,
        )
    ]
    assert shapes == [p] * 6, f"targets of {shapes} positions for {p}"
    assert targets.log_partition_PS.shape[1] == layout.num_temperatures
    assert targets.forced_logprobs_PF.shape[1] == len(layout.forced_ids)
    assert len(targets.head_ids_N) == len(targets.head_logprobs_N) == targets.head_counts_P.sum()
    assert len(targets.sampled_ids_M) == targets.sampled_counts_P.sum()
    named = {
        "head log-probability": targets.head_logprobs_N,
        "next token's log-probability": targets.next_logprob_P,
        "forced id's log-probability": targets.forced_logprobs_PF,
        "log of the tail's mass": targets.tail_logmass_P,
    }
    for what, values in named.items():
        if not (values <= 1e-3).all():
            raise StoreError(f"a {what} is {values[~(values <= 1e-3)][0]}: the labels are no distribution")
    if np.isnan(targets.log_partition_PS).any() or np.isposinf(targets.log_partition_PS).any():
        raise StoreError("a log-partition is NaN or infinite: the labels are no distribution")
    error_P = np.abs(_kept(layout, tokens, targets) + np.exp(targets.tail_logmass_P.astype(np.float64)) - 1)
    if error_P.max(initial=0.0) > MAX_SUM_ERROR:
        raise StoreError(
            f"kept ids and tail of a position sum to 1 ± {error_P.max():.3g}; at most {MAX_SUM_ERROR} is rounding"
        )


def _kept(layout: Layout, tokens: Tokens, targets: Targets, stored: Targets | None = None) -> NDArray[np.float64]:
    """Σ p over what each position keeps, every id once; given what is ``stored`` of it, Σ p·(log p − log q) instead."""

    def term(name: str, f: int | slice = slice(None)) -> NDArray[np.float32]:
        logprobs = getattr(targets, name)[..., f]
        p = np.exp(logprobs)
        if stored is None:
            return p
        with np.errstate(invalid="ignore"):
            terms = p * (logprobs - getattr(stored, name)[..., f])
        terms[p == 0] = 0.0
        return terms

    sums_P = _sum_entries(term("head_logprobs_N"), targets.head_counts_P)
    next_elsewhere_P, forced_elsewhere_PF = held_elsewhere(layout, tokens, targets)
    sums_P += np.where(next_elsewhere_P, 0, term("next_logprob_P"))
    for f in range(len(layout.forced_ids)):
        sums_P += np.where(forced_elsewhere_PF[:, f], 0, term("forced_logprobs_PF", f))
    return sums_P


def _sum_entries(values_N: NDArray[np.float32], counts_P: NDArray[np.int32]) -> NDArray[np.float64]:
    sums_P = np.zeros(len(counts_P))
    filled_P = counts_P > 0
    if len(values_N):
        sums_P[filled_P] = np.add.reduceat(values_N, offsets_of(counts_P)[:-1][filled_P])
    return sums_P


def _measure(
    layout: Layout, tokens: Tokens, targets: Targets, data: bytes, widths: Widths, quantizer: Quantizer
) -> tuple[NDArray[np.float64], float]:
    """Decode a block as a reader will, and compare: KL divergence of each position and largest error of a log-prob, in
    nats. What must be equal is asserted to be.
    """
    decoded_tokens, decoded = decode_block(layout, data, tokens.lengths_B, widths, quantizer, "the block")
    assert np.array_equal(decoded_tokens.input_ids_T, tokens.input_ids_T)
    assert np.array_equal(decoded_tokens.loss_mask_P, tokens.loss_mask_P)
    for name in ("head_counts_P", "head_ids_N", "sampled_counts_P", "sampled_ids_M"):
        assert np.array_equal(getattr(decoded, name), getattr(targets, name)), name
    for name in ("tail_logmass_P", "log_partition_PS"):
        assert getattr(decoded, name).tobytes() == np.ascontiguousarray(getattr(targets, name)).tobytes(), name
    largest = max(
        _largest_error(getattr(targets, name), getattr(decoded, name))
        for name in ("head_logprobs_N", "next_logprob_P", "forced_logprobs_PF")
    )
    if layout.exact:
        assert largest == 0.0, "the exact codec changed a value"
        return np.zeros(len(decoded.next_logprob_P)), 0.0
    return _kept(layout, tokens, targets, decoded), largest


def _largest_error(true: NDArray[np.float32], stored: NDArray[np.float32]) -> float:
    """Largest |Δ log p|; infinite where only one of the two is −inf."""
    with np.errstate(invalid="ignore"):
        error = np.abs(true - stored)
    if np.isnan(error).any():
        error[np.isneginf(true) & np.isneginf(stored)] = 0.0
    return float(error.max(initial=0.0))


def _choose_scale(layout: Layout, codec: CodecConfig, parts: Sequence[_Part]) -> int:
    """Scale of the steps, in 1/8 octaves, at which the heads of a sample lose 0.85 of what the codec allows.

    The divergence grows with the square of the scale, so that three looks find it. A pure function of the labels.
    """
    stride = max(1, sum(len(part.tokens.loss_mask_P) for part in parts) // SAMPLE_POSITIONS)
    sample = _join_targets([part.targets for part in parts[::stride]]) if parts else None
    goal = 0.85 * codec.max_kl
    scale = round(8 * math.log2(math.sqrt(24 * goal / 32)))  # 32 entries of a full step's share
    if sample is None or not len(sample.head_ids_N):
        return scale
    for _ in range(3):
        found = max(_divergence(sample, Quantizer(_levels(scale, codec, parts))), 1e-3 * goal)
        scale = max(_FINEST, min(_COARSEST, scale + math.floor(4 * math.log2(goal / found))))
    return scale


def _divergence(targets: Targets, quantizer: Quantizer) -> float:
    """Mean KL divergence that rounding and rescaling the heads costs."""
    counts_P, true_N = targets.head_counts_P, targets.head_logprobs_N
    base_P, codes_N = np.empty(len(counts_P), np.uint16), np.empty(len(true_N), np.uint16)
    rounded_N, sums_P = np.empty(len(true_N), np.float32), np.empty(len(counts_P))
    fastest().encode_head(true_N, counts_P, quantizer.nearest, CELLS_PER_NAT, base_P, codes_N)
    fastest().decode_head(codes_N, base_P, counts_P, quantizer.logprobs_L, quantizer.probs_L, rounded_N, sums_P)
    p_N = np.exp(true_N)
    mass_P = _sum_entries(p_N, counts_P)
    with np.errstate(invalid="ignore", divide="ignore"):
        terms_N = p_N * (true_N - rounded_N)
        shift_P = np.log(mass_P / sums_P)
    terms_N[p_N == 0] = 0.0
    return float(np.nansum(_sum_entries(terms_N, counts_P) - mass_P * shift_P)) / max(len(counts_P), 1)


def _levels(scale: int, codec: CodecConfig, parts: Sequence[_Part]) -> NDArray[np.float32]:
    """Levels of a scale that reach as far as the parts' least probable entry."""
    largest = max((part.largest for part in parts), default=1.0)
    return levels(2.0 ** (scale / 8), codec.max_error - 2.0**-10, math.ceil(largest) + 1.0)


def _shortened(value: float, digits: int) -> float:
    """To so many significant digits: the last ones of a float64 depend on the machine, and no store's bytes may."""
    return float(f"{value:.{digits}g}")
