"""Models of students: made from a seed, refused where they cannot be trained, saved whatever their base was."""

import json
from pathlib import Path
from typing import Any

import pytest

from logit_store.errors import ConfigError, StudentError
from training.config import LossConfig, StudentConfig
from training.students.architecture import check_student
from training.students.export import plain_model
from training.students.models import build_student
from training.students.student import Student

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
}


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2"])
def test_weights_follow_the_seed(kind: str) -> None:
    sizes = SIZES if kind != "gpt2" else {"n_embd": 64, "n_layer": 1, "n_head": 2}
    first, again, other = (
        build_student(StudentConfig(config={"model_type": kind, **sizes}), 100, 16, s) for s in (0, 0, 1)
    )
    weights = [model.get_input_embeddings().weight for model in (first, again, other)]
    assert (weights[0] == weights[1]).all()
    assert (weights[0] != weights[2]).any()


def test_a_short_context_is_refused() -> None:
    with pytest.raises(StudentError, match="context is 8, but sequences of 16 positions"):
        build_student(StudentConfig(config={"model_type": "llama", "max_position_embeddings": 8, **SIZES}), 100, 16, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model_type": "phi3"}, r"pad_token_id 32000 is beyond its 100 token rows: .*pad_token_id=null"),
        ({"model_type": "qwen3", "num_attention_heads": 3, "num_key_value_heads": 2}, "3 attention heads do not divide "
         "among 2 of keys and values"),
        ({"model_type": "llama", "num_attention_heads": 0, "head_dim": None}, "student.config: integer division"),
        ({"model_type": "gpt2", "n_embd": 30, "n_head": 4}, "the student cannot be built: "),
    ],
)  # fmt: skip
def test_fields_that_do_not_fit_together_are_one_line_before_there_are_weights(
    fields: dict[str, Any], message: str
) -> None:
    sizes = SIZES if fields["model_type"] in ("qwen3", "llama") else {}
    with pytest.raises((ConfigError, StudentError), match=message) as caught:
        check_student(StudentConfig(config={**sizes, **fields}), 100, 16)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1},
        {"model_type": "gptj", "n_embd": 32, "n_layer": 1, "n_head": 2},  # rotary_dim is more than a head has
    ],
)
def test_a_model_that_does_not_run_with_its_head_apart_is_one_line(fields: dict[str, Any]) -> None:
    model = build_student(StudentConfig(config=fields), 100, 16, 0)
    with pytest.raises(StudentError, match=r"ForCausalLM does not run on four tokens, with its head apart \("):
        Student(model, 100, LossConfig(alpha=0.0))


@pytest.mark.parametrize(
    ("base", "saved"),
    [
        ({"temperature": 0.6, "do_sample": True}, {"temperature": 0.6, "do_sample": True}),
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}),
        ({"temperature": 0.6, "do_sample": False, "eos_token_id": 7}, {"temperature": 0.6, "do_sample": True}),
        ({"num_beams": 1, "early_stopping": True, "eos_token_id": 7}, {"eos_token_id": 7}),
        ({"pad_token_id": -1, "eos_token_id": [7, 8]}, {"eos_token_id": [7, 8]}),
    ],
)
def test_a_student_is_saved_whatever_its_base_says_of_generation(
    base: dict[str, Any], saved: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = StudentConfig(config={"model_type": "llama", **SIZES})
    build_student(config, 100, 16, 0).save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(base))
    student = build_student(StudentConfig(model=str(tmp_path / "base")), 100, 16, 0)
    plain_model(student, config).save_pretrained(tmp_path / "model")
    written = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert {key: value for key, value in written.items() if key in {*base, *saved}} == {
        **{key: base[key] for key in ("eos_token_id",) if key in base},
        **saved,
    }
    assert ("generation_config.json breaks transformers' rules" in capsys.readouterr().err) == (base != saved)
