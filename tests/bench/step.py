"""A step on cached labels beside the same step with plain cross-entropy, and what feeds it, in one process.

    python -m tests.bench.step            # measures, prints a table, writes docs/benchmarks/step.csv

The real engine (DeepSpeed, one rank) trains one model; steps with labels (k = 64, forward KL and cross-entropy, read
from a store on disk and decoded while the student computes) and steps without take turns on the same batches, in orders
that alternate. The head is a modest share of the model, as in a student. On a CPU the student computes on one core, so
that another is free to read; CPU seconds are those of all threads, reading included: what labels cost where no core is
free.
On a GPU (step-gpu.csv) the student has the shape of Qwen3-0.6B, in bfloat16. The pipeline is then read alone, with one
and with two threads, as fast as it goes. Labels are synthetic (see synthetic.py).
"""

import csv
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from logit_store import LogitRow, LogitStore, Targets, TokenRow
from tests.bench.machine import about, device, result_path, settled
from tests.bench.synthetic import dense_logprobs
from tests.store.made import write_store
from training.config import LossConfig, TrainConfig
from training.curriculum.batches import BatchPlan, Cursor
from training.data.feed import Feed
from training.data.source import Source
from training.engine import Engine, process_group
from training.engine_config import deepspeed_config
from training.students.models import build_student
from training.students.student import Student
from training.watching.flops import model_flops

ROOT = Path(__file__).parents[2]
K, WARM_UP = 64, 2


class Size(NamedTuple):
    """A student and its steps."""

    vocabulary: int
    row_tokens: int
    num_rows: int
    tokens_per_step: int
    pairs: int
    deepspeed: str
    model: dict[str, Any]


