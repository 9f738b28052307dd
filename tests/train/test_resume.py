"""A run that is stopped anywhere goes on as if it had not been."""

import json
from pathlib import Path
from typing import Any

import pytest

from logit_store.errors import IdentityError, StudentError
from tests.students import (
    StopAfter,
    assert_same_when_stopped_after_every_step,
    held_out_is_damaged,
    metrics,
    run_here,
    student_config,
)


def test_stopped_after_every_step_is_the_same_run(store: Any, one_rank: None, tmp_path: Path) -> None:
    assert_same_when_stopped_after_every_step(student_config(tmp_path, store.storage.root), tmp_path)


@pytest.mark.parametrize("stage", [2, 3])
def test_low_precision_goes_on_from_its_float32_state(store: Any, one_rank: None, tmp_path: Path, stage: int) -> None:
    """Of bf16 weights alone the run would be another: what optimizer and scaling keep beside them is saved as well."""
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": stage}, "bf16": {"enabled": True}}))
    sections = {"deepspeed": str(tmp_path / "ds.json"), "schedule": {"total_tokens": 600}}
    assert_same_when_stopped_after_every_step(student_config(tmp_path, store.storage.root, **sections), tmp_path)


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


def test_a_run_goes_on_with_less_memory_and_is_the_same(store: Any, one_rank: None, tmp_path: Path) -> None:
    names = ("run", "quiet")
    first, quiet = (
        student_config(tmp_path / name, store.storage.root, schedule={"total_tokens": 1200}) for name in names
    )
    assert not run_here(first, StopAfter(2))
    changes = {"loss": {"chunk_positions": 16}, "schedule": {"micro_batch_tokens": 60, "total_tokens": 1200},
               "student": {"gradient_checkpointing": True}, "evaluation": {"every_tokens": 10**6}}  # fmt: skip
    less = student_config(tmp_path / "run", store.storage.root, **changes)
    assert run_here(less)
    assert run_here(quiet)
    ours, theirs = ([line["loss"] for line in metrics(tmp_path / name) if "loss" in line] for name in names)
    assert ours == pytest.approx(theirs, rel=1e-5)
    with pytest.raises(IdentityError, match=r"loss.alpha is 0.7 there and 0.5 here\. Choose"):
        run_here({**less, "loss": {**less["loss"], "alpha": 0.5}})
    with pytest.raises(IdentityError, match=r"evaluation.max_rows is 2 there and 1 here\. Choose"):
        run_here({**less, "evaluation": {"max_rows": 1}})  # its figures are of two rows


def test_how_a_run_is_evaluated_may_change_until_it_is_finished(store: Any, one_rank: None, tmp_path: Path) -> None:
    config = student_config(tmp_path, store.storage.root, schedule={"total_tokens": 600})
    assert not run_here(config, StopAfter(1))
    assert run_here({**config, "evaluation": {"max_rows": 1}})
