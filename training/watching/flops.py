"""Arithmetic of a training step, and what devices can do: model FLOPs utilisation (MFU).

Chowdhery et al. 2022, PaLM, appendix B (arXiv 2204.02311): a step needs 6 FLOPs per parameter and token, forward and
backward, and 12 · layers · heads · head size · T more for the attention of a sequence of T tokens. Recomputed
activations do not count, and the causal half of attention that a kernel may skip does, so that figures compare across
systems. What is looked up in a table (embeddings, learned positions) is no product and does not count. The head does,
also where it is tied to such a table, for the positions that carry loss: it is applied to no others. Of experts those
that a token is sent to count. A parameter that is not trained (LoRA) needs 4 FLOPs: its own gradient is not taken.
"""

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import nn

PEAK_TFLOPS = {
    "B200": 2250.0,
    "H200": 989.0,
    r"H100 \d+GB HBM3": 989.0,
    "H100 PCIe": 756.0,
    r"A100[ -](SXM4-|PCIE-)?\d+GB( PCIe)?": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "GeForce RTX 4090": 165.0,
}
"""bf16 with float32 sums, dense, by the whole name that CUDA gives one, after NVIDIA: a slice of one (MIG), a laptop's
and others with a word or letter more do less. From data sheets; for others there is `watch.peak_tflops`."""

NUM_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k")
"""What configs of transformers call the number of experts, and of those that a token is sent to."""


class ModelFlops(NamedTuple):
    """What training a model costs."""

    per_position: float
    """FLOPs of its matrix products with weights, but for the head's."""
    per_pair: float
    """FLOPs of attention for each pair of positions of one sequence."""
    per_loss: float
    """FLOPs of the head for a position that carries loss."""

    def of_step(self, lengths: Iterable[int], num_carrying: int) -> float:
        """FLOPs of forward and backward over sequences of these lengths, of whose positions so many carry loss."""
        return sum(self.per_position * n + self.per_pair * n * n for n in lengths) + self.per_loss * num_carrying


def model_flops(model: Any) -> ModelFlops | None:
    """Of a causal language model of transformers with its weights whole; None where its config does not tell, as of
    one without attention heads.
    """
    config, head = model.config.get_text_config(), model.get_output_embeddings().weight
    heads, share = getattr(config, "num_attention_heads", None), _expert_share(config)
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    per_position = 0.0
    for name, parameter in model.named_parameters():
        if id(parameter) in tables or parameter is head:
            continue
        is_expert = ".experts." in name
        if is_expert and share is None:
            return None
        per_position += _cost(parameter) * (share if is_expert and share else 1.0)
    if not isinstance(heads, int):
        return None
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    return ModelFlops(per_position, 12.0 * config.num_hidden_layers * heads * head_size, _cost(head))


def _cost(parameter: Any) -> float:
    """FLOPs of the product with a weight: forward, of the input's gradient, of its own gradient."""
    return (6.0 if parameter.requires_grad else 4.0) * parameter.numel()


def _expert_share(config: Any) -> float | None:
    """Which part of all experts a token is sent to."""
    total, chosen = (
        next((value for name in names if isinstance(value := getattr(config, name, None), int)), None)
        for names in (NUM_EXPERTS, EXPERTS_PER_TOKEN)
    )
    return chosen / total if total and chosen else None


def peak_flops(override_tflops: float | None, device: torch.device) -> float | None:
    """FLOPs per second of one device; None for one that is not known, and for CPUs."""
    if override_tflops is not None:
        return override_tflops * 1e12
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device).removeprefix("NVIDIA ")
    return next((peak * 1e12 for pattern, peak in PEAK_TFLOPS.items() if re.fullmatch(pattern, name)), None)
