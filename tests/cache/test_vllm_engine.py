"""The life of a vLLM engine: how it is asked for, when it is refused, and that it ends with whoever started it."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from cluster.config import CacheConfig, TargetsConfig, TeacherConfig
from cluster.teachers.targets import Selector
from cluster.teachers.vllm_capture import DRIVER, TargetCapture, with_float32_head
from logit_store.config import parse_config
from logit_store.errors import ConfigError, TeacherError
from tests.cache.test_teachers import LENGTHS, K, V, dense_logprobs, random_rows, run_vllm
from tests.toy import ROOT


def test_vllm_is_told_what_the_config_says(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm import EngineArgs
    from vllm.platforms import current_platform

    from cluster.teachers.vllm_teacher import engine_arguments

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    large = TeacherConfig(
        model="", backend="vllm", dtype="float16", quantization="fp8", tensor_parallel=2, pipeline_parallel=3,
        gpu_memory_utilization=0.4, batch_tokens=4096, trust_remote_code=True, pickled_weights=True,
    )  # fmt: skip
    plain = TeacherConfig(model="", backend="vllm", batch_tokens=100)
    always = {"enable_prefix_caching": False, "hf_overrides": with_float32_head, "seed": 0}
    of_large = {
        "model": str(teacher), "dtype": "float16", "quantization": "fp8", "tensor_parallel_size": 2,
        "pipeline_parallel_size": 3, "distributed_executor_backend": "ray", "gpu_memory_utilization": 0.4,
        "max_model_len": 1001, "max_num_batched_tokens": 4096, "max_num_seqs": 256, "enable_chunked_prefill": False,
        "trust_remote_code": True, "load_format": "auto",
    }  # fmt: skip
    of_plain = {
        "dtype": "bfloat16", "quantization": None, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "distributed_executor_backend": None, "gpu_memory_utilization": 0.85, "max_num_batched_tokens": 100,
        "max_num_seqs": 100, "enable_chunked_prefill": True, "trust_remote_code": False, "load_format": "safetensors",
    }  # fmt: skip
    on_cpu = engine_arguments(teacher, plain, 1000, "mp")
    assert on_cpu.items() >= (always | of_plain | {"enforce_eager": True}).items()
    assert on_cpu["kv_cache_memory_bytes"] > 0
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda _platform: False)
    for config, expected in ((large, of_large), (plain, of_plain)):
        on_gpu = engine_arguments(teacher, config, 1000, "ray")
        assert on_gpu.items() >= (always | expected).items()
        assert not on_gpu.keys() & {"enforce_eager", "kv_cache_memory_bytes"}
        parsed = EngineArgs(**on_gpu)
        assert parsed.compilation_config.cudagraph_mode.name == "NONE"
        assert parsed.tensor_parallel_size == config.tensor_parallel


def test_a_share_of_a_gpu_is_too_little_for_vllm(cache_config: dict[str, Any]) -> None:
    shared = {"cluster": {"gpus_per_worker": 0.5}}
    parse_config(CacheConfig, {**cache_config, **shared}, "test")
    with pytest.raises(ConfigError, match=r"gpus_per_worker = 0\.5, but each vLLM engine takes .*: set it to 1"):
        parse_config(CacheConfig, {**cache_config, **shared, "teacher": {"model": "m", "backend": "vllm"}}, "test")


def test_vllm_says_how_long_its_engine_took(vllm_teacher: Any) -> None:
    vllm_teacher.phases.take()
    vllm_teacher.score(random_rows(*LENGTHS), range(len(LENGTHS)))
    seconds = vllm_teacher.phases.take()
    assert set(seconds) == {"forward", "targets"}
    assert min(seconds.values()) > 0


def test_vllm_takes_pickled_weights_only_when_asked_to(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(TeacherError, match=r"holds no \*.safetensors: .*pickled_weights=true"):
        run_vllm(tmp_path, "float32")


def test_vllm_runners_of_other_kinds_are_refused_by_name(vllm_teacher: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner as SecondRunner

    from cluster.teachers import vllm_capture

    assert vllm_capture.why_unsupported(CPUModelRunner) == ""
    reason = vllm_capture.why_unsupported(SecondRunner)
    assert "vllm.v1.worker.gpu.model_runner.GPUModelRunner has no _get_prompt_logprobs_dict" in reason
    monkeypatch.setattr(vllm_capture, "SIGNATURE", ["self", "hidden_states"])
    assert "takes ['self', 'hidden_states', 'num_scheduled_tokens']" in vllm_capture.why_unsupported(CPUModelRunner)
    monkeypatch.setattr(type(vllm_teacher), "_call", lambda *_arguments, **_options: [reason, ""])
    with pytest.raises(TeacherError, match=r"vLLM \d.*GPUModelRunner has no .* or set teacher.backend=transformers"):
        vllm_teacher.capture(Selector(TargetsConfig(k=K), V, "labels"))


def test_a_killed_vllm_engine_is_reported_at_once_and_leaves_nothing(teacher: Path) -> None:
    """One of two processes that share each layer, and the head's rows. In bfloat16, where each of them rounds its part
    of a layer's sum to 8 bits: log-probs are within 0.4 nats of the dense bfloat16 model's. Its head is float32: in
    bfloat16 a tenth of neighbouring log-probs here would be equal.
    """
    from cluster.teachers.vllm_teacher import EngineDied

    before = engine_processes(psutil.Process())
    backend = run_vllm(teacher, "bfloat16", tensor_parallel=2)
    processes = [process for process in engine_processes(psutil.Process()) if process not in before]
    rows = random_rows(*LENGTHS)
    for ids_T, targets in zip(rows, backend.score(rows, range(len(rows))), strict=True):
        log_p_TW = dense_logprobs(teacher, ids_T, torch.bfloat16)
        next_P = log_p_TW[np.arange(len(ids_T) - 1), ids_T[1:]]
        np.testing.assert_allclose(targets.next_logprob_P, next_P, atol=0.4)
        for kept_K in np.split(targets.head_logprobs_N, np.cumsum(targets.head_counts_P)[:-1]):
            assert len(np.unique(kept_K)) == len(kept_K)
    assert sum("Worker" in process.name() for process in processes) == 2
    (core,) = (process for process in processes if "EngineCore" in process.name())
    threading.Timer(0.5, core.kill).start()

    def score_until_it_fails() -> None:
        deadline = time.monotonic() + 15
        while time.monotonic() < deadline:  # killed in the middle of a call, or between two
            backend.score(rows * 20, range(len(rows) * 20))

    with pytest.raises(EngineDied):
        score_until_it_fails()
    backend.close()
    assert_gone(processes)


def test_a_vllm_engine_that_ran_out_of_memory_leaves_word_of_it(tmp_path: Path) -> None:
    """Its driver learns of its end alone; a smaller batch is tried only where it was for want of memory."""
    place, steps = tmp_path / "out_of_memory", iter(["fine", "wrong", "too much"])

    class Runner:
        def execute_model(self) -> str:
            match next(steps):
                case "too much":
                    torch.empty(2**60)
                case "wrong":
                    raise RuntimeError("an error of another kind")
            return "fine"

    worker: Any = TargetCapture()
    worker.model_runner = Runner()
    worker.tell_of_memory(str(place))
    assert worker.model_runner.execute_model() == "fine"
    with pytest.raises(RuntimeError, match="another kind"):
        worker.model_runner.execute_model()
    assert not place.exists()
    with pytest.raises(RuntimeError, match="memory"):
        worker.model_runner.execute_model()
    assert place.exists()


def test_a_vllm_process_on_another_machine_watches_no_number_of_this_one() -> None:
    """Process numbers mean other processes there, or none, whose driver would seem to have died."""
    before = set(threading.enumerate())
    TargetCapture().end_with(2**22 + 1, "another start of another machine")
    time.sleep(0.1)
    assert not set(threading.enumerate()) - before


def test_a_vllm_process_watches_its_driver_before_it_has_a_model(tmp_path: Path) -> None:
    """From the import of the class that vLLM mixes into its workers; one whose driver has ended by then ends at once.
    Until it does, what vLLM logs of an error is left where the driver looks for it.
    """
    code = (
        "import logging, time; import cluster.teachers.vllm_capture\n"
        "for n in (1, 2):\n try: raise ValueError(f'reason {n}')\n"
        " except ValueError: logging.getLogger('vllm.v1.engine.core').exception('EngineCore failed to start.')\n"
        "print('ready', flush=True); time.sleep(600)\n"
    )
    driver = subprocess.Popen(["sleep", "600"])
    environment = {**os.environ, DRIVER: f"{driver.pid} {tmp_path / 'last words'}"}

    def start() -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip

    try:
        early = start()
        assert early.stdout
        assert early.stdout.readline() == "ready\n"
        assert (tmp_path / "last words").read_text() == "ValueError: reason 1"
        assert early.poll() is None
    finally:
        driver.kill()
        driver.wait()
    late = start()
    assert early.wait(60) == late.wait(60) == -signal.SIGKILL


def test_why_a_vllm_engine_could_not_start_comes_first(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's own error in the driver names no reason."""
    import vllm

    def fail(**_arguments: Any) -> None:
        Path(os.environ[DRIVER].split(" ", 1)[1]).write_text("ValueError: an unquantized\nlm_head")
        raise RuntimeError("Engine core initialization failed. See root cause above.")

    monkeypatch.setattr(vllm, "LLM", fail)
    with pytest.raises(
        TeacherError, match=r"could not start an engine for \S+: ValueError: an unquantized lm_head \(m"
    ):
        run_vllm(teacher, "float32")
    assert DRIVER not in os.environ


