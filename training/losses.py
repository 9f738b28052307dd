"""The losses of a student on cached labels: forward KL on a sparse head with a named tail, and cross-entropy.

Shapes: N positions, K head entries, V vocabulary, W student rows (its head's width, ≥ V), D hidden.

At each position the store gives the head H (K ids with log p), the next token's log p and the tail's
log-mass. Everything outside the head, the next token included where the head does not hold it, has the
mass r = 1 − Σ_H p. What the student is told about r is the tail treatment; q is the student's softmax:

    ghost         one extra bucket:       Σ_H p log(p/q) + r log(r / q(outside H))
    ground_truth  r goes to the next token x:   Σ p' log(p'/q),  p' = p on H, p'(x) += r
    renormalise   r is forgotten:         Σ_H p' log(p'/q),  p' = p / Σ_H p
    uniform       r is spread evenly:     Σ_H p log(p/q) + Σ_{v∉H} r/(V−K) log((r/(V−K)) / q_v)

All include the teacher's entropy of the same partition, so all are ≥ 0, and at K = V all are the KL of
online distillation. Ghost: "ghost token" of Raman et al. 2025 (arXiv 2503.16870), which also measures the
residual on the ground truth.
"""

import math
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

CHUNK_BYTES = 64 * 2**20
"""Float32 logits of a chunk: 110 positions at V = 151,936. Forward and backward need about five such buffers."""


class SparseTargets(NamedTuple):
    """Labels of N positions."""

    head_ids_NK: Tensor
    """int64, below V."""
    head_logprobs_NK: Tensor
    """log p at temperature 1."""
    next_logprob_N: Tensor
    tail_logmass_N: Tensor
    log_partition_N: Tensor
    """A_T = log Σ_v p_v^(1/T); zero at T = 1."""


class WeightedTargets(NamedTuple):
    """One teacher's labels. The weights of a batch's teachers add up to 1."""

    weight: float
    targets: SparseTargets

    def part(self, start: int, stop: int) -> "WeightedTargets":
        """The labels of some of the positions."""
        return WeightedTargets(self.weight, SparseTargets(*(column[start:stop] for column in self.targets)))


class LossSums(NamedTuple):
    """Sums over positions; divide by ``positions`` of the global batch."""

    loss: Tensor
    kd: Tensor
    ce: Tensor


def forward_kl(logits_NV: Tensor, targets: SparseTargets, next_ids_N: Tensor, temperature: float, tail: str) -> Tensor:
    """KL(teacher ‖ student) of each position at ``temperature``, [N], in nats. ``logits_NV`` end at V."""
    log_q_NV = (logits_NV / temperature).log_softmax(-1)
    ids_NK = targets.head_ids_NK
    log_q_NK = log_q_NV.gather(-1, ids_NK)
    log_p_NK = targets.head_logprobs_NK.to(log_q_NV.dtype) / temperature - targets.log_partition_N[:, None]
    if tail == "renormalise":
        return _kl(log_p_NK.log_softmax(-1), log_q_NK).sum(-1)
    vocabulary_size, k = log_q_NV.shape[-1], ids_NK.shape[-1]
    if k == vocabulary_size:  # nothing is outside the head
        return _kl(log_p_NK, log_q_NK).sum(-1)
    next_in_head_NK = ids_NK == next_ids_N[:, None]
    log_r_N = _outside_logmass(targets, log_p_NK, next_in_head_NK, temperature)
    if tail == "ghost":
        log_q_outside_N = log_q_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)
        return _kl(log_p_NK, log_q_NK).sum(-1) + _kl(log_r_N, log_q_outside_N)
    if tail == "uniform":
        log_each_N = log_r_N - math.log(vocabulary_size - k)
        mean_log_q_N = (log_q_NV.sum(-1) - log_q_NK.sum(-1)) / (vocabulary_size - k)
        spread_N = torch.where(log_r_N > -torch.inf, log_r_N.exp() * (log_each_N - mean_log_q_N), 0.0)
        return _kl(log_p_NK, log_q_NK).sum(-1) + spread_N
    assert tail == "ground_truth"
    log_p_NK = torch.where(next_in_head_NK, torch.logaddexp(log_p_NK, log_r_N[:, None]), log_p_NK)
    on_next_N = torch.where(next_in_head_NK.any(-1), -torch.inf, log_r_N)
    log_q_next_N = log_q_NV.gather(-1, next_ids_N[:, None])[:, 0]
    return _kl(log_p_NK, log_q_NK).sum(-1) + _kl(on_next_N, log_q_next_N)


