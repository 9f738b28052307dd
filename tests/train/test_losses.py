"""Every loss on sparse labels, through the fused path, against plain dense float64 code."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.bench.loss import labels, loss_of
from training.losses import LEGAL_TAILS, LossSums, Objective, SparseTargets, WeightedTargets, linear_losses, soft_losses
from training.losses.divergences import jsd, reverse_kl
from training.losses.fused import BLOCK_BYTES, CHUNK_BYTES
from training.losses.tails import tempered
from training.losses.targets import merge

N, V, W, D = 9, 23, 29, 6
FORCED = (2, 11)
STORED = (0.5, 2.0, 4.0)
PAIRS = [(name, tail) for name, tails in LEGAL_TAILS.items() for tail in tails]


class Problem(NamedTuple):
    """A student's hidden states and head, a teacher's log-probs over V and one padded row, and what is kept of them."""

    hidden_ND: Tensor
    weight_WD: Tensor
    bias_W: Tensor
    next_ids_N: Tensor
    log_p_NV: Tensor
    targets: SparseTargets
    in_head_NV: Tensor

    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden_ND, self.weight_WD, self.bias_W)[:, :V]


def make_problem(seed: int = 0, heads: Callable[[int], int] = lambda n: (0, 1, 5, V, 8, 3, V - 1, 2, 12)[n]) -> Problem:
    """Ragged heads of ``heads(position)`` entries, an empty and a full one among them; the padded row has 1 % or so."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    next_ids_N = torch.randint(0, V, (N,), generator=g)
    log_p_NU = (randn(N, V + 1) * 2).log_softmax(-1)
    log_p_NU[3] = torch.cat([log_p_NU[3, :V], torch.tensor([-torch.inf])]).log_softmax(
        -1
    )  # the full head's: no padding
    order_NV = log_p_NU[:, :V].argsort(-1, descending=True)
    counts_N1 = torch.tensor([heads(n) for n in range(N)])[:, None]
    k = int(counts_N1.max())
    free_NK = torch.arange(k) >= counts_N1
    ids_NK = order_NV[:, :k].masked_fill(free_NK, 0)
    logprobs_NK = log_p_NU.gather(-1, ids_NK).masked_fill(free_NK, -torch.inf)
    in_head_NV = torch.zeros(N, V, dtype=torch.bool).scatter(-1, order_NV, torch.arange(V).expand(N, V) < counts_N1)
    forced_NF = torch.tensor(FORCED).expand(N, -1)
    kept_NV = in_head_NV.scatter(-1, next_ids_N[:, None], True).scatter(-1, forced_NF, True)
    rest_NV = log_p_NU[:, :V].exp().masked_fill(kept_NV, 0.0)
    draws_NM = torch.multinomial(rest_NV + 1e-300, 6, replacement=True, generator=g).sort(-1).values
    draws_NM[kept_NV.all(-1)] = -1
    draws_NM[2, 4:] = -1
    tail_N = torch.cat([rest_NV, log_p_NU[:, V:].exp()], 1).sum(-1).log()
    partition_NS = torch.stack([(log_p_NU / t).logsumexp(-1) for t in STORED], 1)
    targets = SparseTargets(
        ids_NK, logprobs_NK, log_p_NU.gather(-1, next_ids_N[:, None])[:, 0], tail_N, partition_NS,
        forced_NF, log_p_NU.gather(-1, forced_NF), draws_NM,
    )  # fmt: skip
    hidden_ND, weight_WD, bias_W = (randn(*shape).requires_grad_() for shape in ((N, D), (W, D), (W,)))
    return Problem(hidden_ND, weight_WD, bias_W, next_ids_N, log_p_NU, targets, in_head_NV)


