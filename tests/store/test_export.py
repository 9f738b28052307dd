"""What `decant export` writes is what the store holds, in the words of other people's readers."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import decant
from logit_store import LogitRow, LogitStore, Storage, TokenStore
from logit_store.rows import offsets_of
from logit_store.tools.export import export
from tests.store.made import make_row, write_store, write_tokens

FORCED = [3, 9]
COLUMNS = {"url": "string", "row": "int64", "metadata_row": "float64", "head_ids": "bool"}
"""Two of them have the name of a column of ours, one the name that the first would get."""

IN_EXPORT = {
    "url": "url",
    "metadata_metadata_row": "row",
    "metadata_row": "metadata_row",
    "metadata_head_ids": "head_ids",
}


def make_rows(lengths: list[int], **options: Any) -> list[LogitRow]:
    rng = np.random.default_rng(5)
    rows = []
    for i, length in enumerate(lengths):
        columns = {"url": f"u{i}", "row": -i, "metadata_row": None if i == 2 else i / 2, "head_ids": i % 2 == 0}
        k = rng.integers(0, 9, length).tolist()
        masked = i % 3 == 0
        rows.append(make_row(rng, length, k, columns=columns, masked=masked, temperatures=2, **options))
    return rows


def example(folder: Path) -> LogitStore:
    """Rows of every kind, in four shards of which one is empty."""
    rows = make_rows([40, 0, 1, 2, 300, 17, 40, 5, 5, 90], forced_ids=FORCED, max_draws=4)
    shards = [rows[:3], [], rows[3:7], rows[7:]]
    options: dict[str, Any] = {"forced_ids": FORCED, "temperatures": [2.0, 4.0], "columns": COLUMNS}
    return write_store(str(folder / "store"), shards, **options)


def plain_row(store: LogitStore, number: int) -> dict[str, Any]:
    """A row of the store as an export has it, by plain loops."""
    tokens, targets = store[number]
    at_N, at_M = offsets_of(targets.head_counts_P), offsets_of(targets.sampled_counts_P)
    positions = range(len(targets.head_counts_P))
    mask = tokens.loss_mask_P
    return {
        "row": number,
        "document": tokens.document,
        "split": tokens.split,
        **{exported: tokens.columns[name] for exported, name in IN_EXPORT.items()},
        "input_ids": tokens.input_ids_T.tolist(),
        "loss_mask": None if mask is None or mask.all() else mask.tolist(),
        "head_ids": [targets.head_ids_N[at_N[t] : at_N[t + 1]].tolist() for t in positions],
        "head_logprobs": [targets.head_logprobs_N[at_N[t] : at_N[t + 1]].tolist() for t in positions],
        "next_logprob": targets.next_logprob_P.tolist(),
        "tail_logmass": targets.tail_logmass_P.tolist(),
        "log_partition": targets.log_partition_PS.tolist(),
        "forced_logprobs": targets.forced_logprobs_PF.tolist(),
        "sampled_ids": [targets.sampled_ids_M[at_M[t] : at_M[t + 1]].tolist() for t in positions],
    }


def by_polars(folder: Path) -> list[dict[str, Any]]:
    import polars

    return polars.read_parquet(folder / "data" / "*.parquet").to_dicts()


def by_polars_from_arrow(folder: Path) -> list[dict[str, Any]]:
    import polars

    return polars.concat(map(polars.read_ipc, sorted((folder / "data").glob("*.arrow")))).to_dicts()


def by_duckdb(folder: Path) -> list[dict[str, Any]]:
    import duckdb

    result: Any = duckdb.sql(f"select * from '{folder}/data/*.parquet' order by row")
    return [dict(zip(result.columns, row, strict=True)) for row in result.fetchall()]


def by_pyarrow(folder: Path) -> list[dict[str, Any]]:
    return list(pq.read_table(folder / "data").sort_by("row").to_pylist())


READERS: dict[str, tuple[str, Callable[[Path], list[dict[str, Any]]]]] = {
    "polars": ("parquet", by_polars),
    "duckdb": ("parquet", by_duckdb),
    "pyarrow": ("parquet", by_pyarrow),
    "polars of arrow": ("arrow", by_polars_from_arrow),
    "duckdb of huggingface": ("huggingface", by_duckdb),
}


@pytest.mark.parametrize("name", READERS)
def test_others_read_what_the_store_holds(tmp_path: Path, name: str) -> None:
    store, (form, read) = example(tmp_path), READERS[name]
    export(store.storage.url, str(tmp_path / "out"), form)
    found = read(tmp_path / "out")
    assert len(found) == len(store) == 10
    for number, row in enumerate(found):
        assert row == plain_row(store, number)
    assert any(row["loss_mask"] is None for row in found)
    assert any(row["loss_mask"] for row in found)


def test_datasets_loads_the_folder(tmp_path: Path) -> None:
    import datasets

    store = example(tmp_path)
    export(store.storage.url, str(tmp_path / "out"), "huggingface")
    loaded = datasets.load_dataset(str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    assert set(loaded) == {"train", "held_out"}
    for split in loaded:
        assert loaded[split]["row"][:] == store.rows(split).tolist()
        for row in loaded[split]:
            assert row == plain_row(store, row["row"])


def test_the_card_says_what_it_is(tmp_path: Path) -> None:
    store = example(tmp_path)
    export(store.storage.url, str(tmp_path / "out"), "huggingface")
    _, front, body = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    patterns = {files["split"]: files["path"] for files in yaml.safe_load(front)["configs"][0]["data_files"]}
    assert patterns == {split: f"data/{split}-*.parquet" for split in ("train", "held_out")}
    for split, pattern in patterns.items():
        tables = [pq.read_table(path) for path in sorted((tmp_path / "out").glob(pattern))]
        assert pa.concat_tables(tables)["row"].to_pylist() == store.rows(split).tolist()
    assert "license" not in yaml.safe_load(front)
    assert "add `license: …`" in front
    wanted = [
        store.manifest["labels_id"],
        store.manifest["text_id"],
        "2.0, 4.0",
        "3, 9",
        "toy, 64 ids",
        "lossy: rounding cost",
        "t" * 64,
    ]
    assert [text for text in wanted if text not in body] == []
    schema = pq.read_schema(next((tmp_path / "out" / "data").iterdir()))
    assert [line.split("`")[1] for line in body.splitlines() if line.startswith("| `")] == schema.names
    assert "| `head_logprobs` | `list<list<float32>>` |" in body
    assert "| `metadata_row` | `float64` |" in body
    assert "where it is `row`" in body


def test_columns_that_a_store_lacks_are_left_out(tmp_path: Path) -> None:
    store = write_store(str(tmp_path / "s"), [[make_row(np.random.default_rng(0), 9, 4)]])
    export(store.storage.url, str(tmp_path / "out"))
    names = pq.read_schema(tmp_path / "out/data/000000.parquet").names
    assert names == ["row", "document", "split", "input_ids", "loss_mask", "head_ids", "head_logprobs", "next_logprob",
                     "tail_logmass", "log_partition"]  # fmt: skip


def test_token_stores_have_columns_too(tmp_path: Path) -> None:
    rows = [row.tokens for row in make_rows([5, 0, 30])]
    store = write_tokens(str(tmp_path / "tokens"), [rows[:2], rows[2:]], columns=COLUMNS)
    assert isinstance(store, TokenStore)
    export(store.storage.url, str(tmp_path / "out"), "huggingface")
    found = by_pyarrow(tmp_path / "out")
    assert [row["input_ids"] for row in found] == [row.input_ids_T.tolist() for row in rows]
    assert [row["metadata_metadata_row"] for row in found] == [0, -1, -2]
    assert "# Tokens exported by decant" in (tmp_path / "out/README.md").read_text()


def test_rows_and_splits_can_be_chosen(tmp_path: Path) -> None:
    store = example(tmp_path)
    export(store.storage.url, str(tmp_path / "a"), rows="2:8")
    assert [row["row"] for row in by_pyarrow(tmp_path / "a")] == [2, 3, 4, 5, 6, 7]
    assert sorted(path.name for path in (tmp_path / "a/data").iterdir()) == [f"{i:06d}.parquet" for i in (0, 2, 3)]
    for split in ("train", "held_out"):
        export(store.storage.url, str(tmp_path / split), rows=":9", split=split)
        wanted = [row for row in store.rows(split).tolist() if row < 9]
        assert wanted
        assert [row["row"] for row in by_pyarrow(tmp_path / split)] == wanted
    export(store.storage.url, str(tmp_path / "hf"), "huggingface", split="train")
    assert all(path.name.startswith("train-") for path in (tmp_path / "hf/data").iterdir())
    assert "held_out-*" not in (tmp_path / "hf/README.md").read_text()


def test_batches_do_not_change_what_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = example(tmp_path)
    monkeypatch.setattr("logit_store.tools.export.GROUP_ENTRIES", 100)
    export(store.storage.url, str(tmp_path / "out"))
    assert pq.ParquetFile(tmp_path / "out/data/000002.parquet").num_row_groups > 1
    assert by_pyarrow(tmp_path / "out") == [plain_row(store, number) for number in range(10)]


def tree(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and inode of each file."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_ino) for path in files}


@pytest.mark.parametrize("form", ["parquet", "arrow", "huggingface"])
def test_a_killed_export_goes_on(tmp_path: Path, form: str) -> None:
    """A process dies before its second file has its name; not one line of it runs after that."""
    store = example(tmp_path)
    url, whole, killed = store.storage.url, tmp_path / "whole", tmp_path / "killed"
    export(url, str(whole), form)
    script = f"""
