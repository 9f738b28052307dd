"""The curriculum against DeepSpeed's own scheduler, and the learning rate's corners."""

from typing import Any

import pytest

from training.config import CurriculumConfig, CurriculumScheduleConfig, LossConfig, ScheduleConfig
from training.schedules import difficulty, learning_rate

SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("fixed_linear", {"total_curriculum_tokens": 1000, "difficulty_step": 8}),
    ("fixed_root", {"total_curriculum_tokens": 777, "difficulty_step": 16, "root_degree": 3}),
    ("fixed_discrete", {"difficulty": [64, 100, 250], "max_tokens": [100, 600]}),
]
DEEPSPEEDS_KEY = {"total_curriculum_tokens": "total_curriculum_step", "max_tokens": "max_step"}


@pytest.mark.parametrize(("kind", "ours"), SCHEDULES)
@pytest.mark.parametrize("low", [20, 64])
def test_difficulty_is_deepspeeds(kind: Any, ours: dict[str, Any], low: int) -> None:
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    theirs = {DEEPSPEEDS_KEY.get(key, key): value for key, value in ours.items()}
    scheduler = CurriculumScheduler(
        {"min_difficulty": low, "max_difficulty": 250, "schedule_type": kind, "schedule_config": theirs}
    )
    config = CurriculumConfig(
        schedule_type=kind, min_difficulty=low, max_difficulty=250, schedule_config=CurriculumScheduleConfig(**ours)
    )
    for tokens in range(0, 1500):
        assert difficulty(config, tokens) == scheduler.get_difficulty(tokens)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
def test_learning_rate_warms_up_peaks_and_falls(decay: Any) -> None:
    config = ScheduleConfig(
        total_tokens=1000, tokens_per_step=10, lr=0.5, warmup_tokens=100, decay=decay, min_lr_ratio=0.2
    )
    rates = [learning_rate(config, tokens) for tokens in range(0, 1100)]
    assert rates[0] == 0
    assert rates[50] == pytest.approx(0.25)
    assert rates[100] == max(rates) == 0.5
    assert rates[1000] == rates[1099] == pytest.approx(0.5 if decay == "constant" else 0.1)
    assert rates[550] == pytest.approx({"constant": 0.5, "linear": 0.3, "cosine": 0.3}[decay])


def test_a_constant_schedule_is_none() -> None:
    config = LossConfig(alpha_schedule={"kind": "constant"}, temperature_schedule={"kind": "constant"})  # type: ignore[arg-type]
    assert config == LossConfig()
