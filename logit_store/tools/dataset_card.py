"""The README.md of an export for the Hugging Face Hub: what the dataset is, for people and for `load_dataset`."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from logit_store.reader import LogitStore, TokenStore
from logit_store.rows import SPLITS
from logit_store.tools.plain_columns import Column
from logit_store.tools.summary import summarize

_SIZES = {1e3: "n<1K", 1e4: "1K<n<10K", 1e5: "10K<n<100K", 1e6: "100K<n<1M", 1e7: "1M<n<10M", 1e8: "10M<n<100M"}
"""The Hub's words for numbers of rows."""


def dataset_card(store: TokenStore | LogitStore, columns: Sequence[Column], rows_N: NDArray[np.int64]) -> str:
    """Markdown with YAML front matter, for an export of the rows ``rows_N``. The licence is the publisher's to name."""
    splits = {split: int((store.index.splits_N[rows_N] == i).sum()) for i, split in enumerate(SPLITS)}
    splits = {split: count for split, count in splits.items() if count}
    facts = _facts(store, splits)
    lines = [
        "---",
        "# Before you publish this: add `license: …`. It is yours to choose, within what the corpus and the",
        "# teacher's own licence allow.",
        yaml.safe_dump(_front_matter(store, splits), sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {'Soft labels' if isinstance(store, LogitStore) else 'Tokens'} exported by decant",
        "",
        _introduction(store),
        "",
        *_table(("", ""), facts.items()),
        "",
        "## Columns",
        "",
        "A row is one sequence of T tokens. Position t, 0 ≤ t ≤ T − 2, is the prediction of the token at t + 1.",
        "",
        *_table(("column", "type", "meaning"), ((f"`{c.name}`", f"`{_type(c)}`", c.meaning) for c in columns)),
        "",
        "## Loading",
        "",
        "```python",
        "from datasets import load_dataset",
        "",
        'dataset = load_dataset("THIS_FOLDER_OR_REPOSITORY")',
        f'print(dataset["{next(iter(splits))}"][0]["input_ids"])',
        "```",
        "",
    ]
    return "\n".join(lines)


def _front_matter(store: TokenStore | LogitStore, splits: dict[str, int]) -> dict[str, Any]:
    data_files = [{"split": split, "path": f"data/{split}-*.parquet"} for split in splits]
    tags = ["decant", "knowledge-distillation", "soft-labels"] if isinstance(store, LogitStore) else ["decant"]
    size = next((word for limit, word in _SIZES.items() if sum(splits.values()) < limit), "n>100M")
    return {
        "configs": [{"config_name": "default", "data_files": data_files}],
        "task_categories": ["text-generation"],
        "size_categories": [size],
        "tags": tags,
    }


def _introduction(store: TokenStore | LogitStore) -> str:
    if not isinstance(store, LogitStore):
        return "Tokenised sequences, ready for a teacher to be scored on."
    return (
        "A teacher's predictions for every token of a corpus, to distil students from: at each position its most\n"
        "probable tokens with their log-probabilities under the full softmax, and the mass of all others together."
    )


def _facts(store: TokenStore | LogitStore, splits: dict[str, int]) -> dict[str, str]:
    summary, manifest = summarize(store), store.manifest
    facts = {"rows": ", ".join(f"{count:,} {split}" for split, count in splits.items())}
    facts |= {"tokenizer": f"{manifest.get('tokenizer_name', 'unnamed')}, {manifest['vocabulary_size']:,} ids"}
    facts |= {"text_id": f"`{manifest['text_id']}`"}
    if isinstance(store, LogitStore):
        provenance, labels = manifest.get("provenance") or {}, manifest.get("labels") or {}
        teacher = (provenance.get("teacher") or {}).get("model", "unnamed")
        facts |= {
            "teacher": f"{teacher}, weights `{labels.get('teacher', 'unknown')}`",
            "labels_id": f"`{manifest['labels_id']}`",
            "k": f"{manifest['k']:,} ({summary['entries_per_position']:.4g} entries per position were kept)",
            "mass of the kept ids": f"{summary['kept_mass']:.2%} on average",
            "stored temperatures": ", ".join(map(str, manifest["temperatures"])) or "none",
            "forced ids": ", ".join(map(str, manifest["forced_ids"])) or "none",
            "codec": _codec(summary),
        }
    return facts


def _codec(summary: dict[str, Any]) -> str:
    if summary["codec"] == "exact":
        return "exact: log-probabilities are the teacher's float32, to the last bit"
    return (
        f"{summary['codec']}: rounding cost {summary['codec_mean_kl']:.2g} nats of KL divergence per position on "
        f"average and moved no log-probability by more than {summary['codec_max_error']:.2g} nats (both measured)"
    )


def _table(header: Sequence[str], rows: Any) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |" for cells in lines]


def _type(column: Column) -> str:
    """Its type, in the words of numpy."""
    words = {"item: ": "", "element: ": "", "double": "float64", "float>": "float32>"}
    name = str(column.type)
    for theirs, ours in words.items():
        name = name.replace(theirs, ours)
    return name
