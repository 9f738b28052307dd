"""Peak memory of teacher scoring at V = 151,936, beside the plain dense way (the student's loss: `loss.py`).

    python -m tests.bench.memory            # measures, prints a table, writes docs/benchmarks/memory.csv

Each figure is the peak resident memory of a process of its own, less what it held before the work began. The
model is small, so that what is seen is the logits.
"""

import csv
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.bench.machine import about

V, K, HIDDEN = 151_936, 64, 64
RESULT = Path(__file__).parents[2] / "docs" / "benchmarks" / "memory.csv"
CASES = [
    (way, positions)
    for way, lengths in (("chunked", (512, 1024, 2048, 4096, 8192)), ("dense", (512, 1024, 2048)))
    for positions in lengths
]


def main() -> None:
    """Measure every case in its own process."""
    stamp = about("torch", "transformers")
    rows = []
    print(f"{'way':8} {'positions':>9} {'peak MiB':>9} {'of dense':>9}")
    for way, positions in CASES:
        done = subprocess.run(
            [sys.executable, "-m", "tests.bench.memory", way, str(positions)],
            capture_output=True,
            text=True,
            check=True,
        )
        mebibytes = float(done.stdout.split()[-1])
        dense = positions * V * 4 / 2**20
        print(f"{way:8} {positions:9} {mebibytes:9.0f} {mebibytes / dense:9.2f}")
        rows.append(["teacher", way, V, K, positions, round(mebibytes), round(mebibytes / dense, 3), *stamp.values()])
    with open(RESULT, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "part",
                "way",
                "vocabulary",
                "k",
                "positions",
                "peak_mib",
                "of_float32_logits",
                *stamp,
            ]
        )
        writer.writerows(rows)


def measure(way: str, positions: int) -> float:
    """Peak MiB above the start while the teacher handles one row of so many positions ``way``."""
    import torch

    torch.set_num_threads(os.cpu_count() or 1)
    model = _model(positions)
    ids_1T = torch.randint(0, V, (1, positions + 1))
    work = _teacher(model, way, ids_1T)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    work()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _model(positions: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=V, hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, max_position_embeddings=positions + 2, tie_word_embeddings=True,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def _teacher(model: Any, way: str, ids_1T: Any) -> Any:
    import tempfile

    import torch

    from cluster.config import TargetsConfig, TeacherConfig
    from cluster.teachers.targets import Selector
    from cluster.teachers.transformers_teacher import TransformersTeacher

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        teacher = TransformersTeacher(
            Path(folder), TeacherConfig(model="", dtype="float32"), Selector(TargetsConfig(k=K), V, "labels")
        )

    def dense() -> None:
        with torch.inference_mode():
            log_p_TV = teacher.model(input_ids=ids_1T, use_cache=False).logits[0].log_softmax(-1)
            log_p_TV.topk(K, dim=-1)

    return dense if way == "dense" else lambda: teacher.score([ids_1T[0].numpy()], [0])


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    else:
        main()
