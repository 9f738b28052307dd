"""Which rows a step trains on: the same for any ranks, every row once an epoch, few shapes, little padding."""

import json
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from training.config import CurriculumConfig, CurriculumScheduleConfig, RowCurriculumConfig
from training.curriculum.batches import (
    MAX_PADDING,
    BatchPlan,
    Cursor,
    Prefix,
    length_bucket,
    micro_batches,
    padded_positions,
    padding_share,
)
from training.curriculum.clock import Curriculum
from training.curriculum.difficulty import easiest_percent

PREFIXES = CurriculumConfig(
    min_difficulty=8, max_difficulty=40, schedule_config=CurriculumScheduleConfig(total_curriculum_tokens=900)
)
BUCKETS = PREFIXES.model_copy(update={"mode": "bucket"})
EASY_FIRST = RowCurriculumConfig(
    min_difficulty=20, schedule_config=CurriculumScheduleConfig(total_curriculum_tokens=900, difficulty_step=5)
)
SOME_LENGTHS = st.lists(st.integers(1, 50), min_size=1, max_size=40)


def make_plan(lengths: list[int], curriculum: CurriculumConfig | None, seed: int = 0, **options: Any) -> BatchPlan:
    rows_N, lengths_N = np.arange(100, 100 + len(lengths)), np.asarray(lengths, np.int32)
    return BatchPlan(rows_N, lengths_N, 64, seed, Curriculum(curriculum, options.pop("rows", None)), **options)


def steps(plan: BatchPlan, count: int, cursor: Cursor = Cursor()) -> list[tuple[list[Prefix], int, Cursor]]:  # noqa: B008
    found = []
    for _ in range(count):
        found.append(plan.next(cursor))
        cursor = found[-1][2]
    return found


@settings(deadline=None, max_examples=50)
@given(SOME_LENGTHS.filter(lambda x: max(x) > 1), st.booleans(), st.integers(0, 9))
def test_every_row_is_spent_once_an_epoch(lengths: list[int], grows: bool, seed: int) -> None:
    plan = make_plan(lengths, PREFIXES if grows else None, seed)
    taken: list[Prefix] = []
    for prefixes, length, cursor in steps(plan, 40):
        tokens = sum(prefix.positions for prefix in prefixes)
        assert 0 < tokens <= 64
        for row, positions in prefixes:
            assert positions == min(length, lengths[row - 100] - 1)
        taken += prefixes
        assert [len(taken)] == list(cursor.spent)
        assert cursor.epoch == len(taken) // len(plan.rows_N)
        assert cursor.tokens_seen == cursor.clock == sum(prefix.positions for prefix in taken)
    usable = {100 + i for i, length in enumerate(lengths) if length > 1}
    for start in range(0, len(taken) - len(usable) + 1, len(usable)):
        assert {prefix.row for prefix in taken[start : start + len(usable)]} == usable


def test_a_step_is_full_and_the_next_row_did_not_fit() -> None:
    plan = make_plan([20] * 30, None)
    for (prefixes, _, _), _ in pairwise(steps(plan, 10)):
        assert sum(prefix.positions for prefix in prefixes) == 57  # three rows of 19; a fourth would make 76


@pytest.mark.parametrize("curriculum", [PREFIXES, BUCKETS], ids=["prefix", "bucket"])
def test_steps_follow_from_seed_and_cursor_alone(curriculum: CurriculumConfig) -> None:
    lengths = [*np.random.default_rng(0).integers(2, 41, 60).tolist(), 8]
    options: dict[str, Any] = {"rows": EASY_FIRST, "percent_N": np.linspace(1, 100, 61)}
    whole = steps(make_plan(lengths, curriculum, **options), 50)
    for at in (0, 7, 33):
        saved = Cursor(**json.loads(json.dumps(whole[at][2]._asdict())))  # as a checkpoint keeps it
        assert steps(make_plan(lengths, curriculum, **options), 50 - at - 1, saved) == whole[at + 1 :]
    assert steps(make_plan(lengths, curriculum, seed=1, **options), 5) != whole[:5]


