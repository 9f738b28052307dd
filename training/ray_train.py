"""Ranks as workers of Ray Train, on a cluster that is there already. Only this file of the trainer imports ray."""

import importlib.util
import logging
import os
import shutil
from pathlib import Path
from typing import Any

from logit_store.errors import ConfigError, DecantError, StudentError
from training.config import TrainConfig
from training.run_folder import writing
from training.stop import StopRequest


def run_on_ray(config: TrainConfig) -> bool:
    """Run the ranks on the cluster at `launcher.address`; a worker that dies is replaced `launcher.restarts` times.

    Whether they were asked to stop.

    Checkpoints are the run's own, in `run.path`, which all nodes share: Ray keeps none. What starts again goes on from
    the newest. On SIGTERM the ranks find a note there, save and end.
    Raises ConfigError: no cluster answers, or it has no room. StudentError: the run failed.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = with_absolute_paths(config)
    # What was not set stays so: it matters to keys that exclude each other, and beside a DeepSpeed JSON.
    document = config.model_dump(mode="json", exclude_unset=True)
    launcher = config.launcher
    assert launcher.ranks is not None
    notes = Path(config.run.path) / ".ray"  # what Ray asks for, although it keeps no checkpoint; and the note to stop
    stop = notes / "stop"
    try:
        ray.init(launcher.address, runtime_env={"py_modules": _own_packages()}, logging_level="WARNING")
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise ConfigError(f"no Ray cluster answers at launcher.address {launcher.address!r}: {why}") from error
    try:
        with writing(notes):
            notes.mkdir(parents=True, exist_ok=True)
            stop.unlink(missing_ok=True)  # of a driver that was killed
        use_gpu = ray.cluster_resources().get("GPU", 0) > 0
        _check_room(launcher.ranks, "GPU" if use_gpu else "CPU", ray.cluster_resources())
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"config": document, "stop": str(stop)},
            scaling_config=ScalingConfig(num_workers=launcher.ranks, use_gpu=use_gpu),
            run_config=RunConfig(
                name="ray-train",
                storage_path=str(notes),
                failure_config=FailureConfig(max_failures=launcher.restarts),
            ),
        )
        with StopRequest(stop) as request:  # after Ray, which takes the signal for itself when it begins
            trainer.fit()
            return request.asked
    except TrainingFailedError as error:
        raise StudentError(reason(error)) from error
    finally:
        ray.shutdown()
        shutil.rmtree(notes, ignore_errors=True)


def with_absolute_paths(config: TrainConfig) -> TrainConfig:
    """The config for workers, whose working directory is another: paths that are here are made absolute."""

    def absolute(path: str | None) -> str | None:
        return str(Path(path).absolute()) if path is not None and Path(path).exists() else path

    run = config.run.model_copy(update={"path": str(Path(config.run.path).absolute())})
    stores: dict[str, Any] = {"store": absolute(config.data.store)}
    for name in ("teachers", "mixture"):
        entries = getattr(config.data, name) or []
        stores[name] = [e.model_copy(update={"store": absolute(e.store)}) for e in entries] or None
    data, origin = config.data.model_copy(update=stores), config.student.from_teacher
    models = {"model": absolute(config.student.model)}
    student = config.student.model_copy(
        update={**models, "from_teacher": origin and origin.model_copy(update={"model": absolute(origin.model)})}
    )
    changes = {"run": run, "data": data, "student": student, "deepspeed": absolute(config.deepspeed)}
    return config.model_copy(update=changes)


def _rank(loop: dict[str, Any]) -> None:
    """One worker's rank. Ray has joined the ranks and set their environment."""
    from logit_store.config import parse_config
    from training.engine import on_gpus
    from training.trainer import train

    if not on_gpus():
        os.environ["DS_ACCELERATOR"] = "cpu"
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    train(parse_config(TrainConfig, loop["config"], "the driver's config"), StopRequest(Path(loop["stop"])))


def _check_room(ranks: int, resource: str, have: dict[str, float]) -> None:
    """Refuse what would wait for ever. Raises ConfigError."""
    if ranks > have.get(resource, 0):
        raise ConfigError(f"launcher.ranks = {ranks}, but the cluster has {have.get(resource, 0):g} {resource}s")


def reason(error: Exception) -> str:
    """What the first worker that failed said: our own errors are for people already."""
    for failure in getattr(error, "worker_failures", {}).values():
        cause = getattr(failure, "_base_exc", failure)  # Ray wraps it with its traceback
        if isinstance(cause, DecantError):
            return str(cause)
    return f"Ray Train gave up: {' '.join(str(error).split())[:2000]}"


def _own_packages() -> list[str]:
    """Folders of the packages that workers import: the cluster runs this very code."""
    specs = [importlib.util.find_spec(name) for name in ("training", "logit_store")]
    return [str(Path(spec.origin).parent) for spec in specs if spec and spec.origin]
