"""A cluster of several machines: nodes with addresses of their own, one of which loses power in the middle."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from logit_store import LogitStore
from tests.namespaces import Namespace, namespaces, needs_root
from tests.ray_node import ray_node, token_environment, wait_until
from tests.toy import DECANT, ROOT, make_here, make_long, num_committed, shard_bytes, write_yaml

PORT = 6379
NUM_SHARDS = 48

FINISHED_BY_ADDRESS = """
import collections, json, ray, sys
from ray.util.state import list_nodes, list_tasks
ray.init(address=sys.argv[1], logging_level="ERROR")
address = {node.node_id: node.node_ip for node in list_nodes(detail=True)}
tasks = list_tasks(filters=[("type", "=", "ACTOR_TASK"), ("state", "=", "FINISHED")], limit=10_000, detail=True)
scored = [task for task in tasks if task.func_or_class_name.startswith("TeacherWorker.")]
print(json.dumps(collections.Counter(address[task.node_id] for task in scored)))
"""


@pytest.fixture(scope="module")
def slow_cache(cache_config: dict[str, Any], shared: Path) -> tuple[Path, dict[str, bytes]]:
    """A config of some fifteen seconds of work (one row per batch), and the shards of a run in one process."""
    folder = shared / "nodes"
    folder.mkdir()
    config = make_long(cache_config, folder, "[a-z]*.py", 6_000, NUM_SHARDS)
    make_here(config)
    return write_yaml(folder / "cache.yaml", config), shard_bytes(config["store"]["path"])


@pytest.fixture
def machines() -> Iterator[list[Namespace]]:
    with namespaces(4) as made:
        yield made


@needs_root
def test_a_machine_lost_in_the_middle_changes_nothing(
    slow_cache: tuple[Path, dict[str, bytes]], machines: list[Namespace], shared: Path
) -> None:
    config, quiet = slow_cache
    folder = shared / "nodes-store"
    head, first, second, third = machines
    environment = token_environment()

    def finished_by_address() -> dict[str, int]:
        address = f"{head.address}:{PORT}"
        # By environment too: state queries look for any cluster of this computer otherwise, other tests' included.
        done = head.run(sys.executable, "-c", FINISHED_BY_ADDRESS, address, env={**environment, "RAY_ADDRESS": address})
        assert done.returncode == 0, done.stderr
        return dict(json.loads(done.stdout.splitlines()[-1]))

    def worker(machine: Namespace) -> Any:
        return ray_node(f"--address={head.address}:{PORT}", "--num-cpus=1", environment=environment, machine=machine)

    with ExitStack() as nodes:
        nodes.enter_context(ray_node("--head", f"--port={PORT}", "--num-cpus=0", environment=environment, machine=head))
        nodes.enter_context(worker(first))
        nodes.enter_context(worker(second))
        command = [DECANT, "cache", str(config), f"store.path={folder}", f"cluster.address={head.address}:{PORT}"]
        log = shared / "nodes.log"
        with open(log, "w") as out:
            driver = subprocess.Popen(
                head.command(*command), cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        try:
            wait_until(lambda: num_committed(folder) >= 1 or driver.poll() is not None, 120)
            assert driver.poll() is None, log.read_text()
            nodes.enter_context(worker(third))
            first.unplug()
            first.kill()
            assert num_committed(folder) < NUM_SHARDS / 2
            assert driver.wait(timeout=180) == 0, log.read_text()
            scored = finished_by_address()
        finally:
            driver.kill()
            driver.wait()
    assert set(scored) >= {second.address, third.address}
    assert set(scored) <= {first.address, second.address, third.address}
    assert shard_bytes(folder) == quiet
    LogitStore.open(str(folder))
