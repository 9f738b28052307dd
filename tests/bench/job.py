"""A whole `decant cache` beside the bare forward pass of its teacher.

    python -m tests.bench.job        # prints the shares of the phases, writes docs/benchmarks/job.csv

One worker with two threads (a GPU, where there is one: job-gpu.csv) labels random rows with the teacher of
tests/bench/teacher.py (k = 64) and writes them. The bare pass is the decoder, and one matrix product of all hidden
states with the LM head, over the same batches. It runs in the same worker, before or after each shard in turns, so that
what slows the machine down slows both. A shard's ratio is the seconds of its bare pass over all others between its end
and that of the shard before; how long processes take to start is no matter of speed in a job of days.
"""

import csv
import json
import statistics
import tempfile
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from cluster.cache import cache
from cluster.config import CacheConfig
from cluster.job.phases import PHASES
from cluster.job.worker import TeacherWorker
from cluster.teachers.transformers_teacher import TransformersTeacher, equal_length_batches
from logit_store import Targets, TokenRow
from logit_store.config import parse_config
from tests.bench import teacher as bench
from tests.bench.machine import about, device, result_path, settled
from tests.toy import write_tokens

SIZE = bench.SIZE
SHARDS, BATCHES, THREADS = 25, 2, 2


class TwofoldTeacher(TransformersTeacher):
    """Scores rows, and runs the bare pass over them in a phase of its own."""

    bare_first = False

    def score(self, rows: list[np.ndarray], numbers: list[int]) -> list[Targets]:
        self.bare_first = not self.bare_first
        if self.bare_first:
            self._bare(rows)
        targets = super().score(rows, numbers)
        if not self.bare_first:
            self._bare(rows)
        return targets

    def _bare(self, rows: list[np.ndarray]) -> None:
        with self.phases.measure("bare"):
            for members in equal_length_batches([len(row) for row in rows], self.batch_tokens):
                bench.bare(self, [rows[i] for i in members])
            settled()


class TwofoldWorker(TeacherWorker):
    def load_teacher(self) -> Any:
        teacher: Any = super().load_teacher()
        teacher.__class__ = TwofoldTeacher
        return teacher


def main() -> None:
    """Measure, print, write."""
    with tempfile.TemporaryDirectory(prefix="job") as name:
        config = prepare(Path(name))
        cache(config, TwofoldWorker)
        (log,) = Path(f"{config.store.path}.job").glob("log-*.jsonl")
        fields = steady([json.loads(line) for line in log.read_text().splitlines()])
    print(json.dumps(fields, indent=2))
    fields |= {"vocabulary": SIZE.vocabulary, "row_tokens": SIZE.row_tokens, "threads": THREADS}
    fields |= about("torch", "transformers", "ray")
    with open(result_path("job"), "w", newline="") as file:
        table = csv.DictWriter(file, fields)
        table.writeheader()
        table.writerow(fields)


def prepare(folder: Path) -> CacheConfig:
    """Teacher, tokenizer and token shards in the folder; the job's config."""
    bench.save_model(folder / "teacher")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(SIZE.vocabulary)}, unk_token="w1"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", unk_token="w1")
    tokenizer.save_pretrained(folder / "teacher")
    url, rng = str(folder / "tokens"), np.random.default_rng(0)
    ids_NT = (rng.integers(0, SIZE.vocabulary, SIZE.row_tokens).astype(np.int32) for _ in count())
    shards = ([TokenRow(i, "train", next(ids_NT)) for i in range(BATCHES * SIZE.rows)] for _ in range(SHARDS))
    write_tokens(url, folder / "teacher", shards, num_shards=SHARDS, window=SIZE.row_tokens)
    raw: dict[str, Any] = {
        "tokens": {"path": url, "source": {"files": ["none"]}, "tokenizer": str(folder / "teacher"),
                   "window": SIZE.row_tokens, "held_out": 0.0},
        "teacher": {"model": str(folder / "teacher"), "dtype": SIZE.dtype,
                    "batch_tokens": SIZE.rows * SIZE.row_tokens},
        "targets": {"k": 64},
        "store": {"path": str(folder / "store")},
        "cluster": {"workers": 1, "cpus_per_worker": THREADS, "gpus_per_worker": float(device() == "cuda")},
    }  # fmt: skip
    return parse_config(CacheConfig, raw, "bench")


def steady(log: list[dict[str, Any]]) -> dict[str, Any]:
    """Rates and ratios of all shards but the first; the phases' shares of the time without the bare passes."""
    done = [line for line in log if line["event"] == "done"]
    tokens = [line["tokens"] for line in done[1:]]
    bare = [line["seconds"]["bare"] for line in done[1:]]
    own = [line["time"] - before["time"] - line["seconds"]["bare"] for before, line in pairwise(done)]
    ratios = [theirs / ours for theirs, ours in zip(bare, own, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4)
    phases = {phase: sum(line["seconds"].get(phase, 0.0) for line in done[1:]) / sum(own) for phase in PHASES}
    return {
        "tokens_per_s": round(sum(tokens) / sum(own), 1),
        "bare_tokens_per_s": round(sum(tokens) / sum(bare), 1),
        "of_bare": round(median, 3),
        "of_bare_quartiles": f"{low:.3f} {high:.3f}",
        "of_bare_in_all": round(sum(bare) / sum(own), 3),
        **{f"share_{phase}": round(share, 4) for phase, share in phases.items()},
    }


if __name__ == "__main__":
    main()
