"""What a run says of itself: figures of steps, held-out figures, FLOPs, and where they go."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from logit_store import LogitStore
from logit_store.errors import ConfigError
from tests.store.made import make_row, write_store
from tests.toy import ROOT, write_yaml
from training.config import TrainConfig, WatchConfig
from training.report import report
from training.run_folder import RunFolder
from training.watching.flops import PEAK_TFLOPS, model_flops, peak_flops
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


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                    num_key_value_heads=2, tie_word_embeddings=tied, attn_implementation="eager")
    )  # fmt: skip
    lengths, counted = (17, 40), 0
    for length in lengths:
        with FlopCounterMode(display=False) as counter:
            model(input_ids=torch.arange(length)[None], use_cache=False).logits.sum().backward()
        counted += counter.get_total_flops()
    # Norms have weights and no matrix products: the formula counts them, and rotary embeddings are counted by torch.
    assert model_flops(model).of_step(lengths) == pytest.approx(counted, rel=0.01)
    for parameter in model.model.layers.parameters():
        parameter.requires_grad_(False)
    frozen = sum(p.numel() for p in model.model.layers.parameters())
    all_trained = LlamaForCausalLM(model.config)
    assert model_flops(all_trained).per_position - model_flops(model).per_position == 2 * frozen


def test_the_peak_is_what_was_given_or_what_is_known_of_the_gpu() -> None:
    assert peak_flops(3.5, torch.device("cpu")) == 3.5e12
    assert peak_flops(None, torch.device("cpu")) is None
    names = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12,
             "NVIDIA A10G": 125e12, "NVIDIA L40S": 362e12, "NVIDIA L4": 121e12, "Tesla T4": None}  # fmt: skip
    for name, peak in names.items():
        with mock.patch("torch.cuda.get_device_name", return_value=name):
            assert peak_flops(None, torch.device("cuda")) == peak, name
    assert len(PEAK_TFLOPS) > 5


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
            tracker.close()
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
        tracker.close()
    warning = capsys.readouterr().err
    assert warning.count(f"warning: watch.{package}: no answer. The run goes on without it") == 1
    tracker.tracker.close()
