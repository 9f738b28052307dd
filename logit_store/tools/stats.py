"""`decant stats`: figures of a store's labels, from a sample of its rows, and what its bytes are spent on.

Shapes: P positions of the rows that were read, L of them carry loss.
"""

import json
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store.errors import ConfigError
from logit_store.reader import LogitStore, TokenStore, open_store
from logit_store.rows import LogitRow
from logit_store.storage import Storage
from logit_store.tools.outputs import finite, require_outside
from logit_store.tools.positions import OUTSIDE, entropies, kept_masses, next_ranks
from logit_store.tools.progress import progress_bar
from logit_store.tools.summary import section_table

DEFAULT_ROWS = 2000
"""Rows that are read where nobody says how many."""

MAX_LOSS = 700.0
"""Nats beyond which a float64 has no perplexity."""

Figures = dict[str, Any]

_ID_SECTIONS = ("head_bins", "head_low", "sampled_bins", "sampled_low")
_LOGPROB_SECTIONS = ("head_base", "head_codes", "head_logprobs")


class Sample(NamedTuple):
    """What was read of some rows of a logit store, position by position."""

    entropy_P: NDArray[np.float64]
    """In nats, of the kept ids and the tail as one outcome: at most the teacher's own."""
    kept_mass_P: NDArray[np.float64]
    num_entries_P: NDArray[np.int32]
    """Of the head, and draws."""
    next_rank_L: NDArray[np.int32]
    """In the head, from 1; ``OUTSIDE`` where it lacks the token."""
    next_logprob_L: NDArray[np.float32]


def stats(url: str, out: str | None = None, num_rows: int = DEFAULT_ROWS, as_json: bool = False) -> None:
    """Print figures of the store; into ``out`` go plots and a page with them, ``stats.html``.

    Raises ConfigError: ``num_rows`` is below 1, or there is no library to draw with; StoreError.
    """
    from logit_store.tools.stats_page import require_libraries, write_page

    if num_rows < 1:
        raise ConfigError(f"--rows {num_rows}: give a number of rows to read, at least 1")
    store = open_store(url)
    if out is not None:  # before the reading, which may take a while
        require_libraries()
        require_outside(Storage(out), store.storage)
    sample = None
    if isinstance(store, LogitStore):
        labelled = store.rows(None)
        sample = read_sample(store, labelled[sample_rows(len(labelled), num_rows)])
    found = figures(store, num_rows, sample)
    if as_json:
        print(json.dumps(finite(found), indent=2))
    else:
        _print(found)
    if out is not None:
        page = write_page(out, store, sample, found)
        if not as_json:
            print(f"plots: {page}")


def sample_rows(num_stored: int, num_rows: int) -> NDArray[np.int64]:
    """At most ``num_rows`` row numbers, evenly spaced from the first row to the last."""
    return np.linspace(0, max(num_stored - 1, 0), min(num_stored, num_rows)).round().astype(np.int64)


def read_sample(store: LogitStore, rows_N: NDArray[np.int64]) -> Sample:
    """Read these rows."""
    parts = [_NOTHING]
    with progress_bar("stats", len(rows_N), "rows") as advance:
        for number in rows_N.tolist():
            parts.append(_row_sample(store[number], store.manifest["forced_ids"]))
            advance(1)
    return Sample(*(np.concatenate(column) for column in zip(*parts, strict=True)))


_NOTHING = Sample(np.zeros(0), np.zeros(0), np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0, np.float32))


def _row_sample(row: LogitRow, forced_ids: list[int]) -> Sample:
    tokens, targets = row
    next_ids_P, mask_P = tokens.input_ids_T[1:], tokens.loss_mask_P
    if not len(next_ids_P):
        return _NOTHING
    carries_loss = slice(None) if mask_P is None else mask_P
    return Sample(
        entropies(targets, next_ids_P, forced_ids),
        kept_masses(targets),
        targets.head_counts_P + targets.sampled_counts_P,
        next_ranks(targets, next_ids_P)[carries_loss],
        targets.next_logprob_P[carries_loss],
    )


def figures(store: TokenStore | LogitStore, num_rows: int, sample: Sample | None) -> Figures:
    """All figures, as JSON has them. Those of positions are of the sample; lengths and bytes are of the whole store."""
    num_bytes, positions = store.num_bytes, store.num_positions
    found: Figures = {
        "path": store.storage.url,
        "kind": store.kind,
        "rows": len(store),
        "rows_read": min(num_rows, len(store)) if sample else 0,
        "positions": positions,
        "positions_read": len(sample.entropy_P) if sample else 0,
        "tokens_per_row": _spread(store.lengths_N),
        "bytes": num_bytes,
        "bytes_per_position": _ratio(num_bytes, positions),
        "section_bytes": store.shards.section_bytes(),
    }
    if sample is not None and isinstance(store, LogitStore):
        found |= {
            "entropy": _spread(sample.entropy_P),
            "kept_mass": _spread(sample.kept_mass_P),
            "entries_per_position": _spread(sample.num_entries_P),
            "next_token": _next_token(sample),
            "bits_per_entry": _bits_per_entry(store),
        }
    return found


