"""A run under every curriculum at once, through the real engine, stopped in the middle and resumed."""

import json
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from logit_store.config import parse_config
from training.config import TrainConfig
from training.engine import Engine
from training.trainer import train

SIZES = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 256}  # fmt: skip


class Stopped(Exception):
    """What ends a run in the middle."""


def train_config(store: Any, path: Path) -> TrainConfig:
    raw = {
        "run": {"path": str(path)},
        "data": {"store": store.storage.root},
        "student": {"config": SIZES},
        "schedule": {"total_tokens": 3000, "tokens_per_step": 200, "lr": 0.01, "micro_batch_tokens": 150},
        "curriculum": {"min_difficulty": 8, "max_difficulty": 47, "boundary": "line", "cycles": 2, "cycle_tokens": 900,
                       "schedule_config": {"total_curriculum_tokens": 700, "difficulty_step": 8},
                       "pacing": {"max_volatility": 0.15, "window_steps": 2}},
        "row_curriculum": {"metric": "entropy", "min_difficulty": 40,
                           "schedule_config": {"total_curriculum_tokens": 1000, "difficulty_step": 10}},
        "evaluation": {"max_rows": 2},
        "checkpoint": {"every_tokens": 200},
    }  # fmt: skip
    return parse_config(TrainConfig, raw, "student.yaml")


def steps_of(path: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in ("seconds", "tokens_per_s", "wait")} for line in lines]


def run_and_stop_and_resume(store: Any, folder: Path) -> None:
    """In a process of its own, which keeps one process group: DeepSpeed makes no second one."""
    with mock.patch("torch.distributed.destroy_process_group"):
        train(train_config(store, folder / "whole"))
        engine_step, calls = Engine.step, 0

        def stopping_step(self: Engine, *arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 8:
                raise Stopped
            return engine_step(self, *arguments)

        with mock.patch.object(Engine, "step", stopping_step), pytest.raises(Stopped):
            train(train_config(store, folder / "resumed"))
        train(train_config(store, folder / "resumed"))


def test_a_paced_run_resumes_where_it_stopped(store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        pool.submit(run_and_stop_and_resume, store, tmp_path).result()
    whole = steps_of(tmp_path / "whole")
    steps = [line for line in whole if "loss" in line]
    assert any(a["clock"] == b["clock"] for a, b in pairwise(steps))
    assert steps[-1]["clock"] > 0
    assert all(step["padding"] <= 0.05 for step in steps)
    assert steps_of(tmp_path / "resumed") == whole
