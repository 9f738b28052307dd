"""The pool against a cluster of our own making: places for workers come and go, and nothing is waited for for ever."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cluster import ray_workers
from cluster.config import ClusterConfig
from cluster.job import pool
from cluster.job.pool import Event, Pool
from cluster.job.schedule import Cause, Limits, Schedule, Task
from cluster.ray_cluster import check_room
from cluster.ray_workers import WorkerDied
from logit_store.errors import ConfigError, DecantError, IdentityError, TeacherError

ROWS = 8


class Room:
    """A cluster with places for so many workers; others wait. What they are asked is answered at once, unless it
    ``hangs``.
    """

    def __init__(self, places: int, answer: Callable[[str, Any], Any]) -> None:
        self.places, self.answer = places, answer
        self.hangs: Callable[[object, str, tuple[Any, ...]], bool] = lambda *_: False
        self.now = 0.0
        self.workers: list[object] = []
        self.calls: dict[object, tuple[object, str, tuple[Any, ...]]] = {}

    def start_worker(self, *_arguments: Any) -> object:
        self.workers.append(object())
        return self.workers[-1]

    def call(self, worker: object, method: str, *arguments: Any) -> object:
        call = object()
        self.calls[call] = (worker, method, arguments)
        return call

    def wait(self, calls: list[object], timeout_s: float) -> list[object]:
        alive = self.workers[: self.places]
        ended = [call for call in calls if self.calls[call][0] in alive and not self.hangs(*self.calls[call])]
        if not ended:
            self.now += min(timeout_s, 0.01)
        return ended[:1]

    def result(self, call: object) -> Any:
        _, method, arguments = self.calls[call]
        if method == "arrive":
            return None
        return {"host": "here", "pid": 1} if method == "start" else self.answer(method, arguments[0])

    def stop_workers(self, workers: list[object], gently: bool) -> None:
        self.workers = [worker for worker in self.workers if worker not in workers]


def run(
    monkeypatch: pytest.MonkeyPatch, places: int, answer: Callable[[str, Any], Any], workers: int = 2, shards: int = 4
) -> tuple[Schedule, list[Event]]:
    """Let a pool work in a room of its own."""
    return run_in(Room(places, answer), monkeypatch, workers, shards)


def run_in(
    room: Room, monkeypatch: pytest.MonkeyPatch, workers: int = 2, shards: int = 4, hung_after_s: float = 60.0,
    max_attempts: int = 8, see: Callable[[Event], None] = lambda _: None,
) -> tuple[Schedule, list[Event]]:  # fmt: skip
    """Let a pool work until it is done, or has been silent for a hundred ticks; each event is seen as it comes."""
    for name in ("start_worker", "call", "wait", "result", "stop_workers"):
        monkeypatch.setattr(ray_workers, name, getattr(room, name))
    monkeypatch.setattr(pool, "time", SimpleNamespace(monotonic=lambda: room.now))  # nobody is waited for
    schedule = Schedule(range(shards), lambda _: ROWS, Limits(max_attempts, retry_delay_s=0.001, num_workers=workers))
    config = ClusterConfig(workers=workers, hung_after_s=hung_after_s)
    events: list[Event] = []
    for event in Pool(config, object, (), schedule).run():
        events.append(event)
        see(event)
        silent = events[-100:]
        assert len(silent) < 100 or any(event.kind != "tick" for event in silent), "the pool waits for ever"
    return schedule, events


def deadly(*rows: tuple[int, int]) -> Callable[[str, Any], Any]:
    """Answers of workers that die of these rows (shard, place)."""

    def answer(_method: str, task: Task) -> dict[str, Any]:
        scored = [row for row in task.probe or range(ROWS) if row not in dict(task.left_out)]
        if any((task.shard, row) in rows for row in scored):
            raise WorkerDied(Cause.PROCESS, "killed")
        return {}

    return answer


@pytest.mark.parametrize("places", [1, 2])
def test_a_cluster_with_room_for_fewer_workers_than_asked_for(monkeypatch: pytest.MonkeyPatch, places: int) -> None:
    """What needs a fresh worker is not kept for one that finds no place."""
    schedule, _ = run(monkeypatch, places, deadly((1, 3), (2, 0)))
    assert schedule.num_done == 4
    assert set(schedule.left_out) == {(1, 3), (2, 0)}


def test_a_place_that_is_gone_when_a_fresh_worker_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker that is left has nothing to do, and the only place: it makes room."""
    room = Room(2, deadly((1, 3)))

    def see(event: Event) -> None:
        if event.kind == "retired":
            room.places = 1

    schedule, _ = run_in(room, monkeypatch, see=see)
    assert schedule.num_done == 4
    assert set(schedule.left_out) == {(1, 3)}
    assert room.places == 1


