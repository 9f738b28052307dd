"""`decant diff`: two stores of the same rows, row by row."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from logit_store.errors import IdentityError, StoreError
from logit_store.identity import require_equal
from logit_store.reader import LogitStore, TokenStore, open_store
from logit_store.rows import TokenRow
from logit_store.tools.difference import Difference, Labels, compare
from logit_store.tools.outputs import finite
from logit_store.tools.progress import progress_bar

NUM_WORST = 5


class RowDifference(NamedTuple):
    """A row and how far its two labellings are apart."""

    row: int
    difference: Difference


class StoreDifference(NamedTuple):
    """What ``diff_logits`` finds."""

    rows: int
    overall: Difference
    worst: list[RowDifference]
    """The rows with the largest errors, worst first."""

    def is_within(self, tolerance: float) -> bool:
        """Whether no log-prob, tail mass or cut differs by more, nor a larger share of the draws."""
        found = self.overall
        differing_share = found.differing_draws / max(found.draws, 1)
        return max(found.max_error, found.max_cut_error, found.max_tail_error, differing_share) <= tolerance


def diff_logits(first: LogitStore, second: LogitStore) -> StoreDifference:
    """Compare the labels of all rows; heads may have different sizes. Raises IdentityError: not of the same tokens."""
    for field in ("text_id", "vocabulary_size"):
        found, wanted = ({field: store.manifest[field]} for store in (first, second))
        remedy = "Only labels of the same token shards can be compared: see `decant inspect` of both"
        require_equal(found, wanted, first.storage.url, remedy)
    overall, worst = Difference(), list[RowDifference]()
    with progress_bar("diff", len(first), "rows") as advance:
        for found_row in _row_differences(first, second):
            overall = Difference.total([overall, found_row.difference])
            worst = sorted([*worst, found_row], key=_badness, reverse=True)[:NUM_WORST]
            advance(1)
    return StoreDifference(len(first), overall, worst)


def diff_tokens(first: TokenStore, second: TokenStore) -> list[int]:
    """Numbers of the rows whose tokens, masks, documents or splits differ; shards may be cut differently.

    Raises IdentityError: their ids mean different tokens.
    """
    found, wanted = ({"vocabulary": store.manifest["tokenizer"]["vocabulary_sha256"]} for store in (first, second))
    require_equal(found, wanted, first.storage.url, "Ids of different vocabularies cannot be compared")
    shorter, longer = sorted((len(first), len(second)))
    with progress_bar("diff", shorter, "rows") as advance:
        differing = []
        for row in range(shorter):
            if not _same_tokens(first[row], second[row]):
                differing.append(row)
            advance(1)
    return [*differing, *range(shorter, longer)]


def diff_command(url: str, other_url: str, tolerance: float, as_json: bool) -> int:
    """`decant diff`: its exit code, 1 where the stores differ by more than ``tolerance``. Raises StoreError."""
    first, second = open_store(url), open_store(other_url)
    if isinstance(first, LogitStore) and isinstance(second, LogitStore):
        found = diff_logits(first, second)
        is_within = found.is_within(tolerance)
        if as_json:
            print(json.dumps(finite(_as_json(found, tolerance)), indent=2))
        else:
            _print_table(found, f"{url} and {other_url}", tolerance)
        return 0 if is_within else 1
    if isinstance(first, TokenStore) and isinstance(second, TokenStore):
        differing = diff_tokens(first, second)
        if as_json:
            print(json.dumps({"rows": [len(first), len(second)], "differing_rows": differing}))
        else:
            some = f", the first of them {', '.join(map(str, differing[:NUM_WORST]))}" if differing else ""
            print(f"{len(first):,} and {len(second):,} rows; {len(differing):,} differ{some}")
        return 1 if differing else 0
    raise StoreError(f"{url} holds {first.kind} and {other_url} {second.kind}: compare two stores of one kind")


def _row_differences(first: LogitStore, second: LogitStore) -> Iterator[RowDifference]:
    """Of the rows that have labels in both; ids that only one of the two could not score say nothing of labels."""
    forced_ids = [store.manifest["forced_ids"] for store in (first, second)]
    for row in np.setdiff1d(first.rows(None), list(second.left_out)).tolist():
        a, b = first[row], second[row]
        if not _same_tokens(a.tokens, b.tokens):
            raise IdentityError(
                f"row {row}: tokens differ, though both stores say text_id {first.manifest['text_id'][:12]}…. "
                "Run `decant verify` on both"
            )
        labels_a, labels_b = Labels(a.targets, forced_ids[0]), Labels(b.targets, forced_ids[1])
        yield RowDifference(row, compare(labels_a, labels_b, a.tokens.input_ids_T[1:]))


def _same_tokens(first: TokenRow, second: TokenRow) -> bool:
    masks = [row.loss_mask_P if row.loss_mask_P is not None else True for row in (first, second)]
    return bool(
        (first.document, first.split) == (second.document, second.split)
        and np.array_equal(first.input_ids_T, second.input_ids_T)
        and np.all(masks[0] == masks[1])
    )


def _badness(found: RowDifference) -> tuple[float, ...]:
    """What rows are ordered by."""
    of_row = found.difference
    return max(of_row.max_error, of_row.max_cut_error), of_row.max_tail_error, of_row.differing_draws, -found.row


def figures(found: Difference) -> dict[str, float]:
    """The difference as people read it: shares and means in place of sums."""
    return {
        "positions": found.positions,
        "head ids in common": found.common_ids / max(found.possible_ids, 1),
        "mean |Δ log p|": found.sum_error / max(found.compared, 1),
        "max |Δ log p|": found.max_error,
        "max |Δ log p|, p ≥ 0.001": found.max_likely_error,
        "max |Δ log p| of next tokens": found.max_next_error,
        "max excess over the other's cut": found.max_cut_error,
        "mean |Δ tail mass|": found.sum_tail_error / max(found.positions, 1),
        "max |Δ tail mass|": found.max_tail_error,
        "mean KL": found.sum_kl / max(found.positions, 1),
        "differing draws": found.differing_draws / max(found.draws, 1),
    }


def _as_json(found: StoreDifference, tolerance: float) -> dict[str, Any]:
    worst = [{"row": row, **difference._asdict()} for row, difference in found.worst]
    overall = {"rows": found.rows, **found.overall._asdict()}
    return {"within_tolerance": found.is_within(tolerance), "tolerance": tolerance, "overall": overall, "worst": worst}


def print_differences(title: str, overall: Difference, rows: Sequence[RowDifference]) -> None:
    """Print a line for each figure, then a line for each of ``rows``."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    print(title)
    console, whole = Console(), Table(show_header=False, box=box.SIMPLE)
    for name, value in figures(overall).items():
        whole.add_row(name, f"{value:,.4g}")
    console.print(whole)
    table = Table(box=box.SIMPLE, pad_edge=False, collapse_padding=True)
    for heading in ("row", "positions", "ids in common", "mean Δ", "max Δ", "likely Δ", "next Δ", "tail Δ", "KL"):
        table.add_column(heading, justify="right")
    for row, found in rows:
        n, largest = max(found.positions, 1), (found.max_error, found.max_likely_error, found.max_next_error)
        means = found.common_ids / max(found.possible_ids, 1), found.sum_error / max(found.compared, 1)
        values = [*means, *largest, found.max_tail_error, found.sum_kl / n]
        table.add_row(f"{row}", f"{found.positions}", *(f"{value:.2g}" for value in values))
    console.print(table)


def _print_table(found: StoreDifference, title: str, tolerance: float) -> None:
    print_differences(f"{title}: {found.rows:,} rows, and the worst of them", found.overall, found.worst)
    verdict = "within" if found.is_within(tolerance) else "beyond"
    print(f"{verdict} the tolerance of {tolerance:g} (nats of log p, mass of the tail, share of the draws)")
