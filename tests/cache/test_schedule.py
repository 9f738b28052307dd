"""Policy: whatever dies, every shard is made once, the rows that kill are left out, and nothing is tried for ever."""

import random
import tracemalloc
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.job.schedule import MAX_DELAY_S, STRIKES, Cause, Limits, Schedule, Task

ROWS = 9
LIMITS = Limits(max_attempts=6, retry_delay_s=1.0, max_left_out=1000, num_workers=3)


class World(NamedTuple):
    """What workers die of: rows by shard; with this probability, and cause, of nothing of ours."""

    poison: set[tuple[int, int]]
    noise: float = 0.0
    noise_cause: Cause = Cause.OUTSIDE
    poison_cause: Cause = Cause.PROCESS
    deadly_shard: int | None = None
    """Takes down every worker, whatever rows are scored."""

    def outcome(self, task: Task, rng: random.Random) -> Cause | None:
        if rng.random() < self.noise:
            return self.noise_cause
        if task.shard == self.deadly_shard:
            return self.poison_cause
        left_out = dict(task.left_out)
        scored = [row for row in task.probe or range(ROWS) if row not in left_out]
        return self.poison_cause if any((task.shard, row) in self.poison for row in scored) else None


def run(schedule: Schedule, world: World, num_workers: int, seed: int) -> list[Task]:
    """Simulate workers until the schedule is over; every task that was given out, in order."""
    rng, now, given = random.Random(seed), 0.0, list[Task]()
    in_flight: dict[int, list[Task]] = {worker: [] for worker in range(num_workers)}
    is_fresh = dict.fromkeys(in_flight, True)
    for _ in range(100_000):
        if schedule.is_over or schedule.hopeless():
            return given
        for worker, tasks in in_flight.items():
            while (task := schedule.next(worker, len(tasks), is_fresh[worker], now)) is not None:
                others = [t.shard for ts in in_flight.values() for t in ts]
                assert task.shard not in others
                if task.probe is not None:
                    assert not tasks
                    assert is_fresh[worker] or len(task.probe) > 1
                    assert set(task.probe) - dict(task.left_out).keys()
                tasks.append(task)
                given.append(task)
                is_fresh[worker] = False
            if not tasks and schedule.needs_fresh_worker(worker):
                is_fresh[worker] = True
        busy = [worker for worker, tasks in in_flight.items() if tasks]
        if not busy:
            wakes_at = schedule.wakes_at()
            assert wakes_at is not None
            assert wakes_at <= now + MAX_DELAY_S
            now = max(now, wakes_at)
            continue
        worker = rng.choice(busy)
        cause = world.outcome(in_flight[worker][0], rng)
        if cause is None:
            schedule.done(worker, in_flight[worker].pop(0))
        elif cause in (Cause.STORAGE, Cause.LABELS):
            schedule.failed(worker, in_flight[worker].pop(0), cause, "it", now)
        else:
            schedule.died(worker, in_flight[worker], cause, "it", now)
            in_flight[worker], is_fresh[worker] = [], True
    raise AssertionError("the schedule does not end")


poisons = st.sets(st.tuples(st.integers(0, 7), st.integers(0, ROWS - 1)), max_size=4)


@settings(deadline=None, max_examples=150)
@given(
    poisons,
    st.integers(1, 4),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 0.3]),
    st.sampled_from([Cause.PROCESS, Cause.MEMORY, Cause.LABELS]),
)
def test_the_rows_that_kill_are_left_out_and_no_others(
    poison: set[tuple[int, int]], num_workers: int, seed: int, noise: float, cause: Cause
) -> None:
    """Whatever happens to nodes meanwhile; also those for which no batch is small enough, and those without labels."""
    schedule = Schedule(range(8), lambda _: ROWS, LIMITS)
    given = run(schedule, World(poison, noise, poison_cause=cause), num_workers, seed)
    assert schedule.is_over
    assert schedule.num_done == 8
    assert set(schedule.left_out) == poison
    whole = [task for task in given if task.probe is None]
    assert {task.shard for task in whole} == set(range(8))
    assert all(dict(task.left_out).keys() <= {row for shard, row in poison if shard == task.shard} for task in whole)
    news = [fields for kind, fields in schedule.take_news() if kind == "left_out"]
    assert {(fields["shard"], fields["row"]) for fields in news} == poison


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([Cause.PROCESS, Cause.MEMORY, Cause.STORAGE]))
def test_now_and_then_anything_may_fail(num_workers: int, seed: int, cause: Cause) -> None:
    """Kills from outside that look like a worker's own death cost time and no row."""
    limits = Limits(max_attempts=50, num_workers=num_workers)
    schedule = Schedule(range(12), lambda _: ROWS, limits)
    run(schedule, World(set(), 0.15, cause), num_workers, seed)
    assert schedule.num_done == 12
    assert not schedule.left_out


