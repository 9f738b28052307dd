"""Small runs of the trainer for tests: one process, real engines, stopped and resumed wherever a test likes."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from logit_store.config import parse_config
from logit_store.errors import CorruptError
from training.config import TrainConfig
from training.run_folder import RunFolder
from training.stop import StopRequest

LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


CLOCK = ("seconds", "tokens_per_s", "wait")


def student_config(folder: str | Path, store: str, **sections: Any) -> dict[str, Any]:
    """A run of 20 steps under a curriculum, as a dictionary; ``sections`` are merged into it or set."""
    config: dict[str, Any] = {
        "run": {"path": str(folder)},
        "data": {"store": store},
        "student": {"config": LLAMA},
        "loss": {"alpha": 0.7, "tail": "ghost"},
        "schedule": {"total_tokens": 3800, "tokens_per_step": 200, "lr": 0.01, "warmup_tokens": 600,
                     "micro_batch_tokens": 120},
        "curriculum": {"min_difficulty": 16, "max_difficulty": 48,
                       "schedule_config": {"total_curriculum_tokens": 2000, "difficulty_step": 8}},
        "evaluation": {"max_rows": 2},
    }  # fmt: skip
    for name, changes in sections.items():
        config[name] = {**config.get(name, {}), **changes} if isinstance(changes, dict) else changes
    return config


class StopAfter(StopRequest):
    """Asks to stop after so many steps, as a SIGTERM does that arrives during the last of them."""

    def __init__(self, steps: int) -> None:
        self._asked = iter([False] * steps)

    @property
    def asked(self) -> bool:
        return next(self._asked, True)


def run_here(config: dict[str, Any], stop: StopRequest | None = None) -> bool:
    """Run this process's rank with an engine of its own; whether the run is finished."""
    from training.trainer import train

    return train(parse_config(TrainConfig, config, "test"), stop or StopRequest()) is None


@contextmanager
def held_out_is_damaged() -> Iterator[None]:
    """Within the block, held-out rows cannot be read by this process."""
    from training.data.source import Source, SourceRow

    read = Source.__getitem__

    def damaged(source: Source, row: int) -> SourceRow:
        found = read(source, row)
        if found.tokens.split == "held_out":
            raise CorruptError("the checksum of block 7")
        return found

    with mock.patch.object(Source, "__getitem__", damaged):
        yield


def metrics(folder: str | Path) -> list[dict[str, Any]]:
    """Lines of steps and evaluations, without what depends on the clock."""
    lines = RunFolder(str(folder)).metrics()
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]


def weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """The finished model's."""
    from safetensors.torch import load_file

    return dict(load_file(Path(folder) / "model" / "model.safetensors"))


def assert_same_when_stopped_after_every_step(config: dict[str, Any], folder: Path) -> None:
    """The run in one go, and stopped after each of its steps: the same losses and weights, to the bit."""
    whole, pieces = (dict(config, run={**config["run"], "path": str(folder / name)}) for name in ("whole", "pieces"))
    run_here(whole)
    times = sum(1 for _ in _pieces(pieces))
    expected = metrics(folder / "whole")
    assert times == sum("loss" in line for line in expected), "it was stopped after every step"
    assert metrics(folder / "pieces") == expected
    for name, tensor in weights(folder / "whole").items():
        assert torch.equal(tensor, weights(folder / "pieces")[name]), name


def _pieces(config: dict[str, Any]) -> Iterator[None]:
    finished = False
    while not finished:
        finished = run_here(config, StopAfter(1))
        yield


def assert_same_run(folder: Path, quiet: Path, tolerance: float) -> None:
    """Two runs took the same steps, with figures and final weights within a relative ``tolerance``."""
    ours, theirs = metrics(folder), metrics(quiet)
    for a, b in zip(ours, theirs, strict=True):
        assert {k: a[k] for k in ("step", "tokens_seen")} == {k: b[k] for k in ("step", "tokens_seen")}
        for key in ("loss", "kd", "ce", "gradient_norm"):
            assert a.get(key) == (pytest.approx(b[key], rel=tolerance) if key in b else None), (key, a["step"])
    for name, tensor in weights(quiet).items():
        assert float((weights(folder)[name] - tensor).norm() / tensor.norm()) <= tolerance


def on_two_ranks(function: Callable[[int], None]) -> None:
    """Run ``function(rank)`` in two processes that form a gloo group; it must be importable, or a partial of such."""
    from torch.multiprocessing.spawn import spawn

    from training.engine import free_port

    spawn(_as_rank, (free_port(), function), nprocs=2)


def _as_rank(rank: int, port: int, function: Callable[[int], None]) -> None:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update({**ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})
    torch.set_num_threads(1)
    from training.engine import process_group

    with process_group():
        function(rank)
