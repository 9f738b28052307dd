"""What a person sees while shards are worked on: a bar with rate and time left, and one line at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

console = Console(stderr=True)


@contextmanager
def shard_progress(verb: str, total: int, done: int) -> Iterator[Callable[[dict[str, Any]], None]]:
    """A bar over ``total`` shards of which ``done`` are committed; call what it yields with each new record."""
    if done:
        console.print(f"{verb}: {done} of {total} shards are committed already")
    columns = (TextColumn(verb), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[rate]}"))
    started, tokens = time.monotonic(), 0
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(verb, total=total, completed=done, rate="")

        def advance(record: dict[str, Any]) -> None:
            nonlocal tokens
            tokens += record["tokens"]
            rate = tokens / (time.monotonic() - started)
            progress.update(task, advance=1, rate=f"{rate:,.0f} tok/s")

        yield advance
    seconds = time.monotonic() - started
    if tokens:
        console.print(f"{verb}: {tokens:,} tokens in {seconds:.1f} s ({tokens / seconds:,.0f} tok/s)")
