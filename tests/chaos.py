"""Random kills of workers, of the driver and of a node, over and over: the store must be the quiet run's to the byte.

    python -m tests.chaos --minutes 30            # what `make chaos` runs

A cluster of a head without CPUs and two nodes of one; `decant cache` joins it by its address, and is typed again when
it was killed. Pauses between kills are random, three times as long on average as a worker takes to start.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from tests.toy import DECANT, ROOT, make_inputs, make_long, shard_bytes, write_yaml

RAY = str(Path(DECANT).parent / "ray")
PAUSE_IN_STARTS = 3.0
NUM_NODES = 2


class Cluster:
    """A Ray head and nodes on this machine, each in a process group of its own, so that one can be killed whole."""

    def __init__(self, port: int) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ch", dir="/tmp"))  # Ray's socket paths must stay short
        self.address = f"127.0.0.1:{port}"
        self.environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
        head = ["--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        self._head = self._start(*head, "--num-cpus=0")
        self._nodes = [self._node() for _ in range(NUM_NODES)]

    def kill_node(self, rng: random.Random) -> None:
        """SIGKILL to a node and all that runs on it; another takes its place."""
        i = rng.randrange(NUM_NODES)
        _kill(self._nodes[i])
        self._nodes[i] = self._node()

    def tend(self) -> None:
        """Start nodes again that have ended by themselves: two that start at once may choose the same port."""
        self._nodes = [node if node.poll() is None else self._node() for node in self._nodes]

    def stop(self) -> None:
        """End all of it."""
        for process in (*self._nodes, self._head):
            _kill(process)
        shutil.rmtree(self.folder, ignore_errors=True)

    def _node(self) -> "subprocess.Popen[bytes]":
        return self._start(f"--address={self.address}", "--num-cpus=1")

    def _start(self, *options: str) -> "subprocess.Popen[bytes]":
        command = [RAY, "start", "--block", "--node-ip-address=127.0.0.1", *options]
        command += ["--object-store-memory=80000000", "--disable-usage-stats"]
        with open(self.folder / "ray.log", "ab") as log:
            return subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)


def _kill(process: "subprocess.Popen[bytes]") -> None:
    """SIGKILL to a process, what it has started, and what is left of its session where a parent is gone."""
    victims = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    victims |= {pid for pid in psutil.pids() if _session(pid) == process.pid}
    for pid in {*victims, process.pid}:
        _signal(pid)
    process.wait()


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def _signal(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it was faster


class Job:
    """`decant cache`, typed again whenever it has been killed."""

    def __init__(self, config: Path, store: Path, cluster: Cluster) -> None:
        self.store, self._cluster = store, cluster
        self._command = [DECANT, "cache", str(config), f"store.path={store}", f"cluster.address={cluster.address}"]
        self._command += ["cluster.autoscaling=true"]  # a node may be missing just now
        self._log = cluster.folder / "driver.log"
        self._begin()

    def _begin(self) -> None:
        with open(self._log, "ab") as log:
            self.process = subprocess.Popen(
                self._command, cwd=ROOT, env=self._cluster.environment, stdout=log, stderr=log, start_new_session=True
            )

    def is_finished(self) -> bool:
        """Whether the store is complete. Raises RuntimeError where the command failed."""
        code = self.process.poll()
        if code not in (None, 0):
            raise RuntimeError(f"decant cache ended with {code}:\n{self._log.read_text()[-5000:]}")
        return code == 0

    def kill_driver(self) -> None:
        """SIGKILL to the command; it is typed again."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._begin()

    def kill_worker(self, rng: random.Random) -> bool:
        """SIGKILL to a worker of this cluster; whether there was one."""
        found = subprocess.run(["pgrep", "-f", "ray::TeacherWorker"], capture_output=True, text=True, check=False)
        workers = [int(pid) for pid in found.stdout.split() if self._is_ours(int(pid))]
        if workers:
            _signal(rng.choice(workers))
        return bool(workers)

    def _is_ours(self, pid: int) -> bool:
        try:
            return str(self._cluster.folder) in Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            return False


def start_seconds(store: Path) -> float | None:
    """How long the workers of the job at the store took to start, on average; None while none has."""
    starts, begun = [], 0.0
    for path in Path(f"{store}.job").glob("log-*.jsonl"):
        for line in map(json.loads, path.read_text().splitlines()):
            begun = line["time"] if line["event"] == "begun" else begun
            if line["event"] == "started":
                starts.append(line["time"] - begun)
                begun = line["time"]
    return sum(starts) / len(starts) if starts else None


@contextmanager
def running(port: int) -> Iterator[Cluster]:
    """A cluster for the block."""
    cluster = Cluster(port)
    try:
        yield cluster
    finally:
        cluster.stop()


def torment(
    config: Path, folder: Path, cluster: Cluster, rng: random.Random, pause_s: float, max_kills: int, until: float
) -> tuple[list[Path], Counter[str]]:
    """Make one store after the other, and kill meanwhile, until ``max_kills`` or the time ``until`` is reached; the
    stores that were finished, and how often what was killed.
    """
    kills: Counter[str] = Counter()
    deck: list[str] = []
    stores = [folder / "0"]
    job = Job(config, stores[0], cluster)
    while True:
        due = time.monotonic() + rng.expovariate(1 / pause_s)
        is_over = sum(kills.values()) >= max_kills or time.monotonic() > until
        while (is_over or time.monotonic() < due) and not job.is_finished():
            cluster.tend()
            time.sleep(0.05)
        if job.is_finished():
            if is_over:
                return stores, kills
            stores.append(folder / str(len(stores)))
            job = Job(config, stores[-1], cluster)
            continue
        if not deck:
            deck = rng.sample(["worker", "worker", "driver", "node"], 4)
        if deck[-1] == "worker" and not job.kill_worker(rng):
            continue  # none is alive just now
        what = deck.pop()
        if what == "driver":
            job.kill_driver()
        if what == "node":
            cluster.kill_node(rng)
        kills[what] += 1
        print(f"{time.strftime('%X')} killed {what} ({sum(kills.values())}), store {len(stores)}", flush=True)


def main() -> None:
    """Torment for so many minutes on the demo's text and teacher, or a toy of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    from training.engine import free_port

    with tempfile.TemporaryDirectory(prefix="chaos") as name:
        folder = Path(name)
        # So long that most kills fall into the work, not into the start.
        config = make_long(make_inputs(folder), folder, "[a-z]*.py", num_shards=64)
        path = write_yaml(folder / "cache.yaml", config)
        for verb in ("tokenize", "cache"):
            subprocess.run([DECANT, verb, str(path)], cwd=ROOT, check=True)
        quiet = Path(config["store"]["path"])
        pause_s = PAUSE_IN_STARTS * (start_seconds(quiet) or 1.0)
        print(f"a worker starts in {pause_s / PAUSE_IN_STARTS:.1f} s; a kill every {pause_s:.1f} s on average")
        until = time.monotonic() + 60 * arguments.minutes
        with running(free_port()) as cluster:
            stores, kills = torment(
                path, folder / "tormented", cluster, random.Random(arguments.seed), pause_s, 10**9, until
            )
        wanted = shard_bytes(quiet)
        different = [store.name for store in stores if shard_bytes(store) != wanted]
        print(
            f"{sum(kills.values())} kills ({dict(kills)}), {len(stores)} stores made, different: {different or 'none'}"
        )
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
