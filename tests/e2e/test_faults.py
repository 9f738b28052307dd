"""What kills workers kills no job: real actors, on one local cluster for this file."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decant
from cluster import ray_cluster, ray_workers
from cluster.cache import cache
from cluster.config import CacheConfig, ClusterConfig
from cluster.job.schedule import FAILURES_UNTIL_PROBED, STRIKES
from cluster.job.status import read
from cluster.job.worker import TeacherWorker
from logit_store import LogitStore, Storage, TokenRow, TokenStore
from logit_store.config import parse_config
from logit_store.errors import StoreError, TeacherError
from tests import faulty
from tests.faulty import DEADLY, NO_DISTRIBUTION, NOT_A_NUMBER
from tests.toy import ROOT, in_process_workers, write_tokens, write_yaml

RAYLET_DIES = """
import os, signal, time
import ray
from cluster import ray_cluster
from cluster.config import ClusterConfig
from cluster.job.pool import Pool
from cluster.job.schedule import Limits, Schedule

class Busy:
    def arrive(self): pass
    def start(self): return {}
    def work(self, task): time.sleep(600)

with ray_cluster.session(ClusterConfig()):
    pool = Pool(ClusterConfig(workers=1), Busy, (), Schedule([0], lambda _: 1, Limits()))
    for event in pool.run():
        if event.kind == "started":
            os.kill(ray._private.worker._global_node.all_processes["raylet"][0].process.pid, signal.SIGKILL)
"""

NUM_ROWS, NUM_SHARDS = 24, 4
DEADLY_ROW, NAN_ROW, WRONG_ROW = 7, 14, 15


@pytest.fixture(scope="module")
def local_cluster() -> Iterator[None]:
    """Every `cache` of this file runs on one cluster."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv("RAY_OVERRIDE_RESOURCES", '{"CPU": 2, "GPU": 2}')
        stack.enter_context(ray_cluster.session(ClusterConfig()))
        patch.setattr(ray_cluster, "session", lambda _config: nullcontext())
        yield


@pytest.fixture(scope="module")
def poisoned_tokens(tokens: TokenStore, shared: Path, tokenizer: Path) -> TokenStore:
    """Four shards of six rows, of which one kills, another gives NaN, and another what no codec can store."""
    rows = [tokens[i] for i in range(NUM_ROWS)]
    for number, token in ((DEADLY_ROW, DEADLY), (NAN_ROW, NOT_A_NUMBER), (WRONG_ROW, NO_DISTRIBUTION)):
        ids = np.concatenate([[token, token], rows[number].input_ids_T[2:]]).astype(np.int32)
        rows[number] = TokenRow(rows[number].document, "train", ids)
    fields = ("corpus", "num_documents", "tokenizer_name", "window", "held_out", "columns")
    header = {field: tokens.manifest[field] for field in fields} | {"num_shards": NUM_SHARDS}
    shards = [rows[start : start + 6] for start in range(0, NUM_ROWS, 6)]
    return write_tokens(str(shared / "poisoned-tokens"), tokenizer, shards, **header)


@pytest.fixture
def config(cache_config: dict[str, Any], poisoned_tokens: TokenStore, tmp_path: Path) -> CacheConfig:
    raw = json.loads(json.dumps(cache_config))
    raw["tokens"]["path"] = poisoned_tokens.storage.url
    raw["store"]["path"] = str(tmp_path / "store")
    raw["cluster"] |= {"retry_delay_s": 0.1}
    return parse_config(CacheConfig, raw, "faults")


