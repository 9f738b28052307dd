"""What a job is asked for is what its store holds: kinds of targets, several teachers, a journal, figures."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import decant
from cluster.job.account import Account
from cluster.job.journal import Journal, read_status
from cluster.job.pool import Event
from cluster.job.status import read
from cluster.rescore import rescore
from logit_store import LogitStore, Storage
from logit_store.config import parse_config
from logit_store.errors import ConfigError, NotFinishedError
from tests.toy import make_teacher
from training.config import TrainConfig
from training.prepare import prepare

KINDS: dict[str, dict[str, Any]] = {
    "top_p": {"kind": "top_p", "p": 0.9, "k": 24, "temperatures": [2.0]},
    "counts": {"kind": "counts", "draws": 20, "k": None, "temperatures": []},
    "threshold": {"kind": "threshold", "tau": 0.05, "k": None, "temperatures": [2.0]},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_store_of_every_kind_and_the_teacher_says_it_again(
    make_store: Callable[..., LogitStore], store: LogitStore, kind: str
) -> None:
    """Draws too: they depend on labels, row and position, and on nothing else."""
    made = make_store(f"kind-{kind}", targets={**KINDS[kind], "always": [7, 0]}, store={"codec": {"kind": "exact"}})
    assert made.manifest["forced_ids"] == [7, 0]
    assert made.manifest["labels"]["targets"]["kind"] == kind
    assert made.manifest["labels_id"] != store.manifest["labels_id"]
    row = int(np.flatnonzero(made.lengths_N > 20)[0])
    targets = made[row].targets
    tail_P = np.exp(targets.tail_logmass_P.astype(np.float64))
    assert ((tail_P > 0) & (tail_P <= 1)).all()
    assert targets.forced_logprobs_PF.shape == (len(targets.next_logprob_P), 2)
    if kind == "top_p":
        assert 1 <= targets.head_counts_P.min() < targets.head_counts_P.max() <= 24
        assert not len(targets.sampled_ids_M)
    elif kind == "counts":
        assert (targets.sampled_counts_P == 20).all()
        assert not len(targets.head_ids_N)
    else:
        tempered = targets.head_logprobs_N / 2 - np.repeat(targets.log_partition_PS[:, 0], targets.head_counts_P)
        assert (tempered >= np.log(0.05) - 1e-5).all()
        assert (targets.sampled_counts_P > 0).any()
    assert targets.head_counts_P.max() <= made.manifest["k"]
    config = {
        "run": {"path": "unused"}, "data": {"store": made.storage.url},
        "student": {"config": {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2}},
        "schedule": {"total_tokens": 1000, "tokens_per_step": 200, "lr": 0.01},
        "loss": {"tail": "none" if kind == "top_p" else "sampled", "temperature": 2.0 if kind == "threshold" else 1.0},
    }  # fmt: skip
    prepare(parse_config(TrainConfig, config, "student"))
    wrong = {**config, "loss": {"tail": "sampled" if kind == "top_p" else "ghost"}}
    if kind != "threshold":  # which has heads and draws
        with pytest.raises(ConfigError, match=f"targets of kind {kind}"):
            prepare(parse_config(TrainConfig, wrong, "student"))
    drift = rescore(made.storage.url, 5)
    assert drift.is_within(1e-4)
    again = drift.overall
    assert again.common_ids == again.possible_ids


def test_several_teachers_over_one_set_of_token_shards(
    make_store: Callable[..., LogitStore], store: LogitStore, shared: Path, tokenizer: Path
) -> None:
    """A store each, with the same rows under the same numbers."""
    second = make_teacher(shared / "second-teacher", tokenizer, seed=3)
    other = make_store("second", teacher={"model": str(second)})
    assert other.manifest["text_id"] == store.manifest["text_id"]
    assert other.manifest["labels_id"] != store.manifest["labels_id"]
    assert len(other) == len(store)
    for row in range(0, len(store), 97):
        np.testing.assert_array_equal(other[row].tokens.input_ids_T, store[row].tokens.input_ids_T)
        assert (other[row].tokens.document, other[row].tokens.split) == (
            store[row].tokens.document,
            store[row].tokens.split,
        )
    assert [*other.rows("held_out")] == [*store.rows("held_out")]


def test_a_job_without_a_word_for_a_minute_has_died(store: LogitStore, tmp_path: Path, capsys: Any) -> None:
    unfinished = Storage(str(tmp_path / "store"))
    unfinished.create("header.json", store.storage.read("header.json"))
    assert read(unfinished.url)["state"] == "unknown"
    figures = Account(8, 3, 1000, 0.0).figures()
    journal = Journal(unfinished.url, "cache")
    journal.status("running", lambda: figures, now=True)
    running = read(unfinished.url)
    assert (running["state"], running["shards_done"]) == ("running", 3)  # by its word: to list a million shards costs
    path = tmp_path / "store.job" / "status.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "updated": time.time() - 90}))
    died = read(unfinished.url)
    assert (died["state"], died["shards_done"]) == ("died", 0)
    assert decant.main(["status", unfinished.url]) == 0
    assert "no word for 1:30; the command that began it goes on" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(NotFinishedError, match="no job has begun"):
        read(str(tmp_path / "nothing"))
    assert decant.main(["status", str(tmp_path / "nothing")]) == 2


def test_a_journal_where_files_cannot_grow() -> None:
    journal = Journal("memory://journal/store", "cache")
    journal.log("begun", shards=3)
    journal.log("done", shard=1)
    journal.status("finished", lambda: {"shards": 3}, now=True)
    journal.close()
    status = read_status("memory://journal/store")
    assert status is not None
    assert (status["state"], status["shards"]) == ("finished", 3)
    parts = journal.storage.names(status["log"])
    lines = [json.loads(x) for part in parts for x in journal.storage.read(f"{status['log']}/{part}").splitlines()]
    assert [line["event"] for line in lines] == ["begun", "done"]


def test_a_journal_that_cannot_be_written_stops_nothing(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "store.job").write_text("a file in the way")
    journal = Journal(str(tmp_path / "store"), "cache")
    for _ in range(3):
        journal.log("done", shard=1)
    journal.status("running", dict, now=True)
    journal.close()
    assert capsys.readouterr().err.count("`decant status` is blind") == 1


def test_an_account_adds_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("cluster.job.account.time.monotonic", lambda: now[0])
    account = Account(num_shards=10, num_committed=2, tokens_left=800, gpus_per_worker=4.0)

    def take(kind: str, **fields: Any) -> None:
        account.take(Event(kind, fields))

    take("started", worker=0, host="a", pid=1)
    now[0] += 10
    done = {"worker": 0, "tokens": 100, "positions": 90, "bytes": 900, "oom_splits": 1}
    take("done", **done, seconds={"forward": 6.0, "wait": 1.0})
    now[0] += 10
    take("done", **done, seconds={"forward": 8.0})
    take("died", worker=0, cause="worker_died", reason="it", tasks=[])
    now[0] += 3600
    take("failed", worker=1, cause="storage", reason="it")
    figures = account.figures()
    assert (figures["shards_done"], figures["tokens"], figures["bytes"]) == (4, 200, 1800)
    assert (figures["phases"]["forward"], figures["phases"]["wait"]) == (14.0, 1.0)
    assert figures["retries"] == {"worker_died": 1, "storage": 1}
    assert figures["worker_seconds"] == 20.0  # the dead worker costs nothing
    assert account.cost(3.6) == pytest.approx(20 / 3600 * 4 * 3.6)
    assert account.tokens_left == 600
