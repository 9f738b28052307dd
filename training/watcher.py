"""What a person sees of a run while it goes: metrics.jsonl, TensorBoard, a progress bar."""

import time

from training.batches import Cursor
from training.config import TrainConfig
from training.run_folder import RunFolder


class Watcher:
    """Watches on rank 0 and does nothing on others; a context that holds the bar and the TensorBoard file."""

    def __init__(self, run: RunFolder, config: TrainConfig, cursor: Cursor, rank: int) -> None:
        self.run, self.config, self.rank = run, config, rank
        self.cursor, self.time = cursor, time.monotonic()

    def __enter__(self) -> "Watcher":
        if self.rank == 0:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(self.run.tensorboard), purge_step=self.cursor.step + 1)
            console = Console(stderr=True)
            columns = (TextColumn("train {task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self.bar = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
            total = self.config.schedule.total_tokens
            self.task = self.bar.add_task(self.run.path.name, total=total, completed=self.cursor.tokens_seen, text="")
            self.bar.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        if self.rank == 0:
            self.bar.stop()
            self.writer.close()

    def step(self, cursor: Cursor, values: dict[str, float]) -> None:
        """Note a step that ended at ``cursor``, with its rate."""
        if self.rank == 0:
            now, tokens = time.monotonic(), cursor.tokens_seen - self.cursor.tokens_seen
            seconds = now - self.time
            values = {**values, "seconds": seconds, "tokens_per_s": tokens / seconds, "epoch": cursor.epoch}
            self.cursor, self.time = cursor, now
            self.run.log({"step": cursor.step, "tokens_seen": cursor.tokens_seen, **values})
            for name, value in values.items():
                self.writer.add_scalar(f"train/{name}", value, cursor.step)
            text = f"loss {values['loss']:.3f}  length {values['sequence_length']:.0f}  "
            text += f"{values['tokens_per_s']:,.0f} tok/s"
            self.bar.update(self.task, completed=cursor.tokens_seen, text=text)

    def evaluation(self, cursor: Cursor, figures: dict[str, float]) -> None:
        """Note held-out figures after the step that ended at ``cursor``."""
        if self.rank == 0:
            self.run.log({"step": cursor.step, "tokens_seen": cursor.tokens_seen, "held_out": figures})
            for name, value in figures.items():
                self.writer.add_scalar(f"held_out/{name}", value, cursor.step)
