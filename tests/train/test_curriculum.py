"""Schedules against DeepSpeed's own scheduler, cycles, users' functions, a clock that the gradient holds back."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_store.config import parse_config
from logit_store.errors import ConfigError
from training.config import CurriculumConfig, CurriculumScheduleConfig, PacingConfig, RowCurriculumConfig
from training.curriculum.batches import BatchPlan, Cursor
from training.curriculum.clock import Curriculum, Pace
from training.schedules import difficulty

LINEAR: dict[str, Any] = {"total_curriculum_tokens": 500, "difficulty_step": 8}


def deepspeeds(kind: str, low: int, high: int, schedule: dict[str, Any]) -> Any:
    from deepspeed.runtime.data_pipeline.curriculum_scheduler import CurriculumScheduler

    names = {"total_curriculum_tokens": "total_curriculum_step", "max_tokens": "max_step"}
    theirs = {names.get(key, key): value for key, value in schedule.items()}
    config = {"min_difficulty": low, "max_difficulty": high, "schedule_type": kind, "schedule_config": theirs}
    return CurriculumScheduler(config).get_difficulty


@settings(deadline=None, max_examples=200)
@given(
    st.sampled_from(["fixed_linear", "fixed_root"]), st.integers(1, 300), st.integers(0, 4000),
    st.integers(1, 10**9), st.integers(1, 64), st.integers(1, 4), st.floats(0, 2),
)  # fmt: skip
def test_every_growing_schedule_is_deepspeeds(
    kind: Any, low: int, span: int, total: int, step: int, root: int, progress: float
) -> None:
    schedule: dict[str, Any] = {"total_curriculum_tokens": total, "difficulty_step": step, "root_degree": root}
    config = CurriculumConfig(schedule_type=kind, min_difficulty=low, max_difficulty=low + span,
                              schedule_config=CurriculumScheduleConfig(**schedule))  # fmt: skip
    tokens = int(total * progress)
    assert difficulty(config, tokens) == deepspeeds(kind, low, low + span, schedule)(tokens)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(1, 50), st.integers(1, 400)), min_size=2, max_size=6), st.integers(0, 3000))
def test_every_discrete_schedule_is_deepspeeds(pairs: list[tuple[int, int]], tokens: int) -> None:
    schedule: dict[str, Any] = {
        "difficulty": [d for d, _ in pairs],
        "max_tokens": np.cumsum([t for _, t in pairs[1:]]).tolist(),
    }
    config = CurriculumConfig(schedule_type="fixed_discrete", min_difficulty=1, max_difficulty=50,
                              schedule_config=CurriculumScheduleConfig(**schedule))  # fmt: skip
    assert difficulty(config, tokens) == deepspeeds("fixed_discrete", 1, 50, schedule)(tokens)


def test_cycles_go_through_the_schedule_again_and_then_stay() -> None:
    once = CurriculumConfig(min_difficulty=8, max_difficulty=64, schedule_config=CurriculumScheduleConfig(**LINEAR))
    thrice = CurriculumConfig(**once.model_dump() | {"cycles": 3, "cycle_tokens": 600})
    lengths = [difficulty(thrice, tokens) for tokens in range(3000)]
    first = [difficulty(once, tokens) for tokens in range(600)]
    assert lengths[:1800] == first * 3
    assert set(lengths[1800:]) == {64}
    assert first == sorted(first)
    assert {first[0], first[-1]} == {8, 64}


def test_a_custom_schedule_is_the_users_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_schedule.py").write_text(
        "import numpy as np\n\n"
        "def staircase(tokens):\n    return 16 if tokens < 100 else 48\n\n"
        "def numpys(tokens):\n    return np.int64(24)\n\n"
        "def wrong(tokens):\n    return 16.5\n\nno = 3\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))

    def config(function: str) -> CurriculumConfig:
        return CurriculumConfig(schedule_type="custom", min_difficulty=16, max_difficulty=48,
                                schedule_config=CurriculumScheduleConfig(function=function))  # fmt: skip

    assert [difficulty(config("my_schedule:staircase"), tokens) for tokens in (0, 99, 100)] == [16, 16, 48]
    found = difficulty(config("my_schedule:numpys"), 0)
    assert (found, type(found)) == (24, int)
    for function, message in {
        "my_schedule:wrong": r"gives 16\.5 at 0 tokens: it must give a whole number from min_difficulty 16",
        "my_schedule:missing": "cannot be imported",
        "no_such_module:f": "cannot be imported",
        "my_schedule:no": "is no function",
    }.items():
        with pytest.raises(ConfigError, match=message):
            difficulty(config(function), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cycles": 2}, "need cycle_tokens"),
        ({"cycle_tokens": 5}, "needs cycles"),
        ({"schedule_type": "custom"}, "custom needs schedule_config.function"),
        ({"schedule_type": "fixed_discrete"}, "fixed_discrete needs schedule_config.difficulty"),
        (
            {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [4, 64], "max_tokens": [9]}},
            "difficulty must stay from min_difficulty 8 to max_difficulty 64",
        ),
        ({"mode": "bucket", "boundary": "line"}, "mode=bucket cuts none"),
        ({"min_difficulty": 65}, "min_difficulty 65 is above max_difficulty 64"),
        ({"schedule_config": {"function": "no colon"}}, "schedule_config.function: string should match"),
        ({"pacing": {}}, "pacing.max_volatility"),
        ({"boundry": "line"}, "did you mean 'boundary'"),
    ],
)
def test_a_curriculum_that_says_too_little_or_too_much(changes: dict[str, Any], message: str) -> None:
    raw = {"min_difficulty": 8, "max_difficulty": 64, "schedule_config": LINEAR}
    with pytest.raises(ConfigError, match=message):
        parse_config(CurriculumConfig, raw | changes, "student.yaml")


def test_a_row_curriculum_counts_percents() -> None:
    raw: dict[str, Any] = {"min_difficulty": 3, "schedule_config": LINEAR}
    with pytest.raises(ConfigError, match="min_difficulty: input should be greater than or equal to 5"):
        parse_config(RowCurriculumConfig, raw, "student.yaml")
    discrete = {"schedule_type": "fixed_discrete", "schedule_config": {"difficulty": [2, 50], "max_tokens": [9]}}
    with pytest.raises(ConfigError, match="difficulty must stay from min_difficulty 5 to max_difficulty 100"):
        parse_config(RowCurriculumConfig, raw | {"min_difficulty": 5} | discrete, "student.yaml")


# Pacing


def paced_plan(max_volatility: float, window_steps: int) -> BatchPlan:
    config = CurriculumConfig(
        min_difficulty=8, max_difficulty=40, schedule_config=CurriculumScheduleConfig(**LINEAR),
        pacing=PacingConfig(max_volatility=max_volatility, window_steps=window_steps),
    )  # fmt: skip
    return BatchPlan(np.arange(50), np.full(50, 41, np.int32), 100, 0, Curriculum(config))


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.integers(2, 20))
def test_volatility_is_the_weighted_deviation_over_the_mean(norms: list[float], window: int) -> None:
    pace = Pace()
    for norm in norms:
        pace = pace.observed(norm, window)
    weights = (1 - 1 / window) ** np.arange(len(norms))[::-1]
    mean = np.average(norms, weights=weights)
    deviation = math.sqrt(np.average((np.array(norms) - mean) ** 2, weights=weights))
    assert pace.steps == len(norms)
    assert pace.volatility == pytest.approx(deviation / mean if mean else 0.0, rel=1e-6, abs=1e-6)


def test_the_clock_advances_only_while_the_gradient_is_steady() -> None:
    plan = paced_plan(0.2, 5)
    assert not plan.can_run_ahead
    norms = [1.0] * 8 + [1.0, 9.0] * 10 + [1.0] * 60
    cursor, clocks, lengths = Cursor(), [], []
    for norm in norms:
        _, length, after = plan.next(cursor)
        cursor = plan.paced(cursor, after, norm)
        clocks.append(cursor.clock)
        lengths.append(length)
    assert clocks[3] == 0 < clocks[4]  # not before a window is full
    assert clocks[9] == clocks[28]  # held from the first jump to the last
    assert clocks[-1] > clocks[28]  # and goes on when that is forgotten
    assert cursor.tokens_seen > cursor.clock
    assert lengths == sorted(lengths)
    assert lengths[-1] > lengths[28]


def test_a_norm_that_is_not_finite_holds_the_clock_and_is_forgotten() -> None:
    plan = paced_plan(0.5, 2)
    cursor = Cursor()
    for norm in (1.0, 1.0, math.inf, math.nan, 1.0):
        before = cursor
        cursor = plan.paced(before, plan.next(before)[2], norm)
        assert (cursor.clock > before.clock) == (math.isfinite(norm) and before.step > 0)
    assert Pace(*cursor.pace).volatility == 0  # type: ignore[arg-type]


def test_pacing_resumes_from_a_checkpoint_of_any_step() -> None:
    norms = (1 + 0.3 * np.random.default_rng(0).standard_normal(40)).tolist()
    plan, cursor, whole = paced_plan(0.3, 4), Cursor(), []
    for norm in norms:
        cursor = plan.paced(cursor, plan.next(cursor)[2], norm)
        whole.append(cursor)
    held = sum(a.clock == b.clock for a, b in pairwise(whole))
    assert 0 < held < len(norms) - 1  # both happen
    for at in range(len(norms) - 1):
        saved = Cursor(**json.loads(json.dumps(whole[at]._asdict())))
        other = paced_plan(0.3, 4)
        assert other.paced(saved, other.next(saved)[2], norms[at + 1]) == whole[at + 1]
