"""Held-out figures, of all rows and by length: loss, perplexity, KL to the teacher, agreement, calibration."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logit_store import LogitStore
from logit_store.errors import DecantError
from training.curriculum.batches import Prefix
from training.data.micro_batch import MicroBatch, collate, rank_batches
from training.data.source import Source
from training.engine import raise_together
from training.losses import Objective, SparseTargets
from training.losses.check import drawn_temperature
from training.students.student import Predictions

NUM_BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv 1706.04599)."""
NUM_BUCKETS = 32
"""Rows are told apart by length: bucket b holds those of 2^(b−1) + 1 to 2^b positions."""
Figures = dict[str, Any]
"""Numbers by name, and under ``by_length`` the same again for each bucket (`"33-64"`) that has rows."""


def kl_measure(source: Source) -> Objective | None:
    """How the held-out KL of all runs on these stores is measured, whatever their own losses are.

    By heads, at T = 1: all else is one bucket (``ghost``), so that what comes out is at most the KL of the whole
    distributions, by the data processing inequality, and an empty head is all bucket. Without heads by draws, at the T
    that they serve. None where the stores have neither in common. One answer for all rows: no figure may depend on
    which of them share a micro-batch.
    """
    stores = [store for store in source.stores if isinstance(store, LogitStore)]
    measure = Objective(int(source.manifest["vocabulary_size"]), stored=tuple(source.temperatures))
    if len(stores) < len(source.stores):
        return None
    if all(store.shards.total("entries") for store in stores):
        return measure
    drawn = {drawn_temperature(store) for store in stores if store.shards.total("draws")}
    is_drawn = len(drawn) == 1 and all(store.shards.total("draws") for store in stores)
    return measure._replace(tail="sampled", temperature=drawn.pop()) if is_drawn else None


def held_out_prefixes(source: Source, max_rows: int | None) -> list[Prefix]:
    """The first ``max_rows`` held-out rows of each text that have a position, each whole."""
    rows, lengths_N = source.rows("held_out"), source.lengths_N
    rows = rows[lengths_N[rows] > 1]
    of_texts = np.split(rows, np.searchsorted(rows, source.starts[1:-1]))
    return [Prefix(row, int(lengths_N[row]) - 1) for text in of_texts for row in text[:max_rows].tolist()]


def carry_loss(source: Source, prefixes: Sequence[Prefix]) -> bool:
    """Whether any position carries loss: figures are means over these. Reads rows with masks alone, up to the first."""
    return any(
        not source.may_be_masked(prefix.row) or source.tokens(prefix.row).carries_loss_P[: prefix.positions].any()
        for prefix in prefixes
    )


def evaluate(engine: Any, source: Source, prefixes: Sequence[Prefix], micro_batch_tokens: int, rank: int) -> Figures:
    """Figures of the engine's student over ``prefixes``; every rank calls this and gets the same.

    Raises AgreedError, on every rank after all of the passes: some rank cannot read its rows.
    """
    longest = max(prefix.positions for prefix in prefixes)  # what the student's context was checked for
    errors: list[DecantError] = []
    batches = rank_batches(source, prefixes, engine.world_size, rank, micro_batch_tokens, longest, errors)
    total = engine.predict(batches, tally)
    raise_together(errors[0] if errors else None)
    return figures(total.cpu().numpy())


def teacher_figures(source: Source, prefixes: Sequence[Prefix]) -> Figures:
    """The teachers' own figures on the same rows, from their stored labels; of several, the weighted mean."""
    total = np.zeros((NUM_BUCKETS, NUM_COLUMNS))
    for prefix in prefixes:
        batch = collate(source, [prefix])
        for weight, targets in batch.targets:
            top_N, top_logprob_N = top_of_heads(targets)
            none_N = torch.zeros_like(top_logprob_N)
            own = Predictions(-targets.next_logprob_N, none_N, top_N, top_logprob_N.exp())
            total += weight * tally(batch, own).numpy()
    found = figures(total)
    if not all(store.manifest["k"] for store in source.stores):  # draws do not tell what is most probable
        for part in (found, *found["by_length"].values()):
            part |= dict.fromkeys(("accuracy", "calibration_error", "agreement"), math.nan)
    return found


