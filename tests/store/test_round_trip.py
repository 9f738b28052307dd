"""What is written is read: any vocabulary, any number of entries, any length, to the last bit or within the bound."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_store import LogitRow, Targets, TokenRow
from logit_store.codec import kernels
from logit_store.codec.blocks import Layout, sort_targets
from logit_store.codec.levels import CodecConfig
from logit_store.encode import encode_logits, encode_tokens
from logit_store.errors import StoreError
from tests.store.made import V, make_row, targets_of, write_store, write_tokens

LOSSY, EXACT = CodecConfig(), CodecConfig(kind="exact")


def decoded_sums(row: LogitRow, forced_ids: list[int]) -> np.ndarray:
    """Σ of what each position keeps, every id once, and its tail, in float64."""
    targets, next_ids = row.targets, row.tokens.input_ids_T[1:]
    ends = np.cumsum(targets.head_counts_P)
    sums = np.exp(targets.tail_logmass_P.astype(np.float64))
    for t, (end, count) in enumerate(zip(ends, targets.head_counts_P, strict=True)):
        kept = dict(zip(targets.head_ids_N[end - count : end], targets.head_logprobs_N[end - count : end], strict=True))
        kept.setdefault(next_ids[t], targets.next_logprob_P[t])
        for f, forced in enumerate(forced_ids):
            kept.setdefault(forced, targets.forced_logprobs_PF[t, f])
        sums[t] += np.exp(np.array(list(kept.values()), np.float64)).sum()
    return sums


def assert_same(found: LogitRow, wanted: LogitRow, max_error: float) -> None:
    """Equal but for log-probs, which may be ``max_error`` apart."""
    mask = wanted.tokens.loss_mask_P
    np.testing.assert_array_equal(found.tokens.input_ids_T, wanted.tokens.input_ids_T)
    assert (found.tokens.document, found.tokens.split) == (wanted.tokens.document, wanted.tokens.split)
    assert dict(found.tokens.columns) == dict(wanted.tokens.columns)
    all_true = np.ones(max(len(wanted.tokens.input_ids_T) - 1, 0), bool)
    np.testing.assert_array_equal(
        all_true if found.tokens.loss_mask_P is None else found.tokens.loss_mask_P, all_true if mask is None else mask
    )
    expected = sort_targets(wanted.targets)
    expected = expected._replace(tail_logmass_P=np.minimum(expected.tail_logmass_P, 0))  # float noise above certainty
    for name in Targets._fields:
        a, b = getattr(found.targets, name), getattr(expected, name)
        if name in ("head_logprobs_N", "next_logprob_P", "forced_logprobs_PF"):
            np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), name)
            np.testing.assert_allclose(np.nan_to_num(a), np.nan_to_num(b), atol=max_error, rtol=0, err_msg=name)
        else:
            np.testing.assert_array_equal(a, b, name)


@pytest.fixture(params=["compiled", "numpy"], autouse=True)
def _inner_loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test of this file runs with both implementations of the inner loops."""
    if request.param == "compiled":
        assert kernels.fastest().__name__ == "logit_store.codec.compiled"
        yield
    else:
        with (
            mock.patch("logit_store.codec.ids.fastest", return_value=kernels),
            mock.patch("logit_store.codec.blocks.fastest", return_value=kernels),
            mock.patch("logit_store.codec.planes.fastest", return_value=kernels),
            mock.patch("logit_store.encode.fastest", return_value=kernels),
        ):
            yield


