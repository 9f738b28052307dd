"""`masses.py` for GPUs: Triton kernels that read the logits once for each sum, and make nothing of their size.

In torch the same reads and writes [N, W] some twelve times, and draws cumulate 64-bit integers over it. Figures are in
docs/benchmarks/gpu.md.

Shapes: N positions, W rows of the teacher's head, V vocabulary, M draws of the position that has most, G groups of ids.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cluster.teachers.sampling import FRACTION_BITS, units_at

BLOCK = 2048
"""Logits that a program holds at once: 8 in each of 256 threads."""
ONE = 2.0**FRACTION_BITS
GROUP = 256
"""Ids whose weights are summed, of which a draw then takes one: of 151,936 ids there are 594 such groups."""
NUM_WARPS = 8


@triton.jit
def _sums(  # type: ignore[no-untyped-def]
    logits_NW, kept_NW, stride, width, size, inverse_T, largest_N, sum_N, IS_KEPT: tl.constexpr, BLOCK: tl.constexpr
):
    """A program per position: the largest logit of ids below ``size`` that are left, and Σ exp((logit − largest) / T).

    Each lane has a maximum of its own, to which its sum is rescaled when it grows (Milakov and Gimelshein 2018, arXiv
    1805.02867): lanes meet once, at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        inside = start + columns < size
        x = tl.load(logits_NW + row * stride + start + columns, mask=inside, other=float("-inf")).to(tl.float32)
        if IS_KEPT:
            kept = tl.load(kept_NW + row * width + start + columns, mask=inside, other=1)
            x = tl.where(kept != 0, float("-inf"), x)
        grown = tl.maximum(largest, x)
        # −inf is a lane that has seen nothing yet; −inf − −inf is no number. Infinity and NaN come through.
        level = tl.where(grown == float("-inf"), 0.0, grown)
        fall = tl.where(largest == float("-inf"), 0.0, largest - level)
        sums = sums * tl.exp(fall * inverse_T) + tl.exp((x - level) * inverse_T)
        largest = grown
    most = tl.max(largest, 0)
    level = tl.where(most == float("-inf"), 0.0, most)
    fall = tl.where(largest == float("-inf"), 0.0, largest - level)
    tl.store(largest_N + row, most)
    tl.store(sum_N + row, tl.sum(sums * tl.exp(fall * inverse_T), 0))


@triton.jit
def _units(  # type: ignore[no-untyped-def]
    logits_NW, kept_NW, row, stride, width, ids, size, largest, inverse_T, ONE: tl.constexpr
):
    """Weights exp((logit − largest) / T) of ids below ``size`` that are left, in units of which ``ONE`` are 1."""
    inside = ids < size
    x = tl.load(logits_NW + row * stride + ids, mask=inside, other=float("-inf")).to(tl.float32)
    kept = tl.load(kept_NW + row * width + ids, mask=inside, other=1)
    weight = tl.where(kept != 0, 0.0, tl.exp((x - largest) * inverse_T))
    return (weight * ONE).to(tl.int64)