def _spread(values: NDArray[Any]) -> dict[str, float]:
    """Mean, extremes and percentiles; NaN where there are no values."""
    if not len(values):
        return dict.fromkeys(("mean", "min", "p5", "p50", "p95", "max"), float("nan"))
    p5, p50, p95 = np.percentile(values, (5, 50, 95)).tolist()
    extremes = float(values.min()), float(values.max())
    return {"mean": float(values.mean()), "min": extremes[0], "p5": p5, "p50": p50, "p95": p95, "max": extremes[1]}


def _next_token(sample: Sample) -> Figures:
    """How well the teacher foresees the text, at the positions that carry loss. Its loss is in nats."""
    ranks_L, positions = sample.next_rank_L, len(sample.next_rank_L)
    loss = _ratio(-float(sample.next_logprob_L.sum(dtype=np.float64)), positions)
    return {
        "positions": positions,
        "in_head": _ratio(int((ranks_L != OUTSIDE).sum()), positions),
        "top1_accuracy": _ratio(int((ranks_L == 1).sum()), positions),
        "loss": loss,
        "perplexity": math.exp(loss) if loss < MAX_LOSS else math.inf,
        "ranks": rank_shares(ranks_L),
    }


def rank_shares(ranks_L: NDArray[np.int32]) -> dict[str, float]:
    """Shares of the ranks 1, 2, 3-4, 5-8, … and of what is outside the head."""
    shares, first, last = {}, 1, 1
    while last == 1 or first <= ranks_L.max(initial=0):
        name = str(first) if first == last else f"{first}-{last}"
        shares[name] = _ratio(int(((ranks_L >= first) & (ranks_L <= last)).sum()), len(ranks_L))
        first, last = last + 1, 2 * last
    return shares | {"outside": _ratio(int((ranks_L == OUTSIDE).sum()), len(ranks_L))}


def _bits_per_entry(store: LogitStore) -> dict[str, float]:
    """Stored bits for each entry of heads and draws: all bytes, and what ids and log-probs take of them."""
    entries, sections = int(store.shards.total("entries") + store.shards.total("draws")), store.shards.section_bytes()
    ids, logprobs = (sum(sections.get(name, 0) for name in names) for names in (_ID_SECTIONS, _LOGPROB_SECTIONS))
    sizes = {"all": store.num_bytes, "ids": ids, "log-probs": logprobs}
    return {name: _ratio(8 * size, entries) for name, size in sizes.items()}


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else float("nan")


def _print(found: Figures) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(title=f"{found['kind']} store {found['path']}", title_justify="left")
    for column in SPREAD_COLUMNS:
        table.add_column(column, justify="left" if column == SPREAD_COLUMNS[0] else "right")
    for cells in spread_lines(found):
        table.add_row(*cells)
    console.print(table)
    table = Table(show_header=False)
    for name, value in fact_lines(found):
        table.add_row(name, value)
    console.print(table)
    console.print(section_table(found))


SPREAD_COLUMNS = ("", "mean", "least", "5 %", "median", "95 %", "most")


def spread_lines(found: Figures) -> list[list[str]]:
    """Text of the table of spreads: a line per figure."""
    rows = {
        "tokens per row": ("tokens_per_row", ",.1f"),
        "entropy, nats": ("entropy", ".3f"),
        "kept mass": ("kept_mass", ".2%"),
        "entries per position": ("entries_per_position", ",.1f"),
    }
    lines = []
    for name, (figure, pattern) in rows.items():
        if figure in found:
            spread = found[figure]
            values = (spread[key] for key in ("mean", "min", "p5", "p50", "p95", "max"))
            lines.append([name, *(format(value, pattern) for value in values)])
    return lines


def fact_lines(found: Figures) -> list[tuple[str, str]]:
    """Text of the other figures: name and value."""
    lines = [("bytes per position", f"{found['bytes_per_position']:.2f}")]
    if "next_token" not in found:
        return [*lines, ("rows", f"{found['rows']:,}")]
    next_token, bits = found["next_token"], found["bits_per_entry"]
    return [
        ("rows read", f"{found['rows_read']:,} of {found['rows']:,}, evenly spaced"),
        ("positions read", f"{found['positions_read']:,} of {found['positions']:,}"),
        ("positions read that carry loss", f"{next_token['positions']:,}"),
        ("next token is in the head", f"{next_token['in_head']:.2%}"),
        ("next token is the head's most probable", f"{next_token['top1_accuracy']:.2%}"),
        ("teacher's loss, nats per token", f"{next_token['loss']:.4f}"),
        ("teacher's perplexity", f"{next_token['perplexity']:,.2f}"),
        *lines,
        ("bits per entry", f"{bits['all']:.2f} (ids {bits['ids']:.2f}, log-probs {bits['log-probs']:.2f})"),
    ]
