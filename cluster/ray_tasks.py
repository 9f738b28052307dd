"""Short tasks on the cluster, by Ray Data."""

import logging
import pickle
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from logit_store.errors import DecantError

TASK_RETRIES = 3


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
