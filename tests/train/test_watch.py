"""What a run says of itself: figures of steps, held-out figures, FLOPs, and where they go."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, get_args
from unittest import mock

import numpy as np
import pytest
import torch
from pydantic import BaseModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from logit_store import LogitStore
from logit_store.errors import ConfigError
from tests.store.made import make_row, write_store
from tests.toy import ROOT, write_yaml
from training.config import TrainConfig, WatchConfig
from training.generations import GenerationsConfig
from training.report import report
from training.run_folder import RunFolder
from training.watching.flops import model_flops, peak_flops
from training.watching.trackers import Spared, check_trackers, open_trackers

STUDENT = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[LogitStore]:
    folder, rng = tmp_path_factory.mktemp("watch"), np.random.default_rng(0)
    rows = [make_row(rng, int(rng.integers(2, 48)), 8) for _ in range(60)]
    return [write_store(str(folder / name), [part]) for name, part in (("a", rows[:40]), ("b", rows[40:]))]


def make_config(path: Path, stores: list[LogitStore], **sections: Any) -> dict[str, Any]:
    return {
        "run": {"path": str(path)},
        "data": {"mixture": [{"store": store.storage.url, "weight": 2 * i + 1} for i, store in enumerate(stores)]},
        "student": {"config": STUDENT},
        "loss": {"alpha": 0.7},
        "schedule": {"total_tokens": 1200, "tokens_per_step": 200, "micro_batch_tokens": 150, "lr": 0.01},
        "evaluation": {"every_tokens": 500},
        "watch": {"peak_tflops": 0.001},
        **sections,
    }  # fmt: skip


@pytest.fixture(scope="module")
def run(stores: list[LogitStore], tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run on a mixture."""
    folder = tmp_path_factory.mktemp("watched") / "runs"
    folder.mkdir()
    config = write_yaml(folder / "run.yaml", make_config(folder / "run", stores))
    environment = {**os.environ, "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-m", "training", "train", str(config)],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert any((folder / "run" / "tensorboard").iterdir())
    return RunFolder(str(folder / "run"))


@pytest.fixture(scope="module")
def lines(run: RunFolder) -> list[dict[str, Any]]:
    """Its metrics."""
    return run.metrics()


def test_a_step_says_what_it_did(lines: list[dict[str, Any]], stores: list[LogitStore]) -> None:
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["tokens_seen"] >= 1200
    positions = 0
    for line in steps:
        assert line["loss"] == pytest.approx(0.7 * line["kd"] + 0.3 * line["ce"], rel=1e-6)
        assert 0 <= line["wait"] <= 1
        assert line["temperature"] == 1.0
        assert line["tokens_per_s"] == pytest.approx((line["tokens_seen"] - positions) / line["seconds"], rel=1e-6)
        assert line["mfu"] > 0
        positions = line["tokens_seen"]
    kept = [1 - np.exp(store[row].targets.tail_logmass_P) for store in stores for row in range(len(store))]
    low, high = min(k.mean() for k in kept if len(k)), max(k.mean() for k in kept if len(k))
    assert all(low < line["kept_mass"] < high for line in steps)


