"""Draws: the same counter gives the same ids everywhere, and their mean is the distribution."""

from typing import Any

import numpy as np
import pytest
import torch

from cluster.config import TargetsConfig
from cluster.teachers.sampling import draw, seed_of, systematic, uniforms
from cluster.teachers.targets import Selector
from logit_store import Targets

V, PADDING = 40, 3


def test_the_hash_is_splitmix64() -> None:
    """Against the same arithmetic on Python's unbounded integers: these bits must never change."""

    def mixed(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    assert mixed(0) == 0xE220A8397B1DCDAF  # the first output of the published generator from seed 0
    seed, row, position = seed_of("labels"), 2**40 + 7, 511
    expected = [(mixed(mixed(mixed(seed + row) + position) + j) >> 11) / 2**53 for j in range(5)]
    found = uniforms(seed, torch.tensor([row]), torch.tensor([position]), 5)
    assert found[0].tolist() == expected


def test_the_numbers_are_uniform_and_do_not_depend_on_each_other() -> None:
    """Chi-square of 16 × 16 cells of pairs that differ in one part of the counter only; the false alarm is at 1e-6."""
    rows, positions = torch.arange(256).repeat_interleave(256), torch.arange(256).repeat(256)
    u_RPD = uniforms(1, rows, positions, 2).view(256, 256, 2)
    pairs = [(u_RPD[:-1], u_RPD[1:]), (u_RPD[:, :-1], u_RPD[:, 1:]), (u_RPD[..., 0], u_RPD[..., 1])]
    for a, b in pairs:
        counts = torch.bincount(((a * 16).long() * 16 + (b * 16).long()).flatten(), minlength=256).double()
        expected = a.numel() / 256
        assert float(((counts - expected) ** 2 / expected).sum()) < 255 + 5 * np.sqrt(2 * 255) + 20


def test_a_draw_is_the_plain_search() -> None:
    weights_NV = torch.rand(6, 50) ** 4
    points_NM = systematic(torch.rand(6, 1).double(), torch.full((6, 1), 9))
    cumulated_NV = weights_NV.double().cumsum(1)
    expected = torch.searchsorted(cumulated_NV, points_NM * cumulated_NV[:, -1:], right=True)
    assert torch.equal(draw(weights_NV.clone(), points_NM), expected)


def test_points_beyond_and_rows_without_weight() -> None:
    weights_NV = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    assert draw(weights_NV, torch.tensor([[0.0, 0.999, 1.5], [0.0, 0.5, 0.5]]).double()).tolist() == [[1] * 3, [3] * 3]


KINDS: list[dict[str, Any]] = [
    {"kind": "counts", "draws": 7},
    {"kind": "counts", "draws": 7, "temperatures": [2.0], "always": [3]},
    {"kind": "threshold", "tau": 0.08},
    {"kind": "threshold", "tau": 0.08, "temperatures": [2.0], "always": [3]},
    {"kind": "threshold", "tau": 0.03, "temperatures": [0.5]},
]


def selected(kind: dict[str, Any], logits_W: torch.Tensor, num: int, labels_id: str, next_id: int = 5) -> Targets:
    """Targets of the same distribution at ``num`` positions of the store."""
    numbers = torch.arange(num)
    selector = Selector(TargetsConfig(**kind), V, labels_id)
    return selector.select(logits_W.expand(num, -1), torch.full((num,), next_id), numbers // 50, numbers % 50)


def estimates(targets: Targets, kind: dict[str, Any], width: int, next_id: int = 5) -> np.ndarray:
    """What a reader makes of each position at its temperature: p̂ [N, W], kept ids exact, draws tail/m each."""
    t = kind.get("temperatures", [1.0])[0]
    n = len(targets.next_logprob_P)
    partition_N = targets.log_partition_PS[:, 0] if "temperatures" in kind else np.zeros(n)
    estimate_NW = np.zeros((n, width))
    positions_H = np.repeat(np.arange(n), targets.head_counts_P)
    estimate_NW[positions_H, targets.head_ids_N] = np.exp(targets.head_logprobs_N / t - partition_N[positions_H])
    estimate_NW[:, next_id] = np.exp(targets.next_logprob_P / t - partition_N)
    for column, forced in enumerate(kind.get("always", [])):
        estimate_NW[:, forced] = np.exp(targets.forced_logprobs_PF[:, column] / t - partition_N)
    share_N = (1 - estimate_NW.sum(1)) / np.maximum(targets.sampled_counts_P, 1)
    drawn_M = np.repeat(np.arange(n), targets.sampled_counts_P)
    np.add.at(estimate_NW, (drawn_M, targets.sampled_ids_M), share_N[drawn_M])
    return estimate_NW


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_mean_over_seeds_is_the_dense_distribution(kind: dict[str, Any]) -> None:
    """20,000 positions of ten labels ids, by the empirical Bernstein bound (Maurer, Pontil 2009) for each id, and a
    union bound over them: a right sampler fails with one set of seeds in a million (and these are fixed), and one
    whose mean is off by 0.01 anywhere is caught.
    """
    t, n = kind.get("temperatures", [1.0])[0], 2000
    logits_W = torch.randn(V + PADDING, generator=torch.Generator().manual_seed(1)) * 2
    logits_W[V:] -= 30  # rows beyond the vocabulary, without mass
    p_W = (logits_W.double() / t).softmax(-1).numpy()
    samples = np.concatenate([estimates(selected(kind, logits_W, n, f"labels {i}"), kind, p_W.size) for i in range(10)])
    log_term, count = np.log(4 * p_W.size / 1e-6), len(samples)
    bound_W = np.sqrt(2 * samples.var(0, ddof=1) * log_term / count) + 7 * log_term / (3 * (count - 1))
    assert bound_W.max() < 0.01
    assert (np.abs(samples.mean(0) - p_W) <= bound_W).all()
    assert samples.var(0).max() > 1e-5  # something was drawn


def test_a_retry_in_another_order_draws_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 300
    logits_NW = torch.randn(n, V + PADDING, generator=generator) * 2
    next_ids, rows, positions = torch.randint(0, V, (n,)), torch.arange(n) // 30, torch.arange(n) % 30
    for kind in KINDS:
        selector = Selector(TargetsConfig(**kind), V, "labels")
        whole = selector.select(logits_NW, next_ids, rows, positions)
        order = torch.randperm(n, generator=generator)
        columns = (c[order].split(7) for c in (logits_NW, next_ids, rows, positions))
        parts = [selector.select(*part) for part in zip(*columns, strict=True)]
        shuffled = list(Targets.join(parts).split([1] * n))
        again = Targets.join([shuffled[i] for i in order.argsort().tolist()])
        np.testing.assert_array_equal(again.sampled_counts_P, whole.sampled_counts_P)
        np.testing.assert_array_equal(again.sampled_ids_M, whole.sampled_ids_M)
        other = Selector(TargetsConfig(**kind), V, "other labels").select(logits_NW, next_ids, rows, positions)
        assert not np.array_equal(other.sampled_ids_M, whole.sampled_ids_M)


def test_threshold_is_closer_than_counts_with_as_many_ids() -> None:
    """Over distributions with peaks and tails, E‖p̂ − p‖² at no more distinct ids."""
    errors, ids = {"threshold": 0.0, "counts": 0.0}, {"threshold": 0, "counts": 0}
    kinds: dict[str, dict[str, Any]] = {
        "threshold": {"kind": "threshold", "tau": 0.06},
        "counts": {"kind": "counts", "draws": 30},
    }
    for i in range(20):
        logits_W = torch.randn(V, generator=torch.Generator().manual_seed(i)) * 2
        p_W = logits_W.double().softmax(-1).numpy()
        for name, kind in kinds.items():
            estimate_NW = estimates(selected(kind, logits_W, 400, "labels"), kind, V)
            errors[name] += float(((estimate_NW - p_W) ** 2).sum(1).mean())
            ids[name] += int((estimate_NW > 0).sum())
    assert ids["threshold"] <= ids["counts"]
    assert errors["threshold"] < 0.5 * errors["counts"]