@pytest.mark.usefixtures("local_cluster")
def test_rows_that_kill_are_left_out_and_everything_else_is_made(
    config: CacheConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """The command says so with exit code 3, also where it finds the store finished."""
    monkeypatch.setattr(cache, "__defaults__", (faulty.FaultyWorker,))
    path = write_yaml(tmp_path / "config.yaml", config.model_dump())
    for _ in range(2):
        assert decant.main(["cache", str(path)]) == 3
        assert "3 rows have no labels" in capsys.readouterr().err
    store = LogitStore.open(config.store.path)
    assert set(store.left_out) == {DEADLY_ROW, NAN_ROW, WRONG_ROW}
    assert "process has died" in store.left_out[DEADLY_ROW]
    assert "NaN" in store.left_out[NAN_ROW]
    assert "cannot be stored" in store.left_out[WRONG_ROW]
    assert decant.main(["verify", store.storage.url]) == 0
    for row in range(NUM_ROWS):
        labelled = store[row]
        np.testing.assert_array_equal(labelled.tokens.input_ids_T, TokenStore.open(config.tokens.path)[row].input_ids_T)
        assert (labelled.targets.head_counts_P == (0 if row in store.left_out else 16)).all()
    assert not set(store.left_out) & {*store.rows("train").tolist(), *store.rows("held_out").tolist()}
    found = read(store.storage.url)
    assert (found["state"], found["shards_done"], len(found["left_out"])) == ("finished", 4, 3)
    assert found["retries"]["worker_died"] >= FAILURES_UNTIL_PROBED + STRIKES
    assert found["retries"]["no_labels"] >= 2 * (FAILURES_UNTIL_PROBED + 1), "and no worker was started again for them"
    log = [json.loads(line) for line in Path(f"{store.storage.url}.job/{found['log']}.jsonl").read_text().splitlines()]
    assert {"begun", "started", "died", "probed", "left_out", "done", "finished"} <= {line["event"] for line in log}
    capsys.readouterr()
    assert decant.main(["status", store.storage.url]) == 0
    assert "4 of 4 (100.0%)" in capsys.readouterr().out


@pytest.mark.usefixtures("local_cluster")
def test_a_worker_on_several_nodes_has_a_placement_group() -> None:
    """A bundle for each GPU, gone with the worker. The GPUs are Ray's word only: nothing uses them."""
    import ray

    config = ClusterConfig(multi_node_workers=True, gpus_per_worker=2, cpus_per_worker=1)
    worker = ray_workers.start_worker(config, faulty.Placed, ())
    (done,) = ray_workers.wait([ray_workers.call(worker, "bundles")], 60)
    assert ray_workers.result(done) == [{"GPU": 1.0, "CPU": 1.0}] * 2
    assert ray.available_resources().get("GPU", 0) == 0
    ray_workers.stop_workers([worker], gently=False)
    deadline = time.monotonic() + 60
    while any(group["state"] != "REMOVED" for group in ray.util.placement_group_table().values()):
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.usefixtures("local_cluster")
def test_a_machine_that_cannot_score_ends_the_job(config: CacheConfig) -> None:
    cluster = config.cluster.model_copy(update={"max_attempts": 2})
    with pytest.raises(TeacherError, match=r"4 failures in a row.*worker process has died"):
        cache(config.model_copy(update={"cluster": cluster}), faulty.BrokenWorker)
    found = read(config.store.path)
    assert found["state"] == "failed"
    assert "4 failures in a row" in found["reason"]


@pytest.mark.usefixtures("local_cluster")
def test_storage_that_fails_one_call_in_twelve(config: CacheConfig, tmp_path: Path, tokens: TokenStore) -> None:
    """Workers that give up at the first failure, so that the schedule has to deal with it; tokens are remote too."""
    raw = config.model_dump() | {"store": {"path": f"flaky://{tmp_path}/remote"}}
    raw["tokens"] |= {"path": f"flaky://{tokens.storage.root}"}
    raw["cluster"] |= {"max_attempts": 30}
    remote = cache(parse_config(CacheConfig, raw, "flaky"), faulty.FlakyStorageWorker)
    assert read(f"flaky://{tmp_path}/remote")["retries"]["storage"] > 0
    raw["tokens"] |= {"path": tokens.storage.url}
    assert len(remote) == len(tokens)
    assert decant.main(["verify", f"{tmp_path}/remote"]) == 0
    raw["store"] = {"path": str(tmp_path / "quiet")}
    with in_process_workers():
        quiet = cache(parse_config(CacheConfig, raw, "quiet"), TeacherWorker)
    for shard in range(len(quiet.shards)):
        name = quiet.shard_name(shard)
        assert quiet.storage.read(name) == Storage(f"{tmp_path}/remote").read(name)


def test_a_local_cluster_that_has_died_ends_the_job() -> None:
    """No worker would ever start again."""
    done = subprocess.run(
        [sys.executable, "-c", RAYLET_DIES], cwd=ROOT, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 1
    assert "DecantError: the local Ray cluster has died (raylet): run the same command again" in done.stderr


def test_storage_that_is_down_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("logit_store.storage.RETRY_DELAYS_S", (0.0, 0.0))
    monkeypatch.setattr(faulty.FlakyFileSystem, "_fail", lambda _self: (_ for _ in ()).throw(TimeoutError()))
    with pytest.raises(StoreError, match=r"storage fails \(TimeoutError\), 3 times in a row"):
        LogitStore.open("flaky:///nowhere")
