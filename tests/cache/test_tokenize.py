"""From documents to rows: windows, ends, splits, masks; and the verb around them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.config import SourceConfig, TokensConfig
from cluster.corpus.documents import Document
from cluster.corpus.files import SourceFile
from cluster.corpus.windows import SMALLEST_POWER, document_rows, piece_lengths
from cluster.tokenize import make_encoder, stretches
from cluster.tokenizer import load_tokenizer
from logit_store import TokenRow
from logit_store.errors import ConfigError, CorpusError, IdentityError
from logit_store.vocabulary import describe_tokenizer, vocabulary_size
from tests.toy import WINDOW

pytestmark = pytest.mark.usefixtures("own_memory")

TEXTS = ["def f(x):\n    return x\n" * 20, "import os", "", "class A: pass\n" * 50]
FILE = SourceFile("c.jsonl", "c.jsonl", "json", "", 0)


def text_rows(texts: list[Any], tokenizer: Any, held_out: float) -> list[TokenRow]:
    encoder = make_encoder(TokensConfig(path="", source=SourceConfig(files=["x"]), tokenizer=""), tokenizer, None)
    documents = [Document({"text": text}, FILE, i + 1) for i, text in enumerate(texts)]
    return document_rows(documents, encoder, WINDOW, held_out, {})


def test_rows_are_the_documents_in_consecutive_windows(tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    rows = text_rows(TEXTS, loaded, 0.5)
    documents: dict[int, list[int]] = {}
    for row in rows:
        assert 1 <= len(row.input_ids_T) <= WINDOW
        documents.setdefault(row.document, []).extend(row.input_ids_T.tolist())
    expected = [[*loaded(text)["input_ids"], loaded.eos_token_id] for text in TEXTS if text]
    assert list(documents.values()) == expected  # an empty text gives no row; no row holds two documents
    for document in documents:
        assert len({row.split for row in rows if row.document == document}) == 1


@settings(deadline=None)
@given(st.integers(0, 5000), st.integers(2, 600))
def test_pieces_of_powers_of_two_are_the_largest_that_fit(num_tokens: int, window: int) -> None:
    lengths = piece_lengths(num_tokens, window, "powers_of_two")
    assert sum(lengths) == num_tokens
    assert lengths == sorted(lengths, reverse=True)
    assert max(lengths, default=1) <= window
    if window >= SMALLEST_POWER:
        assert all(length.bit_count() == 1 for length in lengths if length >= SMALLEST_POWER)
        assert sum(length < SMALLEST_POWER for length in lengths) <= 1
    assert len(lengths) - lengths.count(max(lengths, default=0)) == max(len(set(lengths)) - 1, 0)  # smaller ones once


def test_a_store_of_pieces_is_another_store(tokenize_here: Callable[..., Any], tokenizer: Path) -> None:
    documents = [{"text": text} for text in TEXTS]
    store = tokenize_here(documents, pieces="powers_of_two")
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    expected = [[*loaded(text)["input_ids"], loaded.eos_token_id] for text in TEXTS if text]
    rows = [store[i] for i in range(len(store))]
    for document, ids in zip(dict.fromkeys(row.document for row in rows), expected, strict=True):
        pieces = [row.input_ids_T for row in rows if row.document == document]
        assert np.concatenate(pieces).tolist() == ids
        assert [len(piece) for piece in pieces] == piece_lengths(len(ids), WINDOW, "powers_of_two")
    assert store.manifest["pieces"] == "powers_of_two"
    assert len(tokenize_here(documents, pieces="powers_of_two", starts_cluster=False)) == len(store)
    with pytest.raises(IdentityError, match='pieces is "powers_of_two" there and null here'):
        tokenize_here(documents, starts_cluster=False)


def test_the_split_is_the_texts_own(tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    texts = [f"x = {i}" for i in range(2000)]
    splits = [row.split for row in text_rows(texts, loaded, 0.2)]
    assert 0.16 < splits.count("held_out") / 2000 < 0.24
    assert splits[::-1] == [row.split for row in text_rows(texts[::-1], loaded, 0.2)]
    assert {row.split for row in text_rows(texts, loaded, 0.0)} == {"train"}


def test_a_shared_store_holds_the_corpus(tokens: Any, corpus: Path, tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    expected = text_rows(texts, loaded, 0.2)
    assert len(tokens) == len(expected)
    for i, row in enumerate(expected):
        np.testing.assert_array_equal(tokens[i].input_ids_T, row.input_ids_T)
        assert tokens[i].split == row.split
        assert i in tokens.rows(row.split)
        assert tokens.lengths_N[i] == len(row.input_ids_T)
    assert tokens.manifest["vocabulary_size"] == vocabulary_size(loaded) == 400


def test_a_shared_stores_shards_are_equal_numbers_of_documents(tokens: Any, corpus: Path, tokenizer: Path) -> None:
    """Shard s is the documents [n·s/S, n·(s+1)/S), whoever reads them."""
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for shard in range(8):
        mine = texts[20 * shard // 8 : 20 * (shard + 1) // 8]
        rows = range(int(tokens.shards.starts[shard]), int(tokens.shards.starts[shard + 1]))
        expected = [row.input_ids_T.tolist() for row in text_rows(mine, loaded, 0.2)]
        assert [tokens[i].input_ids_T.tolist() for i in rows] == expected


def test_a_text_that_is_no_text(tokenizer: Path) -> None:
    with pytest.raises(CorpusError, match=r"c\.jsonl, line 2: the text is int, not a string"):
        text_rows(["x", 3], load_tokenizer(str(tokenizer), None, trust_remote_code=False), 0.0)


def test_padding_and_truncation_do_not_change_a_tokenizers_identity(tokenizer: Path) -> None:
    loaded = load_tokenizer(str(tokenizer), None, trust_remote_code=False)
    before = describe_tokenizer(loaded)
    loaded(["a b c", "d"], padding=True, truncation=True, max_length=2)
    assert describe_tokenizer(loaded) == before
    loaded.add_tokens(["<|new|>"])
    assert describe_tokenizer(loaded)["vocabulary_sha256"] != before["vocabulary_sha256"]
    assert vocabulary_size(loaded) == 401


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no tokenizer can be loaded from"):
        load_tokenizer(str(tmp_path), None, trust_remote_code=False)


# The verb, its tasks run in this process


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    """The source of a Parquet file with columns of every type."""
    columns = {"text": TEXTS, "url": [f"https://example.org/{i}" for i in range(4)], "stars": [1, None, 3, 4]}
    columns |= {"score": [0.5, 1.5, 2.5, 3.5], "fork": [True, False, True, False], "tags": [["a"], [], ["b"], []]}
    pa.parquet.write_table(pa.table(columns), tmp_path / "documents.parquet")
    return {"files": [str(tmp_path / "documents.parquet")]}


def test_rows_carry_the_columns_that_were_asked_for(
    tokenize_here: Callable[..., Any], table: dict[str, Any], tmp_path: Path
) -> None:
    names = ["url", "stars", "score", "fork"]
    store = tokenize_here(table, columns=names)
    assert store.manifest["columns"] == {"url": "string", "stars": "int64", "score": "float64", "fork": "bool"}
    carried = [dict(store[i].columns) for i in range(len(store))]
    assert carried[0] == {"url": "https://example.org/0", "stars": 1, "score": 0.5, "fork": True}
    assert {row["url"][-1] for row in carried} == {"0", "1", "3"}  # the third document has no text
    assert [row["stars"] for row in carried if row["url"][-1] == "1"] == [None]
    lines = pa.parquet.read_table(table["files"][0]).to_pylist()
    again = tokenize_here(lines, columns=names, path=str(tmp_path / "lines"))
    assert again.manifest["columns"] == store.manifest["columns"]
    assert [dict(again[i].columns) for i in range(len(again))] == carried


@pytest.mark.parametrize(
    ("columns", "reason"), [(["author"], "names 'author'"), (["tags"], "only"), (["input_ids"], "own")]
)
def test_columns_that_cannot_be_carried_are_named(
    refused: Callable[..., str], table: dict[str, Any], columns: list[str], reason: str
) -> None:
    assert reason in refused(table, columns=columns)
    assert "text_column" in refused(table, text_column="stars")


def test_a_finished_store_needs_no_cluster_and_another_corpus_another_directory(
    tokenize_here: Callable[..., Any],
) -> None:
    documents = [{"text": text} for text in TEXTS]
    first = tokenize_here(documents)
    assert len(tokenize_here(documents, starts_cluster=False)) == len(first)
    with pytest.raises(IdentityError, match="window is 48 there and 40 here"):
        tokenize_here(documents, starts_cluster=False, window=40)
    with pytest.raises(IdentityError, match=r"corpus\.\w+_sha256 is"):
        tokenize_here(documents[:3], starts_cluster=False)


def test_committed_shards_are_not_made_again(tokenize_here: Callable[..., Any], tmp_path: Path) -> None:
    documents = [{"text": f"x = {i}"} for i in range(40)]
    tokenize_here(documents, num_shards=10)
    folder = tmp_path / "tokens"
    before = {path.name: path.read_bytes() for path in (folder / "shards").iterdir()}
    for name in ("manifest.json", "shards/000003.json", "shards/000004.json", "shards/000009.json"):
        (folder / name).unlink()
    with mock.patch("cluster.tokenize.document_rows", wraps=document_rows) as made:
        tokenize_here(documents, num_shards=10)
    assert made.call_count == 1 + 3  # the driver's trial, and the three shards
    assert {path.name: path.read_bytes() for path in (folder / "shards").iterdir()} == before


def test_the_number_of_shards_follows_from_the_bytes(tokenize_here: Callable[..., Any]) -> None:
    documents = [{"text": "x = 1", "other": "y" * 100_000} for _ in range(90)]  # 9 MB of lines
    assert tokenize_here(documents, num_shards=None).manifest["num_shards"] == 3


def test_stretches_are_runs_of_consecutive_shards() -> None:
    assert stretches([], 4) == []
    assert stretches([0, 1, 2, 5, 6, 9], 2) == [range(0, 2), range(2, 3), range(5, 7), range(9, 10)]
    many = stretches(range(1_000_000), 245)
    assert len(many) <= 4096
    assert [shard for stretch in many[:9] for shard in stretch] == list(range(9 * 245))


def test_the_driver_tries_the_config_on_the_begin_of_one_document(tokenize_here: Callable[..., Any]) -> None:
    text = "x = 1\n" * 20_000
    with mock.patch("cluster.tokenize.document_rows", wraps=document_rows) as made:
        store = tokenize_here([{"text": text}, {"text": text}], num_shards=1)
    (tried,), of_task = (call.args[0] for call in made.call_args_list)
    assert tried.values["text"] == text[: 64 * 1024]
    assert [document.values["text"] for document in of_task] == [text, text]
    assert store.manifest["num_documents"] == 2


# Token ids


def rows_of(store: Any) -> list[tuple[list[int], list[bool]]]:
    rows = [store[i] for i in range(len(store))]
    return [(row.input_ids_T.tolist(), row.carries_loss_P.tolist()) for row in rows]


def test_ids_are_taken_as_they_are(tokenize_here: Callable[..., Any], tmp_path: Path) -> None:
    ids = [list(range(100)), [], [7], None, [5, 6, 7]]
    expected = [(list(range(48)), [True] * 47), (list(range(48, 96)), [True] * 47), ([96, 97, 98, 99], [True] * 3)]
    expected += [([7], []), ([5, 6, 7], [True, True])]
    assert rows_of(tokenize_here([{"ids": value} for value in ids], ids_column="ids")) == expected
    for name, kind in (("a", pa.list_(pa.int32())), ("b", pa.large_list(pa.uint16())), ("c", pa.list_(pa.int64()))):
        pa.parquet.write_table(pa.table({"ids": pa.array(ids, kind)}), tmp_path / f"{name}.parquet")
        store = tokenize_here(
            {"files": [str(tmp_path / f"{name}.parquet")]}, ids_column="ids", path=f"{tmp_path}/{name}"
        )
        assert rows_of(store) == expected


def test_a_mask_of_tokens_becomes_one_of_positions(tokenize_here: Callable[..., Any]) -> None:
    rng = np.random.default_rng(0)
    documents = [
        {"ids": rng.integers(0, 400, length).tolist(), "mask": (rng.random(length) < share).astype(int).tolist()}
        for length, share in [(1, 1), (2, 1), (48, 0.5), (49, 0.1), (150, 0.02), (30, 0), (97, 1)]
    ]
    expected = []
    for document in documents:
        for start in range(0, len(document["ids"]), WINDOW):
            ids = document["ids"][start : start + WINDOW]
            loss = [document["mask"][start + t + 1] == 1 for t in range(len(ids) - 1)]
            if any(loss):
                expected.append((ids, loss))
    assert rows_of(tokenize_here(documents, ids_column="ids", mask_column="mask")) == expected


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"ids": [1, 400]}, "c.jsonl, line 2: id 400 is outside of the vocabulary of 400"),
        ({"ids": [-1]}, "c.jsonl, line 2: id -1 is outside"),
        ({"ids": [1.5]}, "c.jsonl, line 2: column 'ids' must hold a list of whole numbers"),
        ({"ids": "1 2"}, "c.jsonl, line 2: column 'ids' must hold a list of whole numbers"),
        ({"ids": [2**70]}, "c.jsonl, line 2: column 'ids' holds numbers beyond 64 bits"),
        ({"ids": [1, 2], "mask": [1]}, "must hold a 0 or a 1 for each of the 2 ids; it holds 1 values"),
        ({"ids": [1, 2], "mask": [1, 2]}, "must hold a 0 or a 1 for each"),
    ],
)
def test_ids_that_are_none(refused: Callable[..., str], document: dict[str, Any], message: str) -> None:
    documents = [{"ids": [1, 1], "mask": [0, 0]}, document]
    mask = {"mask_column": "mask"} if "mask" in document else {}
    documents = documents if mask else [{"ids": []}, document]
    assert message in refused(documents, ids_column="ids", **mask)
    assert "no column 'mask'" in refused([{"ids": [1]}], ids_column="ids", mask_column="mask")
    nothing = [{"ids": [1, 2], "mask": [1, 0]}]
    assert "no document of it has any tokens that carry loss" in refused(nothing, ids_column="ids", mask_column="mask")


# Config


@pytest.mark.parametrize(
    ("source", "changes", "message"),
    [
        ({"text_column": "a", "ids_column": "b"}, {}, "give one of `text_column`, `messages_column` and `ids_column`"),
        ({"mask_column": "b"}, {}, "`mask_column` belongs to `ids_column`"),
        ({"ids_column": "b", "mask_column": "b"}, {}, "are the same column"),
        ({}, {"loss_on": "all"}, "`loss_on` is for conversations"),
        ({"ids_column": "b"}, {"chat_template": "x"}, "`chat_template` is for conversations"),
        ({"messages_column": "b"}, {"loss_on": "user"}, "input should be 'assistant' or 'all'"),
        ({"files": []}, {}, "give `dataset` .a Hub id. or `files`"),
        ({"dataset": "a/b", "format": "text"}, {}, "`format` is for `files` without a `dataset`"),
    ],
)
def test_keys_that_contradict_each_other(
    tokenize_here: Callable[..., Any], source: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        tokenize_here({"files": ["x.jsonl"]} | source, **changes)


def test_a_resolved_config_is_a_config() -> None:
    for keys in ({}, {"messages_column": "m"}, {"ids_column": "i", "mask_column": "m"}):
        raw = {"path": "p", "source": {"files": ["x"], **keys}, "tokenizer": "t"}
        config = TokensConfig.model_validate(raw)
        assert TokensConfig.model_validate_json(config.model_dump_json()) == config
    assert SourceConfig(files=["x"]).content_column == "text"
