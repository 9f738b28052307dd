"""Which worker does what next, what is tried again, and when to give up: pure decisions, carried out elsewhere.

A shard whose worker died is tried again, alone on a worker. If it takes a second worker down, its rows are probed in
halves, their labels thrown away, until a single row has killed three fresh workers: that row is left out, and the
shard made without it. Where every part of it passes, the deaths came from outside, and the whole is tried again.
A shard with rows that the teacher has no labels for is taken apart in the same way, by workers that live: a row that a
fresh one has none for either is left out.
A row is left out once; where that does not help, the whole is tried until its attempts are used up.
Where memory ran out, batches are halved some times before rows are probed.
Deaths of nodes count against nobody.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple

MAX_DELAY_S = 60.0
FAILURES_UNTIL_PROBED = 2
STRIKES = 3
"""Fresh workers that a row alone must kill before it is left out."""
MAX_HALVINGS = 10
HALVINGS_UNTIL_PROBED = 4
IN_FLIGHT = 2
"""Shards that a worker has at a time: one is scored while another is read or written."""


class Cause(StrEnum):
    """Why a worker died, or a task failed."""

    OUTSIDE = "outside"
    """Its node died or was taken away."""
    MEMORY = "out_of_memory"
    """It was killed for its memory."""
    PROCESS = "worker_died"
    """Its process, or the engine's, ended; or scoring raised an error that says nothing of the rows."""
    LABELS = "no_labels"
    """The teacher has no labels for some row, such as NaN, or none that can be stored; the worker is well."""
    STORAGE = "storage"
    """Storage did not answer or could not be written for now; the worker is well."""


class Task(NamedTuple):
    """What a worker is asked to do with a shard."""

    shard: int
    left_out: tuple[tuple[int, str], ...] = ()
    """Rows of the shard (by place) that are not scored, with reasons."""
    halvings: int = 0
    """How often the batch size is halved."""
    probe: range | None = None
    """Score these rows of the shard only, and write nothing."""
    on_fresh_worker: bool = False
    """Whether the worker must not have done anything before."""


@dataclass
class Limits:
    """When to stop trying."""

    max_attempts: int = 8
    retry_delay_s: float = 1.0
    max_left_out: int = 100
    num_workers: int = 1

    def delay_s(self, attempts: int) -> float:
        """Seconds until the next attempt."""
        doublings = min(max(attempts - 1, 0), 64)  # a float holds 1023
        return min(MAX_DELAY_S, self.retry_delay_s * 2.0**doublings)

    @property
    def max_failures_in_a_row(self) -> int:
        """Failures after which, with nothing done in between, it is not the rows: nothing works at all. Two workers'
        worth for one, who alone has to take a shard apart of which most rows are bad.
        """
        return self.max_attempts * max(self.num_workers, 2)


@dataclass
class _Trouble:
    """A shard that did not pass at once."""

    shard: int
    attempts: int = 0
    """Attempts at the whole shard that failed."""
    failures: int = 0
    """Of them, those since its rows were last probed that rows may be to blame for, whatever the batch."""
    halvings: int = 0
    suspects: deque[range] = field(default_factory=deque)
    """Rows still to be probed."""
    strikes: int = 0
    """Fresh workers that died of ``suspects[0]``, a single row."""
    has_new_convictions: bool = False
    clean_rounds: int = 0
    left_out: dict[int, str] = field(default_factory=dict)
    not_before: float = 0.0
    is_in_flight: bool = False

    def task(self) -> Task:
        probe = self.suspects[0] if self.suspects else None
        alone = probe is not None and len(probe) == 1
        return Task(self.shard, tuple(sorted(self.left_out.items())), self.halvings, probe, alone)


