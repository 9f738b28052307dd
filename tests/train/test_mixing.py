"""alpha and T over tokens seen: schedules, interpolated log-partitions, a temperature that is learned."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_store.config import parse_config
from logit_store.errors import ConfigError
from training.config import LossConfig
from training.losses.mixing import Mixing
from training.losses.temperatures import interpolation_error, log_partition


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


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 1000), st.floats(1.0, 8.0))
def test_log_partitions_are_interpolated_within_the_error_that_is_told(seed: int, temperature: float) -> None:
    generator, grid = np.random.default_rng(seed), [1.3, 2.0, 3.0, 5.0, 8.0]
    logits_PV = generator.normal(size=(20, 50)) * generator.uniform(0.5, 4, (20, 1))
    log_p_PV = logits_PV - np.log(np.exp(logits_PV).sum(-1, keepdims=True))
    stored_PS = stored_partitions(log_p_PV, grid)
    exact_P = stored_partitions(log_p_PV, [temperature])[:, 0]
    told = interpolation_error(stored_PS.numpy().astype(np.float32), grid)
    assert float((log_partition(stored_PS, grid, temperature) - exact_P).abs().max()) <= told + 1e-6
    assert told < 0.3
    for i, t in enumerate(grid):
        assert torch.equal(log_partition(stored_PS, grid, t), stored_PS[:, i])
    assert not log_partition(stored_PS, grid, 1.0).any()
    assert not log_partition(stored_PS[:, :0], [], 1.0).any()


def test_interpolated_log_partitions_have_their_derivative() -> None:
    grid = [2.0, 3.0, 5.0]
    stored_PS = stored_partitions(np.log(np.random.default_rng(0).dirichlet(np.ones(9), 4)), grid)
    temperature = torch.tensor(2.4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: log_partition(stored_PS, grid, t), [temperature])
