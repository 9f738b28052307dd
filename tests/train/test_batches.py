"""Which rows a step trains on: the same for any number of ranks, every row once an epoch."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from training.batches import BatchPlan, Cursor, Prefix, micro_batches
from training.config import CurriculumConfig, CurriculumScheduleConfig
from training.source import shuffled_order

CURRICULUM = CurriculumConfig(
    min_difficulty=8, max_difficulty=40, schedule_config=CurriculumScheduleConfig(total_curriculum_tokens=900)
)


def shuffled(seed: int, epoch: int, rows_N: np.ndarray, _positions_N: np.ndarray) -> np.ndarray:
    return shuffled_order(seed, epoch, len(rows_N))


def make_plan(lengths: list[int], curriculum: CurriculumConfig | None, seed: int = 0) -> BatchPlan:
    return BatchPlan(np.arange(100, 100 + len(lengths)), np.asarray(lengths, np.int32), 64, seed, curriculum, shuffled)


def steps(plan: BatchPlan, count: int, cursor: Cursor = Cursor()) -> list[tuple[list[Prefix], int, Cursor]]:  # noqa: B008
    found = []
    for _ in range(count):
        found.append(plan.next(cursor))
        cursor = found[-1][2]
    return found


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=40).filter(lambda x: max(x) > 1), st.booleans(), st.integers(0, 9)
)
def test_every_row_is_spent_once_an_epoch(lengths: list[int], grows: bool, seed: int) -> None:
    plan = make_plan(lengths, CURRICULUM if grows else None, seed)
    taken: list[Prefix] = []
    for prefixes, length, cursor in steps(plan, 40):
        tokens = sum(prefix.positions for prefix in prefixes)
        assert 0 < tokens <= 64
        for row, positions in prefixes:
            assert positions == min(length, lengths[row - 100] - 1)
        taken += prefixes
        spent = cursor.epoch * len(plan.rows_N) + cursor.offset
        assert len(taken) == spent
        assert cursor.tokens_seen == sum(prefix.positions for prefix in taken)
    usable = {100 + i for i, length in enumerate(lengths) if length > 1}
    for start in range(0, len(taken) - len(usable) + 1, len(usable)):
        assert {prefix.row for prefix in taken[start : start + len(usable)]} == usable


def test_a_step_is_full_and_the_next_row_did_not_fit() -> None:
    plan = make_plan([20] * 30, None)
    for (prefixes, _, _), _ in pairwise(steps(plan, 10)):
        assert sum(prefix.positions for prefix in prefixes) == 57  # three rows of 19; a fourth would make 76


def test_steps_follow_from_seed_and_cursor_alone() -> None:
    lengths = list(np.random.default_rng(0).integers(2, 50, 60))
    whole = steps(make_plan(lengths, CURRICULUM), 50)
    for at in (0, 7, 33):
        rest = steps(make_plan(lengths, CURRICULUM), 50 - at - 1, whole[at][2])
        assert rest == whole[at + 1 :]
    assert steps(make_plan(lengths, CURRICULUM, seed=1), 5) != whole[:5]
    orders = [make_plan([9] * 50, None)._epoch_order(epoch).tolist() for epoch in (0, 1)]
    assert orders[0] != orders[1]


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
        padded = len(group) * max((prefix.positions for prefix in group), default=0)
        assert padded <= budget or len(group) == 1


def test_padding_is_small_and_ranks_are_balanced() -> None:
    lengths = np.random.default_rng(0).integers(10, 250, 256)
    dealt = micro_batches([Prefix(i, int(n)) for i, n in enumerate(lengths)], 4, 2048)
    padded = [sum(len(group) * max(p.positions for p in group) for group in of_rank) for of_rank in dealt]
    assert sum(padded) < 1.05 * lengths.sum()
    assert max(padded) < 1.15 * min(padded)
