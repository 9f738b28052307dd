"""What Prometheus is told of a job is what its events said."""

from collections import defaultdict
from typing import Any

import pytest

from cluster import ray_workers
from cluster.job.account import Account
from cluster.job.metrics import Metrics
from cluster.job.pool import Event

DONE = {"rows": 4, "tokens": 100, "positions": 96, "bytes": 5000, "oom_splits": 0, "left_out": 0}


class Meter:
    """What Ray's counters and gauges hold, by their tags; like theirs, a counter refuses nothing."""

    def __init__(self, kind: str, tags: tuple[str, ...]) -> None:
        self.kind, self.tags = kind, {"store", *tags}
        self.values: dict[tuple[str, ...], float] = defaultdict(float)

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert self.kind == "counter"
        assert value > 0
        assert set(tags) == self.tags
        self.values[tuple(tags.values())] += value

    def set(self, value: float, tags: dict[str, str]) -> None:
        assert self.kind == "gauge"
        assert set(tags) == self.tags
        self.values[tuple(tags.values())] = value


def test_events_are_counted_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[str, Meter] = {}

    def meter(kind: str, name: str, _description: str, tags: tuple[str, ...]) -> Meter:
        made[name] = Meter(kind, tags)
        return made[name]

    monkeypatch.setattr(ray_workers, "meter", meter)
    account, metrics = Account(5, 1, 400, 1.0), Metrics("s3://bucket/labels/")
    seconds = {"forward": 2.0, "targets": 0.5, "wait": 0.0}
    happened: list[tuple[str, dict[str, Any]]] = [
        ("started", {"worker": 0, "host": "a", "pid": 1}),
        ("started", {"worker": 1, "host": "b", "pid": 2}),
        ("done", {"worker": 0, "shard": 0, "seconds": seconds, **DONE}),
        ("done", {"worker": 1, "shard": 1, "seconds": seconds, **DONE}),
        ("done", {"worker": 1, "shard": 2, "seconds": seconds, **DONE}),
        ("failed", {"worker": 1, "cause": "storage", "reason": "no answer"}),
        ("died", {"worker": 0, "cause": "worker_died", "reason": "killed", "tasks": []}),
        ("left_out", {"shard": 3, "row": 2, "reason": "killed"}),
        ("tick", {}),
    ]
    for kind, fields in happened:
        account.take(event := Event(kind, fields))
        metrics.take(event, account)
    assert {name: dict(found.values) for name, found in made.items()} == {
        "decant_tokens": {("s3://bucket/labels", "0"): 100, ("s3://bucket/labels", "1"): 200},
        "decant_positions": {("s3://bucket/labels", "0"): 96, ("s3://bucket/labels", "1"): 192},
        "decant_bytes": {("s3://bucket/labels", "0"): 5000, ("s3://bucket/labels", "1"): 10_000},
        "decant_phase_seconds": {
            ("s3://bucket/labels", "0", "forward"): 2.0, ("s3://bucket/labels", "0", "targets"): 0.5,
            ("s3://bucket/labels", "1", "forward"): 4.0, ("s3://bucket/labels", "1", "targets"): 1.0,
        },
        "decant_retries": {("s3://bucket/labels", "storage"): 1, ("s3://bucket/labels", "worker_died"): 1},
        "decant_rows_left_out": {("s3://bucket/labels",): 1},
        "decant_shards": {("s3://bucket/labels",): 5},
        "decant_shards_done": {("s3://bucket/labels",): 4},
        "decant_workers_alive": {("s3://bucket/labels",): 1},
    }  # fmt: skip
