"""The store: what is written is read, what is damaged is refused, whoever commits first wins."""

import base64
import json
import os
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from logit_store import LogitRow, LogitStore, Storage, TokenStore, open_store, writer
from logit_store.errors import CorruptError, FormatError, IdentityError, NotFinishedError, StoreError
from logit_store.format import object_name, record_name, seal
from logit_store.manifest import read_manifest
from tests.store.made import make_header, make_row, write_store
from tests.store.test_round_trip import assert_same

IDENTITY = ("kind", "labels_id", "num_shards")


def example(folder: Path, **options: Any) -> tuple[LogitStore, list[LogitRow]]:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 8) for length in (1, 2, 40, 17, 40, 3, 9, 40)]
    return write_store(str(folder / "store"), [rows[:5], rows[5:]], **options), rows


def test_an_arrow_reader_that_never_heard_of_us_can_open_a_shard(tmp_path: Path) -> None:
    _, rows = example(tmp_path)
    (path, *_) = sorted((tmp_path / "store" / "shards").glob("*.arrow"))
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    lengths = [length for block in table.column("lengths").to_pylist() for length in block]
    assert lengths == [len(row.tokens.input_ids_T) for row in rows[:5]]
    documents = [document for block in table.column("document").to_pylist() for document in block]
    assert documents == [row.tokens.document for row in rows[:5]]
    assert table.schema.field("block").type == pa.large_binary()
    assert json.loads(table.schema.metadata[b"decant"])["labels_id"] == make_header(2)["labels_id"]


def read_everything(url: str) -> None:
    store = open_store(url)
    store.files()
    for row in range(len(store)):
        _ = store[row]


@pytest.mark.parametrize("damage", ["truncate", "empty", "remove", "swap"])
def test_damaged_shards_are_named(tmp_path: Path, damage: str) -> None:
    example(tmp_path)
    first, second = sorted((tmp_path / "store" / "shards").glob("*.arrow"))
    if damage == "truncate":
        first.write_bytes(first.read_bytes()[:-7])
    elif damage == "empty":
        first.write_bytes(b"")
    elif damage == "remove":
        first.unlink()
    else:
        first.write_bytes(second.read_bytes())
    with pytest.raises(CorruptError, match=f"{first.name}.*(missing|damaged).*decant verify --drop-damaged"):
        read_everything(str(tmp_path / "store"))


def test_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    example(tmp_path)
    manifest = tmp_path / "store" / "manifest.json"
    sealed = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sealed, "format": 7}))
    with pytest.raises(FormatError, match=r"format 7.*reads format 1"):
        open_store(str(tmp_path / "store"))
    manifest.write_text(json.dumps({"something": "else"}))
    with pytest.raises(FormatError, match=r"manifest\.json is not the manifest"):
        open_store(str(tmp_path / "store"))
    with pytest.raises(FormatError, match="holds no decant store"):
        open_store(str(tmp_path / "nothing"))
    example(tmp_path / "again")
    with pytest.raises(StoreError, match="holds logits, but tokens are needed"):
        TokenStore.open(str(tmp_path / "again" / "store"))


