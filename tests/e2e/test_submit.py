"""A running cluster that asks for a token: jobs submitted to it, and runs that join it by address."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.ray_node import RAY, ray_node, token_environment
from tests.toy import ROOT, run_decant, shard_bytes
from training.engine import free_port

OTHER_TOKEN = "ab" * 32

WORKER_ENVIRONMENT = """
import os, ray
from cluster import ray_cluster
from cluster.config import ClusterConfig
with ray_cluster.session(ClusterConfig()):
    print("worker has", ray.get(ray.remote(lambda: os.environ.get("PASSED")).remote()))
"""


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A cluster of one node with token authentication; its clients' environment."""
    environment, port, dashboard = token_environment(), free_port(), free_port()
    options = (
        "--head",
        f"--port={port}",
        "--num-cpus=2",
        "--dashboard-host=127.0.0.1",
        f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={free_port()}",  # jobs are started by the agent: its usual port may be taken
    )
    with ray_node(*options, environment=environment):
        api = f"127.0.0.1:{dashboard}"
        yield environment | {"RAY_API_SERVER_ADDRESS": f"http://{api}", "API": api, "GCS": f"127.0.0.1:{port}"}


def submit(
    environment: dict[str, str], *entrypoint: str, options: tuple[str, ...] = (), cwd: Path = ROOT
) -> "subprocess.CompletedProcess[str]":
    command = [RAY, "job", "submit", "--working-dir", ".", *options, "--", *entrypoint]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300, check=False)


def our_lines(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("decant ")]


def test_a_submitted_job_does_the_same_and_its_resubmission_nothing(
    store: Any, shared: Path, head: dict[str, str]
) -> None:
    folder = shared / "submitted"
    job = [sys.executable, "-m", "cluster", "cache", str(shared / "cache.yaml"), f"store.path={folder}"]
    done = submit(head, *job)
    assert done.returncode == 0, done.stdout + done.stderr
    assert shard_bytes(folder) == shard_bytes(store.storage.root)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    again = submit(head, *job)
    assert again.returncode == 0, again.stdout + again.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert head["RAY_AUTH_TOKEN"] not in done.stdout + done.stderr + again.stdout + again.stderr


def test_a_job_that_is_refused_fails_with_our_line(shared: Path, tokens: Any, head: dict[str, str]) -> None:
    done = submit(head, sys.executable, "-m", "cluster", "cache", str(shared / "cache.yaml"), "store.path=runs/lost")
    assert done.returncode != 0
    assert "decant cache: error: store.path=runs/lost is relative, and a job runs in a copy" in done.stdout


# Refused

WITHOUT_TOKEN = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": ""}
WITH_ANOTHER = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": OTHER_TOKEN}


@pytest.mark.parametrize("variables", [WITHOUT_TOKEN, WITH_ANOTHER], ids=["none", "another"])
def test_a_job_without_the_token_is_refused(head: dict[str, str], variables: dict[str, str]) -> None:
    done = submit(head | variables, "true")
    assert done.returncode != 0
    assert "Unauthorized" in done.stderr or "token" in done.stderr.splitlines()[-1], done.stderr
    assert head["RAY_AUTH_TOKEN"] not in done.stderr + done.stdout


@pytest.fixture(scope="module")
def refusals(tokens: Any, shared: Path, head: dict[str, str]) -> dict[str, str]:
    """What `decant cache` says that joins by address: all of them at once, for each starts for seconds."""
    joins = {
        "no token": (WITHOUT_TOKEN, head["GCS"]),
        "another token": (WITH_ANOTHER, head["GCS"]),
        "no token file": ({"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": "/nowhere/token"}, head["GCS"]),
        "no cluster": ({}, head["API"]),
    }
    folder = shared / "refused"

    def join(variables: dict[str, str], address: str) -> str:
        arguments = ("cache", str(shared / "cache.yaml"), f"store.path={folder}", "--address", address)
        done = run_decant(*arguments, env=head | variables, check=False)
        assert done.returncode == 2, done.stderr
        assert not folder.exists()
        return done.stderr

    with ThreadPoolExecutor() as pool:
        return dict(zip(joins, pool.map(join, *zip(*joins.values(), strict=True)), strict=True))


@pytest.mark.parametrize("what", ["no token", "another token"])
def test_joining_without_the_token_is_refused_in_one_line(
    refusals: dict[str, str], head: dict[str, str], what: str
) -> None:
    (line,) = refusals[what].strip().splitlines()
    assert f"decant cache: error: the Ray cluster at {head['GCS']!r} refuses our token" in line
    assert "export RAY_AUTH_MODE=token" in line
    assert OTHER_TOKEN not in line


def test_joining_with_a_token_file_that_is_missing_says_so(refusals: dict[str, str]) -> None:
    (line,) = our_lines(refusals["no token file"])
    assert "RAY_AUTH_TOKEN_PATH" in line


def test_what_listens_but_is_no_cluster_is_refused(refusals: dict[str, str], head: dict[str, str]) -> None:
    (line,) = our_lines(refusals["no cluster"])
    assert f"what listens at {head['API']!r} is no Ray cluster" in line


def test_a_job_for_an_address_where_nothing_listens_is_refused(head: dict[str, str]) -> None:
    done = submit(head | {"RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"}, "true")
    assert done.returncode != 0
    assert "Failed to connect to Ray at address: http://127.0.0.1:1" in done.stderr


# What travels with a job


def test_an_environment_travels_and_neither_runs_nor_installed_ones_do(head: dict[str, str], tmp_path: Path) -> None:
    """The entry point is two commands, as in docker/rayjob.yaml."""
    shutil.copy(ROOT / ".gitignore", tmp_path)
    for name in ("runs/demo/store/shards/0.arrow", ".venv/bin/python", "configs/mine.yaml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(os.urandom(1000))
    shutil.copytree(ROOT / "cluster", tmp_path / "cluster", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "logit_store", tmp_path / "logit_store", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "worker.py").write_text(WORKER_ENVIRONMENT)
    options = ("--runtime-env-json", json.dumps({"env_vars": {"PASSED": "on"}}))
    entry_point = f"find . -type f && {sys.executable} worker.py"
    done = submit(head, "sh", "-c", entry_point, options=options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker has on" in done.stdout
    found = {line for line in done.stdout.splitlines() if line.startswith("./")}
    assert {"./cluster/cache.py", "./configs/mine.yaml"} <= found
    assert not {line for line in found if line.startswith(("./runs", "./.venv"))}
