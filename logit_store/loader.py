"""Batches of a store ahead of who trains on them: one global order for any number of ranks and workers."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from logit_store.batch import Batch, pad
from logit_store.order import Order
from logit_store.reader import LogitStore


class Loader:
    """Endless batches of ``rows_per_step`` shuffled rows; each rank gets its share of every step.

    The rows of step s are places ``s · rows_per_step`` and on of ``Order(seed)``, whatever reads them; rank r of R
    takes every R-th of them, beginning with the r-th. ``state()`` is one number, and a loader that is given it goes on
    there.

    ``workers`` threads or processes decode ``ahead`` steps in advance. Threads share the store's maps and copy nothing;
    processes decode without sharing the interpreter, and send their arrays through a pipe.
    """

    def __init__(
        self,
        store: LogitStore,
        rows_per_step: int,
        *,
        seed: int = 0,
        split: str | None = "train",
        rank: int = 0,
        num_ranks: int = 1,
        workers: int = 2,
        kind: Literal["threads", "processes"] = "threads",
        ahead: int = 4,
    ) -> None:
        """``split``: the rows to take, or None for all with labels. Raises ValueError: there are none for some rank."""
        if not 0 <= rank < num_ranks <= rows_per_step:
            raise ValueError(f"rank {rank} of {num_ranks} with {rows_per_step} rows per step: some rank would get none")
        self.store, self.rows_per_step, self.rank, self.num_ranks = store, rows_per_step, rank, num_ranks
        self.workers, self.kind, self.ahead = workers, kind, max(ahead, 1)
        self._rows = store.rows(split) if split is not None or store.left_out else None
        self._order = Order(len(store) if self._rows is None else len(self._rows), seed)
        self._step = 0

    def state(self) -> dict[str, int]:
        """Where the loader stands: how many steps it has given out."""
        return {"step": self._step}

    def load_state(self, state: dict[str, int]) -> None:
        """Go on from ``state``; takes effect at the next ``iter()``."""
        self._step = state["step"]

    def rows_of(self, step: int) -> NDArray[np.int64]:
        """Numbers of the rows that this rank reads in a step."""
        start = step * self.rows_per_step
        places = self._order.places(start, start + self.rows_per_step)[self.rank :: self.num_ranks]
        return places if self._rows is None else self._rows[places]

    def __iter__(self) -> Iterator[Batch]:
        with self._pool() as pool:
            waiting: deque[Future[Batch]] = deque()
            step = self._step
            try:
                while True:
                    while len(waiting) < self.ahead:
                        waiting.append(pool.submit(_read, self._source, self.rows_of(step)))
                        step += 1
                    batch = waiting.popleft().result()
                    self._step += 1
                    yield batch
            finally:
                for future in waiting:
                    future.cancel()

    @property
    def _source(self) -> LogitStore | None:
        return self.store if self.kind == "threads" else None

    def _pool(self) -> Executor:
        if self.kind == "threads":
            return ThreadPoolExecutor(self.workers)
        # Not forked: a copy of a process that runs threads (torch, Arrow) may hold their locks for ever.
        return ProcessPoolExecutor(self.workers, get_context("forkserver"), initializer=_keep, initargs=(self.store,))


_of_this_process: list[Any] = []


def _keep(store: LogitStore) -> None:
    _of_this_process[:] = [store]


def _read(store: LogitStore | None, rows: NDArray[np.int64]) -> Batch:
    return pad((store or _of_this_process[0]).read(rows))
