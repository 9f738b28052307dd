"""What a person sees of a run while it goes: metrics.jsonl, trackers, a progress bar. Keys: docs/training.md."""

import time
from collections.abc import Mapping
from typing import Any

from training.config import TrainConfig
from training.curriculum.batches import Cursor
from training.data.feed import Step
from training.engine import Engine
from training.run_folder import RunFolder
from training.watching.evaluation import Figures
from training.watching.flops import ModelFlops, peak_flops
from training.watching.trackers import open_trackers


class Watcher:
    """Every rank tells it of its steps, rank 0 writes; a context that holds the bar and the trackers."""

    def __init__(
        self, run: RunFolder, config: TrainConfig, cursor: Cursor, rank: int, flops: ModelFlops | None, engine: Engine
    ) -> None:
        self.run, self.config, self.rank, self.engine, self.flops = run, config, rank, engine, flops
        self.cursor, self.time = cursor, time.monotonic()
        peak = peak_flops(config.watch.peak_tflops, engine.device)
        self.peak = None if peak is None else peak * engine.world_size

    def __enter__(self) -> "Watcher":
        if self.rank == 0:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.trackers = open_trackers(self.config, self.run, self.cursor.step)
            console = Console(stderr=True)
            columns = (TextColumn("train {task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
            total = self.config.schedule.total_tokens
            self.task = self.bar.add_task(self.run.path.name, total=total, completed=self.cursor.tokens_seen, text="")
            self.bar.start()
        self.time = time.monotonic()  # trackers may take seconds to open
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        if self.rank == 0:
            self.bar.stop()
            for tracker in self.trackers:
                tracker.close(failed=kind is not None)

    def step(self, step: Step, values: Mapping[str, float]) -> None:
        """Note a step that every rank has taken: ``values``, and what is counted and timed here."""
        now, tokens = time.monotonic(), step.cursor.tokens_seen - self.cursor.tokens_seen
        seconds = now - self.time
        kept_mass, wait_s = self.engine.sum_over_ranks([sum(b.kept_mass() for b in step.batches), step.wait_s])
        self.cursor, self.time = step.cursor, now
        if self.rank != 0:
            return
        values = {
            **values,
            "sequence_length": step.length,
            "padding": step.padding,
            "epoch": step.cursor.epoch,
            "seconds": seconds,
            "tokens_per_s": tokens / seconds,
        }
        values["wait"] = wait_s / self.engine.world_size / seconds
        if step.batches[0].targets:
            values["kept_mass"] = kept_mass / tokens
        if self.peak is not None and self.flops is not None:
            done = self.flops.of_step((p.positions for p in step.prefixes), tokens)
            values["mfu"] = done / seconds / self.peak
        self._log(step.cursor, values, {f"train/{name}": value for name, value in values.items()})
        text = f"loss {values['loss']:.3f}  length {values['sequence_length']:.0f}  {tokens / seconds:,.0f} tok/s"
        self.bar.update(self.task, completed=step.cursor.tokens_seen, text=text)

    def evaluation(self, cursor: Cursor, figures: Figures) -> None:
        """Note held-out figures after the step that ended at ``cursor``. Their time is no part of any step."""
        self.time = time.monotonic()
        if self.rank == 0:
            flat = {name: value for name, value in figures.items() if name != "by_length"}
            for span, of_span in figures["by_length"].items():
                flat |= {f"{span}/{name}": value for name, value in of_span.items()}
            self._log(cursor, {"held_out": figures}, {f"held_out/{name}": value for name, value in flat.items()})

    def _log(self, cursor: Cursor, line: Mapping[str, Any], scalars: Mapping[str, float]) -> None:
        self.run.log({"step": cursor.step, "tokens_seen": cursor.tokens_seen, **line})
        for tracker in self.trackers:
            tracker.log(scalars, cursor.step)
