"""Files of every format: counted, read from any document on, and refused by name."""

import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config import SourceConfig
from cluster.corpus import documents, files
from cluster.corpus.files import find_files
from cluster.corpus.reader import Corpus, corpus_identity, first_documents, take, wanted_columns
from cluster.corpus.scan import keep_scan, known_scan, scan_files
from logit_store.errors import CorpusError
from tests.cache.hub_server import COMMIT, DATASET, hub_of
from tests.toy import ROOT

pytestmark = pytest.mark.usefixtures("own_memory")

TEXTS = ["def f(x):\n    return x\n" * 20, "import os", "", "naïve 🦀\r\n", "class A: pass\n" * 50]


def corpus_of(source: SourceConfig) -> Corpus:
    files = find_files(source)
    wanted = wanted_columns(files, source, [])
    return Corpus.of_scans(files, scan_files(wanted, files), wanted.kinds)


def texts_of(corpus: Corpus, start: int = 0, stop: int | None = None) -> list[Any]:
    found = corpus.read(start, len(corpus) if stop is None else stop)
    return [document.values[corpus.columns[0]] for document in found]


def as_lines(texts: list[str], key: str = "text") -> bytes:
    return "".join(json.dumps({key: text, "i": i}) + "\n" for i, text in enumerate(texts)).encode()


def write_parquet(path: Path, texts: list[str]) -> None:
    pa.parquet.write_table(
        pa.table({"i": range(len(texts)), "text": pa.array(texts, pa.string())}), path, row_group_size=2
    )


def write_arrow(path: Path, texts: list[str], is_stream: bool) -> None:
    table = pa.table({"text": pa.array(texts, pa.string()).dictionary_encode(), "i": range(len(texts))})
    with (pa.ipc.new_stream if is_stream else pa.ipc.new_file)(str(path), table.schema) as writer:
        writer.write_table(table, max_chunksize=3)


WRITERS: dict[str, Callable[[Path, list[str]], Any]] = {
    "jsonl": lambda path, texts: path.write_bytes(b"\n" + as_lines(texts).replace(b"\n", b"\r\n\n") + b"  "),
    "jsonl.gz": lambda path, texts: path.write_bytes(gzip.compress(as_lines(texts))),
    "jsonl.zst": lambda path, texts: path.write_bytes(zstandard.compress(as_lines(texts))),
    "jsonl.bz2": lambda path, texts: path.write_bytes(bz2.compress(as_lines(texts))),
    "jsonl.xz": lambda path, texts: path.write_bytes(lzma.compress(as_lines(texts))),
    "parquet": write_parquet,
    "arrow": lambda path, texts: write_arrow(path, texts, is_stream=False),
    "stream.arrow": lambda path, texts: write_arrow(path, texts, is_stream=True),
}


@pytest.mark.parametrize("ending", list(WRITERS))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_stretch_is_that_of_the_whole(tmp_path_factory: pytest.TempPathFactory, ending: str, data: Any) -> None:
    """Documents in any split over files, read from anywhere to anywhere, by byte marks, row groups and batches."""
    folder = tmp_path_factory.mktemp("files")
    parts = data.draw(st.lists(st.lists(st.sampled_from(TEXTS), max_size=9), min_size=1, max_size=4).filter(any))
    for i, part in enumerate(parts):
        WRITERS[ending](folder / f"{i}.{ending}", part)
    whole = [text for part in parts for text in part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "MARK_BYTES", data.draw(st.sampled_from([1, 50, 10**9])))
        corpus = corpus_of(SourceConfig(files=[f"{folder}/*.{ending}"]))
    assert len(corpus) == len(whole)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    assert texts_of(corpus, start, stop) == whole[start:stop]


def test_marks_spare_reading_what_lies_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MARK_BYTES", 1000)
    (tmp_path / "c.jsonl").write_bytes(as_lines(["x" * 100] * 1000))
    corpus = corpus_of(SourceConfig(files=[str(tmp_path / "c.jsonl")]))
    assert 100 < len(corpus.marks[0]) < 130
    parsed = []
    parse = documents._parse
    monkeypatch.setattr(documents, "_parse", lambda *a: parsed.append(a[1]) or parse(*a))  # type: ignore[func-returns-value]
    assert [document.number for document in corpus.read(700, 705)] == [701, 702, 703, 704, 705]
    assert parsed == [701, 702, 703, 704, 705]


