"""A block: some consecutive rows, packed. The unit of compression, of random access and of checksums.

Shapes: B rows of a block with ΣT tokens and P = Σ(T − 1) positions, N head entries, M sampled entries, F forced ids,
S temperatures, K the block's widest head.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store.codec.ids import join_ids, split_ids, sum_bins, sum_lone_bins
from logit_store.codec.kernels import fastest
from logit_store.codec.levels import CELLS_PER_NAT, Quantizer
from logit_store.codec.planes import Packer, Unpacker, pack
from logit_store.errors import StoreError
from logit_store.rows import Targets, TokenRow, offsets_of

BLOCK_WORK = 40 * 1024
"""Of a block of several rows, entries + 16 × positions: about what it takes to decode. Reading one row costs its whole
block, and small blocks pay for their entropy coders' tables. 512 positions of 64 entries, 1,575 of 10; a larger row is
a block of its own."""


Elsewhere = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""Which next ids are in their heads [P], which forced ids are there or are the next token [P, F]."""


class Layout(NamedTuple):
    """What the blocks of a store hold: part of the manifest and of every shard."""

    vocabulary_size: int
    has_labels: bool
    exact: bool = False
    """Whether log-probs are float32 to the last bit."""
    num_temperatures: int = 0
    forced_ids: tuple[int, ...] = ()


class Widths(NamedTuple):
    """The most entries of any position of a block."""

    head: int = 0
    sampled: int = 0


class Tokens(NamedTuple):
    """The tokens of a block's rows, one after the other."""

    lengths_B: NDArray[np.int32]
    input_ids_T: NDArray[np.int32]
    loss_mask_P: NDArray[np.bool_]


def _unpacker(layout: Layout, block: Any, name: str) -> Unpacker:
    return Unpacker(block, name, sum(section_planes(layout).values()))


def section_planes(layout: Layout) -> dict[str, int]:
    """Names of a block's sections in order, and the byte planes of each."""
    planes = {"input_bins": 2, "input_low": 1, "loss_mask": 1}
    if layout.has_labels:
        width = 4 if layout.exact else 2
        planes |= {"tail": 4, "log_partition": 4, "next": width, "forced": width, "head_counts": 3}
        planes |= {"head_bins": 2, "head_low": 1}
        planes |= {"head_logprobs": 4} if layout.exact else {"head_base": 2, "head_codes": 2}
        planes |= {"sampled_counts": 3, "sampled_bins": 2, "sampled_low": 1}
    return planes


def join_tokens(rows: Sequence[TokenRow]) -> Tokens:
    """The rows' tokens, one after the other."""
    lengths_B = np.array([len(row.input_ids_T) for row in rows], np.int32)
    masks = np.concatenate([row.carries_loss_P for row in rows])
    return Tokens(lengths_B, np.concatenate([row.input_ids_T for row in rows]), masks)


def next_ids(tokens: Tokens) -> NDArray[np.int32]:
    """The token that each position predicts [P]."""
    starts_B = offsets_of(tokens.lengths_B)[:-1]
    is_first = np.zeros(len(tokens.input_ids_T), np.bool_)
    is_first[starts_B[tokens.lengths_B > 0]] = True
    return tokens.input_ids_T[~is_first]


def num_positions(lengths_B: NDArray[np.int32]) -> int:
    """P: a row of T tokens has T − 1."""
    return int(np.maximum(lengths_B - 1, 0).sum(dtype=np.int64))


def encode_block(
    layout: Layout, tokens: Tokens, quantizer: Quantizer, labels: tuple[Targets, Elsewhere] | None = None
) -> tuple[bytes, Widths]:
    """Pack a block. ``labels``: the targets of all its rows, the ids of each position ascending (see ``sort_targets``),
    and what ``held_elsewhere`` says of them.
    """
    widths = Widths()
    if labels is not None:
        targets, _ = labels
        widths = Widths(int(targets.head_counts_P.max(initial=0)), int(targets.sampled_counts_P.max(initial=0)))
    if max(widths) >= 2**24:
        raise StoreError(f"a position of {max(widths):,} entries: heads and draws must stay below 2^24")

    def fill(packer: Packer) -> None:
        bins_T, low = split_ids(tokens.input_ids_T, np.ones_like(tokens.input_ids_T))
        packer.add(bins_T, 2)
        packer.add(low, 1)
        packer.add(np.packbits(~tokens.loss_mask_P, bitorder="little"), 1)
        if labels is not None:
            _fill_targets(packer, layout, *labels, quantizer, widths)

    return pack(fill), widths


