"""What a row gives when it is cut: how many positions, and how many of them carry loss."""

from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from logit_store import LogitStore, TokenStore
from training.boundaries import Boundaries

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

    def __init__(self, store: LogitStore | TokenStore, boundaries: Boundaries | None) -> None:
        self.store, self.boundaries = store, boundaries
        self._is_masked = has_masks(store)

    def __call__(self, row: int, positions: int) -> tuple[int, int]:
        """See ``Cut``."""
        is_masked = bool(self._is_masked[self.store.shards.shard_of(row)[0]])
        has_end = self.boundaries is not None and positions < int(self.store.index.length(row)) - 1
        if not is_masked and not has_end:
            return positions, positions
        tokens = self.store.tokens(row)
        if has_end:
            assert self.boundaries is not None
            positions = self.boundaries.last_end(tokens.input_ids_T, positions)
        return positions, int(np.count_nonzero(tokens.carries_loss_P[:positions]))


def has_masks(store: LogitStore | TokenStore) -> NDArray[np.bool_]:
    """Which shards have rows with positions that carry no loss."""
    columns = store.shards.columns
    return np.asarray(columns.get("bytes.loss_mask", np.zeros(len(store.shards)))) > 0


def cut_of(store: LogitStore | TokenStore, boundary: Literal["token", "sentence", "line"]) -> Cut:
    """How rows of the store are cut, at ends of this unit where they are cut, with loss masks counted."""
    if boundary == "token" and not has_masks(store).any():
        return plain_cut
    return TokenCut(store, None if boundary == "token" else Boundaries.of_store(store, boundary))
