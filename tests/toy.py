"""What tests build their small real inputs with."""

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

from logit_store import Storage, TokenRow, TokenStore, writer

ROOT = Path(__file__).parents[1]
DECANT = str(Path(sys.executable).parent / "decant")
LIBRARY = Path(json.__file__).parents[1]
WINDOW = 48
END = "<|endoftext|>"
PLANTED = {"RAY_AUTH_TOKEN": "5ec3e7" * 10, "HF_TOKEN": "hf_plantedsecret", "AWS_SECRET_ACCESS_KEY": "plantedkey"}
"""Secrets in the environment of the job that makes the shared store: nothing of them may be found in what it writes."""


def run_decant(*arguments: str, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run `decant …` as a user does, from the project's root."""
    done = subprocess.run(
        [DECANT, *arguments], cwd=options.pop("cwd", ROOT), capture_output=True, text=True, timeout=600, **options
    )
    assert not check or done.returncode == 0, f"decant {arguments}\n{done.stdout}\n{done.stderr}"
    return done


def shard_bytes(folder: str | Path) -> dict[str, bytes]:
    """Every file of a store by name, but for the header: it carries who made it, and where."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.parent.name == "shards"]
    return {path.name: path.read_bytes() for path in files}


def write_yaml(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def make_corpus(path: Path) -> Path:
    """Some modules of the standard library, one per line."""
    names = "json/decoder json/encoder bisect heapq queue sched shelve stat struct tabnanny textwrap this timeit token"
    names += " types wave copy glob graphlib keyword"
    texts = [(LIBRARY / f"{name}.py").read_text(encoding="utf-8")[:6000] for name in names.split()]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def make_tokenizer(folder: Path, corpus: Path) -> Path:
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
    PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END).save_pretrained(folder)
    return folder


def make_cache_config(folder: Path, corpus: Path, tokenizer: Path, teacher: Path) -> dict[str, Any]:
    """The config of small stores in the folder, as a dictionary that tests copy and change."""
    return {
        "tokens": {
            "path": str(folder / "tokens"),
            "source": {"files": [str(corpus)]},
            "tokenizer": str(tokenizer),
            "window": WINDOW,
            "num_shards": 8,
            "held_out": 0.2,
        },
        "teacher": {"model": str(teacher), "dtype": "float32", "batch_tokens": 2048},
        "targets": {"k": 16, "temperatures": [2.0]},
        "store": {"path": str(folder / "store")},
        "cluster": {"workers": 2},
    }


def make_inputs(folder: Path) -> dict[str, Any]:
    """Corpus, tokenizer and teacher in the folder; the config of small stores there."""
    corpus = make_corpus(folder / "corpus.jsonl")
    tokenizer = make_tokenizer(folder / "tokenizer", corpus)
    return make_cache_config(folder, corpus, tokenizer, make_teacher(folder / "teacher", tokenizer))


def make_long(
    config: dict[str, Any], folder: Path, modules: str = "[a-d]*.py", characters: int = 30_000, num_shards: int = 12
) -> dict[str, Any]:
    """The config of a store that takes some ten seconds to make, one row per batch; its corpus, the beginnings of
    modules of the standard library, is written.
    """
    texts = [path.read_text(encoding="utf-8") for path in sorted(LIBRARY.glob(modules))]
    corpus = folder / "long.jsonl"
    corpus.write_text("".join(json.dumps({"text": text[:characters]}) + "\n" for text in texts))
    long: dict[str, Any] = json.loads(json.dumps(config))
    long["tokens"] |= {"path": str(folder / "long-tokens"), "source": {"files": [str(corpus)]}}
    long["tokens"]["num_shards"] = num_shards
    long["teacher"]["batch_tokens"] = 1
    long["store"]["path"] = str(folder / "long-quiet")
    return long


def write_tokens(url: str, tokenizer: str | Path, shards: Iterable[Sequence[TokenRow]], **header: Any) -> TokenStore:
    """A token store of these shards, without `decant tokenize`; ``header`` must have its number of shards."""
    from cluster.tokenizer import load_tokenizer
    from logit_store.vocabulary import describe_tokenizer, tokenizer_files, vocabulary_size

    loaded, storage = load_tokenizer(str(tokenizer), None, trust_remote_code=False), Storage(url)
    whole = {
        "kind": TokenStore.kind, "corpus": {}, "num_documents": 1, "tokenizer": describe_tokenizer(loaded),
        "tokenizer_name": str(tokenizer), "vocabulary_size": vocabulary_size(loaded), "window": WINDOW,
        "held_out": 0.0, "columns": {}, **header,
    }  # fmt: skip
    begun = writer.begin(storage, whole, ["kind"])
    for shard, rows in enumerate(shards):
        writer.commit_tokens(storage, shard, rows, begun)
    writer.finish(storage, begun, tokenizer_files(loaded))
    return TokenStore.open(url)


def num_committed(store: Path) -> int:
    """Shards that a job has committed so far."""
    return len(list((store / "shards").glob("*.json")))


def make_teacher(folder: Path, tokenizer: Path, vocab_size: int = 416, context: int = 64, seed: int = 0) -> Path:
    """A random model whose head is scaled up, so that its distributions have peaks and tails as real ones do."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,  # the smallest that vLLM's CPU attention supports
        max_position_embeddings=context,
        tie_word_embeddings=False,
        initializer_range=0.15,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(6.0)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    return folder


def make_here(config: dict[str, Any]) -> None:
    """`decant tokenize` and `decant cache` of the config in this process: what they should give on any cluster."""
    from cluster.cache import cache
    from cluster.config import CacheConfig
    from cluster.tokenize import tokenize
    from logit_store.config import parse_config

    with in_process_workers():
        tokenize(parse_config(CacheConfig, config, "test"))
        cache(parse_config(CacheConfig, config, "test"))


def in_process_workers() -> Any:
    """Within the block, `tokenize` and `cache` do their work in this process instead of in Ray's."""
    from concurrent.futures import Future

    from cluster import ray_cluster, ray_tasks, ray_workers

    @contextmanager
    def session(_config: Any) -> Iterator[None]:
        yield

    def map_here(function: Any, shared: Any, items: Any) -> Iterator[Any]:
        return (function(shared, item) for item in items)

    def call(worker: Any, method: str, *arguments: Any) -> "Future[Any]":
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(worker, method)(*arguments))
        except Exception as error:  # noqa: BLE001  (whatever it is, `result` raises it)
            future.set_exception(error)
        return future

    stack = ExitStack()
    stack.enter_context(mock.patch.dict(os.environ))  # a worker hides GPUs from its process
    stack.enter_context(mock.patch.multiple(ray_cluster, session=session, check_room=mock.Mock()))
    stack.enter_context(mock.patch.object(ray_tasks, "map_tasks", map_here))
    here: dict[str, Any] = {
        "meter": mock.Mock(),
        "start_worker": lambda _config, worker, arguments: worker(*arguments),
        "call": call,
        "wait": lambda calls, _timeout_s: calls,
        "result": lambda future: future.result(),
        "stop_workers": mock.Mock(),
    }
    stack.enter_context(mock.patch.multiple(ray_workers, **here))
    return stack
