"""A progress bar for the store's tools: rate and time left, on stderr, only where a person looks."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

Advance = Callable[[int], None]
"""Call it with how much was done since the last call."""


@contextmanager
def progress_bar(verb: str, total: int, unit: Literal["bytes", "rows", "shards"]) -> Iterator[Advance]:
    """A bar over ``total`` of ``unit``; yields what advances it. Nothing is shown where stderr is no terminal."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    counts = (
        (progress.DownloadColumn(binary_units=True), progress.TransferSpeedColumn())
        if unit == "bytes"
        else (progress.MofNCompleteColumn(), progress.TextColumn(f"{unit} {{task.fields[rate]}}"))
    )
    columns = (progress.TextColumn(verb), progress.BarColumn(), *counts, progress.TimeRemainingColumn())
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(verb, total=total, rate="")

        def advance(amount: int) -> None:
            bar.update(task, advance=amount)
            speed = bar.tasks[0].speed
            bar.update(task, rate=f"{speed:,.1f}/s" if speed else "")

        yield advance
