"""The golden stores: format 1 as it was first written. What is in `v1/` must be readable for ever; nothing rewrites it.

`python -m tests.store.golden` wrote them, and `rows.npz` with what they hold.
"""

from pathlib import Path
from typing import Any

import numpy as np

from logit_store import LogitRow, Targets, TokenRow
from tests.store.made import make_row, write_store, write_tokens

GOLDEN = Path(__file__).parent / "v1"
ROWS = Path(__file__).parent / "rows.npz"
FORCED = [0, 299]
CARRIED: list[dict[str, Any]] = [
    {"url": "https://example.org/empty", "score": 0.0},
    {"url": "https://example.org/one", "score": 0.5},
    {"url": "https://example.org/two", "score": 1.0},
    {"url": "ragged", "score": None},
    {"url": "whole vocabulary", "score": 1e300},
    {"url": "größer als ein Block", "score": -1.0},
]


def golden_rows() -> list[LogitRow]:
    """What the golden stores hold: rows of every shape."""
    arrays = np.load(ROWS)

    def row(i: int) -> LogitRow:
        mask = arrays[f"{i}.mask"]
        tokens = TokenRow(i, ("train", "held_out")[i % 2], arrays[f"{i}.ids"], mask if mask.size else None, CARRIED[i])
        return LogitRow(tokens, Targets(*(arrays[f"{i}.{name}"] for name in Targets._fields)))

    return [row(i) for i in range(len(CARRIED))]


def write() -> None:
    """Write rows and golden stores, where there are none yet."""
    if GOLDEN.exists():
        raise SystemExit(f"{GOLDEN} is there: it must stay as it is")
    rng = np.random.default_rng(20261121)
    rows = [make_row(rng, n, 5, 300, 1, FORCED, 3) for n in (0, 1, 2)]
    rows.append(make_row(rng, 40, rng.integers(0, 60, 40).tolist(), 300, 1, FORCED, 9, masked=True))
    rows += [make_row(rng, 9, 300, 300, 1, FORCED), make_row(rng, 3000, 4, 300, 1, FORCED)]
    arrays = {f"{i}.{name}": getattr(row.targets, name) for i, row in enumerate(rows) for name in Targets._fields}
    for i, row in enumerate(rows):
        arrays |= {f"{i}.ids": row.tokens.input_ids_T}
        arrays |= {f"{i}.mask": np.zeros(0, bool) if row.tokens.loss_mask_P is None else row.tokens.loss_mask_P}
    np.savez_compressed(ROWS, **arrays)
    rows = golden_rows()
    options: dict[str, Any] = {"vocabulary_size": 300, "forced_ids": FORCED}
    options["columns"] = {"score": "float64", "url": "string"}
    for kind in ("lossy", "exact"):
        codec = {"kind": kind, "max_kl": 1e-4, "max_error": 0.5}
        write_store(str(GOLDEN / kind), [rows[:4], [], rows[4:]], codec=codec, **options)
    write_tokens(str(GOLDEN / "tokens"), [[row.tokens for row in part] for part in (rows[:4], rows[4:])], **options)
