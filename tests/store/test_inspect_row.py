"""`decant inspect --row` says what the store holds: every number against the row it came from."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

import decant
from logit_store import LogitRow, LogitStore, TokenRow
from logit_store.tools.inspect_row import SHOWN_POSITIONS
from logit_store.tools.token_text import TokenText
from tests.store.made import V, make_row, targets_of, write_store, write_tokens

WORDS = ["<|end|>", "Ġthe", "cat", "Ċ", "â", "[/bold]", "é"]
SHOWN = ["<|end|>", "' the'", "'cat'", r"'\n'", r"b'\xe2'", "'[/bold]'", r"b'\xe9'"]


def tokenizer_json() -> bytes:
    """A byte-level tokenizer of `WORDS`; all ids beyond them have no text."""
    tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(WORDS)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    return str(tokenizer.to_str()).encode()


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What `decant inspect` prints; of a refusal, its one line."""

    def run(*arguments: Any, code: int = 0) -> str:
        assert decant.main(["inspect", *map(str, arguments)]) == code
        out, err = capsys.readouterr()
        return err if code else out

    return run


def example(folder: Path, **changes: Any) -> tuple[LogitStore, list[LogitRow]]:
    """Ragged heads, draws, forced ids and masks."""
    rng = np.random.default_rng(3)
    options: dict[str, Any] = {"forced_ids": [3, 9], "max_draws": 4, "masked": True}
    rows = [make_row(rng, n, rng.integers(0, 9, 100).tolist(), columns={"url": f"u{n}"}, **options) for n in (1, 30, 7)]
    changes = {"forced_ids": [3, 9], "columns": {"url": "string"}, **changes}
    return write_store(str(folder / "store"), [rows[:2], rows[2:]], **changes), rows


def test_json_is_all_that_the_store_knows(tmp_path: Path, said: Callable[..., str]) -> None:
    store, _ = example(tmp_path, tokenizer_json=tokenizer_json())
    for number in range(3):
        found, (tokens, targets) = json.loads(said(store.storage.url, "--row", number, "--json")), store[number]
        assert found["input_ids"] == tokens.input_ids_T.tolist()
        assert (found["document"], found["split"]) == (tokens.document, tokens.split)
        assert found["columns"] == {"url": f"u{len(tokens.input_ids_T)}"}
        assert len(found["positions"]) == len(targets.head_counts_P)
        ends_N, ends_M = np.cumsum(targets.head_counts_P), np.cumsum(targets.sampled_counts_P)
        for t, position in enumerate(found["positions"]):
            n = slice(ends_N[t] - targets.head_counts_P[t], ends_N[t])
            head = dict(zip(targets.head_ids_N[n].tolist(), targets.head_logprobs_N[n].tolist(), strict=True))
            in_order = sorted(head, key=lambda token_id: (-head[token_id], token_id))
            next_id = int(tokens.input_ids_T[t + 1])
            assert position["head_ids"] == in_order
            assert position["head_logprobs"] == [head[token_id] for token_id in in_order]
            assert (position["t"], position["next_id"]) == (t, next_id)
            assert position["next_rank"] == (in_order.index(next_id) + 1 if next_id in head else None)
            assert position["next_logprob"] == targets.next_logprob_P[t]
            assert position["kept_mass"] == pytest.approx(1 - np.exp(np.float64(targets.tail_logmass_P[t])), abs=1e-12)
            tail = targets.tail_logmass_P[t]
            assert position["tail_logmass"] == (None if np.isneginf(tail) else tail)
            m = slice(ends_M[t] - targets.sampled_counts_P[t], ends_M[t])
            assert position["sampled_ids"] == targets.sampled_ids_M[m].tolist()
            assert position["forced_logprobs"] == targets.forced_logprobs_PF[t].tolist()
            assert position["log_partition"] == targets.log_partition_PS[t].tolist()
            assert position["carries_loss"] == (tokens.loss_mask_P is None or tokens.loss_mask_P[t])
            assert {str(i) for i in [next_id, *in_order, *position["sampled_ids"]]} <= found["texts"].keys()
    assert any(position["next_rank"] for position in found["positions"])
    assert found["texts"]["9"] == "#9"
    assert {text: found["texts"].get(str(i), text) for i, text in enumerate(SHOWN)} == {text: text for text in SHOWN}


def simple_store(folder: Path) -> LogitStore:
    """Four positions whose probabilities are known, over the first four words."""
    p_PV = np.full((4, V), 1e-30)
    p_PV[:, :4] = [0.5, 0.3, 0.15, 0.05]
    ids = np.array([2, 1, 3, 0, 1], np.int32)
    logprobs_PV = np.log(p_PV / p_PV.sum(1, keepdims=True))
    targets = targets_of(logprobs_PV, ids, [2] * 4, np.random.default_rng(0), max_draws=0)
    mask = np.array([True, False, True, True])
    row = LogitRow(TokenRow(77, "train", ids, mask), targets._replace(sampled_counts_P=np.array([0, 0, 3, 0], np.int32),
                   sampled_ids_M=np.array([2, 2, 3], np.int32)))  # fmt: skip
    codec = {"kind": "exact", "max_kl": 1e-4, "max_error": 0.5}
    return write_store(str(folder / "s"), [[row]], tokenizer_json=tokenizer_json(), codec=codec, temperatures=[])


