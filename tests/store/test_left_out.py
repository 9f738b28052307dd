"""Rows that the teacher could not score keep their places, and nobody takes what stands there for labels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

import decant
from logit_store import LogitRow, LogitStore, Storage, Targets, writer
from logit_store.encode import text_sha256
from logit_store.identity import text_id
from logit_store.loader import Loader
from tests.store.made import TOKENIZER, make_header, make_row

REASON = "killed its worker [3 times]"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[LogitStore, LogitStore]:
    """A store of which the second row of the second shard is left out, and one of the same rows with all labels."""
    folder = tmp_path_factory.mktemp("left-out")
    return make(folder / "lacking", True), make(folder / "whole", False)


def make(folder: Path, leaves_out: bool) -> LogitStore:
    rng = np.random.default_rng(0)
    shards = [[make_row(rng, int(length), 8) for length in rng.integers(2, 30, 4)] for _ in range(3)]
    texts = [text_sha256([row.tokens for row in rows]) for rows in shards]
    storage = Storage(str(folder))
    header = make_header(len(shards), text_id=text_id(str(TOKENIZER["vocabulary_sha256"]), texts))
    header = writer.begin(storage, header, ["labels_id"])
    for shard, rows in enumerate(shards):
        left_out = {1: REASON} if leaves_out and shard == 1 else {}
        of_nothing = [
            LogitRow(row.tokens, Targets.of_nothing(len(row.targets.next_logprob_P), 1, 0)) if i in left_out else row
            for i, row in enumerate(rows)
        ]
        writer.commit_logits(storage, shard, of_nothing, header, left_out)
    writer.finish(storage, header, {"tokenizer/tokenizer.json": b"{}"})
    return LogitStore.open(str(folder))


def test_the_store_names_it(made: tuple[LogitStore, LogitStore], capsys: Any) -> None:
    store, whole = made
    (row,) = store.left_out
    assert store.left_out == {row: REASON}
    assert row == store.shard_rows(1)[1]
    assert store.shards.hash("text_sha256", 1) == whole.shards.hash("text_sha256", 1)
    assert len(store) == len(whole)
    assert row not in store.rows(None)
    assert row in whole.rows(None)
    targets = store[row].targets
    assert (targets.next_logprob_P == -np.inf).all()
    assert (targets.tail_logmass_P == 0).all()
    assert decant.main(["verify", store.storage.url]) == 0
    capsys.readouterr()
    assert decant.main(["inspect", store.storage.url, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["left_out"] == {str(row): REASON}
    assert shown["entries_per_position"] == whole.shards.total("entries") / whole.num_positions  # all heads are alike
    assert shown["kept_mass"] > 0.9 * whole.shards.total("kept_mass") / whole.num_positions


def test_nobody_reads_it_as_labels(made: tuple[LogitStore, LogitStore], tmp_path: Path, capsys: Any) -> None:
    store, whole = made
    (row,) = store.left_out
    loader = Loader(store, rows_per_step=1, split=None, workers=1)
    given = np.concatenate([loader.rows_of(step) for step in range(len(store) - 1)])
    assert sorted(given.tolist()) == sorted(set(range(len(store))) - {row})
    assert decant.main(["stats", store.storage.url, "--json"]) == 0
    assert "Infinity" not in capsys.readouterr().out
    assert decant.main(["diff", store.storage.url, whole.storage.url, "--tolerance", "0.6"]) == 0
    assert decant.main(["export", store.storage.url, "--out", str(tmp_path / "plain")]) == 0
    exported = sum(pq.read_table(path).num_rows for path in (tmp_path / "plain").rglob("*.parquet"))
    assert exported == len(store) - 1
    assert decant.main(["slice", store.storage.url, "--k", "2", "--out", str(tmp_path / "slice")]) == 0
    assert LogitStore.open(str(tmp_path / "slice")).left_out == store.left_out
    assert decant.main(["merge", store.storage.url, "--out", str(tmp_path / "merged")]) == 0
    assert LogitStore.open(str(tmp_path / "merged")).left_out == store.left_out
    for first, second in ((store, whole), (whole, store)):
        out = tmp_path / f"both-{first is store}"
        assert decant.main(["merge", first.storage.url, second.storage.url, "--out", str(out)]) == 0
        assert not LogitStore.open(str(out)).left_out  # what one of them has is no loss
