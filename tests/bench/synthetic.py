"""A teacher that is none: distributions with the head and the tail of a language model's, from a seed.

A position is peaked (45 %), medium (35 %) or flat (20 %). The score of an id is a unigram prior,
−0.8·log(1 + rank), plus N(0, 1), plus, for the ids that the context suggests, a ladder:

    kind     candidates   first rung     falls by
    peaked   20           U(12, 20)      3.0·log(1 + j)
    medium   60           U(8, 13)       1.5·log(1 + j)
    flat     300          U(4, 8)        0.5·log(1 + j)

Candidates are drawn from the prior; ranks are ids, except that a tenth of them are shuffled, as BPE's are nearly
in order of frequency. At V = 151,936 the mean top-1 probability is 0.50 and the mean top-128 mass 0.966.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SHARES = (0.45, 0.35, 0.20)
CANDIDATES = (20, 60, 300)
FIRST_RUNG = ((12.0, 20.0), (8.0, 13.0), (4.0, 8.0))
FALL = (3.0, 1.5, 0.5)
CHUNK = 128


def dense_logprobs(num_positions: int, vocabulary_size: int, seed: int, device: str = "cpu") -> Iterator[Tensor]:
    """Log-probs [≤ CHUNK, V] float32 of consecutive positions; others on another device."""
    rng = torch.Generator(device).manual_seed(seed)
    rank_V = torch.arange(vocabulary_size, dtype=torch.float32, device=device)
    moved = torch.randperm(vocabulary_size, generator=rng, device=device)[: vocabulary_size // 10]
    rank_V[moved] = rank_V[moved[torch.randperm(len(moved), generator=rng, device=device)]]
    prior_V = -0.8 * torch.log1p(rank_V)
    shares = torch.tensor(SHARES, device=device)
    kinds = torch.multinomial(shares, num_positions, replacement=True, generator=rng).tolist()
    for start in range(0, num_positions, CHUNK):
        chunk = kinds[start : start + CHUNK]
        scores_NV = torch.randn(len(chunk), vocabulary_size, generator=rng, device=device) + prior_V
        for scores_V, kind in zip(scores_NV, chunk, strict=True):
            low, high = FIRST_RUNG[kind]
            rungs = torch.arange(CANDIDATES[kind], dtype=torch.float32, device=device)
            ladder = low + (high - low) * torch.rand(1, generator=rng, device=device) - FALL[kind] * rungs.log1p()
            picked = torch.multinomial(prior_V.softmax(0), CANDIDATES[kind], generator=rng)
            scores_V[picked] += ladder - 0.8 * prior_V[picked]
        yield scores_NV.log_softmax(-1)
