"""Everything that touches Ray: start or join a cluster, run tasks, start, call and stop workers.

Only this file imports ray.
"""

import importlib.util
import os
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from cluster.config import ClusterConfig
from cluster.schedule import IN_FLIGHT, Cause
from logit_store.errors import ConfigError, DecantError

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray's job server for the entry point of a submitted job."""

TASK_RETRIES = 3

STOP_S = 10.0
"""Seconds that an idle worker gets to end its engine. Whoever takes longer is killed, and its children with it."""


def in_submitted_job() -> bool:
    """Whether this process is the entry point of a `ray job submit`."""
    return JOB_VARIABLE in os.environ


@contextmanager
def session(config: ClusterConfig) -> Iterator[None]:
    """Join the cluster at ``config.address`` (in a submitted job: the job's own), or start a local one.

    A local cluster listens on loopback alone and asks for a token that nobody else knows. It lives in a short
    temporary folder (Ray's socket paths must stay under 107 bytes) that is removed at the end.
    Raises ConfigError: no cluster answers, or it refuses our token.
    """
    import ray

    options: dict[str, Any] = {"logging_level": "WARNING"}
    with ExitStack() as stack:
        if in_submitted_job():
            options |= {"address": "auto"}
        elif config.address is not None:
            _check_answers(config.address)
            options |= {"address": config.address, "runtime_env": {"py_modules": _own_packages()}}
        else:
            options |= {"address": "local", "include_dashboard": False, "_temp_dir": stack.enter_context(_only_ours())}
        stack.callback(ray.shutdown)
        try:
            ray.init(**options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ConfigError(f"no Ray cluster answers at {options['address']!r}: {reason}") from error
        yield


@contextmanager
def _only_ours() -> Iterator[str]:
    """A folder for a cluster that this process starts: nobody else can reach it while the block lasts.

    Ray binds to loopback only on nodes whose own address is loopback, and takes such a `_node_ip_address` for a
    mistake (services.resolve_ip_for_localhost): what it does on macOS and Windows has to be asked for. Its metrics
    are served without a token even so.
    """
    import ray._private.ray_constants as constants

    ours = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    before, clustered = {name: os.environ.get(name) for name in ours}, constants.ENABLE_RAY_CLUSTER
    folder = tempfile.mkdtemp(prefix="ray", dir=os.environ.get("RAY_TMPDIR", "/tmp"))
    try:
        _set_environment(ours)
        constants.ENABLE_RAY_CLUSTER = False
        yield folder
    finally:
        constants.ENABLE_RAY_CLUSTER = clustered
        _set_environment(before)
        shutil.rmtree(folder, ignore_errors=True)


def _set_environment(variables: Mapping[str, str | None]) -> None:
    """Set (None: remove) variables of authentication, and have Ray read them again: it did so when it was imported."""
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader, Config

    for name, value in variables.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def check_room(config: ClusterConfig) -> None:
    """Refuse a cluster that cannot hold all workers: those without a place would wait for ever. One that grows by
    itself is believed to. Raises ConfigError.
    """
    import ray

    if config.autoscaling:
        return
    have = ray.cluster_resources()
    for resource, each in (("CPU", config.cpus_per_worker), ("GPU", config.gpus_per_worker)):
        if config.workers * each > have.get(resource, 0):
            raise ConfigError(
                f"cluster.workers × cluster.{resource.lower()}s_per_worker = {config.workers * each:g}, but the "
                f"cluster has {have.get(resource, 0):g} {resource}s: lower one of them, join a larger cluster, or say "
                "cluster.autoscaling=true if it grows by itself"
            )


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


class WorkerDied(Exception):  # noqa: N818  (an event that is dealt with, not an error that ends anything)
    """A worker has died, or must be treated as if it had."""

    def __init__(self, cause: Cause, reason: str) -> None:
        super().__init__(reason)
        self.cause, self.reason = cause, reason


class Worker(NamedTuple):
    """A running actor."""

    actor: Any
    placement_group: Any = None
    """What it and its engine's processes live in, where that is more than one node."""


def start_worker(config: ClusterConfig, worker: type, arguments: tuple[Any, ...]) -> Worker:
    """A new actor of class ``worker``. It is never started again by Ray: who died, and of what, is ours to know."""
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker, **config.resources_per_worker}
    options: dict[str, Any] = {"max_concurrency": IN_FLIGHT, "max_restarts": 0, "max_task_retries": 0}
    if not config.multi_node_workers:
        options |= {"num_cpus": needs.pop("CPU"), "num_gpus": needs.pop("GPU"), "resources": needs}
        return Worker(ray.remote(worker).options(**options).remote(*arguments))
    # A bundle of one GPU for each process that the engine starts; near each other, if possible.
    group = ray.util.placement_group([{**needs, "GPU": 1.0}] * int(config.gpus_per_worker), strategy="PACK")
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    options |= {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": inside}
    return Worker(ray.remote(worker).options(**options).remote(*arguments), group)


def call(worker: Worker, method: str, *arguments: Any) -> Any:
    """Begin a call of a worker's method; see ``wait`` and ``result``."""
    return getattr(worker.actor, method).remote(*arguments)


def wait(calls: list[Any], timeout_s: float) -> list[Any]:
    """Those of the calls that have ended, at least one of them unless ``timeout_s`` passes."""
    import ray

    if not calls:
        time.sleep(timeout_s)
        return []
    if not ray.wait(calls, num_returns=1, timeout=timeout_s)[0]:
        return []
    done: list[Any] = ray.wait(calls, num_returns=len(calls), timeout=0)[0]
    return done


def result(call: Any) -> Any:
    """What an ended call has returned. Raises the error of ours that it raised; WorkerDied for anything else."""
    import ray
    from ray import exceptions

    try:
        return ray.get(call)
    except exceptions.RayTaskError as error:
        if isinstance(error.cause, DecantError):
            raise error.cause from None
        raise WorkerDied(Cause.PROCESS, f"{type(error.cause).__name__}: {error.cause}") from error
    except exceptions.OutOfMemoryError as error:
        raise WorkerDied(Cause.MEMORY, _first_line(error)) from error
    except exceptions.RayError as error:  # the actor's process, its node, or the way to it
        raise WorkerDied(_cause_of_death(error), _first_line(error)) from error


def stop_workers(workers: list[Worker], gently: bool) -> None:
    """End actors; ``gently`` gives idle ones some seconds to end their engines."""
    import ray

    if gently and workers:
        ray.wait([worker.actor.stop.remote() for worker in workers], num_returns=len(workers), timeout=STOP_S)
    for worker in workers:
        ray.kill(worker.actor)
        if worker.placement_group is not None:
            ray.util.remove_placement_group(worker.placement_group)


def meter(kind: str, name: str, description: str, tags: tuple[str, ...]) -> Any:
    """A counter or gauge that Ray's agents export to Prometheus."""
    from ray.util import metrics

    return {"counter": metrics.Counter, "gauge": metrics.Gauge}[kind](name, description, tag_keys=("store", *tags))


def _cause_of_death(error: Exception) -> Cause:
    """Whose fault it was, as far as Ray knows: it tells by words only."""
    from ray import exceptions

    text = str(error)
    is_gone = isinstance(error, exceptions.ActorUnavailableError) or getattr(error, "preempted", False)
    if is_gone or "node has died" in text or "killed by `ray.kill`" in text or "owner has died" in text:
        return Cause.OUTSIDE
    return Cause.MEMORY if "memory monitor" in text or "low on memory" in text else Cause.PROCESS


def _first_line(error: Exception) -> str:
    """The part of Ray's many lines that says what happened."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [
        line for line in lines if line.startswith(("The actor is dead", "The actor died because", "Task was killed"))
    ]
    return (told or lines or [type(error).__name__])[0].split(" Some common causes")[0]


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


def _check_answers(address: str) -> None:
    """Refuse within seconds an address where no cluster listens, or one that refuses our token.

    Ray itself would try for minutes, and then not say why. Raises ConfigError.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdigit():
        return  # `auto` and the like, which Ray resolves by itself
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise ConfigError(f"no Ray cluster answers at {address!r}: {error}") from error
    if not address.startswith("ray://"):  # that is another protocol
        _check_token(address)


def _check_token(address: str) -> None:
    """Ask the cluster's books whether they are there. Raises ConfigError: they refuse our token, or are none."""
    import grpc
    from ray._private.grpc_utils import init_grpc_channel
    from ray.core.generated import gcs_service_pb2, gcs_service_pb2_grpc
    from ray.exceptions import AuthenticationError

    remedy = "export RAY_AUTH_MODE=token and the cluster's RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH)"
    with init_grpc_channel(address) as channel:
        stub = gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel)
        try:
            stub.CheckAlive(gcs_service_pb2.CheckAliveRequest(), timeout=10)
        except AuthenticationError as error:
            raise ConfigError(f"{error.message.rstrip('.')}: {remedy}") from error
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                raise ConfigError(f"the Ray cluster at {address!r} refuses our token: {remedy}") from error
            raise ConfigError(f"what listens at {address!r} is no Ray cluster: {error.details()}") from error
