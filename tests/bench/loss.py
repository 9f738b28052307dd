"""Memory and time of a student's loss: cached labels beside cross-entropy and dense distillation.

    python -m tests.bench.loss              # measures, prints a table, writes docs/benchmarks/loss.csv
    python -m tests.bench.loss memory       # one part; the rows of others stay

`memory`: peak resident memory of a process of its own while a loss and its gradients are computed from hidden states
and head, less what it held right before: the gradients count, hidden states, head and labels do not. `chunked ce` is of
the same dtype and the same chunks, and does not cast its logits to float32, as the others do. `loss`: the CPU time of
the same. `step`: the time of forward and backward pass of a model whose head is not the whole cost. The ways of a part
take turns, so that all see the same machine; ratios are medians over rounds of the ratio to `chunked ce`, the
cross-entropy that one would write by hand.

On a GPU (loss-gpu.csv) everything is in bfloat16, at 8,192 positions and V = 151,936; times are of the wall clock, and
memory is what PyTorch's allocator handed out at most.
"""

import csv
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.machine import about, device, result_path, settled

K = 64
WAYS = ("chunked ce", "fused ce", "fused kd", "fused kd, T = 2", "fused jsd", "dense kd")
LARGE, SMALL = 151_936, 32_768
HIDDEN = {"loss": 64, "step": 512, "memory": 1024}
GPU_HIDDEN = (1024, 4096)
MEMORY = [
    ("bfloat16", 8192, ("chunked ce", "fused kd, T = 2")),
    ("bfloat16", 2048, ("chunked ce", "fused ce", "fused kd", "fused kd, T = 2")),
    ("float32", 2048, ("chunked ce", "fused ce", "fused kd", "fused kd, T = 2")),
]
"""Dtype, positions, ways. The peak grows with positions by the gradient of hidden states alone; 8,192 are there to see
that, in the dtype that trains."""
ROUNDS = 5
COLUMNS = ["part", "way", "vocabulary", "hidden", "dtype", "positions", "value", "unit", "of_chunked_ce", "k"]


def main(parts: Sequence[str]) -> None:
    """Measure the parts. The file is written after each."""
    if device() == "cuda":
        return replace("", list(measure_on_gpu()))
    for part in parts:
        replace(part, list(measure_memory() if part == "memory" else measure_time(part)))


def measure_on_gpu() -> Iterator[list[Any]]:
    """Time and memory of the loss, at the width of a small and of a large student."""
    for hidden in GPU_HIDDEN:
        works = loss_works(LARGE, 8192, WAYS, hidden, "bfloat16")
        for way, seconds, ratio in timed(works):
            yield shown(["loss", way, LARGE, hidden, "bfloat16", 8192, round(1e3 * seconds, 2), "ms", round(ratio, 3)])
        settled()
        del works  # and with them the last gradients
        works = loss_works(LARGE, 8192, WAYS, hidden, "bfloat16")
        plain, held = 0.0, gpu_bytes_held()
        for way, work in works.items():
            mebibytes = (gpu_bytes_at_most(work) - held) / 2**20
            plain = plain or mebibytes
            of_plain = round(mebibytes / plain, 3)
            yield shown(["memory", way, LARGE, hidden, "bfloat16", 8192, round(mebibytes), "MiB", of_plain])


def measure_time(part: str) -> Iterator[list[Any]]:
    """Rows of `loss` or `step`."""
    vocabulary, positions = (LARGE, 256) if part == "loss" else (SMALL, 512)
    works = loss_works(vocabulary, positions, WAYS) if part == "loss" else step_works(vocabulary, positions, WAYS[:4])
    for way, seconds, ratio in timed(works):
        figures = [round(seconds, 4), "CPU s", round(ratio, 3)]
        yield shown([part, way, vocabulary, HIDDEN[part], "float32", positions, *figures])


