"""`decant tokenize` in the test's own process, and a memory of files that is the test's own."""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from cluster import ray_cluster, ray_tasks
from cluster.config import CacheConfig
from cluster.tokenize import tokenize
from logit_store.config import parse_config
from logit_store.errors import ConfigError, CorpusError
from tests.toy import WINDOW


@pytest.fixture
def own_memory(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that another test found out about a file is known."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("memory")))


def session_that_must_not_start(_config: Any) -> Any:
    raise AssertionError("a cluster was started")


@pytest.fixture
def tokenize_here(tmp_path: Path, tokenizer: Path) -> Callable[..., Any]:
    """`decant tokenize` with tasks in this process: of these lines of JSON, or of the source's files."""

    def run(source: list[dict[str, Any]] | dict[str, Any], starts_cluster: bool = True, **changes: Any) -> Any:
        keys = {key: changes.pop(key) for key in [*changes] if key.endswith("_column")}
        if isinstance(source, list):
            path = tmp_path / "c.jsonl"
            path.write_text("".join(json.dumps(document) + "\n" for document in source))
            source = {"files": [str(path)]}
        tokens = {"path": str(tmp_path / "tokens"), "source": source | keys, "tokenizer": str(tokenizer)}
        tokens |= {"window": WINDOW, "num_shards": 2} | changes
        raw = {"tokens": tokens, "teacher": {"model": "none"}, "store": {"path": str(tmp_path / "store")}}
        session: Any = (lambda _: nullcontext()) if starts_cluster else session_that_must_not_start

        def map_tasks(function: Any, shared: Any, items: Any) -> Any:
            return (function(shared, item) for item in items)

        with mock.patch.object(ray_cluster, "session", session), mock.patch.object(ray_tasks, "map_tasks", map_tasks):
            return tokenize(parse_config(CacheConfig, raw, "test"))

    return run


@pytest.fixture
def refused(tokenize_here: Callable[..., Any], tmp_path: Path) -> Callable[..., str]:
    """An error that comes before a cluster is started and anything is written; its line."""

    def run(*arguments: Any, **changes: Any) -> str:
        with pytest.raises((ConfigError, CorpusError)) as caught:
            tokenize_here(*arguments, starts_cluster=False, **changes)
        assert not (tmp_path / "tokens").exists()
        return str(caught.value)

    return run


@pytest.fixture(scope="session")
def vllm_teacher(teacher: Path) -> Iterator[Any]:
    """The real engine, shared by the whole run; its sockets in a folder of their own, since it leaves them behind."""
    with tempfile.TemporaryDirectory(prefix="vllm", dir="/tmp") as sockets, pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_RPC_BASE_PATH", sockets)
        from tests.cache.test_teachers import run_vllm

        backend = run_vllm(teacher, "float32")
        yield backend
        backend.close()
