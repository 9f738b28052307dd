"""What becomes of the mass that a teacher's head does not hold: named treatments of the tail.

At each position the teacher names the head H (ids with log p), the next token x and forced ids; the rest of its mass is
tail. p is the teacher at temperature T, q the student. On the head, r = 1 − Σ_H p is everything outside it, a next or
forced id included; ``kept`` below is head, next token and forced ids together. D is the divergence; the two partitions
that it compares are:

    ghost         H, and one bucket for the rest:              p on H, r        q on H, q(outside H)
    renormalise   H alone:                                     p / Σ_H p        forward KL: q; others: q / Σ_H q
    none          the same, times Σ_H p: what Σ_H p log(p/q) is when it is made to be ≥ 0 by a constant
    uniform       all V ids:                                   p on H, r / (V − |H|) elsewhere            q
    ground_truth  H and x: r goes to the next token            p on H, + r at x                           q
    sampled       kept and drawn ids: a draw has weight tail/m p on kept, tail · draws / m                q

At K = V all are D(p ‖ q) over the vocabulary, but for what the teacher gives to rows beyond V: without that mass p sums
to less than one. All are ≥ 0, where p sums to one.

Legal pairs and what they cost (shares of the gain of full KD over cross-entropy, and calibration errors, are those of
RS-KD, arXiv 2503.16870): forward KL goes with all. The others compare q's mass outside H with something, and so need
`ghost`, `uniform` or `renormalise` (where the student is renormalised on the same ids), or K = V, where all else is
`ghost`: an id that the teacher rules out is no entry of its head, and what q gives to it must count.

- ``ghost`` recovers 59 % at k = 12 with a calibration error of 0.4 %; how q spreads the bucket is left to it.
- ``renormalise`` costs most: −99 % at k = 12, 55 % at 100; it teaches a student to be too sure. Where the student is
  renormalised too, nothing ever tells it how much mass belongs outside H.
- ``none`` has the gradient of the plain truncated sum, Σ_H p · q − p: less of it where the head holds less.
- ``uniform`` is wrong about every single id of the tail (−73 %), and the only one whose work grows with V.
- ``ground_truth`` mixes cross-entropy in where the head is thin: 61 % at k = 10, 97 % at 100.
- ``sampled`` has the expected gradient of full KD ("importance samples": 12 ids reach full KD); its value is not
  KL(p ‖ q), which would need log p of the draws, but that of the sample.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from training.losses.divergences import divergence, log_sum
from training.losses.targets import Entries, Labels

TAILS = ("ghost", "renormalise", "none", "uniform", "ground_truth", "sampled")
LEGAL_TAILS = {"forward_kl": TAILS} | dict.fromkeys(("reverse_kl", "jsd", "tvd"), ("ghost", "renormalise", "uniform"))
"""Tails that each divergence goes with; where every head has V entries all are the same."""


class StudentView(NamedTuple):
    """The student at temperature T as a position's labels see it."""

    log_q_NE: Tensor
    """Of the entries; −inf in free ones."""
    log_q_rest_N: Tensor
    """Of all ids that are no entries together."""
    log_q_rest_NW: Tensor | None
    """Of each of them, −inf elsewhere: for `uniform` alone."""


class Tempered(NamedTuple):
    """One teacher's distribution at temperature T."""

    log_p_NE: Tensor
    """Of what it keeps; −inf elsewhere."""
    log_outside_N: Tensor
    """log r: of everything outside the head."""
    log_tail_N: Tensor
    """Of everything that is not kept."""


def tempered(labels: Labels, log_partition_N: Tensor, temperature: float | Tensor, vocabulary_size: int) -> Tempered:
    """The teacher at T: log p / T − A_T of what it keeps. The tail is exact at T = 1.

    At others it is 1 − Σ p, within what the tail at T = 1 allows. With a = 1/T, tail mass m and n ids in the tail,
    Σ p^a over these is between m^a, all of it on one id, and n^(1 − a) · m^a, the same on each (power means). Rounding
    of a head that holds nearly everything would otherwise make a tail of 1e-3 where there is one of 1e-14, or none.
    Where that happens the head is scaled to what the tail leaves, as a reader of the store does at T = 1.
    """
    kept_NE = labels.logprobs_NE > -torch.inf
    finite_NE = torch.where(kept_NE, labels.logprobs_NE, 0.0)
    log_p_NE = torch.where(kept_NE, finite_NE / temperature - log_partition_N[:, None], -torch.inf)
    elsewhere_NE = torch.where(labels.in_head_NE, -torch.inf, log_p_NE)
    if isinstance(temperature, float) and temperature == 1.0:
        outside_N = log_sum(torch.cat([elsewhere_NE, labels.tail_logmass_N[:, None]], 1))
        return Tempered(log_p_NE, outside_N, labels.tail_logmass_N)
    found_N = _log_rest(log_p_NE)
    has_tail_N = labels.tail_logmass_N > -torch.inf
    on_one_N = torch.where(has_tail_N, labels.tail_logmass_N, 0.0) / temperature - log_partition_N
    # A teacher's head may have rows beyond V: twice as many ids are never too few.
    on_all_N = on_one_N + (1 - 1 / temperature) * math.log(2 * vocabulary_size)
    low_N, high_N = torch.minimum(on_one_N, on_all_N), torch.maximum(on_one_N, on_all_N)
    log_tail_N = torch.where(has_tail_N, torch.minimum(torch.maximum(found_N, low_N), high_N), -torch.inf)
    outside_N = log_sum(torch.cat([elsewhere_NE, log_tail_N[:, None]], 1))
    head_N = log_sum(torch.where(labels.in_head_NE, log_p_NE, -torch.inf))
    scale_N = torch.where((log_tail_N != found_N) & (head_N > -torch.inf), _log_left(outside_N) - head_N, 0.0)
    return Tempered(torch.where(labels.in_head_NE, log_p_NE + scale_N[:, None], log_p_NE), outside_N, log_tail_N)


