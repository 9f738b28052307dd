"""Students that cannot be trained are refused."""

from typing import Any

import pytest

from logit_store.errors import StudentError
from training.config import StudentConfig
from training.students.models import build_student

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
