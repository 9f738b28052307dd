"""Position t of a stored row is the teacher's distribution for the token at t + 1, by both backends."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.cache import cache
from cluster.config import CacheConfig, TargetsConfig, TeacherConfig
from cluster.job.worker import TeacherWorker
from cluster.teachers.targets import Selector
from cluster.teachers.transformers_teacher import TransformersTeacher, equal_length_batches
from cluster.teachers.vllm_capture import DRIVER, TargetCapture, with_float32_head
from logit_store import Targets, TokenRow
from logit_store.config import parse_config
from logit_store.errors import ConfigError, TeacherError
from tests.toy import ROOT, WINDOW, in_process_workers, write_tokens

V, K = 400, 16


def dense_logprobs(folder: Path, ids_T: np.ndarray, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """log p [T, W] of the plain model on one row alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.inference_mode():
        logits = model(input_ids=torch.from_numpy(ids_T.astype(np.int64))[None]).logits[0]
    return logits.double().log_softmax(-1).numpy()


def assert_is_dense(targets: Targets, ids_T: np.ndarray, log_p_TW: np.ndarray, atol: float) -> None:
    """Compare every position; modulo ties at the cut."""
    log_p_PW = log_p_TW[:-1]
    ids_PK, logprobs_PK = targets.padded_heads(K)
    positions = np.arange(len(log_p_PW))
    top_PK = -np.sort(-log_p_PW[:, :V], axis=1)[:, :K]
    np.testing.assert_allclose(-np.sort(-logprobs_PK, axis=1), top_PK, atol=atol)
    own_PK = np.take_along_axis(log_p_PW, ids_PK.astype(np.int64), 1)
    np.testing.assert_allclose(logprobs_PK, own_PK, atol=atol)
    np.testing.assert_allclose(targets.next_logprob_P, log_p_PW[positions, ids_T[1:]], atol=atol)
    kept = np.zeros(log_p_PW.shape, bool)
    np.put_along_axis(kept, ids_PK.astype(np.int64), True, 1)
    kept[positions, ids_T[1:]] = True
    tail_P = np.where(kept, 0, np.exp(log_p_PW)).sum(1)
    np.testing.assert_allclose(np.exp(targets.tail_logmass_P), tail_P, atol=atol)


def test_a_row_of_the_store_is_the_dense_model(store: Any, teacher: Path) -> None:
    row = int(np.flatnonzero(store.lengths_N == WINDOW)[3])
    tokens, targets = store[row]
    log_p_TW = dense_logprobs(teacher, tokens.input_ids_T)
    bound = store.codec.max_error
    assert_is_dense(targets, tokens.input_ids_T, log_p_TW, atol=bound)
    shifted = np.roll(log_p_TW, 1, axis=0)
    with pytest.raises(AssertionError):  # off by one fails
        assert_is_dense(targets, tokens.input_ids_T, shifted, atol=bound)
    with pytest.raises(AssertionError):
        assert_is_dense(targets, tokens.input_ids_T, np.roll(log_p_TW, -1, axis=0), atol=bound)


def test_float32_labels_are_the_dense_model_to_the_last_digits(make_store: Callable[..., Any], teacher: Path) -> None:
    store = make_store("float32", store={"codec": {"kind": "exact"}}, targets={"k": K, "temperatures": []})
    row = int(np.flatnonzero(store.lengths_N == WINDOW)[0])
    tokens, targets = store[row]
    assert_is_dense(targets, tokens.input_ids_T, dense_logprobs(teacher, tokens.input_ids_T), atol=2e-5)


LENGTHS = (WINDOW, 2, 7, WINDOW, 3)
BATCH_TOKENS = 32
"""Fewer than the window: the longest rows are spread over two steps of vLLM."""


class Backend(NamedTuple):
    """Scores rows with the shared teacher, by the targets asked for."""

    score: Callable[[list[np.ndarray], TargetsConfig], list[Targets]]
    atol: float
    """Its float32 log-probs are within this of the dense model's."""


def run_vllm(folder: Path, dtype: Literal["float32", "bfloat16"], longest: int = WINDOW) -> Any:
    from cluster.teachers.vllm_teacher import VllmTeacher

    config = TeacherConfig(model="", backend="vllm", dtype=dtype, batch_tokens=BATCH_TOKENS)
    return VllmTeacher(folder, config, Selector(TargetsConfig(k=K), V, "labels"), longest)