def distance(name: str, beta: float, p: Tensor, q: Tensor) -> Tensor:
    """The divergence's formula on probabilities."""
    if name == "forward_kl":
        p, q = torch.where(p > 0, p, 1.0), torch.where(p > 0, q, 1.0)  # cells without p count nothing
        return (p * (p.log() - q.log())).sum(-1)
    if name == "reverse_kl":
        return distance("forward_kl", beta, q, p.clamp(min=2.0**-126))
    if name == "tvd":
        return (p - q).abs().sum(-1) / 2
    m = beta * p + (1 - beta) * q
    return beta * distance("forward_kl", beta, p, m) + (1 - beta) * distance("forward_kl", beta, q, m)


def dense_soft_loss(problem: Problem, name: str, tail: str, temperature: float, beta: float = 0.5) -> Tensor:
    """T² · D of each position by plain code on dense distributions."""
    p_NU = (problem.log_p_NV / temperature).softmax(-1)
    q_NV = (problem.logits() / temperature).softmax(-1)
    head_NV, next_N1, targets = problem.in_head_NV, problem.next_ids_N[:, None], problem.targets
    p_NV = p_NU[:, :V] * head_NV
    r_N1 = 1 - p_NV.sum(-1, keepdim=True)
    r_N1 = r_N1.masked_fill(head_NV.all(-1, keepdim=True), 0.0)
    scale_N = torch.ones(N, dtype=torch.float64)
    if tail == "ghost":
        p, q = torch.cat([p_NV, r_N1], 1), torch.cat([q_NV * head_NV, (q_NV * ~head_NV).sum(-1, keepdim=True)], 1)
    elif tail == "uniform":
        p, q = p_NV + ~head_NV * r_N1 / (~head_NV).sum(-1, keepdim=True).clamp(min=1), q_NV
    elif tail == "ground_truth":
        p, q = p_NV.scatter_add(-1, next_N1, r_N1), q_NV
    elif tail == "sampled":
        kept_NV = head_NV.scatter(-1, next_N1, True).scatter(-1, targets.forced_ids_NF, True)
        p = p_NU[:, :V] * kept_NV
        tail_N1 = 1 - p.sum(-1, keepdim=True)
        there_NM = targets.sampled_ids_NM >= 0
        share_NM = there_NM * tail_N1 / there_NM.sum(-1, keepdim=True).clamp(min=1)
        p, q = p.scatter_add(-1, targets.sampled_ids_NM.clamp(min=0), share_NM), q_NV
    else:
        mass_N1 = p_NV.sum(-1, keepdim=True)
        p = torch.where(mass_N1 > 0, p_NV / mass_N1.clamp(min=1e-300), 0.0)
        q_head_NV = q_NV * head_NV
        q = q_NV if name == "forward_kl" else q_head_NV / q_head_NV.sum(-1, keepdim=True).clamp(min=1e-300)
        scale_N = torch.where(mass_N1 > 0, mass_N1 if tail == "none" else 1.0, 0.0)[:, 0]
    return temperature**2 * scale_N * distance(name, beta, p, q)


def gradients(loss: Tensor, problem: Problem) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, problem[:3], retain_graph=True)


def fused(problem: Problem, objective: Objective, chunk: int = 4, weight: float = 1.0) -> LossSums:
    hidden_ND, weight_WD, bias_W, next_ids_N, _, targets, _ = problem
    teachers = [WeightedTargets(weight, targets)]
    return LossSums.of(linear_losses(hidden_ND, weight_WD, bias_W, lambda x: x, next_ids_N, teachers, objective, chunk))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize(("name", "tail"), PAIRS)
