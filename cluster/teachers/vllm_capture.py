"""What runs inside vLLM's worker process: targets are chosen there, on its device, before anything leaves it.

vLLM's own prompt log-probs cost a softmax over all scheduled tokens at once, end as Python objects, and know nothing
but the top k at temperature 1. `TargetCapture` is mixed into vLLM's worker class (its `worker_extension_cls`) and puts
a function of ours in the place of `GPUModelRunner._get_prompt_logprobs_dict` (vllm/v1/worker/gpu_model_runner.py),
which V1's model runner calls with the hidden states of each step. vllm itself is not imported here. A process of the
engine that imports this file, which is before it loads its part of the model, watches its driver from then on.

Shapes: S tokens scheduled in a step, N positions of a chunk, P positions of a row, D hidden, W teacher rows.
"""

import inspect
import logging
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import wraps
from multiprocessing import connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cluster.config import TargetsConfig
from cluster.memory import is_out_of_memory
from cluster.teachers.targets import CHUNK_BYTES, Selector, chunk_positions
from logit_store import Targets

STEPS = ("execute_model", "sample_tokens")
"""Methods of the model runner in which memory may run out."""

DRIVER = "DECANT_VLLM_DRIVER"
"""In the environment of an engine's processes: the number of the process that started it, and a file for last words."""

HOOK, SIGNATURE = "_get_prompt_logprobs_dict", ["self", "hidden_states", "num_scheduled_tokens"]
"""The method that is replaced. Only V1's runner has it."""


class TargetCapture:
    """Methods that vLLM's worker gains; `collective_rpc` calls them by name in each worker process."""

    def end_with(self, driver: int, machine: str) -> None:
        """End the engine when the process ``driver`` of ``machine`` ends, which may have been killed. This is for Ray's
        actors, which inherit no ``DRIVER``; those on other machines Ray ends with the one that owns them.
        """
        if DRIVER not in os.environ and machine == this_machine():
            _watch(driver)

    def tell_of_memory(self, place: str) -> None:
        """Leave a file at ``place`` where this process runs out of memory in a step: the engine ends by that, and its
        driver is not told why.
        """
        worker: Any = self
        for name in STEPS:
            if (step := getattr(worker.model_runner, name, None)) is not None:
                setattr(worker.model_runner, name, _telling(step, Path(place)))

    def capture_targets(self, targets: dict[str, Any], vocabulary_size: int, labels_id: str) -> str:
        """From now on choose targets of prompts. Returns why this model runner cannot, or nothing."""
        worker: Any = self
        if reason := why_unsupported(type(worker.model_runner)):
            return reason
        selector = Selector(TargetsConfig(**targets), vocabulary_size, labels_id)
        # Logits are gathered over tensor-parallel ranks: all of them compute, the first one chooses. Of the stages of a
        # pipeline only the last one comes to the hook.
        self.captured = Capture(worker.model_runner, selector, chooses=worker.is_driver_worker)
        setattr(worker.model_runner, HOOK, self.captured.step)
        return ""

    def take_targets(self) -> bytes:
        """What was captured since the last call, pickled: vLLM's own transport has no arrays without their type."""
        return pickle.dumps(self.captured.take())


def with_float32_head(config: Any) -> Any:
    """The model's config, by which vLLM computes logits in float32. A function of this file, because the engine's
    processes import it with the config, and so begin to watch their driver with the first thing that they do.
    """
    config.head_dtype = "float32"
    return config


class Taken(NamedTuple):
    """What a worker has captured."""

    targets: dict[int, Targets]
    """Of each row that is complete, by its number in the store."""
    seconds: float
    """Spent with LM head and choice."""
    failure: Exception | None
    """Why targets of some row could not be chosen."""


class _Span(NamedTuple):
    """Positions of one row that a step brings hidden states for."""

    row: int
    start: int
    """First of these positions."""
    offset: int
    """Where its hidden state is among the step's."""
    next_ids_P: np.ndarray


