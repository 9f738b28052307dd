"""A student of a teacher's layers computes what the teacher computes without the others."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from logit_store.errors import StudentError
from training.config import FromTeacherConfig, StudentConfig
from training.students.architecture import check_student
from training.students.layers import chosen_layers, cut_config
from training.students.models import build_student

V, NUM_LAYERS = 100, 5
SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "pad_token_id": 0,
    "initializer_range": 0.2,  # large enough that every layer shows in the logits
}
SLIDING: dict[str, Any] = {
    "sliding_window": 3,
    "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"],
}
TEACHERS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {"tie_word_embeddings": True},
    "qwen2": {"use_sliding_window": True, **SLIDING},
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0, 0]},
}
"""Each with something else that belongs to a layer by its place."""


def make_teacher(folder: Path, kind: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(SIZES | fields)), dtype=dtype).eval()
    model.save_pretrained(folder)
    return model


def student_of(folder: Path, **choice: Any) -> StudentConfig:
    return StudentConfig(from_teacher=FromTeacherConfig(model=str(folder), **choice))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids_1T = torch.arange(11, 23)[None]
    result: torch.Tensor = model.eval()(input_ids=ids_1T, use_cache=False).logits
    return result


@pytest.mark.parametrize("kind", TEACHERS)
def test_the_student_is_the_teacher_without_the_other_layers(kind: str, tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", kind, **TEACHERS[kind])
    whole, chosen = logits(teacher), [1, 2, 4]
    config = student_of(tmp_path / "teacher", layers=chosen)
    check_student(config, V, 32)
    student = build_student(config, V, 32, seed=7)
    for i in {*range(NUM_LAYERS)} - {*chosen}:
        teacher.model.layers[i].forward = lambda hidden, *_arguments, **_options: hidden
    torch.testing.assert_close(logits(student), logits(teacher), rtol=1e-5, atol=1e-5)
    assert (logits(student) - whole).abs().max() > 0.01
    student.save_pretrained(tmp_path / "student")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    assert loaded.config.num_hidden_layers == len(loaded.model.layers) == 3
    assert torch.equal(logits(loaded), logits(student))


def test_a_list_that_happens_to_be_as_long_is_not_cut() -> None:
    ends = [1, 2, 3, 4, 5]
    teacher = AutoConfig.for_model("qwen2", **SIZES, use_sliding_window=True, **SLIDING, eos_token_id=ends)
    student = cut_config(FromTeacherConfig(model="t", layers=[0, 1]), teacher)
    assert student.eos_token_id == ends
    assert student.layer_types == SLIDING["layer_types"][:2]


def test_all_layers_are_the_teacher_and_bfloat16_becomes_float32(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path, "llama", dtype=torch.bfloat16)
    student = build_student(student_of(tmp_path, num_layers=NUM_LAYERS), V, 32, seed=0)
    for name, tensor in teacher.state_dict().items():
        assert student.state_dict()[name].dtype == torch.float32
        assert torch.equal(student.state_dict()[name], tensor.float()), name


def test_alternate_layers_of_twelve_are_those_of_distilbert() -> None:
    assert chosen_layers(FromTeacherConfig(model="t"), 12) == [0, 2, 4, 7, 9, 11]
    assert chosen_layers(FromTeacherConfig(model="t", num_layers=1), 12) == [0]
    assert chosen_layers(FromTeacherConfig(model="t", layers=[3, 0]), 12) == [3, 0]


@given(st.integers(1, 200), st.data())
def test_alternate_layers_are_spread_from_the_first_to_the_last(num_layers: int, data: st.DataObject) -> None:
    n = data.draw(st.integers(2, num_layers)) if num_layers > 1 else 1
    chosen = chosen_layers(FromTeacherConfig(model="t", num_layers=n), num_layers)
    assert (chosen[0], chosen[-1], len(chosen)) == (0, num_layers - 1, n)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert all(gap >= 1 for gap in gaps)
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("kind", "fields", "choice", "message"),
    [
        ("llama", {}, {"layers": [0, 5]}, "asks for layer 5, and .* has 5, numbered from 0"),
        ("llama", {}, {"num_layers": 6}, "num_layers is 6, and .* has 5: take at most as many"),
        ("gpt2", {"n_layer": 2, "n_embd": 32, "n_head": 2}, {}, "does not keep its layers in a list `layers`"),
        ("qwen3_moe", {"mlp_only_layers": [0]}, {}, r"lists some of its layers by number in mlp_only_layers=\[0\]"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, {"layers": [0, 2, 4]}, "the layers of .* are not alike"),
        ("gemma3", {}, {}, "is a gemma3, whose layers are not all in one stack"),
    ],
)
def test_layers_that_cannot_be_taken_are_refused_by_the_config_alone(
    kind: str, fields: dict[str, Any], choice: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sizes = {} if kind in ("gpt2", "gemma3") else SIZES
    moe = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16} if kind == "qwen3_moe" else {}
    AutoConfig.for_model(kind, **(sizes | moe | fields)).save_pretrained(tmp_path)  # and no weights beside it
    with pytest.raises(StudentError, match=message):
        check_student(student_of(tmp_path, **choice), V, 32)
