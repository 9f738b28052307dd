"""How difficult a row is for the teacher, from its labels."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from logit_store.errors import ConfigError
from training.curriculum import difficulty
from training.curriculum.difficulty import easiest_percent, row_difficulties, row_difficulty


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_loss_and_entropy_are_the_teachers(make_store: Callable[..., Any], teacher: Path) -> None:
    """With every id kept, what the model itself says of the row."""
    import torch
    from transformers import AutoModelForCausalLM

    store = make_store("whole-exact-difficulty", targets={"k": 400}, store={"codec": {"kind": "exact"}})
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    rows_N = store.rows("train")[:4]
    found = {metric: row_difficulties(store, rows_N, metric) for metric in ("loss", "entropy")}
    for i, row in enumerate(rows_N):
        ids_1T = torch.from_numpy(store[row].tokens.input_ids_T.astype(np.int64))[None]
        with torch.no_grad():
            log_p_PV = model(input_ids=ids_1T).logits[0, :-1].double().log_softmax(-1)
        loss = -log_p_PV.gather(-1, ids_1T[0, 1:, None]).mean()
        assert found["loss"][i] == pytest.approx(float(loss), rel=1e-5)
        tail_P = log_p_PV[:, 400:].logsumexp(-1, keepdim=True)  # the head's 16 rows beyond V are one outcome
        outcomes = torch.cat([log_p_PV[:, :400], tail_P], -1)
        assert found["entropy"][i] == pytest.approx(float(-(outcomes.exp() * outcomes).sum(-1).mean()), rel=1e-5)


def test_only_positions_that_carry_loss_count(store: Any) -> None:
    row = store[int(store.rows("train")[0])]
    mask_P = np.arange(len(row.tokens.input_ids_T) - 1) % 3 == 0
    masked = row._replace(tokens=row.tokens._replace(loss_mask_P=mask_P))
    assert row_difficulty(masked, "loss", []) == pytest.approx(-row.targets.next_logprob_P[mask_P].mean(), rel=1e-6)
    nothing = row._replace(tokens=row.tokens._replace(loss_mask_P=np.zeros_like(mask_P)))
    assert np.isnan(row_difficulty(nothing, "entropy", []))


def test_labels_are_read_once(store: Any, own_cache: Path) -> None:
    rows_N = store.rows("train")[:10]
    first = row_difficulties(store, rows_N, "loss")
    with mock.patch.object(difficulty, "_measured", side_effect=AssertionError("read again")):
        np.testing.assert_array_equal(row_difficulties(store, rows_N, "loss"), first)
        with pytest.raises(AssertionError, match="read again"):
            row_difficulties(store, rows_N, "entropy")
        with pytest.raises(AssertionError, match="read again"):
            row_difficulties(store, rows_N[:9], "loss")
    assert len(list(own_cache.rglob("*.npy"))) == 1


def test_a_cache_that_cannot_be_written_is_named(store: Any, own_cache: Path) -> None:
    own_cache.write_text("a file where the folder should be")
    with pytest.raises(ConfigError, match="set XDG_CACHE_HOME to a folder that can"):
        row_difficulties(store, store.rows("train")[:2], "loss")


def test_percents_follow_the_order_of_difficulties() -> None:
    assert easiest_percent(np.array([3.0, 1.0, np.nan, 2.0, 1.0])).tolist() == [80, 20, 100, 60, 40]
    assert easiest_percent(np.zeros(0)).tolist() == []
