"""Small facts about files that are dear to find out, kept in the user's cache folder under a key that says it all."""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def folder(kind: str) -> Path:
    """Where facts of this kind are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "decant" / kind


def recall(kind: str, key: str) -> Any:
    """What was remembered under the key, or None."""
    try:
        return json.loads((folder(kind) / key).read_text())
    except (OSError, ValueError):  # nothing there, or what a crash left
        return None


def remember(kind: str, key: str, value: Any) -> None:
    """Keep a JSON value, whole or not at all; the key must change with everything that the value depends on.

    Where the folder cannot be written (containers may have no home), nothing is kept, and found out again next time.
    """
    path = folder(kind) / key
    temporary = path.with_suffix(f".{os.getpid()}")
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(value))
        temporary.replace(path)
