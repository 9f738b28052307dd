"""A run under every curriculum at once, through the real engine, stopped in the middle and resumed."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.students import LLAMA, StopAfter, metrics, run_here


def train_config(store: Any, path: Path) -> dict[str, Any]:
    return {
        "run": {"path": str(path)},
        "data": {"store": store.storage.root},
        "student": {"config": {**LLAMA, "max_position_embeddings": 256}},
        "schedule": {"total_tokens": 3000, "tokens_per_step": 200, "lr": 0.01, "micro_batch_tokens": 150},
        "curriculum": {"min_difficulty": 8, "max_difficulty": 47, "boundary": "line", "cycles": 2, "cycle_tokens": 900,
                       "schedule_config": {"total_curriculum_tokens": 700, "difficulty_step": 8},
                       "pacing": {"max_volatility": 0.15, "window_steps": 2}},
        "row_curriculum": {"metric": "entropy", "min_difficulty": 40,
                           "schedule_config": {"total_curriculum_tokens": 1000, "difficulty_step": 10}},
        "evaluation": {"max_rows": 2},
    }  # fmt: skip


def test_a_paced_run_resumes_where_it_stopped(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_rank: None
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert run_here(train_config(store, tmp_path / "whole"))
    assert not run_here(train_config(store, tmp_path / "resumed"), StopAfter(7))
    assert run_here(train_config(store, tmp_path / "resumed"))
    whole = metrics(tmp_path / "whole")
    steps = [line for line in whole if "loss" in line]
    assert any(a["clock"] == b["clock"] for a, b in pairwise(steps))
    assert steps[-1]["clock"] > 0
    assert all(step["padding"] <= 0.05 for step in steps)
    assert metrics(tmp_path / "resumed") == whole
