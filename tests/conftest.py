"""Small real inputs that the tests share: a corpus, a tokenizer, a teacher, the stores made from them."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for anything
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two cores are shared by several processes

from tests.toy import (
    PLANTED,
    ROOT,
    in_process_workers,
    make_cache_config,
    make_corpus,
    make_here,
    make_long,
    make_teacher,
    make_tokenizer,
    run_decant,
    shard_bytes,
    write_yaml,
)

os.environ["PYTHONPATH"] = os.pathsep.join(
    filter(None, [str(ROOT / "tests" / "without_mlflow"), os.environ.get("PYTHONPATH")])
)


def pytest_configure(config: pytest.Config) -> None:
    """Students train on the CPU, also where there are GPUs, unless `tests/gpu` is what was asked for.

    Two ranks would share one GPU, and what is compared to the bit with a run of another process would not be.
    """
    if not any("gpu" in Path(argument).parts for argument in config.args):
        os.environ["DS_ACCELERATOR"] = "cpu"


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the whole run."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Path:
    """Some modules of the standard library, one per line."""
    return make_corpus(shared / "corpus.jsonl")


@pytest.fixture(scope="session")
def tokenizer(shared: Path, corpus: Path) -> Path:
    """A byte-level BPE tokenizer of 400 tokens."""
    return make_tokenizer(shared / "tokenizer", corpus)


@pytest.fixture(scope="session")
def teacher(shared: Path, tokenizer: Path) -> Path:
    """A teacher whose head has 16 rows more than the tokenizer has tokens."""
    return make_teacher(shared / "teacher", tokenizer)


@pytest.fixture(scope="session")
def cache_config(shared: Path, corpus: Path, tokenizer: Path, teacher: Path) -> dict[str, Any]:
    """The config of the shared stores, as a dictionary that tests copy and change."""
    return make_cache_config(shared, corpus, tokenizer, teacher)


@pytest.fixture(scope="session")
def tokens(cache_config: dict[str, Any], shared: Path) -> Any:
    """The shared token store, made by `decant tokenize` in real Ray tasks."""
    from logit_store import TokenStore

    path = write_yaml(shared / "cache.yaml", cache_config)
    done = run_decant("tokenize", str(path))
    (shared / "tokens.log").write_text(done.stderr)
    return TokenStore.open(cache_config["tokens"]["path"])


@pytest.fixture(scope="session")
def store(cache_config: dict[str, Any], tokens: Any, shared: Path) -> Any:
    """The shared logit store, made by `decant cache` with real Ray actors."""
    from logit_store import LogitStore

    done = run_decant("cache", str(shared / "cache.yaml"), env={**os.environ, **PLANTED})
    (shared / "cache.log").write_text(done.stdout + done.stderr)
    return LogitStore.open(cache_config["store"]["path"])


@pytest.fixture(scope="session")
def make_store(cache_config: dict[str, Any], tokens: Any, shared: Path) -> Callable[..., Any]:
    """A logit store with other settings, scored by a worker in this process: the actor's code without Ray."""
    from cluster.cache import cache
    from cluster.config import CacheConfig
    from logit_store.config import parse_config

    def make(name: str, **changes: dict[str, Any]) -> Any:
        raw = {section: {**cache_config[section], **changes.get(section, {})} for section in cache_config}
        raw["store"]["path"] = str(shared / name)
        with in_process_workers():
            return cache(parse_config(CacheConfig, raw, name))

    return make


@pytest.fixture(scope="session")
def long_cache(cache_config: dict[str, Any], shared: Path) -> tuple[Path, dict[str, bytes]]:
    """A cache config that takes some ten seconds, and the shards of a run in one process."""
    config = make_long(cache_config, shared)
    make_here(config)
    return write_yaml(shared / "long.yaml", config), shard_bytes(shared / "long-quiet")


# Students

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture(scope="session")
def group_of_one() -> Iterator[None]:
    """DeepSpeed remembers the first group of a process, so that runs in it share one."""
    from unittest import mock

    from training.engine import free_port, process_group

    with mock.patch.dict("os.environ", {**ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}):
        group = process_group()
        group.__enter__()
    yield
    group.__exit__(None, None, None)


@pytest.fixture(scope="module")
def one_rank(group_of_one: None) -> Iterator[None]:
    """While the tests of a file last, this process is the only rank."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            patch.setenv(name, value)
        yield
