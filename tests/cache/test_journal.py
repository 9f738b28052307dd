"""What a job says of itself while it runs, and how it ended: status, log, rates."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

import decant
from cluster import ray_workers
from cluster.job import account as account_module
from cluster.job import journal as journal_module
from cluster.job.account import RATE_WINDOW_S, Account
from cluster.job.journal import Journal
from cluster.job.pool import Event
from cluster.job.status import read
from logit_store import Storage
from logit_store.errors import TeacherError
from tests.store.test_left_out import make as make_store_by_hand
from tests.toy import in_process_workers, write_yaml

DONE = {"worker": 0, "tokens": 100, "positions": 90, "bytes": 900, "oom_splits": 0, "seconds": {"forward": 1.0}}


@pytest.mark.usefixtures("tokens")
@pytest.mark.parametrize(
    ("error", "code", "state", "reason"),
    [
        (KeyboardInterrupt(), 130, "interrupted", None),
        (SystemExit(15), None, "interrupted", None),  # what Ray makes of SIGTERM
        (TeacherError("nothing [works] here"), 2, "failed", "nothing [works] here"),
    ],
)
def test_a_job_says_how_it_ended(
    cache_config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any,
    error: BaseException, code: int | None, state: str, reason: str | None,
) -> None:  # fmt: skip
    """And that it runs from the first moment on, whatever the last one at this store has said."""
    store = str(tmp_path / "store")
    path = write_yaml(tmp_path / "config.yaml", cache_config | {"store": {"path": store}})
    Journal(store, "cache").status("failed", lambda: {}, now=True)
    states: list[str] = []

    def wait(*_arguments: Any) -> Any:
        states.append(read(store)["state"])
        raise error

    with in_process_workers():
        monkeypatch.setattr(ray_workers, "wait", wait)
        if code is None:
            with pytest.raises(SystemExit):
                decant.main(["cache", str(path)])
        else:
            assert decant.main(["cache", str(path)]) == code
    assert states == ["running"]
    assert (read(store)["state"], read(store).get("reason")) == (state, reason)
    capsys.readouterr()
    assert decant.main(["status", store]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert state in told
    assert (reason or "the command that began it goes on") in told


def test_a_finished_store_without_a_job_names_the_rows_that_are_left_out(tmp_path: Path, capsys: Any) -> None:
    """As one that was merged, or copied without its job's folder."""
    store = make_store_by_hand(tmp_path / "store", leaves_out=True)
    (row,) = store.left_out
    assert decant.main(["status", store.storage.url]) == 0
    assert f"left out │ row {row} │" in " ".join(capsys.readouterr().out.split())


def test_the_status_is_computed_only_when_it_is_written(tmp_path: Path) -> None:
    journal, num_computed = Journal(str(tmp_path / "store"), "cache"), 0

    def figures() -> dict[str, Any]:
        nonlocal num_computed
        num_computed += 1
        return {}

    journal.status("running", figures, now=True)
    for _ in range(10):
        journal.status("running", figures)
    assert num_computed == 1


@pytest.mark.parametrize("where", ["{}/store", "memory://broken-journal/store"])
def test_a_log_that_cannot_be_written_waits_in_little_memory(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last lines are written at the end, if they can be; meanwhile it is tried now and then."""
    journal, num_tried, flush = Journal(where.format(tmp_path), "cache"), 0, Journal._flush

    def fails(self: Journal) -> None:
        nonlocal num_tried
        num_tried += 1
        self._last_flush = time.monotonic()
        raise OSError("no space left on device")

    monkeypatch.setattr(journal_module, "MAX_LINES_KEPT", 10)
    monkeypatch.setattr(Journal, "_flush", fails)
    for i in range(1000):
        journal.log("done", shard=i)
    assert num_tried == 1
    monkeypatch.setattr(Journal, "_flush", flush)
    journal.close()
    names = [name for name in journal.storage.names("") if name.endswith(".jsonl")]
    storage = Storage(journal.storage.url)
    parts = names or [f"{journal._name}/{name}" for name in storage.names(journal._name)]
    lines = [json.loads(line) for part in parts for line in storage.read(part).splitlines()]
    assert [line["shard"] for line in lines] == list(range(990, 1000))


def test_the_rate_is_that_of_the_last_two_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(account_module.time, "monotonic", lambda: now[0])
    account = Account(1000, 0, 10**9, 0.0)
    assert account.tokens_per_s == 0
    now[0] = 10.0
    account.take(Event("done", DONE))
    assert account.tokens_per_s == pytest.approx(100 / 10)
    for i in range(500):
        now[0] += 1.0
        account.take(Event("done", DONE | {"tokens": i}))
    inside = [i for i in range(500) if 11.0 + i > now[0] - RATE_WINDOW_S]
    assert account.tokens_per_s == pytest.approx(sum(inside) / RATE_WINDOW_S)


def test_rows_of_a_shard_that_is_given_up_are_not_to_blame() -> None:
    account = Account(8, 0, 1000, 0.0)
    for shard, row in ((2, 0), (5, 3), (2, 1)):
        account.take(Event("left_out", {"shard": shard, "row": row, "reason": "killed"}))
    account.take(Event("given_up", {"shard": 2, "reason": "killed"}))
    assert account.figures()["left_out"] == [{"shard": 5, "row": 3, "reason": "killed"}]
