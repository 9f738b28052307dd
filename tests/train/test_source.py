"""Several stores as one: teachers of the same rows, texts in proportion to their weights."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from logit_store import LogitRow, LogitStore
from logit_store.encode import text_sha256
from logit_store.errors import ConfigError, IdentityError, StoreError
from logit_store.identity import text_id
from tests.store.made import TOKENIZER, V, make_row, targets_of, write_store, write_tokens
from tests.students import student_config
from training.config import DataConfig, LossConfig, TrainConfig
from training.curriculum.batches import Prefix
from training.data.micro_batch import MicroBatch, collate
from training.data.source import Source, mixed_order, open_source, row_shares
from training.run_folder import RunFolder
from training.students.student import Student
from training.watching.evaluation import figures, held_out_prefixes, kl_measure, tally, teacher_figures

K = 8


def make_rows(seed: int, num_rows: int = 12, length: int = 20) -> list[LogitRow]:
    rng = np.random.default_rng(seed)
    rows = [make_row(rng, length - i % 4, K) for i in range(num_rows)]
    return [
        LogitRow(r.tokens._replace(split="held_out" if i % 4 == 3 else "train"), r.targets) for i, r in enumerate(rows)
    ]


def relabelled(rows: list[LogitRow], seed: int) -> list[LogitRow]:
    """The same rows from another teacher."""
    rng = np.random.default_rng(seed)
    found = []
    for tokens, _ in rows:
        scores_PV = rng.normal(size=(len(tokens.input_ids_T) - 1, V)) * 3
        logprobs_PV = scores_PV - np.logaddexp.reduce(scores_PV, axis=1, keepdims=True)
        counts = [K] * len(scores_PV)
        found.append(LogitRow(tokens, targets_of(logprobs_PV, tokens.input_ids_T, counts, rng, temperatures=1)))
    return found


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LogitStore]:
    """a and b: two teachers of one text; c: longer rows of another text."""
    folder, rows = tmp_path_factory.mktemp("stores"), make_rows(0)
    return {
        "a": write_store(str(folder / "a"), [rows[:5], rows[5:]]),
        "b": write_store(str(folder / "b"), [(other := relabelled(rows, 5))[:5], other[5:]]),
        "c": write_store(str(folder / "c"), [make_rows(2, 20, 30)]),
    }


def data(kind: str, stores: dict[str, LogitStore], **weights: float) -> DataConfig:
    entries = [{"store": stores[name].storage.url, "weight": weight} for name, weight in weights.items()]
    return DataConfig.model_validate({kind: entries})


def tiny_student(loss: LossConfig) -> Student:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=V, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    return Student(model.double(), V, loss)


def test_two_teachers_are_the_weighted_mean_of_their_losses(stores: dict[str, LogitStore]) -> None:
    both = open_source(data("teachers", stores, a=3.0, b=1.0))
    assert len(both) == len(stores["a"])
    prefixes = [Prefix(0, 15), Prefix(7, 9)]
    student = tiny_student(LossConfig(alpha=0.7, chunk_positions=5))
    sums = student(collate(both, prefixes))
    a, b = (student(collate(Source.of(stores[name]), prefixes)) for name in ("a", "b"))
    for found, of_a, of_b in zip(sums, a, b, strict=True):
        torch.testing.assert_close(found, 0.75 * of_a + 0.25 * of_b, rtol=1e-12, atol=0)
    torch.testing.assert_close(sums.ce, a.ce, rtol=1e-12, atol=0)
    assert float(a.kd.detach()) != pytest.approx(float(b.kd.detach()), rel=1e-3)
    kept = collate(both, prefixes).kept_mass()
    of_each = [collate(Source.of(stores[name]), prefixes).kept_mass() for name in ("a", "b")]
    assert kept == pytest.approx(0.75 * of_each[0] + 0.25 * of_each[1])


@torch.no_grad()
def test_held_out_figures_of_two_teachers_are_weighted_means(stores: dict[str, LogitStore]) -> None:
    both = open_source(data("teachers", stores, a=3.0, b=1.0))
    student = tiny_student(LossConfig(alpha=0.7)).eval()
    student.measure = kl_measure(both)
    prefixes = held_out_prefixes(both, None)
    together, a, b = (
        figures(tally(batch, student(batch)).numpy())
        for batch in (collate(source, prefixes) for source in (both, Source.of(stores["a"]), Source.of(stores["b"])))
    )
    for name in ("kl", "agreement", "loss", "calibration_error"):
        assert together[name] == pytest.approx(0.75 * a[name] + 0.25 * b[name], rel=1e-6), name
    own = [teacher_figures(Source.of(stores[name]), prefixes)["loss"] for name in ("a", "b")]
    assert teacher_figures(both, prefixes)["loss"] == pytest.approx(0.75 * own[0] + 0.25 * own[1])


def test_a_row_that_one_teacher_left_out_is_no_row_of_both(stores: dict[str, LogitStore]) -> None:
    both = open_source(data("teachers", stores, a=1.0, b=1.0))
    all_of_them = both.rows("train")
    both.texts[0].stores[1].__dict__["left_out"] = {int(all_of_them[2]): "too hard"}
    assert both.rows("train").tolist() == np.delete(all_of_them, 2).tolist()


def test_a_mixture_is_one_store_of_all_rows(stores: dict[str, LogitStore]) -> None:
    mixture = open_source(data("mixture", stores, a=1.0, c=2.0))
    assert len(mixture) == 12 + 20
    assert mixture.lengths_N.tolist() == [*stores["a"].lengths_N, *stores["c"].lengths_N]
    assert mixture.rows("train").tolist() == [*stores["a"].rows("train"), *(12 + stores["c"].rows("train"))]
    for row, store, own in ((11, "a", 11), (12, "c", 0), (31, "c", 19)):
        assert (mixture[row].tokens.input_ids_T == stores[store][own].tokens.input_ids_T).all()
        assert (mixture[row].labels[0].head_ids_N == stores[store][own].targets.head_ids_N).all()
        assert (mixture.tokens(row).input_ids_T == stores[store][own].tokens.input_ids_T).all()
    with pytest.raises(IndexError, match="row 32 of 32 rows"):
        mixture[32]
    assert [prefix.row for prefix in held_out_prefixes(mixture, 2)] == [3, 7, 12 + 3, 12 + 7]  # two of each text
    batch = collate(mixture, [Prefix(0, 5), Prefix(12, 5)])
    alone = collate(Source.of(stores["c"]), [Prefix(0, 5)])
    for column, of_c in zip(batch.targets[0].targets, alone.targets[0].targets, strict=True):
        assert torch.equal(column[5:], of_c)


mixtures = st.lists(st.tuples(st.integers(3, 40), st.floats(0.3, 5.0)), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60)
@given(mixtures, st.integers(0, 5))
def test_each_text_is_spent_whole_before_any_of_it_comes_again(texts: list[tuple[int, float]], seed: int) -> None:
    sizes, weights = [size for size, _ in texts], [weight for _, weight in texts]
    text_N = np.repeat(np.arange(len(sizes)), sizes)
    positions_N = 10 + np.arange(len(text_N)) % 7
    try:
        shares = row_shares(text_N, positions_N, weights)
    except ConfigError:
        return
    epochs = [mixed_order(seed, epoch, text_N, positions_N, weights) for epoch in range(5)]
    taken = np.concatenate(epochs)
    assert all(len(order) == len(text_N) for order in epochs)
    assert (mixed_order(seed, 3, text_N, positions_N, weights) == epochs[3]).all()  # of any epoch, without the others
    for text, size in enumerate(sizes):
        own = taken[text_N[taken] == text]
        assert abs(len(own) - shares[text] * len(taken)) <= 1  # the weights hold to a row, however many epochs
        for start in range(0, len(own) - size + 1, size):
            assert len(set(own[start : start + size].tolist())) == size


def test_weights_are_shares_of_positions_in_every_stretch() -> None:
    text_N = np.repeat([0, 1, 2], [400, 300, 300])
    positions_N = np.where(text_N == 0, 100, 25)  # rows of the first are four times as long
    order = mixed_order(0, 0, text_N, positions_N, [2.0, 1.0, 1.0])
    for stretch in np.split(order, 10):
        shares = np.bincount(text_N[stretch], positions_N[stretch], 3) / positions_N[stretch].sum()
        assert shares == pytest.approx([0.5, 0.25, 0.25], abs=0.04)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "give one of `store`.* and none of them is there"),
        ({"store": "x", "mixture": [{"store": "y"}]}, "not store and mixture at once"),
        ({"mixture": []}, "at least 1 item"),
        ({"teachers": [{"store": "x", "weight": 0.0}]}, "greater than 0"),
        ({"mixture": [{"store": "x", "weight": float("inf")}]}, "finite number"),
    ],
)
def test_data_has_one_origin_with_weights(raw: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate(raw)


def test_stores_that_do_not_go_together_are_refused(stores: dict[str, LogitStore], tmp_path: Path) -> None:
    with pytest.raises(IdentityError, match=r"are of different text.*go under data.mixture"):
        open_source(data("teachers", stores, a=1.0, c=1.0))
    rows = make_rows(3)
    tokens = write_tokens(str(tmp_path / "tokens"), [[row.tokens for row in rows]])
    with pytest.raises(StoreError, match=r"data\.teachers takes logit stores"):
        open_source(DataConfig.model_validate({"teachers": [{"store": tokens.storage.url}]}))
    with pytest.raises(StoreError, match="give stores of one kind"):
        open_source(
            DataConfig.model_validate({"mixture": [{"store": stores["a"].storage.url}, {"store": tokens.storage.url}]})
        )
    names = {"vocabulary_sha256": "w" * 64}
    text = text_id(names["vocabulary_sha256"], [text_sha256([row.tokens for row in rows])])
    other = write_store(str(tmp_path / "other"), [rows], tokenizer=TOKENIZER | names, text_id=text)
    with pytest.raises(IdentityError, match="give different ids to tokens"):
        open_source(data("mixture", {**stores, "d": other}, a=1.0, d=1.0))
    mixture = open_source(data("mixture", stores, a=1e-3, c=1.0))
    train = mixture.rows("train")
    positions_N = mixture.lengths_N[train].astype(np.int64) - 1
    with pytest.raises(ConfigError, match=r"store 1 of data.mixture gets 0\.\d+ of 24 rows per epoch"):
        mixture.check_shares(train, positions_N)
    with pytest.raises(ConfigError, match=r"store 1 of data.mixture has no rows to train on"):
        mixture.check_shares(train[train >= 12], positions_N[train >= 12])


def test_identity_tells_apart_what_decides_the_numbers(stores: dict[str, LogitStore]) -> None:
    single = Source.of(stores["a"]).identity()
    assert single["labels_id"] == stores["a"].manifest["labels_id"]
    kinds: list[Callable[[], Source]] = [
        lambda: open_source(data("teachers", stores, a=1.0, b=1.0)),
        lambda: open_source(data("teachers", stores, a=1.0, b=3.0)),
        lambda: open_source(data("mixture", stores, a=1.0, c=1.0)),
        lambda: open_source(data("mixture", stores, a=2.0, c=1.0)),
    ]
    labels = {source().identity()["labels_id"] for source in kinds}
    assert len(labels) == 4
    assert open_source(data("teachers", stores, b=2.0, a=2.0)).identity()["text_id"] == single["text_id"]


def test_a_run_does_not_go_on_with_other_rows_left_out(stores: dict[str, LogitStore], tmp_path: Path) -> None:
    """They decide the order of all: the labels that are there are the same, and so is their id."""

    def identity(*left_out: int) -> dict[str, Any]:
        store = LogitStore.open(stores["a"].storage.url)
        store.__dict__["left_out"] = dict.fromkeys(left_out, "killed its worker")
        return Source.of(store).identity()

    config = TrainConfig.model_validate(student_config(tmp_path / "run", stores["a"].storage.url))
    run = RunFolder(config.run.path)
    run.begin(config, identity(5, 2))
    run.check(config, identity(2, 5))
    for others in ((2,), (2, 6), ()):
        with pytest.raises(IdentityError, match=r"belongs to another run: identity.left_out"):
            run.check(config, identity(*others))
    assert "left_out" not in Source.of(stores["a"]).identity()  # as runs have noted it that began before


def test_no_prefixes_give_a_micro_batch_without_loss(stores: dict[str, LogitStore]) -> None:
    batch: MicroBatch = collate(open_source(data("teachers", stores, a=1.0, b=1.0)), [])
    assert tiny_student(LossConfig())(batch).loss.item() == 0.0
