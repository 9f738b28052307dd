"""Long-lived workers on the cluster: Ray's actors, started, called and stopped; and the meters that Ray exports."""

import time
from typing import Any, NamedTuple

from cluster.config import ClusterConfig
from cluster.job.schedule import IN_FLIGHT, Cause
from cluster.memory import is_out_of_memory
from logit_store.errors import DecantError

STOP_S = 10.0
"""Seconds that an idle worker gets to end its engine. Whoever takes longer is killed, and its children with it."""


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

    needs = config.reserved
    options: dict[str, Any] = {"max_concurrency": IN_FLIGHT, "max_restarts": 0, "max_task_retries": 0}
    if not config.multi_node_workers:
        options |= {"num_cpus": needs.pop("CPU"), "num_gpus": needs.pop("GPU", 0.0), "resources": needs}
        return Worker(ray.remote(worker).options(**options).remote(*arguments))
    # A bundle of one GPU for each process that the engine starts; near each other, if possible.
    group = ray.util.placement_group([needs] * config.pieces_per_worker, strategy="PACK")
    inside = PlacementGroupSchedulingStrategy(group, 0, placement_group_capture_child_tasks=True)
    options |= {"num_cpus": 0, "num_gpus": 0, "scheduling_strategy": inside}
    return Worker(ray.remote(worker).options(**options).remote(*arguments), group)


def call(worker: Worker, method: str, *arguments: Any) -> Any:
    """Begin a call of a worker's method; see ``wait`` and ``result``."""
    return getattr(worker.actor, method).remote(*arguments)


def wait(calls: list[Any], timeout_s: float) -> list[Any]:
    """Those of the calls that have ended, at least one of them unless ``timeout_s`` passes.

    Raises DecantError: a cluster that this process has started is dead. None of them would ever end, and no call of
    Ray says so; after a minute without its books, Ray ends this process.
    """
    import ray

    node = ray._private.worker._global_node
    dead = {kind for kind, _process in node.dead_processes()} if node is not None else set()
    if dead & {"gcs_server", "raylet"}:
        raise DecantError(f"the local Ray cluster has died ({', '.join(sorted(dead))}): run the same command again")
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
        cause = Cause.MEMORY if is_out_of_memory(error.cause) else Cause.PROCESS
        raise WorkerDied(cause, f"{type(error.cause).__name__}: {error.cause}") from error
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
