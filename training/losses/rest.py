"""The ids that are no entries of a position, together: their log-sum-exp, at temperature 1 and at T, and its gradient.

It is all of a loss that costs V per position. In torch, as the reference and for CPUs; `rest_triton.py` is the same for
GPUs.

Shapes: C positions, W student rows.
"""

import os
import shutil
import warnings
from functools import cache
from typing import Protocol

import torch
from torch import Tensor


class Rest(Protocol):
    """Sums over the ids of each position whose logits are not −inf."""

    lse_C: Tensor
    """log Σ exp(logit); −inf where there are none."""
    lse_at_T_C: Tensor | None
    """log Σ exp(logit / T); None where no T was given."""
    slope_C: Tensor | None
    """d lse_at_T / dT, where T is learned."""

    def gradient(self, by_lse_C: Tensor, by_lse_at_T_C: Tensor | None, dtype: torch.dtype) -> Tensor:
        """The gradient by the logits [C, W], given that by the sums; called once, for it may be made in their place."""


class TorchRest:
    """Exponentials are made in place of the logits, and the gradient in place of the exponentials."""

    def __init__(self, logits_CW: Tensor, temperature: float | None, learned: bool) -> None:
        """``logits_CW``, float32 or float64, is overwritten; its exponentials at T are a tensor more."""
        largest_C1 = logits_CW.amax(-1, keepdim=True).clamp(min=torch.finfo(logits_CW.dtype).min)
        logits_CW.sub_(largest_C1)
        self.lse_at_T_C = self.slope_C = None
        if temperature is not None:
            self._temperature, self._exp_at_T_CW = temperature, (logits_CW / temperature).exp_()
            self._sum_at_T_C1 = self._exp_at_T_CW.sum(-1, keepdim=True)
            self.lse_at_T_C = (self._sum_at_T_C1.log() + largest_C1 / temperature)[:, 0]
            if learned:
                # d/dT log Σ exp(x/T) = −E[x] / T² with x = largest + T · log exp_CW
                mean_C1 = torch.xlogy(self._exp_at_T_CW, self._exp_at_T_CW).sum(-1, keepdim=True) / self._sum_at_T_C1
                slope_C = -(mean_C1 / temperature + largest_C1 / temperature**2)[:, 0]
                self.slope_C = torch.where(self._sum_at_T_C1[:, 0] > 0, slope_C, 0.0)
        self._exp_CW = logits_CW.exp_()
        self._sum_C1 = self._exp_CW.sum(-1, keepdim=True)
        self.lse_C = (self._sum_C1.log() + largest_C1)[:, 0]

    def gradient(self, by_lse_C: Tensor, by_lse_at_T_C: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `Rest`."""
        gradient_CW = self._exp_CW.mul_(per_exponential(by_lse_C, self._sum_C1[:, 0])[:, None])
        if by_lse_at_T_C is not None:
            factor_C = per_exponential(by_lse_at_T_C, self._sum_at_T_C1[:, 0]) / self._temperature
            gradient_CW += self._exp_at_T_CW.mul_(factor_C[:, None])
            del self._exp_at_T_CW  # the cast needs its room
        return gradient_CW.to(dtype)


def per_exponential(by_lse_C: Tensor, sum_C: Tensor) -> Tensor:
    """The gradient by an exponential's logit over that exponential: ``by_lse / sum``, zero where there is none."""
    return torch.where(sum_C > 0, by_lse_C / torch.where(sum_C > 0, sum_C, 1.0), 0.0)


def rest_of(logits_CW: Tensor, temperature: float | None = None, learned: bool = False) -> Rest:
    """What a position's other ids sum to. ``logits_CW`` [C, W], −inf at entries and beyond V, may be overwritten.

    ``temperature`` where sums at T are wanted too, ``learned`` where their slope in T is. On a GPU the Triton kernels
    read float32 logits once for the sums and once for the gradient; where they cannot be built, torch does the same.
    """
    if logits_CW.device.type == "cuda" and logits_CW.dtype == torch.float32 and has_c_compiler():
        from training.losses.rest_triton import TritonRest

        return TritonRest(logits_CW, temperature, learned)
    return TorchRest(logits_CW, temperature, learned)


@cache
def has_c_compiler() -> bool:
    """Whether Triton can build what launches its kernels; a warning where it cannot."""
    if os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang"):
        return True
    warnings.warn(
        "no C compiler for Triton's kernels: install gcc, or the loss takes more passes over the logits",
        stacklevel=2,
    )
    return False