def tally(batch: MicroBatch, predictions: Predictions) -> Tensor:
    """Sums of a micro-batch by bucket, [NUM_BUCKETS, NUM_COLUMNS] float64.

    Columns: positions, loss, KL, agreements, weight of the labels with a head to agree with; then count, confidence
    and hits of each confidence bin.
    """
    confidence_N = predictions.top_probability_N.double()
    hit_N = (predictions.top_id_N == batch.next_ids_N).double()
    agree_N, has_head_N = torch.zeros_like(hit_N), torch.zeros_like(hit_N)
    for weight, targets in batch.targets:
        top_N, _ = top_of_heads(targets)
        has_head_N += weight * (top_N >= 0)
        agree_N += weight * ((top_N >= 0) & (predictions.top_id_N == top_N))
    one_N = torch.ones_like(hit_N)
    bin_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    in_bin_NB = torch.nn.functional.one_hot(bin_N, NUM_BINS).double()
    by_bin = [in_bin_NB * values_N[:, None] for values_N in (one_N, confidence_N, hit_N)]
    plain = [v[:, None] for v in (one_N, predictions.ce_N.double(), predictions.kl_N.double(), agree_N, has_head_N)]
    sums = torch.zeros(NUM_BUCKETS, NUM_COLUMNS, dtype=torch.float64, device=hit_N.device)
    return sums.index_add(0, _bucket_N(batch), torch.cat([*plain, *by_bin], 1))


NUM_COLUMNS = 5 + 3 * NUM_BINS


def _bucket_N(batch: MicroBatch) -> Tensor:
    """The bucket of each valid position's row: the bits of its length less one."""
    bits_B = torch.frexp((batch.lengths_B - 1).double())[1].long()
    return bits_B.index_select(0, batch.valid_N // batch.input_ids_BL.shape[1])


def top_of_heads(targets: SparseTargets) -> tuple[Tensor, Tensor]:
    """The most probable id of each head and its log-prob, −1 and −inf of an empty one; ties go to the lower id."""
    ids_NK = torch.where(targets.head_logprobs_NK > -torch.inf, targets.head_ids_NK, -1)
    if not ids_NK.shape[1]:
        return torch.full_like(targets.next_logprob_N, -1).long(), torch.full_like(targets.next_logprob_N, -torch.inf)
    top_N1 = targets.head_logprobs_NK.argmax(-1, keepdim=True)
    return ids_NK.gather(-1, top_N1)[:, 0], targets.head_logprobs_NK.gather(-1, top_N1)[:, 0]


def figures(total: np.ndarray) -> Figures:
    """Figures from summed tallies. ``kl`` is NaN without a teacher, ``agreement`` where no head has an entry."""
    by_length = {_span(b): _figures(sums) for b, sums in enumerate(total) if sums[0] > 0}
    return {**_figures(total.sum(0)), "by_length": by_length}


def _figures(sums: np.ndarray) -> dict[str, float]:
    positions, loss, kl, agreements, heads = sums[:5].tolist()
    count, confidence, hits = sums[5:].reshape(3, NUM_BINS)
    return {
        "positions": positions,
        "loss": loss / positions,
        "perplexity": float(np.exp(loss / positions)),
        "kl": kl / positions,
        "accuracy": float(hits.sum() / count.sum()),
        "calibration_error": float(np.abs(hits - confidence).sum() / count.sum()),
        "agreement": agreements / heads if heads else math.nan,
    }


def _span(bucket: int) -> str:
    first, last = 2**bucket // 2 + 1, 2**bucket
    return str(last) if first >= last else f"{first}-{last}"
