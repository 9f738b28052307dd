"""The batch plan of a run, and whether its data is enough for its curriculum: looked at before anything is trained."""

import os
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_store import LogitStore
from logit_store.errors import ConfigError, StoreError
from logit_store.identity import digest_json
from training.config import TrainConfig
from training.curriculum.batches import BatchPlan, Cursor
from training.curriculum.clock import Curriculum
from training.curriculum.cuts import cut_of, plain_cut
from training.curriculum.difficulty import easiest_percent, row_difficulties
from training.data.source import Source
from training.schedules import difficulty

NUM_PROBES = 1000
"""Times of a run at which its curricula are tried: a schedule that is wrong is wrong for longer than 1/1000 of it."""

NUM_SAMPLED = 128
"""Most rows of a pool whose loss masks are read to tell what it holds; at least half as many, if it has them. Where the
shares of rows deviate by 0.3, their mean is then known to 0.3 / √64, about 4 % of all positions."""


def make_plan(config: TrainConfig, source: Source) -> BatchPlan:
    """The batch plan of the source's training rows.

    Raises StoreError: there are no rows to train on, or none that carries loss; ConfigError: the curriculum, the steps
    or the ranks do not fit the data.
    """
    rows_N = source.rows("train")
    rows_N = rows_N[source.lengths_N[rows_N] > 1]
    if not len(rows_N):
        raise StoreError(f"{source.name} has no rows to train on: all are held out, or of one token")
    lengths_N, lengths = source.lengths_N[rows_N], config.curriculum
    if lengths is not None and lengths.max_difficulty > lengths_N.max():
        raise ConfigError(
            f"curriculum.max_difficulty {lengths.max_difficulty} is longer than the data: the longest row of "
            f"{source.name} has {lengths_N.max()} tokens. Choose at most that, or tokenize with a longer "
            "tokens.window"
        )
    is_mixture = len(source.texts) > 1
    if is_mixture:
        _check_mixture(config)
    plan = BatchPlan(
        rows_N,
        lengths_N,
        config.schedule.tokens_per_step,
        config.run.seed,
        Curriculum(lengths, config.row_curriculum),
        cut_of(source, lengths.boundary if lengths else "token"),
        _percents(config, source, rows_N),
        partial(source.order, config.run.seed) if is_mixture else None,
    )
    if is_mixture:
        source.check_shares(plan.rows_N, plan.positions_N)
    _check_curriculum(plan, source, config.schedule.total_tokens)
    _check_steps(plan, config)
    _check_loss_masks(plan, config, source)
    return plan


def plan_warnings(plan: BatchPlan, config: TrainConfig, num_rows: int) -> list[str]:
    """What a person should know of a plan that is sound. ``num_rows``: rows of the store that are to be trained on."""
    warnings = []
    total, lengths = config.schedule.total_tokens, config.curriculum
    if lengths is not None and (length := plan.length(total)) < lengths.max_difficulty:
        warnings.append(
            f"schedule.total_tokens {total:,} end before the curriculum does: the last sequences have {length} "
            f"positions, not {lengths.max_difficulty}"
        )
    if plan.curriculum.is_bucketed and lengths is not None and (too_long := num_rows - len(plan.rows_N)):
        warnings.append(
            f"{too_long:,} of {num_rows:,} rows are longer than curriculum.max_difficulty {lengths.max_difficulty}, "
            "or of one token, and are not trained on"
        )
    return warnings


def end_warnings(plan: BatchPlan, cursor: Cursor) -> list[str]:
    """What a person should know of a run that ended at ``cursor``: whether pacing let its curricula come to an end."""
    lengths, rows, found = plan.curriculum.lengths, plan.curriculum.rows, []
    if lengths is not None and (length := plan.length(cursor.clock)) < lengths.max_difficulty:
        found.append(f"sequences had {length} positions, not {lengths.max_difficulty}")
    if rows is not None and (percent := plan.curriculum.percent(cursor.clock)) < rows.max_difficulty:
        found.append(f"the easiest {percent} % of the rows were trained on, not {rows.max_difficulty} %")
    if plan.can_run_ahead or not found:
        return []
    return [
        f"curriculum.pacing held the clock at {cursor.clock:,} of {cursor.tokens_seen:,} tokens, and the run ended "
        f"before its curriculum: to the end {' and '.join(found)}. Raise curriculum.pacing.max_volatility, or train "
        "longer"
    ]


def custom_identity(config: TrainConfig) -> dict[str, Any]:
    """What the user's own schedules give, by content: their code may change under the same name."""
    schedules = {"curriculum": config.curriculum, "row_curriculum": config.row_curriculum}
    return {
        f"{name}_values": digest_json([difficulty(schedule, clock) for clock in _probes(config.schedule.total_tokens)])
        for name, schedule in schedules.items()
        if schedule is not None and schedule.schedule_type == "custom"
    }


def _check_mixture(config: TrainConfig) -> None:
    if config.row_curriculum is not None or (config.curriculum and config.curriculum.mode == "bucket"):
        raise ConfigError(
            "data.mixture draws rows by its weights, and row_curriculum and curriculum.mode=bucket by theirs: give one "
            "store, or leave these out"
        )


