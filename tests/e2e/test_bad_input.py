"""Bad input: one clear line, a non-zero exit, nothing half-written."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import decant
from tests.students import run_here
from tests.toy import ROOT, make_teacher, write_yaml


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a verb that must fail; its one line."""

    def run(*arguments: str) -> str:
        assert decant.main(list(arguments)) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        ours = [line for line in lines if line.startswith("decant ")]
        assert len(ours) == 1, lines
        assert "Traceback" not in "".join(lines)
        return ours[0]

    return run


@pytest.fixture
def cache_yaml(cache_config: dict[str, Any], tmp_path: Path) -> str:
    """The shared tokens, and a store that does not exist yet."""
    config = json.loads(json.dumps(cache_config))
    config["store"]["path"] = str(tmp_path / "store")
    return str(write_yaml(tmp_path / "cache.yaml", config))


@pytest.fixture
def student_yaml(cache_config: dict[str, Any], tmp_path: Path) -> str:
    config = {
        "run": {"path": str(tmp_path / "run")},
        "data": {"store": cache_config["store"]["path"]},
        "student": {"config": {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}},
        "schedule": {"total_tokens": 1000, "tokens_per_step": 200, "lr": 0.01},
    }
    return str(write_yaml(tmp_path / "student.yaml", config))


# Cache


