"""What a run has done so far, in figures: for the progress bar, the status file, the metrics and the summary."""

import time
from collections import Counter, deque
from typing import Any

from cluster.job.phases import PHASES
from cluster.job.pool import Event

RATE_WINDOW_S = 120.0


class Account:
    """The figures of one run of `decant cache`, kept by the events of its pool."""

    def __init__(self, num_shards: int, num_committed: int, tokens_left: int, gpus_per_worker: float) -> None:
        self.num_shards, self.num_done, self.tokens_left = num_shards, num_committed, tokens_left
        self.gpus_per_worker = gpus_per_worker
        self.tokens = self.positions = self.bytes = self.oom_splits = self.num_probes = 0
        self.seconds: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.left_out: list[dict[str, Any]] = []
        self.given_up: list[dict[str, Any]] = []
        self.workers: dict[int, str] = {}
        """Where the workers are that are alive."""
        self.worker_seconds = 0.0
        self.started = self._counted = time.monotonic()
        self._recent: deque[tuple[float, int]] = deque()
        self._recent_tokens = 0

    def take(self, event: Event) -> None:
        """Count an event in."""
        now = time.monotonic()
        self.worker_seconds += len(self.workers) * (now - self._counted)
        self._counted = now
        getattr(self, f"_take_{event.kind}")(event.fields)

    @property
    def tokens_per_s(self) -> float:
        """Rate of the last two minutes, or since the first shard was begun."""
        if not self._recent:
            return 0.0
        since, tokens = self.started, self._recent_tokens
        if len(self._recent) > 1:  # between the first of them and now
            since, tokens = self._recent[0][0], tokens - self._recent[0][1]
        return tokens / max(time.monotonic() - since, 1e-9)

    @property
    def seconds_left(self) -> float | None:
        """Until the end at this rate; None while there is no rate."""
        return self.tokens_left / self.tokens_per_s if self.tokens_per_s else None

    def cost(self, price_per_gpu_hour: float) -> float:
        """What workers' time has cost, in the price's unit: GPUs, or whole workers where they have none."""
        return self.worker_seconds / 3600 * (self.gpus_per_worker or 1.0) * price_per_gpu_hour

    def figures(self) -> dict[str, Any]:
        """All of it as plain values."""
        seconds_left = self.seconds_left
        return {
            "shards": self.num_shards,
            "shards_done": self.num_done,
            "tokens": self.tokens,
            "positions": self.positions,
            "bytes": self.bytes,
            "tokens_per_s": round(self.tokens_per_s, 1),
            "seconds_left": None if seconds_left is None else round(seconds_left),
            "seconds": round(time.monotonic() - self.started, 1),
            "workers": {str(number): host for number, host in sorted(self.workers.items())},
            "worker_seconds": round(self.worker_seconds, 1),
            "phases": {phase: round(self.seconds[phase], 3) for phase in PHASES},
            "retries": dict(self.retries),
            "out_of_memory_splits": self.oom_splits,
            "probes": self.num_probes,
            "left_out": self.left_out,
            "given_up": self.given_up,
        }

    def _take_tick(self, _fields: dict[str, Any]) -> None:
        pass

    def _take_started(self, fields: dict[str, Any]) -> None:
        self.workers[fields["worker"]] = f"{fields['host']}:{fields['pid']}"

    def _take_died(self, fields: dict[str, Any]) -> None:
        self.workers.pop(fields["worker"], None)
        self.retries[fields["cause"]] += 1

    def _take_retired(self, fields: dict[str, Any]) -> None:
        self.workers.pop(fields["worker"], None)

    def _take_failed(self, fields: dict[str, Any]) -> None:
        self.retries[fields["cause"]] += 1

    def _take_done(self, fields: dict[str, Any]) -> None:
        now = time.monotonic()
        self.num_done += 1
        for name in ("tokens", "positions", "bytes", "oom_splits"):
            setattr(self, name, getattr(self, name) + fields[name])
        self.tokens_left = max(0, self.tokens_left - fields["tokens"])
        self.seconds.update(fields["seconds"])
        self._recent.append((now, fields["tokens"]))
        self._recent_tokens += fields["tokens"]
        while len(self._recent) > 2 and self._recent[0][0] < now - RATE_WINDOW_S:
            self._recent_tokens -= self._recent.popleft()[1]

    def _take_probed(self, fields: dict[str, Any]) -> None:
        self.num_probes += 1
        self.oom_splits += fields["oom_splits"]

    def _take_left_out(self, fields: dict[str, Any]) -> None:
        self.left_out.append(fields)

    def _take_given_up(self, fields: dict[str, Any]) -> None:
        """It was not for the rows of this shard that workers died, then: another run tries them again."""
        self.left_out = [row for row in self.left_out if row["shard"] != fields["shard"]]
        self.given_up.append(fields)
