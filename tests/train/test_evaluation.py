"""Held-out figures against figures computed densely, row by row."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from logit_store import LogitRow, TokenRow
from logit_store.config import parse_config
from logit_store.errors import StoreError
from tests import toy
from tests.store.made import V, make_row, write_store, write_tokens
from tests.students import student_config
from training.config import LossConfig, TrainConfig
from training.curriculum.batches import Prefix
from training.data.micro_batch import rank_batches
from training.data.source import Source
from training.losses import Objective
from training.prepare import prepare
from training.report import length_rows
from training.students.student import Student
from training.watching.evaluation import (
    NUM_BINS,
    Figures,
    figures,
    held_out_prefixes,
    kl_measure,
    tally,
    teacher_figures,
)

LENGTHS = (2, 3, 9, 17, 18, 30, 33, 4)
SPANS = ["1", "2", "3-4", "5-8", "9-16", "17-32"]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    """Rows of V entries each: the head is the whole distribution, and KL needs no tail."""
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, V) for length in LENGTHS]
    rows = [LogitRow(row.tokens._replace(split="held_out"), row.targets) for row in rows]
    return Source.of(write_store(str(tmp_path_factory.mktemp("evaluation") / "store"), [rows], k=V,
                                 codec={"kind": "exact"}))  # fmt: skip


@pytest.fixture(scope="module")
def student(source: Source) -> Student:
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=V + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    return Student(model, V, LossConfig(alpha=0.5, chunk_positions=7), measure=kl_measure(source)).eval()


def measuring(student: Student, source: Source) -> Student:
    """The same model, as it is measured on another source."""
    return Student(student.model, V, LossConfig(), source.temperatures, measure=kl_measure(source)).eval()


def held_out_store(folder: Path, heads: list[list[int]], max_draws: int = 5, **header: Any) -> Source:
    """Held-out rows with so many entries, and up to ``max_draws`` draws, at each position."""
    rng = np.random.default_rng(2)
    rows = [make_row(rng, len(head) + 1, head, temperatures=0, max_draws=max_draws) for head in heads]
    rows = [LogitRow(row.tokens._replace(split="held_out"), row.targets) for row in rows]
    header = {"temperatures": [], "codec": {"kind": "exact"}, **header}
    return Source.of(write_store(str(folder / "store"), [rows], **header))


@torch.no_grad()
def measured(
    source: Source, student: Student, prefixes: list[Prefix], ranks: int, micro_batch_tokens: int = 40
) -> Figures:
    total = 0
    for rank in range(ranks):
        for batch in rank_batches(source, prefixes, ranks, rank, micro_batch_tokens, 128, []):
            total = total + tally(batch, student(batch)).numpy()
    return figures(total)  # type: ignore[arg-type]


@torch.no_grad()
def dense(source: Source, student: Student, rows: list[int]) -> dict[str, float]:
    """The same figures from whole logits."""
    log_p, log_q, next_ids = [], [], []
    for row in rows:
        tokens, (targets,) = source[row]
        ids = torch.from_numpy(tokens.input_ids_T.astype(np.int64))
        logits = student.model(input_ids=ids[None]).logits[0, :-1, :V].double()
        log_q.append(logits.log_softmax(-1))
        log_p.append(torch.from_numpy(targets.padded_heads(V)[1].copy()).double())  # heads of V are in order of ids
        next_ids.append(ids[1:])
    p, q, ids = torch.cat(log_p), torch.cat(log_q), torch.cat(next_ids)
    loss = torch.nn.functional.nll_loss(q, ids).item()
    confidence, top = q.exp().max(-1)
    error = 0.0
    for low in np.arange(NUM_BINS) / NUM_BINS:
        inside = (confidence >= low) & (confidence < low + 1 / NUM_BINS)
        if inside.any():
            error += abs(float((top == ids)[inside].double().mean() - confidence[inside].mean())) * int(inside.sum())
    return {
        "positions": len(ids),
        "loss": loss,
        "perplexity": np.exp(loss),
        "kl": (p.exp() * (p - q)).sum(-1).mean().item(),
        "accuracy": (top == ids).double().mean().item(),
        "agreement": (top == p.argmax(-1)).double().mean().item(),
        "calibration_error": error / len(ids),
    }


@pytest.mark.parametrize("ranks", [1, 3])
def test_figures_of_all_rows_and_of_each_length(source: Source, student: Student, ranks: int) -> None:
    prefixes = held_out_prefixes(source, None)
    found = measured(source, student, prefixes, ranks)
    by_length = found.pop("by_length")
    assert found == pytest.approx(dense(source, student, list(range(len(LENGTHS)))), rel=1e-4)
    assert list(by_length) == SPANS
    for span, of_span in by_length.items():
        low, high = int(span.split("-")[0]), int(span.split("-")[-1])
        rows = [row for row, length in enumerate(LENGTHS) if low <= length - 1 <= high]
        assert of_span == pytest.approx(dense(source, student, rows), rel=1e-4), span


def test_the_teacher_is_at_no_distance_from_itself(source: Source) -> None:
    found = teacher_figures(source, held_out_prefixes(source, None))
    assert found["kl"] == 0
    assert found["agreement"] == 1
    own = np.concatenate([source[row].labels[0].next_logprob_P for row in range(len(LENGTHS))])
    assert found["loss"] == pytest.approx(-own.mean(), rel=1e-6)
    assert list(found["by_length"]) == SPANS


def test_without_a_teacher_there_is_no_distance_to_it(student: Student, tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    rows = [make_row(rng, 9, 8).tokens._replace(split="held_out") for _ in range(3)]
    tokens = Source.of(write_tokens(str(tmp_path / "tokens"), [rows]))
    found = measured(tokens, measuring(student, tokens), held_out_prefixes(tokens, 2), 1)
    assert np.isnan(found["kl"])
    assert np.isnan(found["agreement"])
    assert found["positions"] == 16
    assert found["loss"] > 0


@pytest.mark.parametrize(("ranks", "micro_batch_tokens"), [(1, 1), (3, 40)])
def test_figures_do_not_depend_on_which_rows_share_a_micro_batch_of_empty_heads(
    student: Student, tmp_path: Path, ranks: int, micro_batch_tokens: int
) -> None:
    source = held_out_store(tmp_path, [[0] * 8, [3] * 8, [0, 2, 0], [0] * 20, [0], [1] * 4])
    other, prefixes = measuring(student, source), held_out_prefixes(source, None)
    apart = measured(source, other, prefixes, ranks, micro_batch_tokens)
    together = measured(source, other, prefixes, 1, 999)
    spans = apart.pop("by_length"), together.pop("by_length")
    assert apart == pytest.approx(together, rel=1e-5)
    for span, of_span in spans[0].items():
        assert of_span == pytest.approx(spans[1][span], rel=1e-5, nan_ok=True), span
        assert math.isfinite(of_span["kl"])
    assert math.isnan(spans[0]["1"]["agreement"])  # nothing tells what is most probable


def test_agreement_is_over_the_positions_that_have_a_head(student: Student, tmp_path: Path) -> None:
    source = held_out_store(tmp_path, [[2, 0, 0, 3], [0] * 6])
    prefixes = held_out_prefixes(source, None)
    heads_only = [Prefix(0, 1)]
    assert measured(source, student, heads_only, 1)["agreement"] in (0.0, 1.0)
    assert teacher_figures(source, prefixes)["agreement"] == 1.0


def test_draws_alone_tell_no_agreement(student: Student, tmp_path: Path) -> None:
    source = held_out_store(tmp_path, [[0] * 8, [0] * 3], k=0)
    prefixes = held_out_prefixes(source, None)
    of_student, of_teacher = (
        measured(source, measuring(student, source), prefixes, 1),
        teacher_figures(source, prefixes),
    )
    for found in (of_student, of_teacher):
        for part in (found, *found["by_length"].values()):
            assert math.isnan(part["agreement"])
    assert all(math.isnan(part["accuracy"]) for part in (of_teacher, *of_teacher["by_length"].values()))


@torch.no_grad()
def test_kl_by_draws_is_at_their_temperature_and_not_scaled_by_it(student: Student, tmp_path: Path) -> None:
    row = make_row(np.random.default_rng(6), 12, V, temperatures=0)  # of peaked distributions
    log_p_PV = torch.from_numpy(row.targets.padded_heads(V)[1].copy()).double()
    partition_PS = (log_p_PV / 2).logsumexp(-1, keepdim=True).float().numpy()
    held_out = LogitRow(row.tokens._replace(split="held_out"), row.targets._replace(log_partition_PS=partition_PS))
    source = Source.of(write_store(str(tmp_path / "store"), [[held_out]], k=V, codec={"kind": "exact"}))
    by_draws = Objective(V, tail="sampled", temperature=2.0, stored=(2.0,))
    other = Student(student.model, V, LossConfig(), source.temperatures, measure=by_draws).eval()
    ids_T = torch.from_numpy(row.tokens.input_ids_T.astype(np.int64))
    log_q_PV = (student.model(input_ids=ids_T[None]).logits[0, :-1, :V].double() / 2).log_softmax(-1)
    log_p_PV = (log_p_PV / 2).log_softmax(-1)
    expected = (log_p_PV.exp() * (log_p_PV - log_q_PV)).sum(-1).mean().item()
    assert measured(source, other, held_out_prefixes(source, None), 1)["kl"] == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    ("entries", "draws", "expected"),
    [(3, 5, ("ghost", 1.0)), (3, 0, ("ghost", 1.0)), (0, 5, ("sampled", 1.0)), (0, 0, None)],
)
def test_kl_is_measured_by_heads_or_by_draws(
    student: Student, tmp_path: Path, entries: int, draws: int, expected: tuple[str, float] | None
) -> None:
    """Not by the run's own tail: `ground_truth` is no distribution of the teacher's."""
    source = held_out_store(tmp_path, [[entries] * 8, [entries] * 20], max_draws=draws)
    measure = kl_measure(source)
    assert (measure and (measure.tail, measure.temperature)) == expected
    found = measured(source, measuring(student, source), held_out_prefixes(source, None), 1)
    assert math.isfinite(found["kl"]) == (expected is not None)


def test_held_out_rows_without_loss_are_refused_before_a_model_is_loaded(tmp_path: Path, tokenizer: Path) -> None:
    ids_T = np.arange(30, dtype=np.int32)
    masks = {"silent": [np.zeros(29, bool)] * 2, "late": [np.zeros(29, bool), np.arange(29) == 28]}
    for name, masks_of_rows in masks.items():
        rows = [TokenRow(number, "train", ids_T) for number in range(4)]
        rows += [TokenRow(4 + number, "held_out", ids_T, mask) for number, mask in enumerate(masks_of_rows)]
        toy.write_tokens(str(tmp_path / name), tokenizer, [rows], num_shards=1)
        raw = student_config(tmp_path / "run", str(tmp_path / name), curriculum=None, loss={"alpha": 0.0})
        config = parse_config(TrainConfig, raw, "test")
        if name == "late":
            assert len(prepare(config).held_out) == 2
            continue
        with pytest.raises(StoreError, match="no position of the 2 held-out rows carries loss"):
            prepare(config)


def test_a_figure_that_some_lengths_lack_has_empty_cells_in_the_report(student: Student, tmp_path: Path) -> None:
    source = held_out_store(tmp_path, [[0], [3, 2]])
    found = measured(source, student, held_out_prefixes(source, None), 1)
    header, rows = length_rows([], found)
    assert header == ["model", "figure", "1", "2"]
    (agreement,) = [row[2:] for row in rows if row[1] == "agreement"]
    assert agreement[0] == ""
    assert agreement[1].endswith("%")
