"""Dense distributions from which ids are taken out: what all ids sum to, what is left, and draws from that.

It is all of the choice of targets that costs V per position, but for the search of the head. In torch, as the reference
and for CPUs; `masses_triton.py` is the same for GPUs.

Shapes: N positions, W rows of the teacher's head, V vocabulary, M draws of the position that has most.
"""

import os
import shutil
import warnings
from functools import cache
from typing import Protocol

import torch
from torch import Tensor

from cluster.teachers.sampling import draw

SURE_MASS = 1e-23
"""Sums of probabilities that float32 forms as exactly as any: 2^24 of them below its smallest, 1e-38, are nothing."""


class Masses(Protocol):
    """Logits x of N positions, less the largest of each: a common offset of −100 would cost two of seven digits."""

    logits_NW: Tensor
    """Float32, in the order of x: the head is chosen from them."""
    offset_N1: Tensor
    """What is to be taken off ``logits_NW`` to give x."""

    def log_sum(self, temperature: float = 1.0) -> Tensor:
        """Log Σ exp(x / T) over the ids that are not taken out, [N, 1]; −inf where there are none."""

    def take_out(self, at_E: Tensor, ids_E: Tensor) -> None:
        """Take out the ids ``ids_E`` of the positions ``at_E``."""

    def has_mass(self, vocabulary_size: int) -> Tensor:
        """Whether an id below V is left that has any mass, bool [N, 1]. Nothing is taken out after this."""

    def draw(self, points_NM: Tensor, temperature: float, vocabulary_size: int) -> Tensor:
        """Ids below V that are left, at the points of the cumulated exp(x / T): see `sampling.draw`. After
        ``has_mass``, and the last call.
        """


class TorchMasses:
    """Ids that are taken out are −inf in the logits and 0 in their exponentials."""

    def __init__(self, logits_NW: Tensor) -> None:
        self.logits_NW = logits_NW.float() - logits_NW.amax(-1, keepdim=True).float()
        self.offset_N1 = self.logits_NW.new_zeros(len(logits_NW), 1)
        self._mass_NW = self.logits_NW.exp()

    def log_sum(self, temperature: float = 1.0) -> Tensor:
        """See `Masses`. From the logits where float32 runs out of exponents."""
        if temperature != 1.0:
            return (self.logits_NW / temperature).logsumexp(-1, keepdim=True)
        sums_N1 = self._mass_NW.sum(-1, keepdim=True)
        is_faint_N = sums_N1[:, 0] < SURE_MASS
        log_sums_N1 = sums_N1.log()
        if bool(is_faint_N.any()):
            log_sums_N1[is_faint_N] = self.logits_NW[is_faint_N].logsumexp(-1, keepdim=True)
        return log_sums_N1

    def take_out(self, at_E: Tensor, ids_E: Tensor) -> None:
        """See `Masses`."""
        self.logits_NW[at_E, ids_E] = -torch.inf
        self._mass_NW[at_E, ids_E] = 0.0

    def has_mass(self, vocabulary_size: int) -> Tensor:
        """See `Masses`."""
        self._largest_N1 = self.logits_NW[:, :vocabulary_size].amax(-1, keepdim=True)
        return ~self._largest_N1.isneginf()

    def draw(self, points_NM: Tensor, temperature: float, vocabulary_size: int) -> Tensor:
        """See `Masses`."""
        weights_NV = self.logits_NW[:, :vocabulary_size].sub_(self._largest_N1.clamp(min=torch.finfo().min))
        if temperature != 1:
            weights_NV.div_(temperature)
        return draw(weights_NV.exp_(), points_NM)


@cache
def has_c_compiler() -> bool:
    """Whether Triton can build what launches its kernels; a warning where it cannot."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return True
    warnings.warn(
        "no C compiler for Triton's kernels: install gcc, or targets are chosen in more passes over the logits",
        stacklevel=2,
    )
    return False
