"""Self-distillation in generations: each finished student is the teacher of the next.

Born-again networks, Furlanello et al. 2018, arXiv 1805.04770. The front door runs the verbs: nothing here scores or
trains.
"""

from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import Field

from logit_store import LogitStore, TokenStore
from logit_store.config import Config
from logit_store.errors import StudentError
from training.config import TrainConfig
from training.run_folder import RunFolder, writing


class GenerationsConfig(Config):
    """One run of `decant generations`: the configs of its two verbs, and how often."""

    path: str
    """Directory of the generations: `N/run` is a student, `N/store` the labels it learned from. Local."""
    count: int = Field(2, ge=1)
    """How many students. A larger number later goes on from the ones that are finished."""
    cache: str
    """Config of `decant cache`: the tokens, the first teacher, and its store, which the first student learns from."""
    train: str
    """Config of `decant train`: every student's. Its store and run.path are set here, and each generation adds 1 to its
    run.seed: a new student begins anew."""
    cache_set: list[str] = []
    """Overrides of `cache`, as on the command line: `targets.k=32`."""
    later_cache_set: list[str] = []
    """Further overrides of `cache` where the teacher is a student: `teacher.tensor_parallel=1`."""
    train_set: list[str] = []
    """Overrides of `train`."""


class Generation(NamedTuple):
    """One turn: the labels of a teacher, and the student that learns from them."""

    number: int
    folder: Path
    cache: dict[str, Any]
    """The config of its `decant cache`."""
    train: dict[str, Any]
    """The config of its `decant train`."""

    def write(self) -> dict[str, Path]:
        """Write both configs into the generation's folder, to be run from here or by hand; their paths by verb."""
        paths = {verb: self.folder / f"{verb}.yaml" for verb in ("cache", "train")}
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            for verb, path in paths.items():
                path.write_text(yaml.safe_dump(getattr(self, verb), sort_keys=False), encoding="utf-8")
        return paths


def plan(config: GenerationsConfig, first: Config, later: Config, train: TrainConfig) -> list[Generation]:
    """The configs of every generation. ``first`` and ``later`` are configs of `decant cache`: the first as it is, of
    later ones the teacher's weights, its quantisation and the store are set here.
    """
    root, generations = Path(config.path), []
    for number in range(1, config.count + 1):
        folder, cache = root / str(number), (first if number == 1 else later).model_dump(mode="json")
        if number > 1:
            teacher = RunFolder(str(root / str(number - 1) / "run")).model
            cache["teacher"] |= {"model": str(teacher), "revision": None, "quantization": None}
            cache["store"]["path"] = str(folder / "store")
        # What was not set stays so: it matters to keys that exclude each other, and beside a DeepSpeed JSON.
        document = train.model_dump(mode="json", exclude_unset=True)
        document["data"] |= {"store": cache["store"]["path"], "teachers": None, "mixture": None}
        document["run"] = {"path": str(folder / "run"), "seed": train.run.seed + number - 1}
        generations.append(Generation(number, folder, cache, document))
    return generations


def check_context(train: TrainConfig, tokens: TokenStore) -> None:
    """Refuse students that could not label the rows they learn from. Raises ConfigError, StudentError.

    A teacher's context must have a place more than its longest row has tokens, a student's may have one fewer.
    """
    from training.students.architecture import student_architecture

    longest, vocabulary_size = int(tokens.lengths_N.max()), int(tokens.manifest["vocabulary_size"])
    architecture = student_architecture(train.student, vocabulary_size, longest - 1)
    context = getattr(architecture.get_text_config(), "max_position_embeddings", None)
    if context is not None and context < longest + 1:
        raise StudentError(
            f"the student's context is {context}, and as the next teacher it must read rows of {longest} tokens, which "
            f"takes {longest + 1}: give it a longer one (student.config.max_position_embeddings)"
        )


COLUMNS = ("generation", "teacher", "held-out loss", "perplexity", "gain", "agreement with its teacher")


def table_rows(generations: list[Generation]) -> list[tuple[str, ...]]:
    """A row of text per finished generation, the first teacher above them; the gain is over the row before."""
    from training.data.source import Source
    from training.watching.evaluation import held_out_prefixes, teacher_figures

    source = Source.of(LogitStore.open(generations[0].train["data"]["store"]))
    max_rows = TrainConfig.model_validate(generations[0].train).evaluation.max_rows
    prefixes = held_out_prefixes(source, max_rows)
    rows, previous = [], teacher_figures(source, prefixes)
    rows.append(_row("teacher", "", previous, "", ""))
    for generation in generations:
        result = RunFolder(generation.train["run"]["path"]).result()
        assert result is not None, "the table comes after every generation"
        held_out, name = result["held_out"], generation.cache["teacher"]["model"]
        gain = f"{previous['loss'] - held_out['loss']:+.4f}"
        rows.append(_row(str(generation.number), name, held_out, gain, f"{held_out['agreement']:.1%}"))
        previous = held_out
    return rows


def _row(name: str, teacher: str, held_out: dict[str, float], gain: str, agreement: str) -> tuple[str, ...]:
    return name, teacher, f"{held_out['loss']:.4f}", f"{held_out['perplexity']:.1f}", gain, agreement


def show(config: GenerationsConfig, generations: list[Generation]) -> None:
    """Print the table, and write it as Markdown into the folder of the generations."""
    from rich.console import Console
    from rich.table import Table

    rows, path = table_rows(generations), Path(config.path) / "table.md"
    with writing(path):
        path.write_text("".join(f"| {' | '.join(row)} |\n" for row in [COLUMNS, ["---"] * len(COLUMNS), *rows]))
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*row)
    console = Console()
    if not console.is_terminal:
        console.width = 170  # a log has no width: every column whole
    console.print(table)
    print(f"table: {path}")