@pytest.mark.parametrize("cause", [Cause.PROCESS, Cause.MEMORY, Cause.STORAGE, Cause.LABELS])
def test_what_always_fails_ends_the_job(cause: Cause) -> None:
    schedule = Schedule(range(1000), lambda _: ROWS, LIMITS)
    given = run(schedule, World(set(), 1.0, cause), 3, 0)
    assert "failures in a row" in str(schedule.hopeless())
    in_flight = 2 * 3  # what fails while storage is given a rest counts once
    assert len(given) <= 6 * 3 * (in_flight if cause == Cause.STORAGE else 2) + in_flight


def test_a_shard_that_only_fails_as_a_whole_is_given_up() -> None:
    """Its parts pass: smaller batches are tried, then it is left to the next run."""
    schedule, now = Schedule([5], lambda _: 2, LIMITS), 0.0
    halvings = []
    while not schedule.is_over:
        now = max(now, schedule.wakes_at() or 0.0)
        task = schedule.next(0, 0, True, now)
        assert task is not None
        if task.probe is None:
            halvings.append(task.halvings)
            schedule.died(0, [task], Cause.PROCESS, "too much", now)
        else:
            schedule.done(0, task)
    assert schedule.given_up == {5: "too much"}
    assert halvings == sorted(halvings)
    assert halvings[-1] > 0
    assert len(halvings) == LIMITS.max_attempts


@pytest.mark.parametrize("num_workers", [1, 4])
@pytest.mark.parametrize("cause", [Cause.PROCESS, Cause.MEMORY, Cause.LABELS])
def test_a_shard_that_kills_whatever_is_scored_is_given_up(num_workers: int, cause: Cause) -> None:
    """Each row is left out once; then none is left to suspect."""
    schedule = Schedule(range(8), lambda _: ROWS, LIMITS)
    run(schedule, World(set(), poison_cause=cause, deadly_shard=2), num_workers, 0)
    assert schedule.given_up == {2: "it"}
    assert schedule.num_done == 7
    assert schedule.is_over
    news = [(fields["shard"], fields.get("row")) for _, fields in schedule.take_news()]
    assert sorted(news[:-1]) == [(2, row) for row in range(ROWS)]


def test_a_worker_killed_for_its_memory_tries_smaller_batches() -> None:
    schedule = Schedule([0], lambda _: ROWS, LIMITS)
    first = schedule.next(0, 0, True, 0.0)
    assert first is not None
    schedule.died(0, [first], Cause.MEMORY, "low on memory", 0.0)
    assert schedule.next(0, 0, True, 0.5) is None  # not at once
    again = schedule.next(0, 0, True, 1.0)
    assert again is not None
    assert (again.halvings, again.probe) == (1, None)


def test_pauses_grow_to_a_minute() -> None:
    delays = [Limits(retry_delay_s=1.0).delay_s(attempts) for attempts in (1, 2, 3, 20, 5000)]
    assert delays == [1.0, 2.0, 4.0, MAX_DELAY_S, MAX_DELAY_S]


def test_a_row_is_left_out_after_three_fresh_workers() -> None:
    schedule, now = Schedule([0], lambda _: 1, LIMITS), 0.0
    probes = 0
    while not schedule.left_out:
        now = max(now, schedule.wakes_at() or 0.0)
        task = schedule.next(0, 0, True, now)
        assert task is not None
        probes += task.probe is not None
        schedule.died(0, [task], Cause.PROCESS, "segmentation fault", now)
    assert probes == STRIKES
    assert schedule.left_out == {(0, 0): "segmentation fault"}


def test_too_many_rows_left_out_end_the_job() -> None:
    limits = Limits(max_attempts=1000, max_left_out=3)
    schedule = Schedule(range(9), lambda _: ROWS, limits)
    run(schedule, World({(shard, 4) for shard in range(9)}), 1, 0)
    assert "max_left_out = 3" in str(schedule.hopeless())


def test_a_million_shards_are_planned_in_little_memory() -> None:
    tracemalloc.start()
    schedule = Schedule(np.arange(1_000_000).tolist(), lambda _: ROWS, LIMITS)
    for _ in range(100_000):
        task = schedule.next(0, 0, False, 0.0)
        assert task is not None
        schedule.done(0, task)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert schedule.num_left == 900_000
    assert peak_bytes < 64 * 2**20
