"""A store is whole, or an error that names the file: whatever dies, whatever flips, whoever wrote it."""

import json
import os
import random
import re
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from logit_store import LogitStore, Storage, open_store, storage, writer
from logit_store.codec.blocks import Layout, Widths, decode_block
from logit_store.codec.levels import Quantizer
from logit_store.codec.planes import Packer, Unpacker
from logit_store.encode import encode_logits
from logit_store.errors import CorruptError, FormatError, NotFinishedError, StoreError
from logit_store.format import MANIFEST, describe, object_name, seal
from logit_store.identity import digest
from logit_store.index import ShardColumns, encode_index, page_checksums
from logit_store.manifest import layout_of
from logit_store.shard import shard_schema
from tests.store.made import make_header, make_row, write_store
from tests.store.test_round_trip import LOSSY, assert_same
from tests.toy import ROOT


def example_rows(seed: int = 0) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [make_row(rng, length, 8, max_draws=3) for length in (1, 2, 400, 17, 300, 3, 9, 400)]


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_a_flipped_bit_is_an_error_or_changes_nothing(tmp_path: Path) -> None:
    """Reading verifies what it reads; what it does not read (an Arrow footer, records) is for `decant verify`."""
    rows = example_rows()
    write_store(str(tmp_path / "store"), [rows[:5], rows[5:]])
    rng = np.random.default_rng(1)
    noticed = 0
    for path in sorted((tmp_path / "store").rglob("*.*")):
        whole = path.read_bytes()
        for place in rng.integers(0, len(whole), 80):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << int(rng.integers(8))
            path.write_bytes(damaged)
            try:
                store = open_store(str(tmp_path / "store"))
                store.files()
                assert isinstance(store, LogitStore)
                assert list(store.lengths_N) == [len(row.tokens.input_ids_T) for row in rows]
                store.rows("train")
                for i, row in enumerate(rows):
                    assert_same(store[i], row, max_error=0.5)
            except (CorruptError, FormatError) as error:
                assert path.name in str(error)  # noqa: PT017 (no error is fine as well)
                noticed += 1
        path.write_bytes(whole)
        if path.suffix == ".arrow" and path.parent.name == "shards":
            assert noticed > 40  # most of a shard is blocks
        noticed = 0


class _Dies:
    """Kills this process at the n-th write, sync, link or unlink of the storage; a write is torn in half."""

    def __init__(self, n: int) -> None:
        self.left = n

    def _count(self) -> bool:
        self.left -= 1
        return self.left < 0

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*arguments: Any, **options: Any) -> Any:
            if self._count():
                os._exit(9)
            return function(*arguments, **options)

        return wrapped


