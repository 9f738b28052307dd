"""The DeepSpeed engine. Only this file imports deepspeed."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from logit_store.errors import ConfigError, DecantError, StudentError
from training.run_folder import writing
from training.stop import AgreedError

CONVERTIBLE = ("adam", "adamw")
"""Optimizers whose checkpoints DeepSpeed converts: of others it drops weights without a word (seen with SGD)."""


class Update(NamedTuple):
    """What an optimizer step was, the same on every rank."""

    terms: dict[str, float]
    """Loss and its parts per position of the global batch; NaN or infinite where the loss was not finite."""
    gradient_norm: float
    """Of the global batch, before clipping."""
    applied: bool
    """Whether weights changed: never where the loss was not finite, and not where a float16 gradient overflowed, which
    DeepSpeed answers with a smaller scale. Other gradients that are not finite may have spoilt them, or not."""
    not_finite: list[tuple[int, int]]
    """Rank and number of every micro-batch whose loss was not finite; of all where it was the gradient alone."""


class Engine:
    """One rank's engine: steps over micro-batches with the loss per token of the global batch."""

    def __init__(self, module: nn.Module, config: dict[str, Any]) -> None:
        """``init_process_group`` must have been called. ``config`` comes from ``deepspeed_config``."""
        import deepspeed

        parameters = [p for p in module.parameters() if p.requires_grad]
        self.engine: Any
        try:
            self.engine, *_ = deepspeed.initialize(model=module, model_parameters=parameters, config=config)
        except Exception as error:
            if not _is_about_the_config(error):
                raise
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(f"DeepSpeed refuses its config: {reason}") from error
        self.device = self.engine.device
        self.world_size = torch.distributed.get_world_size()

    def step(self, micro_batches: Sequence[Any], num_positions: int, learning_rate: float) -> Update:
        """One optimizer step over this rank's micro-batches, of which every rank has the same number.

        ``num_positions`` counts the loss-carrying positions of the global batch. The engine averages
        gradients over ranks, so each rank's sum is scaled by ranks / positions: the result is the same for
        any number of ranks and micro-batches. A loss that is not finite leaves the weights as they are.

        Raises StudentError: a float16 loss scale cannot fall any further.
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
        totals_MX = torch.stack(parts)  # a row of terms per micro-batch
        totals_X = totals_MX.sum(0)
        torch.distributed.all_reduce(totals_X)
        terms = dict(zip(sums._fields, (totals_X / num_positions).tolist(), strict=True))
        if not all(map(math.isfinite, terms.values())):
            return Update(terms, math.nan, False, self._not_finite(totals_MX))
        norm = self._update()
        not_finite: list[tuple[int, int]] = []
        # DeepSpeed may skip such a step in any precision, but only float16 has a loss scale that mends the next one.
        if not math.isfinite(norm) and not engine.fp16_enabled():
            not_finite = [(rank, i) for rank in range(self.world_size) for i in range(len(micro_batches))]
        return Update(terms, norm, bool(engine.was_step_applied()), not_finite)

    def _update(self) -> float:
        """Apply the gradients; their norm, infinite where DeepSpeed did not apply them. Raises StudentError."""
        engine, norm = self.engine, None
        if engine.zero_optimization_stage() == 0:  # DeepSpeed does not measure it there
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(gradients)
        try:
            engine.step()
        except Exception as error:
            if "minimum - cannot decrease scale" not in str(error):  # DeepSpeed raises a bare Exception
                raise
            raise StudentError("float16 gradients overflow at the smallest loss scale: use bf16") from error
        if not engine.was_step_applied():
            return math.inf
        return float(engine.get_global_grad_norm() if norm is None else norm)

    def _not_finite(self, totals_MX: Tensor) -> list[tuple[int, int]]:
        bad_M = (~totals_MX.isfinite().all(-1)).to(torch.int32)
        of_ranks = [torch.empty_like(bad_M) for _ in range(self.world_size)]
        torch.distributed.all_gather(of_ranks, bad_M)
        return [(rank, i) for rank, bad in enumerate(of_ranks) for i in bad.nonzero()[:, 0].tolist()]

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
        """Write a checkpoint of weights, optimizer and engine state; every rank calls this.

        What a save of the same step has left that was killed midway goes first: it may be of other ranks, and
        DeepSpeed takes every file that lies there for a part of the whole.
        """
        with writing(folder / tag):
            if torch.distributed.get_rank() == 0:
                for name in (tag, _universal(tag)):
                    if (folder / name).exists():
                        shutil.rmtree(folder / name)
            torch.distributed.barrier()
            self.engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
        torch.distributed.barrier()

    def load(self, folder: Path, tag: str, ranks: int) -> None:
        """Restore a checkpoint that ``ranks`` ranks wrote; every rank calls this.

        ZeRO splits the optimizer's state by ranks: where there are more or fewer now, rank 0 converts it first.
        Raises StudentError: it is not there, or cannot be converted.
        """
        if ranks != self.world_size and self.engine.zero_optimization_stage() > 0:
            remedy = f"Go on with the {ranks} ranks that wrote it"
            if self.engine.optimizer_name() not in CONVERTIBLE:
                raise StudentError(
                    f"checkpoint {folder / tag} is of {ranks} ranks, and DeepSpeed converts those of "
                    f"{' and '.join(CONVERTIBLE)} alone, not of {self.engine.optimizer_name()}. {remedy}"
                )
            problem = _to_universal(folder, tag) if torch.distributed.get_rank() == 0 else None
            if problem := same_on_all_ranks(problem):
                raise StudentError(f"{problem}. {remedy}")
            tag = _universal(tag)
            self.engine._config.load_universal_checkpoint = True  # read by load_checkpoint alone
        path = self.engine.load_checkpoint(str(folder), tag=tag)[0] if (folder / tag).is_dir() else None
        if path is None:
            raise StudentError(f"checkpoint {folder / tag} is gone: delete the run's directory to start again")

    @contextmanager
    def whole_weights(self) -> Iterator[None]:
        """Within the block, rank 0 sees the module's weights whole; under ZeRO-3 in its host's memory.

        No GPU ever holds more than one whole parameter for it: a student that needs ZeRO-3 would not fit beside the
        optimizer's state. Every rank calls this.
        """
        if self.engine.zero_optimization_stage() < 3:
            yield
            return
        import deepspeed

        parameters = list(self.engine.module.parameters())
        wholes: list[Tensor] = []
        for parameter in parameters:
            with deepspeed.zero.GatheredParameters([parameter]):
                if torch.distributed.get_rank() == 0:
                    wholes.append(parameter.detach().to("cpu", copy=True))
        parts = [parameter.data for parameter in parameters]
        for parameter, whole in zip(parameters, wholes, strict=False):  # of other ranks there are none
            parameter.data = whole
        try:
            yield
        finally:
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.data = part

    @property
    def module(self) -> Any:
        """The student within."""
        return self.engine.module


def on_gpus() -> bool:
    """Whether ranks on this machine compute on GPUs: where there are any, unless DeepSpeed is told to leave them alone.

    DeepSpeed reads the same variable. One place for all who ask: tensors, NCCL and page-locked memory go together.
    """
    return os.environ.get("DS_ACCELERATOR") != "cpu" and torch.cuda.is_available()


@contextmanager
def process_group() -> Iterator[int]:
    """Within the block, this process is one of the ranks that the launcher started (alone where none did): which.

    NCCL where ``on_gpus``, gloo otherwise. A group that is there already (Ray Train makes one) is used, and left as it
    is. On an error that this rank alone met, the others are not waited for: the launcher ends them.
    """
    if torch.distributed.is_initialized():
        _quieten()
        yield torch.distributed.get_rank()
        return
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone | {"MASTER_PORT": str(free_port())})
    import deepspeed

    _quieten()
    if on_gpus():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    deepspeed.init_distributed(dist_backend="nccl" if on_gpus() else "gloo", verbose=False)
    try:
        yield torch.distributed.get_rank()
    except AgreedError:
        _leave()
        raise
    _leave()


def _is_about_the_config(error: Exception) -> bool:
    """Whether DeepSpeed raised it at what it was asked for: its own kind of error is one of many that it uses there."""
    from deepspeed.runtime.config import DeepSpeedConfigError

    kinds = (DeepSpeedConfigError, ValueError, TypeError, AssertionError, AttributeError, KeyError)
    return isinstance(error, kinds) or "Unable to JIT load" in str(error)  # an operator that this machine cannot build


def _quieten() -> None:
    """On CPUs, keep DeepSpeed from compiling at every first start what nothing here needs: gloo does the reductions."""
    if not on_gpus():
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _leave() -> None:
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def free_port() -> int:
    """A port that nobody listens on now."""
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def same_on_all_ranks(value: Any) -> Any:
    """What rank 0 gave, on every rank: others may see files late, or not at all."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: Any) -> list[Any]:
    """What each rank gave, on every rank."""
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def raise_together(error: DecantError | None) -> None:
    """Raise AgreedError on every rank, with what the first rank met that has an error; nothing where none has."""
    for found in gather(str(error) if error else None):
        if found is not None:
            raise AgreedError(found)


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Of each flag, whether any rank has it set."""
    flags_X = torch.tensor(flags, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(flags_X, torch.distributed.ReduceOp.MAX)
    return [bool(flag) for flag in flags_X.tolist()]


def _universal(tag: str) -> str:
    return f"{tag}_universal"


def _to_universal(folder: Path, tag: str) -> str | None:
    """Write a checkpoint again in DeepSpeed's universal form, which any number of ranks can load.

    What is wrong, or None. A process of its own: DeepSpeed's converter forks workers, which no process with GPUs
    or threads of a process group should do.
    """
    source, target, unfinished = folder / tag, folder / _universal(tag), folder / f"{tag}_converting"
    if target.is_dir():
        return None
    shutil.rmtree(unfinished, ignore_errors=True)
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    command += ["--input_folder", str(source), "--output_folder", str(unfinished)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        return f"DeepSpeed cannot convert checkpoint {source} for another number of ranks: {reason}"
    unfinished.rename(target)
    return None