def test_vllm_forks_no_process_that_has_looked_at_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.teachers.vllm_teacher import _set_environment

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "fork")
    _set_environment()
    assert os.environ["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_a_vllm_engine_ends_with_a_killed_driver(teacher: Path) -> None:
    """Whose longest row has one token, and so nothing to score."""
    code = (
        "import time; from pathlib import Path; from tests.cache.test_teachers import run_vllm\n"
        f"if __name__ == '__main__':\n run_vllm(Path({str(teacher)!r}), 'float32', 1)\n"
        " print('ready', flush=True)\n time.sleep(600)\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as script:  # vLLM's processes import it
        script.write(code)
        script.flush()
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        driver = subprocess.Popen([sys.executable, script.name], stdout=subprocess.PIPE, text=True, env=environment)
        assert driver.stdout
        assert any(line == "ready\n" for line in driver.stdout)
        processes = engine_processes(psutil.Process(driver.pid))
        assert processes
        driver.kill()
        driver.communicate()
        assert_gone(processes)


def engine_processes(driver: psutil.Process) -> list[psutil.Process]:
    return [process for process in driver.children(recursive=True) if "VLLM" in process.name()]


def assert_gone(processes: list[psutil.Process]) -> None:
    """Within seconds none of them runs; a container without an init may keep the entry of a process that has ended."""
    deadline = time.monotonic() + 30
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.1)
