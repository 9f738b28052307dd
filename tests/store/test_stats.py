"""The figures of `decant stats` against dense float64 arithmetic, and its page against a parser."""

import base64
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decant
from logit_store import LogitRow, LogitStore, TokenRow
from logit_store.tools.positions import entropies, kept_masses, next_ranks
from logit_store.tools.stats import DEFAULT_ROWS, rank_shares, sample_rows
from tests.store.made import V, make_row, targets_of, write_store, write_tokens

FORCED = [3, 9]


class Dense:
    """Rows whose whole distributions are known, and every figure of them by plain loops in float64."""

    def __init__(self, seed: int = 0) -> None:
        self.rng = np.random.default_rng(seed)
        self.rows: list[LogitRow] = []
        self.entropy: list[float] = []
        self.kept_mass: list[float] = []
        self.entries: list[int] = []
        self.ranks: list[int | None] = []
        self.loss: list[float] = []

    def add(self, length: int) -> None:
        ids = self.rng.integers(0, V, length).astype(np.int32)
        p = max(length - 1, 0)
        scores = self.rng.normal(size=(p, V)) * self.rng.choice([0.5, 3.0, 8.0], (p, 1))
        scores[::3, 7] = -np.inf
        logprobs_PV = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
        counts = self.rng.integers(0, 12, p)
        mask = self.rng.random(p) < 0.6
        targets = targets_of(logprobs_PV, ids, counts.tolist(), self.rng, forced_ids=FORCED, max_draws=3)
        self.rows.append(LogitRow(TokenRow(0, "train", ids, mask), targets))
        for t in range(p):
            self._count(logprobs_PV[t], int(counts[t]), int(ids[t + 1]), bool(mask[t]))
        self.entries += (targets.head_counts_P + targets.sampled_counts_P).tolist()

    def _count(self, logprobs_V: np.ndarray, count: int, next_id: int, carries_loss: bool) -> None:
        head = np.argsort(-logprobs_V, kind="stable")[:count].tolist()
        p_V = np.exp(logprobs_V)
        kept = [p_V[i] for i in {*head, next_id, *FORCED}]
        parts = np.array([*kept, max(1 - sum(kept), 0.0)])
        self.entropy.append(float(-(parts[parts > 0] * np.log(parts[parts > 0])).sum()))
        self.kept_mass.append(sum(kept))
        if carries_loss:
            self.ranks.append(head.index(next_id) + 1 if next_id in head else None)
            self.loss.append(-logprobs_V[next_id])

    def store(self, folder: Path, kind: str = "exact") -> LogitStore:
        codec = {"kind": kind, "max_kl": 1e-4, "max_error": 0.5}
        third = len(self.rows) // 3
        shards = [self.rows[:third], self.rows[third:]]
        return write_store(str(folder / "store"), shards, codec=codec, forced_ids=FORCED, temperatures=[])