def test_every_epoch_has_an_order_of_its_own() -> None:
    pools = make_plan([9] * 50, None).pools
    orders = [[pools.row((0, 0), place) for place in range(start, start + 50)] for start in (0, 50)]
    assert orders[0] != orders[1]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(50))


# Buckets


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(2, 50), max_size=40), st.integers(0, 9))
def test_buckets_give_whole_rows_that_fit(lengths: list[int], seed: int) -> None:
    lengths = [*lengths, 5, 9]  # some row fits from the start
    plan = make_plan(lengths, BUCKETS, seed)
    bucket_of = dict(zip(plan.rows_N.tolist(), length_bucket(plan.positions_N).tolist(), strict=True))
    spent: Counter[int] = Counter()
    for prefixes, length, cursor in steps(plan, 40):
        for row, positions in prefixes:
            assert positions == lengths[row - 100] - 1 <= length
        taken = [bucket_of[prefix.row] for prefix in prefixes]
        spent.update(prefix.row for prefix in prefixes)
        left = [bucket for bucket, following in pairwise(taken) if bucket != following]
        if cursor.epoch == 0:  # a step leaves a bucket only where it is spent
            assert {row for row, bucket in bucket_of.items() if bucket in left} <= set(spent)
        for bucket in set(bucket_of.values()):  # within a bucket, every row once before any twice
            counts = [spent[row] for row in bucket_of if bucket_of[row] == bucket]
            assert max(counts) - min(counts) <= 1
        assert cursor.epoch == min(spent[row] for row in bucket_of)


def test_bucket_mode_leaves_out_what_never_fits_and_catches_up_what_comes_late() -> None:
    plan = make_plan([8] * 20 + [32] * 20 + [50] * 3, BUCKETS)
    assert set(plan.positions_N.tolist()) == {7, 31}
    taken: Counter[int] = Counter()
    for prefixes, length, cursor in steps(plan, 60):
        taken.update(prefix.positions for prefix in prefixes)
        if length < 31:
            assert set(taken) == {7}
        if cursor.epoch == 1:
            break
    assert taken[31] == 20  # the first epoch ends when each long row was taken once


def test_cycles_spend_a_share_of_every_bucket() -> None:
    """Three cycles from short to long over one epoch: each takes about a third of each bucket."""
    lengths = [8] * 120 + [32] * 30
    total = sum(length - 1 for length in lengths)
    schedule = CurriculumScheduleConfig(difficulty=[7, 31], max_tokens=[120 * 7 // 3 - 20])
    config = CurriculumConfig(mode="bucket", schedule_type="fixed_discrete", min_difficulty=7, max_difficulty=31,
                              schedule_config=schedule, cycles=3, cycle_tokens=total // 3)  # fmt: skip
    plan = make_plan(lengths, config)
    cursor = Cursor()
    taken: list[Counter[int]] = [Counter() for _ in range(3)]
    while cursor.tokens_seen < total:
        cycle = min(cursor.clock // (total // 3), 2)
        prefixes, _, cursor = plan.next(cursor)
        taken[cycle].update(prefix.positions for prefix in prefixes)
    for of_cycle in taken:
        assert abs(of_cycle[7] - 40) <= 10
        assert abs(of_cycle[31] - 10) <= 3


# Easy rows first


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 60), st.sampled_from([None, PREFIXES]), st.integers(0, 9))
def test_easy_rows_come_first_and_each_once_an_epoch(
    num_rows: int, curriculum: CurriculumConfig | None, seed: int
) -> None:
    difficulty_N = np.random.default_rng(seed).permutation(num_rows + 20).astype(float)
    plan = make_plan([9] * (num_rows + 20), curriculum, seed, rows=EASY_FIRST, percent_N=easiest_percent(difficulty_N))
    spent: Counter[int] = Counter()
    cursor = Cursor()
    for _ in range(60):
        percent = plan.curriculum.percent(cursor.clock)
        prefixes, length, cursor = plan.next(cursor)
        ranks = [difficulty_N[prefix.row - 100] for prefix in prefixes]
        assert all(rank < percent / 100 * (num_rows + 20) for rank in ranks)
        assert all(prefix.positions == min(8, length) for prefix in prefixes)
        spent.update(prefix.row for prefix in prefixes)
        easiest = [row for row in plan.rows_N.tolist() if difficulty_N[row - 100] < 0.05 * (num_rows + 20)]
        assert max(spent[row] for row in easiest) - min(spent[row] for row in easiest) <= 1
    assert set(spent) == set(plan.rows_N.tolist())


# Micro-batches


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 5), st.integers(1, 300))
def test_micro_batches_deal_every_prefix_once(lengths: list[int], ranks: int, budget: int) -> None:
    prefixes = [Prefix(i, positions) for i, positions in enumerate(lengths)]
    dealt = micro_batches(prefixes, ranks, budget)
    assert len(dealt) == ranks
    assert len({len(of_rank) for of_rank in dealt}) == 1  # unequal numbers crash ZeRO-2
    groups = [group for of_rank in dealt for group in of_rank]
    assert sorted(prefix for group in groups for prefix in group) == sorted(prefixes)
    for group in groups:
        padded = len(group) * padded_positions(max((prefix.positions for prefix in group), default=1))
        assert padded <= budget or len(group) <= 1
    sizes = [{padded_positions(prefix.positions) for prefix in group} for group in groups]
    assert padding_share(dealt) < MAX_PADDING + 1e-9 or all(len(of_group) <= 1 for of_group in sizes)