@settings(deadline=None, max_examples=40)
@given(st.data(), st.integers(0, 2**31), st.sampled_from(["lossy", "exact"]))
def test_any_rows(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int, kind: str) -> None:
    rng = np.random.default_rng(seed)
    lengths = data.draw(st.lists(st.integers(0, 40), min_size=1, max_size=8))
    v = data.draw(st.sampled_from([1, 2, 17, 64, 300]))
    fixed = data.draw(st.integers(0, v))
    ragged, forced = data.draw(st.booleans()), data.draw(st.lists(st.integers(0, v - 1), max_size=3, unique=True))
    rows = []
    for length in lengths:
        k = rng.integers(0, v + 1, length).tolist() if ragged else fixed
        options: dict[str, Any] = {
            "forced_ids": forced,
            "max_draws": data.draw(st.sampled_from([0, 5])),
            "temperatures": 2,
        }
        columns = {"url": f"https://example.org/{length}", "score": None if length % 2 else 0.25}
        masked = bool(rng.integers(2))
        rows.append(make_row(rng, length, k, v, columns=columns, masked=masked, **options))
    store = write_store(
        str(tmp_path_factory.mktemp("store")),
        [rows, rows[:1]],
        vocabulary_size=v,
        forced_ids=forced,
        temperatures=[2.0, 4.0],
        codec={"kind": kind, "max_kl": 1e-4, "max_error": 0.5},
        columns={"url": "string", "score": "float64"},
    )
    assert list(store.lengths_N) == [*lengths, lengths[0]]
    for i in rng.permutation(len(store)):
        wanted = [*rows, rows[0]][i]
        assert_same(store[int(i)], wanted, max_error=0.5 if kind == "lossy" else 0.0)
        np.testing.assert_allclose(decoded_sums(store[int(i)], forced), 1.0, atol=1e-6)
        assert_same(LogitRow(store.tokens(int(i)), store[int(i)].targets), wanted, 0.5)
    assert store.shards.columns["mean_kl"].max() <= 1e-4


def row_of(logprobs_PV: np.ndarray, ids_T: list[int], k: int) -> LogitRow:
    ids = np.array(ids_T, np.int32)
    return LogitRow(
        TokenRow(0, "train", ids), targets_of(logprobs_PV, ids, [k] * len(logprobs_PV), np.random.default_rng(0))
    )


def coded(row: LogitRow, v: int, codec: CodecConfig = LOSSY) -> dict:
    return encode_logits([row], Layout(v, True, codec.kind == "exact"), codec, {}, {}).facts


@pytest.mark.parametrize("codec", [LOSSY, EXACT])
def test_degenerate_distributions(codec: CodecConfig) -> None:
    """`encode_logits` decodes what it wrote and asserts what must be equal; here its facts are looked at."""
    v = 200
    one_hot = np.full((3, v), -np.inf)
    one_hot[:, 7] = 0.0
    uniform = np.full((3, v), -np.log(v))
    tied = np.log(np.repeat([0.3, 0.1, 0.05], [2, 3, 2]))
    tied = np.concatenate([tied, np.full(v - 7, -np.inf)])[None].repeat(3, 0)
    for logprobs_PV in (one_hot, uniform, tied):
        for k in (0, 1, 5, v):
            for next_ids in ([0, 7, 7, 7], [0, 0, 1, 199]):
                facts = coded(row_of(logprobs_PV, next_ids, k), v, codec)
                assert facts["mean_kl"] <= codec.max_kl
                assert facts["max_error"] <= codec.max_error