def _percents(config: TrainConfig, source: Source, rows_N: NDArray[np.int64]) -> NDArray[np.float64] | None:
    """Of several teachers, by the weighted mean of what they find difficult."""
    if config.row_curriculum is None:
        return None
    (text,) = source.texts
    difficulty_N = np.zeros(len(rows_N))
    for store, weight in zip(text.stores, text.store_weights, strict=True):
        if not isinstance(store, LogitStore):
            raise ConfigError(
                f"row_curriculum needs a teacher's labels, and {store.storage.url} holds tokens alone: leave it out, "
                "or give a logit store (loss.alpha=0 may stay)"
            )
        difficulty_N += weight * row_difficulties(store, rows_N, config.row_curriculum.metric)
    return easiest_percent(difficulty_N)


def _probes(total_tokens: int) -> list[int]:
    return sorted({total_tokens * i // NUM_PROBES for i in range(NUM_PROBES)})


def _check_curriculum(plan: BatchPlan, source: Source, total_tokens: int) -> None:
    """Refuse a curriculum that no row fits, or under which rows are spent twice while others wait for their turn."""
    cycles = [s.cycle_tokens for s in (plan.curriculum.lengths, plan.curriculum.rows) if s and s.cycle_tokens]
    filled_P = (plan.pools.sizes_BC > 0).reshape(-1)
    carrying_PL: NDArray[np.float64] | None = None
    for clock in _probes(min([total_tokens, *cycles])):
        length, open_P = plan.length(clock), plan.open(clock).reshape(-1) & filled_P
        if not open_P.any():
            raise ConfigError(
                f"no row fits the curriculum after {clock:,} tokens: all are longer than {length} positions, or "
                "harder. Raise min_difficulty, or tokenize with tokens.pieces=powers_of_two"
            )
        if (open_P == filled_P).all():
            continue
        if carrying_PL is None:  # reading may be needed for it: not before there is a question
            carrying_PL = _carrying(plan, source)
        enough = round(carrying_PL[open_P, min(length, carrying_PL.shape[1] - 1)].sum())
        if clock > enough / plan.curriculum.parts:
            share = f"a cycle's share of 1/{plan.curriculum.parts} of " if plan.curriculum.parts > 1 else ""
            raise ConfigError(
                f"the curriculum is longer than the data: after {clock:,} tokens it is still at rows of which {share}"
                f"all there are hold {enough:,} positions that carry loss, and would be trained on again while others "
                "wait. Shorten total_curriculum_tokens, or raise min_difficulty"
            )


def _carrying(plan: BatchPlan, source: Source) -> NDArray[np.float64]:
    """Loss-carrying positions among the first 0, 1, … of all rows of each pool, [P, longest + 1].

    Exact without loss masks, and where a pool has no more than ``NUM_SAMPLED`` rows; else from rows spread evenly.
    """
    num_pools, longest = plan.pools.sizes_BC.size, int(plan.positions_N.max())
    if not source.has_masks:
        flat_N = plan.pools.pool_N * (longest + 1) + plan.positions_N
        ending_PL = np.bincount(flat_N, minlength=num_pools * (longest + 1)).reshape(num_pools, longest + 1)
        at_least_PL = ending_PL[:, ::-1].cumsum(1)[:, ::-1]
        return np.pad(at_least_PL[:, 1:].cumsum(1).astype(np.float64), ((0, 0), (1, 0)))
    at_PL = np.zeros((num_pools, longest + 1))
    for pool in range(num_pools):
        rows_N = plan.rows_N[plan.pools.pool_N == pool]
        sampled_N = rows_N[:: max(1, -(-len(rows_N) // NUM_SAMPLED))]
        for row in sampled_N.tolist():
            carries_loss_P = source.tokens(row).carries_loss_P
            at_PL[pool, 1 : len(carries_loss_P) + 1] += carries_loss_P * (len(rows_N) / len(sampled_N))
    return at_PL.cumsum(1)


def _check_steps(plan: BatchPlan, config: TrainConfig) -> None:
    longest, tokens = plan.longest, config.schedule.tokens_per_step
    if tokens < longest:
        raise ConfigError(f"schedule.tokens_per_step {tokens} is less than the longest sequence, {longest} positions")
    ranks = int(os.environ.get("WORLD_SIZE") or config.launcher.ranks or 1)
    if tokens // longest < ranks:
        raise ConfigError(
            f"schedule.tokens_per_step {tokens} does not divide among {ranks} ranks: it holds {tokens // longest} "
            f"sequences of {longest} positions, so that some rank would have none. Use at least {ranks * longest}"
        )


def _check_loss_masks(plan: BatchPlan, config: TrainConfig, source: Source) -> None:
    """Refuse a store in which nothing carries loss. Only rows of shards with loss masks are read, up to the first."""
    if plan.cut is plain_cut:
        return
    clock = min(_probes(config.schedule.total_tokens), key=plan.length)
    length, open_P = plan.length(clock), plan.open(clock).reshape(-1)
    for i in np.flatnonzero(open_P[plan.pools.pool_N]).tolist():
        if plan.cut(int(plan.rows_N[i]), min(length, int(plan.positions_N[i])))[1]:
            return
    raise StoreError(
        f"{source.name}: no position carries loss within the first {length} of any row: its loss masks are "
        "empty there. Raise curriculum.min_difficulty, or tokenize with other loss masks"
    )
