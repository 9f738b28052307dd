"""A tokenizer as identity: its id→token map, its vocabulary size, its files. Works on any transformers tokenizer."""

import json
import tempfile
from pathlib import Path
from typing import Any

from logit_store.identity import digest_json


def vocabulary_size(tokenizer: Any) -> int:
    """V: the highest token id plus one, added tokens included."""
    return max(tokenizer.get_vocab().values()) + 1


def describe_tokenizer(tokenizer: Any) -> dict[str, Any]:
    """Hashes of the vocabulary map and of each further part, in a form that padding and truncation do not change."""
    parts: dict[str, Any] = {"special_tokens": {k: str(v) for k, v in sorted(tokenizer.special_tokens_map.items())}}
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        canonical = json.loads(tokenizer.backend_tokenizer.to_str())
        model = canonical["model"]
        parts |= {
            "merges": model.get("merges"),
            "scores": model["vocab"] if isinstance(model.get("vocab"), list) else None,  # of Unigram models
            "model": {k: v for k, v in model.items() if k not in ("vocab", "merges")},
            **{part: canonical.get(part) for part in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens")},
        }
    return {
        "vocabulary_sha256": digest_json(sorted(tokenizer.get_vocab().items())),
        "parts_sha256": {part: digest_json(value) for part, value in parts.items()},
    }


def tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """The files that load this tokenizer again, as a store keeps them: name → bytes."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in Path(folder).iterdir() if path.is_file())
        return {f"tokenizer/{path.name}": path.read_bytes() for path in files}
