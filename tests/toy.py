"""What tests build their small real inputs with."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

ROOT = Path(__file__).parents[1]
DECANT = str(Path(sys.executable).parent / "decant")
WINDOW = 48
END = "<|endoftext|>"


def run_decant(*arguments: str, check: bool = True, **options: Any) -> "subprocess.CompletedProcess[str]":
    """Run `decant …` as a user does, from the project's root."""
    done = subprocess.run(
        [DECANT, *arguments], cwd=options.pop("cwd", ROOT), capture_output=True, text=True, timeout=600, **options
    )
    assert not check or done.returncode == 0, f"decant {arguments}\n{done.stdout}\n{done.stderr}"
    return done


def write_yaml(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(config))
    return path


def shard_bytes(folder: str | Path) -> dict[str, bytes]:
    """A store's shards and their commit records by name; not its header, which says who made it, and where."""
    return {path.name: path.read_bytes() for path in (Path(folder) / "shards").iterdir()}


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


def in_process_workers() -> Any:
    """Within the block, `cache` scores its shards in this process instead of in actors."""
    from cluster import ray_cluster

    @contextmanager
    def session(_config: Any) -> Iterator[None]:
        yield

    def map_workers(_config: Any, worker: Any, arguments: Any, method: str, items: Any) -> Iterator[Any]:
        instance = worker(*arguments)
        yield from (getattr(instance, method)(item) for item in items)

    return mock.patch.multiple(ray_cluster, session=session, check_room=mock.Mock(), map_workers=map_workers)