@pytest.fixture(scope="session")
def vllm_teacher(teacher: Path) -> Iterator[Any]:
    """The real engine, shared by the whole run; its sockets in a folder of their own, since it leaves them behind."""
    with tempfile.TemporaryDirectory(prefix="vllm", dir="/tmp") as sockets, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RPC_BASE_PATH", sockets)
        backend = run_vllm(teacher, "float32")
        yield backend
        backend.close()


@pytest.fixture(params=["transformers", "vllm"])
def backend(request: pytest.FixtureRequest, teacher: Path) -> Backend:
    if request.param == "transformers":

        def score(rows: list[np.ndarray], targets: TargetsConfig) -> list[Targets]:
            config = TeacherConfig(model="", dtype="float32", batch_tokens=BATCH_TOKENS)
            backend = TransformersTeacher(teacher, config, Selector(targets, V, "labels"))
            backend.chunk = 5  # several chunks, the last one short
            return backend.score(rows, range(len(rows)))

        return Backend(score, 2e-5)
    vllm_teacher = request.getfixturevalue("vllm_teacher")

    def score_in_engine(rows: list[np.ndarray], targets: TargetsConfig) -> list[Targets]:
        vllm_teacher.capture(Selector(targets, V, "labels"))
        scored: list[Targets] = vllm_teacher.score(rows, range(len(rows)))
        return scored

    return Backend(score_in_engine, 2e-5)


def random_rows(*lengths: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, length).astype(np.int32) for length in lengths]


def test_rows_of_any_length_are_the_dense_model(backend: Backend, teacher: Path) -> None:
    rows = random_rows(*LENGTHS)
    for ids_T, targets in zip(rows, backend.score(rows, TargetsConfig(k=K)), strict=True):
        log_p_TW = dense_logprobs(teacher, ids_T)
        assert len(targets.next_logprob_P) == len(ids_T) - 1
        assert_is_dense(targets, ids_T, log_p_TW, backend.atol)
        for by in (1, -1):  # off by one fails
            with pytest.raises(AssertionError):
                assert_is_dense(targets, ids_T, np.roll(log_p_TW, by, axis=0), backend.atol)


def test_the_tail_is_exact_where_one_minus_the_kept_is_not(backend: Backend, teacher: Path) -> None:
    """Of a tail of 1e-5 a sum of float32 probabilities leaves two digits; a log-sum-exp leaves five."""
    (row,) = random_rows(WINDOW)
    (targets,) = backend.score([row], TargetsConfig(k=V - 20))
    log_p_PW = dense_logprobs(teacher, row)[:-1]
    ids_PK, _ = targets.padded_heads(V - 20)
    np.put_along_axis(log_p_PW, ids_PK.astype(np.int64), -np.inf, 1)
    log_p_PW[np.arange(len(log_p_PW)), row[1:]] = -np.inf
    np.testing.assert_allclose(targets.tail_logmass_P, np.logaddexp.reduce(log_p_PW, axis=1), atol=1e-4)


def test_everything_may_be_kept(backend: Backend, teacher: Path) -> None:
    (row,) = random_rows(WINDOW)
    (targets,) = backend.score([row], TargetsConfig(k=V))
    log_p_PW = dense_logprobs(teacher, row)[:-1]
    ids_PV, logprobs_PV = targets.padded_heads(V)
    assert (np.sort(ids_PV, axis=1) == np.arange(V)).all()
    np.testing.assert_allclose(
        logprobs_PV, np.take_along_axis(log_p_PW, ids_PV.astype(np.int64), 1), atol=backend.atol * 5
    )
    padded_rows_P = np.logaddexp.reduce(log_p_PW[:, V:], axis=1)  # the head's rows beyond the vocabulary
    np.testing.assert_allclose(np.exp(targets.tail_logmass_P), np.exp(padded_rows_P), atol=backend.atol)


def test_partitions_at_other_temperatures(backend: Backend, teacher: Path) -> None:
    (row,) = random_rows(WINDOW)
    (targets,) = backend.score([row], TargetsConfig(k=K, temperatures=[2.0, 0.5]))
    log_p_PW = dense_logprobs(teacher, row)[:-1]
    expected_PS = np.stack([np.logaddexp.reduce(log_p_PW / t, axis=1) for t in (2.0, 0.5)], 1)
    np.testing.assert_allclose(targets.log_partition_PS, expected_PS, atol=5e-5)


