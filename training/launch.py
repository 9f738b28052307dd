"""`decant train`: check everything once, then let the `deepspeed` launcher, or Ray Train, start the ranks."""

import importlib.util
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from logit_store.config import load_config
from logit_store.errors import ConfigError, StudentError
from training.config import TrainConfig
from training.stop import StopRequest

if TYPE_CHECKING:
    from training.run_folder import RunFolder

REFUSED = 2
"""Exit code of a rank that met an error of ours, which it has printed."""


def launch(config_path: str, overrides: Sequence[str]) -> int:
    """Check the config and its inputs, then run the ranks; their exit code.

    Raises ConfigError, StoreError, StudentError before any rank is started.
    """
    from training.prepare import prepare
    from training.run_folder import RunFolder

    config = load_config(TrainConfig, config_path, overrides)
    _check_not_shadowed()
    prepared = prepare(config)
    run = RunFolder(config.run.path)
    run.check(config, prepared.identity)
    if (result := run.result()) is not None:
        print(f"{config.run.path} is finished: held-out loss {result['held_out']['loss']:.4f}")
        return 0
    for warning in prepared.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    on_ray = config.launcher.kind == "ray"
    code = _on_ray(config, run) if on_ray else _on_this_machine(config, config_path, overrides, run)
    if code == 0 and (result := run.result()) is not None:
        print(
            f"{config.run.path}: held-out loss {result['held_out']['loss']:.4f} after {result['tokens']:,} tokens "
            f"({result['tokens_per_s']:,.0f} tok/s); model in {run.model}"
        )
    return code


def _on_ray(config: TrainConfig, run: "RunFolder") -> int:
    from training.ray_train import run_on_ray

    was_asked = run_on_ray(config)
    if run.result() is None:
        if not (was_asked and run.is_saved()):
            raise StudentError(
                f"the ranks have ended, and what they did is not in {run.path.absolute()}: on Ray, run.path must be on "
                "a file system that this machine and all nodes share"
            )
        print("decant train: stopped, and saved: the same command goes on from there", file=sys.stderr)
    return 0


def _on_this_machine(config: TrainConfig, config_path: str, overrides: Sequence[str], run: "RunFolder") -> int:
    """Run the `deepspeed` launcher; its exit code, or 0 where it was asked to stop and what was done is saved."""
    from training.engine import free_port, on_gpus

    # DeepSpeed takes each NUMA node of a machine without GPUs for an accelerator.
    ranks = config.launcher.ranks or (None if on_gpus() else 1)
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", str(free_port())),
        *(("--num_accelerators", str(ranks)) if ranks is not None else ()),
        *("--quiet", "--log_level", "error"),
        *("--module", "training", "train", config_path, *overrides),
    ]
    with StopRequest() as stop:
        code = _wait(subprocess.Popen(command, env=_environment(ranks)), stop)
    # Ranks that are told to stop before they listen, and a launcher that is told as well, do not end with 0.
    return 0 if stop.asked and code != REFUSED and run.is_saved() else code


def _wait(launcher: "subprocess.Popen[bytes]", stop: StopRequest) -> int:
    """The exit code of the `deepspeed` launcher. A request to stop goes to the ranks alone.

    The launcher has two processes, the second of which starts the ranks. On SIGTERM the first would end at once, and
    the second report a failure, whatever its ranks do.
    """
    import psutil

    ranks: list[psutil.Process] = []
    while True:
        try:
            code = launcher.wait(timeout=0.2)
            break
        except subprocess.TimeoutExpired:
            if stop.asked and not ranks:
                # Any of them may end while they are looked for: what is left is found the next time, or is not there.
                with suppress(psutil.NoSuchProcess):
                    ranks = [rank for second in psutil.Process(launcher.pid).children() for rank in second.children()]
                for rank in ranks:
                    with suppress(psutil.NoSuchProcess):
                        rank.terminate()
    psutil.wait_procs(ranks)  # they may outlive a launcher that was told to stop as well
    return code


def _environment(ranks: int | None) -> dict[str, str]:
    """The launcher leaves OMP_NUM_THREADS unset, and every rank would take every core: far slower than none."""
    import torch

    from training.engine import on_gpus

    threads = max(1, (os.cpu_count() or 1) // (ranks or torch.cuda.device_count()))
    accelerator = {} if on_gpus() else {"DS_ACCELERATOR": "cpu"}
    return {"OMP_NUM_THREADS": str(threads), **accelerator, **os.environ}


def _check_not_shadowed() -> None:
    """`-m training` looks into the current folder first: refuse a `training` there that is not ours."""
    here = Path.cwd() / "training"
    spec = importlib.util.find_spec("training")
    ours = Path(spec.origin).parent if spec and spec.origin else None
    if (here.is_dir() or here.with_suffix(".py").exists()) and ours is not None and here.resolve() != ours.resolve():
        raise ConfigError(f"{here} would be started in place of decant's own `training`: run from another folder")
