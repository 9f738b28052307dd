"""Every kind of target against a dense float64 reference."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cluster.config import TargetsConfig
from cluster.teachers import heads
from cluster.teachers.targets import CACHE_BYTES, Selector, chunk_positions
from logit_store import LogitRow, Targets, TokenRow
from logit_store.errors import ConfigError, TeacherError
from tests.store.made import write_store


def select(
    logits_NW: Tensor, next_ids_N: Tensor, vocabulary_size: int, labels_id: str = "labels", **kind: Any
) -> Targets:
    """Targets of positions 0 to N − 1 of row 0."""
    numbers = torch.arange(len(next_ids_N))
    selector = Selector(TargetsConfig(**kind), vocabulary_size, labels_id)
    return selector.select(logits_NW, next_ids_N, torch.zeros_like(numbers), numbers)


def kinds(vocabulary_size: int) -> st.SearchStrategy[dict[str, Any]]:
    """Configs of every kind."""
    k = st.integers(1, vocabulary_size)
    share = st.floats(0.01, 0.99)
    temperature = st.sampled_from([[], [0.5], [3.0]])
    always = st.lists(st.integers(0, vocabulary_size - 1), max_size=3, unique=True)
    several = st.sampled_from([[], [0.5, 3.0]])
    common = {"always": always}
    return st.one_of(
        st.fixed_dictionaries({"kind": st.just("top_k"), "k": k, "temperatures": several, **common}),
        st.fixed_dictionaries({"kind": st.just("top_p"), "k": k, "p": share, "temperatures": several, **common}),
        st.fixed_dictionaries(
            {"kind": st.just("counts"), "draws": st.integers(1, 9), "temperatures": temperature, **common}
        ),
        st.fixed_dictionaries({"kind": st.just("threshold"), "tau": share, "temperatures": temperature, **common}),
    )


def check_head(kind: dict[str, Any], found: set[int], p_V: np.ndarray, sampled_p_V: np.ndarray) -> None:
    """Whether the head is the one asked for; what is within 1e-6 of the cut may go either way, in float32."""
    order = np.argsort(-p_V, kind="stable")
    if kind["kind"] == "top_k":
        assert found == set(order[: kind["k"]])
    elif kind["kind"] == "top_p":
        assert found == set(order[: len(found)])
        mass = p_V[order[: len(found)]].sum()
        assert mass >= kind["p"] - 1e-6 or len(found) == kind["k"]
        assert 1 <= len(found) <= kind["k"]
        assert mass - p_V[order[len(found) - 1]] < kind["p"] + 1e-6
    elif kind["kind"] == "threshold":
        close = set(np.flatnonzero(np.abs(sampled_p_V - kind["tau"]) < 1e-6 * sampled_p_V))
        assert found - close == set(np.flatnonzero(sampled_p_V >= kind["tau"])) - close
    else:
        assert not found


def check_draws(
    kind: dict[str, Any], ids: np.ndarray, kept: set[int], sampled_p_W: np.ndarray, vocabulary_size: int
) -> None:
    """Draws ascend, are no kept ids, and are as many as they should be."""
    tail = sampled_p_W[[i not in kept for i in range(len(sampled_p_W))]].sum()
    can_draw = len(kept) < vocabulary_size
    assert (np.diff(ids) >= 0).all()
    assert not set(ids) & kept
    assert all(0 <= i < vocabulary_size for i in ids)
    if kind["kind"] == "counts":
        assert len(ids) == (kind["draws"] if can_draw else 0)
    elif kind["kind"] == "threshold":
        exact = tail / kind["tau"]
        assert len(ids) in ({max(1, int(np.ceil(exact + e))) for e in (-1e-4, 1e-4)} if can_draw else {0})
        free = np.array(sorted(set(range(vocabulary_size)) - kept), int)
        share = sampled_p_W[free] / max(sampled_p_W[free].sum(), 1e-300)
        drawn = (ids[:, None] == free).sum(0)
        assert (np.abs(drawn - len(ids) * share) < 1 + 1e-4).all()  # systematic: what is expected of each id, ± 1
    else:
        assert not len(ids)


@settings(deadline=None, max_examples=150)
@given(
    st.integers(1, 7), st.integers(2, 60), st.integers(0, 12), st.sampled_from([0.1, 1.0, 8.0]), st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]), st.data(),
)  # fmt: skip
def test_targets_are_the_dense_distribution(
    n: int, v: int, padding: int, scale: float, seed: int, dtype: torch.dtype, data: st.DataObject
) -> None:
    kind = data.draw(kinds(v))
    generator = torch.Generator().manual_seed(seed)
    logits_NW = ((torch.randn(n, v + padding, generator=generator) * scale * 4).round() / 4).to(dtype)  # many ties
    next_ids_N = torch.randint(0, v, (n,), generator=generator)
    before_NW = logits_NW.clone()
    targets = select(logits_NW, next_ids_N, v, **kind)
    assert torch.equal(logits_NW, before_NW)
    log_p_NW = logits_NW.double().log_softmax(-1).numpy()
    t = kind["temperatures"][0] if kind["kind"] in ("counts", "threshold") and kind["temperatures"] else 1.0
    sampled_p_NW = (logits_NW.double() / t).softmax(-1).numpy()
    for position, one in enumerate(targets.split([1] * n)):
        log_p_W, next_id = log_p_NW[position], int(next_ids_N[position])
        head = one.head_ids_N
        assert (np.diff(head) > 0).all()
        check_head(kind, set(head), np.exp(log_p_W[:v]), sampled_p_NW[position, :v])
        np.testing.assert_allclose(one.head_logprobs_N, log_p_W[head], atol=1e-5)
        np.testing.assert_allclose(one.next_logprob_P, log_p_W[[next_id]], atol=1e-5)
        np.testing.assert_allclose(one.forced_logprobs_PF[0], log_p_W[kind["always"]], atol=1e-5)
        kept = {*head.tolist(), next_id, *kind["always"]}
        tail = np.exp(np.delete(log_p_W, list(kept))).sum()
        np.testing.assert_allclose(np.exp(one.tail_logmass_P.astype(np.float64)), [tail], atol=1e-7, rtol=1e-5)
        check_draws(kind, one.sampled_ids_M, kept, sampled_p_NW[position], v)
        expected = [np.log(np.exp(log_p_W / t).sum()) for t in kind["temperatures"]]
        np.testing.assert_allclose(one.log_partition_PS[0], expected, atol=3e-5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 5), st.integers(2, 3000), st.integers(1, 70), st.integers(1, 400), st.integers(0, 2**31))
def test_the_k_largest_are_found_group_by_group(n: int, width: int, k: int, levels: int, seed: int) -> None:
    """Few levels make ties, in and between the groups of ids; of equal logits the lower ids are taken."""
    logits_NV = np.random.default_rng(seed).integers(0, levels, (n, width)).astype(np.float32)
    k = min(k, width)
    expected_NK = np.sort(np.argsort(-logits_NV, axis=1, kind="stable")[:, :k], axis=1)
    found = heads.top_k(torch.from_numpy(logits_NV), k)
    np.testing.assert_array_equal(found.ids_H.view(n, k).numpy(), expected_NK)


def test_many_positions_are_chosen_as_few_are() -> None:
    """More than one block of the CPU's cache, and a last block that is short."""
    width = 5000
    n = 2 * chunk_positions(width, CACHE_BYTES) + 3
    logits_NW, next_ids_N = torch.randn(n, width) * 3, torch.randint(0, width, (n,))
    whole = select(logits_NW, next_ids_N, width, kind="threshold", tau=0.01, temperatures=[2.0], always=[7])
    for position in (0, n // 2, n - 1):
        selector = Selector(TargetsConfig(kind="threshold", tau=0.01, temperatures=[2.0], always=[7]), width, "labels")
        at = torch.tensor([position])
        alone = selector.select(logits_NW[at], next_ids_N[at], torch.tensor([0]), at)
        for name, one, other in zip(Targets._fields, list(whole.split([1] * n))[position], alone, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("gap", [40.0, 90.0, 200.0])  # exp(−90) has few digits in float32, exp(−200) none
def test_the_tail_of_a_peaked_row_keeps_its_digits(gap: float) -> None:
    logits = torch.full((1, 1000), -gap)
    logits[0, 3] = 0.0
    targets = select(logits, torch.tensor([3]), 1000, k=1)
    assert targets.tail_logmass_P[0] == pytest.approx(np.log(999) - gap, abs=1e-4)  # 1 − Σp would be 0
    sampled: list[dict[str, Any]] = [{"kind": "threshold", "tau": 0.5}, {"kind": "counts", "draws": 4}]
    for kind in sampled:
        drawn = select(logits, torch.tensor([3]), 1000, **kind)
        assert drawn.tail_logmass_P[0] == pytest.approx(np.log(999) - gap, abs=1e-4)
        assert drawn.sampled_counts_P[0] == (1 if kind["kind"] == "threshold" else 4)  # a tail of 4e-15 is drawn from


ALL_KINDS: list[dict[str, Any]] = [
    {"k": 40},
    {"kind": "top_p", "p": 0.999999, "k": 40, "always": list(range(40))},
    {"kind": "threshold", "tau": 1e-4},
    {"kind": "counts", "draws": 3, "always": list(range(40))},
]


@pytest.mark.parametrize("kind", ALL_KINDS, ids=str)
def test_everything_kept_leaves_no_tail_and_no_draws(kind: dict[str, Any]) -> None:
    targets = select(torch.randn(5, 40), torch.zeros(5, dtype=torch.long), 40, **kind)
    assert (targets.tail_logmass_P == -np.inf).all()
    assert not targets.sampled_counts_P.any()


@pytest.mark.parametrize("kind", ALL_KINDS[2:], ids=str)
def test_a_tail_that_lies_in_padded_rows_alone_is_kept_and_not_drawn(kind: dict[str, Any]) -> None:
    logits_NW = torch.randn(5, 48)
    targets = select(logits_NW, torch.zeros(5, dtype=torch.long), 40, **kind)
    expected = logits_NW.double().softmax(-1)[:, 40:].sum(-1).log().numpy()
    np.testing.assert_allclose(targets.tail_logmass_P, expected, atol=1e-5)
    assert not targets.sampled_counts_P.any()


def test_masked_ids_are_kept_without_probability_and_never_drawn() -> None:
    """Models that ban ids give them −inf."""
    logits_NW = torch.randn(4, 30)
    logits_NW[:, 10:] = -torch.inf
    next_ids = torch.full((4,), 20)
    assert (select(logits_NW, next_ids, 30, k=15).tail_logmass_P == -np.inf).all()
    drawn = select(logits_NW, next_ids, 30, kind="counts", draws=50)
    assert drawn.sampled_ids_M.max() < 10
    assert (drawn.next_logprob_P == -np.inf).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", [{"k": 3}, {"kind": "threshold", "tau": 0.1}], ids=str)
def test_logits_that_are_not_finite_are_refused(bad: float, kind: dict[str, Any]) -> None:
    logits = torch.randn(2, 10)
    logits[1, 4] = bad
    with pytest.raises(TeacherError, match=r"NaN or infinity.*dtype"):
        select(logits, torch.zeros(2, dtype=torch.long), 10, **kind)


def test_ids_that_the_vocabulary_lacks_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"targets\.k = 11 is larger than the vocabulary of 10"):
        Selector(TargetsConfig(k=11), 10, "labels")
    with pytest.raises(ConfigError, match=r"names id 10, but the vocabulary has the ids 0 to 9"):
        Selector(TargetsConfig(always=[10], k=1), 10, "labels")


@pytest.mark.parametrize(
    "kind",
    [
        {"k": 8, "temperatures": [2.0], "always": [3, 60]},
        {"kind": "top_p", "p": 0.8, "k": 12},
        {"kind": "counts", "draws": 20, "always": [1]},
        {"kind": "threshold", "tau": 0.05, "temperatures": [2.0]},
    ],
    ids=str,
)
def test_a_store_gives_back_what_was_chosen(kind: dict[str, Any], tmp_path: Path) -> None:
    v, lengths = 64, (30, 2, 17)
    config, generator = TargetsConfig(**kind), torch.Generator().manual_seed(0)
    rows = []
    for length in lengths:
        ids = torch.randint(0, v, (length,), generator=generator)
        targets = select(torch.randn(length - 1, v + 8, generator=generator) * 3, ids[1:], v, **kind)
        rows.append(LogitRow(TokenRow(7, "train", ids.int().numpy()), targets))
    store = write_store(
        str(tmp_path / "store"), [rows], k=config.k or 0, temperatures=config.temperatures, forced_ids=config.always,
        codec={"kind": "exact", "max_kl": 1e-4, "max_error": 0.5},
    )  # fmt: skip
    for row, (_, targets) in enumerate(rows):
        for name, wanted, found in zip(Targets._fields, targets, store[row].targets, strict=True):
            np.testing.assert_array_equal(found, wanted, err_msg=name)


@pytest.mark.parametrize("kind", [{"k": 8}, {"kind": "threshold", "tau": 0.05}])
def test_a_common_offset_of_the_logits_costs_no_digits(kind: dict[str, Any]) -> None:
    """Some models' logits lie around −100: float32 has 5 digits left there, and log-probs need more."""
    generator = torch.Generator().manual_seed(5)
    logits_NW = (torch.randn(6, 5000, generator=generator) * 3).double()
    offset_NW = (logits_NW - 300).float()
    next_ids_N = torch.arange(6)
    selector = Selector(TargetsConfig(**kind, temperatures=[0.25]), 5000, "labels")
    targets = selector.select(offset_NW, next_ids_N, next_ids_N, next_ids_N)
    log_p_NW = offset_NW.double().log_softmax(-1)
    expected = log_p_NW[torch.arange(6), next_ids_N].numpy()
    np.testing.assert_allclose(targets.next_logprob_P, expected, atol=2e-6)
    partition = (4 * log_p_NW).logsumexp(-1).numpy()
    np.testing.assert_allclose(targets.log_partition_PS[:, 0], partition, atol=1e-5)