@pytest.mark.parametrize("ending", [*WRITERS, "txt"])
def test_files_of_every_format_are_as_datasets_reads_them(tmp_path: Path, ending: str) -> None:
    """Compared with `datasets.load_dataset`, which read the corpora of stores that were made before."""
    import datasets

    texts = [text for text in TEXTS if text]
    if ending == "txt":
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_bytes(text.encode())
    else:
        WRITERS[ending](tmp_path / f"c.{ending}", texts)
    files = [str(path) for path in sorted(tmp_path.iterdir())]
    reader = {"txt": "text", "parquet": "parquet", "arrow": "arrow", "stream.arrow": "arrow"}.get(ending, "json")
    options = {"sample_by": "document"} if reader == "text" else {}
    theirs = datasets.load_dataset(
        reader, data_files=files, split="train", cache_dir=str(tmp_path / "cache"), **options
    )
    ours = texts_of(corpus_of(SourceConfig(files=[f"{tmp_path}/*.{ending}"])))
    assert ours == list(theirs["text"])


def test_lines_of_text(tmp_path: Path) -> None:
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"first\r\n\n  \n second\nthird"))
    source = SourceConfig(files=[str(tmp_path / "c.txt.gz")], format="lines")
    assert texts_of(corpus_of(source)) == ["first", " second", "third"]
    assert [document.number for document in corpus_of(source).read(1, 3)] == [4, 5]


def test_files_behind_a_url() -> None:
    def write(texts: list[str]) -> dict[str, Any]:
        with fsspec.open("memory://corpus/c.jsonl", "wb") as file:
            file.write(as_lines(texts))
        pa.parquet.write_table(pa.table({"text": texts}), "corpus/c.parquet", filesystem=fsspec.filesystem("memory"))
        for ending in ("jsonl", "parquet"):
            source = SourceConfig(files=[f"memory://corpus/*.{ending}"])
            assert texts_of(corpus_of(source), 1) == texts[1:]
        files = find_files(source)
        return corpus_identity(source, files, scan_files(wanted_columns(files, source, []), files), None, "assistant")

    assert write(TEXTS) != write(["other"])


def test_a_line_may_leave_out_what_is_empty_and_another_column_is_looked_for_anew(tmp_path: Path) -> None:
    """That an earlier command with another column looked through the file says nothing of this one's column."""
    (tmp_path / "a.jsonl").write_text('{"text": "x", "body": "y"}\n')
    (tmp_path / "b.jsonl").write_text('{"id": 1}\n{"text": "z"}\n')
    by_text = SourceConfig(files=[f"{tmp_path}/*.jsonl"])
    assert texts_of(corpus_of(by_text)) == ["x", None, "z"]
    found = find_files(by_text)
    wanted = wanted_columns(found, by_text, [])
    for file, scan in zip(found, scan_files(wanted, found), strict=True):
        keep_scan(file, wanted, scan)
    by_body = wanted_columns(found, by_text.model_copy(update={"text_column": "body"}), [])
    assert known_scan(found[1], wanted) is not None
    assert known_scan(found[1], by_body) is None