import os, logit_store.tools.export as e
replace, calls = os.replace, []
def dies(source, target):
    calls.append(target)
    os._exit(9) if len(calls) == 2 else replace(source, target)
os.replace = dies
e.export({url!r}, {str(killed)!r}, {form!r})
"""
    assert subprocess.run([sys.executable, "-c", script], check=False, cwd=Path(decant.__file__).parent).returncode == 9
    left = tree(killed)
    assert sum(name.endswith(".tmp") for name in left) == 1
    (complete,) = (name for name in left if name.startswith("data/") and not name.endswith(".tmp"))
    assert left[complete][0] == tree(whole)[complete][0]
    export(url, str(killed), form)
    after = tree(killed)
    assert {name: data for name, (data, _) in after.items()} == {name: data for name, (data, _) in tree(whole).items()}
    assert after[complete][1] == left[complete][1], "a complete file was written again"


def test_a_card_that_was_edited_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = example(tmp_path)
    export(store.storage.url, str(tmp_path / "out"), "huggingface")
    (tmp_path / "out/README.md").write_text("mine")
    capsys.readouterr()
    export(store.storage.url, str(tmp_path / "out"), "huggingface")
    assert (tmp_path / "out/README.md").read_text() == "mine"
    assert capsys.readouterr().out.startswith("10 rows in 5 files")


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: Any) -> str:
        assert decant.main(["export", *map(str, arguments)]) == 2
        return capsys.readouterr().err

    return run


def test_what_cannot_be_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    url, out = example(tmp_path).storage.url, tmp_path / "out"
    cases: dict[tuple[Any, ...], str] = {
        ("--out", out, "--format", "csv"): "--format csv: give one of parquet, arrow, huggingface",
        ("--out", out, "--rows", "10:"): "--rows 10:: nothing is in it; there are 10 rows",
        ("--out", out, "--rows", "1-2"): "--rows 1-2: give A:B",
        ("--out", out, "--split", "test"): "--split test: give one of train, held_out",
        ("--out", f"{url}/export"): "is inside the store",
        ("--out", url): "is inside the store",
    }
    for arguments, message in cases.items():
        before = tree(Path(url))
        assert message in refused(url, *arguments)
        assert not out.exists()
        assert tree(Path(url)) == before
    one_split = "train" if LogitStore.open(url)[0].tokens.split == "held_out" else "held_out"
    assert f"no rows of split {one_split} among rows 0:1" in refused(
        url, "--out", out, "--rows", ":1", "--split", one_split
    )


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path, refused: Callable[..., str]) -> None:
    url, out = example(tmp_path).storage.url, tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("")
    assert "is not empty and holds no export" in refused(url, "--out", out)
    (out / "thesis.tex").unlink()
    export(url, str(out), rows="1:3")
    before = tree(out)
    assert "rows is [1, 3] there and [1, 4] here" in refused(url, "--out", out, "--rows", "1:4")
    assert 'format is "parquet" there and "arrow" here' in refused(
        url, "--out", out, "--rows", "1:3", "--format", "arrow"
    )
    (out / "export.json").write_text("[]")
    assert "cannot be read" in refused(url, "--out", out)
    assert before["data/000000.parquet"] == tree(out)["data/000000.parquet"]


def test_a_disk_that_is_full_is_one_line(tmp_path: Path, refused: Callable[..., str]) -> None:
    url = example(tmp_path).storage.url
    (tmp_path / "file").write_text("")
    assert "is a file, where a directory is needed" in refused(url, "--out", tmp_path / "file" / "out")
    script = f"""
import resource, decant
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
raise SystemExit(decant.main(["export", {url!r}, "--out", {str(tmp_path / "out")!r}]))
"""
    folder = Path(decant.__file__).parent
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 2
    assert "000000.parquet: File too large. Complete files stay" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out").rglob("*.parquet*")) == []


def test_any_file_system_will_do(tmp_path: Path) -> None:
    store = example(tmp_path)
    export(store.storage.url, "memory://export-test", "huggingface")
    remote = Storage("memory://export-test")
    export(store.storage.url, str(tmp_path / "local"), "huggingface")
    local = {name: data for name, (data, _) in tree(tmp_path / "local").items()}
    assert {name: remote.read(name) for name in local} == local
    assert json.loads(remote.read("export.json"))["rows"] == [0, 10]