SIZES = {
    "cpu": Size(8_192, 257, 24, 512, 10, "zero1", {
        "model_type": "llama", "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
        "num_attention_heads": 8, "num_key_value_heads": 4,
    }),
    "cuda": Size(151_936, 2049, 16, 16_384, 15, "zero2", {
        "model_type": "qwen3", "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    }),
}  # fmt: skip
SIZE = SIZES[device()]
V, T = SIZE.vocabulary, SIZE.row_tokens


def make_store(folder: Path) -> LogitStore:
    """Rows of T tokens, each drawn from its labels."""
    rng = torch.Generator(device()).manual_seed(1)
    rows: list[LogitRow] = []
    for i in range(SIZE.num_rows):
        logprobs_PV = torch.cat(list(dense_logprobs(T - 1, V, seed=i, device=device())))
        next_P1 = torch.multinomial(logprobs_PV.exp(), 1, generator=rng)
        top_PK, ids_PK = logprobs_PV.topk(K, dim=-1)
        tail_P = logprobs_PV.scatter(-1, ids_PK, -torch.inf).scatter(-1, next_P1, -torch.inf).logsumexp(-1)
        next_logprob_P = logprobs_PV.gather(-1, next_P1)[:, 0]
        tokens = np.concatenate([[0], next_P1[:, 0].cpu().numpy()]).astype(np.int32)
        targets = Targets.of_heads(*(x.cpu().numpy() for x in (ids_PK, top_PK, next_logprob_P, tail_P)))
        rows.append(LogitRow(TokenRow(i, "train", tokens), targets))
    shards = [rows[i : i + 4] for i in range(0, SIZE.num_rows, 4)]
    return write_store(str(folder / "store"), shards, vocabulary_size=V, k=K, temperatures=[])


def make_config(store: LogitStore, **data: Any) -> TrainConfig:
    return TrainConfig.model_validate({
        "run": {"path": "none"},
        "data": {"store": store.storage.url, **data},
        "student": {"config": {**SIZE.model, "max_position_embeddings": T}},
        "loss": {"alpha": 0.9, "tail": "ghost"},
        "schedule": {"total_tokens": 10**9, "tokens_per_step": SIZE.tokens_per_step, "lr": 1e-4,
                     "micro_batch_tokens": SIZE.tokens_per_step},
        "deepspeed": str(ROOT / "configs" / "deepspeed" / f"{SIZE.deepspeed}.json"),
    })  # fmt: skip


def make_feed(config: TrainConfig, source: Source) -> Feed:
    rows_N = source.rows("train")
    plan = BatchPlan(rows_N, source.lengths_N[rows_N], SIZE.tokens_per_step, 0)
    return Feed(config, source, plan, 1, 0)


def time_steps(engine: Engine, config: TrainConfig, source: Source) -> dict[str, list[float]]:
    """Seconds and CPU seconds of each step, waiting for its data included, by what its loss is."""
    losses = {"kd": config.loss, "ce": LossConfig(alpha=0.0)}
    seconds: dict[str, list[float]] = {name: [] for name in ("kd", "ce", "kd_cpu", "ce_cpu", "kd_wait")}
    cursors = {name: Cursor() for name in losses}
    without = config.model_copy(update={"loss": losses["ce"]})
    with make_feed(config, source) as kd, make_feed(without, source) as ce:
        feeds = {"kd": kd, "ce": ce}
        for pair in range(WARM_UP + SIZE.pairs):
            for name in ("kd", "ce") if pair % 2 else ("ce", "kd"):
                engine.module.mixing.loss = losses[name]
                started, cpu = time.perf_counter(), time.process_time()
                step = feeds[name].next(cursors[name])
                engine.step(step.batches, step.cursor.tokens_seen - cursors[name].tokens_seen, 1e-4)
                settled()
                seconds[name].append(time.perf_counter() - started)
                seconds[f"{name}_cpu"].append(time.process_time() - cpu)
                cursors[name] = step.cursor
                print(f"{name} {seconds[name][-1]:.2f} s ({seconds[f'{name}_cpu'][-1]:.2f})", end="  ", flush=True)
                if name == "kd":
                    seconds["kd_wait"].append(step.wait_s)
    return {name: values[WARM_UP:] for name, values in seconds.items()}


def pipeline_rate(config: TrainConfig, source: Source, num_steps: int = 60) -> float:
    """Positions per second of reading, decoding and collating alone."""
    with make_feed(config, source) as feed:
        start = feed.next(Cursor()).cursor
        cursor, started = start, time.perf_counter()
        for _ in range(num_steps):
            cursor = feed.next(cursor).cursor
        return (cursor.tokens_seen - start.tokens_seen) / (time.perf_counter() - started)


def head_share(student: Student) -> float:
    """The head's part of the FLOPs of a step's matrix products."""
    flops = model_flops(student.model)
    assert flops is not None
    return flops.per_loss / (flops.per_position + flops.per_loss)


def main() -> None:
    """Measure and write the table."""
    if device() == "cpu":
        torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = make_store(Path(folder))
        config, source = make_config(store), Source.of(store)
        student = Student(build_student(config.student, V, T - 1, 0), V, config.loss)
        share, parameters = head_share(student), sum(p.numel() for p in student.parameters())
        with process_group():
            seconds = time_steps(Engine(student, deepspeed_config(config)), config, source)
        rates = {n: pipeline_rate(make_config(store, threads=n), source) for n in (1, 2)}
        positions = SIZE.tokens_per_step // (T - 1) * (T - 1)
    kd, ce = (np.percentile(seconds[name], [20, 50, 80]) for name in ("kd", "ce"))
    ratios = np.array(seconds["kd"]) / np.array(seconds["ce"])
    line = {
        "parameters": parameters, "vocabulary": V, "k": K, "head_share": share, "positions": positions,
        **{f"ce_s_p{p}": value for p, value in zip((20, 50, 80), ce, strict=True)},
        **{f"kd_s_p{p}": value for p, value in zip((20, 50, 80), kd, strict=True)},
        "kd_over_ce": kd[1] / ce[1], "kd_over_ce_paired": float(np.median(ratios)),
        "cpu_kd_over_ce": float(np.median(seconds["kd_cpu"]) / np.median(seconds["ce_cpu"])),
        "wait": sum(seconds["kd_wait"]) / sum(seconds["kd"]),
        "student_positions_per_s": positions / kd[1],
        **{f"pipeline_{n}_positions_per_s": rate for n, rate in rates.items()},
        "pipeline_1_over_student": rates[1] * kd[1] / positions,
    }  # fmt: skip
    print()
    for name, value in line.items():
        print(f"{name:28} {value:,.4g}")
    stamp = about("torch", "deepspeed", "transformers")
    with open(result_path("step"), "w", newline="") as file:
        writer = csv.DictWriter(file, [*line, *stamp])
        writer.writeheader()
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in (line | stamp).items()})
    print(f"written to {result_path('step').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
