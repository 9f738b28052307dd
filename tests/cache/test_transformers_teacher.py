"""The transformers teacher: what it refuses to load, and what it does when memory runs out."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from cluster.config import TargetsConfig, TeacherConfig
from cluster.teachers.causal_model import check_architecture
from cluster.teachers.targets import Selector
from cluster.teachers.transformers_teacher import TransformersTeacher, is_out_of_memory
from logit_store import Targets
from logit_store.errors import TeacherError
from tests.toy import ROOT, WINDOW

V = 400


def load(folder: Path, targets: dict[str, Any] | None = None, **config: Any) -> TransformersTeacher:
    selector = Selector(TargetsConfig(**(targets or {"k": 16})), V, "labels")
    return TransformersTeacher(folder, TeacherConfig(**{"model": "", "dtype": "float32", **config}), selector)


def random_rows(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, length).astype(np.int32) for length in lengths]


def assert_equal(found: list[Targets], wanted: list[Targets], atol: float = 0.0) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        for name, one, other in zip(Targets._fields, a, b, strict=True):
            np.testing.assert_allclose(one, other, atol=atol, rtol=0, err_msg=name)


@pytest.fixture(scope="module")
def backend(teacher: Path) -> TransformersTeacher:
    """A teacher that draws, so that its rows have heads of different lengths."""
    return load(teacher, {"kind": "threshold", "tau": 0.02, "temperatures": [2.0], "always": [3]})


def test_rows_of_a_batch_get_their_own_targets(backend: TransformersTeacher) -> None:
    rows, numbers = random_rows([9, 2, 9, WINDOW, 9]), [40, 3, 11, 12, 13]
    together = backend.score(rows, numbers)
    assert [len(targets.next_logprob_P) for targets in together] == [len(row) - 1 for row in rows]
    alone = [backend.score([row], [number])[0] for row, number in zip(rows, numbers, strict=True)]
    assert_equal(together, alone)
    (elsewhere,) = backend.score(rows[3:4], [99])
    assert not np.array_equal(elsewhere.sampled_ids_M, together[3].sampled_ids_M)


def test_time_is_counted_by_phase(backend: TransformersTeacher) -> None:
    backend.phases.take()
    backend.score(random_rows([WINDOW]), [0])
    assert set(backend.phases.take()) == {"forward", "targets"}


@pytest.mark.parametrize(("largest", "splits"), [(8, 0), (4, 1), (3, 3), (1, 7)])
def test_a_batch_that_does_not_fit_is_halved(
    backend: TransformersTeacher, monkeypatch: pytest.MonkeyPatch, largest: int, splits: int
) -> None:
    rows, numbers = random_rows([12] * 8), list(range(8))
    wanted = backend.score(rows, numbers)
    run = backend.run_decoder

    def limited(input_ids: torch.Tensor, use_cache: bool) -> Any:
        if len(input_ids) > largest:
            torch.empty(2**60, dtype=torch.uint8)  # the allocator's own error
        return run(input_ids=input_ids, use_cache=use_cache)

    monkeypatch.setattr(backend, "run_decoder", limited)
    monkeypatch.setattr(backend, "oom_splits", 0)
    assert_equal(backend.score(rows, numbers), wanted)
    assert backend.oom_splits == splits


def test_one_row_halves_the_heads_chunk_and_then_gives_up(
    backend: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = random_rows([20])
    wanted, head, largest = backend.score(rows, [0]), backend._head, 5

    def limited(hidden_ND: torch.Tensor) -> torch.Tensor:
        if len(hidden_ND) > largest:
            torch.empty(2**60, dtype=torch.uint8)
        return head(hidden_ND)

    monkeypatch.setattr(backend, "_head", limited)
    monkeypatch.setattr(backend, "chunk", 19)
    assert_equal(backend.score(rows, [0]), wanted, atol=1e-5)
    largest = 0
    with pytest.raises(TeacherError, match=r"a row of 20 tokens does not fit into memory.*can't allocate"):
        backend.score(rows, [0])


def test_a_chunk_that_does_not_fit_is_halved_without_running_the_decoder_again(
    backend: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, numbers = random_rows([9] * 8), list(range(8))
    wanted, head, run = backend.score(rows, numbers), backend._head, mock.Mock(wraps=backend.run_decoder)

    def limited(hidden_ND: torch.Tensor) -> torch.Tensor:
        if len(hidden_ND) > 10:
            torch.empty(2**60, dtype=torch.uint8)
        return head(hidden_ND)

    monkeypatch.setattr(backend, "_head", limited)
    monkeypatch.setattr(backend, "run_decoder", run)
    assert_equal(backend.score(rows, numbers), wanted, atol=1e-5)
    assert run.call_count == 1


def test_other_errors_are_not_taken_for_out_of_memory(
    backend: TransformersTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    monkeypatch.setattr(backend, "_head", lambda _: torch.zeros(2, 3) @ torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        backend.score(random_rows([5]), [0])


LIMITED = """
import resource, sys
from pathlib import Path
from tests.cache.test_transformers_teacher import V, WINDOW, assert_equal, load, random_rows
teacher = load(Path(sys.argv[1]), batch_tokens=10**6)
rows = random_rows([WINDOW] * 1024)
teacher.score(rows[:1], [0])  # what a first call keeps for good
pages = int(Path("/proc/self/statm").read_text().split()[0])
_, hard = resource.getrlimit(resource.RLIMIT_AS)
limit = pages * resource.getpagesize() + 48 * 2**20  # logits alone take 80 MiB
resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
found, splits = teacher.score(rows, range(1024)), teacher.oom_splits
resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
assert_equal(found, teacher.score(rows, range(1024)), atol=1e-5)
assert teacher.oom_splits == splits
print("splits", splits)
"""


def test_a_process_whose_memory_is_limited_scores_all_the_same(teacher: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(teacher)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1


def save_config(folder: Path, kind: str, architecture: str | None) -> Path:
    from transformers import AutoConfig

    config = AutoConfig.for_model(kind, vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    config.architectures = [architecture] if architecture else None
    config.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("kind", "architecture"), [("bert", "BertForMaskedLM"), ("llama", "LlamaModel"), ("t5", "T5Model"), ("llama", None)]
)
def test_a_model_without_a_causal_head_is_refused_by_its_config(kind: str, architecture: str, tmp_path: Path) -> None:
    folder = save_config(tmp_path, kind, architecture)
    with pytest.raises(TeacherError, match=rf"{architecture or 'no architecture'} .*has no causal LM head"):
        check_architecture(folder)


def test_causal_models_pass_and_folders_without_a_config_do_not(teacher: Path, tmp_path: Path) -> None:
    assert check_architecture(teacher).model_type == "qwen3"
    with pytest.raises(TeacherError, match="is no model that transformers can read"):
        check_architecture(tmp_path)


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig, BertLMHeadModel

    config = BertConfig(
        vocab_size=V, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        initializer_range=0.5, is_decoder=False,
    )  # fmt: skip
    BertLMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="logits differ with a token that comes after them"):
        load(tmp_path)


def test_weights_that_are_missing_are_not_made_up(teacher: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(teacher, tmp_path / "headless"))
    weights = load_file(folder / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(TeacherError, match=r"lacks weights of the model: lm_head\.weight"):
        load(folder)


def test_pickled_weights_only_where_the_config_says_so(
    teacher: Path, backend: TransformersTeacher, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "pickled"))
    torch.save(backend.model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"cannot be loaded.*teacher\.pickled_weights=true"):
        load(folder)
    rows = random_rows([7])
    assert_equal(load(folder, pickled_weights=True).score(rows, [0]), load(teacher).score(rows, [0]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_quantisation_without_a_gpu_is_refused_before_the_load(teacher: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(teacher, tmp_path / "weightless"))
    (folder / "model.safetensors").unlink()
    with pytest.raises(TeacherError, match=r"quantization=8bit needs a CUDA GPU"):
        load(folder, quantization="8bit")


def test_a_model_that_is_spread_gives_the_same_labels(teacher: Path) -> None:
    rows = random_rows([7, 7, 3])
    assert_equal(load(teacher, device_map="auto").score(rows, [0, 1, 2]), load(teacher).score(rows, [0, 1, 2]))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_half_precision_are_not_rounded(teacher: Path, dtype: str) -> None:
    loaded = load(teacher, dtype=dtype)
    with torch.inference_mode():
        hidden_ND = loaded._hidden(torch.arange(WINDOW)[None])[0]
        logits_NW = loaded._head(hidden_ND)
        wanted_NW = torch.nn.functional.linear(hidden_ND.double(), loaded.model.lm_head.weight.double())
    assert hidden_ND.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits_NW.double(), wanted_NW, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_float32(teacher: Path, dtype: str) -> None:
    rows = random_rows([WINDOW])
    (half,), (full,) = load(teacher, {"k": V}, dtype=dtype).score(rows, [0]), load(teacher, {"k": V}).score(rows, [0])
    np.testing.assert_allclose(half.next_logprob_P, full.next_logprob_P, atol=1.0 if dtype == "bfloat16" else 0.1)
    assert np.abs(half.next_logprob_P - full.next_logprob_P).mean() < (0.2 if dtype == "bfloat16" else 0.02)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile on a CPU needs a C++ compiler")
def test_a_compiled_decoder_gives_the_same(teacher: Path) -> None:
    from torch._dynamo.utils import counters

    counters.clear()
    compiled, plain = (load(teacher, compile=wanted) for wanted in (True, False))
    rows = random_rows([7, WINDOW, 3])
    assert_equal(compiled.score(rows, [0, 1, 2]), plain.score(rows, [0, 1, 2]), atol=1e-3)
    assert counters["frames"]["ok"] > 0
