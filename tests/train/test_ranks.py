"""One global batch on any number of ranks, in any micro-batches: the same loss, gradient and run.

What needs two ranks is done by one pair of processes for all tests of this file.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from logit_store import LogitStore
from tests.students import (
    LLAMA,
    StopAfter,
    assert_same_run,
    held_out_is_damaged,
    metrics,
    on_two_ranks,
    run_here,
    student_config,
)
from training.config import LossConfig, StudentConfig, TrainConfig
from training.curriculum.batches import BatchPlan, Cursor, Prefix
from training.data.micro_batch import rank_batches
from training.data.source import Source
from training.engine import Engine
from training.engine_config import deepspeed_config
from training.students.models import build_student
from training.students.student import Student

BUDGETS = (30, 90, 100_000)
"""Tokens of a micro-batch: one row each, some, all of the step."""
STAGES = (0, 1, 2, 3)
DOWN = {"one_bf16": {"zero_optimization": {"stage": 1}, "bf16": {"enabled": True}},
        "three": {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}}  # fmt: skip
UP = {"two": {"zero_optimization": {"stage": 2}}, "three": DOWN["three"]}
"""DeepSpeed configs of runs that go on with fewer and with more ranks."""

Gradient = tuple[float, dict[str, Tensor]]


def make_student(dtype: torch.dtype) -> Student:
    model = build_student(StudentConfig(config=LLAMA), 400, 48, seed=3)
    loss = LossConfig(alpha=0.7, temperature=2.0, tail="ghost", chunk_positions=29)
    return Student(model.to(dtype), 400, loss, [2.0])


def global_batch(store: LogitStore) -> list[Prefix]:
    rows_N = store.rows("train")
    return BatchPlan(rows_N, store.lengths_N[rows_N], 300, 0).next(Cursor())[0]


def num_positions(prefixes: list[Prefix]) -> int:
    return sum(prefix.positions for prefix in prefixes)


def exact_gradient(store: LogitStore, rank: int, num_ranks: int, budget: int) -> Gradient:
    """Loss and gradient of the batch in float64, by plain torch; without DeepSpeed, ranks add their sums up."""
    student, prefixes = make_student(torch.float64), global_batch(store)
    total = torch.zeros((), dtype=torch.float64)
    for batch in rank_batches(Source.of(store), prefixes, num_ranks, rank, budget, 47, []):
        loss = student(batch).loss / num_positions(prefixes)
        loss.backward()
        total += loss.detach()
    gradients = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in student.named_parameters()}
    if num_ranks > 1:
        for tensor in (total, *gradients.values()):
            torch.distributed.all_reduce(tensor)
    return float(total), gradients


def engine_gradient(store: LogitStore, rank: int, num_ranks: int, budget: int, folder: Path, stage: int) -> Gradient:
    """Loss and gradient by the real engine in float32: its optimizer subtracts the gradient from the weights."""
    path = folder / f"sgd{stage}-{num_ranks}-{rank}.json"
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}
    path.write_text(json.dumps({"zero_optimization": zero, "optimizer": {"type": "SGD", "params": {}},
                                "gradient_clipping": 0.0}))  # fmt: skip
    raw = student_config(folder, "unused", deepspeed=str(path))
    student = make_student(torch.float32)
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    engine, prefixes = Engine(student, deepspeed_config(TrainConfig(**raw))), global_batch(store)
    batches = list(rank_batches(Source.of(store), prefixes, num_ranks, rank, budget, 47, []))
    rate = 2.0**14  # so large that the gradient is not lost in rounding weights
    step = engine.step(batches, num_positions(prefixes), rate)
    with engine.whole_weights():
        after = {name: p.detach().clone() for name, p in engine.module.named_parameters()}
    assert step.applied
    if rank != 0:  # it has parts of the weights
        return step.terms["loss"], {}
    gradients = {name: (before[name] - after[name]) / rate for name in before}
    whole = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert step.gradient_norm == pytest.approx(float(whole), rel=1e-5)
    return step.terms["loss"], gradients


def first_steps(folder: Path, name: str, ranks: str, store: str) -> dict[str, Any]:
    """The config of a run that begins on one number of ranks and goes on with another."""
    path = folder / f"{name}.json"
    return student_config(folder / f"{name}-{ranks}", store, deepspeed=str(path), schedule={"total_tokens": 1200})


def what_two_ranks_do(rank: int, folder: Path, url: str, damaged: str) -> None:
    store = LogitStore.open(url)
    found: dict[Any, Gradient] = {}
    for budget in BUDGETS:
        found["exact", budget] = exact_gradient(store, rank, 2, budget)
    for stage in STAGES:
        found[stage] = engine_gradient(store, rank, 2, 60, folder, stage)
    if rank == 0:
        torch.save(found, folder / "gradients.pt")
    for name in DOWN:
        assert not run_here(first_steps(folder, name, "down", url), StopAfter(3))
    for name in UP:
        assert run_here(first_steps(folder, name, "up", url))
    run_here(student_config(folder / "together", url), StopAfter(2 if rank == 1 else 1_000_000))
    with noted(folder / f"error{rank}.txt"):
        run_here(student_config(folder / "damaged", damaged))
    with noted(folder / f"held-out-error{rank}.txt"), held_out_is_damaged() if rank == 1 else nullcontext():
        run_here(student_config(folder / "held-out", url, schedule={"total_tokens": 600}))


@contextmanager
def noted(path: Path) -> Iterator[None]:
    """Write down the error that ends the block."""
    try:
        yield
    except Exception as error:  # noqa: BLE001  (the test looks at what it was)
        path.write_text(f"{type(error).__name__}: {error}")


@pytest.fixture(scope="module")
def pair(store: LogitStore, one_rank: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two ranks did, with runs that one rank began."""
    folder = tmp_path_factory.mktemp("pair")
    for name, deepspeed in {**DOWN, **UP}.items():
        (folder / f"{name}.json").write_text(json.dumps(deepspeed))
    for name in UP:
        run_here(first_steps(folder, name, "up", store.storage.root), StopAfter(3))
    damaged = damage_what_comes_late(store, folder / "damaged-store")
    on_two_ranks(partial(what_two_ranks_do, folder=folder, url=store.storage.root, damaged=damaged))
    return folder


