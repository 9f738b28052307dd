"""The sparse losses against dense ones in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from training.losses import LossSums, SparseTargets, WeightedTargets, chunked_losses, forward_kl, position_losses

TAILS = ["ghost", "ground_truth", "renormalise", "uniform"]
N, V = 7, 23


def sparse(log_p_NV: Tensor, next_ids_N: Tensor, k: int, temperature: float = 1.0) -> SparseTargets:
    """What a store would hold of dense log-probs, in full precision."""
    log_p_NK, ids_NK = log_p_NV.topk(k, dim=-1)
    kept_NV = torch.zeros_like(log_p_NV, dtype=torch.bool).scatter(-1, ids_NK, True)
    kept_NV = kept_NV.scatter(-1, next_ids_N[:, None], True)
    tail_N = log_p_NV.masked_fill(kept_NV, -torch.inf).logsumexp(-1)
    next_N = log_p_NV.gather(-1, next_ids_N[:, None])[:, 0]
    return SparseTargets(ids_NK, log_p_NK, next_N, tail_N, (log_p_NV / temperature).logsumexp(-1))


@pytest.fixture
def problem() -> tuple[Tensor, Tensor, Tensor]:
    """Teacher log-probs, student logits, next tokens."""
    generator = torch.Generator().manual_seed(1)
    log_p_NV = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2).log_softmax(-1)
    logits_NV = torch.randn(N, V, generator=generator, dtype=torch.float64, requires_grad=True)
    return log_p_NV, logits_NV, torch.randint(0, V, (N,), generator=generator)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("tail", TAILS)
def test_everything_kept_is_online_distillation(
    problem: tuple[Tensor, Tensor, Tensor], tail: str, temperature: float
) -> None:
    log_p_NV, logits_NV, next_ids_N = problem
    targets = sparse(log_p_NV, next_ids_N, V, temperature)
    sums = position_losses(logits_NV, next_ids_N, targets, V, 0.7, temperature, tail)
    online = torch.nn.functional.kl_div(
        (logits_NV / temperature).log_softmax(-1), (log_p_NV / temperature).log_softmax(-1),
        log_target=True, reduction="sum",
    )  # fmt: skip
    expected = 0.7 * temperature**2 * online + 0.3 * torch.nn.functional.cross_entropy(
        logits_NV, next_ids_N, reduction="sum"
    )
    torch.testing.assert_close(sums.loss, expected, rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(sums.loss, logits_NV)
    (expected_gradient,) = torch.autograd.grad(expected, logits_NV)
    torch.testing.assert_close(gradient, expected_gradient, rtol=0, atol=1e-10)


def dense_target(log_p_NV: Tensor, ids_NK: Tensor, next_ids_N: Tensor, tail: str) -> Tensor:
    """The distribution over V that a tail treatment stands for (ghost is none)."""
    inside = torch.zeros_like(log_p_NV, dtype=torch.bool).scatter(-1, ids_NK, True)
    head = log_p_NV.exp() * inside
    rest = 1 - head.sum(-1, keepdim=True)
    if tail == "renormalise":
        return head / head.sum(-1, keepdim=True)
    if tail == "uniform":
        return torch.where(inside, head, rest / (V - ids_NK.shape[-1]))
    return head.scatter_add(-1, next_ids_N[:, None], rest)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("k", [1, 5, V - 1])
@pytest.mark.parametrize("tail", ["ground_truth", "renormalise", "uniform"])
def test_tail_treatments_are_a_dense_kl(
    problem: tuple[Tensor, Tensor, Tensor], tail: str, k: int, temperature: float
) -> None:
    log_p_NV, logits_NV, next_ids_N = problem
    targets = sparse(log_p_NV, next_ids_N, k, temperature)
    found = forward_kl(logits_NV, targets, next_ids_N, temperature, tail)
    tempered = (log_p_NV / temperature).log_softmax(-1)
    target_NV = dense_target(tempered, targets.head_ids_NK, next_ids_N, tail)
    log_q_NV = (logits_NV / temperature).log_softmax(-1)
    expected = (torch.xlogy(target_NV, target_NV) - target_NV * log_q_NV).sum(-1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)
    gradients = [torch.autograd.grad(loss.sum(), logits_NV, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("k", [1, 5, V - 1])
def test_ghost_is_the_kl_of_heads_with_one_more_bucket(problem: tuple[Tensor, Tensor, Tensor], k: int) -> None:
    log_p_NV, logits_NV, next_ids_N = problem
    targets = sparse(log_p_NV, next_ids_N, k)
    p = log_p_NV.exp().gather(-1, targets.head_ids_NK)
    q = logits_NV.softmax(-1).gather(-1, targets.head_ids_NK)
    p, q = (torch.cat([x, 1 - x.sum(-1, keepdim=True)], -1) for x in (p, q))
    found = forward_kl(logits_NV, targets, next_ids_N, 1.0, "ghost")
    torch.testing.assert_close(found, (p * (p.log() - q.log())).sum(-1), rtol=1e-8, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: forward_kl(x, targets, next_ids_N, 1.0, "ghost"), logits_NV)


@pytest.mark.parametrize("tail", TAILS)
def test_extremes_stay_finite_and_not_negative(tail: str) -> None:
    log_p = torch.full((2, V), -torch.inf, dtype=torch.float32)
    log_p[0, 4] = 0.0  # one-hot teacher
    log_p[1] = -np.log(V)  # uniform teacher
    logits = torch.randn(2, V) * 50
    logits.requires_grad_()
    next_ids = torch.tensor([4, 0])
    loss = forward_kl(logits, sparse(log_p, next_ids, 3), next_ids, 1.0, tail)
    assert torch.isfinite(loss).all()
    assert (loss >= -1e-5).all()
    loss.sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_student_rows_beyond_the_vocabulary_take_no_part(problem: tuple[Tensor, Tensor, Tensor]) -> None:
    log_p_NV, logits_NV, next_ids_N = problem
    targets = sparse(log_p_NV, next_ids_N, 5)
    padded = torch.cat([logits_NV, torch.full((N, 9), 30.0, dtype=torch.float64)], -1)
    for own, other in zip(
        position_losses(logits_NV, next_ids_N, targets, V, 0.5, 1.0, "ghost"),
        position_losses(padded, next_ids_N, targets, V, 0.5, 1.0, "ghost"),
        strict=True,
    ):
        torch.testing.assert_close(own, other)


@pytest.mark.parametrize("num_chunks", [1, 3, 7, 20])
def test_chunks_change_nothing(problem: tuple[Tensor, Tensor, Tensor], num_chunks: int) -> None:
    log_p_NV, _, next_ids_N = problem
    targets = sparse(log_p_NV, next_ids_N, 5)
    head = torch.nn.Linear(6, V, bias=False, dtype=torch.float64)
    hidden = torch.randn(N, 6, dtype=torch.float64, requires_grad=True)

    def losses(logits: Tensor, ids: Tensor, part: tuple[WeightedTargets, ...]) -> LossSums:
        return position_losses(logits, ids, part[0].targets, V, 0.6, 1.0, "ground_truth")

    labels = (WeightedTargets(1.0, targets),)
    whole = losses(head(hidden), next_ids_N, labels)
    chunked = chunked_losses(head, hidden, next_ids_N, labels, num_chunks, losses)
    for a, b in zip(whole, chunked, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    for a, b in zip(
        torch.autograd.grad(whole.loss, [hidden, head.weight]),
        torch.autograd.grad(chunked.loss, [hidden, head.weight]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
