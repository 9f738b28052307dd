"""A_T between stored temperatures.

A(β) = log Σ_v p_v^β with β = 1/T is smooth, convex and zero at β = 1. Between stored temperatures it is interpolated in
β by the cubic (or, with three knots, the parabola) through the two knots around T and those nearest to their gap.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_NODES = 4
"""Knots that an interpolation uses: a cubic."""
MIN_KNOTS = 3
"""Temperatures, 1 included, that a grid must have to be interpolated: of two, none can be left out to see the error."""
PROBED_PLACES = (0.25, 0.5, 0.75)
"""Where in a gap the error is estimated, as shares of it: these see cubics and parabolas on either side."""


def log_partition(log_partition_NS: Tensor, stored: Sequence[float], temperature: float | Tensor) -> Tensor:
    """A_T of N positions, [N], exact where T is 1 or stored; differentiable in T where T is a tensor.

    ``log_partition_NS`` are A_T at the temperatures ``stored``. T must be within these and 1.
    """
    knots = [*stored, 1.0]
    at = float(temperature.detach()) if isinstance(temperature, Tensor) else temperature
    # A tensor's T stays in the weights also at a knot: its gradient needs the neighbours.
    exact = at in knots and not isinstance(temperature, Tensor)
    near = [knots.index(at)] if exact else nodes(knots, at)
    weights = lagrange([knots[i] for i in near], torch.as_tensor(temperature, dtype=torch.float64))
    total_N = torch.zeros_like(log_partition_NS[:, :1]).sum(-1)
    for i, weight in zip(near, weights, strict=True):
        if i < len(stored):  # A at 1 is zero
            total_N = total_N + log_partition_NS[:, i] * weight.to(total_N.dtype)
    return total_N


def nodes(knots: Sequence[float], temperature: float) -> list[int]:
    """Which knots the interpolation at T uses: the two around it first, and then those nearest to their gap in 1/T.

    The same all over a gap, so that A_T is continuous in T. Beyond the knots it is the outermost gap's.
    """
    order = sorted(range(len(knots)), key=lambda i: knots[i])
    above = next((place for place in range(1, len(order)) if knots[order[place]] >= temperature), len(order) - 1)
    around = order[above - 1 : above + 1]
    middle = sum(1 / knots[i] for i in around) / 2
    others = sorted(set(order) - set(around), key=lambda i: abs(1 / knots[i] - middle))
    return [*around, *others[: MAX_NODES - 2]]


def lagrange(knots: Sequence[float], temperature: Tensor) -> list[Tensor]:
    """Weights of the values at the knots, in 1/T: Π (β − β_j) / (β_i − β_j) over j ≠ i. At a knot, one and zeros."""
    beta, betas = 1.0 / temperature, [1.0 / knot for knot in knots]
    weights = []
    for i, own in enumerate(betas):
        weight = torch.ones_like(beta)
        for other in betas[:i] + betas[i + 1 :]:
            weight = weight * (beta - other) / (own - other)
        weights.append(weight)
    return weights


def gap_errors(
    log_partition_PS: NDArray[np.float32], stored: Sequence[float], low: float, high: float
) -> dict[float, float]:
    """By how many nats A_T may be off in each gap between knots that T from ``low`` to ``high`` passes through.

    Keys are the T in the middle of each gap (in 1/T). The error is the largest over positions and ``PROBED_PLACES``
    of what changes where a knot not next to the gap is left out, or a quarter of what changes where all of these are:
    the first alone is near zero where two errors happen to cancel. It is an estimate, not a bound: nothing that is
    stored tells how A runs within a gap. Against distributions from flat to peaked, the largest real error of a gap
    was at most four times as large, and mostly half as large. Needs ``MIN_KNOTS``.
    """
    knots = sorted([*stored, 1.0])
    values_PS = torch.from_numpy(log_partition_PS.astype(np.float64))
    columns_PK = [values_PS[:, stored.index(t)] if t != 1 else torch.zeros(len(values_PS)).double() for t in knots]
    values_PK = torch.stack(columns_PK, 1)
    return {2 / (1 / a + 1 / b): _gap_error(values_PK, knots, a, b) for a, b in pairwise(knots) if low < b and high > a}


def _gap_error(values_PK: Tensor, knots: Sequence[float], a: float, b: float) -> float:
    """The error between the neighbouring knots ``a`` and ``b``: see ``gap_errors``."""
    error = 0.0
    for place in PROBED_PLACES:
        temperature = torch.tensor(1 / ((1 - place) / a + place / b), dtype=torch.float64)

        def through(near: Sequence[int], at: Tensor = temperature) -> Tensor:
            return values_PK[:, list(near)] @ torch.stack(lagrange([knots[i] for i in near], at))

        used = nodes(knots, float(temperature))
        whole_P = through(used)
        fewer = [(1.0, [i for i in used if i != left_out]) for left_out in used[2:]] + [(0.25, used[:2])]
        error = max(error, *(share * float((through(near) - whole_P).abs().max()) for share, near in fewer))
    return error
