"""Position t of a stored row is the teacher's distribution for the token at t + 1, by both backends."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cluster.cache import cache
from cluster.config import CacheConfig, TargetsConfig, TeacherConfig
from cluster.job.worker import TeacherWorker
from cluster.teachers.targets import Selector
from cluster.teachers.transformers_teacher import TransformersTeacher, equal_length_batches
from logit_store import Targets, TokenRow
from logit_store.config import parse_config
from logit_store.errors import TeacherError
from tests.toy import WINDOW, in_process_workers, write_tokens

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


def run_vllm(
    folder: Path, dtype: Literal["float32", "bfloat16"], longest: int = WINDOW, tensor_parallel: int = 1
) -> Any:
    from cluster.teachers.vllm_teacher import VllmTeacher

    config = TeacherConfig(
        model="", backend="vllm", dtype=dtype, batch_tokens=BATCH_TOKENS, tensor_parallel=tensor_parallel
    )
    return VllmTeacher(folder, config, Selector(TargetsConfig(k=K), V, "labels"), longest)


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


def test_vllm_that_differs_from_its_own_logprobs_is_refused(vllm_teacher: Any) -> None:
    ids_T = np.arange(8, dtype=np.int32)
    vllm_teacher.capture(Selector(TargetsConfig(k=K), V, "labels"))
    (targets,) = vllm_teacher.score([ids_T], [0])
    vllm_teacher._probe(ids_T, targets.next_logprob_P, 1e-5)
    with pytest.raises(TeacherError, match="differ from its own by"):
        vllm_teacher._probe(ids_T, np.roll(targets.next_logprob_P, 1), 1e-5)


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
