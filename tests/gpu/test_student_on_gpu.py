"""The loss, the engine and whole runs of a student on a GPU."""

import json
from pathlib import Path

import pytest
import torch

from logit_store import LogitStore
from tests.students import StopAfter, assert_same_run, metrics, run_here, student_config
from tests.train.test_feed import make_feed, tensors
from tests.train.test_losses import PAIRS, STORED, V, make_problem
from training.curriculum.batches import Cursor
from training.losses import Objective, WeightedTargets, linear_losses
from training.losses.rest import TorchRest, rest_of

ZERO = {
    "float32": {"zero_optimization": {"stage": 1}},
    "bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
    "fp16": {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}},
    "zero3": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}, "bf16": {"enabled": True}},
    "offloaded": {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        "bf16": {"enabled": True},
    },
}


@pytest.mark.parametrize(("temperature", "learned"), [(None, False), (2.0, False), (0.7, False), (2.5, True)])
@pytest.mark.parametrize("width", [1, 300, 5003, 151_936])
def test_the_kernels_are_the_reference(width: int, temperature: float | None, learned: bool) -> None:
    torch.manual_seed(0)
    logits_CW = torch.randn(40, width, device="cuda") * 20
    logits_CW[torch.rand_like(logits_CW) < 0.2] = -torch.inf
    logits_CW[2], logits_CW[3, 1:] = -torch.inf, -torch.inf
    wanted = TorchRest(logits_CW.double(), temperature, learned)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
        found = rest_of(logits_CW.clone(), temperature, learned)
        assert type(found).__name__ == "TritonRest"
        sums = [(found.lse_C, wanted.lse_C), (found.lse_at_T_C, wanted.lse_at_T_C), (found.slope_C, wanted.slope_C)]
        for ours, theirs in sums:
            assert (ours is None) == (theirs is None)
            if ours is not None and theirs is not None:
                torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
        by_lse_C = torch.randn(40, device="cuda")
        by_lse_at_T_C = None if temperature is None else torch.randn(40, device="cuda")
        reference = TorchRest(logits_CW.double(), temperature, learned)
        wide = None if by_lse_at_T_C is None else by_lse_at_T_C.double()
        theirs = reference.gradient(by_lse_C.double(), wide, torch.float64)
        ours = found.gradient(by_lse_C, by_lse_at_T_C, dtype)
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize(("divergence", "tail"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_is_the_references(divergence: str, tail: str, dtype: torch.dtype) -> None:
    """Loss and gradients on the GPU beside float64 on the CPU, from inputs that both can hold."""
    problem = make_problem()
    objective = Objective(V, 0.7, 2.0, tail, divergence, 0.3, 0.01, stored=STORED)
    found = {}
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        hidden_ND, weight_WD, bias_W = (x.detach().to(dtype).to(device, kind).requires_grad_() for x in problem[:3])
        targets = type(problem.targets)(*(column.to(device) for column in problem.targets))
        sums = linear_losses(
            hidden_ND, weight_WD, bias_W, lambda x: x, problem.next_ids_N.to(device), [WeightedTargets(1.0, targets)],
            objective, 4,
        )  # fmt: skip
        sums[0].backward()
        found[device] = [sums.detach(), hidden_ND.grad, weight_WD.grad, bias_W.grad]
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found["cuda"], found["cpu"], strict=True):
        assert float((ours.cpu().double() - theirs).norm() / theirs.norm()) < tolerance


def test_batches_lie_in_page_locked_memory(store: LogitStore) -> None:
    with make_feed(store) as feed:
        found = [tensor for batch in feed.next(Cursor()).batches for tensor in tensors(batch)]
    assert all(tensor.is_pinned() for tensor in found if tensor.numel())  # of nothing there is no page to lock


@pytest.mark.parametrize("kind", ZERO)
def test_a_run_of_the_real_engine(store: LogitStore, one_rank: None, tmp_path: Path, kind: str) -> None:
    losses = {}
    for name, user in (("plain", {"zero_optimization": {"stage": 1}}), (kind, ZERO[kind])):
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(user))
        config = student_config(tmp_path / f"run-{name}", store.storage.url, deepspeed=str(path))
        assert run_here(config)
        losses[name] = [line["loss"] for line in metrics(tmp_path / f"run-{name}") if "loss" in line]
    assert losses[kind][-1] < losses[kind][0] - 0.1
    assert losses[kind] == pytest.approx(losses["plain"], rel=1e-5 if kind == "float32" else 0.05)


def test_a_stopped_run_goes_on_as_if_it_had_not(store: LogitStore, one_rank: None, tmp_path: Path) -> None:
    """Within the precision of bf16: a GPU's atomic additions are in another order each time."""
    path = tmp_path / "zero.json"
    path.write_text(json.dumps(ZERO["bf16"]))
    quiet, stopped = (
        student_config(tmp_path / name, store.storage.url, deepspeed=str(path), schedule={"total_tokens": 1000})
        for name in ("quiet", "stopped")
    )
    assert run_here(quiet)
    assert not run_here(stopped, StopAfter(2))
    assert run_here(stopped)
    assert_same_run(tmp_path / "stopped", tmp_path / "quiet", 2e-2)