def test_a_table_for_people(tmp_path: Path, said: Callable[..., str]) -> None:
    text = said(simple_store(tmp_path).storage.url, "--row", 0, "--top", 1)
    lines = [line.split() for line in text.splitlines()]
    assert text.startswith("row 0 of 1 · document 77 · train · 5 tokens · 75.0% of positions carry loss\n")
    assert lines[1] == [
        "t",
        "token",
        "next",
        "p",
        "rank",
        "most",
        "probable",
        "kept",
        "tail",
        "entries",
        "draws",
        "loss",
    ]
    assert lines[2] == ["0", "'cat'", "'", "the'", "30%", "2", "<|end|>", "50%", "80.00%", "20%", "2"]
    assert lines[3] == ["1", "'", "the'", r"'\n'", "5%", "outside", "<|end|>", "50%", "85.00%", "15%", "2", "no"]
    assert lines[4][-4:] == ["20%", "2", "'cat'×2", r"'\n'"]
    assert lines[5][:2] == ["3", "<|end|>"]
    assert "'cat' 15%" not in text
    assert len(lines) == 6
    assert len(said(tmp_path / "s", "--row", 0, "--positions", "1:3").splitlines()) == 4


def test_a_long_row_is_cut_and_says_so(tmp_path: Path, said: Callable[..., str]) -> None:
    store = write_store(str(tmp_path / "s"), [[make_row(np.random.default_rng(0), 1000, 4)]])
    lines = said(store.storage.url, "--row", 0).splitlines()
    assert len(lines) == SHOWN_POSITIONS + 4  # header, the missing tokenizer, column names, and this:
    assert lines[-1] == "… 935 more: --positions 64:999"
    assert len(json.loads(said(store.storage.url, "--row", 0, "--json"))["positions"]) == 999
    assert len(said(store.storage.url, "--row", 0, "--positions", ":").splitlines()) == 999 + 3


def test_without_a_tokenizer_ids_are_shown(
    tmp_path: Path, said: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store, rows = example(tmp_path)  # its tokenizer.json is {}
    text = said(store.storage.url, "--row", 1)
    assert "ids instead of text: tokenizer/tokenizer.json of the store cannot be read" in text
    assert f"  #{rows[1].tokens.input_ids_T[0]} " in text
    url = simple_store(tmp_path).storage.url
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    assert "ids instead of text: pip install tokenizers" in said(url, "--row", 0)
    assert "the store has no tokenizer/tokenizer.json" in str(TokenText(None).missing)
    assert TokenText(None)(17) == "#17"


def test_rows_of_tokens(tmp_path: Path, said: Callable[..., str]) -> None:
    rows = [make_row(np.random.default_rng(0), n, 1).tokens for n in (5, 0, 1)]
    mask = np.array([True, False, True, False])
    rows[0] = rows[0]._replace(loss_mask_P=mask)
    url = write_tokens(str(tmp_path / "t"), [rows]).storage.url
    found = json.loads(said(url, "--row", 0, "--json"))
    assert (found["input_ids"], found["loss_mask"]) == (rows[0].input_ids_T.tolist(), mask.tolist())
    assert "positions" not in found
    lines = [line.split() for line in said(url, "--row", 0).splitlines()[3:]]
    assert [line[2] for line in lines] == [str(i) for i in found["input_ids"]]
    assert [line[3:] == ["no"] for line in lines] == [*(~mask).tolist(), False]
    assert "0 tokens" in said(url, "--row", 1)
    assert "1 tokens" in said(url, "--row", 2)


def test_what_is_not_there_is_named(tmp_path: Path, said: Callable[..., str]) -> None:
    url = example(tmp_path)[0].storage.url
    assert f"there is no row 3: {url} holds rows 0 to 2" in said(url, "--row", 3, code=2)
    assert "there is no row -1" in said(url, "--row=-1", code=2)
    assert "there are 29 positions in row 1, counted from 0" in said(url, "--row", 1, "--positions", "29:", code=2)
    assert "--positions 3: give A:B" in said(url, "--row", 1, "--positions", "3", code=2)
    assert "--top -1: give a number of alternatives" in said(url, "--row", 1, "--top=-1", code=2)
    assert "--positions goes with --row" in said(url, "--positions", "1:2", code=2)


def test_tokens_that_mark_spaces_in_their_own_way() -> None:
    words = ["▁the", "<0x0A>", "<0xE2>", "▁", "x"]
    for decoder in (decoders.Metaspace(), decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback()])):
        tokenizer = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, []))
        tokenizer.decoder = decoder
        text = TokenText(str(tokenizer.to_str()).encode())
        assert [text(i) for i in range(5)] == ["' the'", r"'\n'", r"b'\xe2'", "' '", "'x'"]
    plain = TokenText(str(Tokenizer(models.WordLevel({"▁the": 0}, "▁the")).to_str()).encode())
    assert plain(0) == "'▁the'"


def test_the_summary_adds_up_the_sections(tmp_path: Path, said: Callable[..., str]) -> None:
    store, _ = example(tmp_path)
    found = json.loads(said(store.storage.url, "--json"))
    assert sum(found["section_bytes"].values()) == found["bytes"] == store.num_bytes
    text = said(store.storage.url)
    assert all((name in text) == (size > 0) for name, size in found["section_bytes"].items() if name != "tail")
