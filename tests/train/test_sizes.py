"""Sizes by name: how many parameters a name stands for, counted on models without memory."""

import pytest
from transformers import AutoConfig

from logit_store.errors import ConfigError
from tests.toy import ROOT
from training.config import StudentConfig, TrainConfig
from training.students.architecture import skeleton, student_architecture
from training.students.sizes import ARCHITECTURES, SIZES, num_parameters, sized_fields

V = 1000


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", SIZES)
def test_a_size_has_the_parameters_that_it_is_called_after(name: str, architecture: str) -> None:
    model = skeleton(AutoConfig.for_model(**sized_fields(name, architecture, V, 128)))
    embedding = model.get_input_embeddings().weight
    assert embedding.shape == (V, SIZES[name].hidden_size)
    assert model.get_output_embeddings().weight is embedding  # counted once
    without_embedding = sum(parameter.numel() for parameter in model.parameters()) - embedding.numel()
    assert without_embedding == pytest.approx(num_parameters(name), rel=0.02)


def test_names_are_numbers_in_order() -> None:
    assert [num_parameters(name) for name in ("10m", "160m", "1.4b")] == [10_000_000, 160_000_000, 1_400_000_000]
    assert [*SIZES] == sorted(SIZES, key=num_parameters)
    for size in SIZES.values():
        assert size.num_attention_heads % size.num_key_value_heads == 0


@pytest.mark.parametrize(("longest", "context"), [(100, 4096), (8191, 8193)])
def test_the_context_has_room_for_a_teacher_of_the_same_rows(longest: int, context: int) -> None:
    """A row of n positions has n + 1 tokens, and a teacher needs one place more than that."""
    assert student_architecture(StudentConfig(size="10m"), V, longest).max_position_embeddings == context


def test_an_unknown_size_names_the_known_ones() -> None:
    from logit_store.config import load_config

    with pytest.raises(ConfigError, match="no size is called '7b': choose one of 10m, 25m, 70m"):
        load_config(TrainConfig, ROOT / "configs/single_node/student-0.6b.yaml", ["student={size: 7b}"])
