"""The command line: instant, lazy, and every verb with an example that parses."""

import subprocess
import sys

import pytest

import decant
from tests.toy import DECANT

VERBS = ["tokenize", "cache", "inspect", "export", "stats", "verify", "diff", "merge", "slice", "train", "generations"]
VERBS += ["report"]
HEAVY = ["torch", "ray", "vllm", "deepspeed", "transformers", "peft", "datasets", "pyarrow", "matplotlib"]


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import decant\ntry: decant.main(['--help'])\nexcept SystemExit: pass", set()),
        ("import logit_store", {"pyarrow"}),
        ("import cluster, training", set()),
        ("import cluster.config, training.config, training.launch", {"pyarrow"}),
        ("import cluster.cache, cluster.tokenize, cluster.ray_cluster", {"pyarrow"}),
        (
            "import logit_store.tools.damage, logit_store.tools.diff, logit_store.tools.merge, logit_store.tools.slice",
            {"pyarrow"},
        ),
        ("import cluster.rescore, cluster.job.status, cluster.job.worker", {"pyarrow"}),
        ("import training.report, training.curriculum.batches, training.schedules", {"pyarrow", "torch"}),
        ("import training.engine, training.trainer", {"pyarrow", "torch"}),
        ("import training.students.architecture, training.generations, training.students.model_card", {"pyarrow"}),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(code: str, allowed: set[str]) -> None:
    script = f"{code}\nimport sys\nprint('LOADED', [m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = done.stdout.split("LOADED ")[1].strip()
    assert set(eval(loaded)) <= allowed


def test_cluster_and_training_never_import_each_other() -> None:
    for own, other in (("cluster", "training"), ("training", "cluster")):
        done = subprocess.run(
            ["grep", "-rnE", rf"^\s*(from|import) {other}\b", own], capture_output=True, text=True, check=False
        )
        assert done.stdout == ""


@pytest.mark.parametrize(
    ("library", "files"),
    [
        ("ray", ["cluster/ray_cluster.py", "cluster/ray_tasks.py", "cluster/ray_workers.py", "training/ray_train.py"]),
        ("vllm", ["cluster/teachers/vllm_teacher.py"]),
        ("deepspeed", ["training/engine.py"]),
        ("peft", ["training/students/adapters.py"]),
    ],
)
def test_each_engine_is_imported_in_files_of_its_own(library: str, files: list[str]) -> None:
    command = [
        "grep",
        "-rlE",
        rf"^\s*(from|import) {library}\b",
        "cluster",
        "training",
        "logit_store",
        "decant.py",
        "--include=*.py",
    ]
    assert sorted(subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()) == files


def test_every_verb_has_help_with_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    for verb in VERBS:
        with pytest.raises(SystemExit) as exit_:
            decant.main([verb, "--help"])
        assert exit_.value.code == 0
        example = capsys.readouterr().out.split("example: decant ")[1].split("\n")[0]
        assert decant._parser().parse_args(example.split()).verb == verb


def test_the_console_script_answers() -> None:
    done = subprocess.run([DECANT, "--help"], capture_output=True, text=True, check=True)
    assert all(verb in done.stdout for verb in VERBS)
