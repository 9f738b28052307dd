"""`decant status`: how far the job at a store is, from what is committed and from what the job says of itself."""

import json
import time
from typing import Any

from cluster.job.journal import STATUS_EVERY_S, read_status
from cluster.job.progress import left
from logit_store import Storage, writer
from logit_store.errors import NotFinishedError
from logit_store.format import HEADER, MANIFEST, unseal

SILENCE_S = 60.0
"""A running job that has said nothing for so long is dead: it speaks every 15 seconds at the least."""


def read(store_url: str) -> dict[str, Any]:
    """How things stand: ``state`` is ``finished``, ``running``, ``died``, ``failed``, ``interrupted`` or ``unknown``
    (shards, and no word of any job). Raises NotFinishedError where nothing was begun.

    Shards are listed only where no job counts them: a million take a thousand requests, which cost money.
    """
    storage = Storage(store_url)
    if not storage.exists(HEADER):
        raise NotFinishedError(f"{store_url} holds no decant store: no job has begun to write there")
    num_shards = int(unseal(storage.read(HEADER), "header", storage.path(HEADER))["num_shards"])
    said = read_status(store_url) or {"state": "unknown"}
    found = {**said, "store": store_url, "shards": num_shards}
    found["silent_s"] = round(time.time() - said["updated"], 1) if "updated" in said else None
    if storage.exists(MANIFEST):
        found["state"] = "finished"
        left_out = unseal(storage.read(MANIFEST), "manifest", storage.path(MANIFEST)).get("left_out", {})
        found["left_out"] = [{"row": int(row), "reason": reason} for row, reason in left_out.items()]
    elif said["state"] in ("running", "finished"):  # its shards may be done; the manifest is still to come
        found["state"] = "died" if found["silent_s"] > SILENCE_S else "running"
    if found["state"] != "running":
        found["shards_done"] = int(writer.is_committed(storage, num_shards).sum())
    return found


def status(store_url: str, as_json: bool = False, watch: bool = False) -> None:
    """Show how things stand, once or until the job has ended. Raises StoreError."""
    from rich.live import Live

    found = read(store_url)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    with Live(_table(found), auto_refresh=False) as live:
        while watch and found["state"] in ("running", "unknown"):
            time.sleep(STATUS_EVERY_S[Storage(store_url).is_local])
            found = read(store_url)
            live.update(_table(found), refresh=True)


def _table(found: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=f"{found['store']}: {_state(found)}", show_header=False, title_justify="left")
    done, total = found["shards_done"], found["shards"]
    table.add_row("shards", f"{done:,} of {total:,} ({done / max(total, 1):.1%})")
    rows: dict[str, str] = {}
    if "verb" in found:
        is_running, is_local = found["state"] == "running", Storage(found["store"]).is_local
        workers = ", ".join(found["workers"].values()) or "none"
        rows = {
            "job": f"{found['verb']} on {found['host']}, process {found['pid']}",
            "reason": found.get("reason", ""),
            "workers": workers if is_running else "",
            "rate": f"{found['tokens_per_s']:,.0f} tok/s" if is_running else "",
            "time left": left(found["seconds_left"]) if is_running else "",
            "tokens": f"{found['tokens']:,} in {left(found['seconds'])}, by the last run",
            "retries": ", ".join(f"{cause} {count}" for cause, count in found["retries"].items()) or "none",
            "given up": ", ".join(f"shard {g['shard']}: {g['reason']}" for g in found["given_up"]),
            "log": f"{found['store'].rstrip('/')}.job/{found['log']}" + (".jsonl" if is_local else "/"),
        }
    if "left_out" in found:
        rows["left out"] = ", ".join(_row(left_out) for left_out in found["left_out"]) or "none"
    for key, value in rows.items():
        if value:
            table.add_row(key, escape(value))
    return table


def _row(left_out: dict[str, Any]) -> str:
    """Of a finished store by its number, of a running job by its place in a shard."""
    return f"row {left_out['row']}" + (f" of shard {left_out['shard']}" if "shard" in left_out else "")


def _state(found: dict[str, Any]) -> str:
    if found["state"] == "died":
        return f"died: no word for {left(found['silent_s'])}; the command that began it goes on"
    if found["state"] in ("failed", "interrupted"):
        return f"{found['state']}; the command that began it goes on"
    return str({"unknown": "not finished; nothing is known of a job"}.get(found["state"], found["state"]))
