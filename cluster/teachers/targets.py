"""From a teacher's logits to what the store keeps: head, next token, forced ids, exact tail, draws, log-partitions.

Shapes: N positions, W teacher rows (the width of its head, ≥ V), V vocabulary, H entries of all heads together,
S temperatures, F forced ids, M draws of the position that has most.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cluster.config import TargetsConfig
from cluster.teachers import heads
from cluster.teachers.heads import Head
from cluster.teachers.masses import Masses, TorchMasses, has_c_compiler
from cluster.teachers.sampling import seed_of, systematic, uniforms
from logit_store import Targets
from logit_store.errors import ConfigError, TeacherError

CHUNK_BYTES = {"cpu": 256 * 2**20, "cuda": 1024 * 2**20}
"""Float32 logits held at once: at V = 151,936 they are of 441 positions on a CPU, of 1,766 on a GPU, which needs many
to be busy: a chunk's small operations, and the waiting for their results, take a millisecond whatever its size."""

CACHE_BYTES = 2 * 2**20
"""Float32 logits that a CPU chooses from at once: they and what is made of them stay in its cache (and in memory that
the allocator keeps: larger temporaries are mapped, and their pages cleared, each time)."""


def chunk_positions(width: int, num_bytes: int) -> int:
    """Positions whose float32 logits of ``width`` entries fit in ``num_bytes``; at least one."""
    return max(1, num_bytes // (4 * width))


def masses_of(logits_NW: Tensor) -> Masses:
    """Masses of raw logits of any float dtype, which stay as they are."""
    if logits_NW.is_cuda and has_c_compiler():
        from cluster.teachers.masses_triton import TritonMasses

        return TritonMasses(logits_NW)
    return TorchMasses(logits_NW)


def check_targets(targets: TargetsConfig, vocabulary_size: int) -> None:
    """Raise ConfigError where ``targets`` ask for ids that a vocabulary of this size does not have."""
    if targets.k and targets.k > vocabulary_size:
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
        self._on_device: dict[torch.device, tuple[Tensor, Tensor]] = {}

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
        step = chunk_positions(logits_NW.shape[1], CHUNK_BYTES["cuda"] if logits_NW.is_cuda else CACHE_BYTES)
        parts = zip(*(c.split(step) for c in (logits_NW, next_ids_N, rows_N, positions_N)), strict=True)
        return Targets.join([self._select(*part) for part in parts])

    def _select(self, logits_NW: Tensor, next_ids_N: Tensor, rows_N: Tensor, positions_N: Tensor) -> Targets:
        masses, targets, num_positions = masses_of(logits_NW), self.targets, len(logits_NW)
        lse_N1 = masses.log_sum()
        if not bool(torch.isfinite(lse_N1).all()):
            raise TeacherError(
                "the teacher's logits hold NaN or infinity: score in another teacher.dtype (float16 overflows first)"
            )
        lse_NS = torch.cat([lse_N1[:, :0], *(masses.log_sum(t) for t in targets.temperatures)], 1)
        lse_at_T_N1 = lse_NS if targets.is_sampled and targets.temperatures else lse_N1
        head = self._head(masses, lse_N1, lse_at_T_N1)
        at_N = torch.arange(num_positions, device=lse_N1.device)
        always_F, temperatures_S = self._constants(lse_N1.device)
        at_F, ids_F = at_N.repeat_interleave(len(always_F)), always_F.repeat(num_positions)
        kept = ((head.at_H, head.ids_H), (at_N, next_ids_N), (at_F, ids_F))
        head_logprobs_H, next_logprob_N, forced_logprobs_F = (
            masses.logits_NW[at_E, ids_E] - masses.offset_N1[at_E, 0] - lse_N1[at_E, 0] for at_E, ids_E in kept
        )
        for at_E, ids_E in kept:
            masses.take_out(at_E, ids_E)
        tail_N1 = masses.log_sum() - lse_N1
        log_partition_NS = lse_NS - lse_N1 / temperatures_S
        draws = self._draws(masses, tail_N1, lse_at_T_N1, rows_N, positions_N)
        columns = (
            *(head.counts_N.int(), head.ids_H.int(), head_logprobs_H, next_logprob_N, tail_N1[:, 0]),
            *(log_partition_NS, forced_logprobs_F.view(num_positions, -1), *draws),
        )
        return Targets(*_to_host(columns))

    def _constants(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The ``always`` ids and the temperatures on a device, copied there once: each copy waits for a GPU."""
        if device not in self._on_device:
            always_F = torch.tensor(self.targets.always, dtype=torch.long, device=device)
            self._on_device[device] = always_F, torch.tensor(self.targets.temperatures, device=device)
        return self._on_device[device]

    def _head(self, masses: Masses, lse_N1: Tensor, lse_at_T_N1: Tensor) -> Head:
        logits_NV, offset_N1 = masses.logits_NW[:, : self.vocabulary_size], masses.offset_N1
        match self.targets:
            case TargetsConfig(kind="top_k", k=int(k)):
                return heads.top_k(logits_NV, k)
            case TargetsConfig(kind="top_p", k=int(k), p=float(p)):
                return heads.top_p(logits_NV, offset_N1, lse_N1, p, k)
            case TargetsConfig(kind="threshold", tau=float(tau)):
                return heads.at_least(logits_NV, self.temperature * (lse_at_T_N1 + math.log(tau)) + offset_N1)
        return heads.empty(len(logits_NV), logits_NV.device)

    def _draws(
        self, masses: Masses, tail_N1: Tensor, lse_at_T_N1: Tensor, rows_N: Tensor, positions_N: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Draws of each position [N], and the drawn ids of all of them. What is left of ``masses`` is used up."""
        if not self.targets.is_sampled:
            return torch.zeros_like(rows_N, dtype=torch.int32), rows_N[:0].int()
        if self.targets.draws:
            counts_N1 = torch.full_like(tail_N1, self.targets.draws)
            points_NM = uniforms(self._seed, rows_N, positions_N, self.targets.draws)
        else:
            assert self.targets.tau
            if self.targets.temperatures:
                tail_N1 = masses.log_sum(self.temperature) - lse_at_T_N1
            counts_N1 = (tail_N1.exp() / self.targets.tau).ceil().clamp(min=1)
            points_NM = systematic(uniforms(self._seed, rows_N, positions_N, 1), counts_N1)
        counts_N1 = torch.where(masses.has_mass(self.vocabulary_size), counts_N1, 0).int()
        ids_NM = masses.draw(points_NM, self.temperature, self.vocabulary_size).sort(-1).values
        is_drawn_NM = torch.arange(ids_NM.shape[1], device=ids_NM.device) < counts_N1
        return counts_N1[:, 0], ids_NM[is_drawn_NM].int()


def _to_host(columns: Sequence[Tensor]) -> list[np.ndarray]:
    """The columns as arrays; by one copy for all of a dtype, since each waits for the GPU."""
    arrays: dict[int, np.ndarray] = {}
    for dtype in {column.dtype for column in columns}:
        members = [i for i, column in enumerate(columns) if column.dtype == dtype]
        flat = torch.cat([columns[i].flatten() for i in members]).cpu().numpy()
        ends = np.cumsum([columns[i].numel() for i in members])[:-1]
        for i, part in zip(members, np.split(flat, ends), strict=True):
            arrays[i] = part.reshape(columns[i].shape)
    return [arrays[i] for i in range(len(columns))]
