"""Ten random kills of workers, driver and nodes; `make chaos` goes on for half an hour."""

import random
from pathlib import Path
from typing import Any

from tests import chaos
from tests.toy import shard_bytes
from training.engine import free_port

KILLS = 10


def test_ten_kills_change_no_byte(long_cache: tuple[Path, dict[str, bytes]], store: Any, tmp_path: Path) -> None:
    """Every store that was made meanwhile is the undisturbed one."""
    config, quiet = long_cache
    start_s = chaos.start_seconds(Path(store.storage.root))  # of real workers
    assert start_s is not None
    with chaos.running(free_port()) as cluster:
        stores, kills = chaos.torment(
            config, tmp_path, cluster, random.Random(1), chaos.PAUSE_IN_STARTS * start_s, KILLS, float("inf")
        )
    assert sum(kills.values()) == KILLS
    assert {"worker", "driver", "node"} == set(kills)
    for store in stores:
        assert shard_bytes(store) == quiet
    assert not cluster.folder.exists()