def test_every_id_up_to_2_to_the_24() -> None:
    v = 2**24
    rng = np.random.default_rng(0)
    for ids in ([0, 1, v - 1], [v - 3, v - 2, v - 1], np.unique(rng.integers(0, v, 500)), 2 ** np.arange(24)):
        head = np.asarray(ids, np.int32)[None]
        logprobs = np.full(head.shape, -np.log(head.shape[1] + 1), np.float32)
        targets = Targets.of_heads(head, logprobs, logprobs[:, -1], np.array([-np.log(head.shape[1] + 1)], np.float32))
        coded(LogitRow(TokenRow(0, "train", np.array([v - 1, head[0, -1]], np.int32)), targets), v)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"head_logprobs_N": np.nan}, "nan: the labels are no distribution"),
        ({"head_logprobs_N": 0.5}, "0.5: the labels are no distribution"),
        ({"next_logprob_P": np.nan}, "nan: the labels are no distribution"),
        ({"tail_logmass_P": np.inf}, "inf: the labels are no distribution"),
        ({"tail_logmass_P": np.log(0.5)}, "sum to 1 ±"),
        ({"log_partition_PS": np.nan}, "log-partition is NaN"),
        ({"head_ids_N": V}, "outside the vocabulary of 64"),
        ({"head_ids_N": -1}, "outside the vocabulary of 64"),
        ({"head_ids_N": 5}, "an id twice"),
    ],
)
def test_what_is_no_distribution_is_refused(change: dict[str, float], reason: str) -> None:
    row = make_row(np.random.default_rng(1), 9, 8)
    ((name, value),) = change.items()
    array = getattr(row.targets, name).copy()
    array.reshape(-1)[:2] = value
    with pytest.raises(StoreError, match=reason):
        encode_logits(
            [row._replace(targets=row.targets._replace(**{name: array}))], Layout(V, True, False, 1), LOSSY, {}, {}
        )


def test_a_tighter_bound_costs_bytes_and_is_kept() -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 200, 32, 300, temperatures=0) for _ in range(10)]
    layout = Layout(300, True)
    sizes = []
    for max_kl in (1e-2, 1e-4, 1e-6):
        encoded = encode_logits(rows, layout, CodecConfig(max_kl=max_kl), {}, {})
        assert max_kl / 20 < encoded.facts["mean_kl"] <= max_kl
        sizes.append(len(encoded.data))
    assert sizes == sorted(sizes)
    encoded = encode_logits(rows, layout, CodecConfig(max_error=0.02), {}, {})
    assert encoded.facts["max_error"] <= 0.02


def test_log_probs_beyond_the_lossy_codec_name_the_remedy() -> None:
    logprobs_PV = np.array([[0.0, -5000.0, -6000.0]])
    with pytest.raises(StoreError, match=r"-6001 is beyond.*codec.kind=exact"):
        coded(row_of(logprobs_PV, [0, 0], 3), 3)
    assert coded(row_of(logprobs_PV, [0, 0], 3), 3, EXACT)["max_error"] == 0


def test_equal_labels_give_equal_bytes() -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 30, 8, temperatures=0) for _ in range(4)]
    shuffled = []
    for row in rows:  # the order of a head's entries is not part of the labels
        ids_PK, logprobs_PK = row.targets.padded_heads(8)
        order = rng.permutation(8)
        shuffled.append(
            row._replace(
                targets=row.targets._replace(
                    head_ids_N=ids_PK[:, order].reshape(-1), head_logprobs_N=logprobs_PK[:, order].reshape(-1)
                )
            )
        )
    layout = Layout(V, True)
    assert encode_logits(rows, layout, LOSSY, {}, {}) == encode_logits(shuffled, layout, LOSSY, {}, {})


def test_token_stores_carry_masks_and_columns(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, n, 1, masked=True, columns={"n": n, "even": n % 2 == 0}).tokens for n in (5, 1, 0, 700, 3)]
    store = write_tokens(str(tmp_path / "t"), [rows[:2], [], rows[2:]], columns={"n": "int64", "even": "bool"})
    for i, row in enumerate(rows):
        assert dict(store[i].columns) == dict(row.columns)
        np.testing.assert_array_equal(store[i].input_ids_T, row.input_ids_T)
        mask = store[i].loss_mask_P
        np.testing.assert_array_equal(np.ones_like(row.loss_mask_P) if mask is None else mask, row.loss_mask_P)


