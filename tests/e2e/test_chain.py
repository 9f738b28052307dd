"""The whole chain with real Ray actors and the real launcher, killed in the middle and resumed."""

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from logit_store import TokenStore
from tests.students import LLAMA, metrics, run_here, weights
from tests.toy import DECANT, ROOT, run_decant, write_yaml


class Started:
    """`decant …` in a process group of its own, so that all of it can be killed; what it prints goes to a file."""

    def __init__(self, log: Path, *arguments: str) -> None:
        self.log = log
        self.temporary = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # a killed driver cannot remove its own
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [DECANT, *arguments],
                cwd=ROOT,
                start_new_session=True,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, "RAY_TMPDIR": self.temporary},
            )

    def wait_until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for the condition while the process lives."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.01)

    def kill(self) -> None:
        """SIGKILL to the whole group, if anything of it is left."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        """The exit code, when it has ended."""
        code = self.process.wait(timeout=300)
        shutil.rmtree(self.temporary, ignore_errors=True)
        return code


# Cache


def test_the_same_cache_command_again_finds_nothing_to_do(store: Any, shared: Path) -> None:
    folder = Path(store.storage.root)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    done = run_decant("cache", str(shared / "cache.yaml"))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    assert "tok/s" not in done.stderr
    assert "ray job submit --working-dir . -- python -m cluster cache" in done.stdout


def test_inspect_says_what_is_in_it(store: Any) -> None:
    shown = json.loads(run_decant("inspect", store.storage.root, "--json").stdout)
    rows = [store[i] for i in range(len(store))]
    assert shown["rows"] == len(rows)
    assert shown["positions"] == sum(len(row.targets.next_logprob_P) for row in rows)
    files = [path for path in Path(store.storage.root).rglob("*.arrow") if path.parent.name == "shards"]
    assert shown["bytes"] == sum(path.stat().st_size for path in files)
    assert shown["bytes_per_position"] == pytest.approx(shown["bytes"] / shown["positions"])
    kept = [1 - np.exp(row.targets.tail_logmass_P.astype(np.float64)) for row in rows]
    assert shown["kept_mass"] == pytest.approx(np.concatenate(kept).mean())
    assert (shown["k"], shown["vocabulary_size"], shown["tail"]) == (16, 400, "exact")
    assert len(shown["labels_id"]) == len(shown["text_id"]) == 64
    assert "labels_id" in run_decant("inspect", store.storage.root).stdout


# Students


@pytest.fixture(scope="module")
def student_config(store: Any, shared: Path) -> dict[str, Any]:
    return {
        "run": {"path": str(shared / "runs" / "kd")},
        "data": {"store": store.storage.root},
        "student": {"config": LLAMA},
        "loss": {"alpha": 0.7, "tail": "ghost"},
        "schedule": {"total_tokens": 6000, "tokens_per_step": 300, "lr": 0.01, "warmup_tokens": 600,
                     "micro_batch_tokens": 400},
        "curriculum": {"min_difficulty": 16, "max_difficulty": 48,
                       "schedule_config": {"total_curriculum_tokens": 3000, "difficulty_step": 8}},
        "evaluation": {"every_tokens": 3000},
        "checkpoint": {"every_tokens": 1500},
        "deepspeed": str(ROOT / "configs/deepspeed/zero1.json"),
    }  # fmt: skip


@pytest.fixture(scope="module")
def quiet_run(student_config: dict[str, Any], shared: Path) -> Path:
    """An undisturbed run on one rank."""
    path = write_yaml(shared / "student.yaml", student_config)
    run_decant("train", str(path))
    return Path(student_config["run"]["path"])


def test_a_run_learns_and_leaves_a_hugging_face_model(quiet_run: Path, store: Any) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    steps = [line for line in metrics(quiet_run) if "loss" in line]
    evaluations = [line["held_out"] for line in metrics(quiet_run) if "held_out" in line]
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert evaluations[-1]["loss"] < np.log(400)
    assert [step["sequence_length"] for step in steps] == sorted(step["sequence_length"] for step in steps)
    assert {steps[0]["sequence_length"], steps[-1]["sequence_length"]} == {16, 48}
    assert any((quiet_run / "tensorboard").iterdir())
    assert not (quiet_run / "checkpoints").exists()  # a finished run keeps its model
    model = AutoModelForCausalLM.from_pretrained(quiet_run / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(quiet_run / "model")
    assert tokenizer.get_vocab() == AutoTokenizer.from_pretrained(Path(store.storage.root) / "tokenizer").get_vocab()
    losses, count = 0.0, 0
    for row in store.rows("held_out"):
        ids = torch.from_numpy(store[int(row)].tokens.input_ids_T.astype(np.int64))[None]
        if ids.shape[1] > 1:
            with torch.no_grad():
                losses += float(model(input_ids=ids, labels=ids).loss) * (ids.shape[1] - 1)
            count += ids.shape[1] - 1
    assert evaluations[-1]["loss"] == pytest.approx(losses / count, rel=1e-5)
    assert evaluations[-1]["positions"] == count


def test_killed_in_the_middle_and_resumed_is_the_same_run(
    quiet_run: Path, student_config: dict[str, Any], shared: Path
) -> None:
    folder = shared / "runs" / "kd-killed"
    arguments = ("train", str(shared / "student.yaml"), f"run.path={folder}")

    def steps() -> int:
        return len(metrics_or_none(folder))

    trainer = Started(shared / "trainer.log", *arguments)
    trainer.wait_until(lambda: (folder / "checkpoint.json").exists() and steps() >= 8)
    trainer.kill()
    assert not (folder / "result.json").exists()
    pointer = json.loads((folder / "checkpoint.json").read_text())
    assert 0 < pointer["cursor"]["tokens_seen"] < 6000
    run_decant(*arguments)
    assert metrics(folder) == metrics(quiet_run)
    for name, tensor in weights(quiet_run).items():
        assert torch.equal(tensor, weights(folder)[name])
    done = run_decant(*arguments)
    assert "is finished: held-out loss" in done.stdout


def test_two_ranks_share_a_directory_with_nobody_and_stop_when_asked(quiet_run: Path, shared: Path) -> None:
    from logit_store.errors import StudentError
    from training.run_folder import RunFolder

    folder = shared / "runs" / "kd-locked"
    endless = ("schedule.total_tokens=10000000", "launcher.ranks=2", "checkpoint.every_tokens=null")
    trainer = Started(shared / "first.log", "train", str(shared / "student.yaml"), f"run.path={folder}", *endless)
    try:
        trainer.wait_until(lambda: len(metrics_or_none(folder)) > 3)
        run = RunFolder(str(folder))
        with pytest.raises(StudentError, match="another process trains in"):
            run.begin(None, {})  # type: ignore[arg-type]
        os.kill(trainer.process.pid, signal.SIGTERM)  # as a container's runtime does: to the first process alone
        assert trainer.wait() == 0, trainer.log.read_text()
    finally:
        trainer.kill()
    pointer = json.loads((folder / "checkpoint.json").read_text())
    assert (pointer["ranks"], pointer["cursor"]["step"]) == (2, metrics(folder)[-1]["step"])
    said = f"decant train: stopped at step {pointer['cursor']['step']} ("
    assert [line for line in trainer.log.read_text().splitlines() if line.startswith("decant ")][0].startswith(said)


def metrics_or_none(folder: Path) -> list[str]:
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def cross_entropy(config: dict[str, Any], folder: Path) -> dict[str, Any]:
    return config | {"run": {"path": str(folder)}, "loss": config["loss"] | {"alpha": 0.0}}


def test_a_token_store_trains_a_teacher_on_the_same_batches(
    tokens: TokenStore, quiet_run: Path, student_config: dict[str, Any], shared: Path, one_rank: None
) -> None:
    folder = shared / "runs" / "kd-ce"
    assert run_here(cross_entropy(student_config, folder) | {"data": {"store": tokens.storage.root}})
    ours, theirs = metrics(folder), metrics(quiet_run)
    assert [line["tokens_seen"] for line in ours] == [line["tokens_seen"] for line in theirs]
    assert ours[0]["ce"] == ours[0]["loss"] == pytest.approx(theirs[0]["ce"], rel=1e-6)  # the same batch and weights


def test_report_is_one_file_that_needs_no_network(
    quiet_run: Path, student_config: dict[str, Any], shared: Path, one_rank: None
) -> None:
    twin = shared / "runs" / "twin"
    assert run_here(cross_entropy(student_config, twin))
    done = run_decant("report", str(quiet_run), str(twin), "--out", str(shared / "report"))
    page = (shared / "report" / "report.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    assert "http" not in page
    assert {path.name for path in (shared / "report").iterdir()} == {
        "report.html", "table.md", "loss.png", "kl.png", "sequence_length.png", "size.png",
    }  # fmt: skip
    for folder in (quiet_run, twin):
        result = json.loads((folder / "result.json").read_text())
        assert f"{result['held_out']['loss']:.4f}" in done.stdout
        assert f"{result['held_out']['loss']:.4f}" in page
    gain = (json.loads((twin / "result.json").read_text())["held_out"]["loss"]
            - json.loads((quiet_run / "result.json").read_text())["held_out"]["loss"])  # fmt: skip
    assert f"{gain:+.4f}" in done.stdout
