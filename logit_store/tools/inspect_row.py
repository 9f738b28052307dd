"""`decant inspect --row`: one row's labels in words, a line per position."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from logit_store.errors import ConfigError, StoreError
from logit_store.reader import LogitStore, TokenStore
from logit_store.rows import LogitRow, TokenRow, offsets_of
from logit_store.tools.outputs import finite
from logit_store.tools.positions import OUTSIDE, kept_masses, next_ranks
from logit_store.tools.spans import parse_span
from logit_store.tools.token_text import TokenText

SHOWN_POSITIONS = 64
"""Lines of a table for which nobody asked for other positions: what a person scrolls through."""

ALTERNATIVES = "most probable"
_NUMBERS = ("t", "id", "p", "rank", "kept", "tail", "entries")


class Position(NamedTuple):
    """What the store knows of one position of a logit row."""

    t: int
    carries_loss: bool
    context_id: int
    next_id: int
    next_logprob: float
    next_rank: int | None
    """In the head, 1 for the most probable; None outside it."""
    kept_mass: float
    tail_logmass: float
    head_ids: NDArray[np.int32]
    """Most probable first, ties to the lower id."""
    head_logprobs: NDArray[np.float32]
    sampled_ids: NDArray[np.int32]
    forced_logprobs: NDArray[np.float32]
    log_partition: NDArray[np.float32]


def print_row(
    store: TokenStore | LogitStore, row: int, positions: str | None = None, top: int = 3, as_json: bool = False
) -> None:
    """Print row number ``row`` to stdout: of its positions those in the span ``positions`` (``"A:B"``), and of each
    head the ``top`` most probable. JSON is complete: every entry, and all positions unless a span was given.

    Raises StoreError: no such row; ConfigError: no such positions.
    """
    if top < 0:
        raise ConfigError(f"--top {top}: give a number of alternatives, 0 or more")
    found = _read(store, row)
    tokens = found if isinstance(found, TokenRow) else found.tokens
    # A row of tokens has a line per token, a row of labels one per position.
    num_lines = len(tokens.input_ids_T) if isinstance(found, TokenRow) else max(len(tokens.input_ids_T) - 1, 0)
    span = parse_span(positions, num_lines, "--positions", f"positions in row {row}")
    text = TokenText.of_store(store)
    if as_json:
        print(json.dumps(finite(describe_row(store, row, found, span, text))))
        return
    shown = span if positions is not None else span[:SHOWN_POSITIONS]
    _print_table(store, row, found, shown, text, top)
    if len(shown) < len(span):
        print(f"… {len(span) - len(shown):,} more: --positions {shown.stop}:{span.stop}")


def describe_row(
    store: TokenStore | LogitStore, row: int, found: TokenRow | LogitRow, span: range, text: TokenText
) -> dict[str, Any]:
    """All that the store knows of a row, by name. In JSON null stands for −∞, and for a rank outside the head."""
    tokens = found if isinstance(found, TokenRow) else found.tokens
    described: dict[str, Any] = {"store": store.storage.url, "row": row, **_header(tokens)}
    described |= {"columns": dict(tokens.columns)}
    described |= {"input_ids": tokens.input_ids_T.tolist()}
    described |= {"loss_mask": None if tokens.loss_mask_P is None else tokens.loss_mask_P.tolist()}
    ids = set(described["input_ids"])
    if isinstance(found, LogitRow):
        described |= {field: store.manifest[field] for field in ("temperatures", "forced_ids")}
        described["positions"] = [position._asdict() for position in _positions(found, span)]
        for position in described["positions"]:
            ids.update(position["head_ids"].tolist(), position["sampled_ids"].tolist())
        ids.update(described["forced_ids"])
    return described | {"texts": {token_id: text(token_id) for token_id in sorted(ids)}, "texts_missing": text.missing}


def _read(store: TokenStore | LogitStore, row: int) -> TokenRow | LogitRow:
    if not 0 <= row < len(store):
        held = f"rows 0 to {len(store) - 1:,}" if len(store) else "no rows"
        raise StoreError(f"there is no row {row}: {store.storage.url} holds {held}")
    return store[row]


def _header(tokens: TokenRow) -> dict[str, Any]:
    mask_P = tokens.loss_mask_P
    return {
        "document": tokens.document,
        "split": tokens.split,
        "tokens": len(tokens.input_ids_T),
        "loss_share": 1.0 if mask_P is None or not len(mask_P) else float(mask_P.mean()),
    }


def _positions(row: LogitRow, span: range) -> Iterator[Position]:
    tokens, targets = row
    next_ids_P = tokens.input_ids_T[1:]
    ranks_P, kept_P = next_ranks(targets, next_ids_P), kept_masses(targets)
    at_N, at_M = offsets_of(targets.head_counts_P), offsets_of(targets.sampled_counts_P)
    for t in span:
        ids, logprobs = (a[at_N[t] : at_N[t + 1]] for a in (targets.head_ids_N, targets.head_logprobs_N))
        order = np.lexsort((ids, -logprobs))
        yield Position(
            t,
            tokens.loss_mask_P is None or bool(tokens.loss_mask_P[t]),
            int(tokens.input_ids_T[t]),
            int(next_ids_P[t]),
            float(targets.next_logprob_P[t]),
            None if ranks_P[t] == OUTSIDE else int(ranks_P[t]),
            float(kept_P[t]),
            float(targets.tail_logmass_P[t]),
            ids[order],
            logprobs[order],
            targets.sampled_ids_M[at_M[t] : at_M[t + 1]],
            targets.forced_logprobs_PF[t],
            targets.log_partition_PS[t],
        )


def _print_table(
    store: TokenStore | LogitStore, row: int, found: TokenRow | LogitRow, span: range, text: TokenText, top: int
) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    tokens = found if isinstance(found, TokenRow) else found.tokens
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # a file has no width: every line whole
    console.print(Text(_title(store, row, tokens)), soft_wrap=True)
    if text.missing is not None:
        console.print(Text(text.missing), soft_wrap=True)
    if isinstance(found, TokenRow):
        columns, lines = _token_lines(found, span, text)
    else:
        columns, lines = _position_lines(found, span, text, top)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in columns:
        is_number, gives_way = column in _NUMBERS, column in (ALTERNATIVES, "draws")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=not gives_way, overflow="fold")
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(table)


def _title(store: TokenStore | LogitStore, row: int, tokens: TokenRow) -> str:
    header = _header(tokens)
    parts = [f"row {row:,} of {len(store):,}", f"document {tokens.document}", tokens.split]
    parts += [f"{header['tokens']:,} tokens"]
    if header["tokens"] > 1:
        parts += [f"{header['loss_share']:.1%} of positions carry loss"]
    return " · ".join([*parts, *(f"{name}: {value}" for name, value in tokens.columns.items())])


def _token_lines(tokens: TokenRow, span: range, text: TokenText) -> tuple[list[str], Iterator[Sequence[str]]]:
    mask_P = tokens.loss_mask_P

    def line(t: int) -> list[str]:
        cells = [str(t), text(int(tokens.input_ids_T[t])), str(tokens.input_ids_T[t])]
        return cells if mask_P is None else [*cells, "" if t == len(mask_P) or mask_P[t] else "no"]

    return ["t", "token", "id"] + ["loss"] * (mask_P is not None), (line(t) for t in span)


def _position_lines(row: LogitRow, span: range, text: TokenText, top: int) -> tuple[list[str], Iterator[Sequence[str]]]:
    """Columns and lines. Draws have a column where the row has any, loss where some position carries none."""
    has_draws, is_masked = len(row.targets.sampled_ids_M) > 0, row.tokens.loss_mask_P is not None
    columns = ["t", "token", "next", "p", "rank", ALTERNATIVES, "kept", "tail", "entries"]
    columns += ["draws"] * has_draws + ["loss"] * is_masked

    def line(p: Position) -> list[str]:
        alternatives = zip(p.head_ids[:top].tolist(), p.head_logprobs[:top].tolist(), strict=True)
        cells = [
            str(p.t),
            text(p.context_id),
            text(p.next_id),
            _percent(p.next_logprob),
            "outside" if p.next_rank is None else str(p.next_rank),
            "  ".join(f"{text(token_id)} {_percent(logprob)}" for token_id, logprob in alternatives),
            f"{p.kept_mass:.2%}",
            _percent(p.tail_logmass),
            str(len(p.head_ids)),
        ]
        if has_draws:
            counts = Counter(p.sampled_ids.tolist())
            cells.append(" ".join(f"{text(i)}×{n}" if n > 1 else text(i) for i, n in counts.items()))
        return cells + ["" if p.carries_loss else "no"] * is_masked

    return columns, (line(p) for p in _positions(row, span))


def _percent(logprob: float) -> str:
    """A probability with three digits, however small it is."""
    return f"{100 * float(np.exp(logprob)):.3g}%"
