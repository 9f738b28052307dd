"""`decant inspect`: what a store holds, as a table for people or JSON for programs."""

import json
from typing import Any

from logit_store.reader import LogitStore, TokenStore
from logit_store.rows import SPLITS


def summarize(store: TokenStore | LogitStore) -> dict[str, Any]:
    """The store's figures and identity. ``kept_mass`` is the mean over labelled positions of the
    mass that is not tail.
    """
    manifest = store.manifest
    positions = store.num_positions
    summary: dict[str, Any] = {
        "path": store.storage.url,
        "kind": store.kind,
        "shards": len(store.shards),
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
        labelled = max(store.num_labelled, 1)
        positions_of, kl = store.shards.columns["positions"], store.shards.columns["mean_kl"]
        summary |= {field: manifest.get(field) for field in ("k", "temperatures", "forced_ids", "tail", "labels_id")}
        summary |= {
            "entries_per_position": store.shards.total("entries") / labelled,
            "draws_per_position": store.shards.total("draws") / labelled,
            "kept_mass": store.shards.total("kept_mass") / labelled,
            "rows_left_out": len(store.left_out),
            "left_out": {str(row): reason for row, reason in store.left_out.items()},
            "codec": store.codec.kind,
            "codec_mean_kl": float((positions_of * kl).sum()) / labelled,
            "codec_max_error": float(store.shards.columns["max_error"].max(initial=0.0)),
            "labels": manifest.get("labels"),
        }
        summary |= {"provenance": manifest.get("provenance")}
    summary |= {"tokenizer": manifest["tokenizer"], "corpus": manifest.get("corpus")}
    return summary | {"section_bytes": store.shards.section_bytes()}


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
    console = Console()
    console.print(table)
    console.print(section_table(summary))


def section_table(summary: dict[str, Any]) -> Any:
    """Where the bytes are: the sections of FORMAT.md, the largest first, the empty ones left out."""
    from rich.table import Table

    table = Table(title="bytes by section", title_justify="left")
    table.add_column("section")
    for column in ("bytes", "share", "per position"):
        table.add_column(column, justify="right")
    sections = {section: size for section, size in summary["section_bytes"].items() if size}
    for section, size in sorted(sections.items(), key=lambda item: -item[1]):
        per_position = size / max(summary["positions"], 1)
        table.add_row(section, f"{size:,}", f"{size / max(summary['bytes'], 1):.1%}", f"{per_position:.2f}")
    return table


def _text(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
