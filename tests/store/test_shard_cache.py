"""Remote stores: shards are fetched once, kept within a limit, and verified wherever they were damaged."""

import os
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest

from logit_store import LogitStore
from logit_store.errors import ConfigError, CorruptError, StoreError
from logit_store.shard_cache import ShardCache
from tests.store.made import make_row, write_store
from tests.store.test_round_trip import assert_same


@pytest.fixture
def remote() -> Any:
    rng = np.random.default_rng(0)
    rows = [make_row(rng, 60, 8) for _ in range(12)]
    store = write_store("memory://bucket/store", [rows[i : i + 3] for i in range(0, 12, 3)])
    yield store, rows
    fsspec.filesystem("memory").rm("/bucket", recursive=True)


def read_all(store: LogitStore, rows: list[Any], start: int = 0) -> None:
    for i, row in enumerate(rows[start:], start):
        assert_same(store[i], row, 0.5)


def fetches(store: LogitStore) -> Any:
    return mock.patch.object(store.storage.fs, "get_file", wraps=store.storage.fs.get_file)


def test_a_shard_is_fetched_once(remote: Any, tmp_path: Path) -> None:
    store, rows = remote
    with fetches(store) as get_file:
        for _ in range(2):
            read_all(LogitStore.open(store.storage.url, ShardCache(str(tmp_path))), rows)
    assert get_file.call_count == 4
    assert len(list(tmp_path.iterdir())) == 4


def test_the_longest_unused_goes_first(remote: Any, tmp_path: Path) -> None:
    store, rows = remote
    size = int(store.shards.columns["bytes"].max())
    cache = ShardCache(str(tmp_path), max_bytes=2 * size)
    opened = LogitStore.open(store.storage.url, cache)
    read_all(opened, rows)  # an evicted copy that is mapped can still be read
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {f"{store.shards.hash('sha256', shard)}.arrow" for shard in (2, 3)}
    with fetches(store) as get_file:
        read_all(LogitStore.open(store.storage.url, cache), rows, start=6)
        assert get_file.call_count == 0
        assert_same(LogitStore.open(store.storage.url, cache)[0], rows[0], 0.5)
        assert get_file.call_count == 1


@pytest.mark.parametrize("place", ["prefix", "block", "cut"])
def test_a_damaged_copy_is_fetched_again(remote: Any, tmp_path: Path, place: str) -> None:
    store, rows = remote
    cache = ShardCache(str(tmp_path))
    read_all(LogitStore.open(store.storage.url, cache), rows)
    for path in tmp_path.iterdir():
        data = bytearray(path.read_bytes())
        data[100 if place == "prefix" else -3000] ^= 4
        path.write_bytes(data[:-5] if place == "cut" else data)
    with fetches(store) as get_file:
        read_all(LogitStore.open(store.storage.url, cache), rows)
    assert get_file.call_count == 4


def test_a_damaged_remote_shard_is_named(remote: Any, tmp_path: Path) -> None:
    store, _ = remote
    name = store.storage.path(store.shard_name(1))
    data = bytearray(store.storage.fs.cat_file(name))
    data[len(data) // 2] ^= 1
    store.storage.fs.pipe_file(name, bytes(data))
    with pytest.raises(CorruptError, match=f"{name} is damaged"):
        _ = LogitStore.open(store.storage.url, ShardCache(str(tmp_path)))[3]
    assert not list(tmp_path.iterdir())
    store.storage.fs.rm_file(name)
    with pytest.raises(CorruptError, match=f"{name} is missing"):
        _ = LogitStore.open(store.storage.url, ShardCache(str(tmp_path)))[3]


def test_what_killed_fetches_left_is_thrown_away(remote: Any, tmp_path: Path) -> None:
    store, rows = remote
    old, new = tmp_path / "old.tmp", tmp_path / "new.tmp"
    for path in (old, new):
        path.write_bytes(b"half of a shard")
    os.utime(old, (0, 0))
    read_all(LogitStore.open(store.storage.url, ShardCache(str(tmp_path))), rows)
    assert not old.exists()
    assert new.exists()  # somebody may be writing it


def test_a_fetch_that_fails_says_so(remote: Any, tmp_path: Path) -> None:
    store, _ = remote
    opened = LogitStore.open(store.storage.url, ShardCache(str(tmp_path)))
    failing = mock.patch.object(store.storage.fs, "get_file", side_effect=OSError(28, "No space left on device"))
    with failing, pytest.raises(StoreError, match=r"cannot be fetched into .*No space left"):
        _ = opened[0]


def test_where_and_how_much_is_for_the_user_to_say(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DECANT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("DECANT_CACHE_BYTES", "5000000")
    cache = ShardCache()
    assert (cache.folder, cache.max_bytes) == (tmp_path, 5_000_000)
    monkeypatch.setenv("DECANT_CACHE_BYTES", "5 GB")
    with pytest.raises(ConfigError, match="DECANT_CACHE_BYTES is '5 GB'"):
        ShardCache()
