"""The loss of a chunk of positions: soft labels of one or several teachers, cross-entropy, z-loss.

Everything is computed from the student's logits at the entries (see `targets.py`) and the log-sum-exp of all others, so
that what costs V per position is the same for every loss: that log-sum-exp, once, and once more at T ≠ 1.

Shapes: N positions, E entries, W student rows, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.losses.divergences import log_sum
from training.losses.tails import StudentView, Tempered, soft_loss, tempered
from training.losses.targets import Entries, Labels, SparseTargets, WeightedTargets, merge
from training.losses.temperatures import log_partition


class LossSums(NamedTuple):
    """Sums over positions; divide by the loss-carrying positions of the global batch."""

    loss: Tensor
    """alpha · kd + (1 − alpha) · ce + z_loss · z."""
    kd: Tensor
    """Σ over teachers of weight · T² · D(teacher ‖ student); zero at alpha = 0, where it is not computed."""
    ce: Tensor
    """−log q of the next token, at temperature 1."""
    z: Tensor
    """(log Σ_v exp(logit_v))², which a z-loss keeps small (PaLM, arXiv 2204.02311)."""

    @classmethod
    def of(cls, sums_X: Tensor) -> "LossSums":
        """The sums in this order; of them only ``loss`` has a gradient."""
        loss, *terms = sums_X.unbind()
        return cls(loss, *(term.detach() for term in terms))


class Objective(NamedTuple):
    """What is minimised; ``alpha`` and ``temperature`` may follow schedules."""

    vocabulary_size: int
    """Student rows at and beyond it take no part: they are −∞ before any log-sum-exp."""
    alpha: float = 1.0
    temperature: float | Tensor = 1.0
    """T; a tensor where it is learned. Divergences at T are scaled by T² (Hinton et al. 2015), which keeps gradients as
    large as those of cross-entropy."""
    tail: str = "ghost"
    divergence: str = "forward_kl"
    beta: float = 0.5
    """Of jsd alone."""
    z_loss: float = 0.0
    """Weight of z."""
    stored: tuple[float, ...] = ()
    """Temperatures of the columns of ``SparseTargets.log_partition_NS``."""

    @property
    def needs_rest(self) -> bool:
        """Whether the logits of ids that are no entries are needed one by one."""
        return self.alpha > 0 and self.tail == "uniform"


class Statistics(NamedTuple):
    """What the loss needs of the student's logits."""

    logits_NE: Tensor
    """At the entries; free ones hold any number."""
    rest_lse_N: Tensor
    """log Σ exp(logit) over all other ids below V; −inf where there are none."""
    rest_lse_at_T_N: Tensor
    """log Σ exp(logit / T) over the same."""
    rest_NW: Tensor | None
    """Their logits, −inf at entries and beyond V: where the objective ``needs_rest``."""


class Part(NamedTuple):
    """The labels of some positions, ready to be compared with logits: all that does not depend on the student."""

    entries: Entries
    labels: list[Labels]
    weights: list[float]
    log_partition: list[Tensor]
    """log_partition_NS of each teacher."""
    teachers: list[Tempered] | None
    """Each teacher at T; None where T is learned, and they depend on it."""

    @classmethod
    def of(cls, objective: Objective, next_ids_N: Tensor, teachers: Sequence[WeightedTargets], dtype: torch.dtype
           ) -> "Part":  # fmt: skip
        """Merge what the teachers say, in ``dtype``. At alpha = 0 they are not asked."""
        asked = teachers if objective.alpha > 0 else ()
        entries, labels = merge(next_ids_N, [teacher.targets for teacher in asked], dtype)
        partitions = [teacher.targets.log_partition_NS.to(dtype) for teacher in asked]
        part = cls(entries, labels, [teacher.weight for teacher in asked], partitions, None)
        if isinstance(objective.temperature, Tensor):
            return part
        return part._replace(teachers=part.tempered(objective))

    def at(self, positions: slice) -> "Part":
        """Some of the positions, as views."""

        def of(columns: Any) -> Any:
            return type(columns)(*(column[positions] for column in columns))

        teachers = None if self.teachers is None else [of(teacher) for teacher in self.teachers]
        partitions = [log_partition_NS[positions] for log_partition_NS in self.log_partition]
        return Part(of(self.entries), [of(labels) for labels in self.labels], self.weights, partitions, teachers)

    def tempered(self, objective: Objective) -> list[Tempered]:
        """Each teacher at the objective's T."""
        temperature, size = objective.temperature, objective.vocabulary_size
        partitions = (log_partition(a_NS, objective.stored, temperature) for a_NS in self.log_partition)
        return [tempered(*of, temperature, size) for of in zip(self.labels, partitions, strict=True)]


