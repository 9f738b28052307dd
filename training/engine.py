"""The DeepSpeed engine. Only this file imports deepspeed."""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logit_store.errors import ConfigError, StudentError
from training.config import OptimizerConfig, TrainConfig
from training.run_folder import writing

OURS = {
    "train_batch_size": "schedule.tokens_per_step",
    "train_micro_batch_size_per_gpu": "schedule.micro_batch_tokens",
    "gradient_accumulation_steps": "schedule.tokens_per_step and schedule.micro_batch_tokens",
    "scheduler": "schedule",
    "curriculum_learning": "curriculum",
    "data_efficiency": "curriculum",
}
"""Keys of a DeepSpeed JSON that this trainer decides, and by which keys of its own."""


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """The user's DeepSpeed JSON completed by what is ours.

    Raises ConfigError: the file is not there or not JSON, or both configs claim the same thing.
    """
    path = config.deepspeed
    user = _read_json(path) if path is not None else {}
    for key, owner in OURS.items():
        if key in user:
            raise ConfigError(f"{path}: {key!r} is decided by {owner} of the run's YAML: remove it from the JSON")
    set_here = config.optimizer.model_fields_set
    if "optimizer" in user and set_here & {"betas", "eps", "weight_decay"}:
        raise ConfigError(f"{path} brings its own optimizer, and the run's YAML sets one too (optimizer): remove one")
    if "gradient_clipping" in user and "gradient_clipping" in set_here:
        raise ConfigError(f"gradient_clipping is in {path} and in the run's YAML (optimizer): remove one")
    if "lr" in user.get("optimizer", {}).get("params", {}):
        raise ConfigError(f"{path}: optimizer.params.lr is decided by schedule.lr of the run's YAML: remove it")
    return {
        "optimizer": _adamw(config.optimizer),
        "gradient_clipping": config.optimizer.gradient_clipping,  # DeepSpeed clips at 1.0 when it is absent
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        **user,
        "train_micro_batch_size_per_gpu": 1,  # never used: batches are counted in tokens, and losses normalised here
        "gradient_accumulation_steps": 1,
    }


def _adamw(config: OptimizerConfig) -> dict[str, Any]:
    # torch's AdamW: DeepSpeed's fused one is compiled on first use, and there may be no compiler.
    params = {"lr": 0.0, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    return {"type": "AdamW", "params": {**params, "torch_adam": True}}


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


class Engine:
    """One rank's engine: steps over micro-batches with the loss per token of the global batch."""

    def __init__(self, module: nn.Module, config: dict[str, Any]) -> None:
        """``init_process_group`` must have been called. ``config`` comes from ``deepspeed_config``."""
        import deepspeed

        parameters = [p for p in module.parameters() if p.requires_grad]
        self.engine: Any
        try:
            self.engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=config)
        except (ValueError, deepspeed.runtime.config.DeepSpeedConfigError) as error:  # pydantic's is a ValueError
            raise ConfigError(f"DeepSpeed refuses its config: {' '.join(str(error).split())}") from error
        self.device = self.engine.device
        self.world_size = torch.distributed.get_world_size()

    def step(
        self, micro_batches: Sequence[Any], num_positions: int, learning_rate: float
    ) -> tuple[dict[str, float], float]:
        """One optimizer step over this rank's micro-batches; global loss terms per position, and gradient norm.

        ``num_positions`` counts the loss-carrying positions of the global batch. The engine averages
        gradients over ranks, so each rank's sum is scaled by ranks / positions: the result is the same for
        any number of ranks and micro-batches.
        """
        engine = self.engine
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        parts = []
        for i, batch in enumerate(micro_batches):
            engine.set_gradient_accumulation_boundary(i == len(micro_batches) - 1)
            sums = engine(batch.to(self.device))
            engine.backward(sums.loss / num_positions * self.world_size, scale_wrt_gas=False)
            parts.append(torch.stack([term.detach().double() for term in sums]))
        # Without ZeRO and loss scaling DeepSpeed does not tell the norm; gradients are whole and reduced by now.
        tells_norm = hasattr(engine.optimizer, "_global_grad_norm")
        own_norm = None if tells_norm else nn.utils.get_total_norm(_gradients(engine.module))
        engine.step()
        totals = torch.stack(parts).sum(0)
        torch.distributed.all_reduce(totals)
        terms = dict(zip(sums._fields, (totals / num_positions).tolist(), strict=True))
        norm = engine.get_global_grad_norm() if tells_norm else own_norm
        return terms, float(norm) if norm is not None else float("nan")

    def sum_over_ranks(self, values: Sequence[float]) -> list[float]:
        """Sums of numbers that every rank has its own of; every rank calls this."""
        totals = torch.tensor(values, dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(totals)
        sums: list[float] = totals.tolist()
        return sums

    def predict(self, micro_batches: Iterable[Any], use: Callable[[Any, Any], Tensor]) -> Tensor:
        """Sum over ranks and micro-batches of ``use(batch, predictions)``."""
        self.engine.eval()
        total: Tensor | None = None
        with torch.no_grad():
            for batch in micro_batches:
                batch = batch.to(self.device)
                part = use(batch, self.engine(batch))
                total = part if total is None else total + part
        self.engine.train()
        assert total is not None
        torch.distributed.all_reduce(total)
        return total

    def save(self, folder: Path, tag: str) -> None:
        """Write a checkpoint of weights, optimizer and engine state; every rank calls this."""
        with writing(folder / tag):
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        torch.distributed.barrier()

    def load(self, folder: Path, tag: str) -> None:
        """Restore a checkpoint; every rank calls this. Raises StudentError when it is not there."""
        path = self.engine.load_checkpoint(str(folder), tag=tag)[0] if (folder / tag).is_dir() else None
        if path is None:
            raise StudentError(f"checkpoint {folder / tag} is gone: delete the run's directory to start again")

    def same_on_all_ranks(self, value: Any) -> Any:
        """What rank 0 gave, on every rank: others may see files late, or not at all."""
        values = [value]
        torch.distributed.broadcast_object_list(values, src=0)
        return values[0]

    def whole_weights(self) -> AbstractContextManager[Any]:
        """Within the block, rank 0 sees the module's weights whole, also under ZeRO-3."""
        if self.engine.zero_optimization_stage() < 3:
            return nullcontext()
        import deepspeed

        context: AbstractContextManager[Any] = deepspeed.zero.GatheredParameters(list(self.engine.module.parameters()))
        return context

    @property
    def module(self) -> Any:
        """The student within."""
        return self.engine.module


def _gradients(module: nn.Module) -> list[Tensor]:
    return [parameter.grad for parameter in module.parameters() if parameter.grad is not None]


def init_process_group() -> None:
    """Join the ranks that the launcher started; alone where none did. NCCL on GPUs, gloo without."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    if "RANK" not in os.environ:
        os.environ.update(defaults | {"MASTER_PORT": str(free_port())})
    import deepspeed

    if not torch.cuda.is_available():
        # Built by a C++ compiler at every first start and needed by nothing here: gloo does the reductions.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)


def free_port() -> int:
    """A port that nobody listens on now."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