def test_a_writer_may_die_at_any_write_sync_or_link(tmp_path: Path) -> None:
    rows = example_rows()
    parts = [rows[:5], [], rows[5:]]
    reference = write_store(str(tmp_path / "reference"), parts)
    header = make_header(3, text_id=reference.manifest["text_id"])
    encoded = [encode_logits(part, layout_of(header), LOSSY, {}, describe(header)) for part in parts]

    def write(folder: Path) -> None:
        there = Storage(str(folder))
        begun = writer.begin(there, header, ["labels_id"])
        with mock.patch.object(writer, "encode_logits", lambda part, *_: encoded[parts.index(part)]):
            for shard, part in enumerate(parts):
                writer.commit_logits(there, shard, part, begun)
        writer.finish(there, begun, {"tokenizer/tokenizer.json": b"{}"})

    deaths = 0
    while True:
        folder = tmp_path / f"dies-{deaths}"
        child = os.fork()
        if child == 0:
            dies = _Dies(deaths)
            for name in ("fsync", "link", "unlink", "remove"):
                setattr(os, name, dies.wrap(getattr(os, name)))
            storage.__dict__["open"] = lambda *arguments: _Torn(dies, open(*arguments))  # noqa: SIM115
            write(folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == 9
        for name, data in files_below(folder).items() if folder.exists() else ():
            if not name.endswith(".tmp"):
                assert data == files_below(tmp_path / "reference")[name], name
        if (folder / MANIFEST).exists():
            assert len(LogitStore.open(str(folder))) == len(rows)
        else:
            with pytest.raises((NotFinishedError, FormatError)):
                LogitStore.open(str(folder))
        write(folder)  # the same command again
        found, wanted = files_below(folder), files_below(tmp_path / "reference")
        assert found.keys() == wanted.keys() or (folder / MANIFEST).exists()
        assert {name: found[name] for name in wanted} == wanted
        deaths += 1
    assert deaths > 50


class _Torn:
    """A file whose write, when it is the fatal one, writes half and dies."""

    def __init__(self, dies: _Dies, file: Any) -> None:
        self._dies, self._file = dies, file

    def __enter__(self) -> "_Torn":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def write(self, data: bytes) -> None:
        if self._dies._count():
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            os._exit(9)
        self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def test_two_writers_of_one_shard_give_one_result(tmp_path: Path) -> None:
    prepared = [
        writer.prepare_logits(example_rows(seed), {**make_header(1), "text_id": "x", "columns": {}}) for seed in (0, 1)
    ]
    for attempt in range(20):
        there = Storage(str(tmp_path / str(attempt)))
        barrier, records = threading.Barrier(4), list[Any]()

        def commit(which: int, there: Storage = there, barrier: Any = barrier, records: Any = records) -> None:
            barrier.wait()
            records.append(writer.commit(there, 0, prepared[which]))

        threads = [threading.Thread(target=commit, args=(i % 2,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(records) == 4
        assert all(record == records[0] for record in records)
        assert there.names("shards") == ["000000-" + records[0]["sha256"][:16] + ".arrow", "000000.json"]
        assert there.read(records[0]["object"]) in [one.data for one in prepared]


def rewrite(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and seal it again, as a liar would."""
    path = folder / MANIFEST
    body = json.loads(path.read_bytes())["body"]
    change(body)
    path.write_bytes(seal("manifest", body))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(vocabulary_size=2**60), "vocabulary_size"),
        (lambda m: m.update(num_rows=10**15), "disagree"),
        (lambda m: m.update(num_shards=10**12), "disagree"),
        (lambda m: m["files"].update({"../../etc/passwd": "0" * 64}), "names a file"),
        (lambda m: m["files"].update({"tokenizer/../../x": "0" * 64}), "names a file"),
        (lambda m: m.update(columns={"x": "pickle"}), "type 'pickle'"),
        (lambda m: m.update(codec={"kind": "eval"}), "codec.kind"),
        (lambda m: m.update(kind="programs"), "kind 'programs'"),
        (lambda m: m.update(index="none"), "index"),
        (lambda m: m.update(temperatures=["1" * 10]), "temperatures"),
        (lambda m: m.pop("tokenizer"), "tokenizer"),
        (lambda m: m["index"].update(bytes=10**15), "size is not that of the manifest"),
        (lambda m: m["index"].update(crc32=[]), "size is not that of the manifest"),
        (lambda m: m.update(forced_ids=[-1]), "forced_ids"),
        (lambda m: m.update(forced_ids=[64]), "forced ids"),
        (lambda m: m.update(columns={"lengths": "int64"}), "store's own"),
        (lambda m: m.update(labels_id="of another store"), "shard of another store"),
    ],
)
def test_a_lying_manifest_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    write_store(str(tmp_path / "store"), [example_rows()])
    rewrite(tmp_path / "store", change)
    with pytest.raises(StoreError, match=reason):
        _ = open_store(str(tmp_path / "store"))[0]


def table_of(records: list[dict[str, Any]]) -> bytes:
    columns = ShardColumns(len(records))
    for shard, record in enumerate(records):
        columns.put(shard, record)
    return columns.encode()


def lying_store(
    folder: Path, block: bytes, lengths: list[int], widths: tuple[int, int], compression: str | None = None
) -> str:
    """A store in which every checksum is right, and whose only block is none: where it is."""
    store = write_store(str(folder / "store"), [example_rows()[:1]])
    schema = shard_schema(describe(store.manifest), {}, np.array([0, 1], np.float32))
    n, checksum = len(lengths), zlib.crc32(block)
    columns = [[lengths], [[0] * n], [[0] * n], [widths[0]], [widths[1]], [checksum], [block]]
    arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema, options=pa.ipc.IpcWriteOptions(compression=compression)) as file:
        file.write_batch(pa.record_batch(arrays, schema=schema))
    data = bytes(sink.getvalue())
    prefix_bytes = data.rindex(block) if compression is None else len(data) // 2
    sha256 = digest(data)
    record = {"sha256": sha256, "text_sha256": sha256, "bytes": len(data), "rows": n, "prefix_bytes": prefix_bytes}
    record |= {"prefix_crc32": zlib.crc32(data[:prefix_bytes]), "sections": {}}
    shards, index = table_of([record]), encode_index(np.array(lengths, np.int32), np.zeros(n, np.int8))
    (folder / "store" / object_name(0, sha256)).write_bytes(data)
    (folder / "store" / "shards.arrow").write_bytes(shards)
    (folder / "store" / "index.arrow").write_bytes(index)
    checksums = {"bytes": len(index), "crc32": page_checksums(index)}
    rewrite(folder / "store", lambda m: m.update(shards_sha256=digest(shards), index=checksums, num_rows=n))
    return str(folder / "store")


def block_of(*planes: bytes) -> bytes:
    packer = Packer()
    packer.planes = list(planes)
    return packer.bytes()


BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(2**28))


@pytest.mark.parametrize(
    ("block", "lengths", "widths", "reason"),
    [
        (block_of(), [2**31 - 1], (0, 0), "more memory than"),
        (block_of(), [2**30, 2**30], (0, 0), "more memory than"),
        (block_of(), [100_000], (2**24, 0), "more memory than"),
        (block_of(BOMB), [3], (1, 0), "does not hold what the planes before it say"),
        (block_of(BOMB), [2**28], (1, 0), "more memory than"),
        (b"\xff" * 8, [3], (1, 0), "planes of nothing"),
        (b"\xff" * 4 + bytes(4), [3], (1, 0), "ends within its header"),
        (b"\x01" + bytes(7) + b"\xff" * 4, [3], (1, 0), "do not fill it"),
        (block_of(b"\xff\xff\xff", b"\xff\xff\xff"), [3], (1, 0), "beyond 2\\^24"),
        (block_of(b"\xff\xff\xff", b"", b"\xff" * 6), [3], (1, 0), "beyond the vocabulary"),
        (block_of(*[b""] * 16, b"\x05\x05"), [3], (2, 0), "fewer entries than none"),
        (block_of(), [-5], (0, 0), "negative length"),
        (block_of(b"zstd?" * 9), [100], (1, 0), "cannot be decompressed|does not hold"),
    ],
    ids=range(13),
)
def test_a_lying_block_is_refused_before_it_costs_memory(
    tmp_path: Path, block: bytes, lengths: list[int], widths: tuple[int, int], reason: str
) -> None:
    url = lying_store(tmp_path, block, lengths, widths)
    script = (
        "import resource, sys; from logit_store import open_store; from logit_store.errors import CorruptError\n"
        "store = open_store(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_DATA, (2**30, 2**30))\n"
        "try: store[0]\n"
        "except CorruptError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script, url], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "000000-" in done.stdout
    assert re.search(reason, done.stdout), done.stdout


def test_a_dense_lie_costs_no_memory(tmp_path: Path) -> None:
    """At K = V the ids are not stored: a block of nothing says that it holds the whole vocabulary, many times."""
    quantizer = Quantizer(np.zeros(1, np.float32))
    layout = Layout(2**24, True)
    with pytest.raises(CorruptError, match="more memory than"):
        decode_block(layout, block_of(), np.array([200], np.int32), Widths(2**24, 0), quantizer, "x")


def test_a_shard_that_arrow_would_decompress_is_refused(tmp_path: Path) -> None:
    url = lying_store(tmp_path, block_of(), [3], (1, 0), "zstd")
    with pytest.raises(CorruptError, match="compressed by Arrow"):
        _ = open_store(url)[0]


def test_random_bytes_are_never_a_crash() -> None:
    """What passes for a block may be anything: it is decoded, or it is a CorruptError."""
    rng = random.Random(0)
    for _ in range(3000):
        data = bytes(rng.getrandbits(8) for _ in range(rng.randrange(60)))
        try:
            unpacker = Unpacker(data, "x")
            for _ in range(6):
                unpacker.take(rng.randrange(50), rng.randrange(1, 4), np.uint32)
        except CorruptError:
            continue


MANY = """
import sys, time
import numpy as np
from logit_store import LogitStore

started = time.perf_counter()
store = LogitStore.open(sys.argv[1])
assert len(store) == 10_000_000
assert store.index.length(9_999_999) == 512
opened = time.perf_counter() - started
resident = {line.split(":")[0]: int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("Rss")}
print(opened, resident["RssAnon"])
"""


def write_many_shards(folder: Path, num_shards: int, num_rows: int) -> None:
    """Manifest, index and table of a large store, without its shards."""
    header = make_header(num_shards, text_id="t", tokenizer={"vocabulary_sha256": "v"})
    there = Storage(str(folder))
    sections = dict.fromkeys(("tail", "head_bins", "head_low", "head_codes"), 1000)
    record = {"sha256": "0" * 64, "text_sha256": "0" * 64, "sections": sections, "rows": num_rows // num_shards}
    index = encode_index(np.full(num_rows, 512, np.int32), np.zeros(num_rows, np.int8))
    shards = table_of([record] * num_shards)
    there.create("index.arrow", index)
    there.create("shards.arrow", shards)
    body = header | {"index": {"bytes": len(index), "crc32": page_checksums(index)}, "shards_sha256": digest(shards)}
    there.create(MANIFEST, seal("manifest", body | {"files": {}, "num_rows": num_rows}))


def test_ten_million_rows_open_in_little_memory(tmp_path: Path) -> None:
    write_many_shards(tmp_path / "store", 10_000, 10_000_000)
    done = subprocess.run(
        [sys.executable, "-c", MANY, str(tmp_path / "store")], capture_output=True, text=True, check=True, cwd=ROOT
    )
    _, resident_kb = done.stdout.split()
    assert int(resident_kb) < 200_000
    # A page of the index is verified when it is first touched, and only then.
    path = tmp_path / "store" / "index.arrow"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    store = LogitStore.open(str(tmp_path / "store"))
    assert store.index.length(0) == 512
    with pytest.raises(CorruptError, match=r"index\.arrow is damaged.*page"):
        _ = store.lengths_N
