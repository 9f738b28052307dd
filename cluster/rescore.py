"""`decant verify --rescore`: some rows of a store, scored again by its teacher: do the labels still stand?"""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cluster.config import TargetsConfig, TeacherConfig
from cluster.hashing import model_folder, weights_sha256
from logit_store import LogitStore
from logit_store.config import parse_config
from logit_store.errors import ConfigError, StoreError, TeacherError
from logit_store.identity import labels_id
from logit_store.tools.diff import RowDifference, print_differences
from logit_store.tools.difference import LIKELY, Difference, Labels, compare
from logit_store.tools.outputs import finite
from logit_store.tools.progress import progress_bar

if TYPE_CHECKING:
    from cluster.teachers.teacher import Teacher

RUNS_CODE = ("trust_remote_code", "pickled_weights")
"""Keys of ``TeacherConfig`` by which a model's files run code: whoever asks allows it, and never the store."""

ROWS_PER_CALL = 16
"""Rows that the teacher gets at a time, so that the progress bar moves."""


class Drift(NamedTuple):
    """How far the stored labels are from what the teacher says now: stored first, now second."""

    overall: Difference
    rows: list[RowDifference]
    codec_error: float
    """What rounding alone moved a log-prob of these rows' shards by, at most."""

    def is_within(self, tolerance: float) -> bool:
        """Whether the log-prob of no likely id is further off than rounding and ``tolerance`` explain."""
        return self.overall.max_likely_error <= tolerance + self.codec_error


def rescore(url: str, num_rows: int, teacher: str | None = None, seed: int = 0, trust: Collection[str] = ()) -> Drift:
    """Score ``num_rows`` random rows of a finished logit store again, by the backend and dtype that made it.

    ``teacher`` is where the model is now, if it has moved. ``trust`` names those of ``RUNS_CODE`` that the caller
    allows. Rows of one token have no labels and are never drawn. Raises TeacherError: the model cannot be found or
    loaded, or is not the one that the store names; ConfigError; StoreError.
    """
    if num_rows < 1:
        raise ConfigError(f"--rescore {num_rows}: give at least one row")
    store = LogitStore.open(url)
    labels, provenance = _origin(store.manifest)
    config = _teacher_config(store, provenance, teacher, trust)
    _check_weights(config, labels, store)
    rows = _random_rows(store, num_rows, seed)
    backend = _build(config, store, labels, bool(provenance.get("gpus_per_worker")))
    try:
        found = _differences(store, backend, rows)
    finally:
        backend.close()
    shards = {store.shards.shard_of(row)[0] for row in rows}
    codec_error = max(float(store.shards.columns["max_error"][shard]) for shard in shards)
    return Drift(Difference.total(difference for _, difference in found), found, codec_error)


def rescore_command(
    url: str, num_rows: int, teacher: str | None, tolerance: float, seed: int, as_json: bool, trust: Collection[str]
) -> int:
    """`decant verify --rescore`: its exit code, 1 where the labels have drifted. Raises DecantError."""
    drift = rescore(url, num_rows, teacher, seed, trust)
    allowed = tolerance + drift.codec_error
    if as_json:
        rows = [{"row": row, **difference._asdict()} for row, difference in drift.rows]
        verdict = {"within_tolerance": drift.is_within(tolerance), "allowed": allowed}
        print(json.dumps(finite({**verdict, "overall": drift.overall._asdict(), "rows": rows}), indent=2))
    else:
        print_differences(f"{url}: stored labels and the teacher now", drift.overall, drift.rows)
        print(
            f"ids with p ≥ {LIKELY:g} are off by at most {drift.overall.max_likely_error:.3g} nats; {allowed:.3g} are "
            f"allowed ({tolerance:g} and the codec's {drift.codec_error:.3g})"
        )
    return 0 if drift.is_within(tolerance) else 1


def _origin(manifest: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """What a teacher was asked, and where: a slice names its parent, which may be a slice too."""
    labels, provenance = manifest.get("labels") or {}, manifest.get("provenance") or {}
    while "parent" in labels:
        provenance = provenance.get("parent") or {}
        labels = provenance.get("labels") or {}
    return labels, provenance


def _teacher_config(
    store: LogitStore, provenance: Mapping[str, Any], moved_to: str | None, trust: Collection[str]
) -> TeacherConfig:
    """The config that made the store, but for what runs code."""
    if "teacher" not in provenance:
        raise StoreError(f"{store.storage.url} does not say which teacher made it: it was not made by `decant cache`")
    moved = {} if moved_to is None else {"model": moved_to, "revision": None}
    trusted = {name: name in trust for name in RUNS_CODE}
    return parse_config(TeacherConfig, {**provenance["teacher"], **moved, **trusted}, "the store's teacher")


def _check_weights(config: TeacherConfig, labels: Mapping[str, Any], store: LogitStore) -> None:
    try:
        folder: Path = model_folder(config.model, config.revision)
    except TeacherError as error:
        raise TeacherError(f"{error}. If the teacher has moved, say where it is with --teacher") from error
    found, wanted = weights_sha256(folder), labels.get("teacher")
    if found != wanted:
        raise TeacherError(
            f"the labels of {store.storage.url} are those of a teacher with weights {str(wanted)[:12]}…, but "
            f"{folder} has {found[:12]}…: it is another model. Say where the teacher is with --teacher"
        )


def _random_rows(store: LogitStore, num_rows: int, seed: int) -> NDArray[np.int64]:
    candidates = np.setdiff1d(np.flatnonzero(store.lengths_N > 1), list(store.left_out))
    if not len(candidates):
        raise StoreError(f"{store.storage.url} has no row with a position: there is nothing to score")
    rng = np.random.default_rng(seed)
    return np.sort(rng.choice(candidates, min(num_rows, len(candidates)), replace=False))


def _build(config: TeacherConfig, store: LogitStore, labels: Mapping[str, Any], was_on_gpu: bool) -> "Teacher":
    """The teacher as it was, to be asked what it was asked: a slice for fewer entries than its parent."""
    import torch

    from cluster.teachers.targets import Selector
    from cluster.teachers.teacher import build_teacher

    targets = parse_config(TargetsConfig, labels["targets"], "the store's targets")
    if targets.k is not None:
        targets = targets.model_copy(update={"k": store.manifest["k"]})
    selector = Selector(targets, store.manifest["vocabulary_size"], labels_id(labels))
    on_gpu = was_on_gpu and torch.cuda.is_available()
    return build_teacher(config, selector, int(store.lengths_N.max()), on_gpu)


def _differences(store: LogitStore, backend: "Teacher", rows: NDArray[np.int64]) -> list[RowDifference]:
    found: list[RowDifference] = []
    with progress_bar("rescore", len(rows), "rows") as advance:
        for start in range(0, len(rows), ROWS_PER_CALL):
            numbers = rows[start : start + ROWS_PER_CALL].tolist()
            stored = [store[row] for row in numbers]
            scored = backend.score([row.tokens.input_ids_T for row in stored], numbers)
            for number, row, now in zip(numbers, stored, scored, strict=True):
                labels = Labels(row.targets, store.manifest["forced_ids"])
                found.append(RowDifference(number, compare(labels, Labels(now), row.tokens.input_ids_T[1:])))
            advance(len(numbers))
    return found
