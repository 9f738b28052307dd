"""The demo's corpus and tokenizer: real text that every machine has, the running Python's standard library.

    python configs/demo/corpus.py runs/demo

writes ``corpus/teacher.jsonl``, ``corpus/documents.jsonl`` and ``tokenizer/``. A document is a module with its
documentation strings inside; they are no documents of their own, since a held-out module's would then be in the
training text. The teacher learns from other modules than those whose labels it computes, as teachers do.
What is there already is kept.
"""

import hashlib
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

VOCABULARY_SIZE = 2048
END = "<|endoftext|>"
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "__pycache__"}
TEACHER_CHARACTERS = 6_000_000
STUDENT_CHARACTERS = 2_200_000


def documents() -> Iterator[dict[str, str]]:
    """The standard library's modules, shuffled by the hash of their names.

    Not by the hash of their text: that decides the held-out split, and would put it into the first shard.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    names = [path.relative_to(root) for path in root.rglob("*.py")]
    chosen = [str(name) for name in names if LEFT_OUT.isdisjoint(name.parts)]
    for name in sorted(chosen, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        if text := _read(root / name):
            yield {"name": name, "text": text}


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


def write_documents(source: Iterator[dict[str, str]], path: Path, num_characters: int) -> None:
    """Write documents of about so many characters as JSON lines; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        while num_characters > 0 and (document := next(source, None)):
            file.write(json.dumps(document) + "\n")
            num_characters -= len(document["text"])
    temporary.replace(path)


def main(root: Path) -> None:
    """Make what is missing below ``root``."""
    students, teacher = root / "corpus" / "documents.jsonl", root / "corpus" / "teacher.jsonl"
    if not (students.exists() and teacher.exists()):
        source = documents()
        write_documents(source, students, STUDENT_CHARACTERS)
        write_documents(source, teacher, TEACHER_CHARACTERS)
    folder = root / "tokenizer"
    if not (folder / "tokenizer.json").exists():
        lines = [line for path in (students, teacher) for line in path.read_text(encoding="utf-8").splitlines()]
        train_tokenizer([json.loads(line)["text"] for line in lines], folder)
    for path in (students, teacher, folder / "tokenizer.json"):
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