def test_an_unfinished_store_says_how_far_it_is(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    header = make_header(3, text_id="t")
    writer.begin(storage, header, IDENTITY)
    rows = [make_row(np.random.default_rng(0), 9, 4)]
    writer.commit_logits(storage, 1, rows, header)
    with pytest.raises(NotFinishedError, match=r"1 of 3 shards.*same `decant cache` command"):
        read_manifest(storage)
    with pytest.raises(NotFinishedError, match="2 of 3 shards are not committed"):
        writer.finish(storage, header, {})


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(IdentityError, match="not empty and holds no decant store"):
        writer.begin(Storage(str(tmp_path)), {"kind": "logits"}, ["kind"])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_another_runs_directory_names_each_field(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    writer.begin(storage, {"kind": "logits", "labels_id": "a", "num_shards": 2, "note": 1}, IDENTITY)
    writer.begin(storage, {"kind": "logits", "labels_id": "a", "num_shards": 2, "note": 2}, IDENTITY)  # provenance
    with pytest.raises(IdentityError, match='labels_id is "a" there and "b" here; num_shards is 2 there and 3 here'):
        writer.begin(storage, {"kind": "logits", "labels_id": "b", "num_shards": 3}, IDENTITY)


def test_the_first_commit_wins(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    rng = np.random.default_rng(0)
    header = make_header(1, text_id="t")
    ours, theirs = [make_row(rng, 9, 4)], [make_row(rng, 9, 4)]
    first = writer.commit_logits(storage, 0, ours, header)
    before = {path.name: path.read_bytes() for path in (tmp_path / "store" / "shards").iterdir()}
    assert writer.commit_logits(storage, 0, ours, header) == first  # the same bytes again
    assert writer.commit_logits(storage, 0, theirs, header) == first  # a zombie with others
    assert {path.name: path.read_bytes() for path in (tmp_path / "store" / "shards").iterdir()} == before


def test_finish_removes_what_dead_attempts_left(tmp_path: Path) -> None:
    store, _ = example(tmp_path)
    shards = tmp_path / "store" / "shards"
    (shards / f"000000-{'0' * 16}.arrow").write_bytes(b"of an attempt that lost")
    (shards / "000001.json.abc.tmp").write_bytes(b"of an attempt that died")
    (tmp_path / "store" / "manifest.json").unlink()
    files = store.files()
    writer.finish(store.storage, make_header(2), files)
    assert sorted(path.suffix for path in shards.iterdir()) == [".arrow", ".arrow", ".json", ".json"]


def test_finish_holds_few_bytes_of_a_row_and_of_a_shard(tmp_path: Path) -> None:
    """Twice the index, which is 5 bytes a row, and some hundred bytes a shard; never all commit records at once."""
    num_shards, num_rows = 1000, 500
    storage, packed = Storage(str(tmp_path / "store")), np.random.default_rng(0).bytes(4 * num_rows) + bytes(num_rows)
    record: dict[str, Any] = dict.fromkeys(("bytes", "rows", "tokens", "positions", "prefix_bytes", "prefix_crc32"), 9)
    record |= {"rows": num_rows, "index": base64.b64encode(zlib.compress(packed)).decode(), "text_sha256": "0" * 64}
    (tmp_path / "store/shards").mkdir(parents=True)
    for shard in range(num_shards):
        sections = {"ids": shard} if shard % 2 else {"ids": shard, "tail": 1}
        named = {"sha256": f"{shard:064x}", "object": object_name(shard, f"{shard:064x}"), "sections": sections}
        (tmp_path / "store" / record_name(shard)).write_bytes(seal("record", record | named))
    tracemalloc.start()
    manifest = writer.finish(storage, make_header(num_shards), {})
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert manifest["num_rows"] == num_shards * num_rows
    assert peak_bytes < num_shards * (2 * 5 * num_rows + 1000)
    store = LogitStore.open(storage.url)
    assert store.index.lengths_N.tobytes() == packed[: 4 * num_rows] * num_shards
    assert store.shards.columns["bytes.tail"].tolist() == [1, 0] * (num_shards // 2)
    assert store.shards.hash("sha256", 998) == f"{998:064x}"


def test_a_finished_store_is_never_finished_again(tmp_path: Path) -> None:
    store, _ = example(tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}
    again = writer.finish(store.storage, make_header(2), {"tokenizer/tokenizer.json": b"of another version"})
    assert again == store.manifest
    assert {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")} == before


def test_a_shard_without_rows_is_a_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 8) for length in (4, 9)]
    store = write_store(str(tmp_path / "store"), [rows[:1], [], rows[1:]])
    for i, row in enumerate(rows):
        assert_same(store[i], row, 0.5)


def test_finish_replaces_what_an_attempt_with_other_versions_left(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    storage.create("tokenizer/tokenizer.json", b"of an older library")
    rows = [[make_row(np.random.default_rng(0), 9, 4)]]
    storage.create(
        "header.json",
        writer.seal("header", make_header(1, text_id=write_store(str(tmp_path / "other"), rows).manifest["text_id"])),
    )
    write_store(str(tmp_path / "store"), rows).files()


def test_any_fsspec_url_works() -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 8) for length in (4, 9, 2)]
    store = write_store("memory://bucket/store", [rows[:2], rows[2:]])
    for i, row in enumerate(rows):
        assert_same(store[i], row, 0.5)
    assert not store.storage.create("manifest.json", b"other")  # never overwritten


FULL_DISK = """
import sys
import numpy as np
from logit_store import Storage, writer
from logit_store.errors import StoreError
from tests.store.made import make_header, make_row

storage = Storage(sys.argv[1])
rng = np.random.default_rng(0)
header = make_header(100, text_id="t", temperatures=[])
rows = [make_row(rng, 200, 32, temperatures=0) for _ in range(20)]
for shard in range(100):
    try:
        writer.commit_logits(storage, shard, rows, header)
    except StoreError as error:
        print(shard, error)
        break
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_loses_nothing_committed(tmp_path: Path) -> None:
    script = f'mount -t tmpfs -o size=1m none {tmp_path} && {sys.executable} -c "$0" {tmp_path}/store'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", script + f" && ls {tmp_path}/store/shards", FULL_DISK],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert "no space left to write" in done.stdout, done.stderr
    shard = int(done.stdout.split()[0])
    assert shard >= 1
    assert "same command again" in done.stdout
    assert ".tmp" not in done.stdout
