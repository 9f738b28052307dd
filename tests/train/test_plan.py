"""A plan that its data cannot fill is refused before anything is trained, in words that say what to do."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from logit_store import TokenRow
from logit_store.config import parse_config
from logit_store.errors import ConfigError, StoreError
from tests.toy import write_tokens
from training.config import TrainConfig
from training.curriculum.batches import Cursor
from training.curriculum.plan import custom_identity, end_warnings, make_plan, plan_warnings
from training.data.source import Source

Make = Callable[..., Source]


@pytest.fixture
def make(tokenizer: Path, tmp_path: Path) -> Make:
    """A token store with rows of these lengths, all of them masked or none."""

    def of_lengths(lengths: list[int], mask: bool | None = None) -> Source:
        masks = [None if mask is None else np.full(max(length - 1, 0), mask) for length in lengths]
        rows = [
            TokenRow(i, "train", np.arange(length, dtype=np.int32), loss_mask)
            for i, (length, loss_mask) in enumerate(zip(lengths, masks, strict=True))
        ]
        return Source.of(write_tokens(str(tmp_path / "tokens"), tokenizer, [rows], num_shards=1))

    return of_lengths


def train_config(**sections: Any) -> TrainConfig:
    raw = {
        "run": {"path": "run"},
        "data": {"store": "STORE"},
        "student": {"config": {"model_type": "llama"}},
        "schedule": {"total_tokens": 2000, "tokens_per_step": 100, "lr": 0.1},
    }
    return parse_config(TrainConfig, raw | sections, "student.yaml")


def curriculum(low: int, high: int, tokens: int, **more: Any) -> dict[str, Any]:
    return {"min_difficulty": low, "max_difficulty": high,
            "schedule_config": {"total_curriculum_tokens": tokens, "difficulty_step": 1}, **more}  # fmt: skip


LENGTHS = [8] * 40 + [16] * 40 + [32] * 40  # 280, 600 and 1,240 positions


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"curriculum": curriculum(8, 33, 500)}, "max_difficulty 33 is longer than the data: the longest row "
         "of .*tokens has 32 tokens"),
        ({"curriculum": curriculum(6, 31, 500, mode="bucket")}, "no row fits the curriculum after 0 tokens: all are "
         "longer than 6 positions"),
        ({"curriculum": curriculum(7, 31, 1900, mode="bucket")}, "the curriculum is longer than the data: after"),
        ({"curriculum": curriculum(7, 31, 400, mode="bucket", cycles=3, cycle_tokens=600)}, "a cycle's share of 1/3"),
        ({"row_curriculum": {"min_difficulty": 50, "schedule_config": {"total_curriculum_tokens": 9}}},
         "row_curriculum needs a teacher's labels"),
        ({"schedule": {"total_tokens": 2000, "tokens_per_step": 30, "lr": 0.1}}, "less than the longest sequence, 31"),
        ({"launcher": {"ranks": 4}}, "tokens_per_step 100 does not divide among 4 ranks: it holds 3 sequences of 31"),
        ({"curriculum": curriculum(7, 31, 500) | {"schedule_type": "custom", "schedule_config": {"function": "math:pi"}}
         }, "math:pi is no function"),
    ],
    ids=["too long", "none fits", "repeats", "cycle", "no labels", "short step", "ranks", "custom"],
)  # fmt: skip
def test_what_does_not_fit_is_refused(
    make: Make, changes: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)  # of another test's process group
    with pytest.raises(ConfigError, match=message):
        make_plan(train_config(**changes), make(LENGTHS))


@pytest.mark.parametrize(
    "changes",
    [
        {"curriculum": curriculum(7, 31, 600, mode="bucket")},
        {"curriculum": curriculum(7, 31, 150, mode="bucket", cycles=3, cycle_tokens=600)},
        {"curriculum": curriculum(4, 32, 5000)},
        {"launcher": {"ranks": 3}},
    ],
)
def test_what_fits_is_planned(make: Make, changes: dict[str, Any]) -> None:
    assert len(make_plan(train_config(**changes), make(LENGTHS)).rows_N) == 120


def masked_but_for(carrying: int, count: int, tokenizer: Path, folder: Path) -> Source:
    """As many rows of 9 and of 33 tokens, whose last positions alone carry loss."""
    rows = [
        TokenRow(i, "train", np.arange(length, dtype=np.int32), np.arange(length - 1) >= length - 1 - carrying)
        for i, length in enumerate([9, 33] * count)
    ]
    return Source.of(write_tokens(str(folder / "prompts"), tokenizer, [rows], num_shards=1))


def test_what_carries_no_loss_does_not_fill_a_curriculum(
    tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = masked_but_for(2, 100, tokenizer, tmp_path)  # the short rows have 800 positions, of which 200 count
    config = train_config(curriculum=curriculum(8, 32, 700, mode="bucket"))
    for sampled in (128, 10):
        monkeypatch.setattr("training.curriculum.plan.NUM_SAMPLED", sampled)
        with pytest.raises(ConfigError, match="all there are hold 200 positions that carry loss, and would be trained"):
            make_plan(config, source)
        assert make_plan(train_config(curriculum=curriculum(8, 32, 190, mode="bucket")), source)


def test_empty_loss_masks_are_refused(make: Make) -> None:
    with pytest.raises(StoreError, match="no position carries loss within the first 31 of any row"):
        make_plan(train_config(), make(LENGTHS, mask=False))


def test_a_mask_that_begins_beyond_the_first_cut_is_refused(tokenizer: Path, tmp_path: Path) -> None:
    row = TokenRow(0, "train", np.arange(20, dtype=np.int32), np.arange(19) >= 10)
    store = Source.of(write_tokens(str(tmp_path / "late"), tokenizer, [[row]], num_shards=1))
    assert make_plan(train_config(curriculum=curriculum(11, 19, 500)), store)
    with pytest.raises(StoreError, match=r"within the first 10 .* Raise curriculum.min_difficulty"):
        make_plan(train_config(curriculum=curriculum(10, 19, 500)), store)


def test_rows_of_one_token_are_no_rows(make: Make) -> None:
    with pytest.raises(StoreError, match="no rows to train on"):
        make_plan(train_config(), make([1, 1, 1]))


def test_what_is_sound_but_surprising_is_a_warning(make: Make) -> None:
    store = make(LENGTHS)
    late = train_config(curriculum=curriculum(4, 32, 4000))
    assert (
        "end before the curriculum does: the last sequences have 18 positions, not 32"
        in plan_warnings(make_plan(late, store), late, 120).pop()
    )
    short = train_config(curriculum=curriculum(7, 15, 200, mode="bucket"))
    assert (
        "40 of 120 rows are longer than curriculum.max_difficulty 15"
        in plan_warnings(make_plan(short, store), short, 120).pop()
    )
    plain = train_config()
    assert plan_warnings(make_plan(plain, store), plain, 120) == []


def test_a_clock_that_pacing_held_is_a_warning(make: Make) -> None:
    store = make(LENGTHS)
    paced = curriculum(8, 31, 500, pacing={"max_volatility": 0.1})
    plan = make_plan(train_config(curriculum=paced), store)
    (warning,) = end_warnings(plan, Cursor(tokens_seen=2000, clock=0))
    assert "held the clock at 0 of 2,000 tokens" in warning
    assert "sequences had 8 positions, not 31" in warning
    assert end_warnings(plan, Cursor(tokens_seen=2000, clock=500)) == []
    plain = make_plan(train_config(curriculum=curriculum(8, 31, 500)), store)
    assert end_warnings(plain, Cursor(tokens_seen=100, clock=100)) == []  # said before it began


def test_a_custom_schedule_is_part_of_the_identity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what it gives: another function under the same name is another run."""
    for name, steepness in (("steep_one", 2), ("steep_two", 3), ("steep_same", 2)):
        (tmp_path / f"{name}.py").write_text(f"def f(tokens):\n    return min(8 + tokens // 100 * {steepness}, 32)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    identities = [
        custom_identity(
            train_config(
                curriculum=curriculum(8, 32, 9)
                | {"schedule_type": "custom", "schedule_config": {"function": f"{name}:f"}}
            )
        )
        for name in ("steep_one", "steep_two", "steep_same")
    ]
    assert identities[0] == identities[2] != identities[1]
    assert custom_identity(train_config(curriculum=curriculum(8, 32, 9))) == {}
