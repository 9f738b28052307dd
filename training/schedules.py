"""What changes with tokens seen: the difficulty of a curriculum, the learning rate, weights of the loss."""

import math
from collections.abc import Callable
from functools import cache
from importlib import import_module
from operator import index
from typing import Any

from logit_store.errors import ConfigError
from training.config import ScheduleConfig, ScheduledConfig, TowardsConfig


def difficulty(curriculum: ScheduledConfig, tokens: int) -> int:
    """Difficulty (positions per sequence, or percent of the rows) after ``tokens`` on the curriculum's clock.

    Within a cycle DeepSpeed's ``CurriculumScheduler.get_difficulty`` with tokens for steps:
    ``min + (tokens / total)^(1/root) · (max − min)``, floored to a multiple of ``difficulty_step``, at
    least ``min`` rounded up to such a multiple, at most ``max``; the lookup of ``fixed_discrete``; or the user's own
    function. Raises ConfigError where that gives what is no difficulty.
    """
    schedule, tokens = curriculum.schedule_config, in_cycle(curriculum, tokens)
    if curriculum.schedule_type == "custom":
        return _custom(curriculum, tokens)
    if curriculum.schedule_type == "fixed_discrete":
        assert schedule.difficulty is not None
        assert schedule.max_tokens is not None
        return schedule.difficulty[sum(tokens > limit for limit in schedule.max_tokens)]
    assert schedule.total_curriculum_tokens is not None
    root = 1 if curriculum.schedule_type == "fixed_linear" else schedule.root_degree
    low, high, step = curriculum.min_difficulty, curriculum.max_difficulty, schedule.difficulty_step
    value = math.floor((tokens / schedule.total_curriculum_tokens) ** (1.0 / root) * (high - low) + low)
    value -= value % step
    return min(max(value, -(-low // step) * step), high)


def in_cycle(curriculum: ScheduledConfig, tokens: int) -> int:
    """Tokens since the current cycle began: the clock starts again every ``cycle_tokens``, ``cycles`` times in all."""
    if curriculum.cycle_tokens is None:
        return tokens
    return tokens - min(tokens // curriculum.cycle_tokens, curriculum.cycles - 1) * curriculum.cycle_tokens


def _custom(curriculum: ScheduledConfig, tokens: int) -> int:
    name = str(curriculum.schedule_config.function)
    given: Any = _imported(name)(tokens)
    low, high = curriculum.min_difficulty, curriculum.max_difficulty
    try:
        value = index(given)  # numpy's whole numbers as well
    except TypeError:
        value = None
    if value is None or not low <= value <= high:
        raise ConfigError(
            f"schedule_config.function {name} gives {given!r} at {tokens:,} tokens: it must give a whole number from "
            f"min_difficulty {low} to max_difficulty {high}"
        )
    return value


@cache
def _imported(name: str) -> Callable[[int], Any]:
    module, _, function = name.partition(":")
    try:
        found = getattr(import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"schedule_config.function {name} cannot be imported ({error}): give `module:function` of a module on "
            "PYTHONPATH"
        ) from error
    if not callable(found):
        raise ConfigError(f"schedule_config.function {name} is no function")
    checked: Callable[[int], Any] = found
    return checked


def learning_rate(schedule: ScheduleConfig, tokens_seen: int) -> float:
    """Learning rate of a step that ends at ``tokens_seen`` tokens: linear warm-up, then decay to ``min_lr_ratio``."""
    if tokens_seen < schedule.warmup_tokens:
        return schedule.lr * tokens_seen / schedule.warmup_tokens
    span = max(schedule.total_tokens - schedule.warmup_tokens, 1)
    progress = min((tokens_seen - schedule.warmup_tokens) / span, 1.0)
    falling = {"constant": 1.0, "linear": 1.0 - progress, "cosine": 0.5 * (1.0 + math.cos(math.pi * progress))}
    return schedule.lr * (schedule.min_lr_ratio + (1.0 - schedule.min_lr_ratio) * falling[schedule.decay])


def towards(start: float, schedule: TowardsConfig | None, tokens_seen: int) -> float:
    """``start``, or where its schedule has taken it after ``tokens_seen`` tokens."""
    if schedule is None:
        return start
    progress = min(tokens_seen / schedule.over_tokens, 1.0)
    if schedule.kind == "cosine":
        progress = 0.5 * (1.0 - math.cos(math.pi * progress))
    return schedule.to if progress == 1.0 else start + (schedule.to - start) * progress
