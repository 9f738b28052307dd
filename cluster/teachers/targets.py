"""From a teacher's logits to what the store keeps: head, next token, forced ids, exact tail, draws, log-partitions.

Shapes: N positions, W teacher rows (the width of its head, ≥ V), V vocabulary, H entries of all heads together,
S temperatures, F forced ids, M draws of the position that has most.
"""

import math

import torch
from torch import Tensor

from cluster.config import TargetsConfig
from cluster.teachers import heads
from cluster.teachers.heads import Head
from cluster.teachers.sampling import draw, seed_of, systematic, uniforms
from logit_store import Targets
from logit_store.errors import ConfigError, TeacherError

CHUNK_BYTES = 256 * 2**20
"""Float32 logits held at once: 441 positions at V = 151,936."""

CACHE_BYTES = 2 * 2**20
"""Float32 logits that a CPU chooses from at once: they and what is made of them stay in its cache (and in memory that
the allocator keeps: larger temporaries are mapped, and their pages cleared, each time)."""

SURE_MASS = 1e-23
"""Sums of probabilities that float32 forms as exactly as any: 2^24 of them below its smallest, 1e-38, are nothing."""


def chunk_positions(width: int, num_bytes: int = CHUNK_BYTES) -> int:
    """Positions whose float32 logits of ``width`` entries fit in ``num_bytes``; at least one."""
    return max(1, num_bytes // (4 * width))


def check_targets(targets: TargetsConfig, vocabulary_size: int) -> None:
    """Raise ConfigError where ``targets`` ask for ids that a vocabulary of this size does not have."""
    if targets.kind == "top_k" and targets.k and targets.k > vocabulary_size:
        raise ConfigError(
            f"targets.k = {targets.k} is larger than the vocabulary of {vocabulary_size}: "
            f"set it to {vocabulary_size} to keep everything, or lower"
        )
    if targets.always and max(targets.always) >= vocabulary_size:
        raise ConfigError(
            f"targets.always names id {max(targets.always)}, but the vocabulary has the ids 0 to {vocabulary_size - 1}"
        )


class Selector:
    """Chooses what is kept of dense distributions, on the device where they are: the same for every backend."""

    def __init__(self, targets: TargetsConfig, vocabulary_size: int, labels_id: str) -> None:
        check_targets(targets, vocabulary_size)
        self.targets, self.vocabulary_size, self.labels_id = targets, vocabulary_size, labels_id
        self.temperature = targets.temperatures[0] if targets.is_sampled and targets.temperatures else 1.0
        self._seed = seed_of(labels_id)

    def select(self, logits_NW: Tensor, next_ids_N: Tensor, rows_N: Tensor, positions_N: Tensor) -> Targets:
        """Targets of N positions, from raw logits of any float dtype; position ``positions_N[i]`` of the store's row
        ``rows_N[i]`` is followed by token ``next_ids_N[i]``. All four are on one device; the logits stay as they are.

        Plain code, of each position: ``p = softmax(logits)``; kept are the head, the next token and the ``always`` ids;
        ``tail = log(Σ p of everything else)``, teacher rows at and beyond V included, as a log-sum-exp over logits,
        since 1 − Σ loses everything on peaked rows. The head is

        - ``top_k``: the k most probable ids, ties to the lower id;
        - ``top_p``: the first of them, until they hold p or are k;
        - ``threshold``: the ids with p_T ≥ tau;
        - ``counts``: empty. Draws from the whole of p would also fall on the next token and the ``always`` ids; these
          are exact here and all draws are made from the rest, which can only lower the variance.

        Ids below V that are not kept are drawn in proportion to p_T, and each of a position's m draws stands for 1/m of
        the tail. ``counts`` makes ``draws`` independent ones. ``threshold`` makes m = ⌈tail_T / tau⌉, tail_T being the
        tail's mass at T, by systematic sampling (Duffield, Lund, Thorup 2007): at the points (u + j) / m of the
        cumulated probabilities, with one offset u. The mean over seeds is p_T, but that the mass of teacher rows beyond
        V (1e-6 as a rule) is spread over the ids of the tail. Where these have no mass, nothing is drawn. T is the one
        of ``temperatures``, or 1; log-probs and the tail's mass are those at 1 always.

        Raises TeacherError where a logit is NaN or +inf.
        """
        size = CACHE_BYTES if logits_NW.device.type == "cpu" else CHUNK_BYTES
        step = chunk_positions(logits_NW.shape[1], size)
        parts = zip(*(c.split(step) for c in (logits_NW, next_ids_N, rows_N, positions_N)), strict=True)
        return Targets.join([self._select(*part) for part in parts])

    def _select(self, logits_NW: Tensor, next_ids_N: Tensor, rows_N: Tensor, positions_N: Tensor) -> Targets:
        # A common offset of −100 would cost all that follows two of float32's seven digits.
        rest_NW = logits_NW.float() - logits_NW.amax(-1, keepdim=True).float()  # what is kept is made −inf
        mass_NW = rest_NW.exp()  # and 0
        next_ids_N1, always_F = next_ids_N[:, None], torch.tensor(self.targets.always, device=rest_NW.device).long()
        lse_N1, lse_NS = self._log_sums(rest_NW, mass_NW)
        head = self._head(rest_NW[:, : self.vocabulary_size], lse_N1, lse_NS)
        at_head = (head.at_H, head.ids_H)
        head_logprobs_H = rest_NW[at_head] - lse_N1[head.at_H, 0]
        next_logprob_N1 = rest_NW.gather(-1, next_ids_N1) - lse_N1
        forced_logprobs_NF = rest_NW[:, always_F] - lse_N1
        for left_NW, nothing in ((rest_NW, -torch.inf), (mass_NW, 0.0)):
            left_NW[at_head] = nothing
            left_NW.scatter_(-1, next_ids_N1, nothing)
            left_NW[:, always_F] = nothing
        tail_N1 = _log_sum(rest_NW, mass_NW) - lse_N1
        log_partition_NS = lse_NS - lse_N1 / lse_N1.new_tensor(self.targets.temperatures)
        kept = (head.counts_N.int(), head.ids_H.int(), head_logprobs_H, next_logprob_N1[:, 0])
        draws = self._draws(rest_NW, tail_N1, lse_NS, rows_N, positions_N)
        columns = (*kept, tail_N1[:, 0], log_partition_NS, forced_logprobs_NF, *draws)
        return Targets(*(column.cpu().numpy() for column in columns))

    def _log_sums(self, logits_NW: Tensor, mass_NW: Tensor) -> tuple[Tensor, Tensor]:
        """Log Σ exp(logits) [N, 1], and log Σ exp(logits / T) of each stored temperature [N, S]."""
        lse_N1 = mass_NW.sum(-1, keepdim=True).log()
        if not bool(torch.isfinite(lse_N1).all()):
            raise TeacherError(
                "the teacher's logits hold NaN or infinity: score in another teacher.dtype (float16 overflows first)"
            )
        tempered = [(logits_NW / t).logsumexp(-1, keepdim=True) for t in self.targets.temperatures]
        return lse_N1, torch.cat([lse_N1[:, :0], *tempered], 1)

    def _head(self, logits_NV: Tensor, lse_N1: Tensor, lse_NS: Tensor) -> Head:
        match self.targets:
            case TargetsConfig(kind="top_k", k=int(k)):
                return heads.top_k(logits_NV, k)
            case TargetsConfig(kind="top_p", k=int(k), p=float(p)):
                return heads.top_p(logits_NV, lse_N1, p, k)
            case TargetsConfig(kind="threshold", tau=float(tau)):
                lse_N1 = lse_NS if self.targets.temperatures else lse_N1
                return heads.at_least(logits_NV, self.temperature * (lse_N1 + math.log(tau)))
        return heads.empty(len(logits_NV), logits_NV.device)

    def _draws(
        self, rest_NW: Tensor, tail_N1: Tensor, lse_NS: Tensor, rows_N: Tensor, positions_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draws of each position [N], and the drawn ids of all of them; ``rest_NW`` is overwritten."""
        if not self.targets.is_sampled:
            return torch.zeros_like(rows_N, dtype=torch.int32), rows_N[:0].int()
        largest_N1 = rest_NW[:, : self.vocabulary_size].amax(-1, keepdim=True)
        if self.targets.draws:
            counts_N1 = torch.full_like(largest_N1, self.targets.draws)
            points_NM = uniforms(self._seed, rows_N, positions_N, self.targets.draws)
        else:
            assert self.targets.tau
            if self.targets.temperatures:
                tail_N1 = (rest_NW / self.temperature).logsumexp(-1, keepdim=True) - lse_NS
            counts_N1 = (tail_N1.exp() / self.targets.tau).ceil().clamp(min=1)
            points_NM = systematic(uniforms(self._seed, rows_N, positions_N, 1), counts_N1)
        counts_N1 = torch.where(largest_N1.isneginf(), 0, counts_N1).int()
        weights_NV = rest_NW[:, : self.vocabulary_size].sub_(largest_N1.clamp(min=torch.finfo().min))
        if self.temperature != 1:
            weights_NV.div_(self.temperature)
        ids_NM = draw(weights_NV.exp_(), points_NM).sort(-1).values
        is_drawn_NM = torch.arange(ids_NM.shape[1], device=ids_NM.device) < counts_N1
        return counts_N1[:, 0], ids_NM[is_drawn_NM].int()


def _log_sum(logits_NW: Tensor, mass_NW: Tensor) -> Tensor:
    """Log of the sums of ``mass_NW = exp(logits_NW)`` [N, 1]; from the logits where float32 runs out of exponents."""
    sums_N1 = mass_NW.sum(-1, keepdim=True)
    is_faint_N = sums_N1[:, 0] < SURE_MASS
    log_sums_N1 = sums_N1.log()
    if bool(is_faint_N.any()):
        log_sums_N1[is_faint_N] = logits_NW[is_faint_N].logsumexp(-1, keepdim=True)
    return log_sums_N1