def test_every_legal_pair_is_its_dense_formula(name: str, tail: str, temperature: float) -> None:
    problem = make_problem()
    objective = Objective(V, 0.7, temperature, tail, name, beta=0.3, z_loss=1e-3, stored=STORED)
    sums = fused(problem, objective)
    kd_N, logits_NV = dense_soft_loss(problem, name, tail, temperature, beta=0.3), problem.logits()
    ce = torch.nn.functional.cross_entropy(logits_NV, problem.next_ids_N, reduction="sum")
    z = logits_NV.logsumexp(-1).square().sum()
    expected = 0.7 * kd_N.sum() + 0.3 * ce + 1e-3 * z
    for found, other in zip(sums, (expected, kd_N.sum(), ce, z), strict=True):
        torch.testing.assert_close(found, other.detach(), rtol=1e-9, atol=1e-9)
    for found, other in zip(gradients(sums.loss, problem), gradients(expected, problem), strict=True):
        torch.testing.assert_close(found, other, rtol=1e-7, atol=1e-9)
    evaluated_N = soft_losses(logits_NV, problem.next_ids_N, problem.targets, objective)
    torch.testing.assert_close(evaluated_N, kd_N, rtol=1e-8, atol=1e-9)
    assert (evaluated_N >= -1e-12).all()


@pytest.mark.parametrize(("name", "tail"), [(name, tail) for name in LEGAL_TAILS for tail in LEGAL_TAILS["forward_kl"]])
def test_everything_kept_is_online_distillation(name: str, tail: str) -> None:
    problem = make_problem(heads=lambda _: V)
    log_p_NV = problem.log_p_NV[:, :V].log_softmax(-1)  # a teacher without padded rows
    partition_N1 = (log_p_NV / 2.0).logsumexp(-1)[:, None]
    ids_NK, next_N1 = problem.targets.head_ids_NK, problem.next_ids_N[:, None]
    gone_N = torch.full((N,), -torch.inf, dtype=torch.float64)
    next_N = log_p_NV.gather(-1, next_N1)[:, 0]
    targets = SparseTargets.of_heads(ids_NK, log_p_NV.gather(-1, ids_NK), next_N, gone_N, partition_N1)
    for temperature in (1.0, 2.0):
        sums = fused(problem._replace(targets=targets), Objective(V, 1.0, temperature, tail, name, stored=(2.0,)))
        p_NV, q_NV = (log_p_NV / temperature).softmax(-1), (problem.logits() / temperature).softmax(-1)
        online = temperature**2 * distance(name, 0.5, p_NV, q_NV).sum()
        torch.testing.assert_close(sums.loss, online, rtol=0, atol=1e-9)
        for found, other in zip(gradients(sums.loss, problem), gradients(online, problem), strict=True):
            torch.testing.assert_close(found, other, rtol=0, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.sampled_from(PAIRS), st.integers(1, 11), st.sampled_from([1.0, 4.0]))
