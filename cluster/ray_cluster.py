"""Everything that touches Ray: start or join a cluster, run tasks, run a pool of workers.

Only this file imports ray.
"""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.config import ClusterConfig
from logit_store.errors import ConfigError, DecantError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server for the entry point of a submitted job."""

TASK_RETRIES = 3


def in_submitted_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return JOB_VARIABLE in os.environ


@contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster at ``config.address`` (in a submitted job: the job's own), or start a local one.

    A local cluster lives in a short temporary folder (Ray's socket paths must stay under 107 bytes) that
    is removed at the end. Raises ConfigError: the address does not answer.
    """
    import ray

    quiet = {"configure_logging": True, "logging_level": "WARNING", "log_to_driver": True}
    if in_submitted_job():
        ray.init(address="auto", **quiet)
        folder = None
    elif config.address is not None:
        try:
            ray.init(address=config.address, runtime_env={"py_modules": _own_packages()}, **quiet)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"no Ray cluster answers at {config.address!r}: {' '.join(str(error).split())}"
            ) from error
        folder = None
    else:
        wanted, cores = config.workers * config.cpus_per_worker, os.cpu_count() or 1
        if wanted > cores:
            raise ConfigError(
                f"cluster.workers × cluster.cpus_per_worker = {wanted}, but this machine has {cores} cores: "
                "lower one of them, or join a cluster with --address"
            )
        folder = tempfile.mkdtemp(prefix="ray")
        ray.init(address="local", include_dashboard=False, _temp_dir=folder, **quiet)
    try:
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def map_tasks(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """Results of ``function(*a)`` for each ``a``, run as Ray tasks, as they complete."""
    import ray

    remote = ray.remote(max_retries=TASK_RETRIES)(function)
    pending = [remote.remote(*a) for a in arguments]
    while pending:
        (done,), pending = ray.wait(pending, num_returns=1)
        with _causes():
            result = ray.get(done)
        yield result


def map_workers(
    config: ClusterConfig, worker: type, arguments: tuple[Any, ...], method: str, items: Iterable[Any]
) -> Iterator[Any]:
    """Results of ``worker(*arguments).method(item)`` for each item, on a pool of actors, as they complete.

    An actor that dies is started again, and its item with it, ``config.max_restarts`` times.
    """
    import ray
    from ray.util import ActorPool

    remote = ray.remote(worker).options(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        max_restarts=config.max_restarts,
        max_task_retries=config.max_restarts,
    )
    pool = ActorPool([remote.remote(*arguments) for _ in range(config.workers)])
    results = pool.map_unordered(lambda actor, item: getattr(actor, method).remote(item), list(items))
    with _causes():
        yield from results


@contextmanager
def _causes() -> Iterator[None]:
    """Raise our own error where a task raised one, instead of Ray's wrapping with the worker's traceback."""
    import ray

    try:
        yield
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DecantError):
            raise error.cause from None
        raise
    except ray.exceptions.ActorDiedError as error:
        if isinstance(cause := getattr(error, "cause", None), DecantError):
            raise cause from None
        raise


def _own_packages() -> list[str]:
    """Folders of the packages that workers import: a cluster joined by address runs this very code."""
    specs = [importlib.util.find_spec(name) for name in ("cluster", "logit_store")]
    return [str(Path(spec.origin).parent) for spec in specs if spec and spec.origin]