def test_held_out_figures_come_at_intervals_and_by_length(lines: list[dict[str, Any]]) -> None:
    evaluations = [line for line in lines if "held_out" in line]
    assert [line["tokens_seen"] // 500 for line in evaluations] == [1, 2, 2]  # the last is the run's end
    for figures in (line["held_out"] for line in evaluations):
        by_length = figures["by_length"]
        assert sum(of_span["positions"] for of_span in by_length.values()) == figures["positions"]
        for name in ("loss", "kl", "agreement", "accuracy"):
            mean = sum(of_span[name] * of_span["positions"] for of_span in by_length.values()) / figures["positions"]
            assert figures[name] == pytest.approx(mean, rel=1e-9)
    assert all(line["held_out"]["kl"] > 0 for line in evaluations)


def test_every_key_of_a_line_is_documented(lines: list[dict[str, Any]]) -> None:
    documented = set(re.findall(r"^\| `(\w+)` \|", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE))
    keys = {key for line in lines for key in line}
    keys |= {key for line in lines for key in line.get("held_out", {})}
    assert keys <= documented, keys - documented


def keys_of(model: type[BaseModel]) -> set[str]:
    found = set(model.model_fields)
    for field in model.model_fields.values():
        for kind in (field.annotation, *get_args(field.annotation)):
            for inner in (kind, *get_args(kind)):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    found |= keys_of(inner)
    return found


@pytest.mark.parametrize("config", [TrainConfig, GenerationsConfig])
def test_every_key_of_a_config_is_documented(config: type[BaseModel]) -> None:
    words = set(re.findall(r"\w+", (ROOT / "docs" / "training.md").read_text()))
    assert len(keys_of(config)) > 5
    assert keys_of(config) <= words, keys_of(config) - words


def test_files_of_a_run_are_json_and_read_nan_again(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    figures = {"loss": 2.0, "kl": math.nan, "by_length": {"1": {"kl": math.inf}}}
    run.log({"step": 1, "held_out": figures})
    run.save_result({"held_out": figures, "warnings": ["one"]})
    for name in ("metrics.jsonl", "result.json"):
        json.loads((tmp_path / name).read_text(), parse_constant=pytest.fail)
    result = run.result()
    assert result is not None
    for held_out in (run.metrics()[0]["held_out"], result["held_out"]):
        assert held_out["loss"] == 2.0
        assert math.isnan(held_out["kl"])
        assert math.isnan(held_out["by_length"]["1"]["kl"])
    assert result["warnings"] == ["one"]


def test_an_evaluation_that_is_taken_again_is_there_once(tmp_path: Path) -> None:
    run = RunFolder(str(tmp_path))
    for line in ({"step": 1, "loss": 3.0}, {"step": 1, "held_out": {"loss": 3.0}}, {"step": 2, "loss": 2.0}):
        run.log(line)
    run.log({"step": 2, "held_out": {"loss": 2.5}})
    run.rewind(2)  # it died while it was saving
    run.log({"step": 2, "held_out": {"loss": 2.0}})
    assert [(line["step"], line["held_out"]["loss"]) for line in run.metrics() if "held_out" in line] == [
        (1, 3.0),
        (2, 2.0),
    ]
    assert [line["loss"] for line in run.metrics() if "loss" in line] == [3.0, 2.0]


def test_a_report_shows_every_store_and_figures_by_length(run: RunFolder, stores: list[LogitStore]) -> None:
    page = report([str(run.path)], None).read_text()
    assert all(f"<td>{store.storage.url}</td>" in page for store in stores)
    result = run.result()
    assert result is not None
    assert f"<td>{result['held_out']['kl']:.4f}</td>" in page
    for span, of_span in result["held_out"]["by_length"].items():
        assert f"<th>{span}</th>" in page
        assert f"<td>{of_span['kl']:.4f}</td>" in page
    assert (run.path.parent.parent / "report" / "kl.png").stat().st_size > 1000


SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "attn_implementation": "eager",
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "qwen2": {**SHAPE, "tie_word_embeddings": True},
    "mixtral": {**SHAPE, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {**SHAPE, "head_dim": 8, "num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    "gpt2": {"vocab_size": 96, "n_embd": 64, "n_layer": 3, "n_head": 4, "attn_implementation": "eager"},
}
"""Grouped queries, tied and not; experts; learned positions."""


@pytest.mark.parametrize("kind", MODELS)
def test_flops_are_those_that_torch_counts(kind: str) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **MODELS[kind]))
    if kind in ("mixtral", "qwen3_moe"):
        model.set_experts_implementation("eager")  # torch's counter does not know the product of groups
    lengths, counted = (17, 40), 0
    for length in lengths:
        with FlopCounterMode(display=False) as counter:
            hidden_1TD = model.get_decoder()(input_ids=torch.arange(length)[None], use_cache=False).last_hidden_state
            model.get_output_embeddings()(hidden_1TD[0, :5]).sum().backward()  # 5 positions carry loss
        counted += counter.get_total_flops()
    found = model_flops(model)
    assert found is not None
    # Norms have weights and no matrix products: the formula counts them, and rotary embeddings are counted by torch.
    assert found.of_step(lengths, 10) == pytest.approx(counted, rel=0.02)
    for parameter in model.get_decoder().parameters():
        parameter.requires_grad_(False)
    frozen = model_flops(model)
    assert frozen is not None
    assert frozen.per_position == pytest.approx(4 / 6 * found.per_position)


def test_a_model_without_heads_has_no_mfu() -> None:
    config = AutoConfig.for_model("mamba", vocab_size=96, hidden_size=32, num_hidden_layers=1)
    assert model_flops(AutoModelForCausalLM.from_config(config)) is None


def test_the_peak_is_what_was_given_or_what_is_known_of_the_gpu() -> None:
    assert peak_flops(3.5, torch.device("cpu")) == 3.5e12
    assert peak_flops(None, torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H200": 989e12,
             "NVIDIA A100-SXM4-80GB": 312e12, "A100-PCIE-40GB": 312e12, "NVIDIA A100 80GB PCIe": 312e12,
             "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "NVIDIA A10": 125e12,
             "NVIDIA GeForce RTX 4090": 165e12}  # fmt: skip
    others = ("NVIDIA A10G", "NVIDIA L40", "NVIDIA RTX A1000", "NVIDIA H100 NVL", "NVIDIA GB200", "Tesla T4",
              "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GeForce RTX 4090 Laptop GPU")  # fmt: skip
    for name, peak in (names | dict.fromkeys(others)).items():
        with mock.patch("torch.cuda.get_device_name", return_value=name):
            assert peak_flops(None, torch.device("cuda")) == peak, name


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_what_is_not_installed_is_said_before_a_run(package: str) -> None:
    section = {"wandb": {"project": "p"}, "mlflow": {"experiment": "e"}}[package]
    watch = WatchConfig.model_validate({package: section})
    with (
        mock.patch("importlib.util.find_spec", return_value=None),
        pytest.raises(ConfigError, match=rf"watch.{package} is set and .* pip install 'decant\[{package}\]'"),
    ):
        check_trackers(watch)
    check_trackers(WatchConfig())


def tracked(tmp_path: Path, watch: dict[str, Any]) -> list[Any]:
    """Trackers of a run that stopped after two steps and goes on: what both of its lives logged to."""
    raw = make_config(tmp_path / "run", [], data={"store": "x"}, watch=watch)
    config, run = TrainConfig.model_validate(raw), RunFolder(str(tmp_path / "run"))
    (tmp_path / "run").mkdir()
    found = []
    for steps in ((1, 2), (2, 3)):
        trackers = open_trackers(config, run, steps[0] - 1)
        for step in steps:
            for tracker in trackers:
                tracker.log({"train/loss": 3.0 - step, "held_out/17-32/kl": 0.5}, step)
        for tracker in trackers:
            tracker.close(failed=False)
        found.append(trackers[-1].tracker)  # type: ignore[attr-defined]
    return found


def test_mlflow_has_one_run_of_a_run_that_was_resumed(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    first, second = tracked(tmp_path, {"mlflow": {"experiment": "students", "tracking_uri": uri}})
    assert first.id == second.id
    client = MlflowClient(uri)
    history = client.get_metric_history(first.id, "train/loss")
    assert {(metric.step, metric.value) for metric in history} == {(1, 2.0), (2, 1.0), (3, 0.0)}
    assert client.get_metric_history(first.id, "held_out/17-32/kl")
    run = client.get_run(first.id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "run"
    assert "total_tokens: 1200" in run.data.tags["config"]
    assert not Path("mlruns").exists()  # nothing is left in the current folder
    second.close(failed=True)
    assert client.get_run(first.id).info.status == "FAILED"


def test_wandb_writes_offline_and_a_resumed_run_keeps_its_id(tmp_path: Path) -> None:
    first, second = tracked(tmp_path, {"wandb": {"project": "students", "mode": "offline"}})
    assert first.run.id == second.run.id == json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    assert list((tmp_path / "run").rglob(f"run-{first.run.id}.wandb"))


@pytest.mark.parametrize("package", ["wandb", "mlflow"])
def test_an_outage_of_a_tracker_is_a_warning(package: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mlflow.exceptions import MlflowException

    sections: dict[str, Any] = {
        "wandb": {"project": "students", "mode": "offline"},
        "mlflow": {"experiment": "students", "tracking_uri": f"sqlite:///{tmp_path}/mlflow.db"},
    }
    raw = make_config(tmp_path / "run", [], data={"store": "x"}, watch={package: sections[package]})
    (tmp_path / "run").mkdir()
    tracker = open_trackers(TrainConfig.model_validate(raw), RunFolder(str(tmp_path / "run")), 0)[-1]
    assert isinstance(tracker, Spared)
    outages = {"wandb": BrokenPipeError("no answer"), "mlflow": MlflowException("no answer")}
    calls = mock.Mock(side_effect=outages[package])
    with mock.patch.object(tracker.tracker, "log", calls):
        for step in (1, 2):
            tracker.log({"train/loss": 1.0}, step)
        assert calls.call_count == 1, "it is left alone for a while"
        tracker._again_s = 0.0
        tracker.log({"train/loss": 1.0}, 3)
        assert calls.call_count == 2
    with mock.patch.object(tracker.tracker, "close", calls):
        tracker.close(failed=False)
    warning = capsys.readouterr().err
    assert warning.count(f"warning: watch.{package}: no answer. The run goes on without it") == 1
    tracker.tracker.close(failed=True)


@pytest.mark.parametrize("failed", [False, True])
def test_trackers_are_told_how_a_run_ended(failed: bool, tmp_path: Path) -> None:
    from training.curriculum.batches import Cursor
    from training.watching.watcher import Watcher

    tracker, engine = mock.Mock(), mock.Mock(device=torch.device("cpu"), world_size=1)
    config = TrainConfig.model_validate(make_config(tmp_path / "run", [], data={"store": "x"}))
    watcher = Watcher(RunFolder(str(tmp_path / "run")), config, Cursor(), 0, None, engine)
    made = watcher.time
    opened = mock.patch("training.watching.watcher.open_trackers", return_value=[tracker])
    with opened, suppress(ZeroDivisionError), watcher:
        assert watcher.time > made, "the first step begins when the trackers are open"
        1 / (not failed)
    tracker.close.assert_called_once_with(failed=failed)


def test_wandb_marks_a_run_that_failed() -> None:
    from training.watching.trackers import Wandb

    tracker = object.__new__(Wandb)
    tracker.run = mock.Mock()
    for failed, code in ((True, 1), (False, 0)):
        tracker.close(failed)
        tracker.run.finish.assert_called_with(exit_code=code)
