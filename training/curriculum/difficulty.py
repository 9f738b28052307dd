"""How difficult each row is for the teacher, from its labels: found out once per store, kept in the user's cache."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from logit_store import LogitRow, LogitStore
from logit_store.errors import ConfigError
from logit_store.identity import digest, digest_json
from logit_store.tools.positions import entropies
from logit_store.tools.progress import progress_bar

Metric = Literal["loss", "entropy"]


def easiest_percent(difficulty_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """How many percent of the rows are as easy as each row, above 0 to 100. Of equals the first is the easier; a row
    without a difficulty (NaN) is the hardest.
    """
    rank_N = np.empty(len(difficulty_N), np.int64)
    rank_N[np.argsort(difficulty_N, kind="stable")] = np.arange(1, len(difficulty_N) + 1)
    return rank_N * 100.0 / max(len(difficulty_N), 1)


def row_difficulties(store: LogitStore, rows_N: NDArray[np.int64], metric: Metric) -> NDArray[np.float64]:
    """Difficulty of each of these rows, in nats (see ``row_difficulty``).

    The first process of a machine that asks reads every label of the rows, in order; others wait, and read its file
    below `$XDG_CACHE_HOME/decant/difficulty`. Raises ConfigError where that folder cannot be written.
    """
    key = {name: store.manifest.get(name) for name in ("labels_id", "codec", "forced_ids")}
    key |= {"metric": metric, "rows": digest(rows_N.astype("<i8").tobytes())}
    path = _folder() / f"{digest_json(key)}.npy"
    with _lock(path):
        if not path.exists():
            _keep(path, _measured(store, rows_N, metric))
    difficulty_N: NDArray[np.float64] = np.load(path)
    return difficulty_N


def row_difficulty(row: LogitRow, metric: Metric, forced_ids: list[int]) -> float:
    """Mean over the row's loss-carrying positions, in nats; NaN where there are none.

    ``loss``: −log p of the next token, which is the teacher's own loss, exact. ``entropy``: −Σ p log p of what the
    store keeps, the tail as one outcome: at most the teacher's own.
    """
    tokens, targets = row
    carries_P = tokens.carries_loss_P
    if not carries_P.any():
        return float("nan")
    if metric == "loss":
        return float(-targets.next_logprob_P[carries_P].mean(dtype=np.float64))
    return float(entropies(targets, tokens.input_ids_T[1:], forced_ids)[carries_P].mean())


def _measured(store: LogitStore, rows_N: NDArray[np.int64], metric: Metric) -> NDArray[np.float64]:
    difficulty_N = np.empty(len(rows_N))
    with progress_bar(f"teacher's {metric}", len(rows_N), "rows") as advance:
        for i, row in enumerate(rows_N.tolist()):
            difficulty_N[i] = row_difficulty(store[row], metric, store.manifest["forced_ids"])
            advance(1)
    return difficulty_N


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "decant" / "difficulty"


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time, while the file is made."""
    with _writable():
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_suffix(".lock"), "w")  # noqa: SIM115  closed below
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _keep(path: Path, values: NDArray[np.float64]) -> None:
    temporary = path.with_suffix(".tmp")
    with _writable():
        with open(temporary, "wb") as file:
            np.save(file, values)
        temporary.replace(path)


@contextmanager
def _writable() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"row_curriculum keeps what it reads off the labels in {_folder()}, which cannot be written ({error}): "
            "set XDG_CACHE_HOME to a folder that can"
        ) from error