@settings(deadline=None)
@given(st.integers(1, 2**20), st.integers(0, 5000))
def test_padded_lengths_are_few_and_near(positions: int, more: int) -> None:
    padded = padded_positions(positions)
    assert positions <= padded <= positions * 17 / 16
    assert padded_positions(padded) == padded
    assert positions <= padded_positions(positions, positions + more) <= min(padded, positions + more)


def test_there_are_sixteen_padded_lengths_in_an_octave() -> None:
    for octave in (32, 64, 128, 1024, 8192):
        assert len({padded_positions(n) for n in range(octave + 1, 2 * octave + 1)}) == 16


@pytest.mark.parametrize("rows_per_rank", [1, 2, 4, 16])
@pytest.mark.parametrize("ranks", [2, 4, 16])
def test_few_rows_per_rank_are_padded_as_little(ranks: int, rows_per_rank: int) -> None:
    """Windows of 1,024 and the ends of documents: ranks share them, and the last rounds have fewer rows than ranks."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        size = ranks * rows_per_rank
        lengths = np.where(rng.random(size) < 0.8, 1024, rng.integers(2, 1024, size))
        dealt = micro_batches([Prefix(i, int(n)) for i, n in enumerate(lengths)], ranks, 16384, 1024)
        assert padding_share(dealt, 1024) <= MAX_PADDING
        assert len(dealt[0]) <= 4
        padded = [sum(len(g) * padded_positions(g[0].positions, 1024) for g in of_rank if g) for of_rank in dealt]
        assert max(padded) <= np.mean(padded) + 1.5 * 1024, "no rank has rows more than it must"


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("ranks", [1, 4])
def test_padding_is_small_and_ranks_are_balanced(seed: int, ranks: int) -> None:
    lengths = np.random.default_rng(seed).integers(10, 250, 256)
    dealt = micro_batches([Prefix(i, int(n)) for i, n in enumerate(lengths)], ranks, 2**20)
    padded = [sum(len(g) * padded_positions(g[0].positions) for g in of_rank if g) for of_rank in dealt]
    assert padding_share(dealt) == pytest.approx(1 - lengths.sum() / sum(padded))
    assert padding_share(dealt) <= MAX_PADDING
    assert len(dealt[0]) < 24
    assert max(padded) < 1.15 * min(padded)