@pytest.fixture
def dense() -> Dense:
    dense = Dense()
    for length in (30, 1, 0, 2, 90, 41, 3, 200, 17):
        dense.add(length)
    return dense


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: Any, code: int = 0) -> str:
        assert decant.main(["stats", *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


@pytest.mark.parametrize(("kind", "tolerance"), [("exact", 2e-6), ("lossy", 0.05)])
def test_every_position_against_float64(tmp_path: Path, dense: Dense, kind: str, tolerance: float) -> None:
    store = dense.store(tmp_path, kind)
    entropy: list[float] = []
    kept: list[float] = []
    ranks: list[int] = []
    for number in range(len(store)):
        tokens, targets = store[number]
        next_ids_P = tokens.input_ids_T[1:]
        entropy += entropies(targets, next_ids_P, FORCED).tolist()
        kept += kept_masses(targets).tolist()
        mask_P = np.ones(len(next_ids_P), bool) if tokens.loss_mask_P is None else tokens.loss_mask_P
        ranks += next_ranks(targets, next_ids_P)[mask_P].tolist()
    np.testing.assert_allclose(entropy, dense.entropy, atol=tolerance)
    np.testing.assert_allclose(kept, dense.kept_mass, atol=1e-6)
    if kind == "exact":  # rounding makes ties
        assert ranks == [rank or 0 for rank in dense.ranks]
    assert [rank == 0 for rank in ranks] == [rank is None for rank in dense.ranks]


def test_a_whole_vocabulary_gives_the_teachers_own_entropy(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ids = rng.integers(0, V, 40).astype(np.int32)
    scores = rng.normal(size=(39, V)) * 2
    logprobs_PV = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True)
    row = LogitRow(TokenRow(0, "train", ids), targets_of(logprobs_PV, ids, [V] * 39, rng))
    codec = {"kind": "exact", "max_kl": 1e-4, "max_error": 0.5}
    targets = write_store(str(tmp_path / "s"), [[row]], codec=codec, temperatures=[], k=V)[0].targets
    np.testing.assert_allclose(entropies(targets, ids[1:], []), -(np.exp(logprobs_PV) * logprobs_PV).sum(1), atol=2e-6)
    np.testing.assert_array_equal(kept_masses(targets), 1.0)
    wanted = [int((row_V > row_V[i]).sum()) + 1 for row_V, i in zip(logprobs_PV, ids[1:], strict=True)]
    assert next_ranks(targets, ids[1:]).tolist() == wanted


def test_figures_of_the_whole_store(tmp_path: Path, dense: Dense, said: Callable[..., str]) -> None:
    store = dense.store(tmp_path)
    found = json.loads(said(store.storage.url, "--json"))
    assert (found["rows"], found["rows_read"]) == (9, 9)
    assert found["positions"] == found["positions_read"] == len(dense.entropy)
    for figure, values in (
        ("entropy", dense.entropy),
        ("kept_mass", dense.kept_mass),
        ("entries_per_position", dense.entries),
        ("tokens_per_row", [len(row.tokens.input_ids_T) for row in dense.rows]),
    ):
        wanted = {"mean": np.mean(values), "min": min(values), "max": max(values), "p50": np.median(values)}
        wanted |= {f"p{p}": np.percentile(values, p) for p in (5, 95)}
        assert found[figure] == pytest.approx(wanted, abs=2e-6), figure
    next_token, ranks = found["next_token"], dense.ranks
    assert next_token["positions"] == len(ranks)
    assert next_token["in_head"] == pytest.approx(np.mean([rank is not None for rank in ranks]))
    assert next_token["top1_accuracy"] == pytest.approx(np.mean([rank == 1 for rank in ranks]))
    assert 0 < next_token["top1_accuracy"] < next_token["in_head"] < 1
    finite = all(np.isfinite(dense.loss))
    assert next_token["loss"] == (pytest.approx(np.mean(dense.loss), abs=1e-5) if finite else None)
    assert sum(next_token["ranks"].values()) == pytest.approx(1)
    assert sum(found["section_bytes"].values()) == found["bytes"]
    bits = found["bits_per_entry"]
    assert bits["all"] == pytest.approx(8 * store.num_bytes / sum(dense.entries))
    assert 0 < bits["ids"] < bits["all"] - bits["log-probs"]
    assert 20 < bits["log-probs"] <= 32 * sum(len(r.targets.head_ids_N) for r in dense.rows) / sum(dense.entries) + 1


def test_a_sample_is_spread_over_the_store(tmp_path: Path, dense: Dense, said: Callable[..., str]) -> None:
    assert decant._parser().parse_args(["stats", "s"]).rows == DEFAULT_ROWS
    assert sample_rows(9, 2000).tolist() == list(range(9))
    assert sample_rows(9, 3).tolist() == [0, 4, 8]
    assert sample_rows(9, 1).tolist() == [0]
    assert sample_rows(0, 5).tolist() == []
    assert len(set(sample_rows(2719, 2000).tolist())) == 2000
    url = dense.store(tmp_path).storage.url
    found = json.loads(said(url, "--rows", 3, "--json"))
    assert (found["rows_read"], found["positions_read"]) == (3, 29 + 89 + 16)
    assert found["tokens_per_row"]["max"] == 200, "lengths are of all rows"
    assert "3 of 9, evenly spaced" in said(url, "--rows", 3)


def test_rank_shares() -> None:
    shares = rank_shares(np.array([1, 1, 2, 3, 4, 5, 0, 0, 0, 9], np.int32))
    assert shares == {"1": 0.2, "2": 0.1, "3-4": 0.2, "5-8": 0.1, "9-16": 0.1, "outside": 0.3}
    assert rank_shares(np.array([1, 0], np.int32)) == {"1": 0.5, "outside": 0.5}
    assert set(rank_shares(np.zeros(0, np.int32))) == {"1", "outside"}


class _Page(HTMLParser):
    """Images, and everything that a browser would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.images: dict[str, bytes] = {}
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        for key in ("src", "href"):
            if (value := given.get(key)) is not None:
                if value.startswith("data:image/png;base64,"):
                    self.images[str(given["alt"])] = base64.b64decode(value.split(",")[1])
                else:
                    self.fetched.append(value)


def test_the_page_stands_alone(tmp_path: Path, dense: Dense, said: Callable[..., str]) -> None:
    from matplotlib.image import imread

    store, out = dense.store(tmp_path), tmp_path / "out"
    assert f"plots: {out}/stats.html" in said(store.storage.url, "--out", out)
    text = (out / "stats.html").read_text()
    page = _Page(text)
    assert page.fetched == []
    assert not re.search(r"url\(|@import|<script", text)
    assert set(page.images) == {"entropy", "kept_mass", "entries", "lengths", "next_rank", "sections"}
    for name, png in page.images.items():
        assert (out / f"{name}.png").read_bytes() == png
        pixels = imread(io.BytesIO(png))
        assert pixels.shape[1] == 840
        assert 0.02 < (pixels[..., :3].min(-1) < 0.9).mean() < 0.6, f"{name} is blank, or a block"
    assert store.manifest["labels_id"] in text
    assert said(store.storage.url, "--out", out, "--json").startswith("{"), "again, over what is there"


def test_bars_are_as_high_as_the_shares(dense: Dense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn, not only that something is."""
    from logit_store.tools import stats_page
    from logit_store.tools.stats import figures, read_sample

    store = dense.store(tmp_path)
    sample = read_sample(store, np.arange(9))
    drawn: list[Any] = []

    def keep(figure: Any) -> bytes:
        drawn.append(figure)
        return b""

    monkeypatch.setattr(stats_page, "_png", keep)
    names = list(stats_page.draw_plots(store.lengths_N, sample, figures(store, 9, sample)))
    axes = dict(zip(names, (figure.axes[0] for figure in drawn), strict=True))
    heights = {name: [bar.get_height() for bar in axis.patches] for name, axis in axes.items()}
    for name in ("entropy", "kept_mass", "entries", "next_rank"):
        assert sum(heights[name]) == pytest.approx(1.0), name
    assert heights["entries"] == pytest.approx(np.bincount(dense.entries) / len(dense.entries))
    assert sum(heights["lengths"]) == 9
    widths = sum(bar.get_width() for bar in axes["sections"].patches)
    assert widths == pytest.approx(store.num_bytes / 1e3, rel=0.02)
    for axis in axes.values():
        assert axis.get_xlabel()
        assert axis.get_title(loc="left")
    assert [axes[name].get_ylabel() for name in ("entropy", "lengths")] == ["share of positions", "rows"]


def test_stores_of_little(tmp_path: Path, said: Callable[..., str]) -> None:
    """No position, no row, no labels: nothing divides by zero, and JSON stays JSON."""
    no_positions = write_store(str(tmp_path / "a"), [[make_row(np.random.default_rng(0), 1, 4)]])
    no_rows = write_store(str(tmp_path / "b"), [[]])
    tokens = write_tokens(str(tmp_path / "c"), [[make_row(np.random.default_rng(0), 9, 1).tokens]])
    for store in (no_positions, no_rows, tokens):
        found = json.loads(said(store.storage.url, "--json"), parse_constant=pytest.fail)
        assert found["rows"] == len(store)
        said(store.storage.url, "--out", tmp_path / f"out-{found['kind']}-{len(store)}")
    assert "entropy" not in found
    assert sorted(path.name for path in (tmp_path / "out-tokens-1").iterdir()) == [
        "lengths.png",
        "sections.png",
        "stats.html",
    ]


@pytest.mark.parametrize("library", ["matplotlib", "jinja2"])
def test_plots_need_libraries_that_are_named(
    tmp_path: Path, dense: Dense, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    url = dense.store(tmp_path).storage.url
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    line = said(url, "--out", tmp_path / "out", code=2)
    assert f'--out needs {library}: pip install "decant[report]"' in line
    assert not (tmp_path / "out").exists()
    said(url)


def test_what_cannot_be_is_refused(tmp_path: Path, dense: Dense, said: Callable[..., str]) -> None:
    url = dense.store(tmp_path).storage.url
    assert "--rows 0: give a number of rows to read" in said(url, "--rows", 0, code=2)
    assert "is inside the store" in said(url, "--out", f"{url}/stats", code=2)


def test_nothing_heavy_is_imported_with_the_tools() -> None:
    modules = "export, inspect_row, plain_columns, positions, stats, stats_page, token_text, dataset_card"
    heavy = ["torch", "transformers", "tokenizers", "datasets", "matplotlib", "jinja2", "rich", "pyarrow.parquet"]
    script = f"from logit_store.tools import {modules}; import sys; print([m for m in {heavy} if m in sys.modules])"
    folder = Path(decant.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=folder)
    assert done.stdout.strip() == "[]"
