"""The vLLM backend: the real engine reads the rows, `cluster.teachers.vllm_capture` chooses targets inside of it.

Only this file imports vllm. The engine runs in processes of its own, as vLLM has it by default: what kills one of them
(a bug of a kernel, the kernel's out-of-memory killer) leaves this process able to say so and to be replaced in good
order. vLLM itself would wait for an engine that was killed for ever, and engines would outlive a killed driver, also
one that was killed while they loaded: `EngineDied` and `vllm_capture.DRIVER` are for these.
"""

import os
import pickle
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from multiprocessing import active_children, connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.config import TeacherConfig
from cluster.job.phases import Phases
from cluster.teachers.targets import Selector
from cluster.teachers.vllm_capture import DRIVER, Taken, TargetCapture, this_machine, with_float32_head
from logit_store import Targets
from logit_store.errors import ConfigError, TeacherError

STEPS_PER_CALL = 8
"""Steps' worth of tokens in a call of the engine: their targets lie in its process until the call ends (35 MB at k = 64
and 8,192 tokens a step), and the last step of a call is rarely full."""

MAX_SEQUENCES = 256
"""Rows in a step at most."""

CPU_BLOCK = 128
"""Tokens in a block of vLLM's KV cache on a CPU."""


class EngineDied(RuntimeError):  # noqa: N818
    """A process of the engine has ended, and no call of this teacher will be answered: build another one."""