def test_cache_refuses_before_anything_is_written(
    refused: Callable[..., str], cache_yaml: str, tokens: Any, tmp_path: Path, tokenizer: Path
) -> None:
    from transformers import AutoTokenizer, BertConfig, BertModel

    small = make_teacher(tmp_path / "narrow", tokenizer, vocab_size=300)
    short = make_teacher(tmp_path / "short", tokenizer, context=48)
    foreign = make_teacher(tmp_path / "foreign", tokenizer)
    wordless = make_teacher(tmp_path / "wordless", tokenizer)
    for file in wordless.glob("*token*"):
        file.unlink()
    encoder, pickled = tmp_path / "encoder", make_teacher(tmp_path / "pickled", tokenizer)
    BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)).save_pretrained(encoder)
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    torn, incomplete, mistyped = (shutil.copytree(short, tmp_path / n) for n in ("torn", "incomplete", "mistyped"))
    (torn / "model.safetensors").write_bytes((torn / "model.safetensors").read_bytes()[:-1])
    (incomplete / "model.safetensors").rename(incomplete / "model-1.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (incomplete / "model.safetensors.index.json").write_text(json.dumps(index))
    described = json.loads((mistyped / "config.json").read_text()) | {"max_position_embeddings": "48"}
    (mistyped / "config.json").write_text(json.dumps(described))
    (tmp_path / "file").write_text("x")
    AutoTokenizer.from_pretrained(tokenizer).train_new_from_iterator(["a b c"] * 9, 300).save_pretrained(foreign)
    cases = {
        f"teacher.model={foreign}": "give different ids to tokens: tokenize again",
        "tokens.window=40": "window is 48 there and 40 here. Run `decant tokenize`",
        "store.path=s4://bucket/store": "s4://bucket/store cannot be opened: Protocol not known",
        "store.path=''": "the path of a store is empty: give a directory or a URL",
        f"store.path={tmp_path}/file": "file is a file, where a directory is needed: choose another path",
        f"store.path={tmp_path}/file/store": "file is a file, where a directory is needed: choose another path",
        "store.path=ftp://127.0.0.1:1/store": "ftp://127.0.0.1:1/store cannot be opened: [Errno 111]",
        "store.path=hf://datasets/x@y/z": "cannot be opened: Invalid HF URI",
        "targets.k=401": "targets.k = 401 is larger than the vocabulary of 400",
        "targets.kk=4": "unknown key 'targets.kk'; did you mean 'k'?",
        "targets.k=four": "targets.k: input should be a valid integer",
        "teacher.model=/nowhere": "'/nowhere' is no directory and cannot be fetched from the Hub",
        f"teacher.model={wordless}": "the teacher's tokenizer cannot be compared with that of the token shards",
        f"teacher.model={tokenizer}": "is no model that transformers can read: Unrecognized model",
        f"teacher.model={small}": "head has 300 rows, fewer than the tokenizer's vocabulary of 400",
        f"teacher.model={short}": "sequences of 48 tokens, but the teacher's context is 48: tokenize again "
        "with tokens.window <= 47",
        f"teacher.model={encoder}": "BertModel (model type bert), which has no causal LM head",
        f"teacher.model={pickled}": "holds no weights in *.safetensors. Pickle files",
        f"teacher.model={torn}": "model.safetensors is cut short, or no safetensors file: ",
        f"teacher.model={incomplete}": "lacks 1 of the 2 files with weights that model.safetensors.index.json names",
        f"teacher.model={mistyped}": "no model that transformers can read: Validation error for field 'max_position",
        "targets.always=[7,400]": "targets.always names id 400, but the vocabulary has the ids 0 to 399",
        "targets.kind=threshold": "targets: kind=threshold has no `k`",
        "teacher.tensor_parallel=2": "tensor_parallel is not for teacher.backend=transformers: leave it out",
        "cluster.gpus_per_worker=4": "cluster.gpus_per_worker = 4, of which this teacher would use one",
        "cluster.gpus_per_worker=1": "cluster.workers × cluster.gpus_per_worker = 2, but the cluster has 0 GPUs",
        "cluster.resources_per_worker={TPU: 4}": "cluster.resources_per_worker.TPU = 8, but the cluster",
        "tokens.path=/nowhere": "/nowhere holds no decant store",
        "cluster.workers=99": "cluster.workers × cluster.cpus_per_worker = 99, but the cluster has",
    }
    for override, message in cases.items():
        assert message in refused("cache", cache_yaml, override)
        assert not (tmp_path / "store").exists(), override
    assert "config file /nowhere.yaml does not exist" in refused("cache", "/nowhere.yaml")


def test_cache_refuses_the_directory_of_another_run(
    refused: Callable[..., str], cache_config: dict[str, Any], store: Any, shared: Path
) -> None:
    before = sorted(Path(store.storage.root).rglob("*"))
    line = refused("cache", str(shared / "cache.yaml"), "targets.k=8")
    assert "belongs to another run" in line
    assert "labels_id" in line
    assert "labels.targets.k is 16 there and 8 here" in line
    assert sorted(Path(store.storage.root).rglob("*")) == before


def test_a_relative_output_in_a_submitted_job_is_refused(
    refused: Callable[..., str], cache_yaml: str, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    line = refused("cache", cache_yaml, "store.path=runs/lost")
    assert "relative, and a job runs in a copy of the working directory that is thrown away" in line


def test_an_engine_that_is_not_installed(
    refused: Callable[..., str], cache_yaml: str, tokens: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cluster that is joined, only its nodes can know."""
    monkeypatch.setattr("cluster.cache.find_spec", lambda _name: None)
    assert "teacher.backend is vllm, which is not installed" in refused("cache", cache_yaml, "teacher.backend=vllm")


def test_no_cluster_at_the_address(refused: Callable[..., str], cache_yaml: str, tokens: Any) -> None:
    assert "no Ray cluster answers at '127.0.0.1:1'" in refused("cache", cache_yaml, "--address", "127.0.0.1:1")


# Tokenize


def test_tokenize_refuses_before_anything_is_written(
    refused: Callable[..., str], cache_yaml: str, tmp_path: Path
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "blank.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    out = f"tokens.path={tmp_path / 'out'}"
    cases = {
        "tokens.source.files=[/nowhere/*.jsonl]": "no file matches '/nowhere/*.jsonl'",
        f"tokens.source.files=[{tmp_path}/empty.jsonl]": "the corpus is empty",
        f"tokens.source.files=[{tmp_path}/blank.jsonl]": "no document of it has any text",
        "tokens.tokenizer=/nowhere": "no tokenizer can be loaded from '/nowhere'",
        "tokens.window=1": "tokens.window: input should be greater than or equal to 2",
    }
    for override, message in cases.items():
        assert message in refused("tokenize", cache_yaml, out, override)
        assert not (tmp_path / "out").exists(), override


# Train


def test_train_refuses_before_anything_is_written(
    refused: Callable[..., str], student_yaml: str, cache_config: dict[str, Any], store: Any, tmp_path: Path,
    shared: Path,
) -> None:  # fmt: skip
    unfinished = tmp_path / "unfinished"
    shutil.copytree(store.storage.root, unfinished)
    (unfinished / "manifest.json").unlink()
    (unfinished / "shards" / "000003.json").unlink()
    newer = tmp_path / "newer"
    shutil.copytree(store.storage.root, newer)
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format": 9}))
    ours = tmp_path / "ds.json"
    ours.write_text('{"train_batch_size": 8}')
    other = tmp_path / "clip.json"
    other.write_text('{"gradient_clipping": 2.0}')
    cases = {
        "loss.alhpa=1": "unknown key 'loss.alhpa'; did you mean 'alpha'?",
        "loss.temperature=3.0": "the store serves [1.0, 2.0]. Cache again with targets.temperatures=[3.0]",
        f"data.store={cache_config['tokens']['path']}": "holds tokens without labels: set loss.alpha=0",
        "data.store=/nowhere": "/nowhere holds no decant store",
        f"data.store={unfinished}": "is not finished: 7 of 8 shards are committed",
        f"data.store={newer}": "has format 9; this version of decant reads format 1",
        "schedule.tokens_per_step=10": "less than the longest sequence, 47 positions",
        "curriculum={min_difficulty: 8, max_difficulty: 64, schedule_config: {total_curriculum_tokens: 9}}": "longer "
        "than the data: the longest row of",
        "deepspeed=/nowhere.json": "DeepSpeed config /nowhere.json does not exist",
        f"deepspeed={ours}": "'train_batch_size' is decided by schedule.tokens_per_step",
        "student.config.num_atention_heads=2": "llama has no 'num_atention_heads'; did you mean 'num_attention_heads'?",
        "student.config.hidden_size=wide": "student.config: ",
        "student.config.model_type=lama": "student.config: Unrecognized model identifier: lama",
        "student.model=x": "student: give one of `model`",
    }
    for override, message in cases.items():
        assert message in refused("train", student_yaml, override)
        assert not (tmp_path / "run").exists(), override
    line = refused("train", student_yaml, f"deepspeed={other}", "optimizer.gradient_clipping=1.0")
    assert f"gradient_clipping is in {other} and in the run's YAML" in line


def test_a_student_with_another_tokenizer_is_refused(
    refused: Callable[..., str], student_yaml: str, store: Any, teacher: Path, tmp_path: Path, shared: Path
) -> None:
    from transformers import AutoTokenizer

    student = tmp_path / "student"
    shutil.copytree(teacher, student)
    tokenizer = AutoTokenizer.from_pretrained(student)
    tokenizer.add_tokens(["<|other|>"])
    tokenizer.save_pretrained(student)
    config = json.loads(json.dumps({**_yaml(student_yaml), "student": {"model": str(student)}}))
    path = str(write_yaml(tmp_path / "other.yaml", config))
    line = refused("train", path)
    assert "give different ids to tokens" in line
    assert str(shared / "tokenizer") in line


def test_a_vocabulary_padded_differently_works(student_yaml: str, store: Any, tmp_path: Path, one_rank: None) -> None:
    config = _yaml(student_yaml)
    config["student"]["config"] |= {"vocab_size": 448, "intermediate_size": 16, "num_hidden_layers": 1}
    assert run_here(config)
    assert (tmp_path / "run" / "model" / "config.json").exists()


def test_train_and_report_refuse_other_directories(
    refused: Callable[..., str], student_yaml: str, store: Any, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    assert "is not empty and holds no run" in refused("train", student_yaml)
    assert "holds no run" in refused("report", str(tmp_path / "run"))


def on_a_small_disk(size: str, folder: Path, command: str, config: str) -> subprocess.CompletedProcess[str]:
    """Run `decant COMMAND` on a new disk of ``size``: in it $1 is the disk, $2 decant, $3 the config."""
    folder.mkdir()
    script = f'mount -t tmpfs -o size={size} none "$1" && {{ "$2" {command}; echo "exit $?"; ls -R "$1"; }}'
    program = str(Path(sys.executable).parent / "decant")
    return subprocess.run(
        ["unshare", "--mount", "sh", "-c", script, "sh", str(folder), program, config],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_no_space_left_for_the_store(cache_yaml: str, tokens: Any, tmp_path: Path) -> None:
    """The whole command on a disk of 100 kB: one line, and what was committed stays for the next attempt."""
    done = on_a_small_disk("100k", tmp_path / "full", 'cache "$3" store.path="$1/store"', cache_yaml)
    assert "exit 2" in done.stdout, done.stderr
    assert "no space left to write" in done.stderr
    assert "run the same command again" in done.stderr
    assert ".tmp" not in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_no_space_left_for_a_checkpoint(student_yaml: str, store: Any, tmp_path: Path) -> None:
    command = 'train "$3" run.path="$1/run" checkpoint.every_tokens=300'
    done = on_a_small_disk("300k", tmp_path / "full", command, student_yaml)
    assert "exit 2" in done.stdout, done.stderr
    assert "cannot be written" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr


def _yaml(path: str) -> dict[str, Any]:
    import yaml

    config: dict[str, Any] = yaml.safe_load(Path(path).read_text())
    return config
