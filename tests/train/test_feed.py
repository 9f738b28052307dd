"""Steps read ahead are the steps that the plan says, and what goes wrong in them is said at their turn."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logit_store import LogitStore
from logit_store.errors import CorruptError
from tests.store.made import make_row, write_store
from training.config import LossConfig, TrainConfig
from training.curriculum.batches import BatchPlan, Cursor, micro_batches
from training.data.feed import Feed, Step
from training.data.micro_batch import MicroBatch, collate
from training.data.source import Source

TOTAL = 900


def make_config(store: LogitStore, **data: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "run": {"path": "none"},
        "data": {"store": store.storage.url, **data},
        "student": {"config": {"model_type": "llama"}},
        "schedule": {"total_tokens": TOTAL, "tokens_per_step": 90, "micro_batch_tokens": 60, "lr": 0.1},
    })  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, int(rng.integers(2, 40)), 8) for _ in range(40)]
    rows = [row._replace(tokens=row.tokens._replace(split="train")) for row in rows]
    return write_store(str(tmp_path_factory.mktemp("feed") / "store"), [rows[i : i + 2] for i in range(0, 40, 2)])


def make_feed(store: LogitStore, ranks: int = 1, rank: int = 0, **data: Any) -> Feed:
    config, source = make_config(store, **data), Source.of(store)
    return Feed(config, source, make_plan(source), ranks, rank)


def make_plan(source: Source) -> BatchPlan:
    rows_N = source.rows("train")
    return BatchPlan(rows_N, source.lengths_N[rows_N], 90, 0)


def tensors(batch: MicroBatch) -> list[torch.Tensor]:
    *found, teachers = batch
    for _, targets in teachers:
        found += targets
    return found


def assert_same(a: list[MicroBatch], b: list[MicroBatch]) -> None:
    assert len(a) == len(b)
    for ours, theirs in zip(a, b, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(tensors(ours), tensors(theirs), strict=True))


@pytest.mark.parametrize(("ahead", "threads"), [(1, 1), (3, 4)])
@pytest.mark.parametrize("rank", [0, 1])
def test_threads_change_nothing_of_a_step(made: LogitStore, ahead: int, threads: int, rank: int) -> None:
    source, cursor, steps = Source.of(made), Cursor(), 0
    plan = make_plan(source)
    with make_feed(made, 2, rank, ahead=ahead, threads=threads) as feed:
        while cursor.tokens_seen < TOTAL:
            prefixes, length, after = plan.next(cursor)
            step = feed.next(cursor)
            assert (sorted(step.prefixes), step.length, step.cursor) == (sorted(prefixes), length, after)
            groups = micro_batches(prefixes, 2, 60, length)[rank]
            assert_same(step.batches, [collate(source, group, length) for group in groups])
            assert step.wait_s >= 0
            cursor, steps = step.cursor, steps + 1
        assert steps >= TOTAL // 90
        assert [future.result() for future in feed._ahead] == [None] * ahead  # nothing is read beyond the run's end


def walk(feed: Feed, cursor: Cursor, count: int) -> list[Step]:
    steps = []
    for _ in range(count):
        steps.append(feed.next(cursor))
        cursor = steps[-1].cursor
    return steps


def test_a_run_goes_on_at_any_cursor_also_where_nobody_read_ahead(made: LogitStore) -> None:
    with make_feed(made) as feed:
        whole = walk(feed, Cursor(), 8)
        for at in (4, 0, 6):  # elsewhere than it was about to go
            again = feed.next(whole[at].cursor)
            assert again.cursor == whole[at + 1].cursor
            assert_same(again.batches, whole[at + 1].batches)
    with make_feed(made) as resumed:
        assert_same(resumed.next(whole[5].cursor).batches, whole[6].batches)


def test_a_plan_that_waits_for_its_steps_is_not_read_ahead(made: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with make_feed(made) as feed:
        monkeypatch.setattr(BatchPlan, "can_run_ahead", False)
        steps = walk(feed, Cursor(), 3)
        assert not feed._ahead
    monkeypatch.undo()
    with make_feed(made) as other:
        for ours, theirs in zip(steps, walk(other, Cursor(), 3), strict=True):
            assert_same(ours.batches, theirs.batches)


def test_planning_goes_on_while_the_student_computes_and_counts_as_waiting(
    made: LogitStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows with loss masks, and of those that are cut at boundaries, a plan reads the tokens."""
    planned: list[tuple[int, str]] = []

    def slow(plan: BatchPlan, cursor: Cursor) -> Any:
        planned.append((cursor.step, threading.current_thread().name))
        time.sleep(0.3)
        return quick(plan, cursor)

    quick = BatchPlan.next
    monkeypatch.setattr(BatchPlan, "next", slow)
    with make_feed(made, ahead=1) as feed:
        first = feed.next(Cursor())
        assert first.wait_s >= 0.3
        feed._ahead[0].result()  # while the student computes
        assert feed.next(first.cursor).wait_s < 0.3
    assert [step for step, _ in planned][:2] == [0, 1]
    assert all(thread.startswith("decant-plan") for _, thread in planned)


def test_a_plan_that_cannot_be_made_is_said_at_its_step(made: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plan: BatchPlan, cursor: Cursor) -> Any:
        if cursor.step == 2:
            raise CorruptError("its tokens")
        return whole(plan, cursor)

    whole = BatchPlan.next
    monkeypatch.setattr(BatchPlan, "next", broken)
    with make_feed(made, ahead=4) as feed:
        second = walk(feed, Cursor(), 2)[-1]
        for _ in range(2):
            with pytest.raises(CorruptError, match="its tokens"):
                feed.next(second.cursor)


def test_a_damaged_shard_is_named_at_the_step_that_needs_it(made: LogitStore, tmp_path: Path) -> None:
    with make_feed(made) as feed:
        steps = walk(feed, Cursor(), 7)
    first_use: dict[int, int] = {}
    for i, step in enumerate(steps):
        for prefix in step.prefixes:
            first_use.setdefault(made.shards.shard_of(prefix.row)[0], i)
    shard, first = max(first_use.items(), key=lambda use: use[1])
    assert first > 0
    shutil.copytree(made.storage.root, tmp_path / "damaged")
    path = tmp_path / "damaged" / made.shard_name(shard)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    damaged = LogitStore.open(str(tmp_path / "damaged"))
    with make_feed(damaged, ahead=4) as feed:
        good = walk(feed, Cursor(), first)  # the steps before it are whole, though it was read ahead
        assert_same(good[-1].batches, steps[first - 1].batches)
        with pytest.raises(CorruptError, match=path.name):
            feed.next(good[-1].cursor)


def test_a_loss_without_labels_reads_none(made: LogitStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LogitStore, "__getitem__", None)
    config = make_config(made)
    without = config.model_copy(update={"loss": LossConfig(alpha=0.0)})
    with Feed(without, Source.of(made), make_plan(Source.of(made)), 1, 0) as feed:
        step = feed.next(Cursor())
    assert all(batch.targets == () for batch in step.batches)
    assert sum(len(batch.next_ids_N) for batch in step.batches) == step.cursor.tokens_seen