def test_chunks_and_order_change_nothing(seed: int, pair: tuple[str, str], chunk: int, temperature: float) -> None:
    problem = make_problem(seed, heads=lambda n: (seed * (n + 3)) % (V + 1))
    objective = Objective(V, 0.4, temperature, pair[1], pair[0], stored=STORED)
    whole, parts = fused(problem, objective, N), fused(problem, objective, chunk)
    assert all(torch.isfinite(term) for term in whole)
    for a, b in zip(gradients(whole.loss, problem), gradients(parts.loss, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
    backwards = problem._replace(
        hidden_ND=problem.hidden_ND.flip(0), next_ids_N=problem.next_ids_N.flip(0),
        targets=SparseTargets(*(column.flip(0) for column in problem.targets)),
    )  # fmt: skip
    torch.testing.assert_close(torch.stack(whole), torch.stack(fused(backwards, objective, chunk)), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "tail"), PAIRS)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_extremes_stay_finite(name: str, tail: str, temperature: float) -> None:
    log_p_NV = torch.full((3, V), -torch.inf)
    log_p_NV[0, 4] = 0.0  # the teacher is certain
    log_p_NV[1] = -torch.tensor(float(V)).log()
    log_p_NV[2, :2] = torch.tensor([0.0, -80.0])
    next_ids_N = torch.tensor([4, 0, 9])
    logprobs_NK, ids_NK = log_p_NV.topk(3, dim=-1)
    kept_NV = torch.zeros(3, V, dtype=torch.bool).scatter(-1, ids_NK, True).scatter(-1, next_ids_N[:, None], True)
    tail_N = log_p_NV.masked_fill(kept_NV, -torch.inf).logsumexp(-1)
    next_N = log_p_NV.gather(-1, next_ids_N[:, None])[:, 0]
    partition_N1 = (log_p_NV / 2.0).logsumexp(-1)[:, None]
    targets = SparseTargets.of_heads(ids_NK, logprobs_NK, next_N, tail_N, partition_N1)
    hidden_ND, weight_WD = (torch.randn(3, D) * 20).requires_grad_(), torch.randn(V, D, requires_grad=True)
    objective = Objective(V, 0.9, temperature, tail, name, stored=(2.0,))
    teachers = [WeightedTargets(1.0, targets)]
    sums = LossSums.of(linear_losses(hidden_ND, weight_WD, None, lambda x: x, next_ids_N, teachers, objective))
    assert all(torch.isfinite(term) for term in sums)
    assert sums.kd >= -1e-4
    for gradient in torch.autograd.grad(sums.loss, [hidden_ND, weight_WD]):
        assert torch.isfinite(gradient).all()


def test_several_teachers_are_a_weighted_sum_and_alpha_zero_asks_none() -> None:
    one, other = make_problem(0), make_problem(1, heads=lambda n: n)
    objective = Objective(V, 0.6, 2.0, stored=STORED)
    inputs = (one.hidden_ND, one.weight_WD, one.bias_W, lambda x: x, one.next_ids_N)
    second = other.targets._replace(next_logprob_N=other.log_p_NV.gather(-1, one.next_ids_N[:, None])[:, 0])
    teachers = [WeightedTargets(0.75, one.targets), WeightedTargets(0.25, second)]
    sums = LossSums.of(linear_losses(*inputs, teachers, objective, 4))
    alone = [LossSums.of(linear_losses(*inputs, [WeightedTargets(1.0, t.targets)], objective, 4)) for t in teachers]
    torch.testing.assert_close(sums.kd, 0.75 * alone[0].kd + 0.25 * alone[1].kd, rtol=1e-12, atol=0)
    mixed = [0.75 * a + 0.25 * b for a, b in zip(*(gradients(s.loss, one) for s in alone), strict=True)]
    for found, expected in zip(gradients(sums.loss, one), mixed, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    plain = LossSums.of(linear_losses(*inputs, teachers, objective._replace(alpha=0.0), 4))
    assert (plain.kd, plain.loss) == (0.0, plain.ce)


def test_no_positions_give_zeros_and_zero_gradients() -> None:
    problem = make_problem()
    inputs = (problem.hidden_ND[:0], problem.weight_WD, problem.bias_W, lambda x: x, problem.next_ids_N[:0])
    teachers = [WeightedTargets(1.0, problem.targets.part(slice(0, 0)))]
    sums = LossSums.of(linear_losses(*inputs, teachers, Objective(V)))
    assert not any(sums)
    assert not torch.cat([gradient.flatten() for gradient in gradients(sums.loss, problem)]).any()


@pytest.mark.parametrize("finish", [lambda z: 5 * torch.tanh(z / 5), lambda z: z * 0.25], ids=["cap", "scale"])
def test_what_a_model_does_to_its_logits_has_its_gradient(finish: Callable[[Tensor], Tensor]) -> None:
    problem = make_problem()
    objective = Objective(V, 0.5, tail="ground_truth")
    teachers = [WeightedTargets(1.0, problem.targets)]
    hidden_ND, weight_WD, bias_W = problem[:3]
    sums = linear_losses(hidden_ND, weight_WD, bias_W, finish, problem.next_ids_N, teachers, objective, 4)
    logits_NW = finish(torch.nn.functional.linear(*problem[:3]))
    kd = soft_losses(logits_NW, problem.next_ids_N, problem.targets, objective).sum()
    expected = 0.5 * kd + 0.5 * torch.nn.functional.cross_entropy(logits_NW[:, :V], problem.next_ids_N, reduction="sum")
    for a, b in zip(gradients(sums[0], problem), gradients(expected, problem), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_near_to_the_truth_as_dense_code_of_the_same_dtype(dtype: torch.dtype) -> None:
    problem = make_problem()
    objective = Objective(V, 0.7, 2.0, stored=STORED)
    teachers = [WeightedTargets(1.0, problem.targets)]
    low = [leaf.detach().to(dtype).requires_grad_() for leaf in problem[:3]]
    truth = problem._replace(**dict(zip(Problem._fields[:3], [x.detach().double().requires_grad_() for x in low])))  # noqa: B905
    inputs = (low[0], low[1], low[2], lambda x: x, problem.next_ids_N)
    sums = linear_losses(*inputs, teachers, objective, 2)
    exact = fused(truth, objective)

    def dense(leaves: list[Tensor]) -> Tensor:
        logits_NW = torch.nn.functional.linear(*leaves).float()
        kd = soft_losses(logits_NW, problem.next_ids_N, problem.targets, objective).sum()
        return 0.7 * kd + 0.3 * torch.nn.functional.cross_entropy(logits_NW[:, :V], problem.next_ids_N, reduction="sum")

    true = gradients(exact.loss, truth)
    found = torch.autograd.grad(sums[0] * 1024, low)  # a loss scale, as float16 has one
    same = torch.autograd.grad(dense(low) * 1024, low)
    for a, b, expected in zip(found, same, true, strict=True):
        assert a.dtype == dtype
        error, other = ((x.double() / 1024 - expected).norm() / expected.norm() for x in (a, b))
        assert error < max(2 * other, 1e-3), (error, other)


@pytest.mark.parametrize(("dtype", "heads"), [(torch.bfloat16, 3), (torch.float32, 1)])
@pytest.mark.parametrize("way", ["fused kd", "fused kd, T = 2"])
def test_memory_is_that_of_the_heads_gradient_and_some_chunks(
    way: str, dtype: torch.dtype, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In half precision a sum in float32, which is twice the head's bytes, and the result."""
    monkeypatch.setitem(CHUNK_BYTES, "cpu", 2**16)
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 2**16)
    hidden_ND, weight_WD = torch.randn(64, 256).to(dtype), torch.randn(4096, 256).to(dtype)
    targets, next_ids_N = labels(4096, 64)
    hidden_ND, weight_WD = hidden_ND.requires_grad_(), weight_WD.requires_grad_()
    peak = allocated(lambda: loss_of(way, hidden_ND, weight_WD, next_ids_N, targets).backward())
    assert heads * weight_WD.nbytes <= peak <= heads * weight_WD.nbytes + 6 * 2**16


def allocated(work: Callable[[], None]) -> int:
    """Most bytes that were allocated at once, temporaries inside of torch's operators included."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    changes = [event.nbytes() for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(itertools.accumulate(changes))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_blocks_of_the_heads_gradient_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem()
    low = problem._replace(
        **{name: getattr(problem, name).detach().to(dtype).requires_grad_() for name in problem._fields[:3]}
    )
    whole = gradients(fused(low, Objective(V)).loss, low)
    monkeypatch.setitem(BLOCK_BYTES, "cpu", 3 * 4 * low.weight_WD.shape[1])
    for a, b in zip(gradients(fused(low, Objective(V)).loss, low), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_a_frozen_head_gets_no_gradient_and_a_second_backward_is_refused() -> None:
    problem = make_problem()
    frozen = problem._replace(weight_WD=problem.weight_WD.detach(), bias_W=problem.bias_W.detach())
    sums = fused(frozen, Objective(V))
    expected = gradients(fused(problem, Objective(V)).loss, problem)[0]
    (found,) = torch.autograd.grad(sums.loss, [frozen.hidden_ND], retain_graph=True)
    assert torch.equal(found, expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(sums.loss, [frozen.hidden_ND])
    with torch.no_grad():
        assert fused(problem, Objective(V)).loss == sums.loss


@pytest.mark.parametrize("tail", ["ghost", "uniform", "sampled", "ground_truth"])
def test_a_learned_temperature_has_the_gradient_of_finite_differences(tail: str) -> None:
    problem = make_problem(heads=lambda n: n)

    def loss(temperature: Tensor | float) -> Tensor:
        return fused(problem, Objective(V, 0.8, temperature, tail, stored=STORED)).loss

    temperature = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(loss(temperature), [temperature])
    step = 1e-5
    expected = (loss(1.7 + step) - loss(1.7 - step)) / (2 * step)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-6, atol=1e-7)


def test_jsd_tends_to_forward_kl_and_is_bounded() -> None:
    g = torch.Generator().manual_seed(0)
    log_p, log_q = ((torch.randn(5, 8, generator=g, dtype=torch.float64) * 4).log_softmax(-1) for _ in range(2))
    kl = distance("forward_kl", 0.5, log_p.exp(), log_q.exp())
    torch.testing.assert_close(jsd(log_p, log_q, 1e-9) / 1e-9, kl, rtol=1e-4, atol=1e-4)
    assert (jsd(log_p, log_q, 0.5) <= torch.tensor(2.0).log()).all()
    certain = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    assert float(reverse_kl(certain, torch.tensor([[0.5, 0.5]], dtype=torch.float64).log())) == pytest.approx(
        63 * torch.tensor(2.0).log() - torch.tensor(2.0).log()
    )


def test_the_mean_over_draws_has_the_gradient_of_full_distillation() -> None:
    """Draws with weight tail/m are an unbiased estimate of p: the mean target over many draws is p itself."""
    problem = make_problem(heads=lambda _: 3)
    targets, log_p_NV = problem.targets, problem.log_p_NV[:, :V]
    kept_NV = problem.in_head_NV.scatter(-1, problem.next_ids_N[:, None], True).scatter(-1, targets.forced_ids_NF, True)
    rest_NV = log_p_NV.exp().masked_fill(kept_NV, 0.0)
    draws_NM = torch.multinomial(rest_NV, 20_000, replacement=True, generator=torch.Generator().manual_seed(3))
    many = problem._replace(targets=targets._replace(sampled_ids_NM=draws_NM, tail_logmass_N=rest_NV.sum(-1).log()))
    found = gradients(fused(many, Objective(V, 1.0, 1.0, "sampled")).loss, problem)[0]
    full = -(log_p_NV.exp() * problem.logits().log_softmax(-1)).sum()  # rows beyond V have 1 % or so, in no sum
    expected = gradients(full, problem)[0]
    assert float((found - expected).norm() / expected.norm()) < 0.02


@pytest.mark.parametrize("tail", LEGAL_TAILS["forward_kl"])
@pytest.mark.parametrize("name", ["reverse_kl", "jsd", "tvd"])
def test_ids_that_a_teacher_rules_out_count_where_everything_is_kept(name: str, tail: str) -> None:
    if tail == "renormalise":  # which is on the head alone, for teacher and student
        return
    problem = make_problem(heads=lambda _: V)
    log_p_NV = problem.log_p_NV[:, :V].clone()
    log_p_NV[:, [4, 9]] = -torch.inf
    log_p_NV = log_p_NV.log_softmax(-1)
    ids_NK, next_N1 = problem.targets.head_ids_NK, problem.next_ids_N[:, None].clone()
    next_N1[(next_N1 == 4) | (next_N1 == 9)] = 0
    gone_N = torch.full((N,), -torch.inf, dtype=torch.float64)
    targets = SparseTargets.of_heads(
        ids_NK, log_p_NV.gather(-1, ids_NK), log_p_NV.gather(-1, next_N1)[:, 0], gone_N,
        (log_p_NV / 2.0).logsumexp(-1)[:, None],
    )  # fmt: skip
    problem = problem._replace(targets=targets, next_ids_N=next_N1[:, 0])
    for temperature in (1.0, 2.0):
        sums = fused(problem, Objective(V, 1.0, temperature, tail, name, stored=(2.0,)))
        p_NV, q_NV = (log_p_NV / temperature).softmax(-1), (problem.logits() / temperature).softmax(-1)
        if name == "reverse_kl" and tail != "uniform":  # the two ids are one bucket, and 2^-126 counts once
            p_NV = torch.cat([p_NV[:, [v for v in range(V) if v not in (4, 9)]], p_NV[:, [4]]], 1)
            q_NV = torch.cat([q_NV[:, [v for v in range(V) if v not in (4, 9)]], q_NV[:, [4, 9]].sum(1, True)], 1)
        online = temperature**2 * distance(name, 0.5, p_NV, q_NV).sum()
        torch.testing.assert_close(sums.loss, online, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("temperature", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("steepness", [1.0, 6.0, 30.0])
def test_rounding_of_the_head_does_not_make_a_tail(temperature: float, steepness: float) -> None:
    """Log-probs of the head are off by a hundredth, as by a codec, and at T = 1 sum to what the tail leaves."""
    g = torch.Generator().manual_seed(0)
    logits_NV = torch.randn(50, 1000, generator=g, dtype=torch.float64) * steepness
    log_p_NV, k = logits_NV.log_softmax(-1), 64
    ids_NK = log_p_NV.topk(k).indices
    exact_NK = log_p_NV.gather(-1, ids_NK)
    tail_N = log_p_NV.scatter(-1, ids_NK, -torch.inf).logsumexp(-1)
    rounded_NK = exact_NK + torch.randn(50, k, generator=g, dtype=torch.float64) / 100
    rounded_NK += (torch.log1p(-tail_N.exp()) - rounded_NK.logsumexp(-1))[:, None]
    partition_N = (log_p_NV / temperature).logsumexp(-1)
    targets = SparseTargets.of_heads(ids_NK, rounded_NK.float(), exact_NK[:, 0].float(), tail_N.float())
    entries, (labels,) = merge(ids_NK[:, 0], [targets], torch.float32)
    found = tempered(labels, partition_N.float(), temperature, 1000)
    a, n = 1 / temperature, 1000 - k
    truth_N = (log_p_NV.scatter(-1, ids_NK, -torch.inf) * a).logsumexp(-1) - partition_N
    least_N, most_N = a * tail_N - partition_N, a * tail_N - partition_N + (1 - a) * math.log(n)
    assert (
        (truth_N >= torch.minimum(least_N, most_N) - 1e-9) & (truth_N <= torch.maximum(least_N, most_N) + 1e-9)
    ).all()
    slack = abs(1 - a) * math.log(2000)  # nats between the bounds
    off_N = (found.log_tail_N.double() - truth_N).abs()
    assert ((off_N <= slack + 1e-3) | (found.log_tail_N.exp() - truth_N.exp()).abs().lt(0.03)).all()
    faint_N = truth_N < -20  # where 1 − Σ p is nothing but rounding
    assert (found.log_tail_N.exp()[faint_N] <= 1e-4).all()
    assert faint_N.sum() > 20 or steepness < 30 or temperature == 4
    total_N = torch.where(entries.present_NE, found.log_p_NE, -torch.inf).exp().sum(-1) + found.log_tail_N.exp()
    torch.testing.assert_close(total_N, torch.ones(50), atol=2e-6, rtol=0)


@pytest.mark.parametrize("entries", [1, 300])
def test_labels_are_prepared_for_some_positions_at_a_time(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    problem, objective = make_problem(), Objective(V, 0.7, 2.0, stored=STORED)
    whole = fused(problem, objective)
    wanted = gradients(whole.loss, problem)
    monkeypatch.setattr("training.losses.fused.PREPARED_ENTRIES", entries)
    parts = fused(problem, objective)
    for found, other in zip([*parts, *gradients(parts.loss, problem)], [*whole, *wanted], strict=True):
        torch.testing.assert_close(found.detach(), other.detach(), rtol=1e-12, atol=1e-12)
