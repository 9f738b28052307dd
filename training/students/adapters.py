"""LoRA: small trained matrices beside frozen weights, through peft. Only this file imports peft."""

from typing import Any

import torch
from torch import Tensor

from logit_store.errors import ConfigError
from training.config import LoraConfig


def check_targets(model: Any, config: LoraConfig) -> None:
    """Refuse a target that names no linear layer of the model, which may be a skeleton. Raises ConfigError.

    peft itself is silent where one of several targets matches nothing. The embedding and the head are not offered:
    the loss applies the head in pieces, and a head that is tied would no longer be.
    """
    if config.target_modules == "all-linear":
        return
    linear = _linear_layers(model)
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linear):
            raise ConfigError(
                f"student.lora.target_modules: {type(model).__name__} has no linear layer named {target!r}; choose "
                f"from {', '.join(sorted({name.rsplit('.', 1)[-1] for name in linear}))}"
            )


def with_lora(model: Any, config: LoraConfig, seed: int, revision: str | None = None) -> Any:
    """The model as a ``peft.PeftModel`` whose only trained parameters are A and B; A is decided by ``seed``, B is 0.

    ``revision`` of the model is noted with the adapter. The model's own methods (``get_decoder``, ``config``,
    ``get_output_embeddings``) answer as before.
    """
    import peft

    targets = config.target_modules
    torch.manual_seed(seed)
    return peft.get_peft_model(
        model,
        peft.LoraConfig(
            task_type=peft.TaskType.CAUSAL_LM,
            r=config.rank,
            lora_alpha=config.alpha,  # peft's annotation says int; it only ever divides it by the rank
            lora_dropout=config.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
        ),
        revision=revision,
    )


@torch.no_grad()
def merged_state(model: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The state dict of the model that was given to ``with_lora``, with W + alpha / rank · B·A in place of W.

    Sums are taken in float32 and rounded to ``dtype``, or to that of W. Changes nothing in the model: under ZeRO-3 its
    weights are whole on loan only.
    """
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model()
    state = {
        name.replace(".base_layer.", "."): tensor for name, tensor in base.state_dict().items() if ".lora_" not in name
    }
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            (adapter,) = module.active_adapters
            weight = module.get_base_layer().weight
            merged = weight.float() + module.get_delta_weight(adapter).float()
            state[f"{name}.weight"] = merged.to("cpu", dtype or weight.dtype)  # a GPU has no room for them twice
    return state


def _linear_layers(model: Any) -> list[str]:
    """Names of the linear layers but the head."""
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    kinds = (torch.nn.Linear, Conv1D)
    return [name for name, module in model.named_modules() if isinstance(module, kinds) and module is not head]
