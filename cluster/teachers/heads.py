"""Heads: which ids of a distribution are kept for being probable.

Shapes: N positions, V vocabulary, K candidates of each position, H entries of all heads together.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

MASS_BITS = 40
"""Bits to which probabilities are cut before they are summed. Integers, because a CUDA cumsum of floats adds in another
order each time."""


class Head(NamedTuple):
    """The heads of N positions, one after the other, ids ascending in each."""

    counts_N: Tensor
    at_H: Tensor
    """The position that an entry belongs to."""
    ids_H: Tensor

    @classmethod
    def where(cls, is_kept_NV: Tensor) -> "Head":
        """The ids that are marked."""
        at_H, ids_H = is_kept_NV.nonzero(as_tuple=True)
        return cls(at_H.bincount(minlength=len(is_kept_NV)), at_H, ids_H)

    @classmethod
    def among(cls, ids_NK: Tensor, is_kept_NK: Tensor) -> "Head":
        """Those of each position's candidates that are marked."""
        ids_NK, order_NK = ids_NK.sort(-1)
        is_kept_NK = is_kept_NK.gather(-1, order_NK)
        return cls(is_kept_NK.sum(-1), is_kept_NK.nonzero()[:, 0], ids_NK[is_kept_NK])


def top_k(logits_NV: Tensor, k: int) -> Head:
    """The ids of the k largest logits, ties to the lower id."""
    ids_NK = _top_ids(logits_NV, k).sort(-1).values
    num_positions, device = len(ids_NK), ids_NK.device
    at_N = torch.arange(num_positions, device=device)
    return Head(torch.full_like(at_N, k), at_N.repeat_interleave(k), ids_NK.flatten())  # nothing to be counted


def top_p(logits_NV: Tensor, offset_N1: Tensor, lse_N1: Tensor, p: float, k: int) -> Head:
    """The first ids, most probable first and ties to the lower id, that hold a mass of p, and no more than k. Log-probs
    are ``logits − offset − lse``.
    """
    ids_NK = _top_ids(logits_NV, min(k, logits_NV.shape[1])).sort(-1).values
    logits_NK, order_NK = logits_NV.gather(-1, ids_NK).sort(stable=True, dim=-1, descending=True)
    units_NK = ((logits_NK - offset_N1 - lse_N1).double().exp() * 2.0**MASS_BITS).long()
    before_NK = units_NK.cumsum(-1) - units_NK
    return Head.among(ids_NK.gather(-1, order_NK), before_NK < int(p * 2**MASS_BITS))


def at_least(logits_NV: Tensor, least_N1: Tensor) -> Head:
    """The ids whose logits are at least ``least_N1``."""
    return Head.where(logits_NV >= least_N1)


def empty(num_positions: int, device: torch.device) -> Head:
    """Heads without entries."""
    return Head.where(torch.zeros(num_positions, 1, dtype=torch.bool, device=device))


def _top_ids(logits_NV: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits in any order. Which of the equal ones at the cut ``_largest`` takes is left open."""
    if k == logits_NV.shape[1]:
        return torch.arange(k, device=logits_NV.device).expand(len(logits_NV), k)
    values_NK, ids_NK = _largest(logits_NV, k + 1)
    is_tied_N = values_NK[:, -2] == values_NK[:, -1]
    ids_NK = ids_NK[:, :k]
    if bool(is_tied_N.any()):
        tied_NV, cut_N1 = logits_NV[is_tied_N], values_NK[is_tied_N, -1:]
        above_NV, equal_NV = tied_NV > cut_N1, tied_NV == cut_N1
        num_equal_N1 = k - above_NV.sum(-1, keepdim=True)
        is_top_NV = above_NV | (equal_NV & (equal_NV.cumsum(-1, dtype=torch.int32) <= num_equal_N1))
        ids_NK[is_tied_N] = is_top_NV.nonzero()[:, 1].view(-1, k)
    return ids_NK


def _largest(logits_NV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits, largest first, and their ids: ``logits_NV.topk(k)``, at half its price or less.

    In two steps: the k groups of ids whose largest logits are largest hold k largest logits, since a group outside has
    k values at least as large as its own before it. Group g of W is the ids g, g + W, g + 2W, …, so that the maximum
    over groups is one over columns; √(V/k) ids to a group make both steps choose from equally many.
    """
    num_positions, width = logits_NV.shape
    group_size = math.isqrt(width // k)
    if group_size < 2:
        return tuple(logits_NV.topk(k))
    num_groups = width // group_size
    ends = group_size * num_groups  # the few ids beyond belong to no group
    groups_NK = logits_NV[:, :ends].unflatten(1, (group_size, num_groups)).amax(1).topk(k, sorted=False).indices
    steps_G1 = torch.arange(0, ends, num_groups, device=logits_NV.device)[:, None]
    beyond_NE = torch.arange(ends, width, device=logits_NV.device).expand(num_positions, -1)
    candidates_NC = torch.cat([(groups_NK[:, None] + steps_G1).flatten(1), beyond_NE], 1)
    values_NK, at_NK = logits_NV.gather(-1, candidates_NC).topk(k)
    return values_NK, candidates_NC.gather(-1, at_NK)
