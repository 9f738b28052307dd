"""Targets and the transformers teacher on a GPU, beside the same on the CPU."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cluster.config import TargetsConfig, TeacherConfig
from cluster.teachers.sampling import uniforms
from cluster.teachers.targets import Selector
from cluster.teachers.transformers_teacher import TransformersTeacher
from logit_store import Targets

V, WINDOW = 400, 48
KINDS: list[dict[str, Any]] = [
    {"k": 16, "always": [3, 7]},
    {"kind": "top_p", "p": 0.9, "k": 32},
    {"kind": "threshold", "tau": 0.02},
    {"kind": "threshold", "tau": 0.02, "temperatures": [2.0]},
    {"kind": "counts", "draws": 20},
]


def load(folder: Path, device: str, targets: dict[str, Any] | None = None, **config: Any) -> TransformersTeacher:
    selector = Selector(TargetsConfig(**(targets or {"k": 16})), V, "labels")
    return TransformersTeacher(folder, TeacherConfig(**{"model": "", "dtype": "float32", **config}), selector, device)


def random_rows(lengths: list[int]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, length).astype(np.int32) for length in lengths]


def logits_with_ties(num_positions: int, width: int) -> Tensor:
    """Steps of a quarter, so that many are equal at the cut."""
    rng = torch.Generator().manual_seed(0)
    return (torch.randn(num_positions, width, generator=rng) * 16).round() / 4


def selected(targets: dict[str, Any], logits_NW: Tensor, device: str) -> Targets:
    num_positions = len(logits_NW)
    selector = Selector(TargetsConfig(**targets), logits_NW.shape[1] - 16, "labels")
    ids_N = torch.arange(num_positions) % V
    columns = (ids_N, torch.arange(num_positions) // 7, torch.arange(num_positions) % 7)
    return selector.select(logits_NW.to(device), *(column.to(device) for column in columns))


def test_draws_are_the_same_on_every_device() -> None:
    rows, positions = torch.arange(1000) * 977, torch.arange(1000) * 31
    on_cpu = uniforms(-7, rows, positions, 40)
    assert torch.equal(uniforms(-7, rows.cuda(), positions.cuda(), 40).cpu(), on_cpu)


@pytest.mark.parametrize("targets", KINDS, ids=str)
def test_a_gpu_chooses_what_a_cpu_chooses(targets: dict[str, Any]) -> None:
    """Of equal logits: the same ids. exp and sums differ in their last bits, and may move a draw at a boundary."""
    logits_NW = logits_with_ties(700, 5000)
    ours, theirs = selected(targets, logits_NW, "cuda"), selected(targets, logits_NW, "cpu")
    np.testing.assert_array_equal(ours.head_counts_P, theirs.head_counts_P)
    np.testing.assert_array_equal(ours.head_ids_N, theirs.head_ids_N)
    np.testing.assert_allclose(ours.head_logprobs_N, theirs.head_logprobs_N, atol=1e-5)
    np.testing.assert_allclose(ours.tail_logmass_P, theirs.tail_logmass_P, atol=1e-4)
    assert np.abs(ours.sampled_counts_P - theirs.sampled_counts_P).max(initial=0) <= 1
    if len(ours.sampled_ids_M) == len(theirs.sampled_ids_M):
        assert (ours.sampled_ids_M == theirs.sampled_ids_M).mean() > 0.999 or not len(ours.sampled_ids_M)


@pytest.mark.parametrize("targets", KINDS, ids=str)
def test_a_gpu_repeats_itself_to_the_bit(targets: dict[str, Any]) -> None:
    logits_NW = torch.randn(700, 151_936, device="cuda") * 3
    first, *others = (selected(targets, logits_NW, "cuda") for _ in range(3))
    for other in others:
        for name, a, b in zip(Targets._fields, first, other, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_float32_is_near_the_cpu(teacher: Path) -> None:
    rows, numbers = random_rows([9, 2, 9, WINDOW]), list(range(4))
    for ours, theirs in zip(
        load(teacher, "cuda").score(rows, numbers), load(teacher, "cpu").score(rows, numbers), strict=True
    ):
        np.testing.assert_allclose(ours.next_logprob_P, theirs.next_logprob_P, atol=2e-3)
        np.testing.assert_allclose(np.exp(ours.tail_logmass_P), np.exp(theirs.tail_logmass_P), atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_logits_of_half_precision_are_not_rounded(teacher: Path, dtype: str) -> None:
    loaded = load(teacher, "cuda", dtype=dtype)
    with torch.inference_mode():
        hidden_ND = loaded._hidden(torch.arange(WINDOW, device="cuda")[None])[0]
        logits_NW = loaded._head(hidden_ND)
        wanted_NW = torch.nn.functional.linear(hidden_ND.double(), loaded.model.lm_head.weight.double())
    assert logits_NW.dtype == torch.float32
    torch.testing.assert_close(logits_NW.double(), wanted_NW, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("quantization", ["8bit", "4bit"])
def test_quantised_weights(teacher: Path, quantization: str) -> None:
    rows = random_rows([WINDOW])
    (ours,) = load(teacher, "cuda", {"k": V}, dtype="bfloat16", quantization=quantization).score(rows, [0])
    (theirs,) = load(teacher, "cpu", {"k": V}).score(rows, [0])
    error_P = np.abs(ours.next_logprob_P - theirs.next_logprob_P)
    assert 0 < error_P.mean() < (0.5 if quantization == "8bit" else 3.0)


def test_a_model_that_is_spread(teacher: Path) -> None:
    rows = random_rows([7, 7, 3])
    ours = load(teacher, "cuda", dtype="bfloat16", device_map="auto").score(rows, [0, 1, 2])
    theirs = load(teacher, "cuda", dtype="bfloat16").score(rows, [0, 1, 2])
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one.head_ids_N, other.head_ids_N)


def test_a_compiled_decoder(teacher: Path) -> None:
    rows = random_rows([7, WINDOW, 3])
    compiled, plain = (load(teacher, "cuda", compile=wanted).score(rows, [0, 1, 2]) for wanted in (True, False))
    for one, other in zip(compiled, plain, strict=True):
        np.testing.assert_allclose(one.next_logprob_P, other.next_logprob_P, atol=2e-3)


def test_out_of_memory_splits_the_batch(teacher: Path) -> None:
    loaded, rows = load(teacher, "cuda", batch_tokens=10**7), random_rows([WINDOW] * 20_000)
    wanted = loaded.score(rows[:50], list(range(50)))
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 2**29) / total)
    try:
        found = loaded.score(rows, list(range(len(rows))))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert loaded.oom_splits >= 1
    for one, other in zip(found, wanted, strict=False):
        np.testing.assert_allclose(one.next_logprob_P, other.next_logprob_P, atol=2e-3)
