"""`decant diff`: how far two stores are apart, against plain loops over dictionaries."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import decant
from logit_store import LogitRow, Targets
from logit_store.tools.difference import Difference, Labels, compare
from tests.store.made import make_row, targets_of, write_store, write_tokens

EXACT = {"kind": "exact", "max_kl": 1e-4, "max_error": 0.5}
Head = dict[int, float]


def kept_and_heads(targets: Targets, next_ids: np.ndarray, forced: list[int]) -> list[tuple[Head, Head]]:
    """What each position keeps, and its head alone."""
    found, end = [], 0
    for t, count in enumerate(targets.head_counts_P.tolist()):
        ids, logprobs = targets.head_ids_N[end : end + count], targets.head_logprobs_N[end : end + count]
        end += count
        head = dict(zip(ids.tolist(), logprobs.astype(np.float64).tolist(), strict=True))
        kept = {int(next_ids[t]): float(targets.next_logprob_P[t])}
        kept |= {i: float(targets.forced_logprobs_PF[t, f]) for f, i in enumerate(forced)}
        found.append((kept | head, head))
    return found


def plain_compare(a: Targets, b: Targets, next_ids: np.ndarray, forced_a: list[int], forced_b: list[int]) -> dict:
    """The same figures as ``compare`` gives, with loops."""
    errors, likely, cuts, tails, common, possible, kl = [0.0], [0.0], [0.0], [0.0], 0, 0, 0.0
    positions = zip(kept_and_heads(a, next_ids, forced_a), kept_and_heads(b, next_ids, forced_b), strict=True)
    for t, ((kept_a, head_a), (kept_b, head_b)) in enumerate(positions):
        both = kept_a.keys() & kept_b.keys()
        for i in both:
            error = abs(kept_a[i] - kept_b[i])
            errors.append(error)
            if max(kept_a[i], kept_b[i]) >= np.log(1e-3):
                likely.append(error)
            kl += np.exp(kept_a[i]) * (kept_a[i] - kept_b[i])
        rest = [
            np.exp(np.float64(side.tail_logmass_P[t])) + sum(np.exp(p) for i, p in kept.items() if i not in both)
            for side, kept in ((a, kept_a), (b, kept_b))
        ]
        tails.append(abs(rest[0] - rest[1]))
        kl += rest[0] * np.log(rest[0] / rest[1]) if rest[0] else 0.0
        common += len(head_a.keys() & head_b.keys())
        possible += min(len(head_a), len(head_b))
        for mine, theirs in ((head_a, head_b), (head_b, head_a)):
            for i in mine.keys() - theirs.keys():
                if theirs:
                    cuts.append(mine[i] - min(theirs.values()))
                    likely.append(cuts[-1] if mine[i] >= np.log(1e-3) else 0.0)
    return {
        "common_ids": common, "possible_ids": possible, "max_error": max(errors), "sum_error": sum(errors),
        "max_likely_error": max(likely), "max_cut_error": max(cuts), "max_tail_error": max(tails),
        "sum_tail_error": sum(tails), "sum_kl": kl,
    }  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 12), st.lists(st.integers(0, 19), max_size=2, unique=True)
)
def test_figures_are_those_of_plain_loops(seed: int, k_a: int, k_b: int, forced: list[int]) -> None:
    rng = np.random.default_rng(seed)
    v, p = 20, int(rng.integers(0, 6))
    ids_T = rng.integers(0, v, p + 1).astype(np.int32)
    scores = rng.normal(size=(p, v)) * 3
    sides = []
    for k, noise, own_forced in ((k_a, 0.0, forced), (k_b, rng.choice([0.0, 0.01, 1.0]), [])):
        noisy = scores + rng.normal(size=scores.shape) * noise
        logprobs = noisy - np.logaddexp.reduce(noisy, axis=1, keepdims=True) if p else noisy
        counts = rng.integers(max(k - 2, 0), k + 1, p).tolist()
        sides.append(targets_of(logprobs, ids_T, counts, rng, forced_ids=own_forced))
    found = compare(Labels(sides[0], forced), Labels(sides[1]), ids_T[1:])
    for name, wanted in plain_compare(sides[0], sides[1], ids_T[1:], forced, []).items():
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-6, atol=1e-9, err_msg=name)
    assert found.sum_kl >= -1e-5
    backwards = compare(Labels(sides[1]), Labels(sides[0], forced), ids_T[1:])
    np.testing.assert_allclose(found[:-3], backwards[:-3], rtol=1e-9, atol=1e-12)  # all but KL is symmetric


def test_a_shorter_head_of_the_same_distribution_differs_in_nothing() -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 64, 30).astype(np.int32)
    scores = rng.normal(size=(29, 64)) * 4
    logprobs = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    long, short = (targets_of(logprobs, ids, [k] * 29, rng) for k in (32, 8))
    found = compare(Labels(long), Labels(short), ids[1:])
    assert found.common_ids == found.possible_ids == 29 * 8
    assert found.max_error == found.max_cut_error == 0.0
    assert found.max_tail_error < 1e-6


def test_impossible_ids() -> None:
    """Both say −inf: equal. One says it: infinitely far apart."""
    ids = np.array([0, 1], np.int32)
    with np.errstate(divide="ignore"):
        one, other = np.log([[0.5, 0.5, 0.0, 0.0]]), np.log([[0.5, 0.25, 0.25, 0.0]])
    first, second = (targets_of(x, ids, [4], np.random.default_rng(0)) for x in (one, other))
    assert compare(Labels(first), Labels(first), ids[1:]).max_error == 0.0
    assert compare(Labels(first), Labels(second), ids[1:]).max_error == np.inf


def test_draws_are_compared_with_their_repeats() -> None:
    row = make_row(np.random.default_rng(0), 4, 2)

    def drawn(*of_positions: list[int]) -> Labels:
        counts = np.array([len(ids) for ids in of_positions], np.int32)
        sampled = np.concatenate([np.zeros(0), *of_positions]).astype(np.int32)
        return Labels(row.targets._replace(sampled_counts_P=counts, sampled_ids_M=sampled))

    next_ids = row.tokens.input_ids_T[1:]
    found = compare(drawn([5, 5, 6], [7], []), drawn([5, 6, 6], [], [7]), next_ids)
    assert (found.draws, found.differing_draws) == (4, 2)
    assert compare(drawn([5, 5], [], []), drawn([5, 5], [], []), next_ids).differing_draws == 0
    assert compare(drawn([], [], []), drawn([5], [], []), next_ids).differing_draws == 1


def test_totals_are_sums_and_largest_values() -> None:
    a, b = Difference(positions=2, sum_error=1.0, max_error=0.5), Difference(positions=3, sum_error=2.0, max_error=0.1)
    total = Difference.total([a, b])
    assert (total.positions, total.sum_error, total.max_error) == (5, 3.0, 0.5)


def rows_of(seed: int = 0) -> list[LogitRow]:
    rng = np.random.default_rng(seed)
    return [make_row(rng, length, 8) for length in (1, 20, 9, 30, 4, 17, 2, 8)]


def perturbed(row: LogitRow, by: float) -> LogitRow:
    """The same distribution but for a bit of mass moved from the most probable entry to the tail."""
    ids_PK, logprobs_PK = row.targets.padded_heads(8)
    top = logprobs_PK.argmax(1)
    place = (np.arange(len(top)), top)
    moved = np.exp(logprobs_PK[place].astype(np.float64)) * (1 - np.exp(-by))
    changed = logprobs_PK.copy()
    changed[place] -= np.float32(by)
    tail = np.log(np.exp(row.targets.tail_logmass_P.astype(np.float64)) + moved)
    is_next = ids_PK[place] == row.tokens.input_ids_T[1:]
    targets = row.targets._replace(
        head_logprobs_N=changed.reshape(-1),
        tail_logmass_P=tail.astype(np.float32),
        next_logprob_P=np.where(is_next, changed[place], row.targets.next_logprob_P).astype(np.float32),
    )
    return row._replace(targets=targets)


def test_the_command_finds_the_worst_rows(tmp_path: Path, capsys: Any) -> None:
    a, b, rows = str(tmp_path / "a"), str(tmp_path / "b"), rows_of()
    write_store(a, [rows[:4], rows[4:]], codec=EXACT)
    errors = {1: 0.004, 3: 0.02, 5: 0.3, 7: 0.05}
    other = [perturbed(row, errors.get(i, 0.0)) for i, row in enumerate(rows)]
    write_store(b, [other[:4], other[4:]], codec=EXACT)
    assert decant.main(["diff", a, a]) == 0
    assert decant.main(["diff", a, b]) == 1
    assert "beyond the tolerance of 0.01" in capsys.readouterr().out
    assert decant.main(["diff", a, b, "--tolerance", "0.31"]) == 0
    assert decant.main(["diff", a, b, "--json"]) == 1
    found = json.loads(capsys.readouterr().out.split("draws)\n")[-1])
    assert [row["row"] for row in found["worst"][:4]] == [5, 7, 3, 1]
    assert len(found["worst"]) == 5
    assert found["overall"]["max_error"] == pytest.approx(0.3, abs=1e-4)
    assert found["overall"]["positions"] == sum(max(len(row.tokens.input_ids_T) - 1, 0) for row in rows)
    assert not found["within_tolerance"]


def test_a_lossy_store_is_within_its_bound_of_the_exact_one(tmp_path: Path) -> None:
    for name, codec in (("a", EXACT), ("b", {**EXACT, "kind": "lossy"})):
        write_store(str(tmp_path / name), [rows_of()], codec=codec)
    pair = [str(tmp_path / "a"), str(tmp_path / "b")]
    assert decant.main(["diff", *pair, "--tolerance", "0.5"]) == 0
    assert decant.main(["diff", *pair, "--tolerance", "1e-6"]) == 1


def test_stores_of_other_text_cannot_be_compared(tmp_path: Path, capsys: Any) -> None:
    for seed in (0, 1):
        write_store(str(tmp_path / f"{seed}"), [rows_of(seed)])
        write_tokens(str(tmp_path / f"tokens{seed}"), [[row.tokens for row in rows_of(seed)]])
    assert decant.main(["diff", str(tmp_path / "0"), str(tmp_path / "1")]) == 2
    assert "text_id" in capsys.readouterr().err
    assert decant.main(["diff", str(tmp_path / "0"), str(tmp_path / "tokens0")]) == 2
    assert "two stores of one kind" in capsys.readouterr().err


def test_token_stores_are_compared_row_by_row_however_they_are_cut(tmp_path: Path, capsys: Any) -> None:
    tokens = [row.tokens for row in rows_of()]
    write_tokens(str(tmp_path / "a"), [tokens[:3], tokens[3:]])
    write_tokens(str(tmp_path / "b"), [tokens[:5], [], tokens[5:]])
    assert decant.main(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    changed = list(tokens)
    changed[2] = tokens[2]._replace(input_ids_T=tokens[2].input_ids_T[::-1].copy())
    changed[4] = tokens[4]._replace(split={"train": "held_out", "held_out": "train"}[tokens[4].split])
    changed[5] = tokens[5]._replace(loss_mask_P=np.arange(len(tokens[5].input_ids_T) - 1) > 3)
    write_tokens(str(tmp_path / "c"), [changed[:7]])
    capsys.readouterr()
    assert decant.main(["diff", str(tmp_path / "a"), str(tmp_path / "c"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out) == {"rows": [8, 7], "differing_rows": [2, 4, 5, 7]}
