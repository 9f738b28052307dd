"""What changes with tokens seen: the curriculum's sequence length, the learning rate, weights of the loss."""

import math

from training.config import CurriculumConfig, ScheduleConfig, TowardsConfig


def difficulty(curriculum: CurriculumConfig, tokens_seen: int) -> int:
    """Positions per sequence after ``tokens_seen`` tokens.

    DeepSpeed's ``CurriculumScheduler.get_difficulty`` with tokens for steps:
    ``min + (tokens / total)^(1/root) · (max − min)``, floored to a multiple of ``difficulty_step``, at
    least ``min`` rounded up to such a multiple, at most ``max``; or the lookup of ``fixed_discrete``.
    """
    schedule = curriculum.schedule_config
    if curriculum.schedule_type == "fixed_discrete":
        assert schedule.difficulty is not None
        assert schedule.max_tokens is not None
        return schedule.difficulty[sum(tokens_seen > limit for limit in schedule.max_tokens)]
    assert schedule.total_curriculum_tokens is not None
    root = 1 if curriculum.schedule_type == "fixed_linear" else schedule.root_degree
    low, high, step = curriculum.min_difficulty, curriculum.max_difficulty, schedule.difficulty_step
    length = math.floor((tokens_seen / schedule.total_curriculum_tokens) ** (1.0 / root) * (high - low) + low)
    length -= length % step
    return min(max(length, -(-low // step) * step), high)


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
