"""Students of which each is the next one's teacher."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import decant
from cluster.config import CacheConfig
from logit_store import LogitStore
from logit_store.config import load_config, parse_config
from tests.students import LLAMA, run_here
from tests.toy import ROOT, in_process_workers, write_yaml
from training.config import TrainConfig
from training.generations import Generation, GenerationsConfig, plan

HELD_OUT_ROWS = 6


@pytest.fixture
def config(store: Any, shared: Path, tmp_path: Path) -> dict[str, Any]:
    """Two generations, the first of which learns from the shared store."""
    train = {
        "run": {"path": "set by each generation", "seed": 5},
        "data": {"store": "set by each generation"},
        "student": {"config": LLAMA},
        "loss": {"alpha": 0.7},
        "schedule": {"total_tokens": 4000, "tokens_per_step": 400, "lr": 0.02},
        "evaluation": {"max_rows": HELD_OUT_ROWS},
        "deepspeed": str(ROOT / "configs/deepspeed/zero1.json"),
    }
    write_yaml(tmp_path / "train.yaml", train)
    return {
        "path": str(tmp_path / "generations"),
        "cache": str(shared / "cache.yaml"),
        "train": str(tmp_path / "train.yaml"),
        "later_cache_set": ["targets.k=24", "cluster.workers=1"],
    }


def generations(config: dict[str, Any]) -> list[Generation]:
    """What the command makes of the config."""
    cache = load_config(CacheConfig, config["cache"])
    train = load_config(TrainConfig, config["train"])
    return plan(parse_config(GenerationsConfig, config, "test"), cache, cache, train)


def files(folder: Path) -> dict[Path, int]:
    """Every file of a finished student, and when it was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_a_student_is_the_teacher_of_the_next(
    config: dict[str, Any], store: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], one_rank: None
) -> None:
    path, root = str(write_yaml(tmp_path / "generations.yaml", config)), Path(config["path"])
    by_hand, _ = generations(config)
    run_here(by_hand.train)
    first = files(root / "1/run")
    with in_process_workers():
        assert decant.main(["generations", path]) == 0
    printed = capfd.readouterr().out
    assert f"{root}/1/run is finished: held-out loss" in printed
    assert files(root / "1/run") == first, "what is finished stays as it is"
    assert not (root / "1/store").exists(), "the first learns from the store that is there"

    labels = LogitStore.open(str(root / "2/store"))
    assert labels.manifest["k"] == 24
    assert labels.manifest["text_id"] == store.manifest["text_id"]
    assert labels.manifest["labels_id"] != store.manifest["labels_id"]
    model = AutoModelForCausalLM.from_pretrained(root / "1/run/model", dtype=torch.float32)
    tokens, targets = labels[int(labels.rows("train")[0])]
    with torch.no_grad():
        ids_1T = torch.from_numpy(tokens.input_ids_T.astype(np.int64))[None]
        logprobs_PV = model(input_ids=ids_1T).logits[0, :-1].log_softmax(-1)
    next_P = logprobs_PV.gather(-1, ids_1T[0, 1:, None])[:, 0]
    np.testing.assert_allclose(targets.next_logprob_P, next_P, atol=labels.codec.max_error)

    results = [json.loads((root / str(n) / "run/result.json").read_text())["held_out"] for n in (1, 2)]
    table = (root / "table.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in table[2:]] == ["| teacher", "| 1", "| 2"]
    for line, result in zip(table[3:], results, strict=True):
        assert f" {result['loss']:.4f} " in line
        assert f"{result['loss']:.4f}" in printed
    assert f" {results[0]['loss'] - results[1]['loss']:+.4f} " in table[4]
    seeds = [(root / str(n) / "run/config.yaml").read_text().split("seed: ")[1].split("\n")[0] for n in (1, 2)]
    assert seeds == ["5", "6"]


def test_only_the_first_teacher_is_of_the_hub_or_quantised() -> None:
    config = GenerationsConfig(path="g", count=3, cache="c", train="t")
    overrides = ["teacher.revision=main", "teacher.backend=vllm", "teacher.quantization=fp8"]
    first = load_config(CacheConfig, ROOT / "configs/single_node/cache.yaml", overrides)
    later = load_config(CacheConfig, ROOT / "configs/single_node/cache.yaml", [*overrides, "targets.k=8"])
    train = load_config(TrainConfig, ROOT / "configs/single_node/student-0.6b.yaml")
    one, two, three = plan(config, first, later, train)
    assert one.cache == first.model_dump(mode="json")
    for before, generation in ((one, two), (two, three)):
        found = parse_config(CacheConfig, generation.cache, "test")
        assert (found.teacher.model, found.teacher.revision) == (f"{before.train['run']['path']}/model", None)
        assert (found.teacher.quantization, found.targets.k) == (None, 8)
        assert found.store.path == generation.train["data"]["store"] != before.train["data"]["store"]
        assert generation.train["run"]["seed"] == before.train["run"]["seed"] + 1


def test_what_a_config_leaves_out_stays_left_out(tmp_path: Path) -> None:
    """Or a learned temperature meets a temperature, and a DeepSpeed JSON's clipping that of the optimizer."""
    learned = ["loss.learned_temperature.low=1", "loss.learned_temperature.high=4"]
    learned += ["loss.learned_temperature.over_tokens=100"]
    cache = load_config(CacheConfig, ROOT / "configs/single_node/cache.yaml")
    train = load_config(TrainConfig, ROOT / "configs/demo/student-small.yaml", learned)
    config = GenerationsConfig(path=str(tmp_path), count=2, cache="c", train="t")
    for generation in plan(config, cache, cache, train):
        again = load_config(TrainConfig, generation.write()["train"])
        assert again.loss == train.loss
        assert again.optimizer.model_fields_set == train.optimizer.model_fields_set


def test_a_student_that_could_not_be_a_teacher_is_refused_at_once(
    config: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Rows of 48 tokens are 47 positions to a student, but take a teacher with a context of 49."""
    train = {"student": {"config": {**LLAMA, "max_position_embeddings": 48}}}
    write_yaml(tmp_path / "train.yaml", {**_yaml(tmp_path / "train.yaml"), **train})
    path = str(write_yaml(tmp_path / "generations.yaml", config))
    assert decant.main(["generations", path]) == 2
    assert "the student's context is 48, and as the next teacher it must read rows of 48 tokens, which takes 49" in (
        capfd.readouterr().err
    )
    assert not Path(config["path"]).exists()


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    loaded: dict[str, Any] = yaml.safe_load(path.read_text())
    return loaded
