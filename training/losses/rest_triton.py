"""`rest.py` for GPUs: two Triton kernels, each of which reads the logits once.

In torch the same takes eight passes over [C, W], by arithmetic as long as the head's products at D = 1,024: a GPU
multiplies at hundreds of TFLOP/s, but reads a few TB/s. Figures are in docs/benchmarks/gpu.md.

Shapes: C positions, W student rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from training.losses.rest import per_exponential

BLOCK = 2048
"""Logits that a program holds at once: 8 in each of 256 threads."""
NUM_WARPS = 8


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    logits_CW, stride, width, inverse_T, largest_C, sum_C, sum_at_T_C, sum_log_at_T_C,
    AT_T: tl.constexpr, LEARNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per position: the largest logit, Σ exp(x), Σ exp(x/T) and Σ exp(x/T)·x/T with x = logit − largest.

    Each lane has a maximum of its own, to which its sums are rescaled when it grows (Milakov and Gimelshein 2018,
    arXiv 1805.02867): lanes meet once, at the end.
    """
    row = tl.program_id(0)
    start_of_row = logits_CW + row.to(tl.int64) * stride
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    sums_at_T = tl.zeros([BLOCK], tl.float32)
    sums_log = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        x = tl.load(start_of_row + start + columns, mask=start + columns < width, other=float("-inf"))
        grown = tl.maximum(largest, x)
        # −inf is a lane that has seen nothing yet; −inf − −inf is no number.
        level = tl.where(grown == float("-inf"), 0.0, grown)
        fall, x = tl.where(largest == float("-inf"), 0.0, largest - level), x - level
        sums = sums * tl.exp(fall) + tl.exp(x)
        if AT_T:
            exp_at_T = tl.exp(x * inverse_T)
            if LEARNED:
                sums_log = (sums_log + sums_at_T * fall * inverse_T) * tl.exp(fall * inverse_T)
                sums_log += tl.where(exp_at_T > 0, exp_at_T * x * inverse_T, 0.0)
            sums_at_T = sums_at_T * tl.exp(fall * inverse_T) + exp_at_T
        largest = grown
    most = tl.maximum(tl.max(largest, 0), -3.4028234663852886e38)  # finite also where all are −inf
    fall = tl.where(largest == float("-inf"), 0.0, largest - most)
    tl.store(largest_C + row, most)
    tl.store(sum_C + row, tl.sum(sums * tl.exp(fall), 0))
    if AT_T:
        shrink = tl.exp(fall * inverse_T)
        tl.store(sum_at_T_C + row, tl.sum(sums_at_T * shrink, 0))
        if LEARNED:
            tl.store(sum_log_at_T_C + row, tl.sum((sums_log + sums_at_T * fall * inverse_T) * shrink, 0))


@triton.jit
def _gradient(  # type: ignore[no-untyped-def]
    logits_CW, stride, width, inverse_T, largest_C, factor_C, factor_at_T_C, gradient_CW, gradient_stride,
    AT_T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program per position: exp(x) · factor + exp(x / T) · factor at T, in the place of its logits.

    Gradients of half precision fill the first half of a row's bytes. Blocks go from left to right, so that they are
    written where all has been read: within the first block by the barrier, later ones lie behind what is still to come.
    """
    row = tl.program_id(0)
    logits_W = logits_CW + row.to(tl.int64) * stride
    gradient_W = gradient_CW + row.to(tl.int64) * gradient_stride
    largest, factor = tl.load(largest_C + row), tl.load(factor_C + row)
    factor_at_T = tl.load(factor_at_T_C + row)
    columns = tl.arange(0, BLOCK)
    for start in range(0, width, BLOCK):
        inside = start + columns < width
        x = tl.load(logits_W + start + columns, mask=inside, other=float("-inf")) - largest
        gradient = tl.exp(x) * factor
        if AT_T:
            gradient += tl.exp(x * inverse_T) * factor_at_T
        tl.debug_barrier()
        tl.store(gradient_W + start + columns, gradient.to(gradient_CW.dtype.element_ty), mask=inside)


class TritonRest:
    """Keeps the logits, and makes their gradient from them, in their place. See `rest.Rest`."""

    def __init__(self, logits_CW: Tensor, temperature: float | None, learned: bool) -> None:
        """``logits_CW`` is float32, its rows contiguous."""
        assert logits_CW.stride(1) == 1
        self._logits_CW, self._temperature = logits_CW, temperature
        at_T = temperature is not None
        self._inverse_T = 1.0 / temperature if temperature is not None else 1.0
        num_positions, width = logits_CW.shape
        columns = torch.zeros(4, num_positions, device=logits_CW.device)
        self._largest_C, self._sum_C, self._sum_at_T_C, sum_log_C = columns
        with torch.cuda.device_of(logits_CW):
            _sums[(num_positions,)](
                logits_CW, logits_CW.stride(0), width, self._inverse_T, *columns,
                AT_T=at_T, LEARNED=learned, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        self.lse_C = self._sum_C.log() + self._largest_C
        self.lse_at_T_C = self.slope_C = None
        if temperature is not None:
            self.lse_at_T_C = self._sum_at_T_C.log() + self._largest_C / temperature
            if learned:  # as in TorchRest: log exp_CW is what sum_log sums
                mean_C = sum_log_C / self._sum_at_T_C
                slope_C = -(mean_C / temperature + self._largest_C / temperature**2)
                self.slope_C = torch.where(self._sum_at_T_C > 0, slope_C, 0.0)

    def gradient(self, by_lse_C: Tensor, by_lse_at_T_C: Tensor | None, dtype: torch.dtype) -> Tensor:
        """See `rest.Rest`."""
        logits_CW = self._logits_CW
        num_positions, width = logits_CW.shape
        gradient_CW = logits_CW.view(dtype)[:, :width]
        factor_C = per_exponential(by_lse_C, self._sum_C).contiguous()
        factor_at_T_C = factor_C
        if by_lse_at_T_C is not None:
            factor_at_T_C = (per_exponential(by_lse_at_T_C, self._sum_at_T_C) * self._inverse_T).contiguous()
        with torch.cuda.device_of(logits_CW):
            _gradient[(num_positions,)](
                logits_CW, logits_CW.stride(0), width, self._inverse_T, self._largest_C, factor_C, factor_at_T_C,
                gradient_CW, gradient_CW.stride(0), AT_T=by_lse_at_T_C is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        return gradient_CW
