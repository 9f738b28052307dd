"""Prefixes that end where sentences and lines end, and positions that carry no loss."""

from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import pytest

from logit_store import TokenRow, TokenStore
from logit_store.tools.token_text import TokenText
from tests.toy import write_tokens
from training.config import CurriculumConfig, CurriculumScheduleConfig
from training.curriculum.batches import BatchPlan, Cursor
from training.curriculum.boundaries import Boundaries
from training.curriculum.clock import Curriculum
from training.curriculum.cuts import TokenCut, cut_of, plain_cut
from training.data.source import Source

PROSE = 'One two. Pi is 3.14 or so! See os.path? "Five." Six…\n\tSeven\n  eight (nine.) ten。十一'
ENDS: dict[Literal["sentence", "line"], set[str]] = {
    "sentence": {
        "One two.", "One two. Pi is 3.14 or so!", "One two. Pi is 3.14 or so! See os.path?",
        'One two. Pi is 3.14 or so! See os.path? "Five."', PROSE[: PROSE.index("…") + 1], PROSE[: PROSE.index("…") + 2],
        PROSE[: PROSE.index("  eight")], PROSE[: PROSE.index(" ten")], PROSE[: PROSE.index("十")],
    },
    "line": {PROSE[: PROSE.index("\tSeven")], PROSE[: PROSE.index("  eight")]},
}  # fmt: skip


@pytest.mark.parametrize("unit", ["sentence", "line"])
def test_a_prefix_ends_where_a_unit_ends(unit: Literal["sentence", "line"]) -> None:
    """Every character is a token: what a prefix has seen and predicted is a text that ends with a unit."""
    alphabet = sorted(set(PROSE))
    boundaries = Boundaries.of_texts(lambda i: alphabet[i].encode(), len(alphabet), unit)
    ids_T = np.array([alphabet.index(character) for character in PROSE], np.int32)
    found = set()
    for most in range(1, len(PROSE) - 1):
        positions = boundaries.last_end(ids_T, most)
        text = PROSE[: positions + 1]
        shorter = {end for end in ENDS[unit] if len(end) <= most + 1}
        assert text == (max(shorter, key=len) if shorter else PROSE[: most + 1])
        found |= {text} & ENDS[unit]
    assert found == ENDS[unit]


def test_boundaries_of_tokens_that_are_words() -> None:
    words = [b" .", b".", b"!\n", b".) ", b" x", b"x", b"\n    ", b"3", None, b'."', b"\xe3\x80", b'")']
    sentence, line = (Boundaries.of_texts(words.__getitem__, len(words), unit) for unit in ("sentence", "line"))
    assert np.flatnonzero(sentence.ends_V).tolist() == [2, 3, 6]
    assert np.flatnonzero(sentence.may_end_V).tolist() == [0, 1, 9]
    assert np.flatnonzero(sentence.closes_V).tolist() == [11]
    assert np.flatnonzero(sentence.opens_V).tolist() == [0, 4, 6]
    assert np.flatnonzero(line.ends_V).tolist() == [2, 6]
    assert not line.may_end_V.any()


def test_a_store_tells_the_text_of_its_tokens(tokens: TokenStore) -> None:
    text = TokenText.of_store(tokens)
    row = tokens[0].input_ids_T
    boundaries = Boundaries.of_store(tokens, "line")
    for i in row.tolist():
        assert boundaries.ends_V[i] == (text.data(i) or b"").rstrip(b" \t\r").endswith(b"\n")
    assert boundaries.ends_V.any()
    cut = cut_of(Source.of(tokens), "line")
    longest = len(row) - 1
    assert cut(0, longest) == (longest, longest)  # a row that is not cut ends where it ends
    assert cut(0, longest - 1)[0] <= longest - 1


# Loss masks


def a_row(number: int, length: int, mask: list[int] | None = None) -> TokenRow:
    ids_T = np.arange(length, dtype=np.int32)
    return TokenRow(number, "train", ids_T, None if mask is None else np.array(mask, np.bool_))


@pytest.fixture
def masked(tokenizer: Path, tmp_path: Path) -> TokenStore:
    """Two shards, of which the second has masks."""
    shards = [
        [a_row(0, 20), a_row(1, 9)],
        [a_row(2, 12, [0] * 8 + [1] * 3), a_row(3, 12), a_row(4, 11, [1, 0] * 5), a_row(5, 7, [0] * 6)],
    ]
    return write_tokens(str(tmp_path / "masked"), tokenizer, shards, num_shards=2)


def test_only_positions_that_carry_loss_count(masked: TokenStore) -> None:
    cut = cut_of(Source.of(masked), "token")
    assert [cut(row, 10) for row in (2, 3, 4, 5)] == [(10, 2), (10, 10), (10, 5), (10, 0)]
    with mock.patch.object(masked, "tokens", wraps=masked.tokens) as reads:
        assert cut(0, 19) == (19, 19)
        assert not reads.called  # its shard has no masks


def test_a_store_without_masks_is_not_read(tokens: TokenStore) -> None:
    assert cut_of(Source.of(tokens), "token") is plain_cut


def test_the_plan_counts_what_carries_loss_and_spends_what_carries_none(masked: TokenStore) -> None:
    rows_N = masked.rows("train")
    config = CurriculumConfig(
        min_difficulty=8, max_difficulty=19,
        schedule_config=CurriculumScheduleConfig(total_curriculum_tokens=120, difficulty_step=1),
    )  # fmt: skip
    plan = BatchPlan(rows_N, masked.lengths_N[rows_N], 30, 0, Curriculum(config), TokenCut(Source.of(masked), None))
    cursor, seen = Cursor(), set()
    for _ in range(12):
        before = cursor
        prefixes, length, cursor = plan.next(before)
        carrying = sum(int(masked[row].carries_loss_P[:n].sum()) for row, n in prefixes)
        assert 0 < cursor.tokens_seen - before.tokens_seen == carrying <= 30
        assert 2 not in [prefix.row for prefix in prefixes] or length > 8  # its loss begins at position 8
        seen |= {prefix.row for prefix in prefixes}
    assert cursor.epoch >= 1
    assert seen == {0, 1, 2, 3, 4}
