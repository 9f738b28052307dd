"""Plots of a store's figures, and one HTML file with them that needs no network."""

import base64
import io
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from logit_store.errors import ConfigError
from logit_store.reader import LogitStore, TokenStore
from logit_store.storage import Storage
from logit_store.tools.outputs import whole_file
from logit_store.tools.stats import SPREAD_COLUMNS, Figures, Sample, fact_lines, spread_lines
from logit_store.tools.summary import summarize

SMALLEST_SHARE = 0.002
"""Sections of fewer bytes have no bar: nobody could see it."""

LOG_FROM = 50
"""Rows in one bar from which on rare lengths would be invisible without a log scale."""


def require_libraries() -> None:
    """Raise ConfigError where there is nothing to draw with."""
    missing = [name for name in ("matplotlib", "jinja2") if find_spec(name) is None]
    if missing:
        raise ConfigError(f'--out needs {" and ".join(missing)}: pip install "decant[report]", or leave --out away')


def write_page(out: str, store: TokenStore | LogitStore, sample: Sample | None, found: Figures) -> str:
    """Write ``stats.html`` and the plots as PNG files into ``out``; the page's path. Raises StoreError."""
    plots = draw_plots(store.lengths_N, sample, found)
    target = Storage(out)
    files = {f"{name}.png": png for name, png in plots.items()}
    for name, data in {**files, "stats.html": _render(store, plots, found).encode()}.items():
        with whole_file(target, name) as stream:
            stream.write(data)
    return target.path("stats.html")


def draw_plots(lengths_N: NDArray[np.int32], sample: Sample | None, found: Figures) -> dict[str, bytes]:
    """PNG bytes by name."""
    plots = {}
    if sample is not None and len(sample.entropy_P):
        of = f"of {len(sample.entropy_P):,} positions"
        entropy = found["entropy"]
        plots["entropy"] = _histogram(
            sample.entropy_P, _bins(0, entropy["max"]), f"Entropy of kept ids and tail, {of}", "nats"
        )
        low = np.floor(20 * found["kept_mass"]["min"]) / 20
        title = f"Mass of the kept ids, {of}"
        plots["kept_mass"] = _histogram(sample.kept_mass_P, _bins(min(low, 0.95), 1), title, "kept mass")
        entries = sample.num_entries_P
        title = f"Entries of head and draws, {of}"
        plots["entries"] = _histogram(entries, _integer_bins(entries), title, "entries per position")
        plots["next_rank"] = _rank_plot(found["next_token"])
    if len(lengths_N):
        title = f"Length of all {len(lengths_N):,} rows"
        plots["lengths"] = _histogram(lengths_N, _integer_bins(lengths_N), title, "tokens", "rows")
    if found["bytes"]:
        plots["sections"] = _section_plot(found)
    return plots


def _bins(start: float, stop: float, count: int = 60) -> NDArray[np.float64]:
    return np.linspace(start, stop if stop > start else start + 1, count + 1)


def _integer_bins(values: NDArray[Any], most: int = 64) -> NDArray[np.float64]:
    """Edges between integers from 0 on, so that each bar stands for equally many of them."""
    last = int(values.max())
    width = -(-(last + 1) // most)
    return np.arange(last // width + 2, dtype=np.float64) * width - 0.5


def _histogram(
    values: NDArray[Any], edges: NDArray[np.float64], title: str, xlabel: str, ylabel: str = "share of positions"
) -> bytes:
    """Bars of the share that each bin has, or of counts if ``ylabel`` is "rows"; a line at the mean."""
    figure, axis = _axes(title, xlabel, ylabel)
    counts, _ = np.histogram(values, edges)
    is_counts = ylabel == "rows"
    is_log = is_counts and bool(counts.max() > LOG_FROM)
    heights = counts if is_counts else counts / len(values)
    axis.bar(edges[:-1], heights, np.diff(edges), align="edge", color="C0", edgecolor="white", lw=0.3, log=is_log)
    mean = float(values.mean())
    axis.axvline(mean, color="C1", lw=1.2)
    axis.set_title(f"mean {mean:,.4g}", loc="right", fontsize=9, color="C1")
    axis.set_xlim(edges[0], edges[-1])
    if is_log:
        axis.set_ylim(bottom=0.7)  # a bar of one row has a height
        axis.yaxis.set_major_formatter("{x:,.0f}")
        axis.yaxis.set_minor_formatter("")
    elif not is_counts:
        axis.yaxis.set_major_formatter(_percent_formatter())
    return _png(figure)


def _rank_plot(next_token: Figures) -> bytes:
    title = f"Rank of the next token in the head, of {next_token['positions']:,} positions that carry loss"
    figure, axis = _axes(title, "rank", "share of positions")
    shares = next_token["ranks"]
    colours = ["C0"] * (len(shares) - 1) + ["0.6"]
    bars = axis.bar(list(shares), list(shares.values()), color=colours)
    axis.bar_label(bars, [f"{share:.1%}" for share in shares.values()], fontsize=8, padding=2)
    axis.margins(y=0.12)
    axis.yaxis.set_major_formatter(_percent_formatter())
    return _png(figure)


def _section_plot(found: Figures) -> bytes:
    sections = sorted(found["section_bytes"].items(), key=lambda item: item[1])
    sections = [(name, size) for name, size in sections if size >= SMALLEST_SHARE * found["bytes"]]
    unit, scale = ("MB", 1e6) if found["bytes"] >= 1e6 else ("kB", 1e3)
    title = f"Bytes by section, of {found['bytes'] / scale:,.1f} {unit}"
    figure, axis = _axes(title, unit, "", height=1.2 + 0.3 * len(sections))
    bars = axis.barh([name for name, _ in sections], [size / scale for _, size in sections], color="C0")
    axis.bar_label(bars, [f"{size / found['bytes']:.1%}" for _, size in sections], fontsize=8, padding=3)
    axis.grid(visible=False, axis="y")
    axis.margins(x=0.1)
    return _png(figure)


def _axes(title: str, xlabel: str, ylabel: str, height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure  # without pyplot: drawn by Agg, no window, no global state

    figure = Figure(figsize=(7, height), layout="constrained")
    axis = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axis.set_title(title, loc="left", fontsize=11)
    axis.grid(alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def _percent_formatter() -> Any:
    from matplotlib.ticker import PercentFormatter

    return PercentFormatter(1.0, decimals=None)


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _render(store: TokenStore | LogitStore, plots: dict[str, bytes], found: Figures) -> str:
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string((Path(__file__).parent / "stats.html").read_text("utf-8"))
    summary = {key: value for key, value in summarize(store).items() if not isinstance(value, dict)}
    return template.render(
        path=store.storage.url,
        columns=SPREAD_COLUMNS,
        spreads=spread_lines(found),
        facts=fact_lines(found),
        images={name: base64.b64encode(png).decode() for name, png in plots.items()},
        store=summary,
    )
