"""Divergences of two partitions of one: sums over cells, from the logarithms of the cells' masses.

Shapes: N positions, C cells. −inf is a cell without mass; where neither side has any, a cell counts nothing, whatever
stands in it, and gets no gradient.
"""

import math

import torch
from torch import Tensor

DIVERGENCES = ("forward_kl", "reverse_kl", "jsd", "tvd")
LOG_FLOOR = -126 * math.log(2.0)
"""What reverse KL takes for a cell to which the teacher gives nothing: 2^-126, float32's smallest normal number. With
zero it would be infinite, and its gradient as well."""


def forward_kl(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ p log(p / q), [N] in nats (Hinton et al. 2015, arXiv 1503.02531). Covers every mode of p."""
    has_p_NC = log_p_NC > -torch.inf
    log_p_NC, log_q_NC = (torch.where(has_p_NC, x, 0.0) for x in (log_p_NC, log_q_NC))
    return torch.where(has_p_NC, log_p_NC.exp() * (log_p_NC - log_q_NC), 0.0).sum(-1)


def reverse_kl(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ q log(q / p), [N] in nats (MiniLLM, arXiv 2306.08543). Seeks modes; p counts 2^-126 at least."""
    return forward_kl(log_q_NC, log_p_NC.clamp(min=LOG_FLOOR))


def jsd(log_p_NC: Tensor, log_q_NC: Tensor, beta: float) -> Tensor:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q, 0 < β < 1, [N] in nats (GKD, arXiv 2306.13649).

    At β = ½ the Jensen-Shannon divergence, at most log 2. Divided by β it tends to KL(p ‖ q) as β → 0.
    """
    either_NC = (log_p_NC > -torch.inf) | (log_q_NC > -torch.inf)
    # −inf on one side is harmless, on both logaddexp's gradient is NaN.
    parts = (log_p_NC + math.log(beta), log_q_NC + math.log1p(-beta))
    log_m_NC = torch.logaddexp(*(torch.where(either_NC, part, 0.0) for part in parts))
    return beta * forward_kl(log_p_NC, log_m_NC) + (1 - beta) * forward_kl(log_q_NC, log_m_NC)


def tvd(log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """½ Σ |p − q|, [N] in 0 to 1 (Wen et al. 2023, arXiv 2307.15190). Bounded: no cell has a gradient above its q."""
    return 0.5 * (log_p_NC.exp() - log_q_NC.exp()).abs().sum(-1)


def divergence(name: str, beta: float, log_p_NC: Tensor, log_q_NC: Tensor) -> Tensor:
    """The divergence of this name, [N]; ``beta`` is jsd's alone."""
    if name == "jsd":
        return jsd(log_p_NC, log_q_NC, beta)
    return {"forward_kl": forward_kl, "reverse_kl": reverse_kl, "tvd": tvd}[name](log_p_NC, log_q_NC)


def log_sum(x_NC: Tensor) -> Tensor:
    """``x.logsumexp(-1)``, [N]; where every cell is −inf so is the result, and gradients are zero and not NaN."""
    any_N1 = (x_NC > -torch.inf).any(-1, keepdim=True)
    return torch.where(any_N1, torch.where(any_N1, x_NC, 0.0).logsumexp(-1, keepdim=True), -torch.inf)[:, 0]