def loss_sums(objective: Objective, part: Part, statistics: Statistics) -> LossSums:
    """The losses of N positions, summed; differentiable in the statistics and a learned T."""
    logits_NE = torch.where(part.entries.present_NE, statistics.logits_NE, -torch.inf)
    lse_N = log_sum(torch.cat([logits_NE, statistics.rest_lse_N[:, None]], 1))
    ce = (lse_N - statistics.logits_NE.gather(-1, part.entries.next_N1)[:, 0]).sum()
    z = lse_N.square().sum()
    kd = torch.zeros_like(ce)
    if part.labels:
        view = _view(objective, logits_NE, statistics.rest_lse_at_T_N, statistics.rest_NW)
        kd = torch.stack(
            [w * kd_N.sum() for w, kd_N in zip(part.weights, _distances(objective, part, view), strict=True)]
        ).sum()
    loss = (1 - objective.alpha) * ce + objective.z_loss * z
    return LossSums(loss + objective.alpha * kd if part.labels else loss, kd, ce, z)


def soft_losses(logits_NW: Tensor, next_ids_N: Tensor, targets: SparseTargets, objective: Objective) -> Tensor:
    """T² · D(teacher ‖ student) of each position, [N], from dense logits: for evaluation. One teacher alone."""
    dtype = torch.promote_types(logits_NW.dtype, torch.float32)
    part = Part.of(objective, next_ids_N, [WeightedTargets(1.0, targets)], dtype)
    logits_NE = logits_NW.gather(-1, part.entries.ids_NE).to(dtype)
    rest_NW = logits_NW.to(dtype).scatter(-1, part.entries.ids_NE, -torch.inf)
    rest_NW[:, objective.vocabulary_size :] = -torch.inf
    logits_NE = torch.where(part.entries.present_NE, logits_NE, -torch.inf)
    view = _view(objective, logits_NE, log_sum(rest_NW / objective.temperature), rest_NW)
    return _distances(objective, part, view)[0]


def _view(objective: Objective, logits_NE: Tensor, rest_lse_at_T_N: Tensor, rest_NW: Tensor | None) -> StudentView:
    """The student's log-probs at T, from logits that are −inf in free entries."""
    tempered_NE = _divided(logits_NE, objective.temperature)
    log_z_N = log_sum(torch.cat([tempered_NE, rest_lse_at_T_N[:, None]], 1))
    log_q_rest_NW = None
    if rest_NW is not None:
        log_q_rest_NW = _divided(rest_NW, objective.temperature) - log_z_N[:, None]
    return StudentView(tempered_NE - log_z_N[:, None], rest_lse_at_T_N - log_z_N, log_q_rest_NW)


def _divided(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """Logits / T; −inf stays, with a gradient of zero also where T is learned."""
    gone = logits == -torch.inf
    return torch.where(gone, -torch.inf, torch.where(gone, 0.0, logits) / temperature)


def _distances(objective: Objective, part: Part, view: StudentView) -> list[Tensor]:
    """T² · D(teacher ‖ student) of each teacher, [N]."""
    teachers = part.tempered(objective) if part.teachers is None else part.teachers
    name, beta, tail = objective.divergence, objective.beta, objective.tail
    return [
        objective.temperature**2
        * soft_loss(name, beta, tail, objective.vocabulary_size, part.entries, labels, teacher, view)
        for labels, teacher in zip(part.labels, teachers, strict=True)
    ]
