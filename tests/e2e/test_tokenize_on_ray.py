"""`decant tokenize` with real tasks of Ray Data: killed at every level, and a driver that never holds the corpus."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster import ray_cluster, ray_tasks
from cluster.config import CacheConfig, ClusterConfig
from cluster.tokenize import tokenize
from logit_store import TokenStore
from logit_store.config import parse_config
from logit_store.errors import CorpusError, DecantError
from tests.e2e.test_chain import Started
from tests.toy import ROOT, in_process_workers, num_committed, shard_bytes, write_yaml


@pytest.fixture(scope="module")
def long_corpus(cache_config: dict[str, Any], shared: Path) -> tuple[Path, dict[str, bytes]]:
    """A config of 60 shards that take some ten seconds, and the shards of a run in one process."""
    library = Path(json.__file__).parents[1]
    texts = [path.read_text(encoding="utf-8") for path in sorted(library.glob("[a-m]*.py"))]
    (shared / "library.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    raw = json.loads(json.dumps(cache_config))
    raw["tokens"] |= {"path": str(shared / "library-quiet"), "source": {"files": [str(shared / "library.jsonl")]}}
    raw["tokens"]["num_shards"] = 60
    with in_process_workers():
        tokenize(parse_config(CacheConfig, raw, "library"))
    return write_yaml(shared / "library.yaml", raw), shard_bytes(shared / "library-quiet")


def test_the_terminal_shows_nothing_of_rays_own(tokens: TokenStore, shared: Path) -> None:
    ours = re.compile(r"tokenize: [\d,]+ tokens in|.*[Tt]oken authentication")
    lines = (shared / "tokens.log").read_text().splitlines()
    assert lines
    assert [line for line in lines if not ours.match(line)] == []


def task_processes(driver: Started) -> list[psutil.Process]:
    """Processes that run the driver's tasks now."""
    found = []
    for process in psutil.Process(driver.process.pid).children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.name().startswith("ray::Map"):
                found.append(process)
    return found


def test_killed_in_the_middle_and_resumed_gives_the_same_bytes(
    long_corpus: tuple[Path, dict[str, bytes]], shared: Path
) -> None:
    path, quiet = long_corpus
    folder = shared / "library-killed"
    arguments = ("tokenize", str(path), f"tokens.path={folder}")

    driver = Started(shared / "tokenize-killed.log", *arguments)
    driver.wait_until(lambda: num_committed(folder) >= 3)
    orphans = psutil.Process(driver.process.pid).children(recursive=True)
    driver.kill()
    psutil.wait_procs(orphans, timeout=60)  # they die with their raylet
    before = num_committed(folder)
    assert 3 <= before < 60
    kept = shard_bytes(folder)

    driver = Started(shared / "tokenize-resumed.log", *arguments)
    driver.wait_until(lambda: num_committed(folder) > before and len(task_processes(driver)) > 0)
    for process in task_processes(driver):  # Ray starts them again, and their shards
        process.kill()
    assert driver.wait() == 0, driver.log.read_text()
    assert re.search(rf"tokenize: {before} of 60 shards are committed", driver.log.read_text())
    assert shard_bytes(folder) == quiet
    assert {name: quiet[name] for name in kept if name.endswith(".json")} == {
        name: data for name, data in kept.items() if name.endswith(".json")
    }
    TokenStore.open(str(folder))


MEASURED = """
import contextlib, resource, sys
import decant
from cluster import ray_cluster
from cluster.config import ClusterConfig
with ray_cluster.session(ClusterConfig()):
    ray_cluster.session = lambda _config: contextlib.nullcontext()
    for config in sys.argv[1:]:
        assert decant.main(["tokenize", config]) == 0
        print("peak MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)
"""


def test_the_driver_never_holds_the_corpus(cache_config: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    """100 MB of lines, of which little is text, cost the driver hardly more memory than 1 MB of them."""
    counts, configs = {"small": 10, "large": 1000}, []
    line = json.dumps({"text": "x = 1", "other": "y" * 100_000}) + "\n"
    for name, num_documents in counts.items():
        with open(tmp_path / f"{name}.jsonl", "w") as file:
            file.writelines(line for _ in range(num_documents))
        raw = json.loads(json.dumps(cache_config))
        raw["tokens"] |= {"path": str(tmp_path / name), "source": {"files": [str(tmp_path / f"{name}.jsonl")]}}
        configs.append(str(write_yaml(tmp_path / f"{name}.yaml", raw)))
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "memory")}
    command = [sys.executable, "-c", MEASURED, *configs]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=environment)
    small, large = (float(peak) for peak in re.findall(r"peak MB ([\d.]+)", done.stdout))
    print(f"driver's peak: {small:.0f} MB for 1 MB of corpus, {large:.0f} MB for 100 MB")
    assert large - small < 32
    for name, num_documents in counts.items():
        assert len(TokenStore.open(str(tmp_path / name))) == num_documents


# Tasks


@pytest.fixture(scope="module")
def ray_session() -> Iterator[None]:
    """One of several sessions that tests of this process open one after the other."""
    before = authentication()
    with ray_cluster.session(ClusterConfig()):
        yield
    assert authentication() == before


def authentication() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")}


def double(shared: int, item: int) -> int:
    return shared * item


def refuse(_shared: None, item: int) -> int:
    if item == 3:
        raise CorpusError("c.jsonl, line 3: no good")
    return item


def die_once(folder: str, item: int) -> int:
    """The process dies at the first attempt at each item."""
    attempted = Path(folder) / str(item)
    if not attempted.exists():
        attempted.touch()
        os._exit(1)
    return item


def die(_shared: None, _item: int) -> None:
    os._exit(1)


def test_tasks(ray_session: None, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(ray_tasks.map_tasks(double, 2, [])) == []
    assert sorted(ray_tasks.map_tasks(double, 2, range(100))) == list(range(0, 200, 2))
    with pytest.raises(CorpusError, match=r"^c\.jsonl, line 3: no good$"):  # itself, without Ray's traceback
        list(ray_tasks.map_tasks(refuse, None, range(8)))
    assert "Traceback" not in capfd.readouterr().err
    assert sorted(ray_tasks.map_tasks(die_once, str(tmp_path), range(3))) == [0, 1, 2]


def test_a_task_that_always_dies_is_given_up(ray_session: None) -> None:
    started = time.monotonic()
    with pytest.raises(DecantError, match="a task died 4 times and was given up"):
        list(ray_tasks.map_tasks(die, None, [1]))
    assert time.monotonic() - started < 120