class Schedule:
    """The shards that are still to be made. Times are seconds of any clock that only grows."""

    def __init__(self, shards: Sequence[int], num_rows: Callable[[int], int], limits: Limits) -> None:
        """``shards`` in the order in which they are to be done; ``num_rows(shard)`` is asked of troubled ones only."""
        self.limits = limits
        self.num_done = 0
        self.given_up: dict[int, str] = {}
        """Shards that could not be made, with the last reason."""
        self.left_out: dict[tuple[int, int], str] = {}
        """(shard, row's place in it) → why it is left out."""
        self.failures_in_a_row = 0
        self.last_reason = ""
        self._storage_failures = 0
        self._paused_until = 0.0
        self._num_shards = len(shards)
        self._untouched: Iterator[int] = iter(shards)
        self._again: deque[int] = deque()
        self._num_rows = num_rows
        self._troubles: dict[int, _Trouble] = {}
        self._reserved: dict[int, int] = {}
        self._news: list[tuple[str, dict[str, Any]]] = []

    @property
    def num_left(self) -> int:
        """Shards that are not done and not given up."""
        return self._num_shards - self.num_done - len(self.given_up)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to do."""
        return self.num_left == 0

    def take_news(self) -> list[tuple[str, dict[str, Any]]]:
        """What was decided since the last call: ``left_out`` (shard, row, reason) and ``given_up`` (shard, reason)."""
        news, self._news = self._news, []
        return news

    def needs_fresh_worker(self, worker: int) -> bool:
        """Whether what waits for this worker must be done by a new one."""
        shard = self._reserved.get(worker)
        return shard is not None and self._troubles[shard].task().on_fresh_worker

    def next(self, worker: int, in_flight: int, is_fresh: bool, now: float) -> Task | None:
        """What the worker does next; None for nothing now. A troubled shard has a worker for itself alone."""
        if now < self._paused_until:
            return None
        shard = self._reserved.get(worker)
        if shard is None:
            shard = next((s for s, t in self._troubles.items() if self._is_due(t, now)), None)
            if shard is not None:
                self._reserved[worker] = shard
        if shard is not None:
            trouble = self._troubles[shard]
            task = trouble.task()
            if in_flight or (task.on_fresh_worker and not is_fresh):
                return None  # until what it has is done, or it is replaced
            trouble.is_in_flight = True
            return task
        if in_flight >= IN_FLIGHT:
            return None
        shard = self._again.popleft() if self._again else next(self._untouched, None)
        return None if shard is None else Task(shard)

    def wakes_at(self) -> float | None:
        """When a shard that waits for its next attempt is due, at the earliest."""
        waiting = [t.not_before for t in self._troubles.values() if not t.is_in_flight]
        earliest = min(waiting, default=None)
        return self._paused_until if self._paused_until > (earliest or 0.0) else earliest

    def done(self, worker: int, task: Task) -> None:
        """The worker did the task."""
        self.failures_in_a_row = self._storage_failures = 0
        trouble = self._released(worker, task)
        if task.probe is None:
            self._troubles.pop(task.shard, None)
            self.num_done += 1
        elif trouble is not None:
            self._next_suspect(trouble)

    def hand_over(self, worker: int, successor: int) -> None:
        """What waits for one worker is the other's now."""
        self._reserved[successor] = self._reserved.pop(worker)

    def died(self, worker: int, tasks: Sequence[Task], cause: Cause, reason: str, now: float) -> None:
        """The worker died with these tasks in flight, of which any may be to blame."""
        self._count(cause, reason)
        for task in tasks:
            self._retry(worker, task, cause, reason, now)
        self._reserved.pop(worker, None)

    def start_failed(self, worker: int, cause: Cause, reason: str, others_work: bool) -> None:
        """The worker could not even start. Where others have, it is no sign that nothing works: they may be busy for
        long, and its machine may never be well.
        """
        if not others_work:
            self._count(cause, reason)
        self._reserved.pop(worker, None)

    def failed(self, worker: int, task: Task, cause: Cause, reason: str, now: float) -> None:
        """The task came to nothing, but its worker lives. Where it was storage, everybody waits: labels that cannot be
        written need not be made, and what fails in one pause fails once.
        """
        in_a_pause = cause == Cause.STORAGE and now < self._paused_until
        if not in_a_pause:
            self._count(cause, reason)
        if cause == Cause.STORAGE and not in_a_pause:
            self._storage_failures += 1
            self._paused_until = now + self.limits.delay_s(self._storage_failures)
        self._retry(worker, task, cause, reason, now)

    def hopeless(self) -> str | None:
        """Why to stop although there is more to do; None to go on."""
        if self.failures_in_a_row >= self.limits.max_failures_in_a_row:
            return (
                f"{self.failures_in_a_row} failures in a row and nothing done in between. The last: {self.last_reason}"
            )
        if len(self.left_out) > self.limits.max_left_out:
            return (
                f"more than cluster.max_left_out = {self.limits.max_left_out} rows had to be left out, which hints at "
                f"the teacher or the machines rather than at the rows. The last: {self.last_reason}"
            )
        return None

    def _count(self, cause: Cause, reason: str) -> None:
        if cause != Cause.OUTSIDE:
            self.failures_in_a_row += 1
            self.last_reason = reason

    def _retry(self, worker: int, task: Task, cause: Cause, reason: str, now: float) -> None:
        trouble = self._released(worker, task)
        if cause == Cause.OUTSIDE:
            if trouble is None:
                self._again.append(task.shard)
            return
        if trouble is None:
            trouble = self._troubles[task.shard] = _Trouble(task.shard)
        if task.probe is not None:
            self._probe_failed(trouble, cause, reason)
            trouble.not_before = now + self.limits.delay_s(trouble.strikes)
            return
        trouble.attempts += 1
        trouble.not_before = now + self.limits.delay_s(trouble.attempts)
        if trouble.attempts >= self.limits.max_attempts:
            del self._troubles[task.shard]
            self.given_up[task.shard] = reason
            self.left_out = {at: why for at, why in self.left_out.items() if at[0] != task.shard}  # it has no labels
            self._news.append(("given_up", {"shard": task.shard, "reason": reason}))
        elif cause == Cause.MEMORY:
            trouble.halvings = min(trouble.halvings + 1, MAX_HALVINGS)
            if trouble.halvings >= HALVINGS_UNTIL_PROBED or trouble.attempts == self.limits.max_attempts - 1:
                self._suspect_all(trouble)  # it may be one row, whatever the batch
        elif cause in (Cause.PROCESS, Cause.LABELS):
            trouble.failures += 1
            if trouble.failures >= FAILURES_UNTIL_PROBED:
                self._suspect_all(trouble)

    def _is_due(self, trouble: _Trouble, now: float) -> bool:
        is_free = not trouble.is_in_flight and trouble.shard not in self._reserved.values()
        return is_free and trouble.not_before <= now

    def _released(self, worker: int, task: Task) -> _Trouble | None:
        trouble = self._troubles.get(task.shard)
        if trouble is not None:
            trouble.is_in_flight = False
            self._reserved.pop(worker, None)
        return trouble

    def _suspect_all(self, trouble: _Trouble) -> None:
        trouble.failures, trouble.strikes, trouble.has_new_convictions = 0, 0, False
        self._suspect_halves(trouble, range(self._num_rows(trouble.shard)))

    def _suspect_halves(self, trouble: _Trouble, rows: range) -> None:
        """Have those halves probed, after all others, that hold more than rows that are left out already."""
        middle = len(rows) // 2
        halves = rows[:middle], rows[middle:]
        trouble.suspects.extend(half for half in halves if any(row not in trouble.left_out for row in half))

    def _probe_failed(self, trouble: _Trouble, cause: Cause, reason: str) -> None:
        if cause == Cause.STORAGE:
            return
        suspect = trouble.suspects[0]
        if len(suspect) > 1:
            trouble.suspects.popleft()
            self._suspect_halves(trouble, suspect)  # at the end: parts that pass come in between
            return
        trouble.strikes += 1
        if trouble.strikes == STRIKES or cause == Cause.LABELS:  # a kill may come from anywhere, such an error may not
            trouble.left_out[suspect[0]] = self.left_out[trouble.shard, suspect[0]] = reason
            self._news.append(("left_out", {"shard": trouble.shard, "row": suspect[0], "reason": reason}))
            self.failures_in_a_row = 0  # a verdict is a result; how many there may be is bounded by itself
            trouble.has_new_convictions = True
            self._next_suspect(trouble)

    def _next_suspect(self, trouble: _Trouble) -> None:
        trouble.suspects.popleft()
        trouble.strikes, trouble.not_before = 0, 0.0
        if trouble.suspects:
            return
        if trouble.has_new_convictions:
            trouble.attempts = 0
        else:
            trouble.clean_rounds += 1
            if trouble.clean_rounds > 1:  # perhaps too much at once for the machine, killed by its kernel
                trouble.halvings = min(trouble.halvings + 1, MAX_HALVINGS)
