"""What the scheduling of workers costs: teachers that only sleep, a second a shard, on many light workers.

    python -m tests.bench.schedule        # 32 workers, 2,000 shards; adds a line to docs/benchmarks/schedule.csv

Everything but the teacher is real: Ray's actors, the pool, encoding, commits. Also: how long a million shards take to
plan, of which half are committed, and how much memory.
"""

import argparse
import csv
import json
import os
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from cluster.cache import cache
from cluster.config import CacheConfig
from cluster.job.phases import Phases
from cluster.job.schedule import Limits, Schedule
from cluster.job.worker import TeacherWorker
from logit_store import Storage, Targets, TokenRow, writer
from logit_store.config import parse_config
from logit_store.format import record_name
from tests.bench.machine import about
from tests.toy import make_inputs, write_tokens

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "schedule.csv"
ROWS, TOKENS = 4, 32


class SleepingTeacher:
    """A teacher that knows nothing, and takes a second to say so."""

    def __init__(self) -> None:
        self.phases, self.batch_tokens, self.oom_splits = Phases(), 1, 0

    def score(self, rows: list[np.ndarray], _numbers: list[int]) -> list[Targets]:
        with self.phases.measure("forward"):
            time.sleep(1.0)
        return [Targets.of_nothing(len(row) - 1, 0, 0) for row in rows]

    def close(self) -> None:
        pass


class SleepingWorker(TeacherWorker):
    def load_teacher(self) -> Any:
        return SleepingTeacher()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=32)
    parser.add_argument("--shards", type=int, default=2000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="schedule") as name:
        busy, seconds = keep_busy(Path(name), arguments.workers, arguments.shards)
    with tempfile.TemporaryDirectory(prefix="plan") as name:
        plan_s, plan_mib = plan(Path(name), 1_000_000)
    print(
        f"{arguments.workers} workers, {arguments.shards} shards of a second: {busy:.1%} asleep, {seconds:.0f} s in all"
    )
    print(f"a million shards, half of them committed, planned in {plan_s:.1f} s and {plan_mib:.0f} MiB")
    fields = {"workers": arguments.workers, "shards": arguments.shards, "busy_share": round(busy, 4)}
    fields |= {"plan_shards": 1_000_000, "plan_s": round(plan_s, 2), "plan_mib": round(plan_mib), **about("ray")}
    with open(RESULT, "w", newline="") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        table.writerow(fields)


def keep_busy(folder: Path, workers: int, shards: int) -> tuple[float, float]:
    """Share of the workers' time in which teachers slept, once all of them work; seconds of the whole command.

    Starting 32 processes takes two cores half a minute, in which nobody gets much done: that is not the schedule's.
    """
    raw, rng = make_inputs(folder), np.random.default_rng(0)
    raw["tokens"]["num_shards"] = shards
    raw["targets"] = {"k": 16}
    raw["cluster"] = {"workers": workers, "cpus_per_worker": 1}
    config = parse_config(CacheConfig, raw, "bench")
    random = (
        [TokenRow(i, "train", rng.integers(0, 400, TOKENS).astype(np.int32)) for i in range(ROWS)]
        for _ in range(shards)
    )
    held_out = config.tokens.held_out
    write_tokens(config.tokens.path, config.tokens.tokenizer, random, num_shards=shards, held_out=held_out)
    os.environ["RAY_OVERRIDE_RESOURCES"] = f'{{"CPU": {workers}}}'
    started = time.monotonic()
    cache(config, SleepingWorker)
    seconds = time.monotonic() - started
    (log,) = Path(f"{config.store.path}.job").glob("log-*.jsonl")
    return busy_share([json.loads(line) for line in log.read_text().splitlines()]), seconds


def busy_share(log: list[dict[str, Any]]) -> float:
    """From when each worker has done a shard to the end of the last: seconds slept by seconds passed."""
    done = [line for line in log if line["event"] == "done"]
    firsts: dict[int, float] = {}
    for line in done:
        firsts.setdefault(line["worker"], line["time"])
    all_work = max(firsts.values())
    counted, passed = 0.0, 0.0
    for worker in firsts:
        own = [line for line in done if line["worker"] == worker and line["time"] >= all_work]
        counted += sum(line["seconds"]["forward"] for line in own[1:])
        passed += done[-1]["time"] - own[0]["time"]
    return counted / passed


def plan(folder: Path, shards: int) -> tuple[float, float]:
    """Seconds and peak MiB from a directory in which half of the shards have a record to the first task."""
    (folder / "shards").mkdir()
    for shard in range(0, shards, 2):
        (folder / record_name(shard)).touch()
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    done = writer.is_committed(Storage(str(folder)), shards)
    todo = np.flatnonzero(~done)
    sizes = np.random.default_rng(0).integers(1, 10**6, shards)
    todo = todo[np.argsort(-sizes[todo], kind="stable")]
    schedule = Schedule(todo.tolist(), lambda _: ROWS, Limits())
    assert schedule.next(0, 0, True, 0.0) is not None
    return time.monotonic() - started, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    main()
