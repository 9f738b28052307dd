"""Targets against a dense float64 reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.targets import select_targets
from logit_store.errors import TeacherError


def reference(
    logits_NW: torch.Tensor, next_ids_N: torch.Tensor, vocabulary_size: int, k: int
) -> tuple[np.ndarray, ...]:
    """Dense log-probs [N, W], head ids by (probability, lower id first), exact tail mass."""
    log_p_NW = logits_NW.double().log_softmax(-1).numpy()
    head_NK = np.argsort(-log_p_NW[:, :vocabulary_size], axis=1, kind="stable")[:, :k]
    kept_NW = np.zeros(log_p_NW.shape, bool)
    np.put_along_axis(kept_NW, head_NK, True, axis=1)
    kept_NW[np.arange(len(kept_NW)), next_ids_N.numpy()] = True
    return log_p_NW, head_NK, np.where(kept_NW, 0.0, np.exp(log_p_NW)).sum(1)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 9), st.integers(2, 70), st.integers(0, 12), st.sampled_from([0.1, 1.0, 8.0]), st.integers(0, 2**31),
    st.data(),
)  # fmt: skip
def test_targets_are_the_dense_distribution(
    n: int, vocabulary_size: int, padding: int, scale: float, seed: int, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, vocabulary_size))
    generator = torch.Generator().manual_seed(seed)
    logits_NW = torch.randn(n, vocabulary_size + padding, generator=generator) * scale
    logits_NW = (logits_NW * 4).round() / 4  # many ties
    next_ids_N = torch.randint(0, vocabulary_size, (n,), generator=generator)
    targets = select_targets(logits_NW, next_ids_N, vocabulary_size, k, [0.5, 3.0])
    log_p_NW, head_NK, tail_N = reference(logits_NW, next_ids_N, vocabulary_size, k)
    ids_PK, logprobs_PK = targets.padded_heads(k)
    np.testing.assert_array_equal(ids_PK, head_NK)
    np.testing.assert_allclose(logprobs_PK, np.take_along_axis(log_p_NW, head_NK, 1), atol=1e-5)
    np.testing.assert_allclose(targets.next_logprob_P, log_p_NW[np.arange(n), next_ids_N.numpy()], atol=1e-5)
    np.testing.assert_allclose(np.exp(targets.tail_logmass_P.astype(np.float64)), tail_N, atol=1e-7, rtol=1e-5)
    for column, t in enumerate((0.5, 3.0)):
        expected = np.log(np.exp(log_p_NW / t).sum(1))
        np.testing.assert_allclose(targets.log_partition_PS[:, column], expected, atol=3e-5)


def test_the_tail_of_a_peaked_row_keeps_its_digits() -> None:
    logits = torch.full((1, 1000), -40.0)
    logits[0, 3] = 0.0
    targets = select_targets(logits, torch.tensor([3]), 1000, 1, [])
    assert targets.tail_logmass_P[0] == pytest.approx(np.log(999) - 40.0, abs=1e-4)  # 1 − Σp would be 0


def test_everything_kept_leaves_no_tail() -> None:
    targets = select_targets(torch.randn(5, 40), torch.zeros(5, dtype=torch.long), 40, 40, [])
    assert (targets.tail_logmass_P == -np.inf).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(bad: float) -> None:
    logits = torch.randn(2, 10)
    logits[1, 4] = bad
    with pytest.raises(TeacherError, match=r"NaN or infinity.*dtype"):
        select_targets(logits, torch.zeros(2, dtype=torch.long), 10, 3, [])
