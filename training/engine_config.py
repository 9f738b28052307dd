"""The DeepSpeed config of a run: the user's JSON passes through, completed by what this trainer decides."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from logit_store.errors import ConfigError
from training.config import OptimizerConfig, TrainConfig

OURS = {
    "train_batch_size": "schedule.tokens_per_step",
    "train_micro_batch_size_per_gpu": "schedule.micro_batch_tokens",
    "gradient_accumulation_steps": "schedule.tokens_per_step and schedule.micro_batch_tokens",
    "managed_gradient_accumulation": "schedule.tokens_per_step and schedule.micro_batch_tokens",
    "gradient_allreduce_op": "schedule.tokens_per_step (the loss is per token of the global batch)",
    "scheduler": "schedule",
    "curriculum_learning": "curriculum",
    "data_efficiency": "curriculum",
    "activation_checkpointing": "student.gradient_checkpointing",
    "tensor_parallel": "schedule.tokens_per_step (every rank is data-parallel)",
    "sequence_parallel_size": "schedule.tokens_per_step (every rank is data-parallel)",
}
"""Keys of a DeepSpeed JSON that this trainer decides, and by which keys of its own."""

COMPILED = ("adam", "adamw", "lamb", "lion", "onebitadam", "muon")
"""Optimizers of DeepSpeed that a C++ compiler builds on first use (the Adams not, with `torch_adam`)."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """The user's DeepSpeed JSON completed by what is ours.

    Gradients of bf16 and fp16 accumulate in float32, unless the JSON says otherwise. Raises ConfigError: the file is
    not there or not JSON, both configs claim the same thing, low precision has no ZeRO stage that serves it, an
    optimizer has to be compiled and there is no compiler, or a value is left to the trainer of Hugging Face (`"auto"`).
    """
    path = config.deepspeed
    user = _read_json(path) if path is not None else {}
    user = {key: value for key, value in user.items() if value != "auto"}  # decided here
    _refuse_conflicts(user, config)
    if "optimizer" in user:
        user["optimizer"] = _filled(user["optimizer"], config.optimizer)
    _refuse_auto(path, user)
    completed = {
        "optimizer": _adamw(config.optimizer, offloaded=_offloads(user)),
        "gradient_clipping": config.optimizer.gradient_clipping,  # DeepSpeed clips at 1.0 when it is absent
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **user,
        "train_micro_batch_size_per_gpu": 1,  # never used: batches are counted in tokens, and losses normalised here
        "gradient_accumulation_steps": 1,
    }
    if _low_precision(user):
        completed["data_types"] = {"grad_accum_dtype": "fp32", **user.get("data_types", {})}
    return completed


def zero_stage(config: dict[str, Any]) -> int:
    """ZeRO stage of a DeepSpeed config."""
    return int(config.get("zero_optimization", {}).get("stage", 0))


def _refuse_conflicts(user: dict[str, Any], config: TrainConfig) -> None:
    path, set_here = config.deepspeed, config.optimizer.model_fields_set
    params = user.get("optimizer", {}).get("params", {})
    for key, owner in OURS.items():
        if key in user:
            raise ConfigError(f"{path}: {key!r} is decided by {owner} of the run's YAML: remove it from the JSON")
    if params.get("lr", "auto") != "auto":
        raise ConfigError(f"{path}: optimizer.params.lr is decided by schedule.lr of the run's YAML: remove it")
    if "optimizer" in user and any(params.get(key) != "auto" for key in set_here - {"gradient_clipping"}):
        raise ConfigError(f"{path} brings its own optimizer, and the run's YAML sets one too (optimizer): remove one")
    if "gradient_clipping" in user and "gradient_clipping" in set_here:
        raise ConfigError(f"gradient_clipping is in {path} and in the run's YAML (optimizer): remove one")
    if "load_universal" in user.get("checkpoint", {}):
        raise ConfigError(f"{path}: checkpoint.load_universal is decided by the run when it goes on: remove it")
    if _low_precision(user) and zero_stage(user) == 0:
        # DeepSpeed 0.19 leaves the fp16 loss unscaled there but unscales its gradient, and sums bf16 gradients in bf16.
        raise ConfigError(f"{path}: bf16 and fp16 need ZeRO: set zero_optimization.stage to 1 or more")
    kind = str(user.get("optimizer", {}).get("type", "")).lower()
    if kind in COMPILED and not params.get("torch_adam") and _compiler() is None:
        raise ConfigError(
            f"{path}: optimizer {user['optimizer']['type']} is compiled on first use, and there is no C++ compiler "
            'here. Leave the optimizer to the run\'s YAML, or set "torch_adam": true in its params'
        )


def _refuse_auto(path: str | None, user: dict[str, Any]) -> None:
    left = [".".join(keys) for keys, value in _leaves(user) if value == "auto"]
    if left:
        raise ConfigError(
            f'{path}: "auto" leaves {", ".join(left)} to the trainer of Hugging Face: write a value, or leave it out'
        )


def _filled(optimizer: dict[str, Any], ours: OptimizerConfig) -> dict[str, Any]:
    """The JSON's optimizer, with ours for what it leaves to its trainer."""
    values = {"lr": 0.0, **ours.model_dump(include={"betas", "eps", "weight_decay"})}
    params = optimizer.get("params", {})
    return {**optimizer, "params": {k: values.get(k, v) if v == "auto" else v for k, v in params.items()}}


def _adamw(config: OptimizerConfig, offloaded: bool) -> dict[str, Any]:
    # torch's AdamW: DeepSpeed's own are compiled on first use, and there may be no compiler. On the CPU torch's
    # fused one is vectorised.
    params = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    return {"type": "AdamW", "params": {**params, "torch_adam": True, **({"fused": True} if offloaded else {})}}


def _offloads(user: dict[str, Any]) -> bool:
    offload = user.get("zero_optimization", {}).get("offload_optimizer") or {}
    return offload.get("device", "none") != "none"


def _low_precision(user: dict[str, Any]) -> bool:
    return any(user.get(kind, {}).get("enabled") is True for kind in ("bf16", "fp16"))


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++")


def _leaves(value: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _leaves(inner, (*path, key))
        else:
            yield (*path, key), inner


def _read_json(path: str) -> dict[str, Any]:
    try:
        value = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"DeepSpeed config {path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"DeepSpeed config {path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise ConfigError(f"DeepSpeed config {path} must be a JSON object")
    return value
