"""The demo's corpus and tokenizer: real text that every machine has, the running Python's standard library.

    python configs/demo/corpus.py runs/demo

writes ``corpus/documents.jsonl`` (one module per line, its documentation strings inside; they are not
documents of their own, since a held-out module's would then be in the training text) and ``tokenizer/``.
What is there already is kept.
"""

import hashlib
import json
import sys
import sysconfig
from pathlib import Path

VOCABULARY_SIZE = 2048
END = "<|endoftext|>"
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
MAX_BYTES = 9_000_000


def documents() -> list[dict[str, str]]:
    """The standard library's modules, shuffled by the hash of their names, at most ``MAX_BYTES`` of them.

    Not by the hash of their text: that decides the held-out split, and would put it into the first shard.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in root.rglob("*.py"):
        name = path.relative_to(root)
        if LEFT_OUT.isdisjoint(name.parts) and (text := _read(path)):
            found.append((hashlib.sha256(str(name).encode()).hexdigest(), {"name": str(name), "text": text}))
    chosen: list[dict[str, str]] = []
    size = 0
    for _, document in sorted(found, key=lambda pair: pair[0]):
        size += len(document["text"])
        if size > MAX_BYTES:
            break
        chosen.append(document)
    return chosen


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # a few modules of encoding tests are not text
        return ""


def train_tokenizer(texts: list[str], folder: Path) -> None:
    """Train a byte-level BPE tokenizer and save it as a transformers directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END).save_pretrained(folder)


def main(root: Path) -> None:
    """Make what is missing below ``root``."""
    corpus = root / "corpus" / "documents.jsonl"
    if not corpus.exists():
        corpus.parent.mkdir(parents=True, exist_ok=True)
        temporary = corpus.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(document) + "\n" for document in documents()), encoding="utf-8")
        temporary.replace(corpus)
    folder = root / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
        train_tokenizer(texts, folder)
    print(f"corpus {corpus} ({corpus.stat().st_size / 1e6:.1f} MB), tokenizer {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
