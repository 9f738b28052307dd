"""`decant slice`: fewer entries, fewer rows, and still distributions over the same ids."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import decant
from logit_store import LogitRow, LogitStore, TokenRow, writer
from logit_store.errors import ConfigError, IdentityError, StoreError
from logit_store.identity import labels_id
from logit_store.tools import slice as slice_module
from logit_store.tools.slice import Part, cut, slice_store
from logit_store.tools.verify import verify
from tests.store.made import make_row, targets_of, write_store
from tests.store.test_round_trip import assert_same, decoded_sums

LABELS = {"teacher": "t" * 64}
EXACT = {"kind": "exact", "max_kl": 1e-4, "max_error": 0.5}
HEADER: dict[str, Any] = {
    "labels": LABELS,
    "labels_id": labels_id(LABELS),
    "k": 16,
    "provenance": {"teacher": {"a": 1}},
}


def dense_cut(row: LogitRow, k: int, forced: list[int]) -> list[tuple[dict[int, float], float]]:
    """Head and tail of each position after a cut, by sorting Python tuples."""
    targets, found, end = row.targets, [], 0
    for t, count in enumerate(targets.head_counts_P.tolist()):
        ids, logprobs = targets.head_ids_N[end : end + count], targets.head_logprobs_N[end : end + count]
        end += count
        entries = sorted((-float(logprob), int(i)) for i, logprob in zip(ids, logprobs, strict=True))
        stays = {int(row.tokens.input_ids_T[t + 1]), *forced}
        tail = float(np.exp(np.float64(targets.tail_logmass_P[t])))
        tail += sum(np.exp(-surprise) for surprise, i in entries[k:] if i not in stays)
        found.append(({i: -surprise for surprise, i in entries[:k]}, tail))
    return found


def assert_is_cut(child: LogitRow, parent: LogitRow, k: int, forced: list[int], max_error: float) -> None:
    end = 0
    for t, (head, tail) in enumerate(dense_cut(parent, k, forced)):
        count = child.targets.head_counts_P[t]
        ids = child.targets.head_ids_N[end : end + count]
        logprobs = child.targets.head_logprobs_N[end : end + count]
        end += count
        assert ids.tolist() == sorted(head)
        with np.errstate(invalid="ignore"):
            errors = [abs(a - head[i]) for a, i in zip(logprobs, ids.tolist(), strict=True) if np.isfinite(head[i])]
        assert max(errors, default=0.0) <= max_error
        np.testing.assert_allclose(np.exp(np.float64(child.targets.tail_logmass_P[t])), tail, rtol=2e-6, atol=1e-30)
    np.testing.assert_allclose(decoded_sums(child, forced), 1.0, atol=1e-6)
    for name in ("next_logprob_P", "forced_logprobs_PF"):
        np.testing.assert_allclose(getattr(child.targets, name), getattr(parent.targets, name), atol=max_error, rtol=0)
    np.testing.assert_array_equal(child.targets.log_partition_PS, parent.targets.log_partition_PS)


@settings(deadline=None, max_examples=30)
@given(st.data(), st.integers(0, 2**31), st.sampled_from(["lossy", "exact"]))
def test_cut_heads_are_those_of_a_dense_reference(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, seed: int, kind: str
) -> None:
    rng = np.random.default_rng(seed)
    v = data.draw(st.sampled_from([3, 17, 64]))
    k_parent = data.draw(st.integers(1, v))
    k = data.draw(st.integers(1, k_parent))
    forced = data.draw(st.lists(st.integers(0, v - 1), max_size=3, unique=True))
    rows = []
    for length in data.draw(st.lists(st.integers(0, 30), min_size=1, max_size=5)):
        counts = rng.integers(0, k_parent + 1, length).tolist() if data.draw(st.booleans()) else k_parent
        rows.append(make_row(rng, length, counts, v, forced_ids=forced, masked=True, columns={"n": length}))
    codec = {**EXACT, "kind": kind}
    options = {**HEADER, "vocabulary_size": v, "k": k_parent, "forced_ids": forced, "codec": codec}
    folder = tmp_path_factory.mktemp("slice")
    parent = write_store(str(folder / "parent"), [rows, rows[:1]], **options, columns={"n": "int64"})
    child = slice_store(str(folder / "parent"), str(folder / "child"), Part(k=k))
    assert (child.manifest["k"], child.manifest["text_id"]) == (k, parent.manifest["text_id"])
    for i in range(len(parent)):
        assert_is_cut(child[i], parent[i], k, forced, max_error=0.0 if kind == "exact" else 0.5)
        assert_same(child[i]._replace(targets=parent[i].targets), parent[i], 0.0)  # tokens, masks, columns
    assert child.shards.columns["mean_kl"].max() <= 1e-4
    assert verify(str(folder / "child")) == []


@pytest.mark.parametrize("chunk", [1, 100, 2**22])
def test_ties_go_to_the_lower_id_and_impossible_ids_last(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(slice_module, "CHUNK_ENTRIES", chunk)
    row = make_row(np.random.default_rng(0), 6, [4, 6, 0, 5, 6], 8)
    logprobs = np.full(21, np.log(0.1), np.float32)
    logprobs[[5, 7]] = np.log(0.3)
    logprobs[16:] = -np.inf
    logprobs[18] = 0.0
    ids = np.array([0, 2, 4, 6, *[1, 2, 3, 4, 5, 6], *[0, 1, 2, 3, 4], *[0, 1, 2, 3, 4, 7]], np.int32)
    row = row._replace(targets=row.targets._replace(head_ids_N=ids, head_logprobs_N=logprobs))
    found = cut(row, 3, [])
    assert found.targets.head_counts_P.tolist() == [3, 3, 0, 3, 3]
    assert found.targets.head_ids_N.tolist() == [0, 2, 4, 1, 2, 4, 0, 1, 2, 0, 1, 3]


def test_a_slice_of_exact_labels_is_what_the_teacher_would_have_given(tmp_path: Path) -> None:
    """Cut from 48 entries, and cached with 8 in the first place: the same store but for its labels_id."""
    stores = {}
    for k in (48, 8):
        rng = np.random.default_rng(5)
        rows = [make_row(np.random.default_rng(int(rng.integers(100))), n, k) for n in (30, 2, 40)]
        stores[k] = write_store(str(tmp_path / str(k)), [rows], **{**HEADER, "k": k, "codec": EXACT})
    child = slice_store(str(tmp_path / "48"), str(tmp_path / "child"), Part(k=8))
    for i in range(3):
        tail = child[i].targets.tail_logmass_P
        np.testing.assert_allclose(np.exp(tail), np.exp(stores[8][i].targets.tail_logmass_P), atol=1e-6)
        same_tail = child[i].targets._replace(tail_logmass_P=stores[8][i].targets.tail_logmass_P)
        assert_same(child[i]._replace(targets=same_tail), stores[8][i], 0.0)


def test_many_ties_go_to_the_lowest_ids() -> None:
    uniform = np.full((5, 64), -np.log(64))
    ids = np.arange(6, dtype=np.int32)
    row = LogitRow(TokenRow(0, "train", ids), targets_of(uniform, ids, [64] * 5, np.random.default_rng(0)))
    assert cut(row, 20, []).targets.head_ids_N.tolist() == [*range(20)] * 5


@pytest.fixture
def parent(tmp_path: Path) -> LogitStore:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 16) for length in (5, 9, 3, 40, 7, 1, 12, 30, 2)]
    return write_store(str(tmp_path / "parent"), [rows[:3], [], rows[3:6], rows[6:]], **HEADER)


@example(0, 9).via("all of them: the empty shard stays")
@example(3, 6).via("one whole shard")
@settings(deadline=None, max_examples=25)
@given(st.integers(0, 8), st.integers(1, 9))
def test_any_range_of_rows(tmp_path_factory: pytest.TempPathFactory, start: int, stop: int) -> None:
    if start >= stop:
        return
    folder = tmp_path_factory.mktemp("rows")
    rng = np.random.default_rng(0)
    rows = [make_row(rng, length, 16) for length in (5, 9, 3, 40, 7, 1, 12, 30, 2)]
    write_store(str(folder / "parent"), [rows[:3], [], rows[3:6], rows[6:]], **{**HEADER, "codec": EXACT})
    child = slice_store(str(folder / "parent"), str(folder / "child"), Part(rows=f"{start}:{stop}"))
    assert len(child) == stop - start
    for i, row in enumerate(rows[start:stop]):
        assert_same(child[i], row, 0.0)
    bounds = {start, stop, *(b for b in (3, 6) if start < b < stop)}  # shards keep their boundaries
    assert sorted({*child.shards.starts.tolist()}) == sorted(b - start for b in bounds)
    rows_per_shard = np.diff(child.shards.starts).tolist()
    assert rows_per_shard.count(0) == (1 if (start, stop) == (0, 9) else 0)
    assert verify(str(folder / "child")) == []


def test_identity_of_slices(parent: LogitStore, tmp_path: Path) -> None:
    def made(name: str, **part: Any) -> dict[str, Any]:
        return slice_store(parent.storage.url, str(tmp_path / name), Part(**part)).manifest

    fewer, first, train = made("k", k=4), made("rows", rows=":2"), made("train", rows="train")
    assert fewer["labels"] == {"parent": parent.manifest["labels_id"], "k": 4, "rows": None}
    assert fewer["labels_id"] == labels_id(fewer["labels"])
    assert first["labels"]["rows"] == "0:2"
    assert made("rows again", rows="0:2")["labels_id"] == first["labels_id"]
    manifests = (parent.manifest, fewer, first, train)
    assert len({manifest["labels_id"] for manifest in manifests}) == 4
    assert fewer["text_id"] == parent.manifest["text_id"]
    assert len({manifest["text_id"] for manifest in manifests}) == 3
    assert fewer["provenance"]["parent"] == {"teacher": {"a": 1}, "labels": LABELS}
    assert fewer["files"] == parent.manifest["files"]
    again = slice_store(str(tmp_path / "k"), str(tmp_path / "smaller"), Part(k=2)).manifest
    assert again["labels"]["parent"] == fewer["labels_id"]
    assert again["provenance"]["parent"]["labels"] == fewer["labels"]


def test_a_split_alone(parent: LogitStore, tmp_path: Path) -> None:
    child = slice_store(parent.storage.url, str(tmp_path / "held"), Part(rows="held_out"))
    assert len(child.rows("train")) == 0
    for i, row in enumerate(parent.rows("held_out")):
        assert_same(child[i], parent[int(row)], 0.5)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_interrupted_slice_goes_on(parent: LogitStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = Part(k=4, rows="1:9")
    slice_store(parent.storage.url, str(tmp_path / "whole"), part)
    commit, calls = writer.commit_logits, []

    def dying(storage: Any, shard: int, *rest: Any) -> Any:
        calls.append(shard)
        if len(calls) % 2 == 0:
            raise MemoryError
        return commit(storage, shard, *rest)

    monkeypatch.setattr(writer, "commit_logits", dying)
    for _ in range(2):
        with pytest.raises(MemoryError):
            slice_store(parent.storage.url, str(tmp_path / "child"), part)
    slice_store(parent.storage.url, str(tmp_path / "child"), part)
    slice_store(parent.storage.url, str(tmp_path / "child"), part)
    assert calls == [0, 1, 1, 2, 2]  # nothing that is committed is made again
    assert contents(tmp_path / "child") == contents(tmp_path / "whole")
    with pytest.raises(IdentityError, match="labels_id"):
        slice_store(parent.storage.url, str(tmp_path / "child"), Part(k=5, rows="1:9"))


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (Part(), "nothing to slice"),
        (Part(k=17), "k = 17, but heads of .* have 16 entries: choose 1 to 16"),
        (Part(k=0), "choose 1 to 16"),
        (Part(rows="9:20"), "there are 9 rows"),
        (Part(rows="first"), "--rows first: give A:B"),
        (Part(k=3, codec={"max_kl": -1.0}), "max_kl: input should be greater than or equal to 0.0000001"),
    ],
)
def test_what_cannot_be_sliced_is_refused_before_anything_is_written(
    parent: LogitStore, tmp_path: Path, part: Part, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason):
        slice_store(parent.storage.url, str(tmp_path / "child"), part)
    assert not (tmp_path / "child").exists()
    with pytest.raises(ConfigError, match="inside the store"):
        slice_store(parent.storage.url, f"{parent.storage.url}/child", Part(k=3))


def test_draws_from_the_tail_cannot_be_cut(tmp_path: Path) -> None:
    rows = [make_row(np.random.default_rng(1), 20, 8, max_draws=5) for _ in range(3)]
    parent = write_store(str(tmp_path / "parent"), [rows], **{**HEADER, "k": 8})
    with pytest.raises(StoreError, match="drawn from the tail"):
        slice_store(str(tmp_path / "parent"), str(tmp_path / "child"), Part(k=4))
    assert not (tmp_path / "child").exists()
    child = slice_store(str(tmp_path / "parent"), str(tmp_path / "rows"), Part(rows="1:"))
    np.testing.assert_array_equal(child[0].targets.sampled_ids_M, parent[1].targets.sampled_ids_M)


def test_the_command(parent: LogitStore, tmp_path: Path, capsys: Any) -> None:
    url, out = parent.storage.url, str(tmp_path / "child")
    assert decant.main(["slice", url, "--out", out, "--k", "4", "--split", "train", "--exact"]) == 0
    child = LogitStore.open(out)
    assert (child.codec.kind, child.manifest["k"], len(child)) == ("exact", 4, len(parent.rows("train")))
    assert "codec" in capsys.readouterr().out
    assert decant.main(["slice", out, "--out", str(tmp_path / "lossy"), "--max-kl", "0.01"]) == 0
    assert LogitStore.open(str(tmp_path / "lossy")).codec.kind == "lossy"
    assert decant.main(["slice", url, "--out", str(tmp_path / "x"), "--exact", "--max-kl", "1e-5"]) == 2
    assert "Choose one" in capsys.readouterr().err
