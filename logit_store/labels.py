"""Labels as they come from a teacher: refused where they are no distributions, brought into the form that is stored."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_store.codec.blocks import Elsewhere, Layout, Tokens, join_tokens, sort_targets
from logit_store.errors import StoreError
from logit_store.rows import LogitRow, Targets, TokenRow, sum_entries

MAX_SUM_ERROR = 1e-2
"""How far kept mass and tail may be from one before they are refused: bfloat16 engines give 1e-3."""


def join_rows(layout: Layout, rows: Sequence[TokenRow]) -> Tokens:
    """The tokens of rows, one after the other. Raises StoreError where they are none, or masked wrongly."""
    for row in rows:
        t, p = len(row.input_ids_T), max(len(row.input_ids_T) - 1, 0)
        if row.loss_mask_P is not None and len(row.loss_mask_P) != p:
            raise StoreError(
                f"a row of {t} tokens has a loss mask of {len(row.loss_mask_P)}: it needs {p}, one for each "
                "token that is predicted"
            )
    tokens = join_tokens(rows)
    _check_ids(layout, tokens.input_ids_T)
    return tokens._replace(input_ids_T=tokens.input_ids_T.astype(np.int32), loss_mask_P=tokens.loss_mask_P.astype(bool))


def join_labels(layout: Layout, rows: Sequence[LogitRow]) -> tuple[Tokens, Targets]:
    """Tokens and labels of rows, one after the other, heads in order of ids.

    Raises StoreError: a label is none, or does not belong to its row.
    """
    tokens = join_rows(layout, [row.tokens for row in rows])
    parts = [_converted(layout, row) for row in rows]
    targets = parts[0] if len(parts) == 1 else Targets(*(np.concatenate(c) for c in zip(*parts, strict=True)))
    targets = sort_targets(targets)
    _check_values(targets)
    # Float noise may leave a tail a little more likely than certain; no reader should have to know.
    return tokens, targets._replace(tail_logmass_P=np.minimum(targets.tail_logmass_P, np.float32(0)))


def check_sums(targets: Targets, elsewhere: Elsewhere) -> NDArray[np.float64]:
    """Σ p of what each position keeps [P]. Raises StoreError where it and the tail are not one."""
    sums_P = kept_sums(targets, elsewhere, [np.exp(t) for t in _logprobs(targets)])
    if (error := sum_error(targets, sums_P)) > MAX_SUM_ERROR:
        raise StoreError(f"kept ids and tail of a position sum to 1 ± {error:.3g}; at most {MAX_SUM_ERROR} is rounding")
    return sums_P


def kept_sums(targets: Targets, elsewhere: Elsewhere, values: Sequence[NDArray[Any]]) -> NDArray[np.float64]:
    """For each position the sum over what it keeps, every id once, of values of heads [N], next [P], forced [P, F]."""
    head_N, next_P, forced_PF = values
    sums_P = sum_entries(head_N, targets.head_counts_P)
    next_elsewhere_P, forced_elsewhere_PF = elsewhere
    sums_P += np.where(next_elsewhere_P, 0, next_P)
    if forced_PF.shape[1]:
        sums_P += np.where(forced_elsewhere_PF, 0, forced_PF).sum(1)
    return sums_P


def _logprobs(targets: Targets) -> list[NDArray[np.float32]]:
    return [targets.head_logprobs_N, targets.next_logprob_P, targets.forced_logprobs_PF]


def sum_error(targets: Targets, sums_P: NDArray[np.float64]) -> float:
    """How far any position's kept mass and tail are from one."""
    return float(np.abs(sums_P + np.exp(targets.tail_logmass_P.astype(np.float64)) - 1).max(initial=0.0))


def normalised(targets: Targets, sums_P: NDArray[np.float64], max_shift: float) -> Targets:
    """The labels with the kept log-probs of each position shifted, by at most ``max_shift`` nats, so that they sum to
    what the tail leaves: what a reader of the lossy codec rescales to, and so what rounding is measured against.
    """
    kept_P = -np.expm1(targets.tail_logmass_P.astype(np.float64))
    with np.errstate(divide="ignore", invalid="ignore"):
        shift_P = np.log(kept_P / sums_P)
    shift_P[np.isnan(shift_P)] = 0.0
    shift_P = np.clip(shift_P, -max_shift, max_shift).astype(np.float32)
    return targets._replace(
        head_logprobs_N=targets.head_logprobs_N + np.repeat(shift_P, targets.head_counts_P),
        next_logprob_P=targets.next_logprob_P + shift_P,
        forced_logprobs_PF=targets.forced_logprobs_PF + shift_P[:, None],
    )


def _converted(layout: Layout, row: LogitRow) -> Targets:
    """A row's labels as contiguous float32 and int32, each array of the length that it must have."""
    p, targets = max(len(row.tokens.input_ids_T) - 1, 0), row.targets
    counts = (targets.head_counts_P, targets.sampled_counts_P)
    if any(len(c) and int(c.min()) < 0 for c in counts):
        raise StoreError("a position has fewer entries than none: the labels' counts are wrong")
    heads, draws = (int(c.sum(dtype=np.int64)) for c in counts)
    shapes = {
        "head_counts_P": (p,), "head_ids_N": (heads,), "head_logprobs_N": (heads,), "next_logprob_P": (p,),
        "tail_logmass_P": (p,), "log_partition_PS": (p, layout.num_temperatures),
        "forced_logprobs_PF": (p, len(layout.forced_ids)), "sampled_counts_P": (p,), "sampled_ids_M": (draws,),
    }  # fmt: skip
    converted: dict[str, Any] = {}
    for name, shape in shapes.items():
        values = getattr(targets, name)
        if values.shape != shape:
            raise StoreError(
                f"a row of {p + 1} tokens has labels whose {name} are {values.shape}; they must be {shape}: labels and "
                "tokens do not belong together"
            )
        if "ids" in name:
            _check_ids(layout, values)  # before a wider integer is cut to 32 bits
        is_whole = "ids" in name or "counts" in name
        converted[name] = np.ascontiguousarray(values, np.int32 if is_whole else np.float32)
    return Targets(**converted)


def _check_ids(layout: Layout, ids: NDArray[np.int32]) -> None:
    if len(ids) and not 0 <= int(ids.min()) <= int(ids.max()) < layout.vocabulary_size:
        v = layout.vocabulary_size
        raise StoreError(f"ids from {ids.min()} to {ids.max()}: some are outside the vocabulary of {v}")


def _check_values(targets: Targets) -> None:
    named = {
        "head log-probability": targets.head_logprobs_N,
        "next token's log-probability": targets.next_logprob_P,
        "forced id's log-probability": targets.forced_logprobs_PF,
        "log of the tail's mass": targets.tail_logmass_P,
    }
    for what, values in named.items():
        if not (values <= 1e-2).all():
            raise StoreError(f"a {what} is {values[~(values <= 1e-2)][0]}: the labels are no distribution")
    if np.isnan(targets.log_partition_PS).any() or np.isposinf(targets.log_partition_PS).any():
        raise StoreError("a log-partition is NaN or infinite: the labels are no distribution")
    if (targets.sampled_counts_P[np.isneginf(targets.tail_logmass_P)] > 0).any():
        raise StoreError("a position has draws from a tail without mass: the labels are no distribution")