def test_what_was_found_is_remembered_until_the_file_changes(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(as_lines(TEXTS))
    source = SourceConfig(files=[str(path)])
    (file,) = find_files(source)
    wanted = wanted_columns([file], source, [])
    assert known_scan(file, wanted) is None
    (found,) = scan_files(wanted, [file])
    keep_scan(file, wanted, found)
    known = known_scan(file, wanted)
    assert known is not None
    assert known.content == found.content
    assert known.measure[:2] == found.measure[:2]
    np.testing.assert_array_equal(known.measure.marks, found.measure.marks)
    os.utime(path, ns=(1, 1))
    assert known_scan(find_files(source)[0], wanted) is None


def test_a_corpus_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(as_lines(TEXTS))
    corpus = corpus_of(SourceConfig(files=[str(path)]))
    path.write_bytes(as_lines([text.upper() for text in TEXTS]))  # of the same size, so that only the time differs
    with pytest.raises(CorpusError, match=r"c\.jsonl has changed since the corpus was looked through"):
        texts_of(corpus, 1, 2)
    path.unlink()
    with pytest.raises(CorpusError, match=r"c\.jsonl cannot be found any more"):
        texts_of(corpus)
    with pytest.raises(CorpusError, match="the corpus has changed while it was read: 2 documents fewer"):
        list(take(iter([]), 2))


def test_a_remote_file_that_changes_and_one_that_is_told_of_in_two_ways() -> None:
    """A listing and a question for one file tell the same checksum among different other things."""

    class Store(NamedTuple):
        told: dict[str, Any]
        protocol: tuple[str, ...] = ("s4",)

        def info(self, _path: str) -> dict[str, Any]:
            return self.told

        def unstrip_protocol(self, path: str) -> str:
            return f"s4://{path}"

    def stamp(**told: Any) -> str:
        return files._stamp(Store(told), "bucket/c.jsonl")[0]

    listed = stamp(Size=3, size=3, ETag='"a"', LastModified="2026-01-01T00:00:00.000Z")
    assert stamp(size=3, ETag='"a"', LastModified="Thu, 01 Jan 2026", VersionId=None) == listed
    assert stamp(size=3, ETag='"b"') != listed
    path = "memory://changing/c.jsonl"
    fsspec.filesystem("memory").pipe_file("/changing/c.jsonl", as_lines(["old"]))
    corpus = corpus_of(SourceConfig(files=[path]))
    assert texts_of(corpus) == ["old"]
    fsspec.filesystem("memory").pipe_file("/changing/c.jsonl", as_lines(["new"]))
    with pytest.raises(CorpusError, match="has changed since"):
        texts_of(corpus)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbfone\n\xef\xbb\xbftwo")
    expected: dict[Literal["text", "lines"], list[str]] = {"text": ["one\n\ufefftwo"], "lines": ["one", "\ufefftwo"]}
    for data_format, texts in expected.items():
        assert texts_of(corpus_of(SourceConfig(files=[str(tmp_path / "c.txt")], format=data_format))) == texts


def test_a_file_that_two_patterns_match_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_bytes(as_lines(TEXTS))
    with pytest.raises(CorpusError, match=r"c\.jsonl is named twice by tokens\.source\.files"):
        find_files(SourceConfig(files=[f"{tmp_path}/*.jsonl", f"{tmp_path}/c*"]))


def test_a_host_that_does_not_answer_is_not_a_file_that_is_not_there() -> None:
    with pytest.raises(CorpusError, match=r"file 'http://127\.0\.0\.1:1/c\.jsonl' cannot be looked up: Cannot connect"):
        find_files(SourceConfig(files=["http://127.0.0.1:1/c.jsonl"]))


# What cannot be read


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file matches"),
        ({"a.jsonl": ""}, "empty"),
        ({"a.jsonl": '{"body": "x"}\n'}, "no column 'text'; its columns are body"),
        ({"a.jsonl": "not json\n"}, "a.jsonl cannot be read as json: line 1: Expecting value"),
        ({"a.jsonl": '{"text": "x"}\n' * 1500 + "\n{broken\n"}, "a.jsonl cannot be read as json: line 1502: "),
        ({"a.jsonl": '{"text": "x"}\n', "b.jsonl": "[1]\n"}, "line 1 holds a list, not an object.*jq -c"),
        ({"a.jsonl": '{"text": "x"}\n{"text": "\\ud83d"}\n'}, "line 2: 'utf-8' codec can't encode"),
        ({"a.jsonl": b'{"text": "\xff"}\n'}, "line 1: 'utf-8' codec can't decode"),
        ({"a.jsonl": '{"text": 3}\n'}, "column 'text' of the corpus holds int64, not text"),
        ({"a.jsonl": '{"text": 3}\n{"text": "a"}\n'}, "column 'text' of the corpus holds values of several types"),
        ({"a.jsonl.gz": "plain"}, "a.jsonl.gz cannot be read as json"),
        ({"a.jsonl.gz": gzip.compress(as_lines(["x" * 10_000]))[:-20]}, "a.jsonl.gz cannot be read as json"),
        ({"a.jsonl.zst": "plain"}, "a.jsonl.zst cannot be read as json"),
        ({"a.parquet": "plain"}, "a.parquet cannot be read as parquet"),
        ({"a.arrow": "plain"}, "a.arrow cannot be read as arrow"),
        ({"a.txt": b"\xff"}, "a.txt cannot be read as text"),
        ({"a.jsonl": '{"text": "x"}\n', "b.jsonl": '{"body": "x"}\n'}, "b.jsonl has no column 'text', which"),
        ({"a.csv": "x"}, "format of .* is not clear"),
        ({"a.jsonl": "{}\n", "b.parquet": ""}, "format of .* is not clear"),
    ],
)  # fmt: skip
def test_a_corpus_that_cannot_be_read(tmp_path: Path, files: dict[str, str | bytes], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError, match=message):
        corpus_of(SourceConfig(files=[str(tmp_path / "*")]))


