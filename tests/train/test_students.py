"""Students of every origin through the real engine, and the directories that come out."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from logit_store import LogitStore
from logit_store.errors import ConfigError, StudentError
from tests import students
from tests.toy import make_teacher, make_tokenizer
from training.stop import StopRequest

pytestmark = pytest.mark.usefixtures("one_rank")

LORA = {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


def run_here(
    folder: Path,
    store: LogitStore,
    student: dict[str, Any],
    zero: dict[str, Any] | None = None,
    stop: StopRequest | None = None,
    **sections: Any,
) -> dict[str, Any]:
    """Run this process's rank with an engine of its own; the run's result, nothing where it was stopped."""
    deepspeed = folder.parent / f"{folder.name}.json"
    deepspeed.write_text(json.dumps(zero or {}))
    config = {
        "run": {"path": str(folder)},
        "data": {"store": store.storage.root},
        "student": student,
        "schedule": {"total_tokens": 1200, "tokens_per_step": 200, "lr": 0.01, "micro_batch_tokens": 120},
        "evaluation": {"max_rows": 6},
        "deepspeed": str(deepspeed),
        **sections,
    }
    if not students.run_here(config, stop):
        return {}
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def held_out_loss(folder: Path, store: LogitStore) -> float:
    """Cross-entropy of the saved model on the evaluated rows, as a stranger to this project would compute it."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    losses, count = 0.0, 0
    for row in [row for row in store.rows("held_out") if store.lengths_N[row] > 1][:6]:
        ids_1T = torch.from_numpy(store[int(row)].tokens.input_ids_T.astype(np.int64))[None]
        with torch.no_grad():
            logits_TV = model(input_ids=ids_1T).logits[0, :-1, : store.manifest["vocabulary_size"]].float()
        losses += float(torch.nn.functional.cross_entropy(logits_TV, ids_1T[0, 1:], reduction="sum"))
        count += ids_1T.shape[1] - 1
    return losses / count


@pytest.mark.parametrize("stage", [1, 3])
def test_a_lora_student_is_saved_merged_with_its_adapter_beside(
    stage: int, store: LogitStore, teacher: Path, tmp_path: Path
) -> None:
    import peft

    zero = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    student = {"model": str(teacher), "lora": LORA, "gradient_checkpointing": True}
    result = run_here(tmp_path / "run", store, student, zero)
    first = load_file(teacher / "model.safetensors")
    merged = load_file(tmp_path / "run/model/model.safetensors")
    assert {name: tensor.shape for name, tensor in merged.items()} == {name: t.shape for name, t in first.items()}
    changed = {name.split(".")[-2] for name, tensor in merged.items() if not torch.equal(tensor, first[name])}
    assert changed == {*LORA["target_modules"]}  # type: ignore[misc]
    assert result["parameters"] == sum(tensor.numel() for tensor in first.values())
    assert 0 < result["trainable_parameters"] < result["parameters"] / 5
    assert held_out_loss(tmp_path / "run/model", store) == pytest.approx(result["held_out"]["loss"], rel=1e-5)
    base = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "run/adapter")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "run/model", dtype=torch.float32)
    ids_1T = torch.arange(7, 19)[None]
    torch.testing.assert_close(adapted(ids_1T).logits, plain(ids_1T).logits, rtol=1e-4, atol=1e-4)


def test_a_lora_run_goes_on_from_its_checkpoint(store: LogitStore, teacher: Path, tmp_path: Path) -> None:
    student = {"model": str(teacher), "lora": LORA | {"dropout": 0.1}}
    run_here(tmp_path / "whole", store, student)
    assert not run_here(tmp_path / "stopped", store, student, stop=students.StopAfter(3))
    assert run_here(tmp_path / "stopped", store, student)
    for kind in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        resumed, whole = load_file(tmp_path / "stopped" / kind), load_file(tmp_path / "whole" / kind)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in resumed.items()), kind