def measure_memory() -> Iterator[list[Any]]:
    """Rows of `memory`, each measured in a process of its own; the first way is what the others are compared with."""
    for dtype, positions, ways in MEMORY:
        plain = 0.0
        for way in ways:
            command = [sys.executable, "-m", "tests.bench.loss", "memory of", way, dtype, str(positions)]
            mebibytes = float(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.split()[-1])
            plain = plain or mebibytes
            of_plain = round(mebibytes / plain, 3)
            yield shown(["memory", way, LARGE, HIDDEN["memory"], dtype, positions, round(mebibytes), "MiB", of_plain])


def shown(row: list[Any]) -> list[Any]:
    """The row, printed."""
    print(*row, flush=True)
    return row


def replace(part: str, rows: list[list[Any]]) -> None:
    """Put a part's rows into the file, in place of those that it has; without a part, of all."""
    stamp = about("torch", "transformers")
    others: list[list[Any]] = []
    if part and result_path("loss").exists():
        with open(result_path("loss"), newline="") as file:
            others = [row for row in csv.reader(file) if row[0] not in ("part", part)]
    with open(result_path("loss"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*COLUMNS, *stamp])
        writer.writerows(others)
        writer.writerows([*row, K, *stamp.values()] for row in rows)


def timed(works: dict[str, Callable[[], Any]]) -> list[tuple[str, float, float]]:
    """Median CPU seconds (on a GPU: seconds) of each work, and the median over rounds of its ratio to the first."""
    clock = time.perf_counter if device() == "cuda" else time.process_time
    seconds_RW = np.zeros((ROUNDS, len(works)))
    for r in range(-1, ROUNDS):  # the first round warms up
        for w, work in enumerate(works.values()):
            start = clock()
            work()
            settled()
            if r >= 0:
                seconds_RW[r, w] = clock() - start
    ratios_RW = seconds_RW / seconds_RW[:, :1]
    return list(zip(works, np.median(seconds_RW, 0), np.median(ratios_RW, 0), strict=True))


def loss_works(
    vocabulary: int, positions: int, ways: tuple[str, ...], hidden_size: int = HIDDEN["loss"], dtype: str = "float32"
) -> dict[str, Callable[[], Any]]:
    """The loss and its gradients by each way, from random hidden states and a random head."""
    import torch

    like: dict[str, Any] = {"dtype": getattr(torch, dtype), "device": device()}
    hidden_ND = torch.randn(positions, hidden_size, **like).requires_grad_()
    weight_WD = torch.randn(vocabulary, hidden_size, **like).mul_(0.1).requires_grad_()
    with torch.device(device()):
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
        vocab_size=vocabulary, hidden_size=HIDDEN["step"], intermediate_size=1536, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=4, head_dim=64, max_position_embeddings=positions,
        tie_word_embeddings=True,
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


def peak_mebibytes(way: str, dtype: str, positions: int) -> float:
    """Peak MiB above what the process held when the loss began. Linux alone: the kernel is asked to forget the peak of
    before, in which labels were made."""
    loss_works(1024, 2, (way,))[way]()  # what torch loads on first use is no part of the loss
    work = loss_works(LARGE, positions, (way,), HIDDEN["memory"], dtype)[way]
    Path("/proc/self/clear_refs").write_text("5")
    before = of_status("VmRSS")
    work()
    return of_status("VmHWM") - before


def gpu_bytes_held() -> int:
    """Bytes of all tensors on the GPU."""
    import torch

    return int(torch.cuda.memory_allocated())


def gpu_bytes_at_most(work: Callable[[], Any]) -> int:
    """The most that they were while ``work`` ran."""
    import torch

    torch.cuda.reset_peak_memory_stats()
    work()
    return int(torch.cuda.max_memory_allocated())


def of_status(field: str) -> float:
    """A field of the kernel's about this process, in MiB."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found, f"no {field} in /proc/self/status"
    return int(found[1]) / 1024


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory of"]:
        print(peak_mebibytes(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    else:
        main(sys.argv[1:] or ("loss", "step", "memory"))