def position_losses(
    logits_NW: Tensor,
    next_ids_N: Tensor,
    targets: SparseTargets | None,
    vocabulary_size: int,
    alpha: float,
    temperature: float,
    tail: str,
) -> LossSums:
    """``alpha · T² · KL + (1 − alpha) · cross-entropy``, summed over the positions.

    Student rows at and beyond V take no part (they are −∞ before any log-sum-exp). Computed in float32, or
    float64 where the logits are. Without ``targets``, alpha must be 0.
    """
    logits_NV = logits_NW[:, :vocabulary_size]
    logits_NV = logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()
    ce = torch.nn.functional.cross_entropy(logits_NV, next_ids_N, reduction="sum")
    if targets is None or alpha == 0:
        return LossSums(ce, torch.zeros_like(ce), ce)
    kd = temperature**2 * forward_kl(logits_NV, targets, next_ids_N, temperature, tail).sum()
    return LossSums(alpha * kd + (1 - alpha) * ce, kd, ce)


def chunked_losses(
    head: Callable[[Tensor], Tensor],
    hidden_ND: Tensor,
    next_ids_N: Tensor,
    targets: tuple[WeightedTargets, ...],
    num_chunks: int,
    losses: Callable[[Tensor, Tensor, tuple[WeightedTargets, ...]], LossSums],
) -> LossSums:
    """``losses(head(hidden), next_ids, targets)`` without ever holding the logits of more than a chunk.

    Each chunk's logits are recomputed in the backward pass, so memory grows with N × V / ``num_chunks``. The
    head is called exactly ``num_chunks`` times, on empty chunks too: under ZeRO-3 each call gathers its weights
    from all ranks, so all ranks must call it equally often.
    """

    def of_chunk(part_ND: Tensor, ids_N: Tensor, part: tuple[WeightedTargets, ...]) -> LossSums:
        return losses(head(part_ND), ids_N, part)

    if num_chunks == 1:
        return of_chunk(hidden_ND, next_ids_N, targets)
    bounds = [len(hidden_ND) * i // num_chunks for i in range(num_chunks + 1)]
    sums: list[LossSums] = []
    for start, stop in pairwise(bounds):
        part = tuple(teacher.part(start, stop) for teacher in targets)
        sums.append(checkpoint(of_chunk, hidden_ND[start:stop], next_ids_N[start:stop], part, use_reentrant=False))
    return LossSums(*(torch.stack(terms).sum() for terms in zip(*sums, strict=True)))


def default_chunk_positions(width: int) -> int:
    """Positions whose float32 logits of ``width`` entries fit in ``CHUNK_BYTES``; at least one."""
    return max(1, CHUNK_BYTES // (4 * width))


def _kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """P log(p/q), elementwise; 0 where p is 0."""
    present = log_p > -torch.inf
    return torch.where(present, log_p.exp() * (torch.where(present, log_p, 0.0) - log_q), 0.0)


def _outside_logmass(targets: SparseTargets, log_p_NK: Tensor, next_in_head_NK: Tensor, temperature: float) -> Tensor:
    """Log r at the temperature: from the exact tail at T = 1, as what the head leaves of one otherwise."""
    if temperature == 1.0:
        next_outside_N = torch.where(next_in_head_NK.any(-1), -torch.inf, targets.next_logprob_N.to(log_p_NK.dtype))
        return torch.logaddexp(targets.tail_logmass_N.to(log_p_NK.dtype), next_outside_N)
    return torch.log((1.0 - log_p_NK.exp().sum(-1)).clamp(min=0.0))
