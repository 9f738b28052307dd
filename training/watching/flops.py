"""Arithmetic of a training step, and what devices can do: model FLOPs utilisation (MFU).

Chowdhery et al. 2022, PaLM, appendix B (arXiv 2204.02311): a step needs 6 FLOPs per parameter and token, forward and
backward, and 12 · layers · heads · head size · T more for the attention of a sequence of T tokens. Recomputed
activations do not count, and the causal half of attention that a kernel may skip does, so that figures compare across
systems. Here the embedding's table is no product and does not count, the head does, also where it is tied to that
table; a parameter that is not trained (LoRA) needs 4 FLOPs, since its own gradient is not taken.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 4090": 165.0,
}
"""bf16 with float32 sums, dense, by a part of the name that CUDA gives a GPU: the first that fits. From data sheets."""


class ModelFlops(NamedTuple):
    """What training a model costs."""

    per_position: float
    """FLOPs of its matrix products with weights."""
    per_pair: float
    """FLOPs of attention for each pair of positions of one sequence."""

    def of_step(self, lengths: Iterable[int]) -> float:
        """FLOPs of forward and backward over sequences of these lengths, in positions."""
        return sum(self.per_position * n + self.per_pair * n * n for n in lengths)


def model_flops(model: Any) -> ModelFlops:
    """Of a causal language model of transformers, whole or under ZeRO-3."""
    config = model.config.get_text_config()
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    parameters = {id(p): p for p in model.parameters()}
    del parameters[id(embedding)]
    parameters[id(head)] = head  # which may be the embedding
    trained = sum(_size(p) for p in parameters.values() if p.requires_grad)
    per_position = 4.0 * sum(_size(p) for p in parameters.values()) + 2.0 * trained
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return ModelFlops(per_position, 12.0 * config.num_hidden_layers * config.num_attention_heads * head_size)


def peak_flops(override_tflops: float | None, device: torch.device) -> float | None:
    """FLOPs per second of one device; None for one that is not known, and for CPUs."""
    if override_tflops is not None:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for part, peak in PEAK_TFLOPS.items() if part in name), None)


def _size(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))  # under ZeRO-3 a rank holds a part