@pytest.mark.parametrize("name", ["transformers", "vllm"])
def test_rows_of_one_token_get_no_labels(
    request: pytest.FixtureRequest, cache_config: dict[str, Any], tokenizer: Path, tmp_path: Path, name: str
) -> None:
    """Among others, and in a shard that has no others: no backend is asked about them."""

    engine = request.getfixturevalue("vllm_teacher") if name == "vllm" else None

    class Worker(TeacherWorker):
        def load_teacher(self) -> Any:
            if engine is None:
                return super().load_teacher()
            engine.capture(Selector(self.config.targets, self.header["vocabulary_size"], self.header["labels_id"]))
            return engine

    shards = [random_rows(5, 1, 9), random_rows(1, 1)]
    rows = [[TokenRow(i, "train", ids_T, None, {}) for i, ids_T in enumerate(shard)] for shard in shards]
    tokens = write_tokens(str(tmp_path / "tokens"), tokenizer, rows, num_shards=2, held_out=0.2)
    raw = {**cache_config, "tokens": {**cache_config["tokens"], "path": tokens.storage.url, "num_shards": 2}}
    raw["teacher"] = {**cache_config["teacher"], "backend": name, "batch_tokens": BATCH_TOKENS}
    raw |= {"store": {"path": str(tmp_path / "store")}, "cluster": {"workers": 1}}
    with in_process_workers():
        store = cache(parse_config(CacheConfig, raw, "test"), Worker)
    positions = [len(store[row].targets.next_logprob_P) for row in range(5)]
    assert positions == [4, 0, 8, 0, 0]
    assert not store.left_out
    for row in (0, 2):
        ids_T = store[row].tokens.input_ids_T
        assert_is_dense(store[row].targets, ids_T, dense_logprobs(cache_config["teacher"]["model"], ids_T), atol=0.5)


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


KINDS: list[dict[str, Any]] = [
    {"kind": "top_p", "k": 50, "p": 0.9},
    {"kind": "threshold", "tau": 0.02},
    {"kind": "threshold", "tau": 0.02, "temperatures": [2.0]},
    {"kind": "counts", "draws": 20},
    {"kind": "counts", "draws": 20, "temperatures": [0.5]},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_vllm_chooses_targets_of_every_kind_as_transformers_does(
    vllm_teacher: Any, teacher: Path, kind: dict[str, Any]
) -> None:
    targets = TargetsConfig(**kind, always=[5])
    rows, numbers = random_rows(*LENGTHS), [40, 3, 17, 8, 25]
    selector = Selector(targets, V, "labels")
    vllm_teacher.capture(selector)
    theirs = TransformersTeacher(teacher, TeacherConfig(model="", dtype="float32"), selector).score(rows, numbers)
    for ours, their in zip(vllm_teacher.score(rows, numbers), theirs, strict=True):
        np.testing.assert_array_equal(ours.head_counts_P, their.head_counts_P)
        np.testing.assert_array_equal(ours.sampled_counts_P, their.sampled_counts_P)
        # Points of systematic sampling that fall on the border of two ids may go to either.
        assert (ours.sampled_ids_M != their.sampled_ids_M).sum() <= 0.01 * len(their.sampled_ids_M)
        np.testing.assert_allclose(ours.forced_logprobs_PF, their.forced_logprobs_PF, atol=2e-5)
        np.testing.assert_allclose(ours.log_partition_PS, their.log_partition_PS, atol=5e-5)
        np.testing.assert_allclose(np.exp(ours.tail_logmass_P), np.exp(their.tail_logmass_P), atol=2e-5)


def test_vllm_gives_a_row_the_same_labels_alone_and_among_others(vllm_teacher: Any) -> None:
    vllm_teacher.capture(Selector(TargetsConfig(k=K), V, "labels"))
    rows = random_rows(20, 31, 5, WINDOW)
    among = vllm_teacher.score(rows, [7, 3, 9, 1])
    for i, number in enumerate([7, 3, 9, 1]):
        (alone,) = vllm_teacher.score([rows[i]], [number])
        for one, other in zip(alone, among[i], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=0 if i < 3 else 2e-5)  # rows[3] is split over steps


def test_vllm_goes_on_after_a_choice_that_failed(vllm_teacher: Any) -> None:
    """A failure inside the engine comes out as what it was, and the engine lives."""
    from cluster.teachers.vllm_teacher import EngineDied

    rows = random_rows(9, 20)
    vllm_teacher.capture(Selector(TargetsConfig(k=K), V, "labels"))
    before = vllm_teacher.score(rows, [0, 1])
    vllm_teacher.capture(Selector(TargetsConfig(k=1000), 1000, "labels"))  # more than the teacher has rows
    with pytest.raises((RuntimeError, ValueError, IndexError)) as failed:
        vllm_teacher.score(rows, [0, 1])
    assert not isinstance(failed.value, EngineDied)
    vllm_teacher.capture(Selector(TargetsConfig(k=K), V, "labels"))
    for first, second in zip(before, vllm_teacher.score(rows, [0, 1]), strict=True):
        np.testing.assert_array_equal(first.next_logprob_P, second.next_logprob_P)


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


def test_vllm_that_differs_from_its_own_logprobs_is_refused(vllm_teacher: Any) -> None:
    ids_T = np.arange(8, dtype=np.int32)
    vllm_teacher.capture(Selector(TargetsConfig(k=K), V, "labels"))
    (targets,) = vllm_teacher.score([ids_T], [0])
    vllm_teacher._probe(ids_T, targets.next_logprob_P, 1e-5)
    with pytest.raises(TeacherError, match="differ from its own by"):
        vllm_teacher._probe(ids_T, np.roll(targets.next_logprob_P, 1), 1e-5)


def test_a_killed_vllm_engine_is_reported_at_once_and_leaves_nothing(teacher: Path) -> None:
    """In bfloat16, whose layers round to 8 bits: log-probs are within 0.25 nats of the dense bfloat16 model's. Its head
    is float32: in bfloat16 a tenth of neighbouring log-probs here would be equal.
    """
    from cluster.teachers.vllm_teacher import EngineDied

    before = engine_processes(psutil.Process())
    backend = run_vllm(teacher, "bfloat16")
    processes = [process for process in engine_processes(psutil.Process()) if process not in before]
    rows = random_rows(*LENGTHS)
    for ids_T, targets in zip(rows, backend.score(rows, range(len(rows))), strict=True):
        log_p_TW = dense_logprobs(teacher, ids_T, torch.bfloat16)
        next_P = log_p_TW[np.arange(len(ids_T) - 1), ids_T[1:]]
        np.testing.assert_allclose(targets.next_logprob_P, next_P, atol=0.25)
        for kept_K in np.split(targets.head_logprobs_N, np.cumsum(targets.head_counts_P)[:-1]):
            assert len(np.unique(kept_K)) == len(kept_K)
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
    before = threading.active_count()
    TargetCapture().end_with(2**22 + 1, "another start of another machine")
    time.sleep(0.1)
    assert threading.active_count() == before


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
    assert early.wait(10) == late.wait(60) == -signal.SIGKILL


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
    deadline = time.monotonic() + 10
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes):
        assert time.monotonic() < deadline, processes
        time.sleep(0.1)