def test_files_that_are_unlike_the_first(tmp_path: Path) -> None:
    pa.parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "0.parquet")
    source = SourceConfig(files=[str(tmp_path / "*.parquet")])
    for column, message in (({"body": ["a"]}, "1.parquet has no column 'text'"), ({"text": [1]}, "holds int64 in 1.p")):
        pa.parquet.write_table(pa.table(column), tmp_path / "1.parquet")
        with pytest.raises(CorpusError, match=message):
            corpus_of(source)
    pa.parquet.write_table(
        pa.table({"text": pa.nulls(2)}), tmp_path / "1.parquet"
    )  # a file without any text may be there
    assert texts_of(corpus_of(source)) == ["a", None, None]


# The Hub


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The layout of `~/.cache/huggingface/hub`, made by hand; nothing is asked of the network. Its one snapshot."""
    repository = tmp_path / "datasets--someone--sources"
    snapshot = repository / "snapshots" / COMMIT
    (snapshot / "data").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    return snapshot


def test_a_hub_dataset_from_the_cache(hub_cache: Path) -> None:
    (hub_cache / "data" / "train-0.jsonl").write_bytes(as_lines(TEXTS, "body"))
    (hub_cache / "data" / "train-1.jsonl").write_bytes(as_lines(["more"], "body"))
    (hub_cache / "data" / "test-0.jsonl").write_bytes(as_lines(["held"], "body"))
    source = SourceConfig(dataset="someone/sources", text_column="body")
    assert texts_of(corpus_of(source)) == [*TEXTS, "more"]
    assert texts_of(corpus_of(source.model_copy(update={"split": "test"}))) == ["held"]
    assert texts_of(corpus_of(source.model_copy(update={"files": ["data/*-1.jsonl"]}))) == ["more"]
    files = find_files(source)
    found = corpus_identity(source, files, scan_files(wanted_columns(files, source, []), files), None, "assistant")
    assert (found["commit"], found["num_files"]) == (COMMIT, 2)


def test_a_hub_dataset_with_a_card(hub_cache: Path) -> None:
    write_parquet(hub_cache / "data" / "x.parquet", TEXTS)
    write_parquet(hub_cache / "data" / "y.parquet", ["y"])
    (hub_cache / "README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files: data/y.parquet\n"
        "- config_name: two\n  data_files:\n  - split: all\n    path: data/x*\n---\n"
    )
    assert texts_of(corpus_of(SourceConfig(dataset="someone/sources", name="two", split="all"))) == TEXTS
    assert texts_of(corpus_of(SourceConfig(dataset="someone/sources", name="one"))) == ["y"]


def test_a_hub_dataset_of_text_has_a_document_in_each_line(hub_cache: Path) -> None:
    (hub_cache / "train.txt").write_text("one\ntwo\n")
    assert texts_of(corpus_of(SourceConfig(dataset="someone/sources"))) == ["one", "two"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"dataset": "someone/nothing"}, "'someone/nothing' cannot be fetched from the Hub or its cache"),
        ({"split": "valid"}, "has no split 'valid': it has train"),
        ({"name": "other"}, "cannot be used: BuilderConfig 'other' not found"),
        ({"files": ["*.parquet"]}, "has no file that matches"),
        ({"files": ["*.csv"]}, "is kept as csv, not json, parquet, arrow, text.*refs/convert/parquet"),
    ],
)
def test_hub_datasets_that_cannot_be_read(hub_cache: Path, source: dict[str, Any], message: str) -> None:
    (hub_cache / "train.jsonl").write_bytes(as_lines(TEXTS))
    (hub_cache / "train.csv").write_text("text\n")
    with pytest.raises(CorpusError, match=message):
        find_files(SourceConfig(**{"dataset": "someone/sources", "files": ["*.jsonl"]} | source))


FROM_HUB = """
import json, sys
from cluster.config import SourceConfig
from cluster.corpus.reader import Corpus, corpus_identity, first_documents, wanted_columns
from cluster.corpus.files import find_files
from cluster.corpus.scan import scan_files
source = SourceConfig(**json.loads(sys.argv[1]))
start, stop = json.loads(sys.argv[2])
files = find_files(source)
wanted = wanted_columns(files[:1], source, [])
corpus = Corpus.of_scans(files, scan_files(wanted, files), wanted.kinds)
texts = [document.values["text"] for document in corpus.read(start, stop)]
print(json.dumps([[file.path for file in files], files[0].snapshot.commit, len(corpus), texts]))
"""


def from_hub(address: str, home: Path, source: dict[str, Any], stretch: list[int], **environment: str) -> Any:
    """Files, commit, documents and a stretch of a corpus, as a process finds them whose Hub is at the address."""
    own = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "XDG_CACHE_HOME": str(home / "memory")}
    own |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    command = [sys.executable, "-c", FROM_HUB, json.dumps(source), json.dumps(stretch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **own}, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_of_a_hub_dataset_each_file_is_fetched_where_it_is_read(tmp_path: Path) -> None:
    """From a real HTTP server: the list of files at the commit, footers by range, and whole files only when read."""
    rng = np.random.default_rng(0)
    parts = [["".join(map(chr, rng.integers(33, 999, 40_000))) for _ in range(4)] for _ in range(3)]
    files = {"README.md": b"---\nlicense: mit\n---\n", "data/test-0.parquet": b"never read"}
    for i, part in enumerate(parts):
        write_parquet(tmp_path / "part.parquet", part)
        files[f"data/train-{i}.parquet"] = (tmp_path / "part.parquet").read_bytes()
    source = {"dataset": DATASET}
    with hub_of(files) as (address, served):
        found, commit, count, texts = from_hub(address, tmp_path, source, [5, 7])
        assert (found, commit, count) == ([f"data/train-{i}.parquet" for i in range(3)], COMMIT, 12)
        assert texts == parts[1][1:3]
        assert served["data/train-1.parquet"] > len(files["data/train-1.parquet"])
        assert max(served[f"data/train-{i}.parquet"] for i in (0, 2)) < 0.8 * len(files["data/train-0.parquet"])
        assert served["data/test-0.parquet"] == 0
        before = served.total()
        assert from_hub(address, tmp_path, source, [5, 7])[3] == texts
        assert served["data/train-1.parquet"] < 1.5 * len(files["data/train-1.parquet"])  # it is in the cache
        assert served.total() > before
    with pytest.raises(AssertionError, match=r"train-0\.parquet cannot be read as parquet: .*offline"):
        from_hub(address, tmp_path, source, [0, 1], HF_HUB_OFFLINE="1")


def test_a_compressed_file_that_is_cut_short(tmp_path: Path) -> None:
    """It must not pass for a shorter corpus."""
    lines = b"".join(b'{"text": "line %d"}\n' % i for i in range(5000))
    whole = zstandard.ZstdCompressor().compress(lines)
    path = tmp_path / "c.jsonl.zst"
    path.write_bytes(whole + whole)  # frames one after the other are one file
    (file,) = find_files(SourceConfig(files=[str(path)]))
    assert sum(1 for _ in first_documents([file], ("text",))) == 10_000
    path.write_bytes(whole[: len(whole) // 2])
    (file,) = find_files(SourceConfig(files=[str(path)]))
    with pytest.raises(CorpusError, match=r"c\.jsonl\.zst cannot be read as json: .*Truncated"):
        list(first_documents([file], ("text",)))
