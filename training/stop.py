"""How a run ends early: on a request, heeded at the next step, or on an error that all ranks know of."""

import signal
from types import FrameType

from logit_store.errors import StudentError


class AgreedError(StudentError):
    """Every rank raises it at the same place, so that they can leave together and one of them says it."""


class StopRequest:
    """Whether this process was asked to stop: a checkpoint can be written between steps only."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "StopRequest":
        """Within the block SIGTERM asks, and does nothing else. Only the main thread can do this."""
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        self.asked = True
