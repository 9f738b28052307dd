"""`decant merge`: one job's shards from several places are one store, to the byte."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decant
from logit_store import LogitRow, LogitStore, Storage, writer
from logit_store.errors import ConfigError, FormatError, IdentityError, UnavailableError
from logit_store.format import record_name
from logit_store.identity import HEADER_IDENTITY, labels_id
from logit_store.tools.merge import merge
from logit_store.tools.verify import verify
from tests.store.made import make_row, write_store, write_tokens
from tests.store.test_left_out import make

LABELS = {"teacher": "t" * 64}
HEADER: dict[str, Any] = {"labels": LABELS, "labels_id": labels_id(LABELS)}
NUM_SHARDS = 5


def make_rows() -> list[list[LogitRow]]:
    rng = np.random.default_rng(0)
    return [[make_row(rng, int(length), 8) for length in rng.integers(1, 30, 4)] for _ in range(NUM_SHARDS)]


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    write_store(str(tmp_path / "whole"), make_rows(), **HEADER)
    return tmp_path / "whole"


def part_of(whole: Path, name: str, shards: list[int], **changes: Any) -> Path:
    """An unfinished store that has committed these shards."""
    folder = whole.parent / name
    header = writer.unseal((whole / "header.json").read_bytes(), "header", "")
    storage = Storage(str(folder))
    writer.begin(storage, {**header, **changes}, HEADER_IDENTITY[header["kind"]])
    for shard in shards:
        for path in (whole / "shards").glob(f"{shard:06d}*"):
            storage.create(f"shards/{path.name}", path.read_bytes())
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 16
    path.write_bytes(data)


def object_of(folder: Path, shard: int) -> Path:
    return next((folder / "shards").glob(f"{shard:06d}-*"))


def test_halves_make_a_whole(whole: Path, tmp_path: Path) -> None:
    """No half is finished and the tokenizer is with neither: the job's own command finishes the store."""
    a, b = part_of(whole, "a", [0, 2, 3]), part_of(whole, "b", [1, 3, 4])
    merged = merge([str(a), str(b)], str(tmp_path / "out"))
    assert (merged.missing, merged.damaged, merged.is_finished) == ([], [], False)
    header = writer.unseal((tmp_path / "out/header.json").read_bytes(), "header", "")
    writer.finish(Storage(str(tmp_path / "out")), header, {"tokenizer/tokenizer.json": b"{}"})
    assert contents(tmp_path / "out") == contents(whole)


def test_with_a_finished_store_among_them_the_whole_is_finished(whole: Path, tmp_path: Path) -> None:
    a = part_of(whole, "a", [0, 1])
    assert merge([str(a), str(whole)], str(tmp_path / "out")).is_finished
    assert contents(tmp_path / "out") == contents(whole)
    assert verify(str(tmp_path / "out")) == []
    assert merge([str(a), str(whole)], str(tmp_path / "out")).is_finished  # again: nothing to do
    assert merge([str(a), str(whole)], str(a)).is_finished  # into one of them
    assert contents(a) == contents(whole)


def test_the_first_undamaged_shard_is_taken(whole: Path, tmp_path: Path) -> None:
    a, b = part_of(whole, "a", [0, 1, 2, 3]), part_of(whole, "b", [0, 1, 2, 3])
    damage(object_of(a, 0))
    damage(a / record_name(1))
    object_of(a, 2).unlink()
    for folder in (a, b):
        damage(object_of(folder, 3))
    merged = merge([str(a), str(b), str(part_of(whole, "c", [4]))], str(tmp_path / "out"))
    assert merged.missing == [3]
    assert [reason.split("/shards/")[1].split()[0][:6] for reason in merged.damaged] == [
        f"{s:06d}" for s in (0, 1, 2, 3, 3)
    ]
    assert "SHA-256 is not the one that was committed" in merged.damaged[0]
    assert "missing" in merged.damaged[2]
    assert verify(str(tmp_path / "out")) == []
    assert all(contents(whole)[name] == data for name, data in contents(tmp_path / "out").items())


def test_a_damaged_object_that_nobody_committed_is_replaced(whole: Path, tmp_path: Path) -> None:
    out = part_of(whole, "out", [])
    (out / "shards").mkdir()
    (out / "shards" / object_of(whole, 2).name).write_bytes(b"of an attempt that died")
    merge([str(whole)], str(out))
    assert verify(str(out)) == []


