"""`decant report`: finished runs side by side, as a table, plots and one HTML file that needs no network."""

import base64
import io
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from logit_store.errors import StudentError
from logit_store.tools.summary import summarize
from training.config import DataConfig, LossConfig
from training.data.source import open_source
from training.run_folder import CONFIG, MEMORY, RunFolder, decisive, writing
from training.watching.evaluation import Figures, held_out_prefixes, teacher_figures


class Run(NamedTuple):
    """A finished run."""

    name: str
    path: Path
    config: dict[str, Any]
    result: dict[str, Any]
    metrics: list[dict[str, Any]]

    @property
    def learns_from_labels(self) -> bool:
        """Whether soft labels ever count; without them it is cross-entropy alone."""
        course = {key: self.config["loss"][key] for key in ("alpha", "alpha_schedule")}
        return LossConfig.model_validate(course).needs_labels

    @property
    def loss_is(self) -> str:
        """What it descends, in few words."""
        loss = self.config["loss"]
        if not self.learns_from_labels:
            return "cross-entropy"
        course = f"{loss['alpha']:g}" + (f" to {loss['alpha_schedule']['to']:g}" if loss["alpha_schedule"] else "")
        return f"{course} KD, {loss['tail']}"

    @property
    def gradient_norm_variance(self) -> float:
        """Of the steps after the warm-up; NaN where there are fewer than two."""
        warmup = self.config["schedule"]["warmup_tokens"]
        norms = [line["gradient_norm"] for line in self.metrics if "gradient_norm" in line
                 and line["tokens_seen"] > warmup and math.isfinite(line["gradient_norm"])]  # fmt: skip
        return statistics.variance(norms) if len(norms) > 1 else math.nan


def report(paths: Sequence[str], out: str | None) -> Path:
    """Write ``report.html``, PNGs and ``table.md``, print the table; the HTML file's path. Runs that are not finished
    are left out, with a warning.

    Raises StudentError: a directory holds no run, none is finished, or runs are of different stores.
    """
    runs = sorted(_load(paths), key=lambda run: (run.result["parameters"], not run.learns_from_labels, run.name))
    _check_comparable(runs)
    labelled = [run for run in runs if run.config["identity"]["labels_id"]] or runs
    source = open_source(DataConfig.model_validate(labelled[0].config["data"]))
    summaries = [summarize(store) for store in source.stores]
    teacher = None
    if source.has_labels:
        teacher = teacher_figures(source, held_out_prefixes(source, runs[0].config["evaluation"]["max_rows"]))
    rows = table_rows(runs, teacher)
    plots = draw_plots(runs, teacher)
    folder = Path(out) if out is not None else runs[0].path.parent.parent / "report"
    page = folder / "report.html"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        for name, png in plots.items():
            (folder / f"{name}.png").write_bytes(png)
        (folder / "table.md").write_text(markdown_table(rows), encoding="utf-8")
        page.write_text(_render(rows, plots, summaries, runs, teacher), encoding="utf-8")
    _print_table(rows)
    for store in summaries:
        print(f"store: {store['bytes'] / 1e6:,.1f} MB, {store['bytes_per_position']:.1f} bytes per position", end="")
        print(f", kept mass {store['kept_mass']:.4f}" if "kept_mass" in store else "")
    print(f"report: {page}")
    return page


COLUMNS = (
    "model",
    "parameters",
    "loss is",
    "tokens",
    "held-out loss",
    "perplexity",
    "gap to teacher",
    "KL to teacher",
    "gain over CE twin",
    "calibration error",
    "agreement with teacher",
    "gradient norm variance",
    "tokens/s",
    "seconds",
)


def table_rows(runs: Sequence[Run], teacher: Figures | None) -> list[dict[str, str]]:
    """One row of text per model, the teacher first. The gain is the twin's held-out loss minus the run's own."""
    rows = []
    if teacher is not None:
        rows.append(_row("teacher", "", teacher, teacher))
    for run in runs:
        twin = next((other for other in runs if is_twin(run, other)), None)
        gain = twin.result["held_out"]["loss"] - run.result["held_out"]["loss"] if twin else None
        rows.append(_row(run.name, run.loss_is, run.result["held_out"], teacher, gain, run))
    return rows