BF16: dict[str, Any] = {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("zero", "lora", "save_dtype", "saved"),
    [
        ({}, None, None, torch.float32),
        ({}, None, "bfloat16", torch.bfloat16),
        (BF16, None, None, torch.bfloat16),
        (BF16, LORA, None, torch.bfloat16),
        (BF16, LORA, "float32", torch.float32),
    ],
)
def test_weights_keep_the_dtype_of_training_or_take_the_one_asked_for(
    zero: dict[str, Any], lora: dict[str, Any] | None, save_dtype: str | None, saved: torch.dtype, store: LogitStore,
    teacher: Path, tmp_path: Path,
) -> None:  # fmt: skip
    student = {"from_teacher": {"model": str(teacher), "num_layers": 1}, "lora": lora, "save_dtype": save_dtype}
    result = run_here(tmp_path / "run", store, student, zero, schedule=ONE_STEP)
    assert not (tmp_path / "run/adapter").exists()  # a cut teacher is on no disk, to put an adapter beside
    weights = load_file(tmp_path / "run/model/model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {saved}
    assert json.loads((tmp_path / "run/model/config.json").read_text())["dtype"] == str(saved).removeprefix("torch.")
    assert held_out_loss(tmp_path / "run/model", store) == pytest.approx(result["held_out"]["loss"], rel=0.02)


def test_bad_students_are_refused_before_weights_are_read(
    store: LogitStore, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", lambda *_arguments, **_: pytest.fail("weights were read"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text(json.dumps({"text": "the quick brown fox jumps over the lazy dog " * 3}))
    other = make_teacher(tmp_path / "other", make_tokenizer(tmp_path / "tokenizer", corpus))
    small = make_teacher(tmp_path / "small", tmp_path / "tokenizer", vocab_size=399)
    short = make_teacher(tmp_path / "short", tmp_path / "tokenizer", context=46)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"model": str(other)}, "give different ids to tokens"),
        ({"from_teacher": {"model": str(other)}}, "give different ids to tokens"),
        ({"model": str(small)}, "has 399 token rows and the store's vocabulary 400"),
        ({"from_teacher": {"model": str(short)}}, "the student's context is 46, but sequences of 47 positions"),
        ({"from_teacher": {"model": str(teacher), "layers": [2]}}, "asks for layer 2, and .* has 2"),
        ({"model": str(teacher), "lora": {"target_modules": ["query"]}}, "no linear layer named 'query'"),
        ({"model": str(teacher), "lora": {"target_modules": []}}, "must name at least one linear layer"),
        ({"size": "25m", "lora": {}}, "`lora` goes with `model` or `from_teacher`"),
        ({"size": "25m", "model": str(teacher)}, "give one of .*, not `model` and `size`"),
        ({"lora": {}}, "give one of .*, not none of them"),
        ({"architecture": "llama", "model": str(teacher)}, "`architecture` goes with `size`"),
        ({"from_teacher": {"model": "x", "layers": [0], "num_layers": 1}}, "`num_layers` goes with layers: alternate"),
        ({"model": str(tmp_path / "nowhere")}, "the student cannot be built"),
    ]
    for student, message in cases:
        with pytest.raises((ConfigError, StudentError), match=message):
            run_here(tmp_path / "run", store, student)
        assert not (tmp_path / "run").exists()


ONE_STEP = {"total_tokens": 100, "tokens_per_step": 200, "lr": 0.001, "micro_batch_tokens": 300}


def test_a_sized_student_has_tied_weights_once_the_stores_tokenizer_and_a_card(
    store: LogitStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training.students import sizes

    monkeypatch.setitem(sizes.SIZES, "1m", sizes.Size(32, 2, 2, 1, 16, 64))
    result = run_here(tmp_path / "run", store, {"size": "1m", "architecture": "llama"}, schedule=ONE_STEP)
    folder = tmp_path / "run/model"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.model_type == "llama"
    assert model.get_input_embeddings().weight.shape == (400, 32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert result["parameters"] == result["trainable_parameters"] == sum(p.numel() for p in model.parameters())
    assert held_out_loss(folder, store) == pytest.approx(result["held_out"]["loss"], rel=1e-5)
    own = AutoTokenizer.from_pretrained(folder)
    assert own.get_vocab() == AutoTokenizer.from_pretrained(Path(store.storage.root) / "tokenizer").get_vocab()
    card = ModelCard.load(folder / "README.md")
    for fact in (store.manifest["labels_id"], store.manifest["text_id"], f"{result['held_out']['loss']:.4f}"):
        assert fact in card.text
    assert str(tmp_path) not in card.text
    assert not (tmp_path / "run/adapter").exists()
