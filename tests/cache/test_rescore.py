"""`decant verify --rescore`: the teacher is asked again, and labels that are not its own do not pass."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decant
from cluster.rescore import _teacher_config, rescore
from logit_store import LogitStore, Storage, writer
from logit_store.errors import ConfigError, StoreError, TeacherError
from logit_store.manifest import ADDED_TO_HEADER
from logit_store.tools.slice import Part, slice_store
from tests.toy import make_teacher


@pytest.fixture(scope="module")
def other_teacher(shared: Path, tokenizer: Path) -> Path:
    """A model of the same architecture with other weights."""
    return make_teacher(shared / "other-teacher", tokenizer, seed=1)


def test_the_teacher_gives_its_labels_again(store: LogitStore, capsys: Any) -> None:
    assert decant.main(["verify", store.storage.url, "--rescore", "6", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len({row["row"] for row in found["rows"]}) == 6
    assert sum(row["positions"] for row in found["rows"]) == found["overall"]["positions"]
    overall = found["overall"]
    assert overall["common_ids"] == overall["possible_ids"] == 16 * overall["positions"]
    assert overall["max_error"] <= store.shards.columns["max_error"].max() + 1e-3
    assert overall["max_tail_error"] < 1e-5  # tails are stored to the last bit
    assert overall["sum_kl"] / overall["positions"] < 2 * store.codec.max_kl
    assert decant.main(["verify", store.storage.url, "--rescore", "2"]) == 0
    assert "and the codec's" in capsys.readouterr().out


def test_exact_labels_come_again_to_the_last_digits(make_store: Callable[..., Any]) -> None:
    exact = make_store("rescored-exact", store={"codec": {"kind": "exact"}})
    drift = rescore(exact.storage.url, 10**6)
    assert [row for row, _ in drift.rows] == np.flatnonzero(exact.lengths_N > 1).tolist()
    assert drift.codec_error == 0.0
    assert drift.overall.max_error < 1e-4  # other rows share the batch
    assert drift.is_within(1e-4)


def test_vllm_gives_its_labels_again(
    vllm_teacher: Any, make_store: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Made and asked again by the one engine of this run."""

    def capture(_folder: Path, _config: Any, selector: Any, _longest: int, _executor: str) -> Any:
        vllm_teacher.capture(selector)
        return vllm_teacher

    monkeypatch.setattr("cluster.teachers.vllm_teacher.VllmTeacher", capture)
    monkeypatch.setattr(vllm_teacher, "close", lambda: None)
    monkeypatch.setattr(vllm_teacher, "batch_tokens", vllm_teacher.batch_tokens)  # workers set it
    store = make_store("rescored-vllm", teacher={"backend": "vllm"})
    assert decant.main(["verify", store.storage.url, "--rescore", "3", "--tolerance", "0.01"]) == 0
    assert "and the codec's" in capsys.readouterr().out


def test_rows_are_drawn_by_the_seed(store: LogitStore) -> None:
    drawn = [[row for row, _ in rescore(store.storage.url, 3, seed=seed).rows] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_another_model_is_refused_before_it_is_loaded(store: LogitStore, other_teacher: Path, capsys: Any) -> None:
    with pytest.raises(TeacherError, match=r"with weights .*…, but .*other-teacher has .*another model"):
        rescore(store.storage.url, 2, str(other_teacher))
    assert decant.main(["verify", store.storage.url, "--rescore", "2", "--teacher", "/nowhere"]) == 2
    assert "say where it is with --teacher" in capsys.readouterr().err


def test_labels_of_another_teacher_are_detected(
    store: LogitStore, make_store: Callable[..., Any], other_teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    """The store says that they are the first teacher's, and every checksum is right."""
    other = make_store("rescored-other", teacher={"model": str(other_teacher)})
    header = {field: value for field, value in store.manifest.items() if field not in ADDED_TO_HEADER}
    storage = Storage(str(tmp_path / "wrong"))
    writer.begin(storage, header, ["labels_id"])
    for shard in range(len(store.shards)):
        writer.commit_logits(storage, shard, [other[row] for row in store.shard_rows(shard)], header)
    writer.finish(storage, header, store.files())
    assert decant.main(["verify", str(tmp_path / "wrong")]) == 0
    assert decant.main(["verify", str(tmp_path / "wrong"), "--rescore", "2", "--tolerance", "1"]) == 1
    drift = rescore(str(tmp_path / "wrong"), 4)
    assert drift.overall.common_ids / drift.overall.possible_ids < 0.5
    assert drift.overall.max_likely_error > 3


def test_a_teacher_that_moved_and_a_slice_of_its_labels(
    store: LogitStore, teacher: Path, tmp_path: Path, capsys: Any
) -> None:
    child = slice_store(store.storage.url, str(tmp_path / "slice"), Part(k=4, rows="3:40"))
    moved = tmp_path / "moved"
    moved.symlink_to(teacher)
    drift = rescore(child.storage.url, 5, str(moved))
    assert drift.overall.common_ids / drift.overall.possible_ids > 0.95  # rounding ties ids at the cut
    assert drift.is_within(0.01)


def test_code_beside_a_teacher_runs_only_when_whoever_asks_says_so(
    make_store: Callable[..., Any], teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its manifest may say that the code was trusted: a store is data, and no reason to trust anything."""
    folder, ran = shutil.copytree(teacher, tmp_path / "with_code"), tmp_path / "ran"
    (folder / "own.py").write_text(
        f"from pathlib import Path\nPath({str(ran)!r}).touch()\n"
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n"
        "class OwnConfig(Qwen3Config):\n    model_type = 'own'\n"
        "class Own(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "own"}
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    store = make_store("rescored-code", teacher={"model": str(folder), "trust_remote_code": True})
    assert store.manifest["provenance"]["teacher"]["trust_remote_code"]
    ran.unlink()
    command = ["verify", store.storage.url, "--rescore", "1"]
    assert decant.main(command) == 2
    assert "is no model that transformers can read" in capsys.readouterr().err
    assert not ran.exists()
    assert decant.main([*command, "--trust-remote-code"]) == 0


def test_pickles_are_read_only_when_whoever_asks_says_so(store: LogitStore) -> None:
    provenance = json.loads(json.dumps(store.manifest["provenance"]))
    provenance["teacher"] |= {"pickled_weights": True, "trust_remote_code": True}
    assert not _teacher_config(store, provenance, None, []).pickled_weights
    asked = _teacher_config(store, provenance, None, ["pickled_weights"])
    assert (asked.pickled_weights, asked.trust_remote_code) == (True, False)


def test_what_cannot_be_scored_says_why(store: LogitStore, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one row"):
        rescore(store.storage.url, 0)
    header = {field: value for field, value in store.manifest.items() if field not in (*ADDED_TO_HEADER, "provenance")}
    writer.begin(Storage(str(tmp_path / "unknown")), {**header, "num_shards": 1, "text_id": "x"}, ["labels_id"])
    with pytest.raises(StoreError, match="not finished"):
        rescore(str(tmp_path / "unknown"), 2)