@triton.jit
def _group_units(  # type: ignore[no-untyped-def]
    logits_NW, kept_NW, stride, width, size, inverse_T, largest_N, units_NG, num_groups,
    ONE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program per group of ids of a position: the units of all of them."""
    row, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    ids = group * GROUP + tl.arange(0, GROUP)
    largest = tl.load(largest_N + row)
    units = _units(logits_NW, kept_NW, row, stride, width, ids, size, largest, inverse_T, ONE)
    tl.store(units_NG + row * num_groups + group, tl.sum(units, 0))


@triton.jit
def _pick(  # type: ignore[no-untyped-def]
    logits_NW, kept_NW, stride, width, size, inverse_T, largest_N, groups_NM, within_NM, num_draws, ids_NM,
    ONE: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """A program per draw: the id of its group at whose units, cumulated from the first, the draw's point lies."""
    row, draw = tl.program_id(0).to(tl.int64), tl.program_id(1)
    group = tl.load(groups_NM + row * num_draws + draw)
    ids = group * GROUP + tl.arange(0, GROUP)
    largest = tl.load(largest_N + row)
    units = _units(logits_NW, kept_NW, row, stride, width, ids, size, largest, inverse_T, ONE)
    within = tl.load(within_NM + row * num_draws + draw)
    before = tl.sum((tl.cumsum(units, 0) <= within).to(tl.int64), 0)
    tl.store(ids_NM + row * num_draws + draw, group * GROUP + before)


class TritonMasses:
    """Ids that are taken out are marked: the logits stay as they are. See `masses.Masses`."""

    def __init__(self, logits_NW: Tensor) -> None:
        """Logits of any float dtype, rows contiguous."""
        assert logits_NW.stride(1) == 1
        self.logits_NW = logits_NW
        self._kept_NW: Tensor | None = None
        largest_N, sum_N = self._sum(1.0)
        self._log_sum_N1 = sum_N.log()[:, None]
        self.offset_N1 = largest_N[:, None]

    def _sum(self, temperature: float, size: int | None = None) -> tuple[Tensor, Tensor]:
        """The largest logit that is left [N] and Σ exp((logit − largest) / T) [N], of ids below ``size``."""
        logits_NW, kept_NW = self.logits_NW, self._kept_NW
        num_positions, width = logits_NW.shape
        largest_N, sum_N = torch.empty(2, num_positions, dtype=torch.float32, device=logits_NW.device)
        with torch.cuda.device_of(logits_NW):
            _sums[(num_positions,)](
                logits_NW, logits_NW if kept_NW is None else kept_NW, logits_NW.stride(0), width, size or width,
                1.0 / temperature, largest_N, sum_N, IS_KEPT=kept_NW is not None, BLOCK=BLOCK, num_warps=NUM_WARPS,
            )  # fmt: skip
        return largest_N, sum_N

    def log_sum(self, temperature: float = 1.0) -> Tensor:
        """See `masses.Masses`."""
        if self._kept_NW is None and temperature == 1.0:
            return self._log_sum_N1
        largest_N, sum_N = self._sum(temperature)
        return (sum_N.log() + (largest_N - self.offset_N1[:, 0]) / temperature)[:, None]

    def take_out(self, at_E: Tensor, ids_E: Tensor) -> None:
        """See `masses.Masses`."""
        if self._kept_NW is None:
            self._kept_NW = torch.zeros(self.logits_NW.shape, dtype=torch.uint8, device=self.logits_NW.device)
        self._kept_NW[at_E, ids_E] = 1

    def has_mass(self, vocabulary_size: int) -> Tensor:
        """See `masses.Masses`."""
        self._largest_N = self._sum(1.0, vocabulary_size)[0]
        return ~self._largest_N.isneginf()[:, None]

    def draw(self, points_NM: Tensor, temperature: float, vocabulary_size: int) -> Tensor:
        """See `masses.Masses`. The ids that cumulating all weights gives: sums of integers are exact in any order."""
        num_positions, num_draws = points_NM.shape
        num_groups = triton.cdiv(vocabulary_size, GROUP)
        units_NG, ids_NM = (
            torch.empty(num_positions, count, dtype=torch.int64, device=points_NM.device)
            for count in (num_groups, num_draws)
        )
        dense = (
            *(self.logits_NW, self._kept_NW, self.logits_NW.stride(0), self.logits_NW.shape[1], vocabulary_size),
            *(1.0 / temperature, self._largest_N.clamp(min=torch.finfo().min)),
        )
        with torch.cuda.device_of(points_NM):
            _group_units[(num_positions, num_groups)](*dense, units_NG, num_groups, ONE=ONE, GROUP=GROUP, num_warps=4)
            end_NG = units_NG.cumsum(-1)
            units_NM = units_at(points_NM, end_NG[:, -1:])
            groups_NM = torch.searchsorted(end_NG, units_NM, right=True).clamp(max=num_groups - 1)
            within_NM = units_NM - (end_NG - units_NG).gather(-1, groups_NM)
            _pick[(num_positions, num_draws)](
                *dense, groups_NM, within_NM, num_draws, ids_NM, ONE=ONE, GROUP=GROUP, num_warps=4
            )
        return ids_NM
