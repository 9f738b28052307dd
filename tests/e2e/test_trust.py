"""Who can reach a run, and what it writes down: a local cluster is ours alone, and no secret is ever stored."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import decant
from cluster import ray_cluster
from cluster.config import ClusterConfig
from cluster.tokenizer import load_tokenizer
from logit_store import LogitStore
from logit_store.errors import ConfigError
from tests.toy import PLANTED, ROOT

SESSION = """
import sys
import ray
from cluster import ray_cluster
from cluster.config import ClusterConfig

with ray_cluster.session(ClusterConfig()):
    ray.get(ray.remote(lambda: 0).remote())
    print(ray.get_runtime_context().gcs_address, flush=True)
    sys.stdin.read()
"""

JOIN = """
import sys, ray
from cluster import ray_cluster
from cluster.config import ClusterConfig

with ray_cluster.session(ClusterConfig(address=sys.argv[1])):
    print(ray.cluster_resources())
"""


def run_python(code: str, *arguments: str, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | variables
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def local_cluster(shared: Path) -> Iterator[tuple[int, str]]:
    """A process that has started its local cluster: its id, and the cluster's address."""
    process = subprocess.Popen(
        [sys.executable, "-c", SESSION], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    yield process.pid, process.stdout.readline().strip()
    process.stdin.close()
    assert process.wait(timeout=60) == 0


def family(pid: int) -> set[int]:
    """The process and all that descend from it."""
    lines = subprocess.run(["ps", "-eo", "pid,ppid"], capture_output=True, text=True, check=True).stdout.splitlines()[
        1:
    ]
    pairs = [tuple(map(int, line.split())) for line in lines]
    found = {pid}
    while more := {child for child, parent in pairs if parent in found} - found:
        found |= more
    return found


def listening(pids: set[int]) -> list[str]:
    """Addresses at which these processes listen, TCP and UDP, as `HOST:PORT`."""
    inodes = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            target = os.readlink(descriptor)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    sockets = subprocess.run(["ss", "-Htulne"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[4] for line in sockets if any(f"ino:{inode} " in line + " " for inode in inodes)]


def test_a_local_cluster_listens_on_loopback_alone(local_cluster: tuple[int, str]) -> None:
    pid, address = local_cluster
    found = listening(family(pid))
    ports = {where.rpartition(":")[2] for where in found}
    assert address.rpartition(":")[2] in ports, found
    assert len(found) >= 5  # GCS, raylet (two), its agents, a worker
    hosts = {where.rpartition(":")[0] for where in found}
    assert hosts <= {"127.0.0.1", "[::1]", "[::ffff:127.0.0.1]"}, found


@pytest.mark.parametrize(
    "variables", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}]
)
def test_a_local_cluster_refuses_who_has_not_its_token(
    local_cluster: tuple[int, str], variables: dict[str, str]
) -> None:
    _, address = local_cluster
    started = time.monotonic()
    done = run_python(JOIN, address, **variables)
    assert done.returncode != 0
    assert f"ConfigError: the Ray cluster at {address!r} refuses our token" in done.stderr
    assert time.monotonic() - started < 20


