"""A report compares what compares: which run is another's twin, what runs are called, which are left out."""

import math
from pathlib import Path
from typing import Any

import pytest

from logit_store.errors import StudentError
from tests.students import student_config
from training.config import TrainConfig
from training.report import Run, _load, draw_plots, is_twin, names, table_rows
from training.run_folder import RunFolder

HELD_OUT = {"loss": 4.0, "perplexity": 54.6, "calibration_error": 0.01, "agreement": 0.5}
IDENTITY = {"text_id": "a", "labels_id": "b", "deepspeed": {"optimizer": {"type": "AdamW"}}}


def make_run(name: str, held_out_loss: float = 4.0, identity: dict[str, Any] = IDENTITY, **sections: Any) -> Run:
    config = TrainConfig.model_validate(student_config(f"runs/{name}", "store", **sections)).model_dump(mode="json")
    result = {
        "parameters": 10,
        "tokens": 9,
        "tokens_per_s": 3.0,
        "seconds": 3.0,
        "held_out": {**HELD_OUT, "loss": held_out_loss},
    }
    lines = [
        {"step": i, "tokens_seen": 600 * i, "ce": 5.0 - i, "sequence_length": 8, "gradient_norm": norm}
        for i, norm in enumerate([9.0, 9.0, 1.0, 3.0, math.nan])
    ]
    return Run(name, Path("runs") / name, config | {"identity": identity}, result, lines)


ALPHA_GROWS = {"alpha": 0.0, "alpha_schedule": {"kind": "linear", "to": 1.0, "over_tokens": 1000}}


@pytest.mark.parametrize(
    ("changes", "is_one"),
    [
        ({}, True),
        ({"data": {"threads": 1}, "checkpoint": {"every_tokens": 100}, "watch": {"peak_tflops": 1.0}}, True),
        ({"loss": {"alpha": 0.0, "tail": "renormalise", "temperature": 2.0}}, True),
        ({"schedule": {"micro_batch_tokens": 60}, "evaluation": {"every_tokens": 100}}, True),
        ({"row_curriculum": {"min_difficulty": 20, "schedule_config": {"total_curriculum_tokens": 9}}}, False),
        ({"curriculum": None}, False),
        ({"student": {"save_dtype": "bfloat16"}}, False),
        ({"optimizer": {"weight_decay": 0.0}}, False),
        ({"run": {"seed": 1}}, False),
        ({"loss": {"alpha": 0.0, "z_loss": 1e-3}}, False),
        ({"loss": {"alpha": 0.5}}, False),
        ({"loss": ALPHA_GROWS}, False),
        ({"identity": {**IDENTITY, "deepspeed": {"optimizer": {"type": "Lion"}}}}, False),
        ({"identity": {**IDENTITY, "text_id": "c"}}, False),
    ],
)
def test_a_twin_differs_in_its_labels_alone(changes: dict[str, Any], is_one: bool) -> None:
    run, other = make_run("kd"), make_run("ce", **{"loss": {"alpha": 0.0}, **changes})
    assert is_twin(run, other) == is_one
    assert not is_twin(other, run)


def test_the_gain_is_over_the_twin() -> None:
    ce = make_run("ce", 4.5, loss={"alpha": 0.0})
    kd, grows, other = make_run("kd"), make_run("grows", 4.2, loss=ALPHA_GROWS), make_run("other", run={"seed": 1})
    rows = {row["model"]: row for row in table_rows([kd, grows, other, ce], None)}
    gains = {name: row["gain over CE twin"] for name, row in rows.items()}
    assert gains == {"kd": "+0.5000", "grows": "+0.3000", "other": "", "ce": ""}
    losses = {name: row["loss is"] for name, row in rows.items()}
    assert losses == {"kd": "0.7 KD, ghost", "grows": "0 to 1 KD, ghost", "other": "0.7 KD, ghost",
                      "ce": "cross-entropy"}  # fmt: skip
    assert rows["kd"]["gradient norm variance"] == "2"  # of 1 and 3: warm-up takes 600 tokens, NaN is none


def test_runs_have_the_shortest_names_that_tell_them_apart() -> None:
    assert names([Path("/runs/a/kd"), Path("/runs/a/ce")]) == ["kd", "ce"]
    assert names([Path("/runs/a/kd"), Path("/runs/b/kd"), Path("/runs/b/ce")]) == ["a/kd", "b/kd", "b/ce"]


def test_runs_of_one_size_have_lines_of_their_own() -> None:
    from unittest import mock

    from matplotlib.axes import Axes

    runs = [make_run(str(i)) for i in range(12)]
    with mock.patch.object(Axes, "plot", autospec=True, side_effect=Axes.plot) as plot:
        draw_plots(runs, None)
    lines = [call.kwargs["color"] for call in plot.call_args_list if call.kwargs.get("label") in {r.name for r in runs}]
    assert len(lines) == 2 * len(runs)
    assert len(set(lines)) == len(runs)


def test_what_is_not_finished_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("done", "going"):
        run = RunFolder(str(tmp_path / name))
        run.begin(TrainConfig.model_validate(student_config(run.path, "store")), IDENTITY)
    with pytest.raises(StudentError, match="going is not finished: run its `decant train` again"):
        _load([str(tmp_path / "going")])
    RunFolder(str(tmp_path / "done")).save_result(make_run("done").result)
    (found,) = _load([str(tmp_path / "done"), str(tmp_path / "going"), f"{tmp_path}/going/../done"])
    assert found.name == "done"
    assert "left out" in capsys.readouterr().err
    with pytest.raises(StudentError, match="nothing holds no run"):
        _load([str(tmp_path / "done"), str(tmp_path / "nothing")])
