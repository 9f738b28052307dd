"""Position t of a stored row is the teacher's distribution for the token at t + 1, by both backends."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.config import TargetsConfig, TeacherConfig
from cluster.targets import Selector
from cluster.transformers_teacher import TransformersTeacher, equal_length_batches
from logit_store import Targets
from logit_store.errors import TeacherError
from tests.toy import WINDOW

V, K = 400, 16


def dense_logprobs(folder: Path, ids_T: np.ndarray) -> np.ndarray:
    """log p [T, W] of the plain model on one row alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
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


@pytest.mark.parametrize("length", [2, 3, WINDOW])
def test_transformers_scores_rows_of_any_length(teacher: Path, length: int) -> None:
    ids = np.random.default_rng(length).integers(0, V, length).astype(np.int32)
    backend = TransformersTeacher(
        teacher, TeacherConfig(model="", dtype="float32"), Selector(TargetsConfig(k=K), V, "labels")
    )
    backend.chunk = 5  # several chunks, the last one short
    (targets,) = backend.score([ids], [0])
    assert_is_dense(targets, ids, dense_logprobs(teacher, ids), atol=2e-5)


@pytest.fixture(scope="module")
def vllm_teacher(teacher: Path) -> Iterator[Any]:
    """The real engine, shared; its sockets in a short folder of their own, since it leaves them behind."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="vllm", dir="/tmp") as sockets, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RPC_BASE_PATH", sockets)
        from cluster.vllm_teacher import VllmTeacher

        config = TeacherConfig(model="", backend="vllm", dtype="float32", batch_tokens=256, gpu_memory_utilization=0.2)
        backend = VllmTeacher(teacher, config, Selector(TargetsConfig(k=K), V, "labels"), WINDOW)
        yield backend
        backend.engine.llm_engine.engine_core.shutdown()


def test_vllm_scores_rows_of_any_length(vllm_teacher: Any, teacher: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, V, length).astype(np.int32) for length in (WINDOW, 2, 7, WINDOW, 3)]
    for ids, targets in zip(rows, vllm_teacher.score(rows, range(len(rows))), strict=True):
        assert len(targets.next_logprob_P) == len(ids) - 1
        assert_is_dense(targets, ids, dense_logprobs(teacher, ids), atol=2e-4)


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
