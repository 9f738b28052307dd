"""What a job says of itself while it runs: a status file and a log, beside the store and never in it."""

import json
import os
import socket
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from logit_store import Storage

SUFFIX = ".job"
STATUS = "status.json"
STATUS_EVERY_S = {True: 2.0, False: 15.0}
"""Seconds between two writes of the status, on local disks and elsewhere, where each write costs money."""
LOG_EVERY_S = 30.0
"""Seconds between two parts of the log where files cannot grow, and between attempts where it could not be written."""
MAX_LINES_KEPT = 5000
"""Of a log that could not be written, the last lines that wait for the next attempt."""


class Journal:
    """The job's folder: `STORE.job/status.json`, rewritten all the time, and `STORE.job/log-….jsonl`, a line per event.

    A job must not die because it cannot write about itself: the first failure is said on stderr. The last lines wait
    for the next attempt.
    """

    def __init__(self, store_url: str, verb: str) -> None:
        self.storage = Storage(store_url.rstrip("/") + SUFFIX)
        self._name = f"log-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}-{uuid.uuid4().hex[:6]}"
        self._about = {"verb": verb, "host": socket.gethostname(), "pid": os.getpid(), "log": self._name}
        self._started = time.time()
        self._lines: list[str] = []
        self._part = 0
        self._is_broken = False
        self._last_status = self._last_flush = 0.0

    def log(self, event: str, **fields: Any) -> None:
        """Add a line."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields})
        self._lines.append(line + "\n")
        if self._is_broken:
            del self._lines[:-MAX_LINES_KEPT]
        is_cheap = self.storage.is_local and not self._is_broken
        if is_cheap or time.monotonic() - self._last_flush > LOG_EVERY_S:
            self._attempt(self._flush)

    def status(self, state: str, figures: Callable[[], dict[str, Any]], now: bool = False) -> None:
        """Say how things stand (``running``, ``finished``, ``failed``, ``interrupted``), unless it was just said."""
        if now or time.monotonic() - self._last_status >= STATUS_EVERY_S[self.storage.is_local]:
            self._last_status = time.monotonic()
            said = {**self._about, "state": state, "started": self._started, "updated": time.time(), **figures()}
            self._attempt(lambda: self._replace(STATUS, json.dumps(said, indent=1).encode()))

    def close(self) -> None:
        """Write what is not written yet."""
        if self._lines:
            self._attempt(self._flush)

    def _flush(self) -> None:
        text, self._last_flush = "".join(self._lines), time.monotonic()
        if self.storage.is_local:
            path = Path(self.storage.path(f"{self._name}.jsonl"))
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(text)
        else:
            self._replace(f"{self._name}/{self._part + 1:06d}.jsonl", text.encode())
            self._part += 1
        self._lines = []

    def _replace(self, name: str, data: bytes) -> None:
        path = self.storage.path(name)
        if not self.storage.is_local:
            self.storage.fs.pipe_file(path, data)
            return
        temporary = Path(f"{path}.{os.getpid()}.tmp")
        temporary.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)

    def _attempt(self, write: Any) -> None:
        try:
            write()
            self._is_broken = False
        except Exception as error:  # noqa: BLE001  (remote file systems raise what their libraries raise)
            if not self._is_broken:
                said = f"decant: {self.storage.url} cannot be written, so `decant status` is blind: {error}"
                print(said, file=sys.stderr)
            self._is_broken = True


def read_status(store_url: str) -> dict[str, Any] | None:
    """What the last job at this store said of itself; None where there was none."""
    storage = Storage(store_url.rstrip("/") + SUFFIX)
    try:
        status = json.loads(storage.read(STATUS))
    except (FileNotFoundError, ValueError):
        return None
    return status if isinstance(status, dict) else None
