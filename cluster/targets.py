"""From a teacher's logits to what the store keeps: head, next token, exact tail mass, log-partitions.

Shapes: N positions, W teacher rows (the width of its head, ≥ V), V vocabulary, K head entries, S temperatures.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.config import TargetsConfig
from logit_store import Targets
from logit_store.errors import TeacherError

CHUNK_BYTES = 256 * 2**20
"""Float32 logits held at once: 441 positions at V = 151,936. The softmax needs about three such buffers."""


def chunk_positions(width: int) -> int:
    """Positions whose float32 logits of ``width`` entries fit in ``CHUNK_BYTES``; at least one."""
    return max(1, CHUNK_BYTES // (4 * width))


class Selector:
    """Chooses what is kept of dense distributions, on the device where they are: the same for every backend."""

    def __init__(self, targets: TargetsConfig, vocabulary_size: int, labels_id: str) -> None:
        self.targets, self.vocabulary_size, self.labels_id = targets, vocabulary_size, labels_id

    def select(self, logits_NW: Tensor, next_ids_N: Tensor, rows_N: Tensor, positions_N: Tensor) -> Targets:
        """Targets of N positions, from raw logits of any float dtype; position ``positions_N[i]`` of the store's row
        ``rows_N[i]`` is followed by token ``next_ids_N[i]``.
        """
        assert self.targets.kind == "top_k"
        assert self.targets.k
        return select_targets(logits_NW, next_ids_N, self.vocabulary_size, self.targets.k, self.targets.temperatures)


def select_targets(
    logits_NW: Tensor, next_ids_N: Tensor, vocabulary_size: int, k: int, temperatures: Sequence[float]
) -> Targets:
    """Targets of N positions, from raw logits of any float dtype.

    Plain code: ``p = softmax(logits); head = top-k of p[:V]; tail = log(1 − Σ kept p)``, with the tail
    computed as a log-sum-exp over the logits that are not kept, since 1 − Σ loses everything on peaked
    rows. Rows of the teacher at and beyond V are never entries: their mass is tail. Ties go to the lower id.
    Raises TeacherError where a logit is NaN or +inf.
    """
    logits_NW = logits_NW.float()
    lse_N1 = logits_NW.logsumexp(-1, keepdim=True)
    if not bool(torch.isfinite(lse_N1).all()):
        raise TeacherError(
            "the teacher's logits hold NaN or infinity: score in another teacher.dtype (float16 overflows first)"
        )
    head_ids_NK = _top_ids(logits_NW[:, :vocabulary_size], k)
    head_logprobs_NK = logits_NW.gather(-1, head_ids_NK) - lse_N1
    next_logprob_N1 = logits_NW.gather(-1, next_ids_N[:, None]) - lse_N1
    partitions = [(logits_NW / t).logsumexp(-1) - lse_N1[:, 0] / t for t in temperatures]
    rest_NW = logits_NW.scatter(-1, head_ids_NK, -torch.inf).scatter(-1, next_ids_N[:, None], -torch.inf)
    tail_N1 = rest_NW.logsumexp(-1, keepdim=True) - lse_N1
    return Targets.of_heads(
        head_ids_NK.to(torch.int32).cpu().numpy(),
        head_logprobs_NK.cpu().numpy(),
        next_logprob_N1[:, 0].cpu().numpy(),
        tail_N1[:, 0].cpu().numpy(),
        torch.stack(partitions, 1).cpu().numpy() if partitions else np.zeros((len(next_ids_N), 0), np.float32),
    )


def _top_ids(logits_NV: Tensor, k: int) -> Tensor:
    """Ids of the k largest logits, largest first, ties to the lower id (``topk`` alone leaves ties open)."""
    values_NK, ids_NK = logits_NV.topk(k, dim=-1)
    cut_N1 = values_NK[:, -1:]
    tied_N = (logits_NV >= cut_N1).sum(-1) > k
    if bool(tied_N.any()):
        ids_NK[tied_N] = logits_NV[tied_N].sort(stable=True, dim=-1, descending=True).indices[:, :k]
    ids_NK = ids_NK.sort(-1).values
    order_NK = logits_NV.gather(-1, ids_NK).sort(stable=True, dim=-1, descending=True).indices
    return ids_NK.gather(-1, order_NK)
