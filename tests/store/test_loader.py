"""Batches: padded as they should be, in one global order for any ranks and workers, resumed at any step."""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from logit_store import LogitStore
from logit_store.batch import Batch, Shape, pad, pinned, shape_of
from logit_store.loader import Loader
from logit_store.order import Order
from tests.store.made import make_row, write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> LogitStore:
    rng = np.random.default_rng(0)
    rows = [
        make_row(rng, int(n), rng.integers(0, 9, n).tolist(), forced_ids=[3], max_draws=4, masked=True)
        for n in rng.integers(1, 30, 40)
    ]
    return write_store(str(tmp_path_factory.mktemp("loader") / "store"), [rows[:17], rows[17:]], forced_ids=[3])


@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 3))
def test_each_epoch_has_every_row_once(num_rows: int, seed: int, epoch: int) -> None:
    order = Order(num_rows, seed)
    places = order.places(epoch * num_rows, (epoch + 1) * num_rows)
    assert sorted(places.tolist()) == list(range(num_rows))


def test_an_order_is_random_and_can_be_read_anywhere() -> None:
    order = Order(1000, 7)
    whole = order.places(0, 3000)
    np.testing.assert_array_equal(np.concatenate([order.places(i, i + 7) for i in range(0, 2100, 7)]), whole[:2100])
    assert (whole[:1000] != whole[1000:2000]).mean() > 0.98
    assert abs(np.corrcoef(np.arange(1000), whole[:1000])[0, 1]) < 0.1
    firsts = np.bincount([int(Order(10, seed).places(0, 1)[0]) for seed in range(3000)], minlength=10)
    assert ((firsts - 300) ** 2 / 300).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001


def test_billions_of_rows_need_no_memory() -> None:
    places = Order(10**10, 1).places(5 * 10**9, 5 * 10**9 + 1000)
    assert len(set(places.tolist())) == 1000
    assert places.max() < 10**10


def test_a_batch_holds_its_rows(store: LogitStore) -> None:
    rows = store.read(range(10))
    batch = pad(rows)
    assert batch.shape == shape_of(rows)
    for i, (tokens, targets) in enumerate(rows):
        t, p = len(tokens.input_ids_T), len(targets.next_logprob_P)
        assert batch.lengths_B[i] == t
        np.testing.assert_array_equal(batch.input_ids_BT[i, :t], tokens.input_ids_T)
        np.testing.assert_array_equal(batch.next_logprob_BP[i, :p], targets.next_logprob_P)
        ends = np.cumsum(targets.head_counts_P)
        for position, (end, count) in enumerate(zip(ends, targets.head_counts_P, strict=True)):
            ids, logprobs = batch.head_ids_BPK[i, position], batch.head_logprobs_BPK[i, position]
            np.testing.assert_array_equal(ids[:count], targets.head_ids_N[end - count : end])
            np.testing.assert_array_equal(logprobs[:count], targets.head_logprobs_N[end - count : end])
            assert (logprobs[count:] == -np.inf).all()
        draws = [
            d for row, n in zip(batch.sampled_ids_BPM[i], batch.sampled_counts_BP[i], strict=True) for d in row[:n]
        ]
        assert draws == targets.sampled_ids_M.tolist()
        assert not batch.loss_mask_BP[i, p:].any()
        np.testing.assert_array_equal(batch.loss_mask_BP[i, :p], tokens.carries_loss_P)


@pytest.mark.parametrize("allocate", [np.empty, pinned])
def test_arrays_are_filled_again_without_a_trace(store: LogitStore, allocate: Any) -> None:
    out = Batch.allocate(Shape(16, 64, 16, 1, 1, 8), allocate)
    for start in (0, 10, 20):
        rows = store.read(range(start, start + 10))
        again, fresh = pad(rows, out), pad(rows)
        assert np.shares_memory(again.head_ids_BPK, out.head_ids_BPK)
        for a, b in zip(again, fresh, strict=True):
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match="does not fit"):
        pad(rows, Batch.allocate(Shape(2, 64, 16, 1, 1, 8)))


def test_a_torch_data_loader_in_one_line(store: LogitStore) -> None:
    from torch.utils.data import DataLoader

    batches = list(DataLoader(store, batch_size=8, collate_fn=pad, num_workers=2))
    assert sum(len(batch.lengths_B) for batch in batches) == len(store)
    np.testing.assert_array_equal(batches[1].input_ids_BT, pad(store.read(range(8, 16))).input_ids_BT)
    assert batches[0].to_torch()["head_logprobs"].shape == batches[0].head_logprobs_BPK.shape


def steps(loader: Loader, number: int) -> Iterator[Batch]:
    return islice(iter(loader), number)


def same(a: Batch, b: Batch) -> bool:
    return all(x.shape == y.shape and np.array_equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(("kind", "workers"), [("threads", 1), ("threads", 3), ("processes", 2)])
def test_workers_change_nothing_and_any_step_can_be_resumed(store: LogitStore, kind: Any, workers: int) -> None:
    reference = list(steps(Loader(store, 6, seed=3, workers=1, ahead=1), 12))
    loader = Loader(store, 6, seed=3, workers=workers, kind=kind)
    found = list(steps(loader, 5))
    assert loader.state() == {"step": 5}
    resumed = Loader(store, 6, seed=3, workers=workers, kind=kind)
    resumed.load_state(loader.state())
    found += list(steps(resumed, 7))
    assert all(same(a, b) for a, b in zip(found, reference, strict=True))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 6])
def test_ranks_share_the_global_order(store: LogitStore, num_ranks: int) -> None:
    whole = [Loader(store, 6, seed=3).rows_of(step) for step in range(10)]
    for step in range(10):
        dealt = [Loader(store, 6, seed=3, rank=r, num_ranks=num_ranks).rows_of(step) for r in range(num_ranks)]
        interleaved = [dealt[i % num_ranks][i // num_ranks] for i in range(6)]
        assert interleaved == whole[step].tolist()
    assert set(np.concatenate(whole)) <= set(store.rows("train"))


def test_a_rank_without_rows_is_refused(store: LogitStore) -> None:
    with pytest.raises(ValueError, match="some rank would get none"):
        Loader(store, 2, num_ranks=3)
