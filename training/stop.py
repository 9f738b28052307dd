"""How a run ends early: on a request, heeded at the next step, or on an error that all ranks know of."""

import signal
from pathlib import Path
from types import FrameType

from logit_store.errors import StudentError


class AgreedError(StudentError):
    """Every rank raises it at the same place, so that they can leave together and one of them says it."""


class StopRequest:
    """Whether a run was asked to stop: a checkpoint can be written between steps only."""

    def __init__(self, note: Path | None = None) -> None:
        """``note`` is a file that asks as well, in the name of a process that the signal reached: processes on other
        machines see it. It exists from the first signal on; the second one ends the process that got it.
        """
        self._note, self._has_signal = note, False

    @property
    def asked(self) -> bool:
        """Whether the next step is one too many."""
        return self._has_signal or (self._note is not None and self._note.exists())

    def __enter__(self) -> "StopRequest":
        """Within the block SIGTERM asks, and does nothing else. Only the main thread can do this."""
        self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *_exception: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        if self._note is not None:
            if self._has_signal:  # whoever reads the note may be waiting for machines, for ever
                raise SystemExit(128 + number)
            self._note.touch()
        self._has_signal = True
