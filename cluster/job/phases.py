"""Where the seconds of a worker go."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("forward", "targets", "encode", "write", "wait")
"""The teacher's layers; LM head and choice of targets; rows to bytes; bytes to storage; nothing to do."""


class Phases:
    """Seconds by phase since they were last taken. A teacher on a GPU waits for it before it leaves a phase."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def measure(self, phase: str) -> Iterator[None]:
        """Count the time within the block as ``phase``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.add(phase, time.perf_counter() - started)

    def add(self, phase: str, seconds: float) -> None:
        """Count ``seconds`` as ``phase``."""
        self._seconds[phase] += seconds

    def take(self) -> dict[str, float]:
        """The seconds so far; counting begins again."""
        taken, self._seconds = dict(self._seconds), defaultdict(float)
        return taken