def damage_what_comes_late(store: LogitStore, copy: Path) -> str:
    """Flip a bit of the block that is read last of all in the 20 steps of `student_config`."""
    from logit_store.config import parse_config
    from training.prepare import prepare

    config = parse_config(TrainConfig, student_config("unused", store.storage.root), "test")
    plan, cursor = prepare(config).plan, Cursor()
    first_use: dict[tuple[int, int], int] = {}
    while cursor.tokens_seen < 3800:
        prefixes, _, cursor = plan.next(cursor)
        for prefix in prefixes:
            first_use.setdefault(store._find(prefix.row)[:2], cursor.step)
    shard, block = max(first_use, key=first_use.__getitem__)
    assert first_use[shard, block] > 2, "some steps come before"
    shutil.copytree(store.storage.root, copy)
    path = copy / store.shard_name(shard)
    data, inner = bytearray(path.read_bytes()), store._shard(shard)._block(block).to_pybytes()
    data[data.index(inner) + len(inner) // 2] ^= 1
    path.write_bytes(data)
    return str(copy)


def assert_close(found: Gradient, expected: Gradient, tolerance: float) -> None:
    """Relative distance of losses and of each parameter's gradient."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, gradient in expected[1].items():
        distance = float((found[1][name].double() - gradient.double()).norm() / gradient.double().norm())
        assert distance <= tolerance, (name, distance)


@pytest.fixture(scope="module")
def exact(store: LogitStore) -> Gradient:
    return exact_gradient(store, 0, 1, BUDGETS[-1])


def test_any_padding_and_accumulation_give_one_gradient(store: LogitStore, exact: Gradient) -> None:
    for budget in BUDGETS[:-1]:
        assert_close(exact_gradient(store, 0, 1, budget), exact, 1e-10)


@pytest.mark.parametrize("budget", BUDGETS)
def test_two_ranks_give_the_gradient_of_one(pair: Path, exact: Gradient, budget: int) -> None:
    assert_close(torch.load(pair / "gradients.pt")["exact", budget], exact, 1e-10)


@pytest.mark.parametrize("stage", STAGES)
def test_the_engine_gives_the_exact_gradient_at_every_stage(
    pair: Path, store: LogitStore, one_rank: None, exact: Gradient, tmp_path: Path, stage: int
) -> None:
    assert_close(torch.load(pair / "gradients.pt")[stage], exact, 1e-5)
    assert_close(engine_gradient(store, 0, 1, 90, tmp_path, stage), exact, 1e-5)


@pytest.mark.parametrize(("name", "ranks"), [("one_bf16", "down"), ("three", "down"), ("two", "up"), ("three", "up")])
def test_a_run_goes_on_with_another_number_of_ranks(
    pair: Path, store: LogitStore, one_rank: None, name: str, ranks: str
) -> None:
    config = first_steps(pair, name, ranks, store.storage.root)
    if ranks == "down":
        assert json.loads((Path(config["run"]["path"]) / "checkpoint.json").read_text())["ranks"] == 2
        assert run_here(config)
    quiet = pair / f"{name}-quiet"
    if not quiet.exists():
        assert run_here({**config, "run": {"path": str(quiet)}})
    assert_same_run(Path(config["run"]["path"]), quiet, 1e-2 if "bf16" in name else 1e-5)


def test_ranks_stop_together_when_one_is_asked(pair: Path) -> None:
    pointer = json.loads((pair / "together" / "checkpoint.json").read_text())
    assert pointer["cursor"]["step"] == 2 == len(metrics(pair / "together"))


def test_a_shard_damaged_in_the_middle_stops_all_ranks_with_a_checkpoint(
    pair: Path, store: LogitStore, one_rank: None, tmp_path: Path
) -> None:
    errors = [(pair / f"error{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("AgreedError: ")
    assert str(pair / "damaged-store" / "shards") in errors[0]
    assert "is damaged: the checksum of block" in errors[0]
    steps = len(metrics(pair / "damaged"))
    assert f"The run is saved at step {steps}" in errors[0]
    shutil.rmtree(pair / "damaged-store")
    shutil.copytree(store.storage.root, pair / "damaged-store")  # mended
    config = student_config(pair / "damaged", str(pair / "damaged-store"))
    assert run_here(config)
    assert run_here({**config, "run": {"path": str(tmp_path / "quiet")}})
    assert_same_run(pair / "damaged", tmp_path / "quiet", 1e-5)


def test_held_out_rows_that_one_rank_cannot_read_stop_all_of_them(pair: Path) -> None:
    errors = [(pair / f"held-out-error{rank}.txt").read_text() for rank in (0, 1)]
    assert errors[0] == errors[1]
    assert errors[0].startswith("AgreedError: the checksum of block 7. The run is saved at step")
    assert (pair / "held-out" / "checkpoint.json").exists()