class Capture:
    """Chooses targets from the hidden states of each step of the engine."""

    def __init__(self, runner: Any, selector: Selector, chooses: bool) -> None:
        self.runner, self.selector, self.chooses = runner, selector, chooses
        self._reset()

    def _reset(self) -> None:
        self.parts: dict[int, list[Targets]] = {}
        self.seconds = 0.0
        self.failure: Exception | None = None

    def take(self) -> Taken:
        """All rows since the last call. The engine must be idle."""
        whole = {} if self.failure else {row: Targets.join(parts) for row, parts in self.parts.items()}
        taken = Taken(whole, self.seconds, self.failure)
        self._reset()
        return taken

    def step(self, hidden_SD: Tensor, num_scheduled_tokens: Mapping[str, int]) -> dict[str, Any]:
        """Stands in for vLLM's method: the same arguments, and no log-probs for vLLM to pass on."""
        spans = list(self._spans(num_scheduled_tokens))
        if spans:
            self.runner._sync_device()  # the layers' time is not ours
            started = time.perf_counter()
            self._choose(hidden_SD, spans)
            self.seconds += time.perf_counter() - started
        return {}

    def _spans(self, num_scheduled_tokens: Mapping[str, int]) -> Iterator[_Span]:
        """The scheduled positions; a prompt may be spread over steps, and a preempted one begins again."""
        waiting = self.runner.num_prompt_logprobs
        for request_id in list(waiting):
            if request_id not in num_scheduled_tokens:
                continue
            request = self.runner.requests[request_id]
            start, num_positions = request.num_computed_tokens, len(request.prompt_token_ids) - 1
            end = min(start + num_scheduled_tokens[request_id], num_positions)
            if start + num_scheduled_tokens[request_id] > num_positions:
                del waiting[request_id]  # the last token has no position: the prompt is complete
            if start < end:
                row = request.sampling_params.extra_args["row"]
                offset = int(self.runner.query_start_loc.np[self.runner.input_batch.req_id_to_index[request_id]])
                next_ids_P = np.asarray(request.prompt_token_ids[start + 1 : end + 1], np.int64)
                yield _Span(row, start, offset, next_ids_P)

    def _choose(self, hidden_SD: Tensor, spans: list[_Span]) -> None:
        """Add the targets of the spans to their rows, in chunks of positions that go over the rows' ends."""
        counts = np.array([len(span.next_ids_P) for span in spans])
        within_N = np.concatenate([np.arange(count) for count in counts])
        columns = (
            within_N + np.repeat([span.offset for span in spans], counts),
            np.concatenate([span.next_ids_P for span in spans]),
            np.repeat([span.row for span in spans], counts),
            within_N + np.repeat([span.start for span in spans], counts),
        )
        places_N, *chosen_by = (torch.from_numpy(column).to(hidden_SD.device) for column in columns)
        chunk = chunk_positions(self.runner.model_config.get_vocab_size(), CHUNK_BYTES[hidden_SD.device.type])
        parts = []
        for at in (slice(start, start + chunk) for start in range(0, len(places_N), chunk)):
            logits_NW = self.runner.model.compute_logits(hidden_SD[places_N[at]])
            if self.chooses and not self.failure:
                parts += self._select(logits_NW, *(column[at] for column in chosen_by))
        if self.chooses and not self.failure:
            for span, targets in zip(spans, Targets.join(parts).split(counts.tolist()), strict=True):
                self._add(span, targets)

    def _select(self, logits_NW: Tensor, *chosen_by: Tensor) -> list[Targets]:
        """The targets, or none after a failure, which must not end the engine: `VllmTeacher.score` raises it."""
        try:
            return [self.selector.select(logits_NW, *chosen_by)]
        except Exception as error:  # noqa: BLE001  (logits that are NaN, too little memory: nothing that ends the engine)
            if not is_out_of_memory(error) or len(logits_NW) == 1:
                self.failure = error
                return []
        # Outside of the handler, whose traceback holds on to the tensors of the failed attempt.
        if logits_NW.device.type == "cuda":
            torch.cuda.empty_cache()
        halves = zip(logits_NW.tensor_split(2), *(column.tensor_split(2) for column in chosen_by), strict=True)
        return [targets for half in halves for targets in self._select(*half)]

    def _add(self, span: _Span, targets: Targets) -> None:
        parts = self.parts.setdefault(span.row, [])
        if span.start == 0:
            parts.clear()
        assert sum(len(part.next_logprob_P) for part in parts) == span.start
        parts.append(targets)


def why_unsupported(runner: type) -> str:
    """Why targets cannot be captured from this class of model runner; nothing if they can."""
    hook = getattr(runner, HOOK, None)
    if hook is None:
        return f"{runner.__module__}.{runner.__qualname__} has no {HOOK}"
    found = list(inspect.signature(hook).parameters)
    return "" if found == SIGNATURE else f"{runner.__module__}.{runner.__qualname__}.{HOOK} takes {found}"


def _telling(step: Callable[..., Any], place: Path) -> Callable[..., Any]:
    """The same, but that ``place`` exists after it ran out of memory."""

    @wraps(step)
    def told(*arguments: Any, **options: Any) -> Any:
        try:
            return step(*arguments, **options)
        except (MemoryError, RuntimeError) as error:
            if is_out_of_memory(error):
                place.touch()
            raise

    return told


def this_machine() -> str:
    """Where a process number means the same process: this start of this machine, in this container."""
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"


def _watch(driver: int) -> None:
    """From now on end the engine when the process ``driver`` ends, or has ended."""
    import psutil

    own, parent = os.getpid(), os.getppid()
    if own != driver:
        has_core = parent != driver and psutil.Process(parent).ppid() == driver  # or is the engine's core itself
        threading.Thread(target=_end_with, args=(driver, [parent, own] if has_core else [own]), daemon=True).start()


def _end_with(driver: int, processes: list[int]) -> None:
    """Wait for the end of ``driver``, then kill ``processes``, of which this one is the last."""
    with suppress(ProcessLookupError):  # it has ended already
        connection.wait([os.pidfd_open(driver)])
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


class _LastWords(logging.Handler):
    """Leaves the first exception that vLLM logs in a file: its driver is not told why an engine cannot start."""

    def __init__(self, place: Path) -> None:
        super().__init__(logging.ERROR)
        self.place = place

    def emit(self, record: logging.LogRecord) -> None:
        """Called by `logging`."""
        error = record.exc_info and record.exc_info[1]
        if error and not self.place.exists():
            with suppress(OSError):
                self.place.write_text(f"{type(error).__name__}: {error}")


if DRIVER in os.environ:
    _driver, _place = os.environ[DRIVER].split(" ", 1)
    _watch(int(_driver))
    logging.getLogger("vllm").addHandler(_LastWords(Path(_place)))
