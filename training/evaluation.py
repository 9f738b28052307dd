"""Held-out figures: loss, perplexity, calibration, agreement with the teacher; the teacher's own from its labels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logit_store import LogitStore, TokenStore
from training.batches import Prefix
from training.data import MicroBatch, rank_batches
from training.student import Predictions

NUM_BINS = 15
"""Equal-width confidence bins of the calibration error (Guo et al. 2017, arXiv 1706.04599)."""


def held_out_prefixes(store: LogitStore | TokenStore, max_rows: int | None) -> list[Prefix]:
    """The first ``max_rows`` held-out rows that have a position, each whole."""
    rows = [int(row) for row in store.rows("held_out") if store.lengths_N[row] > 1]
    return [Prefix(row, int(store.lengths_N[row]) - 1) for row in rows[:max_rows]]


def evaluate(engine: Any, store: LogitStore | TokenStore, prefixes: Sequence[Prefix], micro_batch_tokens: int,
             rank: int) -> dict[str, float]:  # fmt: skip
    """Figures of the engine's student over ``prefixes``; every rank calls this and gets the same."""
    longest = max(prefix.positions for prefix in prefixes)  # what the student's context was checked for
    batches = rank_batches(store, prefixes, engine.world_size, rank, micro_batch_tokens, length=longest)
    return figures(engine.predict(batches, tally).cpu().numpy())


def teacher_figures(store: LogitStore, prefixes: Sequence[Prefix]) -> dict[str, float]:
    """The teacher's own figures on the same rows, from its stored labels."""
    total = np.zeros(3 + 3 * NUM_BINS)
    for prefix in prefixes:
        tokens, targets = store[prefix.row]
        ids_PK, logprobs_PK = (torch.tensor(a) for a in targets.padded_heads(store.manifest["k"]))
        top_ids_P, top_logprobs_P = top_of_heads(ids_PK.long(), logprobs_PK)
        predictions = Predictions(torch.from_numpy(-targets.next_logprob_P), top_ids_P, top_logprobs_P.exp())
        next_ids_P = torch.from_numpy(tokens.input_ids_T[1:].astype(np.int64))
        total += _tally(predictions, next_ids_P, predictions.top_id_N).numpy()
    return figures(total)


def tally(batch: MicroBatch, predictions: Predictions) -> Tensor:
    """Sums of a micro-batch, float64: positions, loss, agreements, and per bin count, confidence, hits."""
    teacher_top_N = None
    if batch.targets is not None:
        teacher_top_N, _ = top_of_heads(batch.targets.head_ids_NK, batch.targets.head_logprobs_NK)
    return _tally(predictions, batch.next_ids_N, teacher_top_N)


def top_of_heads(ids_NK: Tensor, logprobs_NK: Tensor) -> tuple[Tensor, Tensor]:
    """The teacher's most probable id and its log-prob; heads are in order of ids, ties go to the lower."""
    top_N1 = logprobs_NK.argmax(-1, keepdim=True)
    return ids_NK.gather(-1, top_N1)[:, 0], logprobs_NK.gather(-1, top_N1)[:, 0]


def _tally(predictions: Predictions, next_ids_N: Tensor, teacher_top_N: Tensor | None) -> Tensor:
    confidence_N = predictions.top_probability_N.double()
    hit_N = (predictions.top_id_N == next_ids_N).double()
    agree_N = (predictions.top_id_N == teacher_top_N).double() if teacher_top_N is not None else hit_N * math.nan
    bin_N = (confidence_N * NUM_BINS).long().clamp(0, NUM_BINS - 1)
    counts = torch.tensor([len(next_ids_N)], dtype=torch.float64, device=hit_N.device)
    sums = [counts, predictions.ce_N.double().sum()[None], agree_N.sum()[None]]
    for values_N in (torch.ones_like(hit_N), confidence_N, hit_N):
        sums.append(torch.zeros(NUM_BINS, dtype=torch.float64, device=hit_N.device).index_add(0, bin_N, values_N))
    return torch.cat(sums)


def figures(total: np.ndarray) -> dict[str, float]:
    """Figures from summed tallies. ``agreement`` is NaN without a teacher."""
    positions, loss, agreements = total[:3]
    count, confidence, hits = total[3:].reshape(3, NUM_BINS)
    return {
        "positions": float(positions),
        "loss": float(loss / positions),
        "perplexity": float(np.exp(loss / positions)),
        "accuracy": float(hits.sum() / count.sum()),
        "calibration_error": float(np.abs(hits - confidence).sum() / count.sum()),
        "agreement": float(agreements / positions),
    }
