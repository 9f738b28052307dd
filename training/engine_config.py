"""The DeepSpeed config of a run: the user's JSON passes through, completed by what this trainer decides."""

import difflib
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

SECTIONS = (
    *("optimizer", "optimizer.params", "zero_optimization", "zero_optimization.offload_optimizer"),
    *("bf16", "fp16", "checkpoint", "data_types"),
)
"""What is looked into here, and has to be an object, outer ones first; DeepSpeed itself refuses the others."""

MISSPELT = (
    *("optimizer", "zero_optimization", "bf16", "fp16", "torch_autocast", "data_types", "communication_data_type"),
    *("gradient_clipping", "gradient_predivide_factor", "checkpoint"),
)
"""Keys that change numbers or memory, of which near misses are refused: DeepSpeed 0.19 has no list of its keys, and
passes over what it does not know. No other key that it has, or had, comes as near to these as is looked."""

COMPILED = ("adam", "adamw", "lamb", "lion", "onebitadam", "muon")
"""Optimizers of DeepSpeed that a C++ compiler builds on first use (the Adams not, with `torch_adam`)."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """The user's DeepSpeed JSON completed by what is ours.

    Gradients of bf16 and fp16 accumulate in float32, unless the JSON says otherwise. Raises ConfigError: the file is
    not there, not JSON or not of DeepSpeed's form, both configs claim the same thing, low precision has no ZeRO stage
    that serves it, an optimizer has to be compiled and there is no compiler, or a value is left to the trainer of
    Hugging Face (`"auto"`).
    """
    path = config.deepspeed
    user = _read_json(path) if path is not None else {}
    user = {key: value for key, value in user.items() if value != "auto"}  # decided here
    _refuse_malformed(path, user)
    filled = {**user, "optimizer": _filled(user["optimizer"], config.optimizer)} if "optimizer" in user else user
    _refuse_auto(path, filled)
    _refuse_conflicts(user, config)
    completed = {
        "optimizer": _adamw(config.optimizer),
        "gradient_clipping": config.optimizer.gradient_clipping,  # DeepSpeed clips at 1.0 when it is absent
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **filled,
        "train_micro_batch_size_per_gpu": 1,  # never used: batches are counted in tokens, and losses normalised here
        "gradient_accumulation_steps": 1,
    }
    if _low_precision(user):
        completed["data_types"] = {"grad_accum_dtype": "fp32", **user.get("data_types", {})}
    return completed


def decisive_part(config: dict[str, Any]) -> dict[str, Any]:
    """What of a DeepSpeed config decides a run's numbers: all but whether its optimizer's operations are fused."""
    optimizer = config["optimizer"]
    params = {key: value for key, value in optimizer.get("params", {}).items() if key != "fused"}
    return {**config, "optimizer": {**optimizer, "params": params}}


def _refuse_malformed(path: str | None, user: dict[str, Any]) -> None:
    """Refuse what DeepSpeed would pass over without a word, or read otherwise than it is read here."""
    for name in user:
        if name not in MISSPELT and (near := difflib.get_close_matches(name, MISSPELT, n=1, cutoff=0.8)):
            raise ConfigError(f"{path}: DeepSpeed has no key {name!r}, did you mean {near[0]!r}?")
    if "bfloat16" in user:
        raise ConfigError(f"{path}: 'bfloat16' is an old name of 'bf16': rename it")
    for section in SECTIONS:
        value: Any = user
        for key in section.split("."):
            value = value.get(key, {})
        if not isinstance(value, dict):
            raise ConfigError(
                f"{path}: {section} must be an object, not {json.dumps(value)}: write one, or leave it out"
            )
    for kind in ("bf16", "fp16"):
        enabled = user.get(kind, {}).get("enabled", False)
        if not isinstance(enabled, bool) and enabled != "auto":  # DeepSpeed takes "true" and 1 for true as well
            raise ConfigError(f"{path}: {kind}.enabled must be true or false, not {json.dumps(enabled)}")
    stage = user.get("zero_optimization", {}).get("stage", 0)
    if not isinstance(stage, int) and stage != "auto":
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, not {json.dumps(stage)}")


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
    if _low_precision(user) and user.get("zero_optimization", {}).get("stage", 0) == 0:
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


def _adamw(config: OptimizerConfig) -> dict[str, Any]:
    # torch's AdamW: DeepSpeed's own are compiled on first use, and there may be no compiler. The fused one is
    # vectorised on the CPU; on a GPU the others would make temporaries as large as the rank's part of the state, for
    # ZeRO hands it over as one tensor. The same everywhere: a run may begin and go on in different places.
    params = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    return {"type": "AdamW", "params": {**params, "torch_adam": True, "fused": True}}


def _low_precision(user: dict[str, Any]) -> bool:
    return any(user.get(kind, {}).get("enabled", False) for kind in ("bf16", "fp16"))


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