def _fill_targets(
    packer: Packer, layout: Layout, targets: Targets, elsewhere: Elsewhere, quantizer: Quantizer, widths: Widths
) -> None:
    packer.add(targets.tail_logmass_P.view(np.uint32), 4)
    packer.add(targets.log_partition_PS.reshape(-1).view(np.uint32), 4)
    if layout.exact:
        packer.add(targets.next_logprob_P.view(np.uint32), 4)
        packer.add(targets.forced_logprobs_PF.reshape(-1).view(np.uint32), 4)
    else:
        next_in_head_P, forced_elsewhere_PF = elsewhere
        packer.add(_outside_codes(targets.next_logprob_P, next_in_head_P, quantizer), 2)
        packer.add(_outside_codes(targets.forced_logprobs_PF, forced_elsewhere_PF, quantizer).reshape(-1), 2)
    packer.add((widths.head - targets.head_counts_P).astype(np.uint32), 3)
    is_dense = _is_dense(layout, widths, targets.head_counts_P)
    steps_N, low = (np.zeros(0, np.uint16), np.zeros(0, np.uint8))
    if not is_dense:
        steps_N, low = split_ids(targets.head_ids_N, targets.head_counts_P)
    packer.add(steps_N, 2)
    packer.add(low, 1)
    if layout.exact:
        packer.add(targets.head_logprobs_N.view(np.uint32), 4)
    else:
        base_P, codes_N = _head_codes(targets, quantizer)
        packer.add(base_P, 2)
        packer.add(codes_N, 2)
    packer.add((widths.sampled - targets.sampled_counts_P).astype(np.uint32), 3)
    steps_M, low = split_ids(targets.sampled_ids_M, targets.sampled_counts_P)
    packer.add(steps_M, 2)
    packer.add(low, 1)


def decode_tokens(layout: Layout, block: Any, lengths_B: NDArray[np.int32], name: str) -> Tokens:
    """The tokens of a block. Raises CorruptError; ``name`` says of what."""
    return _take_tokens(layout, _unpacker(layout, block, name), lengths_B)


def decode_block(
    layout: Layout,
    block: Any,
    lengths_B: NDArray[np.int32],
    widths: Widths,
    quantizer: Quantizer,
    name: str,
) -> tuple[Tokens, Targets]:
    """Tokens and targets of a block that has labels; lossy heads are rescaled so that each position sums to one.

    Raises CorruptError where the bytes are not such a block; ``name`` says of what.
    """
    unpacker = _unpacker(layout, block, name)
    tokens = _take_tokens(layout, unpacker, lengths_B)
    p, num_forced = len(tokens.loss_mask_P), len(layout.forced_ids)
    tail_P = unpacker.take(p, 4, np.float32)
    partition_PS = unpacker.take(p * layout.num_temperatures, 4, np.float32).reshape(p, layout.num_temperatures)
    outside = (4, np.float32) if layout.exact else (2, np.uint16)
    next_P = unpacker.take(p, *outside)
    forced_PF = unpacker.take(p * num_forced, *outside).reshape(p, num_forced)
    counts_P, num_entries = _take_counts(unpacker, p, widths.head)
    if _is_dense(layout, widths, counts_P):
        unpacker.skip(3)
        unpacker.charge(4 * num_entries)
        ids_N = np.tile(np.arange(layout.vocabulary_size, dtype=np.int32), p)
    else:
        ids_N = _take_ids(unpacker, layout, counts_P, num_entries)
    sums_P = np.empty(p)
    if layout.exact:
        logprobs_N = unpacker.take(num_entries, 4, np.float32)
    else:
        base_P, codes_N = unpacker.take(p, 2, np.uint16), unpacker.take(num_entries, 2, np.uint16)
        unpacker.charge(4 * num_entries)
        logprobs_N = np.empty(num_entries, np.float32)
        levels = (quantizer.logprobs_L, quantizer.probs_L)
        fastest().decode_head(codes_N, base_P, counts_P, *levels, logprobs_N, sums_P)
    sampled_P, num_sampled = _take_counts(unpacker, p, widths.sampled)
    sampled_M = _take_ids(unpacker, layout, sampled_P, num_sampled)
    targets = Targets(counts_P, ids_N, logprobs_N, next_P, tail_P, partition_PS, forced_PF, sampled_P, sampled_M)
    return tokens, targets if layout.exact else _fill_in(layout, tokens, targets, sums_P, quantizer)


def section_sizes(layout: Layout, block: Any, name: str) -> dict[str, int]:
    """Stored bytes of each section of a block, and of the block's own header."""
    unpacker = _unpacker(layout, block, name)
    sizes = {section: unpacker.sizes(planes) for section, planes in section_planes(layout).items()}
    return sizes | {"block_headers": len(block) - sum(sizes.values())}


