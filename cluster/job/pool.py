"""The pool of teacher workers: keeps them alive and busy with what the schedule says, and tells what happens."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from cluster import ray_workers
from cluster.config import ClusterConfig
from cluster.job.schedule import Cause, Schedule, Task
from cluster.ray_workers import WorkerDied
from logit_store.errors import DecantError, TeacherError, UnavailableError

TICK_S = 1.0
"""The longest that the pool is silent."""
STARTS_UNTIL_LATE = 2
"""Times that the quickest start took, after which one is taken to wait for a place."""
ANSWERS_UNTIL_HUNG = 20
"""Times that the longest answer took, after which a worker hangs; `cluster.hung_after_s` at the least."""


class Event(NamedTuple):
    """Something that happened: ``started``, ``died``, ``done``, ``probed``, ``failed``, ``left_out``, ``given_up``,
    ``retired`` (for a fresh one), or ``tick`` where nothing did.
    """

    kind: str
    fields: dict[str, Any]


@dataclass
class _Slot:
    """A place for a worker, which may be filled again and again."""

    number: int
    worker: Any = None
    arriving: Any = None
    """What the first call, which returns as soon as the worker has a place, will return; None once it has."""
    starting: Any = None
    """What the call that loads the teacher will return; None once it has."""
    asked_at: float = 0.0
    """When the worker was asked for."""
    heard_at: float | None = None
    """When it answered last, or was given work after it had none; None while it waits for a place."""
    tasks: dict[Any, Task] = field(default_factory=dict)
    is_fresh: bool = True
    failed_starts: int = 0
    not_before: float = 0.0

    @property
    def is_ready(self) -> bool:
        return self.worker is not None and self.starting is None


class Pool:
    """Workers of class ``worker``, each made with ``arguments``, that work off a schedule."""

    def __init__(self, config: ClusterConfig, worker: type, arguments: tuple[Any, ...], schedule: Schedule) -> None:
        self.config, self.schedule = config, schedule
        self._worker, self._arguments = worker, arguments
        self._retired: list[int] = []
        self._has_started = False
        self._quickest_start_s, self._longest_answer_s = math.inf, 0.0
        self._slots = [_Slot(number) for number in range(min(config.workers, schedule.num_left))]

    def run(self) -> Iterator[Event]:
        """Do all that the schedule holds. Raises the error of ours that ends the job, such as a full disk.

        Raises TeacherError: nothing works, or too much had to be left out.
        """
        try:
            while not self.schedule.is_over:
                if (reason := self.schedule.hopeless()) is not None:
                    raise TeacherError(f"the job is stopped after {reason}")
                now = time.monotonic()
                for slot in self._slots:
                    self._fill(slot, now)
                    self._feed(slot, now)
                yield from self._collect(now)
        finally:
            alive = [slot for slot in self._slots if slot.worker is not None]
            idle = [slot for slot in alive if slot.is_ready and not slot.tasks]
            ray_workers.stop_workers([slot.worker for slot in alive if slot not in idle], gently=False)
            ray_workers.stop_workers([slot.worker for slot in idle], gently=True)

    def _fill(self, slot: _Slot, now: float) -> None:
        """Start a worker in an empty place, if there is something left for it."""
        if slot.worker is None and slot.not_before <= now and self.schedule.num_left > self._num_in_flight():
            slot.worker = ray_workers.start_worker(self.config, self._worker, self._arguments)
            slot.arriving = ray_workers.call(slot.worker, "arrive")
            slot.starting = ray_workers.call(slot.worker, "start")
            slot.is_fresh, slot.asked_at, slot.heard_at = True, now, None

    def _num_in_flight(self) -> int:
        return sum(len(slot.tasks) for slot in self._slots)

    def _feed(self, slot: _Slot, now: float) -> None:
        """Give the worker as much as it can have."""
        if slot.is_ready and slot.is_fresh:
            self._take_over(slot, now)
        while slot.is_ready:
            task = self.schedule.next(slot.number, len(slot.tasks), slot.is_fresh, now)
            if task is None:
                break
            if not slot.tasks:
                slot.heard_at = now
            slot.tasks[ray_workers.call(slot.worker, "work", task)] = task
            slot.is_fresh = False
        if slot.is_ready and not slot.is_fresh and not slot.tasks:
            if not self.schedule.needs_fresh_worker(slot.number):
                self._take_over(slot, now - STARTS_UNTIL_LATE * self._quickest_start_s)
            if self.schedule.needs_fresh_worker(slot.number):
                self._retired.append(slot.number)
                self._empty(slot)
                self._fill(slot, now)

    def _take_over(self, slot: _Slot, asked_before: float) -> None:
        """Let an idle worker have what waits for a fresh one that is still to start: that may find no place any more.
        A fresh one can do it at once; another makes room, and whichever starts first has it.
        """
        for other in self._slots:
            is_waiting = not other.is_ready and self.schedule.needs_fresh_worker(other.number)
            if is_waiting and other.asked_at <= asked_before:
                self.schedule.hand_over(other.number, slot.number)
                return

    def _collect(self, now: float) -> Iterator[Event]:
        """Wait until something happens, and tell it."""
        yield from (Event("retired", {"worker": number}) for number in self._retired)
        self._retired.clear()
        waited_for: dict[Any, _Slot] = {}
        for slot in self._slots:
            calls = [*slot.tasks, *(call for call in (slot.arriving, slot.starting) if call is not None)]
            waited_for |= dict.fromkeys(calls, slot)
        wakes = [self.schedule.wakes_at(), *(slot.not_before for slot in self._slots if slot.worker is None)]
        delays = [at - now for at in wakes if at is not None and at > now]
        done = ray_workers.wait(list(waited_for), max(0.01, min(TICK_S, *delays)) if delays else TICK_S)
        dead: dict[int, WorkerDied] = {}
        for reference in done:
            slot = waited_for[reference]
            try:
                result = ray_workers.result(reference)
            except WorkerDied as death:
                dead.setdefault(slot.number, death)
                continue
            except UnavailableError as error:
                if reference == slot.starting:
                    dead.setdefault(slot.number, WorkerDied(Cause.STORAGE, str(error)))
                else:
                    yield from self._failed(slot, reference, Cause.STORAGE, error)
                continue
            except DecantError as error:
                if reference == slot.starting and self._has_started:  # others could: its machine is no good
                    dead.setdefault(slot.number, WorkerDied(Cause.PROCESS, str(error)))
                elif reference in slot.tasks and isinstance(error, TeacherError):  # it has no labels for some row
                    yield from self._failed(slot, reference, Cause.LABELS, error)
                else:  # such as a full disk
                    raise
                continue
            yield from self._succeeded(slot, reference, result)
        for number, end in dead.items():
            yield from self._died(self._slots[number], end)
        yield from self._end_hung()
        if not done:
            yield Event("tick", {})

    def _hear(self, slot: _Slot) -> None:
        """Note that the worker has answered."""
        now = time.monotonic()
        if slot.heard_at is not None:
            self._longest_answer_s = max(self._longest_answer_s, now - slot.heard_at)
        slot.heard_at = now

    def _end_hung(self) -> Iterator[Event]:
        """Replace workers that have had something to do, and not answered, for longer than any work takes."""
        now, patience_s = time.monotonic(), max(self.config.hung_after_s, ANSWERS_UNTIL_HUNG * self._longest_answer_s)
        for slot in self._slots:
            is_busy = slot.starting is not None or slot.tasks
            if is_busy and slot.heard_at is not None and now - slot.heard_at > patience_s:
                reason = (
                    f"it has not answered for {patience_s:g} seconds: where loading or a shard takes that long, raise "
                    "cluster.hung_after_s"
                )
                yield from self._died(slot, WorkerDied(Cause.PROCESS, reason))

    def _succeeded(self, slot: _Slot, reference: Any, result: dict[str, Any]) -> Iterator[Event]:
        self._hear(slot)
        if reference == slot.arriving:
            slot.arriving = None
            return
        if reference == slot.starting:
            slot.starting, slot.failed_starts, self._has_started = None, 0, True
            self._quickest_start_s = min(self._quickest_start_s, time.monotonic() - slot.asked_at)
            yield Event("started", {"worker": slot.number, **result})
            return
        task = slot.tasks.pop(reference)
        self.schedule.done(slot.number, task)
        kind = "done" if task.probe is None else "probed"
        yield Event(kind, {"worker": slot.number, **_described(task), **result})

    def _failed(self, slot: _Slot, reference: Any, cause: Cause, error: DecantError) -> Iterator[Event]:
        self._hear(slot)
        task = slot.tasks.pop(reference)
        self.schedule.failed(slot.number, task, cause, str(error), time.monotonic())
        fields = {"worker": slot.number, "cause": str(cause), "reason": str(error)}
        yield Event("failed", {**fields, **_described(task)})
        yield from self._verdicts()

    def _died(self, slot: _Slot, death: WorkerDied) -> Iterator[Event]:
        now, tasks = time.monotonic(), list(slot.tasks.values())
        if slot.is_ready:
            self.schedule.died(slot.number, tasks, death.cause, death.reason, now)
        else:
            slot.failed_starts += 1
            slot.not_before = now + self.schedule.limits.delay_s(slot.failed_starts)
            others_work = any(other.is_ready for other in self._slots)
            self.schedule.start_failed(slot.number, death.cause, death.reason, others_work)
        self._empty(slot)
        fields = {"worker": slot.number, "cause": str(death.cause), "reason": death.reason}
        yield Event("died", {**fields, "tasks": [_described(task) for task in tasks]})
        yield from self._verdicts()

    def _verdicts(self) -> Iterator[Event]:
        """Rows and shards that were given up just now."""
        yield from (Event(*news) for news in self.schedule.take_news())

    def _empty(self, slot: _Slot) -> None:
        """End the worker for certain: one that only seems dead must not go on beside its successor."""
        ray_workers.stop_workers([slot.worker], gently=False)
        slot.worker, slot.arriving, slot.starting, slot.tasks = None, None, None, {}


def _described(task: Task) -> dict[str, Any]:
    fields: dict[str, Any] = {"shard": task.shard}
    if task.probe is not None:
        fields["probe"] = [task.probe.start, task.probe.stop]
    if task.halvings:
        fields["halvings"] = task.halvings
    return fields
