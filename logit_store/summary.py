"""`decant inspect`: what a store holds, as a table for people or JSON for programs."""

import json
from typing import Any

from logit_store.reader import LogitStore, TokenStore
from logit_store.rows import SPLITS


def summarize(store: TokenStore | LogitStore) -> dict[str, Any]:
    """The store's figures and identity. ``kept_mass`` is the mean over positions of the mass that is not tail."""
    manifest = store.manifest
    positions = store.num_positions
    summary: dict[str, Any] = {
        "path": store.storage.url,
        "kind": store.kind,
        "shards": len(manifest["shards"]),
        "rows": len(store),
        **{f"rows_{split}": len(store.rows(split)) for split in SPLITS},
        "tokens": int(store.lengths_N.sum()),
        "positions": positions,
        "bytes": store.num_bytes,
        "bytes_per_position": store.num_bytes / max(positions, 1),
        "vocabulary_size": manifest["vocabulary_size"],
        "window": manifest["window"],
        "text_id": manifest["text_id"],
    }
    if isinstance(store, LogitStore):
        kept = sum(shard["kept_mass"] for shard in manifest["shards"])
        summary |= {field: manifest[field] for field in ("k", "temperatures", "logprob_dtype", "tail", "labels_id")}
        summary |= {"kept_mass": kept / max(positions, 1), "labels": manifest["labels"]}
        summary |= {"provenance": manifest["provenance"]}
    return summary | {"tokenizer": manifest["tokenizer"], "corpus": manifest["corpus"]}


def print_summary(store: TokenStore | LogitStore, as_json: bool = False) -> None:
    """Print ``summarize(store)`` to stdout."""
    summary = summarize(store)
    if as_json:
        print(json.dumps(summary, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{store.kind} store {store.storage.url}", show_header=False, title_justify="left")
    table.add_column()
    table.add_column(overflow="fold")
    for key, value in summary.items():
        if not isinstance(value, dict) and key not in ("path", "kind"):
            table.add_row(key, _text(value))
    Console().print(table)


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
