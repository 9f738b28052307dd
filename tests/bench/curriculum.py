"""The demo's small student with and without curricula, at equal tokens: held-out loss, time, restlessness of gradients.

    make demo                            # the store that this reads: runs/demo/store
    python -m tests.bench.curriculum     # prints a table, writes docs/benchmarks/curriculum.csv and .md

Each variant is `decant train configs/demo/student-small.yaml` with overrides, once per seed, the variants in turn, so
that all of them meet the machine's moods. Seconds are those of the steps alone. Held-out rows are whole in all of them.
Variants of "pieces" read a second store, of the same text cut into powers of two: its held-out rows are shorter, and
their losses compare with each other alone.
"""

import argparse
import csv
import json
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tests.bench.machine import about
from tests.toy import ROOT, run_decant

CONFIG = ROOT / "configs/demo/student-small.yaml"
RESULT = ROOT / "docs/benchmarks/curriculum.csv"
PIECES = "runs/demo/store-pieces"
HALF = "{}.schedule_config.total_curriculum_tokens={}"


def variants(tokens: int) -> dict[str, list[str]]:
    """Overrides of each variant; curricula take the first half of the run."""
    half = HALF.format("curriculum", tokens // 2)
    root = [half, "curriculum.schedule_type=fixed_root"]
    easy = ["row_curriculum.min_difficulty=20", HALF.format("row_curriculum", tokens // 2)]
    paced = [half, "curriculum.pacing.max_volatility=0.25", "curriculum.pacing.window_steps=20"]
    cycles = [f"curriculum.cycle_tokens={tokens // 4}", "curriculum.cycles=4"]
    # A row of 256 tokens has 255 positions. The demo's documents are long: shorter pieces hold 13,000 positions in all.
    whole = [HALF.format("curriculum", tokens // 32), "curriculum.mode=bucket", "curriculum.min_difficulty=127",
             "curriculum.max_difficulty=255", "curriculum.schedule_config.difficulty_step=1"]  # fmt: skip
    pieces = [f"data.store={PIECES}"]
    return {
        "none": ["curriculum=null"],
        "prefix, linear": [half],
        "prefix, root": root,
        "prefix, cut at lines": [half, "curriculum.boundary=line"],
        "prefix, 4 cycles": [HALF.format("curriculum", tokens // 5), *cycles],
        "prefix, paced": paced,
        "easy rows first (loss)": ["curriculum=null", *easy],
        "prefix and easy rows first": [half, *easy],
        "pieces, none": [*pieces, "curriculum=null"],
        "pieces, bucket": [*pieces, *whole],
    }


def main() -> None:
    """Train every variant with every seed, print, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=400_000)
    parser.add_argument("--seeds", type=int, default=2)
    arguments = parser.parse_args()
    if not (ROOT / "runs/demo/store/manifest.json").exists():
        parser.error("runs/demo/store is not there: run `make demo` first")
    cut = ["tokens.pieces=powers_of_two", "tokens.path=runs/demo/tokens-pieces", f"store.path={PIECES}"]
    for verb in ("tokenize", "cache"):
        run_decant(verb, str(ROOT / "configs/demo/cache.yaml"), *cut)
    found: dict[str, list[dict[str, float]]] = {name: [] for name in variants(arguments.tokens)}
    with tempfile.TemporaryDirectory(prefix="curriculum") as folder:
        for seed in range(arguments.seeds):
            for name, overrides in variants(arguments.tokens).items():
                found[name].append(run(Path(folder) / "run", [*overrides, f"run.seed={seed}"], arguments.tokens))
                print(name, seed, {key: round(value, 4) for key, value in found[name][-1].items()}, flush=True)
    write(found, arguments.tokens)


def run(folder: Path, overrides: list[str], tokens: int) -> dict[str, float]:
    """Train one student in the folder, which is removed; its figures."""
    schedule = [f"schedule.total_tokens={tokens}", f"schedule.warmup_tokens={tokens // 20}"]
    overrides = [*schedule, *overrides, f"run.path={folder}", "checkpoint.every_tokens=null"]
    run_decant("train", str(CONFIG), *overrides)
    result = json.loads((folder / "result.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    shutil.rmtree(folder)
    settled = [step["gradient_norm"] for step in steps if step["tokens_seen"] > tokens // 20]  # after the warm-up
    return {
        "held_out_loss": result["held_out"]["loss"],
        "seconds": result["seconds"],
        "gradient_norm": statistics.mean(settled),
        "gradient_norm_variance": statistics.variance(settled),
        "largest_gradient_norm": max(settled),
        "padding": statistics.mean(step["padding"] for step in steps),
        "tokens": result["tokens"],
    }


def write(found: dict[str, list[dict[str, float]]], tokens: int) -> None:
    """The table of means over seeds, as CSV with every seed's loss, and as Markdown."""
    rows: list[dict[str, Any]] = []
    for name, runs in found.items():
        means = {key: round(statistics.mean(run[key] for run in runs), 5) for key in runs[0]}
        losses = " ".join(f"{run['held_out_loss']:.4f}" for run in runs)
        rows.append(
            {"curriculum": name, **means, "held_out_losses": losses, "seeds": len(runs)} | about("torch", "deepspeed")
        )
    with open(RESULT, "w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    shown = ("curriculum", "held_out_loss", "held_out_losses", "seconds", "gradient_norm", "gradient_norm_variance",
             "largest_gradient_norm", "padding")  # fmt: skip
    stamp = about("torch", "deepspeed")
    of_none = [run["held_out_loss"] for run in found["none"]]
    spread = max(of_none) - min(of_none)
    lines = [
        "# Curricula on the demo corpus, at equal tokens\n",
        f"{stamp['date']}, {stamp['machine']}, {stamp['versions']}. The demo's small student, {tokens:,} tokens, "
        f"means of {rows[0]['seeds']} seeds. Written by `python -m tests.bench.curriculum`.\n",
        f'Losses of the seeds of "none" alone differ by {spread:.2f}: differences between variants that are not '
        "clearly larger tell nothing.\n",
        'Variants of "pieces" are evaluated on other held-out rows, which are shorter: their losses compare with each '
        "other alone.\n",
        "| " + " | ".join(name.replace("_", " ") for name in shown) + " |",
        "|" + " --- |" * len(shown),
        *("| " + " | ".join(str(row[name]) for name in shown) + " |" for row in rows),
    ]
    RESULT.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines[2:]))


if __name__ == "__main__":
    main()