def test_a_missing_shard_leaves_a_store_that_its_job_goes_on_with(whole: Path, tmp_path: Path, capsys: Any) -> None:
    a, b = part_of(whole, "a", [0, 1]), part_of(whole, "b", [4])
    out = tmp_path / "out"
    assert decant.main(["merge", str(a), str(b), "--out", str(out)]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "3 of 5 shards" in shown
    assert "2 shards are missing: 2, 3" in shown
    assert "`decant cache` command" in shown
    storage = Storage(str(out))
    header = writer.begin(storage, writer.unseal(storage.read("header.json"), "header", ""), HEADER_IDENTITY["logits"])
    for shard in (2, 3):
        writer.commit_logits(storage, shard, make_rows()[shard], header)
    writer.finish(storage, header, {"tokenizer/tokenizer.json": b"{}"})
    assert contents(out) == contents(whole)


@pytest.mark.parametrize("unanswered", ["shards/000001.json", "shards/000001-", "tokenizer/tokenizer.json"])
def test_an_outage_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unanswered: str) -> None:
    """Nothing is taken for good in the place of what storage does not give just now: the same merge goes on with it."""
    lacking, whole = make(tmp_path / "lacking", True), make(tmp_path / "whole", False)
    urls, read, fails = [lacking.storage.url, whole.storage.url], Storage.read, [True]

    def read_or_fail(self: Storage, name: str) -> bytes:
        if fails[0] and "whole" in self.url and name.startswith(unanswered):
            raise UnavailableError(f"{self.path(name)}: storage fails (503 Slow Down)")
        return read(self, name)

    monkeypatch.setattr(Storage, "read", read_or_fail)
    if unanswered.startswith("tokenizer"):
        (tmp_path / "lacking/manifest.json").unlink()
    with pytest.raises(UnavailableError, match="503 Slow Down"):
        merge(urls, str(tmp_path / "out"))
    fails[0] = False
    assert merge(urls, str(tmp_path / "out")).damaged == []
    assert not LogitStore.open(str(tmp_path / "out")).left_out


def test_damaged_tokenizer_files_are_not_taken(whole: Path, tmp_path: Path) -> None:
    second = Path(shutil.copytree(whole, tmp_path / "second"))
    damage(whole / "tokenizer/tokenizer.json")
    merged = merge([str(whole), str(second)], str(tmp_path / "out"))
    assert merged.is_finished
    assert "tokenizer.json is damaged" in merged.damaged[0]
    assert contents(tmp_path / "out") == contents(second)


def test_other_jobs_are_refused_and_each_field_named(whole: Path, tmp_path: Path, capsys: Any) -> None:
    other = {"teacher": "other"}
    b = part_of(whole, "b", [1], labels=other, labels_id=labels_id(other))
    with pytest.raises(IdentityError, match=r"/b belongs to another run: labels\.teacher is .*; labels_id is .*job"):
        merge([str(whole), str(b)], str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full/thesis.tex").write_text("years of work")
    assert decant.main(["merge", str(whole), "--out", str(tmp_path / "full")]) == 2
    assert "not empty and holds no decant store" in capsys.readouterr().err
    with pytest.raises(IdentityError, match="labels_id"):
        merge([str(whole)], str(b))
    with pytest.raises(FormatError, match="holds no decant store"):
        merge([str(whole), str(tmp_path / "nothing")], str(tmp_path / "out"))
    with pytest.raises(ConfigError, match="inside the store"):
        merge([str(whole)], str(whole / "out"))


def test_where_the_parts_ran_is_kept(whole: Path, tmp_path: Path) -> None:
    parts = [
        part_of(whole, name, shards, provenance={"versions": {"torch": version}})
        for name, shards, version in (("a", [0, 1], "1"), ("b", [2, 3], "2"), ("c", [4], "2"))
    ]
    merge([*map(str, parts), str(whole)], str(tmp_path / "out"))
    provenance = LogitStore.open(str(tmp_path / "out")).manifest["provenance"]
    assert provenance == {"versions": {"torch": "1"}, "merged": [{"versions": {"torch": "2"}}]}
    assert verify(str(tmp_path / "out")) == []


def test_token_stores_are_merged_too(tmp_path: Path, capsys: Any) -> None:
    rows = [[row.tokens for row in rows] for rows in make_rows()]
    write_tokens(str(tmp_path / "whole"), rows, corpus={"sha256": "c"})
    part_of(tmp_path / "whole", "a", [0, 1])
    (tmp_path / "whole/shards/000000.json").unlink()
    assert decant.main(["merge", str(tmp_path / "a"), str(tmp_path / "whole"), "--out", str(tmp_path / "out")]) == 0
    assert verify(str(tmp_path / "out")) == []
    part_of(tmp_path / "whole", "b", [3])
    assert decant.main(["merge", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "half")]) == 1
    assert "`decant tokenize` command" in capsys.readouterr().out
