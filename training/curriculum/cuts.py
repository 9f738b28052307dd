"""What a row gives when it is cut: how many positions, and how many of them carry loss."""

from collections.abc import Callable
from typing import Literal

import numpy as np

from training.curriculum.boundaries import Boundaries
from training.data.source import Source

Cut = Callable[[int, int], tuple[int, int]]
"""(row number, most positions, of which the row has as many) → positions that are fed, and those that carry loss."""


def plain_cut(_row: int, positions: int) -> tuple[int, int]:
    """All positions, each of which carries loss: nothing has to be known of the row."""
    return positions, positions


class TokenCut:
    """Cuts that depend on a row's tokens or its loss mask, which are read, without labels, where that is needed.

    Reading is lazy: a step reads the tokens of its own rows. Which shards have a loss mask at all is known from the
    table of shards (a mask without holes takes no bytes), so that rows of others are not read for it.
    """

    def __init__(self, source: Source, boundaries: Boundaries | None) -> None:
        self.source, self.boundaries = source, boundaries

    def __call__(self, row: int, positions: int) -> tuple[int, int]:
        """See ``Cut``."""
        is_masked = self.source.may_be_masked(row)
        has_end = self.boundaries is not None and positions < int(self.source.lengths_N[row]) - 1
        if not is_masked and not has_end:
            return positions, positions
        tokens = self.source.tokens(row)
        if has_end:
            assert self.boundaries is not None
            positions = self.boundaries.last_end(tokens.input_ids_T, positions)
        return positions, int(np.count_nonzero(tokens.carries_loss_P[:positions]))


def cut_of(source: Source, boundary: Literal["token", "sentence", "line"]) -> Cut:
    """How rows are cut, at ends of this unit where they are cut, with loss masks counted."""
    if boundary == "token" and not source.has_masks:
        return plain_cut
    return TokenCut(source, None if boundary == "token" else Boundaries.of_store(source.stores[0], boundary))
