"""Checkpoints of a run: where it goes on from, and when the next one is due."""

from training.curriculum.batches import Cursor
from training.engine import Engine, same_on_all_ranks
from training.run_folder import RunFolder


class Checkpoints:
    """Weights, optimizer and cursor, written by all ranks and pointed to by rank 0. Every rank calls every method."""

    def __init__(self, run: RunFolder, engine: Engine, rank: int, every_tokens: int | None) -> None:
        self.run, self.engine, self.rank, self.every_tokens = run, engine, rank, every_tokens
        self._saved = Cursor()  # the start needs no file

    def resume(self) -> Cursor:
        """Load the newest checkpoint, whatever number of ranks wrote it; where it stands, or the start.

        Metrics of later steps are dropped: they are taken again. Raises StudentError.
        """
        pointer = same_on_all_ranks(self.run.checkpoint() if self.rank == 0 else None)
        if pointer:
            self.engine.load(self.run.checkpoints, pointer["tag"], pointer["ranks"])
            self._saved = Cursor(**pointer["cursor"])
        if self.rank == 0:
            self.run.rewind(self._saved.step)
        return self._saved

    def save(self, cursor: Cursor) -> None:
        """Write a checkpoint of the state at ``cursor``, unless the newest is of it, or nothing was done yet.

        Raises StudentError.
        """
        if cursor == self._saved:
            return
        tag = f"step{cursor.step}"
        self.engine.save(self.run.checkpoints, tag)
        if self.rank == 0:
            self.run.point_to(tag, cursor._asdict(), self.engine.world_size)
        self._saved = cursor

    def save_if_due(self, before: Cursor, after: Cursor) -> None:
        """``save(after)`` where the step from ``before`` crossed a multiple of `checkpoint.every_tokens`."""
        if crossed(self.every_tokens, before, after):
            self.save(after)


def crossed(every: int | None, before: Cursor, after: Cursor) -> bool:
    """Whether a step from ``before`` to ``after`` reached or passed a multiple of ``every`` tokens."""
    return every is not None and before.tokens_seen // every != after.tokens_seen // every