class VllmTeacher:
    """A causal language model in vLLM, with a float32 LM head (a bfloat16 head ties adjacent log-probs).

    Raises ConfigError: vllm cannot be imported. TeacherError: vLLM refuses the model, or targets cannot be captured
    from the installed version. EngineDied.
    """

    def __init__(
        self, folder: Path, config: TeacherConfig, selector: Selector, longest: int, executor: str = "mp"
    ) -> None:
        if not config.pickled_weights and not list(folder.glob("*.safetensors")):
            raise TeacherError(
                f"{folder} holds no *.safetensors: convert the weights, or set teacher.pickled_weights=true, "
                "by which code in pickle files may run"
            )
        _set_environment()
        try:
            import vllm
            from vllm.platforms import current_platform
        except ImportError as error:
            raise ConfigError(
                f"teacher.backend is vllm, but vllm cannot be imported ({error}): run `make setup`, "
                "or set teacher.backend=transformers"
            ) from error
        if not (current_platform.is_cpu() or torch.cuda.is_available()):
            raise ConfigError(
                "teacher.backend is vllm, whose build here is for GPUs, and this worker has none: set "
                f"cluster.gpus_per_worker={config.num_gpus}"
            )
        longest = max(longest, 2)  # rows of one token have no position, and what is asked of vLLM here needs one
        self.version, self.phases, self.config = vllm.__version__, Phases(), config
        self.batch_tokens, self.oom_splits = config.batch_tokens, 0
        self._folder = tempfile.TemporaryDirectory(prefix="vllm")
        self._no_memory = Path(self._folder.name) / "out_of_memory"
        """There after a process of the engine on this machine has run out of memory."""
        last_words, before = Path(self._folder.name) / "last_words", active_children()
        os.environ[DRIVER] = f"{os.getpid()} {last_words}"
        try:
            self.engine: Any = vllm.LLM(**engine_arguments(folder, config, longest, executor))
        except ValueError as error:
            raise TeacherError(f"vLLM {self.version} does not take {folder}: {' '.join(str(error).split())}") from error
        except RuntimeError as error:  # which says that the engine's process has failed, and not of what
            reason = last_words.read_text() if last_words.exists() else str(error)
            raise TeacherError(
                f"vLLM {self.version} could not start an engine for {folder}: {' '.join(reason.split())} (more is in "
                "the worker's output above). Where memory is the reason, see teacher.gpu_memory_utilization; a "
                "quantised LM head gives no float32 logits in vLLM: set teacher.backend=transformers"
            ) from error
        finally:
            del os.environ[DRIVER]
        self.processes = [
            os.pidfd_open(pid) for core in active_children() if core not in before for pid in _family(core)
        ]
        try:
            here = (os.getpid(), this_machine())
            self._call(self.engine.collective_rpc, TargetCapture.end_with.__name__, args=here)
            self._call(self.engine.collective_rpc, TargetCapture.tell_of_memory.__name__, args=(str(self._no_memory),))
            expected = self._own_logprobs(longest, selector.vocabulary_size, config.dtype)
            self.capture(selector)
            self._probe(*expected)
        except BaseException:
            self.close()
            raise

    def capture(self, selector: Selector) -> None:
        """From now on ``selector`` chooses the targets. Raises TeacherError: not from this version of vLLM."""
        arguments = (selector.targets.model_dump(), selector.vocabulary_size, selector.labels_id)
        reasons = self._call(self.engine.collective_rpc, TargetCapture.capture_targets.__name__, args=arguments)
        if any(reasons):
            raise TeacherError(
                f"vLLM {self.version}: {max(reasons)}, which decant replaces in V1's model runner. Install the version "
                "of vllm that decant was tested with, 0.32, or set teacher.backend=transformers"
            )

    def score(self, rows: Sequence[np.ndarray], numbers: Sequence[int]) -> list[Targets]:
        """Targets of each row of at least two token ids; ``numbers`` are the rows' numbers in the store.

        Raises EngineDied; TeacherError: a logit is not finite; RuntimeError: too little memory for the choice of
        targets. After the last two the engine is ready for other rows.
        """
        scored: dict[int, Targets] = {}
        # A step's size is the engine's for good: a smaller batch is a call of its own, with nothing else in the engine.
        is_halved = self.batch_tokens < self.config.batch_tokens
        for members in _calls(rows, self.batch_tokens * (1 if is_halved else STEPS_PER_CALL)):
            with self.phases.measure("forward"):
                self._generate([rows[i] for i in members], [numbers[i] for i in members])
                taken = self._take()
            self.phases.add("targets", taken.seconds)
            self.phases.add("forward", -taken.seconds)
            if taken.failure:
                raise taken.failure
            scored |= {i: taken.targets[numbers[i]] for i in members}
        return [scored[i] for i in range(len(rows))]

    def close(self) -> None:
        """End the engine's processes, whatever state they are in: there is nothing in them that is worth a wait."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
        for process in self.processes:
            connection.wait([process])
            os.close(process)
        self.processes = []
        self._folder.cleanup()
        self.engine.llm_engine.engine_core.shutdown()

    def _generate(self, rows: list[np.ndarray], numbers: list[int]) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        prompts = [TokensPrompt(prompt_token_ids=row.tolist()) for row in rows]
        # With `prompt_logprobs` asked for, be it none beside the token's own, the runner calls the captured method.
        common: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "prompt_logprobs": 0}
        params = [SamplingParams(**common, extra_args={"row": int(number)}) for number in numbers]
        outputs: list[Any] = self._call(self.engine.generate, prompts, params, use_tqdm=False)
        return outputs

    def _take(self) -> Taken:
        """What the engine's processes captured: all of it is with the one that holds the logits."""
        answers = self._call(self.engine.collective_rpc, TargetCapture.take_targets.__name__)
        parts: list[Taken] = [pickle.loads(answer) for answer in answers]
        targets = {row: found for part in parts for row, found in part.targets.items()}
        failure = next((part.failure for part in parts if part.failure), None)
        return Taken(targets, max(part.seconds for part in parts), failure)

    def _own_logprobs(self, longest: int, vocabulary_size: int, dtype: str) -> tuple[np.ndarray, np.ndarray, float]:
        """A row of a few tokens; log-probs of all but its first by vLLM's own code; by how much ours may differ."""
        ids_T = np.arange(min(longest, 8), dtype=np.int32) % vocabulary_size
        (output,) = self._generate([ids_T], [0])
        entries = zip(ids_T[1:].tolist(), output.prompt_logprobs[1:], strict=True)
        own_P = np.array([position[token].logprob for token, position in entries])
        # One unit in the last place of the scoring dtype, for matrix products of other shapes, times 8.
        return ids_T, own_P, 8 * torch.finfo(getattr(torch, dtype)).eps * max(1.0, float(np.abs(own_P).max()))

    def _probe(self, ids_T: np.ndarray, own_P: np.ndarray, allowed: float) -> None:
        """Refuse a version of vLLM whose steps are not what the captured method takes them for."""
        (targets,) = self.score([ids_T], [0])
        error = float(np.abs(targets.next_logprob_P - own_P).max())
        if not error <= allowed:
            raise TeacherError(
                f"vLLM {self.version}: captured log-probs differ from its own by {error:.2g} (allowed: {allowed:.2g}). "
                "Install the version of vllm that decant was tested with, 0.32, or set "
                "teacher.backend=transformers"
            )
        self.phases.take()

    def _call(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """``function(*arguments)`` of the engine, or EngineDied as soon as one of its processes has ended."""
        from vllm.v1.engine.exceptions import EngineDeadError

        answer: Future[Any] = Future()

        def run() -> None:
            try:
                answer.set_result(function(*arguments, **options))
            except BaseException as error:  # noqa: BLE001  (it is raised where the answer is awaited)
                answer.set_exception(error)

        threading.Thread(target=run, daemon=True).start()
        while True:
            try:
                return answer.result(timeout=1.0)
            except EngineDeadError as error:
                raise self._death(f"vLLM's engine has stopped: {error}") from error
            except TimeoutError:
                if answer.done():
                    raise
                if connection.wait(self.processes, timeout=0):
                    raise self._death("a process of vLLM's engine was killed") from None

    def _death(self, what: str) -> EngineDied:
        """The engine's end, and whether it was for want of memory: a smaller batch may then do."""
        return EngineDied("a step of vLLM's engine ran out of memory" if self._no_memory.exists() else what)


def _set_environment() -> None:
    """What vLLM reads from the environment, also in the processes that it starts."""
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"  # targets are captured from V1's
    os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # a fork cannot use GPUs that this process has looked at
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # a worker's log lands in the driver's terminal
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # Left alone, all engines of a machine without GPUs bind their threads to the same cores.
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


def engine_arguments(folder: Path, config: TeacherConfig, longest: int, executor: str) -> dict[str, Any]:
    """What the config means to vLLM; ``executor`` (``mp``, ``ray``) starts the processes of a model on several GPUs."""
    from vllm.platforms import current_platform

    arguments = {
        "model": str(folder),
        "skip_tokenizer_init": True,
        "dtype": config.dtype,
        "quantization": config.quantization,
        "hf_overrides": with_float32_head,
        "trust_remote_code": config.trust_remote_code,
        "load_format": "auto" if config.pickled_weights else "safetensors",
        "max_model_len": longest + 1,  # the engine refuses a prompt as long as its context
        "max_num_batched_tokens": config.batch_tokens,
        "max_num_seqs": min(MAX_SEQUENCES, config.batch_tokens),
        # A row that fits in a step is never split: where a split falls depends on when rows arrive.
        "enable_chunked_prefill": longest + 1 > config.batch_tokens,
        "enable_prefix_caching": False,
        "tensor_parallel_size": config.tensor_parallel,
        "pipeline_parallel_size": config.pipeline_parallel,
        # Left to itself vLLM would choose Ray within any actor that has GPUs of a placement group.
        "distributed_executor_backend": executor if config.num_gpus > 1 else None,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "worker_extension_cls": f"{TargetCapture.__module__}.{TargetCapture.__qualname__}",
        "disable_log_stats": True,
        "seed": 0,
    }
    if current_platform.is_cpu():
        os.environ["OMP_NUM_THREADS"] = str(max(1, torch.get_num_threads() // config.num_gpus))
        arguments["kv_cache_memory_bytes"] = _kv_cache_bytes(folder, config, longest)
        # Compiling takes a minute, and steps are as fast without it; but a pipeline's stages need that warm-up.
        arguments["enforce_eager"] = config.pipeline_parallel == 1
    else:
        # They are of steps of at most 512 tokens, where one of prompts has batch_tokens; to capture them takes memory
        # and time at every start.
        arguments["compilation_config"] = {"cudagraph_mode": "NONE"}
    return arguments


def _kv_cache_bytes(folder: Path, config: TeacherConfig, longest: int) -> int:
    """KV cache of two steps: no row is in the engine for longer than its prompt takes.

    On a CPU vLLM would take ``gpu_memory_utilization`` of the machine's memory, for each worker on it.
    """
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code).get_text_config()
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    width = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    per_token = 2 * model.num_hidden_layers * heads * width * getattr(torch, config.dtype).itemsize
    num_tokens = 2 * max(config.batch_tokens, longest + 1) + MAX_SEQUENCES * CPU_BLOCK // 8
    return int(per_token * num_tokens)


def _calls(rows: Sequence[np.ndarray], call_tokens: int) -> Iterator[list[int]]:
    """Consecutive rows' indices, with at most ``call_tokens`` tokens (or one row)."""
    members: list[int] = []
    num_tokens = 0
    for i, row in enumerate(rows):
        if members and num_tokens + len(row) > call_tokens:
            yield members
            members, num_tokens = [], 0
        members.append(i)
        num_tokens += len(row)
    if members:
        yield members


def _family(core: BaseProcess) -> list[int]:
    """A process that vLLM has started, and those that this one has."""
    import psutil

    process = psutil.Process(core.pid)
    return [process.pid, *(child.pid for child in process.children(recursive=True))]
