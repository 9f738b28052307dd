"""Memory and time of a student's loss: cached labels beside cross-entropy and dense distillation.

    python -m tests.bench.loss              # measures, prints a table, writes docs/benchmarks/loss.csv

`memory`: peak resident memory of a process of its own while a loss and its gradients are computed from hidden states
and head, less what it held before. `loss`: the CPU time of the same. `step`: the time of forward and backward pass of a
model whose head is not the whole cost. The ways of a part take turns, so that all see the same machine; ratios are
medians over rounds of the ratio to `chunked ce`, the cross-entropy that one would write by hand.
"""

import csv
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.machine import about

K, HIDDEN = 64, 64
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "loss.csv"
WAYS = ("chunked ce", "fused ce", "fused kd", "fused kd, T = 2", "fused jsd", "dense kd")
LARGE, SMALL = 151_936, 32_768
MEMORY = [("chunked ce", 8192), ("fused kd", 8192), ("fused ce", 8192), ("fused kd, T = 2", 8192), ("dense kd", 512)]
ROUNDS = 5


def main() -> None:
    """Measure every case; memory each in its own process. The file is written after each part."""
    rows: list[list[Any]] = []
    for part, vocabulary, positions, works in (
        ("loss", LARGE, 256, loss_works(LARGE, 256, WAYS)),
        ("step", SMALL, 512, step_works(SMALL, 512, WAYS[:4])),
    ):
        for way, seconds, ratio in timed(works):
            rows.append([part, way, vocabulary, positions, round(seconds, 4), "CPU s", round(ratio, 3)])
            print(*rows[-1], flush=True)
        write(rows)
    plain = 0.0
    for way, positions in MEMORY:
        command = [sys.executable, "-m", "tests.bench.loss", way, str(positions)]
        mebibytes = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
        plain = plain or mebibytes
        of_plain = round(mebibytes / plain, 3) if positions == MEMORY[0][1] else ""
        rows.append(["memory", way, LARGE, positions, round(mebibytes), "MiB", of_plain])
        print(*rows[-1], flush=True)
        write(rows)


def write(rows: list[list[Any]]) -> None:
    """The results so far."""
    stamp = about("torch", "transformers")
    with open(RESULT, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["part", "way", "vocabulary", "positions", "value", "unit", "of_chunked_ce", "k", *stamp])
        writer.writerows([*row, K, *stamp.values()] for row in rows)


def timed(works: dict[str, Callable[[], Any]]) -> list[tuple[str, float, float]]:
    """Median CPU seconds of each work, and the median over rounds of its ratio to the first."""
    seconds_RW = np.zeros((ROUNDS, len(works)))
    for r in range(-1, ROUNDS):  # the first round warms up
        for w, work in enumerate(works.values()):
            start = time.process_time()
            work()
            if r >= 0:
                seconds_RW[r, w] = time.process_time() - start
    ratios_RW = seconds_RW / seconds_RW[:, :1]
    return list(zip(works, np.median(seconds_RW, 0), np.median(ratios_RW, 0), strict=True))


def loss_works(vocabulary: int, positions: int, ways: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """The loss and its gradients by each way, from random hidden states and a random head."""
    import torch

    hidden_ND = torch.randn(positions, HIDDEN, requires_grad=True)
    weight_WD = (torch.randn(vocabulary, HIDDEN) * 0.1).requires_grad_()
    targets, next_ids_N = labels(vocabulary, positions)

    def work(way: str) -> Callable[[], Any]:
        def run() -> None:
            hidden_ND.grad = weight_WD.grad = None
            loss_of(way, hidden_ND, weight_WD, next_ids_N, targets).backward()

        return run

    return {way: work(way) for way in ways}


def step_works(vocabulary: int, positions: int, ways: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Forward and backward pass of a model of eight layers."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=positions, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    targets, next_ids_N = labels(vocabulary, positions)
    ids_BL = torch.randint(0, vocabulary, (4, positions // 4))

    def work(way: str) -> Callable[[], Any]:
        def run() -> None:
            model.zero_grad(set_to_none=True)
            hidden_ND = model.model(input_ids=ids_BL, use_cache=False).last_hidden_state.flatten(0, 1)
            loss_of(way, hidden_ND, model.lm_head.weight, next_ids_N, targets).backward()

        return run

    return {way: work(way) for way in ways}


def labels(vocabulary: int, positions: int) -> tuple[Any, Any]:
    """Labels with heads of K entries that hold 90 % of the mass, and next tokens."""
    import torch

    from training.losses import SparseTargets

    logprobs_NK = torch.randn(positions, K).log_softmax(-1) - 0.1
    tail_N = torch.full((positions,), -2.3522)  # log(1 − exp(−0.1))
    some = torch.stack([torch.randperm(vocabulary)[:K].sort().values for _ in range(32)])
    ids_NK = some.repeat(-(-positions // 32), 1)[:positions]
    log_partition_N1 = (logprobs_NK / 2).logsumexp(-1, keepdim=True) + 0.2
    next_ids_N = torch.randint(0, vocabulary, (positions,))
    return SparseTargets.of_heads(ids_NK, logprobs_NK, tail_N - 5, tail_N, log_partition_N1), next_ids_N


def loss_of(way: str, hidden_ND: Any, weight_WD: Any, next_ids_N: Any, targets: Any) -> Any:
    """The loss by one way, ready for its backward pass."""
    import torch
    from torch.nn.functional import cross_entropy, linear
    from torch.utils.checkpoint import checkpoint

    from training.losses import Objective, WeightedTargets, linear_losses, soft_losses
    from training.losses.fused import default_chunk

    chunk, vocabulary = default_chunk(weight_WD), len(weight_WD)
    if way == "chunked ce":

        def of_chunk(part_CD: Any, ids_C: Any) -> Any:
            return cross_entropy(linear(part_CD, weight_WD), ids_C, reduction="sum")

        parts = zip(hidden_ND.split(chunk), next_ids_N.split(chunk), strict=True)
        return torch.stack([checkpoint(of_chunk, *part, use_reentrant=False) for part in parts]).sum()
    if way == "dense kd":
        logits_NV = linear(hidden_ND, weight_WD)
        ce = cross_entropy(logits_NV, next_ids_N, reduction="sum")
        return 0.9 * soft_losses(logits_NV, next_ids_N, targets, Objective(vocabulary)).sum() + 0.1 * ce
    objective = {
        "fused ce": Objective(vocabulary, alpha=0.0),
        "fused kd": Objective(vocabulary, alpha=0.9),
        "fused kd, T = 2": Objective(vocabulary, alpha=0.9, temperature=2.0, stored=(2.0,)),
        "fused jsd": Objective(vocabulary, alpha=0.9, divergence="jsd"),
    }[way]
    teachers = [WeightedTargets(1.0, targets)]
    return linear_losses(hidden_ND, weight_WD, None, lambda x: x, next_ids_N, teachers, objective)[0]


def peak_mebibytes(way: str, positions: int) -> float:
    """Peak MiB above the start."""
    work = loss_works(LARGE, positions, (way,))[way]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(peak_mebibytes(sys.argv[1], int(sys.argv[2])))
    else:
        main()
