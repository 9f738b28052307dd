"""Small real inputs that the tests share: a corpus, a tokenizer, a teacher, the stores made from them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks the network for anything
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two cores are shared by several processes

from tests.toy import END, WINDOW, in_process_workers, make_teacher, run_decant, write_yaml


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the whole run."""
    return tmp_path_factory.mktemp("shared")


@pytest.fixture(scope="session")
def corpus(shared: Path) -> Path:
    """Some modules of the standard library, one per line."""
    folder = Path(json.__file__).parents[1]
    names = [
        "json/decoder",
        "json/encoder",
        "bisect",
        "heapq",
        "queue",
        "sched",
        "shelve",
        "stat",
        "struct",
        "tabnanny",
    ]
    names += ["textwrap", "this", "timeit", "token", "types", "wave", "copy", "glob", "graphlib", "keyword"]
    path = shared / "corpus.jsonl"
    texts = [(folder / f"{name}.py").read_text(encoding="utf-8")[:6000] for name in names]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@pytest.fixture(scope="session")
def tokenizer(shared: Path, corpus: Path) -> Path:
    """A byte-level BPE tokenizer of 400 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[END], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([json.loads(line)["text"] for line in corpus.read_text().splitlines()], trainer)
    folder = shared / "tokenizer"
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def teacher(shared: Path, tokenizer: Path) -> Path:
    """A teacher whose head has 16 rows more than the tokenizer has tokens."""
    return make_teacher(shared / "teacher", tokenizer)


@pytest.fixture(scope="session")
def cache_config(shared: Path, corpus: Path, tokenizer: Path, teacher: Path) -> dict[str, Any]:
    """The config of the shared stores, as a dictionary that tests copy and change."""
    return {
        "tokens": {
            "path": str(shared / "tokens"),
            "source": {"files": [str(corpus)]},
            "tokenizer": str(tokenizer),
            "window": WINDOW,
            "num_shards": 8,
            "held_out": 0.2,
        },
        "teacher": {"model": str(teacher), "dtype": "float32", "batch_tokens": 2048},
        "targets": {"k": 16, "temperatures": [2.0]},
        "store": {"path": str(shared / "store")},
        "cluster": {"workers": 2},
    }


@pytest.fixture(scope="session")
def tokens(cache_config: dict[str, Any], shared: Path) -> Any:
    """The shared token store, made by `decant tokenize` in real Ray tasks."""
    from logit_store import TokenStore

    path = write_yaml(shared / "cache.yaml", cache_config)
    run_decant("tokenize", str(path))
    return TokenStore.open(cache_config["tokens"]["path"])


@pytest.fixture(scope="session")
def store(cache_config: dict[str, Any], tokens: Any, shared: Path) -> Any:
    """The shared logit store, made by `decant cache` with real Ray actors."""
    from logit_store import LogitStore

    run_decant("cache", str(shared / "cache.yaml"))
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
