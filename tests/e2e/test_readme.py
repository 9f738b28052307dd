"""The README's commands: the demo's are run at toy size, the others read by our own parser."""

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

import decant
from cluster.config import CacheConfig
from logit_store.config import load_config
from tests.toy import DECANT, ROOT
from training.config import TrainConfig

BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if line.strip()]
(BY_HAND,) = (block for block in BLOCKS if "corpus.py" in block)
(STORE,) = (block for block in BLOCKS if "decant verify" in block)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's configs, made smaller."""
    root = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "configs", root / "configs")
    corpus = root / "configs/demo/corpus.py"
    text = corpus.read_text()
    for name, value in (("TEACHER_CHARACTERS", 150_000), ("STUDENT_CHARACTERS", 150_000)):
        text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
        assert count == 1
    corpus.write_text(text)
    for path in (root / "configs/demo").glob("*.yaml"):
        text = re.sub(r"total_tokens: .*", "total_tokens: 20_000", path.read_text())
        text = re.sub(r"total_curriculum_tokens: .*", "total_curriculum_tokens: 10_000", text)
        text = re.sub(r"held_out: .*", "held_out: 0.4", text)  # of some ten documents
        text = re.sub(r"(hidden_size|intermediate_size): .*", r"\1: 32", text)
        path.write_text(text)
    return root


def test_the_demo_by_hand(folder: Path) -> None:
    environment = {**os.environ, "PATH": f"{Path(DECANT).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euxc", BY_HAND], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for size in ("small", "small-ce"):
        assert (folder / "runs/demo/students" / size / "model/config.json").exists()
        assert size in done.stdout
    assert (folder / "runs/demo/report/report.html").exists()
    assert len(list((folder / "runs/demo/store/shards").glob("*.arrow"))) >= 8


@pytest.mark.parametrize("line", [line for line in STORE.splitlines() if " merge " not in line])
def test_the_commands_of_the_store(folder: Path, line: str) -> None:
    """On the store that the test before has made."""
    done = subprocess.run(
        [DECANT, *shlex.split(line, comments=True)[1:]], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_demo_script_runs_the_commands_of_the_readme() -> None:
    script = (ROOT / "configs/demo/run.py").read_text()
    for line in BY_HAND.splitlines():
        verb = shlex.split(line)[1]
        assert verb in script or verb == "inspect", line
    listed = subprocess.run(["make", "-n", "demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "configs/demo/run.py" in listed


@pytest.mark.parametrize("line", [line for line in COMMANDS if line not in BY_HAND and not line.startswith("make ")])
def test_every_other_command_is_one_that_exists(line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] in ("decant", "ray", "deepspeed"), line
    if words[0] == "decant":
        decant._parser().parse_args(words[1:])
        return
    inner = words[words.index("cluster" if words[0] == "ray" else "training") + 1 :]
    arguments = decant._parser().parse_args(inner)
    load_config(CacheConfig if words[0] == "ray" else TrainConfig, ROOT / arguments.config, arguments.overrides)


def test_make_knows_the_targets_of_the_readme() -> None:
    for line in COMMANDS:
        if line.startswith("make "):
            subprocess.run(["make", "-n", *shlex.split(line)[1:]], cwd=ROOT, check=True, capture_output=True)
