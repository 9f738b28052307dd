"""Machines for tests: network namespaces on one bridge, each with an address and a loopback of its own."""

import os
import secrets
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="making network namespaces needs root")


@dataclass(frozen=True)
class Namespace:
    """One machine: processes in it have its address alone."""

    name: str
    address: str

    def command(self, *command: str) -> list[str]:
        """The command, to be run in here."""
        return ["ip", "netns", "exec", self.name, *command]

    def run(self, *command: str, **options: Any) -> "subprocess.CompletedProcess[str]":
        """Run the command in here to its end."""
        return subprocess.run(self.command(*command), capture_output=True, text=True, **options)

    def pids(self) -> list[int]:
        """Every process in here."""
        found = subprocess.run(["ip", "netns", "pids", self.name], capture_output=True, text=True, check=True)
        return [int(pid) for pid in found.stdout.split()]

    def unplug(self) -> None:
        """Pull the network cable: peers hear nothing any more, not even that a connection was closed."""
        _ip("-n", self.name, "link", "set", "eth0", "down")

    def kill(self, seconds: float = 20) -> None:
        """SIGKILL to every process, until none is left."""
        deadline = time.monotonic() + seconds
        while pids := self.pids():
            assert time.monotonic() < deadline, f"{self.name} still runs {pids}"
            for pid in pids:
                with _gone_is_fine():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@contextmanager
def _gone_is_fine() -> Iterator[None]:
    """A process may end between being listed and being killed."""
    try:
        yield
    except ProcessLookupError:
        return


@contextmanager
def namespaces(number: int) -> Iterator[list[Namespace]]:
    """Machines on a bridge of their own, at 10.x.y.1 and on. All of it is torn down at the end, processes included.

    Names and addresses are drawn at random, so that two runs on one computer do not meet. The bridge lives in a
    namespace as well: this computer's own network sees nothing of it.
    """
    run = secrets.token_hex(3)
    network = f"10.{secrets.randbelow(200) + 20}.{secrets.randbelow(250)}"
    with ExitStack() as stack:
        switch = stack.enter_context(_namespace(Namespace(f"dc{run}s", "")))
        _ip("-n", switch.name, "link", "add", "bridge", "type", "bridge")
        _ip("-n", switch.name, "link", "set", "bridge", "up")
        machines = []
        for i in range(number):
            machine = stack.enter_context(_namespace(Namespace(f"dc{run}{i}", f"{network}.{i + 1}")))
            _plug(machine, switch, port=f"port{i}")
            machines.append(machine)
        yield machines


@contextmanager
def _namespace(namespace: Namespace) -> Iterator[Namespace]:
    _ip("netns", "add", namespace.name)
    try:
        _ip("-n", namespace.name, "link", "set", "lo", "up")
        yield namespace
    finally:
        namespace.kill()
        _ip("netns", "delete", namespace.name)


def _plug(machine: Namespace, switch: Namespace, port: str) -> None:
    """Connect a machine to the bridge. A pair of virtual interfaces goes with the namespace that holds either end."""
    _ip("-n", machine.name, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", switch.name)
    _ip("-n", switch.name, "link", "set", port, "master", "bridge", "up")
    _ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", "eth0")
    _ip("-n", machine.name, "link", "set", "eth0", "up")
    _ip("-n", machine.name, "route", "add", "default", "dev", "eth0")


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
