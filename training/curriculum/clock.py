"""Where the curriculum stands: lengths and easiness on one clock of tokens, which a restless gradient holds back."""

import math
from typing import NamedTuple

from training.config import CurriculumConfig, PacingConfig, RowCurriculumConfig
from training.schedules import difficulty


class Pace(NamedTuple):
    """Running sums over the norms of the gradient, of which older ones count less and less."""

    steps: int = 0
    weight: float = 0.0
    norms: float = 0.0
    squares: float = 0.0

    def observed(self, norm: float, window_steps: int) -> "Pace":
        """With one more norm: each sum is decayed by 1 − 1/window, so that a norm counts 1/e after a window."""
        keep = 1.0 - 1.0 / window_steps
        sums = (keep * self.weight + 1.0, keep * self.norms + norm, keep * self.squares + norm * norm)
        return Pace(self.steps + 1, *sums)

    @property
    def volatility(self) -> float:
        """Standard deviation of the norms over their mean; 0 where all were 0."""
        if self.norms == 0.0:
            return 0.0
        mean = self.norms / self.weight
        return math.sqrt(max(self.squares / self.weight - mean * mean, 0.0)) / mean


class Curriculum(NamedTuple):
    """The curricula of a run, either of which may be absent."""

    lengths: CurriculumConfig | None = None
    rows: RowCurriculumConfig | None = None

    @property
    def is_bucketed(self) -> bool:
        """Whether rows are taken whole, by length, in place of prefixes."""
        return self.lengths is not None and self.lengths.mode == "bucket"

    @property
    def pacing(self) -> PacingConfig | None:
        """What holds the clock back."""
        return self.lengths.pacing if self.lengths else None

    def length(self, clock: int) -> int | None:
        """Positions per sequence; None for as many as a row has."""
        return difficulty(self.lengths, clock) if self.lengths else None

    def percent(self, clock: int) -> int:
        """How much of the rows is trained on, the easiest first."""
        return difficulty(self.rows, clock) if self.rows else 100

    @property
    def parts(self) -> int:
        """Parts of an epoch that the curricula go through one after the other: their cycles."""
        return max(schedule.cycles if schedule else 1 for schedule in (self.lengths, self.rows))

    def advanced(self, clock: int, pace: Pace, tokens: int, norm: float) -> tuple[int, Pace]:
        """Clock and pace after a step of ``tokens`` whose gradient had this norm.

        With pacing the clock advances where the last ``window_steps`` norms were steady enough. A norm that is not
        finite (a step that fp16 skipped) is no measure: it holds the clock and is not remembered.
        """
        if self.pacing is None:
            return clock + tokens, pace
        if not math.isfinite(norm):
            return clock, pace
        pace = pace.observed(norm, self.pacing.window_steps)
        is_steady = pace.steps >= self.pacing.window_steps and pace.volatility <= self.pacing.max_volatility
        return clock + tokens * is_steady, pace
