"""The directory of a run: its resolved config, metrics, the pointer to its checkpoint, its result."""

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from logit_store.config import dump_config
from logit_store.errors import IdentityError, StudentError
from logit_store.identity import require_equal
from training.config import DataConfig, TrainConfig

CONFIG, METRICS, POINTER, RESULT = "config.yaml", "metrics.jsonl", "checkpoint.json", "result.json"
TRACKERS = "trackers.json"
LOCK = ".lock"

MEMORY = ("schedule.micro_batch_tokens", "loss.chunk_positions", "student.gradient_checkpointing")
"""Keys that trade memory for time and change a loss by rounding alone: what died of memory goes on with others."""

TORCH_SAVE_ERRORS = ("PytorchStreamWriter", "inline_container", "iostream error")
"""By these words the RuntimeErrors of torch.save on a full disk are told from others."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what libraries raise when a file cannot be written into one StudentError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(words in str(error) for words in TORCH_SAVE_ERRORS):
            raise
        reason = " ".join(str(error).split())
        raise StudentError(
            f"{path} cannot be written: {reason}. What was saved before stays; free some space or choose another "
            "run.path, and run the same command again"
        ) from error


class RunFolder:
    """Files of one run. Small files are replaced atomically; only rank 0 writes."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.model = self.path / "model"
        self.adapter = self.path / "adapter"
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"

    def check(self, config: TrainConfig, identity: dict[str, Any]) -> None:
        """Refuse a directory that holds another run or something else. Writes nothing. Raises IdentityError."""
        if not (self.path / CONFIG).exists():
            # Hidden files are our own lock and temporary files, of a run that died before it had a config.
            if self.path.exists() and any(not path.name.startswith(".") for path in self.path.iterdir()):
                raise IdentityError(f"{self.path} is not empty and holds no run: choose another run.path")
            return
        saved = yaml.safe_load((self.path / CONFIG).read_text())
        remedy = "Choose another run.path, or delete that directory if it is not wanted"
        # Until it is finished, nothing that a run has kept depends on how it is evaluated at the end.
        free = (*MEMORY, "evaluation.every_tokens", *(() if self.result() else ("evaluation.max_rows",)))
        found, wanted = decisive(saved, free), decisive(_document(config, identity), free)
        require_equal(found, wanted, str(self.path), remedy)

    def begin(self, config: TrainConfig, identity: dict[str, Any]) -> None:
        """Lock the directory and save the resolved config.

        Raises StudentError: it cannot be written, or another process trains there.
        """
        with writing(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / LOCK, "w")  # noqa: SIM115  held until this process ends
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StudentError(f"another process trains in {self.path}: wait for it, or end it") from None
        self._replace(CONFIG, yaml.safe_dump(_document(config, identity), sort_keys=False))

    def result(self) -> dict[str, Any] | None:
        """The figures of a finished run; None while it is not."""
        return _nans(self._read(RESULT)) if (self.path / RESULT).exists() else None

    def save_result(self, result: dict[str, Any]) -> None:
        """Mark the run finished, and drop its checkpoints: the model is saved."""
        self._replace(RESULT, json.dumps(_nulls(result), indent=1, allow_nan=False))
        (self.path / POINTER).unlink(missing_ok=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def checkpoint(self) -> dict[str, Any] | None:
        """Tag and cursor of the newest complete checkpoint."""
        return self._read(POINTER)

    def is_saved(self) -> bool:
        """Whether the newest checkpoint holds every step that was taken: true of none."""
        pointer = self.checkpoint()
        saved = pointer["cursor"]["step"] if pointer else 0
        return bool(saved == max(map(_step_of, self._lines()), default=0))

    def point_to(self, tag: str, cursor: dict[str, int], ranks: int) -> None:
        """Make ``tag`` the checkpoint to resume from, then remove older ones."""
        self._replace(POINTER, json.dumps({"tag": tag, "cursor": cursor, "ranks": ranks}))
        for folder in self.checkpoints.iterdir():
            if folder.is_dir() and folder.name != tag:
                shutil.rmtree(folder)

    def log(self, line: dict[str, Any]) -> None:
        """Append a line of metrics. Raises StudentError when the disk is full.

        Held-out figures of a step that has some, of a run that died before it was finished, take their place.
        """
        if "held_out" in line and (had := self._lines()) and _is_evaluation(had[-1], line["step"]):
            self._replace(METRICS, "".join(kept + "\n" for kept in had[:-1]))
        with writing(self.path / METRICS), open(self.path / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(_nulls(line), allow_nan=False) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """All lines of metrics."""
        return [_nans(json.loads(line)) for line in self._lines()]

    def rewind(self, step: int) -> None:
        """Drop metrics of steps after ``step``: a resumed run takes them again."""
        kept = [line for line in self._lines() if _step_of(line) <= step]
        self._replace(METRICS, "".join(line + "\n" for line in kept))

    def tracker_id(self, tracker: str, new: Callable[[], str]) -> str:
        """The id under which a tracker knows this run: from ``new`` once, and the same for every resumed run."""
        ids = self._read(TRACKERS) or {}
        if tracker not in ids:
            ids[tracker] = new()
            self._replace(TRACKERS, json.dumps(ids))
        return str(ids[tracker])

    def _lines(self) -> list[str]:
        path = self.path / METRICS
        return path.read_text().splitlines() if path.exists() else []

    def _read(self, name: str) -> dict[str, Any] | None:
        path = self.path / name
        return json.loads(path.read_text()) if path.exists() else None

    def _replace(self, name: str, text: str) -> None:
        temporary = self.path / f".{name}.tmp"
        with writing(self.path / name), open(temporary, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.path / name)


def _document(config: TrainConfig, identity: dict[str, Any]) -> dict[str, Any]:
    return {**yaml.safe_load(dump_config(config)), "identity": identity}


def decisive(document: dict[str, Any], free: Sequence[str]) -> dict[str, Any]:
    """The parts that decide the run's numbers, flat; where it lives, how it is launched and what is ``free`` do not."""
    flat: dict[str, Any] = {}
    for section, value in document.items():
        if section not in ("launcher", "checkpoint", "deepspeed", "watch"):  # the JSON's content is in the identity
            flat |= {f"{section}.{k}": v for k, v in value.items()} if isinstance(value, dict) else {section: value}
    for place in ("run.path", *(f"data.{key}" for key in DataConfig.model_fields), *free):  # stores are in it as well
        flat.pop(place, None)
    return flat


def _nulls(value: Any) -> Any:
    """``value`` with null for numbers that are not finite, which JSON has not."""
    if isinstance(value, dict):
        return {key: _nulls(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _nans(value: Any) -> Any:
    """What ``_nulls`` has written, with NaN for null."""
    if isinstance(value, dict):
        return {key: _nans(inner) for key, inner in value.items()}
    return math.nan if value is None else value


def _is_evaluation(line: str, step: int) -> bool:
    return _step_of(line) == step and "held_out" in json.loads(line)


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:  # the line that a kill cut in two
        return float("inf")
