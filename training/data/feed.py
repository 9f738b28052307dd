"""The steps of a run, read and decoded by threads while the student computes."""

import time
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

from training.config import TrainConfig
from training.curriculum.batches import BatchPlan, Cursor, Prefix, micro_batches, padding_share
from training.data.micro_batch import MicroBatch, collate
from training.data.source import Source
from training.engine import on_gpus


class Step(NamedTuple):
    """What one step of one rank trains on."""

    dealt: list[list[list[Prefix]]]
    """The prefixes of each micro-batch of each rank."""
    length: int
    """Longest prefix that the curriculum allows."""
    padding: float
    """Share of padded positions, of all ranks."""
    cursor: Cursor
    """Where the run stands after it, as far as the plan alone knows."""
    batches: list[MicroBatch]
    """Of this rank."""
    wait_s: float
    """Seconds that nothing was done but wait for them."""

    @property
    def prefixes(self) -> list[Prefix]:
        """Of all ranks."""
        return [prefix for of_rank in self.dealt for group in of_rank for prefix in group]


class _Ahead(NamedTuple):
    step: Step
    batches: list[Future[MicroBatch]]


class Feed:
    """Gives the step at any cursor, and plans and reads the steps that should follow it ahead.

    What a step holds is the plan's word alone: threads change when it is read. One thread plans, for a step begins
    where the one before it ends, and planning reads tokens where rows have loss masks or are cut at boundaries; others
    read what is planned. Where a run goes elsewhere than the plan said (a curriculum that is paced by the gradient),
    what was read ahead is dropped. Labels are neither read nor decoded where the loss has no use for them. A context:
    it holds threads.
    """

    def __init__(self, config: TrainConfig, source: Source, plan: BatchPlan, num_ranks: int, rank: int) -> None:
        self.source, self.plan, self.num_ranks, self.rank = source, plan, num_ranks, rank
        self.config = config
        self._planner = ThreadPoolExecutor(1, "decant-plan")
        self._pool = ThreadPoolExecutor(config.data.threads, "decant-feed")
        self._ahead: deque[Future[_Ahead | None]] = deque()
        self._at: Cursor | None = None  # where the first step ahead begins, if that is known
        self._pins = on_gpus()

    def __enter__(self) -> "Feed":
        return self

    def __exit__(self, *_exception: object) -> None:
        self._drop()
        self._planner.shutdown()
        self._pool.shutdown()

    def next(self, cursor: Cursor) -> Step:
        """The step at ``cursor``; planning and reading of those after it is begun.

        Raises what reading it raises, before any rank has computed anything of it: CorruptError, StudentError.
        """
        started = time.monotonic()
        if not self._ahead or self._at != cursor:
            self._drop()
            self._ahead.append(self._planner.submit(self._plan, cursor))
        self._at = None
        first = self._ahead.popleft()
        self._plan_on(first)
        found = first.result()
        assert found is not None, "the run has ended"
        batches = [future.result() for future in found.batches]
        self._at = found.step.cursor
        return found.step._replace(batches=batches, wait_s=time.monotonic() - started)

    def _plan_on(self, last: Future[_Ahead | None]) -> None:
        """Begin as many of the steps that follow as the config says."""
        while self.plan.can_run_ahead and len(self._ahead) < self.config.data.ahead:
            last = self._ahead[-1] if self._ahead else last
            self._ahead.append(self._planner.submit(self._plan_after, last))

    def _plan_after(self, last: Future[_Ahead | None]) -> _Ahead | None:
        """The step after one that is planned, for there is one thread; None after the run's last."""
        before = last.result()
        if before is None or before.step.cursor.tokens_seen >= self.config.schedule.total_tokens:
            return None
        return self._plan(before.step.cursor)

    def _plan(self, cursor: Cursor) -> _Ahead:
        prefixes, length, after = self.plan.next(cursor)
        cap = min(length, self.plan.longest)  # padding must not go beyond the student's context either
        dealt = micro_batches(prefixes, self.num_ranks, self.config.schedule.micro_batch_tokens, cap)
        step = Step(dealt, length, padding_share(dealt, cap), after, [], 0.0)
        return _Ahead(step, [self._pool.submit(self._read, group, cap) for group in dealt[self.rank]])

    def _read(self, prefixes: list[Prefix], length: int) -> MicroBatch:
        batch = collate(self.source, prefixes, length, self.config.loss.needs_labels)
        return batch.pinned() if self._pins else batch

    def _drop(self) -> None:
        for future in self._ahead:
            if not future.cancel() and future.exception() is None and (ahead := future.result()) is not None:
                for batch in ahead.batches:
                    batch.cancel()
        self._ahead.clear()
