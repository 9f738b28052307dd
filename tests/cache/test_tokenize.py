"""From documents to rows: windows, ends, splits, sources."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from cluster.config import CacheConfig, SourceConfig
from cluster.corpus import corpus_identity, load_documents
from cluster.tokenize import document_rows, load_tokenizer
from logit_store.config import parse_config
from logit_store.errors import ConfigError, CorpusError
from logit_store.vocabulary import describe_tokenizer, vocabulary_size
from tests.toy import WINDOW

TEXTS = ["def f(x):\n    return x\n" * 20, "import os", "", "class A: pass\n" * 50]


def test_rows_are_the_documents_in_consecutive_windows(tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None)
    rows = document_rows(TEXTS, loaded, WINDOW, 0.5)
    documents: dict[int, list[int]] = {}
    for row in rows:
        assert 1 <= len(row.input_ids_T) <= WINDOW
        documents.setdefault(row.document, []).extend(row.input_ids_T.tolist())
    expected = [[*loaded(text)["input_ids"], loaded.eos_token_id] for text in TEXTS if text]
    assert list(documents.values()) == expected  # an empty text gives no row; no row holds two documents
    for document in documents:
        assert len({row.split for row in rows if row.document == document}) == 1


def test_the_split_is_the_texts_own(tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None)
    texts = [f"x = {i}" for i in range(2000)]
    splits = [row.split for row in document_rows(texts, loaded, WINDOW, 0.2)]
    assert 0.16 < splits.count("held_out") / 2000 < 0.24
    assert splits[::-1] == [row.split for row in document_rows(texts[::-1], loaded, WINDOW, 0.2)]
    assert {row.split for row in document_rows(texts, loaded, WINDOW, 0.0)} == {"train"}


def test_a_shared_store_holds_the_corpus(tokens: Any, corpus: Path, tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = document_rows(texts, loaded, WINDOW, 0.2)
    assert len(tokens) == len(expected)
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(tokens[i].input_ids_T, row.input_ids_T)
        assert tokens[i].split == row.split
        assert i in tokens.rows(row.split)
        assert tokens.lengths_N[i] == len(row.input_ids_T)
    assert tokens.manifest["vocabulary_size"] == vocabulary_size(loaded) == 400


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow", "txt"])
def test_files_of_every_format(tmp_path: Path, kind: str) -> None:
    texts = [text for text in TEXTS if text]
    if kind == "txt":
        for i, text in enumerate(texts):
            (tmp_path / f"{i}.txt").write_text(text)
    elif kind == "jsonl":
        (tmp_path / "c.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    else:
        table = pa.table({"text": texts})
        if kind == "parquet":
            pa.parquet.write_table(table, tmp_path / "c.parquet")
        else:
            with pa.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
                writer.write_table(table)
    source = SourceConfig(files=[str(tmp_path / f"*.{kind}")])
    assert list(load_documents(source)["text"]) == texts


def test_files_behind_a_url(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import fsspec

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)  # it would refuse every URL, memory:// too
    with fsspec.open("memory://corpus/c.jsonl", "w") as file:
        file.write("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = SourceConfig(files=["memory://corpus/*.jsonl"])
    assert list(load_documents(source)["text"]) == TEXTS
    before = corpus_identity(source)
    with fsspec.open("memory://corpus/c.jsonl", "w") as file:
        file.write(json.dumps({"text": "other"}))
    assert corpus_identity(source) != before


def test_a_hub_dataset_from_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The layout of `~/.cache/huggingface/hub`, made by hand; nothing is asked of the network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "datasets--someone--sources"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (snapshot / "train.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in TEXTS))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    source = SourceConfig(dataset="someone/sources", text_column="body")
    assert list(load_documents(source)["body"]) == TEXTS
    assert corpus_identity(source)["commit"] == commit
    with pytest.raises(CorpusError, match="'someone/nothing' cannot be fetched from the Hub or its cache"):
        load_documents(SourceConfig(dataset="someone/nothing"))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no file matches"),
        ({"a.jsonl": ""}, "empty"),
        ({"a.jsonl": '{"body": "x"}\n'}, "no column 'text'; its columns are body"),
        ({"a.jsonl": "not json\n"}, "cannot be read as json"),
        ({"a.csv": "x"}, "format of .* is not clear"),
        ({"a.jsonl": "{}\n", "b.parquet": ""}, "format of .* is not clear"),
    ],
)
def test_a_corpus_that_cannot_be_read(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CorpusError, match=message):
        load_documents(SourceConfig(files=[str(tmp_path / "*")]))


def test_a_text_that_is_no_text(tokenizer: Path) -> None:
    with pytest.raises(CorpusError, match="text is int, not a string"):
        document_rows([3], load_tokenizer(str(tokenizer), None), WINDOW, 0.0)  # type: ignore[list-item]


def test_padding_and_truncation_do_not_change_a_tokenizers_identity(tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None)
    before = describe_tokenizer(loaded)
    loaded(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert describe_tokenizer(loaded) == before
    loaded.add_tokens(["<|new|>"])
    assert describe_tokenizer(loaded)["vocabulary_sha256"] != before["vocabulary_sha256"]
    assert vocabulary_size(loaded) == 401


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path), None)


def tokenize_here(tmp_path: Path, tokenizer: Path, columns: list[str]) -> Any:
    """`decant tokenize` of a small Parquet file, its tasks run in this process."""
    from contextlib import nullcontext
    from unittest import mock

    from cluster import ray_cluster
    from cluster.tokenize import tokenize

    table = {"text": TEXTS, "url": [f"https://example.org/{i}" for i in range(4)], "stars": [1, None, 3, 4]}
    table |= {"score": [0.5, 1.5, 2.5, 3.5], "fork": [True, False, True, False], "tags": [["a"], [], ["b"], []]}
    pa.parquet.write_table(pa.table(table), tmp_path / "documents.parquet")
    raw = {
        "tokens": {"path": str(tmp_path / "tokens"), "source": {"files": [str(tmp_path / "documents.parquet")]},
                   "tokenizer": str(tokenizer), "window": WINDOW, "num_shards": 2, "columns": columns},
        "teacher": {"model": "none"}, "store": {"path": str(tmp_path / "store")},
    }  # fmt: skip
    config = parse_config(CacheConfig, raw, "test")
    here: dict[str, Any] = {
        "session": lambda _: nullcontext(),
        "map_tasks": lambda f, items: (f(*item) for item in items),
    }
    with mock.patch.multiple(ray_cluster, **here):
        return tokenize(config)


def test_rows_carry_the_columns_that_were_asked_for(tmp_path: Path, tokenizer: Path) -> None:
    store = tokenize_here(tmp_path, tokenizer, ["url", "stars", "score", "fork"])
    assert store.manifest["columns"] == {"url": "string", "stars": "int64", "score": "float64", "fork": "bool"}
    carried = [dict(store[i].columns) for i in range(len(store))]
    assert carried[0] == {"url": "https://example.org/0", "stars": 1, "score": 0.5, "fork": True}
    assert {row["url"][-1] for row in carried} == {"0", "1", "3"}  # the third document has no text
    assert [row["stars"] for row in carried if row["url"][-1] == "1"] == [None]


@pytest.mark.parametrize(
    ("columns", "reason"), [(["author"], "names 'author'.*text, url"), (["tags"], "only"), (["input_ids"], "own")]
)
def test_columns_that_cannot_be_carried_are_named(
    tmp_path: Path, tokenizer: Path, columns: list[str], reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        tokenize_here(tmp_path, tokenizer, columns)
    assert not (tmp_path / "tokens").exists()
