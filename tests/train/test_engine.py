"""The engine and its config: what passes through, what is refused, what happens to numbers that are none."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from logit_store import LogitStore
from logit_store.errors import ConfigError, StudentError
from tests.students import LLAMA, StopAfter, metrics, run_here, student_config
from training.config import LossConfig, StudentConfig, TrainConfig
from training.curriculum.batches import Prefix
from training.data.micro_batch import rank_batches
from training.data.source import Source
from training.engine import Engine, Update
from training.engine_config import decisive_part, deepspeed_config
from training.stop import AgreedError
from training.students.models import build_student
from training.students.student import Student

BF16 = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}}
FP16 = {"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}


def completed(folder: Path, user: dict[str, Any], **sections: Any) -> dict[str, Any]:
    """The whole DeepSpeed config of a run with this JSON."""
    path = folder / "ds.json"
    path.write_text(json.dumps(user))
    return deepspeed_config(TrainConfig(**student_config(folder, "unused", deepspeed=str(path), **sections)))


def make_engine(folder: Path, user: dict[str, Any], scale: float = 1.0, clipping: float = 1.0) -> Engine:
    model = build_student(StudentConfig(config=LLAMA), 400, 48, seed=3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    config = completed(folder, user, optimizer={"gradient_clipping": clipping})
    return Engine(Student(model, 400, LossConfig(alpha=0.7)), config)


def batches_of(store: LogitStore, budget: int) -> tuple[list[Any], int]:
    prefixes = [Prefix(int(row), int(store.lengths_N[row]) - 1) for row in store.rows("train")[:12]]
    return list(rank_batches(Source.of(store), prefixes, 1, 0, budget, 47, [])), sum(
        prefix.positions for prefix in prefixes
    )


def weights_of(engine: Engine) -> torch.Tensor:
    """All weights as the engine computes with them, flat, in float32."""
    with engine.whole_weights():
        return torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])


# Config


def test_auto_takes_what_the_run_says(tmp_path: Path) -> None:
    params = {"lr": "auto", "betas": "auto", "weight_decay": 0.3, "torch_adam": True}
    user = {"train_batch_size": "auto", "gradient_clipping": "auto", "optimizer": {"type": "AdamW", "params": params}}
    config = completed(tmp_path, user, optimizer={"betas": [0.8, 0.9], "gradient_clipping": 0.5})
    assert config["optimizer"]["params"] == {**params, "lr": 0.0, "betas": [0.8, 0.9]}
    assert config["gradient_clipping"] == 0.5
    assert "train_batch_size" not in config


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"zero_optimization": {"reduce_bucket_size": "auto"}}, r'"auto" leaves zero_optimization.reduce_bucket_size'),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, r"optimizer.params.lr is decided by schedule.lr"),
        ({"optimizer": {"type": "SGD", "params": {}}}, r"brings its own optimizer, and the run's YAML sets one too"),
        ({"gradient_clipping": 2.0}, r"gradient_clipping is in .*ds.json and in the run's YAML \(optimizer\)"),
        ({"checkpoint": {"load_universal": True}}, r"checkpoint.load_universal is decided by the run"),
        ({"bf16": {"enabled": True}}, r"bf16 and fp16 need ZeRO: set zero_optimization.stage to 1 or more"),
        ({"bf16": {"enabled": True}, "zero_optimization": {"stage": "auto"}}, r'"auto" leaves zero_optimization.stage'),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_conflicts_name_both_owners(user: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        completed(tmp_path, user, optimizer={"weight_decay": 0.0, "gradient_clipping": 1.0})


@pytest.mark.parametrize(
    ("user", "message"),
    [
        (
            {"zero_optimization": True},
            r"ds.json: zero_optimization must be an object, not true: write one, or leave it out",
        ),
        ({"zero_optimization": None}, r"zero_optimization must be an object, not null"),
        ({"zero_optimization": {"offload_optimizer": "cpu"}}, r'offload_optimizer must be an object, not "cpu"'),
        ({"zero_optimization": {"stage": "two"}}, r'zero_optimization.stage must be 0, 1, 2 or 3, not "two"'),
        ({"bf16": True}, r"bf16 must be an object, not true"),
        ({"bf16": {"enabled": "true"}}, r'bf16.enabled must be true or false, not "true"'),
        ({"bfloat16": {"enabled": True}}, r"'bfloat16' is an old name of 'bf16': rename it"),
        ({"optimizer": "AdamW"}, r'optimizer must be an object, not "AdamW"'),
        ({"optimizer": {"type": "AdamW", "params": None}}, r"optimizer.params must be an object, not null"),
        ({"checkpoint": None}, r"checkpoint must be an object, not null"),
        ({"data_types": None}, r"data_types must be an object, not null"),
        ({"zero_optimisation": {"stage": 2}}, r"no key 'zero_optimisation', did you mean 'zero_optimization'\?"),
    ],
    ids=str,
)
def test_what_deepspeed_would_misread_is_refused(user: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        completed(tmp_path, user)


@pytest.mark.parametrize(
    ("user", "message"),
    [
        ({"optimizer": {"type": "AdmW", "params": {}}}, "AdmW is not a supported DeepSpeed Optimizer"),
        ({"optimizer": {"type": "AdamW", "params": {"torch_adam": True, "bettas": [1, 2]}}}, "argument 'bettas'"),
        ({"zero_optimization": {"stage": 2, "reduce_buckt_size": 5}}, "reduce_buckt_size Extra inputs"),
        ({"aio": True}, "'bool' object"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_deepspeed_refuses_is_one_line(one_rank: None, tmp_path: Path, user: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"DeepSpeed refuses its config: .*{message}"):
        make_engine(tmp_path, user)


def test_an_optimizer_that_has_to_be_compiled_needs_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    user: dict[str, Any] = {"optimizer": {"type": "AdamW", "params": {"betas": [0.9, 0.99]}}}
    with pytest.raises(ConfigError, match=r'there is no C\+\+ compiler here.*"torch_adam": true'):
        completed(tmp_path, user)
    user["optimizer"]["params"]["torch_adam"] = True
    assert completed(tmp_path, user)["optimizer"] == user["optimizer"]


def test_whether_operations_are_fused_decides_no_run(tmp_path: Path) -> None:
    """So that runs go on which began before they were."""
    config = completed(tmp_path, {"zero_optimization": {"stage": 2}})
    plain = {key: value for key, value in config["optimizer"]["params"].items() if key != "fused"}
    assert len(plain) == len(config["optimizer"]["params"]) - 1
    assert decisive_part(config) == {**config, "optimizer": {"type": "AdamW", "params": plain}}


# Precision


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_gradients_accumulate_in_float32(store: LogitStore, one_rank: None, tmp_path: Path, stage: int) -> None:
    """64 times one micro-batch is that micro-batch, which no sum in bf16 finds; and the loss is float32."""
    batch, positions = batches_of(store, 1)[0][0], 40
    moved, losses = [], []
    for times in (1, 64):
        user = {**BF16, "zero_optimization": {"stage": stage}, "optimizer": {"type": "SGD", "params": {}}}
        engine = make_engine(tmp_path, user, clipping=0.0)
        assert {p.dtype for p in engine.module.parameters()} == {torch.bfloat16}
        before = weights_of(engine)
        losses.append(engine.step([batch] * times, positions * times, 2.0**14).terms["loss"])
        moved.append(weights_of(engine) - before)
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
    assert losses[0] != float(torch.tensor(losses[0]).bfloat16())
    assert float((moved[0] - moved[1]).norm() / moved[0].norm()) < 1e-6


def test_a_float16_overflow_skips_the_step_and_halves_the_scale(
    store: LogitStore, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # DeepSpeed knows no fp16 on this CPU, but torch does: enough to see what becomes of an overflow.
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

    monkeypatch.setattr(CPU_Accelerator, "is_fp16_supported", lambda _self: True)
    user = {**FP16, "fp16": {"enabled": True, "initial_scale_power": 24, "hysteresis": 1}}
    engine, (batches, positions) = make_engine(tmp_path, user, scale=50.0), batches_of(store, 200)
    before = weights_of(engine)
    steps: list[Update] = []
    while not steps or not steps[-1].applied:
        scale = engine.engine.optimizer.cur_scale
        steps.append(engine.step(batches, positions, 0.01))
        assert torch.equal(weights_of(engine), before) == (not steps[-1].applied)
        assert engine.engine.optimizer.cur_scale == (scale if steps[-1].applied else scale / 2)
    assert len(steps) > 1
    assert all(math.isinf(step.gradient_norm) and math.isfinite(step.terms["loss"]) for step in steps[:-1])
    exact, (batch, _) = make_engine(tmp_path, {}, scale=50.0), batches_of(store, 200)
    assert steps[-1].gradient_norm == pytest.approx(exact.step(batch, positions, 0.0).gradient_norm, rel=0.02)


def test_an_optimizer_on_the_cpu_is_the_same_run(store: LogitStore, one_rank: None, tmp_path: Path) -> None:
    here = {"zero_optimization": {"stage": 2}}
    there = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    for name, user in (("here", here), ("there", there)):
        (tmp_path / f"{name}.json").write_text(json.dumps(user))
        path = str(tmp_path / f"{name}.json")
        run_here(student_config(tmp_path / name, store.storage.root, deepspeed=path, schedule={"total_tokens": 1000}))
    for a, b in zip(metrics(tmp_path / "here"), metrics(tmp_path / "there"), strict=True):
        assert a.get("loss") == (pytest.approx(b["loss"], rel=1e-5) if "loss" in b else None)


def test_gradient_checkpointing_changes_nothing(store: LogitStore, one_rank: None, tmp_path: Path) -> None:
    for name, recompute in (("kept", False), ("recomputed", True)):
        student = {"config": LLAMA, "gradient_checkpointing": recompute}
        run_here(student_config(tmp_path / name, store.storage.root, student=student, schedule={"total_tokens": 600}))
    assert metrics(tmp_path / "kept") == metrics(tmp_path / "recomputed")


def test_a_checkpoint_that_other_ranks_cannot_load_is_refused(one_rank: None, tmp_path: Path) -> None:
    engine = make_engine(tmp_path, {"zero_optimization": {"stage": 2}, "optimizer": {"type": "SGD", "params": {}}})
    engine.save(tmp_path, "step1")
    with pytest.raises(StudentError, match=r"is of 2 ranks.* not of SGD. Go on with the 2 ranks"):
        engine.load(tmp_path, "step1", 2)


@pytest.mark.parametrize("stage", [0, 2])
def test_a_save_takes_nothing_over_from_one_that_was_killed(one_rank: None, tmp_path: Path, stage: int) -> None:
    """Of more ranks, for one: its files would be read as part of the checkpoint when the ranks change again."""
    engine = make_engine(tmp_path, {"zero_optimization": {"stage": stage}})
    engine.save(tmp_path, "clean")
    for name in ("step1", "step1_universal"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "zero_pp_rank_1_mp_rank_00_optim_states.pt").write_bytes(b"half")
    engine.save(tmp_path, "step1")
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("step1", "clean")]
    assert names[0] == names[1]
    assert not (tmp_path / "step1_universal").exists()


def test_no_gpu_ever_holds_more_than_a_parameter_to_save_a_student(
    one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepspeed

    gathered: list[int] = []

    class Counted(deepspeed.zero.GatheredParameters):
        def __enter__(self) -> None:
            gathered.append(len(self.params))
            super().__enter__()

    zero = {"stage": 3, "stage3_param_persistence_threshold": 0}
    whole, split = make_engine(tmp_path, {}), make_engine(tmp_path, {"zero_optimization": zero})
    monkeypatch.setattr(deepspeed.zero, "GatheredParameters", Counted)
    assert torch.equal(weights_of(split), weights_of(whole))
    assert gathered == [1] * len(list(split.module.parameters()))
    assert {p.numel() for p in split.module.parameters()} == {0}, "they are split again"


# Numbers that are none


def test_a_loss_that_is_not_finite_names_its_rows_and_spares_the_weights(
    store: LogitStore, tokenizer: Path, one_rank: None, tmp_path: Path
) -> None:
    """The student knows no number for one token: rows with it are to blame, and their micro-batch alone is named."""
    from transformers import AutoTokenizer

    folder = tmp_path / "student"
    build_student(StudentConfig(config=LLAMA), 400, 48, seed=3).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    token = int(store[int(store.rows("train")[40])].tokens.input_ids_T[5])
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = math.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = student_config(
        tmp_path / "run", store.storage.root, student={"config": None, "model": str(folder)},
        schedule={"micro_batch_tokens": 1, "total_tokens": 50_000}, checkpoint={"every_tokens": 1},
        evaluation={"max_rows": 2},
    )  # fmt: skip
    with pytest.raises(StudentError, match="the loss is not finite at step") as caught:
        run_here(config)
    rows = json.loads(str(caught.value).split("rows of the batch: ")[1])
    assert rows
    assert all(token in store[row].tokens.input_ids_T for row in rows)
    last = metrics(tmp_path / "run")[-1]
    assert math.isnan(last["loss"])
    assert last["skipped"] == 1.0
    pointer = tmp_path / "run" / "checkpoint.json"
    assert not pointer.exists() or json.loads(pointer.read_text())["cursor"]["step"] == last["step"] - 1


@pytest.mark.parametrize("user", [{}, *({**BF16, "zero_optimization": {"stage": stage}} for stage in (1, 2, 3)),
                                  {"zero_optimization": {"stage": 2}}])  # fmt: skip
def test_a_gradient_that_is_not_finite_names_the_rows_of_its_step(
    store: LogitStore, one_rank: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, user: dict[str, Any]
) -> None:
    """√0 is a number, and its slope is none."""

    def steep(student: Student, batch: Any) -> Any:
        sums: Any = forward(student, batch)
        return sums._replace(loss=sums.loss + (sums.loss * 0).sqrt())

    forward = Student.forward
    (tmp_path / "ds.json").write_text(json.dumps(user))
    config = student_config(tmp_path / "run", store.storage.root, deepspeed=str(tmp_path / "ds.json"))
    assert not run_here(config, StopAfter(1))
    monkeypatch.setattr(Student, "forward", steep)
    with pytest.raises(AgreedError, match="the gradient is not finite, although the loss is, at step 2") as caught:
        run_here(config)
    rows = json.loads(str(caught.value).split("rows of the batch: ")[1])
    assert rows
    assert set(rows) <= set(store.rows("train").tolist())
    last = metrics(tmp_path / "run")[-1]
    assert (last["step"], math.isfinite(last["loss"]), math.isfinite(last["gradient_norm"])) == (2, True, False)
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["cursor"]["step"] == 1
