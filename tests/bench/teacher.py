"""The transformers teacher beside the bare forward pass of the same model, and every kind of target beside top-k.

    python -m tests.bench.teacher [THREADS]    # measures, prints a table, writes docs/benchmarks/teacher.csv

A random Qwen3-type model: of 110M parameters, V = 32,768, rows of 512 tokens, float32 on a CPU; of the shape of
Qwen3-1.7B (V = 151,936), rows of 2,048 tokens, bfloat16 on a GPU, written to teacher-gpu.csv. "bare" is what no teacher
can leave out: the decoder, and one matrix product of all its hidden states with the whole LM head. In each round every
way runs once, so that a busy machine slows them down alike; a figure is the median of the rounds' ratios.
"""

import csv
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from cluster.config import TargetsConfig, TeacherConfig
from cluster.teachers.targets import Selector
from cluster.teachers.transformers_teacher import TransformersTeacher
from tests.bench.machine import about, device, result_path, settled

ROUNDS = 7
KINDS: dict[str, dict[str, Any]] = {
    "top_k 64": {"k": 64},
    "top_p 0.95, at most 64": {"kind": "top_p", "p": 0.95, "k": 64},
    "counts 50": {"kind": "counts", "draws": 50},
    "threshold 0.02": {"kind": "threshold", "tau": 0.02},
    "threshold 0.02, T = 2": {"kind": "threshold", "tau": 0.02, "temperatures": [2.0]},
}


class Size(NamedTuple):
    """A model and its batch."""

    vocabulary: int
    row_tokens: int
    rows: int
    dtype: Literal["float32", "bfloat16"]
    model: dict[str, int]


SIZES = {
    "cpu": Size(32_768, 512, 2, "float32", {
        "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12,
        "num_key_value_heads": 12, "head_dim": 64,
    }),
    "cuda": Size(151_936, 2048, 8, "bfloat16", {
        "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "num_attention_heads": 16,
        "num_key_value_heads": 8, "head_dim": 128,
    }),
}  # fmt: skip
SIZE = SIZES[device()]


class Figure(NamedTuple):
    """Throughput of a way, alone and beside others."""

    way: str
    tokens_per_s: float
    of_bare: float
    of_top_k: float
    forward: float
    """Share of the time in the decoder; the rest is LM head and choice of targets."""


def main() -> None:
    """Measure, print, write."""
    threads = int(sys.argv[1]) if len(sys.argv) > 1 else os.cpu_count() or 1
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        num_parameters = save_model(Path(folder))
        config = TeacherConfig(model="", dtype=SIZE.dtype, batch_tokens=SIZE.rows * SIZE.row_tokens)
        teacher = TransformersTeacher(Path(folder), config, _selector("top_k 64"), device())
    figures = measure(teacher)
    tokens = SIZE.rows * SIZE.row_tokens
    print(f"{num_parameters / 1e6:.0f}M parameters, {SIZE.dtype}, V = {SIZE.vocabulary:,}, {tokens:,} tokens at once")
    print(f"{'':24} {'tok/s':>8} {'of bare':>8} {'of top-k':>9} {'decoder':>8}")
    for way, *numbers in figures:
        print("{:24} {:8.0f} {:8.3f} {:9.3f} {:8.2f}".format(way, *numbers))
    stamp = about("torch", "transformers")
    with open(result_path("teacher"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*Figure._fields, "parameters", "vocabulary", "tokens", "threads", *stamp])
        for way, *values in figures:
            rounded = [round(value, 3) for value in values]
            writer.writerow([way, *rounded, num_parameters, SIZE.vocabulary, tokens, threads, *stamp.values()])


def measure(teacher: TransformersTeacher) -> list[Figure]:
    """Time the bare forward pass, and the teacher with each kind of target, in turns."""
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, SIZE.vocabulary, SIZE.row_tokens).astype(np.int32) for _ in range(SIZE.rows)]
    seconds: dict[str, list[float]] = defaultdict(list)
    in_decoder: dict[str, float] = defaultdict(float)
    for turn in range(1 + ROUNDS):
        for name in ("bare", *KINDS):
            started = time.perf_counter()
            if name == "bare":
                bare(teacher, rows)
            else:
                teacher.selector = _selector(name)
                teacher.score(rows, range(SIZE.rows))
            settled()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
                in_decoder[name] += teacher.phases.take().get("forward", 0.0)
        teacher.phases.take()
    return [_figure(name, seconds, in_decoder[name]) for name in seconds]


def _figure(name: str, seconds: dict[str, list[float]], in_decoder: float) -> Figure:
    def of(other: str) -> float:
        return statistics.median(theirs / ours for theirs, ours in zip(seconds[other], seconds[name], strict=True))

    tokens_per_s = SIZE.rows * SIZE.row_tokens / statistics.median(seconds[name])
    return Figure(name, tokens_per_s, of("bare"), of("top_k 64"), in_decoder / sum(seconds[name]))


@torch.inference_mode()
def bare(teacher: TransformersTeacher, rows: list[np.ndarray]) -> None:
    """The decoder and the LM head in the model's own dtype, over rows of one length."""
    ids_BT = torch.from_numpy(np.stack(rows).astype(np.int64)).to(device())
    hidden_BTD = teacher.decoder(input_ids=ids_BT, use_cache=False).last_hidden_state
    torch.nn.functional.linear(hidden_BTD, teacher.model.lm_head.weight)


def save_model(folder: Path) -> int:
    """Write the model; how many parameters it has."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=SIZE.vocabulary, max_position_embeddings=SIZE.row_tokens + 1, tie_word_embeddings=True, **SIZE.model
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(device()):
        model = Qwen3ForCausalLM(config).to(getattr(torch, SIZE.dtype))
    model.save_pretrained(folder)
    return int(model.num_parameters())


def _selector(kind: str) -> Selector:
    return Selector(TargetsConfig(**KINDS[kind]), SIZE.vocabulary, "labels")


if __name__ == "__main__":
    main()
