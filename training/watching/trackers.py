"""Where a run's figures go for people to look at: TensorBoard always; W&B and MLflow when asked."""

import importlib.util
import math
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from logit_store.config import dump_config
from logit_store.errors import ConfigError, StudentError
from training.config import MlflowConfig, TrainConfig, WandbConfig, WatchConfig
from training.run_folder import RunFolder

PACKAGES = ("wandb", "mlflow")
"""Named alike: the section of `watch`, the package, and the extra that brings it."""

MAX_TAG = 5000
"""Characters that every MLflow server takes as a tag; the run's directory has the config whole."""

PAUSE_S = 1800.0
"""How long a tracker that failed is left alone: MLflow waits minutes for a server that is down, at every step."""


class Tracker(Protocol):
    """Takes figures by step until it is closed."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note the figures of a step; a later call for the same step adds to them."""

    def close(self, failed: bool) -> None:
        """Send and write what is left, and whether an error ended the run."""


def check_trackers(watch: WatchConfig) -> None:
    """Raises ConfigError: what was asked for is not installed."""
    for package in PACKAGES:
        if getattr(watch, package) is not None and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"watch.{package} is set and the package {package} is not installed: pip install 'decant[{package}]', "
                "or remove the section"
            )


def open_trackers(config: TrainConfig, run: RunFolder, step: int) -> list[Tracker]:
    """Every tracker of a run that goes on after ``step``. Raises StudentError: one of them cannot be reached."""
    trackers: list[Tracker] = [TensorBoard(run, step)]
    if config.watch.wandb is not None:
        trackers.append(Spared("wandb", Wandb(config.watch.wandb, config, run)))
    if config.watch.mlflow is not None:
        trackers.append(Spared("mlflow", Mlflow(config.watch.mlflow, config, run)))
    return trackers


class Spared:
    """A tracker of another party, whose outage does not end the run: `metrics.jsonl` has its figures as well."""

    def __init__(self, package: str, tracker: "Wandb | Mlflow") -> None:
        self.package, self.tracker = package, tracker
        self._again_s, self._has_warned = -math.inf, False

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note the figures of a step, unless the tracker failed within the last ``PAUSE_S``."""
        if time.monotonic() >= self._again_s:
            self._try(lambda: self.tracker.log(values, step))

    def close(self, failed: bool) -> None:
        """Send what is left, if the tracker answers."""
        self._try(lambda: self.tracker.close(failed))

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            # What a package raises when nobody answers has no common base in W&B: its own errors, by where they are.
            if not isinstance(error, OSError) and type(error).__module__.split(".")[0] != self.package:
                raise
            self._again_s = time.monotonic() + PAUSE_S
            if not self._has_warned:
                self._has_warned = True
                print(
                    f"warning: watch.{self.package}: {' '.join(str(error).split())}. The run goes on without it, tries "
                    f"again every {PAUSE_S / 60:.0f} minutes, and has all figures in metrics.jsonl",
                    file=sys.stderr,
                )


class TensorBoard:
    """Event files in the run's directory; those of steps that a resumed run takes again are hidden."""

    def __init__(self, run: RunFolder, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.tensorboard), purge_step=step + 1)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note the figures of a step."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        """Write what is left."""
        self.writer.close()


class Wandb:
    """A run of Weights & Biases; a resumed run goes on in the same one, which ignores steps that it has."""

    def __init__(self, wanted: WandbConfig, config: TrainConfig, run: RunFolder) -> None:
        import wandb

        try:
            self.run: Any = wandb.init(
                project=wanted.project,
                entity=wanted.entity,
                name=wanted.name or run.path.name,
                id=run.tracker_id("wandb", lambda: uuid.uuid4().hex),
                resume="allow",
                mode=wanted.mode,
                dir=str(run.path),
                config=config.model_dump(mode="json"),
            )
        except (wandb.errors.Error, OSError) as error:
            raise StudentError(f"watch.wandb: {' '.join(str(error).split())}") from error

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note the figures of a step."""
        self.run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        """Send what is left; a run that did not fail has finished."""
        self.run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow; a resumed run goes on in the same one, where steps that it takes again are there twice."""

    def __init__(self, wanted: MlflowConfig, config: TrainConfig, run: RunFolder) -> None:
        import mlflow

        try:
            self.client: Any = mlflow.MlflowClient(tracking_uri=wanted.tracking_uri)
            self.id = run.tracker_id("mlflow", lambda: self._create(wanted, run.path.name))
            self.client.update_run(self.id, status="RUNNING")
            self.client.set_tag(self.id, "config", dump_config(config)[:MAX_TAG])
        except (mlflow.exceptions.MlflowException, OSError) as error:
            raise StudentError(f"watch.mlflow: {' '.join(str(error).split())}") from error
        self._metric: Any = mlflow.entities.Metric

    def _create(self, wanted: MlflowConfig, name: str) -> str:
        found = self.client.get_experiment_by_name(wanted.experiment)
        experiment = found.experiment_id if found else self.client.create_experiment(wanted.experiment)
        return str(self.client.create_run(experiment, run_name=wanted.name or name).info.run_id)

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Note the figures of a step."""
        now_ms = int(time.time() * 1000)
        self.client.log_batch(self.id, [self._metric(name, value, now_ms, step) for name, value in values.items()])

    def close(self, failed: bool) -> None:
        """Mark the run as finished, or as failed."""
        self.client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")
