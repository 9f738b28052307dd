"""Everything that touches Ray: start or join a cluster, run tasks, run a pool of workers.

Only this file imports ray.
"""

import importlib.util
import logging
import os
import pickle
import shutil
import socket
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
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
    is removed at the end. Raises ConfigError: no cluster answers.
    """
    import ray

    options: dict[str, Any] = {"logging_level": "WARNING"}
    folder = None
    if in_submitted_job():
        options |= {"address": "auto"}
    elif config.address is not None:
        _check_listening(config.address)
        options |= {"address": config.address, "runtime_env": {"py_modules": _own_packages()}}
    else:
        folder = tempfile.mkdtemp(prefix="ray", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
        options |= {"address": "local", "include_dashboard": False, "_temp_dir": folder}
    try:
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"no Ray cluster answers at {options['address']!r}: {reason}") from error
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def check_room(config: ClusterConfig) -> None:
    """Refuse a cluster that cannot hold all workers: those without a place would wait for ever.

    Raises ConfigError.
    """
    import ray

    have = ray.cluster_resources()
    for resource, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        if config.workers * each > have.get(resource, 0):
            raise ConfigError(
                f"cluster.workers × cluster.{resource.lower()}s_per_worker = {config.workers * each:g}, but the "
                f"cluster has {have.get(resource, 0):g} {resource}s: lower one of them, or join a larger cluster"
            )


def map_tasks(function: Callable[[Any, Any], Any], shared: Any, items: Sequence[Any]) -> Iterator[Any]:
    """Results of ``function(shared, item)`` for each item, run as tasks of Ray Data, as they complete.

    ``shared`` crosses the driver once, by the object store. Ray Data bounds how many tasks are in flight; a task
    whose process or node dies is run again, ``TASK_RETRIES`` times. Raises what the function raises of ours, and
    DecantError for a task that died too often.
    """
    import ray

    if not items:
        return
    _quiet_ray_data()
    rows = [{"item": pickle.dumps(item)} for item in items]
    dataset = ray.data.from_items(rows, override_num_blocks=len(rows))  # one block, one task
    with warnings.catch_warnings():
        # Without `max_retries`, which only this deprecated way sets, Ray Data would try for ever.
        warnings.filterwarnings("ignore", message="`ray_remote_args` is deprecated")
        results = dataset.map(_run_task, fn_args=(function, ray.put(shared)), num_cpus=1, max_retries=TASK_RETRIES)
    try:
        for row in results.iter_rows():
            result = pickle.loads(row["result"])
            if isinstance(result, DecantError):
                raise result
            yield result
    except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError) as error:
        reason = " ".join(str(error).split())
        raise DecantError(
            f"a task died {TASK_RETRIES + 1} times and was given up ({reason}). What is committed stays: run the same "
            "command again when the cause is gone"
        ) from error


def _run_task(row: dict[str, Any], function: Callable[[Any, Any], Any], shared: Any) -> dict[str, Any]:
    """One row of Ray Data; our own errors are a result, for which no task is run again and no traceback is printed."""
    import ray

    try:
        result = function(ray.get(shared), pickle.loads(row["item"]))
    except DecantError as error:
        result = error
    return {"result": pickle.dumps(result)}


def _quiet_ray_data() -> None:
    """No bars and lines of Ray Data on the terminal, where they would tear ours; what fails is raised to us anyway."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)


def map_workers(
    config: ClusterConfig, worker: type, arguments: tuple[Any, ...], method: str, items: Iterable[Any]
) -> Iterator[Any]:
    """Results of ``worker(*arguments).method(item)`` for each item, on a pool of actors, as they complete.

    An actor that dies is started again, and its item with it, ``config.max_attempts`` times.
    """
    import ray
    from ray.util import ActorPool

    remote = ray.remote(worker).options(
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker,
        max_restarts=config.max_attempts,
        max_task_retries=config.max_attempts,
    )
    todo = list(items)
    pool = ActorPool([remote.remote(*arguments) for _ in range(min(config.workers, len(todo)))])
    results = pool.map_unordered(lambda actor, item: getattr(actor, method).remote(item), todo)
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


def _own_packages() -> list[str]:
    """Folders of the packages that workers import: a cluster joined by address runs this very code."""
    specs = [importlib.util.find_spec(name) for name in ("cluster", "logit_store")]
    return [str(Path(spec.origin).parent) for spec in specs if spec and spec.origin]


def _check_listening(address: str) -> None:
    """Refuse an address where nothing listens within seconds; Ray itself would try for minutes. Raises ConfigError."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto` and the like, which Ray resolves by itself
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address!r}: {error}") from error
