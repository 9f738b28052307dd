"""What becomes of a store's problems: they are shown, and damaged shards dropped so that they are made again."""

import json
from collections.abc import Sequence

from logit_store.errors import StoreError
from logit_store.format import HEADER, INDEX, MANIFEST, SHARDS, record_name, unseal
from logit_store.manifest import verb_of
from logit_store.storage import Storage
from logit_store.tools.verify import Problem, verify


def verify_command(url: str, drop: bool, as_json: bool) -> int:
    """`decant verify`: its exit code, 1 where anything is wrong. Raises StoreError."""
    problems, storage = verify(url), Storage(url)
    can_drop = all(problem.file != HEADER for problem in problems)
    dropped = drop_damaged(storage, problems) if drop and can_drop else []
    if as_json:
        found = [problem._asdict() for problem in problems]
        print(json.dumps({"path": storage.url, "problems": found, "dropped": dropped}, indent=2))
    else:
        _print_table(storage, problems, dropped)
    if drop and not can_drop:
        raise StoreError(
            f"{storage.path(HEADER)} says what the store is and cannot be made again: nothing was dropped. Restore "
            "it from a copy, or make the store again in an empty directory"
        )
    return 1 if problems else 0


def drop_damaged(storage: Storage, problems: Sequence[Problem]) -> list[str]:
    """Delete the objects and records of damaged shards and what follows from all shards; the names of these files.

    The manifest goes first: a store that somebody stops dropping from is an unfinished one. Files that belong to
    nothing stay, and so does everything where nothing but such files is wrong. The header must be sound.
    """
    damage = [problem for problem in problems if not problem.is_stray]
    assert all(problem.file != HEADER for problem in damage)
    if not damage:
        return []
    shards = sorted({problem.shard for problem in damage if problem.shard is not None})
    files = sorted({problem.file for problem in damage if problem.file.startswith("tokenizer/")})
    there = storage.sizes()
    dropped = [name for name in (MANIFEST, INDEX, SHARDS, *files) if name in there]
    for shard in shards:  # the object first: a record without one is found again, an object without one may be taken
        objects = [name for name in there if name.startswith(f"shards/{shard:06d}-") and name.endswith(".arrow")]
        dropped += [*objects, *({record_name(shard)} & there.keys())]
    for name in dropped:
        storage.delete(name)
    return dropped


def _print_table(storage: Storage, problems: Sequence[Problem], dropped: Sequence[str]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    if not problems:
        print(f"{storage.url} is sound")
        return
    table = Table(title=escape(f"problems of {storage.url}"), title_justify="left")
    for column in ("shard", "file", "reason"):
        table.add_column(column, overflow="fold")
    for problem in problems:
        table.add_row("" if problem.shard is None else str(problem.shard), escape(problem.file), escape(problem.reason))
    Console().print(table)
    if dropped:
        verb = verb_of(unseal(storage.read(HEADER), "header", HEADER))
        shards = sorted({int(name[7:13]) for name in dropped if name.startswith("shards/")})
        which = f"shards {', '.join(map(str, shards))} and " if shards else ""
        print(
            f"dropped {len(dropped)} files: {which}what lists all shards. Run the same `decant {verb}` command again: "
            "it makes only what is missing"
        )
    elif any(not problem.is_stray for problem in problems):
        print("restore these files from a copy, or drop what is damaged with --drop-damaged")