def soft_loss(
    name: str, beta: float, tail: str, vocabulary_size: int, entries: Entries, labels: Labels, teacher: Tempered,
    student: StudentView,
) -> Tensor:  # fmt: skip
    """D(teacher ‖ student) at the temperature of both, [N], under the treatment ``tail`` of this module."""
    log_q_NE = student.log_q_NE
    if tail not in LEGAL_TAILS[name]:  # K = V
        tail = "ghost"
    num_head_N = labels.in_head_NE.sum(-1)
    # A head of V ids has nothing outside: what is left of the mass is on teacher rows that no student has.
    log_r_N = torch.where(num_head_N == vocabulary_size, -torch.inf, teacher.log_outside_N)
    head_p_NE = torch.where(labels.in_head_NE, teacher.log_p_NE, -torch.inf)
    head_q_NE = torch.where(labels.in_head_NE, log_q_NE, -torch.inf)
    match tail:
        case "ghost":
            others_q_NE = torch.where(labels.in_head_NE, -torch.inf, log_q_NE)
            outside_q_N1 = log_sum(torch.cat([others_q_NE, student.log_q_rest_N[:, None]], 1))[:, None]
            cells = torch.cat([head_p_NE, log_r_N[:, None]], 1), torch.cat([head_q_NE, outside_q_N1], 1)
            return divergence(name, beta, *cells)
        case "renormalise":
            return _renormalised(name, beta, head_p_NE, head_q_NE)
        case "none":
            return log_sum(head_p_NE).exp() * divergence(name, beta, _normalised(head_p_NE), head_q_NE)
        case "uniform":
            num_outside_N1 = (vocabulary_size - num_head_N).clamp(min=1)[:, None]
            log_each_N1 = log_r_N[:, None] - num_outside_N1.to(log_r_N.dtype).log()
            log_p_NE = torch.where(entries.present_NE & ~labels.in_head_NE, log_each_N1, head_p_NE)
            assert student.log_q_rest_NW is not None
            rest_p_NW = torch.where(student.log_q_rest_NW > -torch.inf, log_each_N1, -torch.inf)
            on_rest_N = divergence(name, beta, rest_p_NW, student.log_q_rest_NW)
            return divergence(name, beta, log_p_NE, log_q_NE) + on_rest_N
        case "ground_truth":
            at_next_N = log_sum(torch.cat([head_p_NE.gather(-1, entries.next_N1), log_r_N[:, None]], 1))
            return divergence(name, beta, head_p_NE.scatter(-1, entries.next_N1, at_next_N[:, None]), log_q_NE)
    assert tail == "sampled"
    num_draws_N1 = labels.draws_NE.sum(-1, keepdim=True).clamp(min=1.0)
    drawn_NE = labels.draws_NE > 0
    log_drawn_NE = (torch.where(drawn_NE, labels.draws_NE, 1.0) / num_draws_N1).log() + teacher.log_tail_N[:, None]
    return divergence(name, beta, torch.where(drawn_NE, log_drawn_NE, teacher.log_p_NE), log_q_NE)


def _renormalised(name: str, beta: float, log_p_NE: Tensor, log_q_NE: Tensor) -> Tensor:
    """Of the head alone; a position whose head is empty has no loss."""
    log_q_NE = log_q_NE if name == "forward_kl" else _normalised(log_q_NE)
    return divergence(name, beta, _normalised(log_p_NE), log_q_NE)


def _normalised(log_p_NE: Tensor) -> Tensor:
    total_N1 = log_sum(log_p_NE)[:, None]
    return log_p_NE - torch.where(total_N1 > -torch.inf, total_N1, 0.0)


def _log_rest(log_p_NE: Tensor) -> Tensor:
    """log(1 − Σ p), −inf where rounding has left nothing."""
    rest_N = 1.0 - log_p_NE.exp().sum(-1)
    return torch.where(rest_N > 0, rest_N.clamp(min=torch.finfo(rest_N.dtype).tiny).log(), -torch.inf)


def _log_left(log_mass_N: Tensor) -> Tensor:
    """log(1 − mass), of a mass below one."""
    return (-log_mass_N.exp()).clamp(min=torch.finfo(log_mass_N.dtype).eps - 1).log1p()
