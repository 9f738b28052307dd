"""Sizes of new students by name: what each name stands for in the fields of a transformers config."""

from typing import Any, NamedTuple


class Size(NamedTuple):
    """The shape of a decoder of grouped-query attention and gated feed-forward layers."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int


ARCHITECTURES = ("qwen3", "llama")
"""Model types that a size can be built as. They differ in Qwen3's norms of queries and keys, a ten-thousandth."""

SIZES = {
    "10m": Size(256, 12, 4, 2, 64, 832),
    "25m": Size(512, 8, 8, 4, 64, 1536),
    "70m": Size(768, 10, 12, 4, 64, 2304),
    "160m": Size(1024, 14, 16, 8, 64, 2688),
    "410m": Size(1280, 20, 10, 2, 128, 4352),
    "1b": Size(2048, 20, 16, 8, 128, 6144),
    "1.4b": Size(2048, 28, 16, 8, 128, 6144),
    "2.8b": Size(2560, 30, 20, 4, 128, 10240),
}
"""A name counts the parameters outside the embedding, within 2 %: those of the embedding, which is also the head, are
V · hidden_size, and V is the store's. 1.4b has the shape of Qwen3-1.7B, which counts its embedding."""

LEAST_CONTEXT = 4096
"""Positions are rotations and cost no weights: a context that leaves the student room to generate costs nothing."""


def num_parameters(name: str) -> int:
    """What a size's name says, as a number: ``1.4b`` is 1,400,000,000."""
    return round(float(name[:-1]) * {"m": 1e6, "b": 1e9}[name[-1]])


def sized_fields(name: str, architecture: str, vocabulary_size: int, longest: int) -> dict[str, Any]:
    """Fields of the transformers config of size ``name``, for a vocabulary and sequences of ``longest`` positions.

    The embedding is tied to the head. The context has room for a token more than the longest sequence, so that the
    student can be the next teacher.
    """
    context = max(LEAST_CONTEXT, longest + 2)
    return {
        "model_type": architecture,
        **SIZES[name]._asdict(),
        "vocab_size": vocabulary_size,
        "max_position_embeddings": context,
        "tie_word_embeddings": True,
    }
