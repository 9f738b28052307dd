"""What a person sees while shards are worked on: a bar with rate and time left, and what it came to at the end."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from cluster.job.account import Account
from cluster.job.phases import PHASES

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


@contextmanager
def job_progress(account: Account) -> Iterator[Callable[[], None]]:
    """A bar over a teacher job's shards; call what it yields whenever ``account`` has changed."""
    if account.num_done:
        console.print(f"cache: {account.num_done} of {account.num_shards} shards are committed already")
    columns = (TextColumn("cache"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[now]}"))
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("cache", total=account.num_shards, completed=account.num_done, now="")

        def show() -> None:
            now = [f"{account.tokens_per_s:,.0f} tok/s", f"{left(account.seconds_left)} left"]
            now.append(f"{len(account.workers)} workers" if account.workers else "waiting for workers")
            troubles = {"retries": sum(account.retries.values()), "left out": len(account.left_out)}
            now += [f"{count} {what}" for what, count in troubles.items() if count]
            progress.update(task, completed=account.num_done, now=", ".join(now))

        yield show


def left(seconds: float | None) -> str:
    """A duration for people, as ``2:03:04``; ``-:--`` where it is not known."""
    if seconds is None:
        return "-:--"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def print_account(account: Account, price_per_gpu_hour: float | None) -> None:
    """What a run came to, on stderr. Phases are shares of the time of all workers; a worker writes one shard while it
    scores the next, so that they may add up to more than all of it.
    """
    elapsed = max(time.monotonic() - account.started, 1e-9)
    worker_seconds = max(account.worker_seconds, 1e-9)
    table = Table(title="this run", show_header=False, title_justify="left")
    rows = {
        "tokens": f"{account.tokens:,} in {left(elapsed)} ({account.tokens / elapsed:,.0f} tok/s)",
        "tokens per worker": f"{account.tokens / worker_seconds:,.0f} tok/s while it had its teacher",
        "bytes per position": f"{account.bytes / max(account.positions, 1):.1f}",
        **{phase: f"{account.seconds[phase] / worker_seconds:.1%}" for phase in PHASES},
        "retries": ", ".join(f"{cause} {count}" for cause, count in account.retries.items()) or "none",
    }
    if account.oom_splits:
        rows["batches split for want of memory"] = str(account.oom_splits)
    if price_per_gpu_hour is not None:
        rows["cost"] = f"{account.cost(price_per_gpu_hour):,.2f}"
    for key, value in rows.items():
        table.add_row(key, value)
    console.print(table)
    for row in account.left_out:
        console.print(f"left out: row {row['row']} of shard {row['shard']}: {row['reason']}", markup=False)
