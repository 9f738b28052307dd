"""A job with the real vLLM engine, whose process is killed in the middle."""

import os
import signal
import subprocess
import time
from pathlib import Path

import decant
from cluster.job.status import read
from tests.e2e.test_chain import Started
from tests.toy import num_committed


def engines(ray_folder: str) -> list[int]:
    """Processes of engines on the cluster in this folder: they name themselves."""
    found = subprocess.run(["pgrep", "-f", "VLLM::"], capture_output=True, text=True, check=False)
    return [int(pid) for pid in found.stdout.split() if f"RAY_TMPDIR={ray_folder}".encode() in _environment(int(pid))]


def _environment(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/environ").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return b""


def test_vllm_engine_killed_in_the_middle(long_cache: tuple[Path, dict[str, bytes]], shared: Path) -> None:
    """The worker says so and is replaced; rows, ids and values are those of the transformers teacher."""
    path, _ = long_cache
    folder = shared / "long-vllm"
    options = ("teacher.backend=vllm", "teacher.batch_tokens=512", "cluster.workers=1", "cluster.cpus_per_worker=2")
    job = Started(shared / "vllm.log", "cache", str(path), f"store.path={folder}", *options)
    try:
        job.wait_until(lambda: num_committed(folder) >= 1, 300)
        (engine, *_others) = engines(job.temporary)
        os.kill(engine, signal.SIGKILL)
        assert job.wait() == 0, job.log.read_text()
    finally:
        if job.process.poll() is None:
            job.kill()
    assert read(str(folder))["retries"] == {"worker_died": 1}
    while Path(f"/proc/{engine}").exists():
        time.sleep(0.1)
    assert not engines(job.temporary)
    assert decant.main(["diff", str(shared / "long-quiet"), str(folder), "--tolerance", "0.5"]) == 0
