"""A whole `decant cache` beside the bare forward pass of its teacher.

    python -m tests.bench.job        # prints the shares of the phases, writes docs/benchmarks/job.csv

One worker with two threads labels random rows with the teacher of tests/bench/teacher.py (110M parameters, V = 32,768,
rows of 512 tokens, k = 64) and writes them, as a user types it. Its rate counts from its first shard to its last: how
long processes take to start is no matter of speed in a job of days. Before and after it, this process times the bare
pass: the decoder, and one matrix product with the LM head, by the same batches. Three rounds, for the machine's moods.
"""

import csv
import json
import statistics
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster.phases import PHASES
from logit_store import TokenRow
from tests.bench import teacher as bench
from tests.bench.machine import about
from tests.toy import DECANT, ROOT, write_tokens, write_yaml

RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "job.csv"
SHARDS, ROWS, BATCH_ROWS, THREADS, ROUNDS = 8, 8, 2, 2, 3


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory(prefix="job") as name:
        config = prepare(Path(name))
        rounds = [measure(config, Path(name) / str(i)) for i in range(ROUNDS)]
    of_bare, rate, bare, phases = sorted(rounds, key=lambda found: found[0])[ROUNDS // 2]
    print(f"decant cache {rate:.0f} tok/s, bare forward pass {bare:.0f} tok/s: {of_bare:.3f}")
    fields: dict[str, Any] = {"tokens_per_s": round(rate, 1), "bare_tokens_per_s": round(bare, 1)}
    fields |= {"of_bare": round(of_bare, 3), "ratios": " ".join(f"{found[0]:.3f}" for found in rounds)}
    fields |= {f"share_{phase}": round(phases[phase], 4) for phase in PHASES}
    fields |= {"vocabulary": bench.V, "row_tokens": bench.T, "threads": THREADS}
    fields |= about("torch", "transformers", "ray")
    with open(RESULT, "w", newline="") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        table.writerow(fields)


def measure(config: Path, store: Path) -> tuple[float, float, float, dict[str, float]]:
    """One job between two rounds of the bare pass: its rate by theirs, its rate, theirs, the shares of its phases."""
    before = bare_tokens_per_s(config.parent / "teacher")
    command = [DECANT, "cache", str(config), f"store.path={store}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stderr[done.stderr.index("this run") :])
    bare = statistics.median([*before, *bare_tokens_per_s(config.parent / "teacher")])
    (log,) = Path(f"{store}.job").glob("log-*.jsonl")
    rate, phases = steady([json.loads(line) for line in log.read_text().splitlines()])
    return rate / bare, rate, bare, phases


def prepare(folder: Path) -> Path:
    """Teacher, tokenizer and token shards in the folder; the config's path."""
    bench.save_model(folder / "teacher")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(bench.V)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w1")
    tokenizer.save_pretrained(folder / "teacher")
    url, rng = str(folder / "tokens"), np.random.default_rng(0)
    shards = (
        [TokenRow(i, "train", rng.integers(0, bench.V, bench.T).astype(np.int32)) for i in range(ROWS)]
        for _ in range(SHARDS)
    )
    write_tokens(url, folder / "teacher", shards, num_shards=SHARDS, window=bench.T)
    raw: dict[str, Any] = {
        "tokens": {"path": url, "source": {"files": ["none"]}, "tokenizer": str(folder / "teacher"),
                   "window": bench.T, "held_out": 0.0},
        "teacher": {"model": str(folder / "teacher"), "dtype": "float32", "batch_tokens": BATCH_ROWS * bench.T},
        "targets": {"k": 64},
        "store": {"path": str(folder / "store")},
        "cluster": {"workers": 1, "cpus_per_worker": THREADS},
    }  # fmt: skip
    return write_yaml(folder / "cache.yaml", raw)


def bare_tokens_per_s(folder: Path) -> list[float]:
    """Rates of bare forward passes over batches of random rows."""
    from transformers import AutoModelForCausalLM

    model, rng = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), np.random.default_rng(1)
    rates = []
    for turn in range(7):
        ids_BT = torch.from_numpy(rng.integers(0, bench.V, (BATCH_ROWS, bench.T)))
        started = time.perf_counter()
        with torch.inference_mode():
            model.lm_head(model.get_decoder()(input_ids=ids_BT, use_cache=False).last_hidden_state)
        if turn:  # the first warms up
            rates.append(ids_BT.numel() / (time.perf_counter() - started))
    return rates


def steady(log: list[dict[str, Any]]) -> tuple[float, dict[str, float]]:
    """Tokens per second from the first shard's end to the last's; the phases' shares of that time."""
    done = [line for line in log if line["event"] == "done"]
    seconds = done[-1]["time"] - done[0]["time"]
    phases = {phase: sum(line["seconds"].get(phase, 0.0) for line in done[1:]) / seconds for phase in PHASES}
    return sum(line["tokens"] for line in done[1:]) / seconds, phases


if __name__ == "__main__":
    main()