def test_labels_that_do_not_quite_sum_to_one_are_measured_by_their_rounding() -> None:
    """bfloat16 engines are off by 1e-3: neither refused, nor hiding what rounding costs."""
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 100, 16, 300, temperatures=0) for _ in range(6)]
    plain = encode_logits(rows, Layout(300, True), LOSSY, {}, {}).facts
    assert plain["sum_error"] < 1e-5
    for off in (-4e-3, 1e-3):
        shifted = []
        for row in rows:
            targets = row.targets
            changed = {name: getattr(targets, name) + np.float32(off) for name in ("head_logprobs_N", "next_logprob_P")}
            shifted.append(row._replace(targets=targets._replace(**changed)))
        facts = encode_logits(shifted, Layout(300, True), LOSSY, {}, {}).facts
        assert facts["mean_kl"] == pytest.approx(plain["mean_kl"], rel=0.3)
        assert facts["sum_error"] == pytest.approx(abs(off), rel=0.05)
    with pytest.raises(StoreError, match=r"when read: set store.codec.max_error higher"):
        encode_logits(shifted, Layout(300, True), CodecConfig(max_error=0.004, max_kl=1e-7), {}, {})


@pytest.mark.parametrize("lengths", [(6, 4), (6, 6), (4,)])
def test_a_mask_of_another_length_is_refused(lengths: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 6, 2, temperatures=0) for _ in lengths]
    masked = [
        row._replace(tokens=row.tokens._replace(loss_mask_P=np.ones(n, bool)))
        for row, n in zip(rows, lengths, strict=True)
    ]
    with pytest.raises(StoreError, match=r"a row of 6 tokens has a loss mask of \d"):
        encode_logits(masked, Layout(V, True), LOSSY, {}, {})
    with pytest.raises(StoreError, match=r"a row of 6 tokens has a loss mask of \d"):
        encode_tokens([row.tokens for row in masked], Layout(V, False), {}, {})


def test_labels_of_another_row_are_refused() -> None:
    rng = np.random.default_rng(0)
    long, short = (make_row(rng, n, V, temperatures=0) for n in (8, 4))
    six = [make_row(rng, 6, V, temperatures=0) for _ in range(2)]
    swapped = [six[0]._replace(targets=long.targets), six[1]._replace(targets=short.targets)]  # as many in all
    with pytest.raises(StoreError, match="labels and tokens do not belong together"):
        encode_logits(swapped, Layout(V, True), LOSSY, {}, {})


def test_wider_numbers_are_narrowed_and_never_wrapped() -> None:
    row = make_row(np.random.default_rng(0), 9, 4, temperatures=0)
    targets, ids = row.targets, row.tokens.input_ids_T
    wide = row._replace(
        tokens=row.tokens._replace(input_ids_T=ids.astype(np.int64)),
        targets=targets._replace(
            head_ids_N=targets.head_ids_N.astype(np.int64), next_logprob_P=targets.next_logprob_P.astype(np.float64)
        ),
    )
    layout = Layout(V, True)
    assert encode_logits([wide], layout, LOSSY, {}, {}).data == encode_logits([row], layout, LOSSY, {}, {}).data
    for changed in (
        wide._replace(tokens=wide.tokens._replace(input_ids_T=wide.tokens.input_ids_T + 2**32)),
        wide._replace(targets=wide.targets._replace(head_ids_N=wide.targets.head_ids_N + 2**32)),
    ):
        with pytest.raises(StoreError, match="outside the vocabulary"):
            encode_logits([changed], layout, LOSSY, {}, {})


def test_metadata_that_the_store_does_not_know_is_refused() -> None:
    rng = np.random.default_rng(0)
    for columns, reason in (({"ulr": "x"}, r"carries \['ulr'\]"), ({"url": 5}, "not of its type")):
        row = make_row(rng, 6, 2, temperatures=0, columns=columns)
        with pytest.raises(StoreError, match=reason):
            encode_logits([row], Layout(V, True), LOSSY, {"url": "string"}, {})


def test_rows_that_were_read_cannot_be_changed(tmp_path: Path) -> None:
    store = write_store(str(tmp_path / "store"), [[make_row(np.random.default_rng(0), 9, 4)]])
    with pytest.raises(ValueError, match="read-only"):
        store[0].targets.head_logprobs_N[:] = 0