def sort_targets(targets: Targets) -> Targets:
    """The same targets, each position's ids in ascending order. Raises StoreError where a head repeats an id."""
    ids_N, logprobs_N = targets.head_ids_N, np.ascontiguousarray(targets.head_logprobs_N, np.float32)
    width = _common(targets.head_counts_P)
    if width is not None:
        # One integer of id and log-prob: sorting these is several times faster than sorting places.
        keys_N = ids_N.astype(np.uint64) << np.uint64(32) | logprobs_N.view(np.uint32)
        keys_N = np.sort(keys_N.reshape(-1, width), axis=1).reshape(-1)
        ids_N, logprobs_N = (keys_N >> np.uint64(32)).astype(np.int32), keys_N.astype(np.uint32).view(np.float32)
        repeats = (ids_N.reshape(-1, width)[:, 1:] == ids_N.reshape(-1, width)[:, :-1]).any()
    else:
        places_N = _position_keys(ids_N, targets.head_counts_P)
        order_N = np.argsort(places_N, kind="stable")
        ids_N, logprobs_N, places_N = ids_N[order_N], logprobs_N[order_N], places_N[order_N]
        repeats = (places_N[1:] == places_N[:-1]).any()
    if repeats:
        raise StoreError("a head holds an id twice: the labels are not a distribution over ids")
    sampled_M = targets.sampled_ids_M
    if len(sampled_M):
        sampled_M = (np.sort(_position_keys(sampled_M, targets.sampled_counts_P)) & 0xFFFFFFFF).astype(np.int32)
    return targets._replace(head_ids_N=ids_N, head_logprobs_N=logprobs_N, sampled_ids_M=sampled_M)