@pytest.mark.parametrize("kind", ["gemma2", "cohere", "granite", "gpt2"])
def test_heads_that_do_more_than_a_product_are_right(tmp_path: Path, kind: str) -> None:
    """Soft-capping, logit scales: what a plain `lm_head(hidden)` gets wrong."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": V, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    if kind != "gpt2":
        sizes |= {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 16}
    special = {
        "gemma2": {"final_logit_softcapping": 2.0},
        "cohere": {"logit_scale": 0.3},
        "granite": {"logits_scaling": 4.0},
    }
    config = AutoConfig.for_model(kind, **sizes, **special.get(kind, {}), initializer_range=0.3)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    ids = np.random.default_rng(0).integers(0, V, 20).astype(np.int32)
    backend = TransformersTeacher(
        tmp_path, TeacherConfig(model="", dtype="float32"), Selector(TargetsConfig(k=K), V, "labels")
    )
    backend.chunk = 6
    (targets,) = backend.score([ids], [0])
    assert_is_dense(targets, ids, dense_logprobs(tmp_path, ids), atol=2e-5)


def test_the_probe_refuses_a_model_whose_chunks_differ(teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = TransformersTeacher._head
    monkeypatch.setattr(TransformersTeacher, "_head", lambda self, hidden: original(self, hidden) * 1.01)
    with pytest.raises(TeacherError, match="differ from the model's own"):
        TransformersTeacher(
            teacher, TeacherConfig(model="", dtype="float32"), Selector(TargetsConfig(k=K), V, "labels")
        )


def test_batches_hold_one_length_and_every_row_once() -> None:
    lengths = [5, 7, 5, 5, 2, 7, 5]
    batches = list(equal_length_batches(lengths, 10))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert all(len({lengths[i] for i in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [1, 1, 2, 2, 1]
