"""The store: what is written is read, what is damaged is refused, whoever commits first wins."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logit_store import SPLITS, LogitRow, LogitStore, Storage, Targets, TokenRow, TokenStore, open_store, writer
from logit_store.errors import CorruptError, FormatError, IdentityError, NotFinishedError, StoreError
from logit_store.format import encode_index
from logit_store.reader import read_manifest

IDENTITY = ("kind", "labels_id", "num_shards")


def make_row(rng: np.random.Generator, length: int, k: int, vocabulary_size: int, temperatures: int = 1) -> LogitRow:
    """A row of random distributions, some of them peaked."""
    ids = rng.integers(0, vocabulary_size, length).astype(np.int32)
    scores = rng.normal(size=(max(length - 1, 0), vocabulary_size)) * rng.choice([0.1, 3.0, 15.0])
    log_p = scores - np.logaddexp.reduce(scores, axis=1, keepdims=True) if length > 1 else scores
    head = np.argsort(-log_p, axis=1, kind="stable")[:, :k]
    positions = np.arange(len(log_p))
    kept = np.zeros(log_p.shape, bool)
    np.put_along_axis(kept, head, True, 1)
    kept[positions, ids[1:]] = True
    with np.errstate(divide="ignore"):
        tail = np.log(np.where(kept, 0, np.exp(log_p)).sum(1))
    float32 = [
        np.take_along_axis(log_p, head, 1),
        log_p[positions, ids[1:]],
        tail,
        rng.normal(size=(len(log_p), temperatures)),
    ]
    head_lp, next_lp, tail, partition = (x.astype(np.float32) for x in float32)
    split = SPLITS[int(rng.integers(2))]
    tokens = TokenRow(int(rng.integers(2**62)), split, ids)
    return LogitRow(tokens, Targets(head.astype(np.int32), head_lp, next_lp, tail, partition))


def write_store(url: str, shards: list[list[LogitRow]], dtype: str = "float16") -> LogitStore:
    """A finished logit store of these rows."""
    storage = Storage(url)
    k, vocabulary_size = shards[0][0].targets.head_ids_PK.shape[1], 64
    header = {"kind": "logits", "labels_id": "l" * 64, "num_shards": len(shards), "k": k, "temperatures": [2.0],
              "vocabulary_size": vocabulary_size}  # fmt: skip
    header = writer.begin(storage, header, IDENTITY)
    for shard, rows in enumerate(shards):
        writer.commit_logits(storage, shard, rows, dtype, "l" * 64)
    tokens = [row.tokens for shard in shards for row in shard]
    lengths = np.asarray([len(row.input_ids_T) for row in tokens], np.int32)
    splits = np.asarray([SPLITS.index(row.split) for row in tokens], np.int8)
    writer.finish(storage, header, encode_index(lengths, splits), {"tokenizer/tokenizer.json": b"{}"})
    return LogitStore.open(url)


def example(folder: Path, **options: Any) -> tuple[LogitStore, list[LogitRow]]:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 8, 64) for length in (1, 2, 40, 17, 40, 3, 9, 40)]
    return write_store(str(folder / "store"), [rows[:5], rows[5:]], **options), rows


def assert_same(found: LogitRow, wanted: LogitRow, rtol: float) -> None:
    assert found.tokens.document == wanted.tokens.document
    assert found.tokens.split == wanted.tokens.split
    np.testing.assert_array_equal(found.tokens.input_ids_T, wanted.tokens.input_ids_T)
    np.testing.assert_array_equal(found.targets.head_ids_PK, wanted.targets.head_ids_PK)
    np.testing.assert_allclose(found.targets.head_logprobs_PK, wanted.targets.head_logprobs_PK, rtol=rtol, atol=rtol)
    for exact in ("next_logprob_P", "tail_logmass_P", "log_partition_PS"):
        np.testing.assert_array_equal(getattr(found.targets, exact), getattr(wanted.targets, exact))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=6), st.integers(1, 64), st.integers(0, 2**31),
       st.sampled_from(["float16", "float32"]))  # fmt: skip
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], k: int, seed: int, dtype: str
) -> None:
    rng = np.random.default_rng(seed)
    rows = [make_row(rng, length, k, 64) for length in lengths]
    store = write_store(str(tmp_path_factory.mktemp("store")), [rows, rows[:1]], dtype)
    assert list(store.lengths_N) == [*lengths, lengths[0]]
    for i in rng.permutation(len(store)):
        # float16 keeps 11 bits; the shift that makes the sum one may add as much again.
        assert_same(store[int(i)], [*rows, rows[0]][i], rtol=2 * 2.0**-11 if dtype == "float16" else 0)
        targets, ids = store[int(i)].targets, store[int(i)].tokens.input_ids_T
        outside = ~(targets.head_ids_PK == ids[1:, None]).any(1)
        total = np.exp(targets.head_logprobs_PK.astype(np.float64)).sum(1) + np.exp(targets.tail_logmass_P)
        np.testing.assert_allclose(total + outside * np.exp(targets.next_logprob_P), 1.0, atol=1e-6)


def test_an_arrow_reader_that_never_heard_of_us_can_read_a_shard(tmp_path: Path) -> None:
    _, rows = example(tmp_path)
    (path, *_) = sorted((tmp_path / "store" / "shards").glob("*.arrow"))
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    assert table.column("input_ids").to_pylist() == [row.tokens.input_ids_T.tolist() for row in rows[:5]]
    assert table.column("head_ids").to_pylist() == [row.targets.head_ids_PK.tolist() for row in rows[:5]]
    assert table.schema.field("head_logprobs").type == pa.large_list(pa.list_(pa.float16(), 8))


def read_everything(url: str) -> None:
    store = open_store(url)
    store.files()
    for row in range(len(store)):
        _ = store[row]


def test_every_flipped_bit_is_an_error(tmp_path: Path) -> None:
    example(tmp_path)
    rng = np.random.default_rng(1)
    committed = [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
    files = [
        path
        for path in committed
        if (path.name != "header.json" and not path.name.startswith("0000")) or path.suffix == ".arrow"
    ]
    assert len(files) == 5  # manifest, index, a tokenizer file, two shards: all that a reader reads
    for path in files:
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 60):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            with pytest.raises((CorruptError, FormatError)) as error:
                read_everything(str(tmp_path / "store"))
            assert path.name in str(error.value)
        path.write_bytes(whole)
    read_everything(str(tmp_path / "store"))


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
    with pytest.raises(CorruptError, match=f"{first.name}.*(missing|damaged).*make the store again"):
        read_everything(str(tmp_path / "store"))


def test_other_versions_and_other_files_are_refused(tmp_path: Path) -> None:
    example(tmp_path)
    manifest = tmp_path / "store" / "manifest.json"
    sealed = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**sealed, "format": 7}))
    with pytest.raises(FormatError, match=r"format 7.*reads format 0"):
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
    writer.begin(storage, {"kind": "logits", "labels_id": "l", "num_shards": 3}, IDENTITY)
    rows = [make_row(np.random.default_rng(0), 9, 4, 64)]
    writer.commit_logits(storage, 1, rows, "float16", "l")
    with pytest.raises(NotFinishedError, match=r"1 of 3 shards.*same `decant cache` command"):
        read_manifest(storage)
    with pytest.raises(NotFinishedError, match="2 of 3 shards are not committed"):
        writer.finish(storage, {"num_shards": 3}, b"", {})


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
    ours, theirs = [make_row(rng, 9, 4, 64)], [make_row(rng, 9, 4, 64)]
    first = writer.commit_logits(storage, 0, ours, "float16", "l")
    before = {path.name: path.read_bytes() for path in (tmp_path / "store" / "shards").iterdir()}
    assert writer.commit_logits(storage, 0, ours, "float16", "l") == first  # the same bytes again
    assert writer.commit_logits(storage, 0, theirs, "float16", "l") == first  # a zombie with others
    assert {path.name: path.read_bytes() for path in (tmp_path / "store" / "shards").iterdir()} == before


def test_finish_removes_what_dead_attempts_left(tmp_path: Path) -> None:
    store, _ = example(tmp_path)
    shards = tmp_path / "store" / "shards"
    (shards / f"000000-{'0' * 16}.arrow").write_bytes(b"of an attempt that lost")
    (shards / "000001.json.abc.tmp").write_bytes(b"of an attempt that died")
    (tmp_path / "store" / "manifest.json").unlink()
    header = {key: value for key, value in store.manifest.items() if key not in ("index_sha256", "files", "shards")}
    writer.finish(store.storage, header, store.index(), store.files())
    assert sorted(path.suffix for path in shards.iterdir()) == [".arrow", ".arrow", ".json", ".json"]


def test_a_shard_without_rows_is_a_shard(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 8, 64) for length in (4, 9)]
    store = write_store(str(tmp_path / "store"), [rows[:1], [], rows[1:]])
    for i, row in enumerate(rows):
        assert_same(store[i], row, rtol=2.0**-10)


def test_finish_replaces_what_an_attempt_with_other_versions_left(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path / "store"))
    storage.create("tokenizer/tokenizer.json", b"of an older library")
    storage.create("header.json", writer.seal("header", {"labels_id": "l" * 64, "kind": "logits", "num_shards": 1}))
    write_store(str(tmp_path / "store"), [[make_row(np.random.default_rng(0), 9, 4, 64)]]).files()


def test_any_fsspec_url_works() -> None:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 8, 64) for length in (4, 9, 2)]
    store = write_store("memory://bucket/store", [rows[:2], rows[2:]])
    for i, row in enumerate(rows):
        assert_same(store[i], row, rtol=2.0**-10)
    assert not store.storage.create("manifest.json", b"other")  # never overwritten


FULL_DISK = """
import sys
import numpy as np
from logit_store import Storage, writer
from logit_store.errors import StoreError
from tests.store.test_store import make_row

storage = Storage(sys.argv[1])
rng = np.random.default_rng(0)
rows = [make_row(rng, 200, 32, 64) for _ in range(20)]
for shard in range(100):
    try:
        writer.commit_logits(storage, shard, rows, "float16", "l")
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
