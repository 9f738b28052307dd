"""alpha and T over tokens seen: schedules, interpolated log-partitions, a temperature that is learned."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_store.config import parse_config
from logit_store.errors import ConfigError
from training.config import LossConfig
from training.losses.check import MAX_ERROR
from training.losses.mixing import Mixing
from training.losses.temperatures import gap_errors, log_partition, nodes


def test_alpha_and_temperature_follow_their_schedules() -> None:
    raw = {
        "alpha": 0.2, "alpha_schedule": {"kind": "linear", "to": 1.0, "over_tokens": 100},
        "temperature": 4.0, "temperature_schedule": {"kind": "cosine", "to": 1.0, "over_tokens": 80},
    }  # fmt: skip
    mixing = Mixing(parse_config(LossConfig, raw, "test"))
    for tokens, alpha, temperature in ((0, 0.2, 4.0), (20, 0.36, 4 - 1.5 * (1 - 0.5**0.5)), (40, 0.52, 2.5),
                                       (80, 0.84, 1.0), (100, 1.0, 1.0), (10**9, 1.0, 1.0)):  # fmt: skip
        mixing.tokens_seen = tokens
        assert mixing.alpha == pytest.approx(alpha, abs=1e-12)
        assert mixing.temperature() == pytest.approx(temperature, abs=1e-12)
    assert mixing.loss.extreme_temperatures == (1.0, 4.0)
    constant = Mixing(LossConfig(alpha=0.3, temperature=2.0))
    constant.tokens_seen = 12345
    assert (constant.alpha, constant.temperature()) == (0.3, 2.0)
    assert not list(constant.parameters())


def test_a_learned_temperature_is_pushed_where_the_loss_grows() -> None:
    learned = {"low": 1.0, "high": 3.0, "over_tokens": 100, "rate": 10.0}
    mixing = Mixing(parse_config(LossConfig, {"learned_temperature": learned}, "test"))
    (weight,) = mixing.parameters()
    found = []
    for tokens in (0, 50, 100, 1000):
        mixing.tokens_seen = tokens
        temperature = mixing.temperature()
        assert isinstance(temperature, torch.Tensor)
        assert float(temperature.detach()) == mixing.last_temperature == 2.0
        (gradient,) = torch.autograd.grad(3.0 * temperature, [weight])  # a loss that grows with T
        found.append(float(gradient))
    whole = -3.0 * (3.0 - 1.0) * 0.25 / 10.0
    assert found == pytest.approx([0.0, 0.5 * whole, whole, whole], abs=1e-5)
    torch.nn.init.constant_(weight, 1.0)
    mixing.temperature()
    assert mixing.last_temperature == pytest.approx(3.0, abs=1e-3)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"alpha_schedule": {"kind": "linear", "to": 1.5, "over_tokens": 1}}, "alpha_schedule.to 1.5 must be between"),
        ({"temperature_schedule": {"kind": "linear", "to": 0.0, "over_tokens": 1}}, "must be above 0"),
        ({"temperature_schedule": {"kind": "linear", "over_token": 9}}, "did you mean"),
        ({"learned_temperature": {"low": 2.0, "high": 1.0, "over_tokens": 1}}, "low 2.0 must be below high 1.0"),
        ({"temperature": 2.0, "learned_temperature": {"low": 1.0, "high": 2.0, "over_tokens": 1}}, "stands in place"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_config(LossConfig, raw, "test")


def stored_partitions(log_p_PV: np.ndarray, temperatures: list[float]) -> torch.Tensor:
    return torch.stack([(torch.from_numpy(log_p_PV) / t).logsumexp(-1) for t in temperatures], 1)


def distributions(shape: str) -> np.ndarray:
    """log p of 12 positions over 2,000 ids."""
    generator, ids = np.random.default_rng(0), np.arange(1, 2001)
    kind, number = shape.split()
    logits_PV = generator.normal(size=(12, 2000))
    match kind:
        case "normal":
            logits_PV *= float(number)
        case "zipf":
            logits_PV = 0.3 * logits_PV - float(number) * np.log(ids)
        case "peaks":  # so many ids above all others, by 3 to 25 nats
            logits_PV[:, : int(number)] += np.linspace(3, 25, 12)[:, None]
        case "exponential":
            logits_PV = generator.exponential(size=(12, 2000)) * float(number)
    return np.asarray(logits_PV - np.log(np.exp(logits_PV).sum(-1, keepdims=True)))


SHAPES = ("normal 0.5", "normal 2", "normal 4", "normal 8", "zipf 1", "zipf 2", "peaks 1", "peaks 8", "exponential 1.5")
GRIDS = ([4.0, 5.0, 6.0, 8.0], [2.0, 4.0], [2.0, 3.0, 4.0], [2.0, 4.0, 0.5], [1.3, 2.0, 3.0, 5.0, 8.0],
         [1.1, 1.25, 1.4, 1.6, 1.9, 2.3, 3.0, 4.0])  # fmt: skip


def real_error(log_p_PV: np.ndarray, grid: list[float], low: float, high: float) -> float:
    """Largest |ΔA_T| at temperatures between these, evenly spaced in 1/T."""
    stored_PS, worst = stored_partitions(log_p_PV, grid), 0.0
    for beta in np.linspace(1 / high, 1 / low, 25):
        exact_P = stored_partitions(log_p_PV, [1 / beta])[:, 0]
        worst = max(worst, float((log_partition(stored_PS, grid, 1 / beta) - exact_P).abs().max()))
    return worst


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_error_that_is_told_of_interpolation_is_that_of_the_truth(grid: list[float]) -> None:
    knots = sorted([*grid, 1.0])
    for shape in SHAPES:
        log_p_PV = distributions(shape)
        stored_PS = stored_partitions(log_p_PV, grid).numpy().astype(np.float32)
        told = gap_errors(stored_PS, grid, knots[0], knots[-1])
        real = [real_error(log_p_PV, grid, a, b) for a, b in pairwise(knots)]
        assert len(told) == len(real)
        for (middle, error), truth in zip(told.items(), real, strict=True):
            assert truth <= 4 * error + 1e-4, (shape, middle)
            assert truth <= 0.2 or error > MAX_ERROR, (shape, middle)


def test_a_gap_far_from_the_other_temperatures_is_told_of() -> None:
    grid, log_p_PV = [4.0, 5.0, 6.0, 8.0], distributions("normal 4")
    stored_PS = stored_partitions(log_p_PV, grid).numpy().astype(np.float32)
    (told,) = gap_errors(stored_PS, grid, 1.2, 3.0).values()
    assert told > MAX_ERROR
    assert len(gap_errors(stored_PS, grid, 1.0, 4.5)) == 2
    assert max(gap_errors(stored_PS, grid, 4.0, 8.0).values()) < 0.01


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0.3, 9.0), min_size=2, max_size=8, unique=True), st.floats(0, 1))
def test_the_knots_around_a_temperature_are_among_those_used(grid: list[float], share: float) -> None:
    knots = [*grid, 1.0]
    temperature = min(knots) + share * (max(knots) - min(knots))
    near = nodes(knots, temperature)
    assert len(set(near)) == len(near) == min(len(knots), 4)
    below, above = knots[near[0]], knots[near[1]]
    assert below <= temperature <= above
    assert not any(below < knot < above for knot in knots)


def test_stored_temperatures_are_exact_and_gaps_meet_at_them() -> None:
    grid, log_p_PV = [1.3, 2.0, 3.0, 5.0, 8.0], distributions("normal 2")
    stored_PS = stored_partitions(log_p_PV, grid)
    for i, t in enumerate(grid):
        assert torch.equal(log_partition(stored_PS, grid, t), stored_PS[:, i])
        for side in (t * (1 - 1e-9), t * (1 + 1e-9)):
            torch.testing.assert_close(log_partition(stored_PS, grid, side), stored_PS[:, i], rtol=0, atol=1e-6)
    assert not log_partition(stored_PS, grid, 1.0).any()
    assert not log_partition(stored_PS[:, :0], [], 1.0).any()


def test_interpolated_log_partitions_have_their_derivative() -> None:
    grid = [2.0, 3.0, 5.0]
    stored_PS = stored_partitions(np.log(np.random.default_rng(0).dirichlet(np.ones(9), 4)), grid)
    temperature = torch.tensor(2.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: log_partition(stored_PS, grid, t), [temperature])
