"""A run that is stopped anywhere goes on as if it had not been."""

import json
from pathlib import Path
from typing import Any

import pytest

from logit_store.errors import StudentError
from tests.students import (
    assert_same_when_stopped_after_every_step,
    held_out_is_damaged,
    metrics,
    run_here,
    student_config,
)


def test_stopped_after_every_step_is_the_same_run(store: Any, one_rank: None, tmp_path: Path) -> None:
    assert_same_when_stopped_after_every_step(student_config(tmp_path, store.storage.root), tmp_path)


def message_of(config: dict[str, Any]) -> str:
    """What a run that fails says. Its error is let go of, and the lock of its directory with it."""
    try:
        run_here(config)
    except StudentError as error:
        return str(error)
    raise AssertionError("it did not fail")


@pytest.mark.parametrize("every_tokens", [None, 500], ids=["at the end", "on the way"])
def test_held_out_rows_that_cannot_be_read_cost_no_step(
    store: Any, one_rank: None, tmp_path: Path, every_tokens: int | None
) -> None:
    sections = {"evaluation": {"every_tokens": every_tokens}, "schedule": {"total_tokens": 1000}}
    config = student_config(tmp_path, store.storage.root, **sections)
    with held_out_is_damaged():
        message = message_of(config)
    cursor = json.loads((tmp_path / "checkpoint.json").read_text())["cursor"]
    assert message.startswith(f"the checksum of block 7. The run is saved at step {cursor['step']}: mend that")
    assert (cursor["tokens_seen"] >= 1000) == (every_tokens is None)
    assert run_here(config)
    steps = [line["step"] for line in metrics(tmp_path) if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_a_model_that_cannot_be_written_costs_no_step(
    store: Any, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_arguments: Any) -> None:
        raise StudentError("model cannot be written")

    config = student_config(tmp_path, store.storage.root, schedule={"total_tokens": 600})
    with monkeypatch.context() as patch:
        patch.setattr("training.trainer.save_student", full)
        assert message_of(config) == "model cannot be written"
    assert json.loads((tmp_path / "checkpoint.json").read_text())["cursor"]["tokens_seen"] >= 600
    monkeypatch.setattr("training.engine.Engine.step", None)  # no step is taken again
    assert run_here(config)
