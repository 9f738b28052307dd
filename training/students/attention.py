"""Sequences of a micro-batch one after the other in one row, each attending to itself alone (FlashAttention varlen)."""

import importlib.util
from typing import Any, NamedTuple

import torch
from torch import Tensor

from logit_store.errors import ConfigError
from training.config import StudentConfig
from training.data.micro_batch import MicroBatch
from training.engine import on_gpus

VARLEN = "flash_attention_2"
"""The attention of transformers that takes bounds of sequences."""


class Flat(NamedTuple):
    """A micro-batch without padding: S positions in one row."""

    input_ids_1S: Tensor
    position_ids_1S: Tensor
    """Counted from 0 in each sequence."""
    valid_N: Tensor
    """Which of them carry loss."""
    bounds: Tensor
    """int32 [B + 1]: where each sequence begins, and where the last ends."""
    longest: int
    """At least the length of every sequence: known without asking the device."""

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of a transformers decoder under FlashAttention 2.

        Given the bounds, it neither guesses them from the position ids nor waits for the device in every layer.
        """
        return {
            "input_ids": self.input_ids_1S,
            "position_ids": self.position_ids_1S,
            "cu_seq_lens_q": self.bounds,
            "cu_seq_lens_k": self.bounds,
            "max_length_q": self.longest,
            "max_length_k": self.longest,
        }


def flatten(batch: MicroBatch) -> Flat:
    """``batch`` with its padding left out, sequences in their order."""
    length = batch.input_ids_BL.shape[1]
    bounds = torch.nn.functional.pad(batch.lengths_B.cumsum(0), (1, 0))
    return Flat(
        batch.input_ids_BL.flatten().index_select(0, batch.fed_S)[None],
        (batch.fed_S % length)[None],
        bounds.index_select(0, batch.valid_N // length) + batch.valid_N % length,
        bounds.int(),
        length,
    )


def check_attention(config: StudentConfig, engine_config: dict[str, Any]) -> None:
    """Raises ConfigError: `varlen` was asked for, and something that it needs is not there."""
    if config.attention == "padded":
        return
    missing = []
    if not on_gpus():
        missing.append("a GPU")
    if importlib.util.find_spec("flash_attn") is None:
        missing.append("the package flash-attn")
    if not any(engine_config.get(dtype, {}).get("enabled") for dtype in ("bf16", "fp16")):
        missing.append("bf16 or fp16 in the DeepSpeed JSON")
    if missing:
        raise ConfigError(f"student.attention=varlen needs {', '.join(missing)}: set it to padded, or provide them")