def _row(name: str, loss: str, held_out: Figures, teacher: Figures | None, gain: float | None = None,
         run: Run | None = None) -> dict[str, str]:  # fmt: skip
    def number(value: float | None, pattern: str) -> str:
        return "" if value is None or value != value else format(value, pattern)

    result = run.result if run else {}
    cells = (
        name,
        number(result.get("parameters"), ",d"),
        loss,
        number(result.get("tokens"), ",d"),
        number(held_out["loss"], ".4f"),
        number(held_out["perplexity"], ".1f"),
        number(held_out["loss"] - teacher["loss"] if teacher else None, "+.4f"),
        number(held_out.get("kl"), ".4f"),
        number(gain, "+.4f"),
        number(held_out["calibration_error"], ".2%"),
        number(held_out["agreement"], ".1%"),
        number(run.gradient_norm_variance if run else None, ".3g"),
        number(result.get("tokens_per_s"), ",.0f"),
        number(result.get("seconds"), ",.0f"),
    )
    return dict(zip(COLUMNS, cells, strict=True))


TWINS_MAY_DIFFER = (*MEMORY, "evaluation.every_tokens", "evaluation.max_rows")
"""Keys beside those of the loss that change nothing of what a run learns, or by rounding alone."""


def is_twin(run: Run, other: Run) -> bool:
    """Whether ``other`` is ``run`` with cross-entropy alone: all else that decides their weights is the same."""
    return run.learns_from_labels and not other.learns_from_labels and _but_labels(run) == _but_labels(other)


def _but_labels(run: Run) -> dict[str, Any]:
    """What decides a run's weights, flat, but for what its soft labels have to do with it."""
    flat = decisive(run.config, TWINS_MAY_DIFFER)
    return {key: value for key, value in flat.items() if not key.startswith("loss.") or key == "loss.z_loss"}


