"""Workers and storage that fail on purpose, importable by Ray's processes."""

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from cluster.job.worker import TeacherWorker
from logit_store import Targets, storage
from logit_store.errors import TeacherError

DEADLY, NOT_A_NUMBER, NO_DISTRIBUTION = 200, 201, 202
"""Ids that no ordinary row begins with twice: a row that begins with two of them kills, gives NaN, or labels whose sum
is not 1."""


class FaultyTeacher:
    """A real teacher, but for rows that begin with two such ids."""

    def __init__(self, teacher: Any) -> None:
        self.teacher = teacher

    def __getattr__(self, name: str) -> Any:
        return getattr(self.teacher, name)

    def score(self, rows: list[np.ndarray], numbers: list[int]) -> list[Targets]:
        for row in rows:
            if row[:2].tolist() == [DEADLY, DEADLY]:
                os.kill(os.getpid(), signal.SIGKILL)
            if row[:2].tolist() == [NOT_A_NUMBER, NOT_A_NUMBER]:
                raise TeacherError("the teacher's logits hold NaN or infinity")
        scored: list[Targets] = self.teacher.score(rows, numbers)
        for row, targets in zip(rows, scored, strict=True):
            if row[:2].tolist() == [NO_DISTRIBUTION, NO_DISTRIBUTION]:
                targets.tail_logmass_P[:] = 0.0
        return scored


class FaultyWorker(TeacherWorker):
    """A worker with such a teacher."""

    def load_teacher(self) -> Any:
        return FaultyTeacher(super().load_teacher())


class BrokenWorker(TeacherWorker):
    """A worker on a machine that cannot score anything."""

    def load_teacher(self) -> Any:
        teacher: Any = super().load_teacher()
        teacher.score = lambda *_: os._exit(1)
        return teacher


class Placed:
    """Knows where it was put."""

    def bundles(self) -> Any:
        import ray

        return list(ray.util.placement_group_table(ray.util.get_current_placement_group())["bundles"].values())


FAILS_IN = 12
"""Calls of storage of which one fails."""


class FlakyFileSystem(DirFileSystem):
    """A remote file system, as far as anybody can see (`flaky://PATH`). One call in ``FAILS_IN`` fails, never three in
    a row.

    Errors, time-outs, and the worst: a write that was carried out, and said to have failed.
    """

    protocol = "flaky"
    cachable = False

    def __init__(self, **_options: Any) -> None:
        super().__init__(path="/", fs=LocalFileSystem())
        self._random = np.random.default_rng()
        self._lock = threading.Lock()
        self._failures = 0

    def _fail(self) -> None:
        with self._lock:
            drawn = self._random.random() if self._failures < 2 else 1.0
            self._failures = self._failures + 1 if drawn < 1 / FAILS_IN else 0
        if drawn < 0.5 / FAILS_IN:
            raise TimeoutError("the object store did not answer")
        if drawn < 1 / FAILS_IN:
            raise OSError(errno.EIO, "503 Slow Down")

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", **_options: Any) -> None:
        self._fail()
        target = Path("/" + path.lstrip("/"))
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target, "xb" if mode == "create" else "wb") as file:
            file.write(value)
        self._fail()

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        self._fail()
        return bytes(super().cat_file(path, start, end, **options))

    def get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        self._fail()
        super().get_file(rpath, lpath, **options)

    def exists(self, path: str, **options: Any) -> bool:
        self._fail()
        return bool(super().exists(path, **options))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        self._fail()
        return super().ls(path, detail, **options)


class FlakyStorageWorker(TeacherWorker):
    """A worker that knows the flaky file system, and gives up at the first failure."""

    def __init__(self, *arguments: Any) -> None:
        storage.RETRY_DELAYS_S = ()
        super().__init__(*arguments)


fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
