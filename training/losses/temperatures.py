"""A_T between stored temperatures.

A(β) = log Σ_v p_v^β with β = 1/T is smooth, convex and zero at β = 1. Between stored temperatures it is interpolated in
β by the cubic (or, with three knots, the parabola) through the nearest knots.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MAX_NODES = 4
"""Knots that an interpolation uses: a cubic."""
MIN_KNOTS = 3
"""Temperatures, 1 included, that a grid must have to be interpolated: of two, none can be left out to see the error."""


def log_partition(log_partition_NS: Tensor, stored: Sequence[float], temperature: float | Tensor) -> Tensor:
    """A_T of N positions, [N], exact where T is 1 or stored; differentiable in T where T is a tensor.

    ``log_partition_NS`` are A_T at the temperatures ``stored``. T must be within these and 1.
    """
    knots = [*stored, 1.0]
    if isinstance(temperature, Tensor):
        near = nearest(knots, float(temperature.detach()))
        weights = lagrange([knots[i] for i in near], temperature)
    else:
        near = [knots.index(temperature)] if temperature in knots else nearest(knots, temperature)
        weights = lagrange([knots[i] for i in near], torch.tensor(temperature, dtype=torch.float64))
    total_N = torch.zeros_like(log_partition_NS[:, :1]).sum(-1)
    for i, weight in zip(near, weights, strict=True):
        if i < len(stored):  # A at 1 is zero
            total_N = total_N + log_partition_NS[:, i] * weight.to(total_N.dtype)
    return total_N


def nearest(knots: Sequence[float], temperature: float) -> list[int]:
    """Which knots the interpolation at T uses: those nearest in 1/T."""
    order = sorted(range(len(knots)), key=lambda i: abs(1 / knots[i] - 1 / temperature))
    return order[:MAX_NODES]


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


def interpolation_error(log_partition_PS: NDArray[np.float32], stored: Sequence[float]) -> float:
    """Largest |ΔA_T| in nats when each stored temperature between others is left out and interpolated from the rest.

    More than what interpolation costs, since the grid is coarser where a knot is missing. Needs ``MIN_KNOTS``.
    """
    values_PS = torch.from_numpy(log_partition_PS.astype(np.float64))
    inner = [t for t in stored if min([*stored, 1.0]) < t < max([*stored, 1.0])]
    errors = [0.0]
    for t in inner:
        others = [i for i, other in enumerate(stored) if other != t]
        guess_P = log_partition(values_PS[:, others], [stored[i] for i in others], t)
        errors.append(float((guess_P - values_PS[:, stored.index(t)]).abs().max()))
    return max(errors)
