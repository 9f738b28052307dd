"""alpha and T of a step: constants, schedules over tokens seen, or a temperature that is learned."""

import torch
from torch import Tensor, nn

from training.config import LossConfig, TowardsConfig
from training.schedules import towards


class Mixing(nn.Module):
    """Knows alpha and T after so many tokens. A module, for the one parameter that a learned temperature has."""

    def __init__(self, loss: LossConfig) -> None:
        super().__init__()
        self.loss = loss
        self.tokens_seen = 0
        self.weight = nn.Parameter(torch.zeros(1)) if loss.learned_temperature else None
        self.last_temperature = loss.temperature

    @property
    def alpha(self) -> float:
        """Weight of the soft labels."""
        return towards(self.loss.alpha, self.loss.alpha_schedule, self.tokens_seen)

    def temperature(self) -> float | Tensor:
        """T; as a tensor [] whose gradient is reversed, where it is learned."""
        if self.loss.learned_temperature is not None:
            return self()  # through __call__: under ZeRO-3 its hooks gather the parameter
        self.last_temperature = towards(self.loss.temperature, self.loss.temperature_schedule, self.tokens_seen)
        return self.last_temperature

    def forward(self) -> Tensor:
        """The learned T. ZeRO-3's hooks take tensors only."""
        learned = self.loss.learned_temperature
        assert learned is not None
        assert self.weight is not None
        growing = TowardsConfig(kind="cosine", to=1.0, over_tokens=learned.over_tokens)
        width = (learned.high - learned.low) * towards(0.0, growing, self.tokens_seen)
        middle = (learned.low + learned.high) / 2
        temperature = middle + width * ((learned.rate * self.weight.float()[0]).sigmoid() - 0.5)
        self.last_temperature = float(temperature.detach())
        # Adam's steps do not depend on a gradient's size, but clipping does: w must not be what is clipped.
        reversal = learned.rate**-2
        return temperature.detach() * (1 + reversal) - reversal * temperature