def markdown_table(rows: list[dict[str, str]]) -> str:
    """The table as Markdown, to be pasted where people discuss it."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *(row.values() for row in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def draw_plots(runs: Sequence[Run], teacher: Figures | None) -> dict[str, bytes]:
    """PNG bytes by name: loss and held-out KL over tokens, lengths over steps, held-out loss over size."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figures = {}
    sizes = sorted({run.result["parameters"] for run in runs})
    many = len(runs) > 10
    colours = [colormaps["tab20" if many else "tab10"](i % (20 if many else 10)) for i in range(len(runs))]

    def axes(name: str, title: str, xlabel: str, ylabel: str) -> Any:
        figures[name] = Figure(figsize=(7, 4.2), layout="constrained")
        axis = figures[name].add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3)
        return axis

    loss = axes("loss", "Cross-entropy on the training batches", "tokens seen", "nats per token")
    length = axes("sequence_length", "Length curriculum", "step", "positions per sequence")
    if teacher is not None:
        kl = axes("kl", "KL to the teacher on held-out rows", "tokens seen", "nats per token")
        for run, colour in zip(runs, colours, strict=True):
            seen = [(m["tokens_seen"], m["held_out"]["kl"]) for m in run.metrics if "kl" in m.get("held_out", {})]
            style = "o-" if run.learns_from_labels else "s--"
            kl.plot([x for x, _ in seen], [y for _, y in seen], style, color=colour, label=run.name, lw=1.2, ms=3)
    for run, colour in zip(runs, colours, strict=True):
        steps = [line for line in run.metrics if "ce" in line]
        style = "-" if run.learns_from_labels else "--"
        smooth = _smooth([line["ce"] for line in steps])
        loss.plot([line["tokens_seen"] for line in steps], smooth, style, color=colour, label=run.name, lw=1.2)
        length.plot([s["step"] for s in steps], [s["sequence_length"] for s in steps], style, color=colour,
                    label=run.name, lw=1.2)  # fmt: skip
    size = axes("size", "Held-out loss over student size", "parameters", "nats per token")
    for label, chosen, style in (
        ("cross-entropy", [run for run in runs if not run.learns_from_labels], "s--"),
        ("distilled", [run for run in runs if run.learns_from_labels], "o-"),
    ):
        if chosen:
            if len({run.result["parameters"] for run in chosen}) < len(chosen):
                style = style[0]  # several of one size: a line through them would say nothing
            size.plot([r.result["parameters"] for r in chosen], [r.result["held_out"]["loss"] for r in chosen],
                      style, label=label)  # fmt: skip
    if teacher is not None:
        size.axhline(teacher["loss"], color="grey", ls=":", label="teacher")
    size.set_xscale("log")
    size.set_xticks(sizes, [f"{s / 1e6:.2f}M" for s in sizes], minor=False)
    size.minorticks_off()
    for figure in figures.values():
        figure.axes[0].legend(fontsize=8)
    return {name: _png(figure) for name, figure in figures.items()}


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, started at the first value."""
    smooth: list[float] = []
    for value in values:
        smooth.append(value if not smooth else weight * smooth[-1] + (1 - weight) * value)
    return smooth


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    return buffer.getvalue()


def _load(paths: Sequence[str]) -> list[Run]:
    """The finished ones of these runs, each once. Raises StudentError."""
    runs, unfinished = [], []
    for path in dict.fromkeys(Path(path).resolve() for path in paths):
        folder = RunFolder(str(path))
        if not (path / CONFIG).exists():
            raise StudentError(f"{path} holds no run")
        result = folder.result()
        if result is None:
            unfinished.append(f"{path} is not finished: run its `decant train` again")
            continue
        config = yaml.safe_load((path / CONFIG).read_text())
        runs.append(Run(path.name, path, config, result, folder.metrics()))
    if not runs:
        raise StudentError("; ".join(unfinished))
    for line in unfinished:
        print(f"warning: left out: {line}", file=sys.stderr)
    return [run._replace(name=name) for run, name in zip(runs, names([run.path for run in runs]), strict=True)]


def names(paths: Sequence[Path]) -> list[str]:
    """What to call each of different paths: as many of their last parts as tell all of them apart."""
    longest = max(len(path.parts) for path in paths)
    found = (["/".join(path.parts[-n:]) for path in paths] for n in range(1, longest + 1))
    return next(candidates for candidates in found if len(set(candidates)) == len(paths))


def _check_comparable(runs: Sequence[Run]) -> None:
    """Held-out figures compare only on the same rows. Raises StudentError."""
    texts = {run.config["identity"]["text_id"]: run.name for run in runs}
    if len(texts) > 1:
        raise StudentError(f"runs {', '.join(texts.values())} are of different text and cannot be compared")
    labels = {run.config["identity"]["labels_id"]: run.name for run in runs if run.config["identity"]["labels_id"]}
    if len(labels) > 1:
        raise StudentError(f"runs {', '.join(labels.values())} learned from different labels: report them apart")
    rows = {run.config["evaluation"]["max_rows"]: run.name for run in runs}
    if len(rows) > 1:
        raise StudentError(f"runs {', '.join(rows.values())} differ in evaluation.max_rows and cannot be compared")


LENGTH_FIGURES = {"loss": ".4f", "kl": ".4f", "agreement": ".1%", "calibration_error": ".2%"}


def length_rows(runs: Sequence[Run], teacher: Figures | None) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table by length: for each model and figure, its value in every bucket of held-out rows."""
    shown = [("teacher", teacher)] if teacher is not None else []
    shown += [(run.name, run.result["held_out"]) for run in runs if "by_length" in run.result["held_out"]]
    spans = list(shown[0][1]["by_length"]) if shown else []
    rows = []
    for name, figures in shown:
        for figure, pattern in LENGTH_FIGURES.items():
            values = [figures["by_length"][span][figure] for span in spans]
            cells = [format(value, pattern) if value == value else "" for value in values]
            if any(cells):  # all NaN: there is no teacher. Some: rows of these lengths have no heads
                rows.append([name, figure.replace("_", " "), *cells])
    return ["model", "figure", *spans], rows


def _render(rows: list[dict[str, str]], plots: dict[str, bytes], stores: Sequence[dict[str, Any]],
            runs: Sequence[Run], teacher: Figures | None) -> str:  # fmt: skip
    from jinja2 import Environment

    template = Environment(autoescape=True).from_string((Path(__file__).parent / "report.html").read_text())
    images = {name: base64.b64encode(png).decode() for name, png in plots.items()}
    configs = {run.name: yaml.safe_dump(run.config, sort_keys=False) for run in runs}
    shown = [{key: value for key, value in store.items() if not isinstance(value, dict)} for store in stores]
    header, by_length = length_rows(runs, teacher)
    return template.render(
        columns=COLUMNS, rows=rows, images=images, stores=shown, configs=configs, spans=header, by_length=by_length
    )


def _print_table(rows: list[dict[str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in COLUMNS:
        text = column in ("model", "loss is")
        table.add_column(column, justify="left" if text else "right", no_wrap=text)
    for row in rows:
        table.add_row(*row.values())
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a log has no width: every column whole
    console.print(table)