def test_a_local_cluster_lets_its_own_token_in(local_cluster: tuple[int, str]) -> None:
    pid, address = local_cluster
    (raylet,) = [p for p in family(pid) if Path(f"/proc/{p}/comm").read_text().strip() == "raylet"]
    lines = Path(f"/proc/{raylet}/environ").read_text().split("\0")
    variables = dict(line.split("=", 1) for line in lines if line.startswith("RAY_AUTH_"))
    assert variables["RAY_AUTH_MODE"] == "token"
    # Without this variable Ray takes a loopback address for this machine's public one, where nothing listens.
    done = run_python(JOIN, address, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0", **variables)
    assert done.returncode == 0, done.stderr
    assert "CPU" in done.stdout
    folder = next(word for word in Path(f"/proc/{raylet}/cmdline").read_text().split("\0") if "--session_dir=" in word)
    logs = [path for path in Path(folder.partition("=")[2]).rglob("*") if path.is_file()]
    assert any(path.name.startswith("raylet") for path in logs)
    assert not [path for path in logs if variables["RAY_AUTH_TOKEN"].encode() in path.read_bytes()]


def test_a_local_cluster_needs_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/nowhere")
    with (
        pytest.raises(ConfigError, match=r"needs a folder in /nowhere, .*\(No such file.*\): set RAY_TMPDIR"),
        ray_cluster.session(ClusterConfig()),
    ):
        pass


# Secrets


def test_no_secret_of_the_environment_is_written_down(store: LogitStore, shared: Path) -> None:
    folders = (Path(store.storage.root), Path(f"{store.storage.root}.job"))
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
    assert {"manifest.json", "status.json"} <= {path.name for path in files}
    written = (shared / "cache.log").read_bytes() + b"".join(path.read_bytes() for path in files)
    for name, secret in PLANTED.items():
        assert secret.encode() not in written, name


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("store.path=s3://AKIA:plantedkey@bucket/store", "store.path"),
        ("tokens.path=simplecache::s3://:plantedkey@bucket/tokens", "tokens.path"),
        ("teacher.model=https://user:plantedkey@host/model", "teacher.model"),
        ('tokens.source.files=["https://host/c.jsonl?X-Amz-Signature=plantedkey"]', "tokens.source.files"),
        ('tokens.source.files=["https://host/c.jsonl?a=1&api_key=plantedkey"]', "tokens.source.files"),
        ("store.path=https://ghp_plantedkey@host/store", "store.path"),
    ],
)
@pytest.mark.parametrize("verb", ["tokenize", "cache"])
def test_a_url_with_credentials_is_refused_and_not_repeated(
    capsys: pytest.CaptureFixture[str], shared: Path, tokens: Any, verb: str, override: str, key: str
) -> None:
    assert decant.main([verb, str(shared / "cache.yaml"), override]) == 2
    shown = capsys.readouterr()
    assert f"decant {verb}: error: {key} is a URL with credentials" in shown.err
    assert "plantedkey" not in shown.err + shown.out


@pytest.mark.parametrize(
    "arguments",
    [
        ["status", "memory://AKIA:plantedkey@bucket/store"],
        ["verify", "memory://AKIA:plantedkey@bucket/store"],
        ["slice", "STORE", "--k", "4", "--out", "memory://AKIA:plantedkey@bucket/slice"],
        ["export", "STORE", "--out", "memory://AKIA:plantedkey@bucket/export"],
        ["stats", "STORE", "--out", "memory://AKIA:plantedkey@bucket/stats"],
        ["merge", "STORE", "--out", "memory://AKIA:plantedkey@bucket/merged"],
        ["diff", "STORE", "memory://AKIA:plantedkey@bucket/store"],
    ],
)
def test_no_verb_takes_a_url_with_credentials(
    capsys: pytest.CaptureFixture[str], store: LogitStore, arguments: list[str]
) -> None:
    assert decant.main([argument.replace("STORE", store.storage.url) for argument in arguments]) == 2
    shown = capsys.readouterr()
    assert "is a URL with credentials" in shown.err
    assert "plantedkey" not in shown.err + shown.out


# Code


def test_code_beside_a_tokenizer_runs_only_when_the_config_says_so(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody is asked: whoever sits at the terminal might press `y`, and a job of Ray's has no terminal."""
    folder, ran = shutil.copytree(tokenizer, tmp_path / "with_code"), tmp_path / "ran"
    (folder / "own.py").write_text(
        "from pathlib import Path\nfrom transformers import PreTrainedTokenizerFast\n"
        f"Path({str(ran)!r}).touch()\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    described = json.loads((folder / "tokenizer_config.json").read_text())
    described |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    with suppress(ConfigError):  # or the tokenizer without its code, where transformers can make it
        assert type(load_tokenizer(str(folder), None, trust_remote_code=False)).__name__ != "Own"
    assert not ran.exists()
    assert type(load_tokenizer(str(folder), None, trust_remote_code=True)).__name__ == "Own"
    assert ran.exists()