def test_a_machine_that_starts_nothing_stops_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its failures are no sign that nothing works while another worker is busy for long."""
    room = Room(2, lambda _method, _task: {})
    result, num_failed = room.result, 0

    def fails(call: object) -> Any:
        nonlocal num_failed
        worker, method, _ = room.calls[call]
        if method == "start" and worker is not first:
            num_failed += 1
            raise WorkerDied(Cause.PROCESS, "device is lost")
        return result(call)

    first = room.start_worker()
    workers = iter([first])
    start_worker = room.start_worker
    monkeypatch.setattr(room, "start_worker", lambda *_: next(workers, None) or start_worker())
    monkeypatch.setattr(room, "result", fails)
    room.hangs = lambda _worker, method, _arguments: method == "work" and num_failed < 8
    schedule, _ = run_in(room, monkeypatch, max_attempts=3)
    assert schedule.num_done == 4
    assert num_failed >= 8 > schedule.limits.max_failures_in_a_row


@pytest.mark.parametrize("method", ["start", "work"])
def test_a_worker_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """One that waits for a place does not hang, however long it waits."""
    room, hanging = Room(1, lambda _method, _task: {}), list[object]()

    def hangs(worker: object, asked: str, arguments: tuple[Any, ...]) -> bool:
        if asked == method and not hanging and (asked == "start" or arguments[0].shard == 2):
            hanging.append(worker)
        return asked == method and worker in hanging

    room.hangs = hangs
    schedule, events = run_in(room, monkeypatch, hung_after_s=0.3)
    assert schedule.num_done == 4
    reasons = [event.fields["reason"] for event in events if event.kind == "died"]
    assert len(reasons) == 1
    assert "it has not answered for 0.3 seconds: " in reasons[0]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_rows_that_kill_beside_each_other(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Windows of one bad document: each verdict takes three deaths, and they are no sign that nothing works."""
    bad = [(0, row) for row in range(1, 7)]
    schedule, events = run(monkeypatch, workers, deadly(*bad), workers, shards=1)
    assert sorted(schedule.left_out) == bad
    assert [event.kind for event in events].count("left_out") == len(bad)


@pytest.mark.parametrize("workers", [1, 2])
def test_rows_without_labels_are_found_by_workers_that_live(monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """Loading a large teacher takes minutes: it is done again for the last two rows alone, the bad one and its like."""

    def answer(_method: str, task: Task) -> dict[str, Any]:
        scored = [row for row in task.probe or range(ROWS) if row not in dict(task.left_out)]
        if task.shard == 1 and 3 in scored:
            raise TeacherError("NaN")
        return {}

    schedule, events = run(monkeypatch, workers, answer, workers)
    assert schedule.left_out == {(1, 3): "NaN"}
    assert schedule.num_done == 4
    kinds = [event.kind for event in events]
    assert kinds.count("started") <= workers + 2
    assert "died" not in kinds
    failed = [event.fields for event in events if event.kind == "failed"]
    assert {fields["cause"] for fields in failed} == {Cause.LABELS}
    assert [fields.get("probe") for fields in failed] == [None, None, [0, 4], [2, 4], [3, 4]]


@pytest.mark.parametrize("error", [TeacherError, ConfigError, IdentityError])
def test_a_machine_that_stops_working_later_is_no_reason_to_stop(
    monkeypatch: pytest.MonkeyPatch, error: type[DecantError]
) -> None:
    """A teacher, an engine or tokens that are not there end a job only before any worker could start."""
    starts = [0]

    def answer(_method: str, task: Task) -> dict[str, Any]:
        if task.shard == 2 and starts[0] == 0:
            starts[0] = 1
            raise WorkerDied(Cause.PROCESS, "killed")
        return {}

    original = Room.result

    def result(self: Room, call: object) -> Any:
        if self.calls[call][1] == "start" and starts[0] == 1:
            starts[0] = 2
            raise error("no GPU here any more")
        return original(self, call)

    monkeypatch.setattr(Room, "result", result)
    schedule, events = run(monkeypatch, 1, answer, workers=1)
    assert schedule.num_done == 4
    assert [e.fields["reason"] for e in events if e.kind == "died"] == ["killed", "no GPU here any more"]
    starts[0] = 1
    with pytest.raises(error, match="no GPU here"):
        run(monkeypatch, 1, answer, workers=1)


@pytest.mark.parametrize(
    ("cluster", "nodes", "message"),
    [
        ({"workers": 4, "gpus_per_worker": 4}, [{"CPU": 8, "GPU": 4}] * 4, None),
        ({"workers": 2, "gpus_per_worker": 8}, [{"CPU": 8, "GPU": 4}] * 4, "and the 4 nodes have room for 0"),
        ({"workers": 16, "gpus_per_worker": 0.5}, [{"CPU": 8, "GPU": 4}] * 2, None),
        ({"workers": 3, "cpus_per_worker": 4}, [{"CPU": 6}] * 2, "on one node, and the 2 nodes have room for 2"),
        ({"workers": 3, "cpus_per_worker": 4}, [{"CPU": 5}] * 2, "cpus_per_worker = 12, but the cluster has 10"),
        ({"workers": 1, "gpus_per_worker": 8, "multi_node_workers": True}, [{"CPU": 4, "GPU": 4}] * 2, None),
        ({"workers": 1, "gpus_per_worker": 8, "multi_node_workers": True, "cpus_per_worker": 4},
         [{"CPU": 8, "GPU": 4}] * 2, "cpus_per_worker × cluster.gpus_per_worker = 32, but the cluster has 16 CPUs"),
        ({"workers": 9, "resources_per_worker": {"H100": 0.001}}, [{"CPU": 16, "H100": 1}, {"CPU": 16}], None),
        ({"workers": 3, "resources_per_worker": {"H100": 0.3}}, [{"CPU": 16, "H100": 0.5}] * 2, "room for 2"),
        ({"workers": 17, "autoscaling": True}, [{"CPU": 1}], None),
    ],
)  # fmt: skip
def test_a_cluster_must_have_a_place_for_each_worker(
    monkeypatch: pytest.MonkeyPatch, cluster: dict[str, Any], nodes: list[dict[str, float]], message: str | None
) -> None:
    """Sums over nodes do not tell: a worker is on one node, or its GPUs one by one are."""
    alive = [{"Alive": True, "Resources": node} for node in nodes]
    monkeypatch.setattr("ray.nodes", lambda: [*alive, {"Alive": False, "Resources": {"CPU": 999, "GPU": 999}}])
    if message is None:
        check_room(ClusterConfig(**cluster))
        return
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_room(ClusterConfig(**cluster))
