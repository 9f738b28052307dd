"""The metrics of a teacher job, as Ray exports them to Prometheus, with `ray_` before each name."""

from typing import Any, NamedTuple

from cluster import ray_workers
from cluster.job.account import Account
from cluster.job.pool import Event


class Metric(NamedTuple):
    """Kind (``counter`` or ``gauge``), name, meaning and tags of a metric; all have the tag ``store``."""

    kind: str
    name: str
    description: str
    tags: tuple[str, ...] = ()


METRICS = (
    Metric("counter", "decant_tokens", "Tokens of committed shards", ("worker",)),
    Metric("counter", "decant_positions", "Labelled positions of committed shards", ("worker",)),
    Metric("counter", "decant_bytes", "Bytes of committed shards", ("worker",)),
    Metric("counter", "decant_phase_seconds", "Seconds of workers by phase", ("worker", "phase")),
    Metric("counter", "decant_retries", "Tasks and workers tried again, by reason", ("reason",)),
    Metric("counter", "decant_rows_left_out", "Rows without labels because they kill workers"),
    Metric("gauge", "decant_shards", "Shards of the store"),
    Metric("gauge", "decant_shards_done", "Shards that are committed"),
    Metric("gauge", "decant_workers_alive", "Workers with a loaded teacher"),
)


class Metrics:
    """The driver's meters: it hears of everything, so that workers need none."""

    def __init__(self, store_url: str) -> None:
        self._tags = {"store": store_url.rstrip("/")}
        self._meters = {metric.name: ray_workers.meter(*metric) for metric in METRICS}

    def take(self, event: Event, account: Account) -> None:
        """Count an event in, after ``account`` has."""
        fields, worker = event.fields, {"worker": str(event.fields.get("worker"))}
        if event.kind == "done":
            for name in ("tokens", "positions", "bytes"):
                self._add(f"decant_{name}", fields[name], worker)
            for phase, seconds in fields["seconds"].items():
                self._add("decant_phase_seconds", seconds, {**worker, "phase": phase})
        elif event.kind in ("died", "failed"):
            self._add("decant_retries", 1, {"reason": fields["cause"]})
        elif event.kind == "left_out":
            self._add("decant_rows_left_out", 1, {})
        gauges = {"shards": account.num_shards, "shards_done": account.num_done}
        for name, value in {**gauges, "workers_alive": len(account.workers)}.items():
            self._meters[f"decant_{name}"].set(value, tags=self._tags)

    def _add(self, name: str, value: float, tags: dict[str, Any]) -> None:
        if value > 0:  # Ray refuses to count by nothing
            self._meters[name].inc(value, tags={**self._tags, **tags})
