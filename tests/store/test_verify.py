"""`decant verify`: any flipped bit of any file is found and the file named; what is dropped comes back."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decant
from logit_store import LogitRow, Storage, TokenRow, writer
from logit_store.errors import FormatError
from logit_store.format import seal
from logit_store.identity import labels_id
from logit_store.tools.damage import drop_damaged
from logit_store.tools.verify import Problem, verify
from tests.store.made import make_row, write_store, write_tokens

LABELS = {"teacher": "t" * 64, "dtype": "float32"}
HEADER = {"labels": LABELS, "labels_id": labels_id(LABELS), "columns": {"url": "string"}}
FLIPS = 40


def make_rows() -> list[list[LogitRow]]:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, n, 8, columns={"url": f"u{n}"}, masked=True) for n in (1, 2, 40, 17, 60, 3, 9, 30)]
    return [rows[:3], [], rows[3:6], rows[6:]]


@pytest.fixture(scope="module")
def logits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("logits")
    write_store(str(folder), make_rows(), **HEADER)
    return folder


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    write_tokens(str(folder), [[row.tokens for row in rows] for rows in make_rows()], columns={"url": "string"})
    return folder


@pytest.fixture(params=["logits", "tokens"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A store of either kind that a test may damage."""
    return Path(shutil.copytree(request.getfixturevalue(request.param), tmp_path / "store"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def files_of(problems: list[Problem]) -> set[str]:
    return {problem.file for problem in problems}


def flipped(path: Path, seed: int) -> Iterator[int]:
    """Flip one bit at a time, at the file's ends and at random places, and set it right again."""
    data = path.read_bytes()
    rng = np.random.default_rng(seed)
    bits = [0, 7, 8 * len(data) - 8, 8 * len(data) - 1, *rng.integers(0, 8 * len(data), FLIPS).tolist()]
    for bit in bits:
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        yield bit
    path.write_bytes(data)


def test_a_sound_store_has_no_problems(store: Path) -> None:
    assert verify(str(store)) == []


def test_every_flipped_bit_of_every_file_is_found_and_the_file_named(store: Path) -> None:
    for seed, name in enumerate(contents(store)):
        for bit in flipped(store / name, seed):
            problems = verify(str(store))
            assert files_of(problems) == {name}, f"bit {bit} of {name}: {problems}"
            shard = int(name[7:13]) if name.startswith("shards/") else None
            assert {problem.shard for problem in problems} == {shard}
    assert verify(str(store)) == []


def test_flipped_bits_of_an_unfinished_store_are_found(store: Path) -> None:
    for name in ("manifest.json", "index.arrow", "shards.arrow", "shards/000001.json"):
        (store / name).unlink()
    assert verify(str(store)) == []
    unnamed = next((store / "shards").glob("000001-*"))  # its record is gone: any bytes may stand there
    unverifiable = {str(unnamed.relative_to(store)), "tokenizer/tokenizer.json"}
    for seed, name in enumerate(contents(store).keys() - unverifiable):
        for bit in flipped(store / name, seed):
            assert name in files_of(verify(str(store))), f"bit {bit} of {name}"


@pytest.mark.parametrize("damage", ["truncated", "longer", "empty", "missing"])
def test_files_of_another_size_are_found(store: Path, damage: str) -> None:
    changes: dict[str, Callable[[bytes], bytes]] = {
        "truncated": lambda data: data[:-1], "longer": lambda data: data + b"\0", "empty": lambda _: b""
    }  # fmt: skip
    for name, data in contents(store).items():
        if damage == "missing":
            (store / name).unlink()
        else:
            (store / name).write_bytes(changes[damage](data))
        problems = verify(str(store))
        if (name, damage) == ("manifest.json", "missing"):  # what is left is a sound unfinished store
            assert problems == []
        else:
            assert files_of(problems) == {name}, problems
        (store / name).write_bytes(data)


def test_all_problems_are_reported_and_not_just_the_first(store: Path) -> None:
    damaged = [name for name in contents(store) if name not in ("manifest.json", "header.json")]
    for name in damaged:
        data = bytearray((store / name).read_bytes())
        data[len(data) // 2] ^= 4
        (store / name).write_bytes(data)
    found = files_of(verify(str(store)))
    # Where both a record and the table are damaged, nothing says what the object should be.
    assert found == {name for name in damaged if not (name.startswith("shards/") and name.endswith(".arrow"))}


def test_an_unreadable_file_is_a_problem(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Storage.pieces

    def pieces(self: Storage, name: str, *size: int) -> Iterator[bytes]:
        if name == "shards/000002.json":
            raise OSError(5, "Input/output error")
        yield from original(self, name, *size)

    monkeypatch.setattr(Storage, "pieces", pieces)
    assert verify(str(store)) == [Problem("shards/000002.json", "cannot be read: Input/output error", 2)]


def test_files_that_belong_to_nothing_are_named_and_never_deleted(store: Path) -> None:
    strays = ["notes.txt", "shards/000099.json", "shards/deep/er", f"shards/000000-{'0' * 16}.arrow"]
    strays += ["tokenizer/extra.json", "shards/000001.json.abc.tmp", "header.json.x.tmp"]
    for name in strays:
        (store / name).parent.mkdir(exist_ok=True)
        (store / name).write_bytes(b"?")
    problems = verify(str(store))
    assert files_of(problems) == set(strays)
    assert all(problem.is_stray for problem in problems)
    before = contents(store)
    assert drop_damaged(Storage(str(store)), problems) == []
    assert contents(store) == before


def test_what_a_running_job_leaves_is_no_problem_of_an_unfinished_store(store: Path) -> None:
    for name in ("manifest.json", "index.arrow", "shards.arrow"):
        (store / name).unlink()
    for name in (f"shards/000003-{'0' * 16}.arrow", "shards/000003.json.abc.tmp", "tokenizer/more.json"):
        (store / name).write_bytes(b"?")
    assert verify(str(store)) == []
    (store / "notes.txt").write_bytes(b"?")
    assert files_of(verify(str(store))) == {"notes.txt"}


def reseal(path: Path, kind: str, **changes: Any) -> None:
    """Change what a sealed file says, as somebody would who knows how."""
    body = json.loads(path.read_bytes())["body"]
    path.write_bytes(seal(kind, {**body, **changes}))


def test_sealed_files_that_contradict_each_other_are_found(logits: Path, tmp_path: Path) -> None:
    def problems_after(name: str, kind: str, **changes: Any) -> dict[str, str]:
        folder = Path(shutil.copytree(logits, tmp_path / "store"))
        reseal(folder / name, kind, **changes)
        found = {problem.file: problem.reason for problem in verify(str(folder))}
        shutil.rmtree(folder)
        return found

    assert "text_id" in problems_after("header.json", "header", text_id="0" * 64)["header.json"]
    assert "labels_id" in problems_after("header.json", "header", labels={"teacher": "other"})["header.json"]
    assert "differs from header.json in k" in problems_after("header.json", "header", k=9)["manifest.json"]
    assert "says 9 rows" in problems_after("manifest.json", "manifest", num_tokens=162, num_rows=9)["manifest.json"]
    assert "it lacks bytes" in problems_after("shards/000000.json", "record", bytes="many")["shards/000000.json"]
    changed = problems_after("shards/000000.json", "record", kept_mass=0.5, sections={"tail": 1})
    assert "differs from its row of shards.arrow in bytes.block_headers" in changed["shards/000000.json"]
    assert "kept_mass" in changed["shards/000000.json"]
    lengths = json.loads((logits / "shards/000002.json").read_bytes())["body"]["index"]
    changed = problems_after("shards/000000.json", "record", index=lengths)
    assert "does not hold the rows" in changed["index.arrow"]


def test_a_shard_of_another_store_is_found(logits: Path, tmp_path: Path) -> None:
    """Its record and its bytes agree, and it still does not belong here."""
    other = {**LABELS, "dtype": "bfloat16"}
    write_store(str(tmp_path / "other"), make_rows(), **{**HEADER, "labels": other, "labels_id": labels_id(other)})
    folder = Path(shutil.copytree(logits, tmp_path / "store"))
    for name in ("manifest.json", "index.arrow", "shards.arrow"):
        (folder / name).unlink()
    for path in (folder / "shards").glob("000002*"):
        path.unlink()
    for path in (tmp_path / "other/shards").glob("000002*"):
        shutil.copy(path, folder / "shards")
    (problem,) = verify(str(folder))
    assert problem.shard == 2
    assert "is a shard of another store" in problem.reason
    shutil.copy(folder / "shards/000000.json", folder / "shards/000002.json")
    assert (
        "is the commit record of another shard" in {p.file: p.reason for p in verify(str(folder))}["shards/000002.json"]
    )


def make_again(folder: Path, kind: str) -> None:
    """What the command that made the store does when it is run again."""
    storage = Storage(str(folder))
    header = writer.unseal(storage.read("header.json"), "header", "header.json")
    for shard, rows in enumerate(make_rows()):
        if writer.is_committed(storage, header["num_shards"])[shard]:
            continue
        if kind == "logits":
            writer.commit_logits(storage, shard, rows, header)
        else:
            writer.commit_tokens(storage, shard, [row.tokens for row in rows], header)
    writer.finish(storage, header, {"tokenizer/tokenizer.json": b"{}"})


def test_what_is_dropped_is_made_again_to_the_byte(store: Path) -> None:
    kind = writer.unseal((store / "header.json").read_bytes(), "header", "")["kind"]
    whole = contents(store)
    victims = [[name] for name in whole if name != "header.json"]
    victims += [["shards/000000.json", "shards.arrow"], [name for name in whole if "000002" in name]]
    for names in victims:
        for name in names:
            data = bytearray(whole[name])
            data[len(data) // 3] ^= 1
            (store / name).write_bytes(data)
        untouched = {name for name in whole if name.startswith("shards/") and name[7:13] not in str(names)}
        dropped = drop_damaged(Storage(str(store)), verify(str(store)))
        assert {"manifest.json", "index.arrow", "shards.arrow"} <= set(dropped)
        assert set(names) <= set(dropped)
        assert not untouched & set(dropped)
        assert verify(str(store)) == []
        make_again(store, kind)
        assert contents(store) == whole


def test_the_command_says_what_is_wrong_and_what_to_do(logits: Path, tmp_path: Path, capsys: Any) -> None:
    folder = Path(shutil.copytree(logits, tmp_path / "store"))
    assert decant.main(["verify", str(folder)]) == 0
    assert "is sound" in capsys.readouterr().out
    victim = next((folder / "shards").glob("000002-*"))
    victim.write_bytes(b"x" + victim.read_bytes()[1:])
    assert decant.main(["verify", str(folder), "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert (problem["file"], problem["shard"]) == (f"shards/{victim.name}", 2)
    assert decant.main(["verify", str(folder)]) == 1
    assert "--drop-damaged" in capsys.readouterr().out
    assert decant.main(["verify", str(folder), "--drop-damaged"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "shards 2" in out
    assert "same `decant cache` command" in out
    assert not victim.exists()
    assert decant.main(["verify", str(folder)]) == 0


def test_a_damaged_header_cannot_be_dropped(store: Path, capsys: Any) -> None:
    for name in ("header.json", "shards/000000.json"):
        (store / name).write_bytes((store / name).read_bytes().replace(b"sha256", b"sha257", 1))
    before = contents(store)
    assert decant.main(["verify", str(store), "--drop-damaged"]) == 2
    shown = capsys.readouterr()
    assert "shards/000000.json" in shown.out
    assert "Restore it from a copy" in " ".join(shown.err.split())
    assert contents(store) == before


def test_no_store_is_an_error(tmp_path: Path, capsys: Any) -> None:
    assert decant.main(["verify", str(tmp_path / "nothing")]) == 2
    assert "holds no decant store" in capsys.readouterr().err
    with pytest.raises(FormatError):
        verify(str(tmp_path))


def test_any_fsspec_url_is_verified() -> None:
    rows: list[list[TokenRow]] = [[row.tokens for row in rows] for rows in make_rows()]
    store = write_tokens("memory://verified/store", rows, columns={"url": "string"})
    assert verify("memory://verified/store") == []
    name = store.shard_name(2)
    store.storage.delete(name)
    assert verify("memory://verified/store") == [Problem(name, "is missing", 2)]