def _take_tokens(layout: Layout, unpacker: Unpacker, lengths_B: NDArray[np.int32]) -> Tokens:
    num_tokens, p = int(lengths_B.sum(dtype=np.int64)), num_positions(lengths_B)
    unpacker.charge(2 * p)
    input_ids_T = _take_ids(unpacker, layout, None, num_tokens)
    unmasked = unpacker.take((p + 7) // 8, 1, np.uint8)
    return Tokens(lengths_B, input_ids_T, np.unpackbits(unmasked, count=p, bitorder="little") == 0)


def _take_counts(unpacker: Unpacker, p: int, width: int) -> tuple[NDArray[np.int32], int]:
    """Entries of each position, and of all."""
    if width == 0:
        unpacker.skip(3)
        return np.zeros(p, np.int32), 0
    counts_P = np.int32(width) - unpacker.take(p, 3, np.int32)
    if p and counts_P.min() < 0:
        raise unpacker.error("a position has fewer entries than none")
    return counts_P, int(counts_P.sum(dtype=np.int64))


def _take_ids(
    unpacker: Unpacker, layout: Layout, counts_P: NDArray[np.int32] | None, num_entries: int
) -> NDArray[np.int32]:
    """Ids that ascend within each position; without ``counts_P`` each stands for itself."""
    if not num_entries:
        unpacker.skip(3)
        return np.zeros(0, np.int32)
    bins_N = unpacker.take(num_entries, 2, np.uint16)
    unpacker.charge(4 * num_entries)
    num_positions = num_entries if counts_P is None else len(counts_P)
    try:
        num_bytes = sum_lone_bins(bins_N) if counts_P is None else sum_bins(bins_N, counts_P)
    except ValueError as error:
        raise unpacker.error(f"it holds {error}") from None
    ids_N, largest = join_ids(bins_N, unpacker.take(num_bytes, 1, np.uint8), num_positions)
    if largest >= layout.vocabulary_size:
        raise unpacker.error(f"it holds id {largest}, beyond the vocabulary of {layout.vocabulary_size}")
    return ids_N


def _common(counts_P: NDArray[np.int32]) -> int | None:
    """The entries of each position where all have as many, more than none."""
    first = int(counts_P[0]) if len(counts_P) else 0
    return first if first and bool((counts_P == first).all()) else None


def _is_dense(layout: Layout, widths: Widths, counts_P: NDArray[np.int32]) -> bool:
    """Whether every head is the whole vocabulary, whose ids nobody needs to be told."""
    return widths.head == layout.vocabulary_size and _common(counts_P) == widths.head


def _position_keys(ids: NDArray[np.int32], counts_P: NDArray[np.int32]) -> NDArray[np.int64]:
    return np.repeat(np.arange(len(counts_P), dtype=np.int64) << 32, counts_P) | ids


# Lossy log-probs. A head entry's code counts levels down from the position's least probable one, its base: most entries
# lie near the cut, so that most codes are small. Code 0 is −inf, code c ≥ 1 is level base + 1 − c.
# Of next and forced ids: 0 = stored elsewhere (in the head; forced: or as the next token), 1 = −inf, c ≥ 2 = level
# c − 2.


def _head_codes(targets: Targets, quantizer: Quantizer) -> tuple[NDArray[np.uint16], NDArray[np.uint16]]:
    base_P = np.empty(len(targets.head_counts_P), np.uint16)
    codes_N = np.empty(len(targets.head_ids_N), np.uint16)
    logprobs_N, counts_P = targets.head_logprobs_N, targets.head_counts_P
    fastest().encode_head(logprobs_N, counts_P, quantizer.nearest, CELLS_PER_NAT, base_P, codes_N)
    return base_P, codes_N


def _outside_codes(
    logprobs: NDArray[np.float32], elsewhere: NDArray[np.bool_], quantizer: Quantizer
) -> NDArray[np.uint16]:
    is_zero = np.isneginf(logprobs)
    codes = quantizer.encode(np.where(is_zero | elsewhere, np.float32(0), logprobs).reshape(-1)) + np.uint16(2)
    codes = codes.reshape(logprobs.shape)
    codes[is_zero] = 1
    codes[elsewhere] = 0
    return codes


def _decode_outside(codes: NDArray[np.uint16], quantizer: Quantizer) -> NDArray[np.float32]:
    """Log-probs of what is stored outside the head; −inf for what is stored elsewhere."""
    logprobs = np.take(quantizer.logprobs_L, np.maximum(codes, 2) - np.uint16(2), mode="clip")
    logprobs[codes < 2] = -np.inf
    return logprobs


def held_elsewhere(targets: Targets, next_P: NDArray[np.int32], forced_ids: Sequence[int]) -> Elsewhere:
    """Which next and forced ids a position keeps already; the ids of each head must ascend."""
    next_in_head_P = _places_in_head(targets, next_P) >= 0
    forced_PF = np.zeros((len(next_P), len(forced_ids)), np.bool_)
    for f, forced in enumerate(forced_ids):
        forced_PF[:, f] = (_places_in_head(targets, np.full_like(next_P, forced)) >= 0) | (next_P == forced)
    return next_in_head_P, forced_PF


def _places_in_head(targets: Targets, ids_P: NDArray[np.int32]) -> NDArray[np.int64]:
    """Where in ``head_ids_N`` the id of each position is, −1 where its head lacks it."""
    places_P = np.empty(len(ids_P), np.int64)
    fastest().find_in_heads(targets.head_ids_N, targets.head_counts_P, ids_P, places_P)
    return places_P


def _fill_in(
    layout: Layout, tokens: Tokens, targets: Targets, sums_P: NDArray[np.float64], quantizer: Quantizer
) -> Targets:
    """Decode what is stored outside the heads, rescale, and give next and forced ids that are in heads their values."""
    next_codes_P, forced_codes_PF = targets.next_logprob_P.view(np.uint16), targets.forced_logprobs_PF.view(np.uint16)
    next_P = _decode_outside(next_codes_P, quantizer)
    forced_PF = _decode_outside(forced_codes_PF, quantizer)
    sums_P += np.exp(next_P)
    if layout.forced_ids:
        sums_P += np.exp(forced_PF).sum(1)
    shift_P = _shift(sums_P, targets.tail_logmass_P, quantizer.half_step)
    fastest().shift_heads(targets.head_logprobs_N, targets.head_counts_P, shift_P)
    next_P += shift_P
    forced_PF += shift_P[:, None]
    next_ids_P = next_ids(tokens)
    _copy_from_head(next_P, next_codes_P == 0, targets, next_ids_P)
    for f, forced in enumerate(layout.forced_ids):
        is_elsewhere_P = forced_codes_PF[:, f] == 0
        is_next_P = is_elsewhere_P & (next_ids_P == forced)
        forced_PF[is_next_P, f] = next_P[is_next_P]
        _copy_from_head(forced_PF[:, f], is_elsewhere_P & ~is_next_P, targets, np.full_like(next_ids_P, forced))
    return targets._replace(next_logprob_P=next_P, forced_logprobs_PF=forced_PF)


def _copy_from_head(
    logprobs_P: NDArray[np.float32], wanted_P: NDArray[np.bool_], targets: Targets, ids_P: NDArray[np.int32]
) -> None:
    if wanted_P.any():
        places_P = _places_in_head(targets, ids_P)
        wanted_P = wanted_P & (places_P >= 0)
        logprobs_P[wanted_P] = targets.head_logprobs_N[places_P[wanted_P]]


def _shift(sums_P: NDArray[np.float64], tail_logmass_P: NDArray[np.float32], half_step: float) -> NDArray[np.float32]:
    """What to add to the rounded log-probs of each position so that they and the tail sum to one.

    The kept mass is 1 − tail. Rounding moved every log-prob by at most half a step, and so the log of their sum; the
    bound keeps a head of tiny mass from absorbing the float32 noise of its tail.
    """
    kept_P = -np.expm1(np.minimum(tail_logmass_P, 0).astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift_P = np.log(kept_P / sums_P)
    shift_P[np.isnan(shift_P)] = 0.0
    return np.clip(shift_P, -half_step, half_step).astype(np.float32)
