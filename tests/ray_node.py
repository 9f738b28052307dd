"""Real Ray nodes for tests, as `ray start` makes them: on this machine's loopback or in a network namespace."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.namespaces import Namespace
from tests.toy import ROOT

BIN = Path(sys.executable).parent
RAY = str(BIN / "ray")


def token_environment() -> dict[str, str]:
    """The environment of a cluster's nodes and clients: a token of their own, and node failures seen in seconds."""
    return {
        **os.environ,
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",  # the dashboard runs a job's entry point with it
        "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ['PYTHONPATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_health_check_initial_delay_ms": "1000",
        "RAY_health_check_period_ms": "500",
        "RAY_health_check_timeout_ms": "1000",
        "RAY_health_check_failure_threshold": "4",
    }


@contextmanager
def ray_node(
    *options: str, environment: dict[str, str], machine: Namespace | None = None, seconds: float = 60
) -> Iterator[Path]:
    """`ray start …` until the end of the block; its folder, where it logs.

    A machine that is killed meanwhile is no error: whatever of the node still lives is ended.
    """
    folder = Path(tempfile.mkdtemp(prefix="node", dir="/tmp"))  # Ray's socket paths must stay under 107 bytes
    command = [RAY, "start", *options, f"--temp-dir={folder}", "--object-store-memory=80000000", "--block"]
    command += ["--disable-usage-stats"]
    if machine is not None:
        command = machine.command(*command, f"--node-ip-address={machine.address}")
    log = folder / "start.log"
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        wait_until(lambda: "--block" in log.read_text() or process.poll() is not None, seconds)
        assert process.poll() is None, log.read_text()
        yield folder
    finally:
        process.send_signal(signal.SIGTERM)  # a node that was started with --block ends its processes then
        process.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    """Wait for the condition. Raises AssertionError after ``seconds``."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds:g} s"
        time.sleep(0.02)
