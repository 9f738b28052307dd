"""Content hashes of files and models, computed once per file."""

import hashlib
import json
import re
from pathlib import Path

from cluster.remembered import recall, remember
from logit_store.errors import TeacherError
from logit_store.identity import digest_json

WEIGHT_FILES = ("*.safetensors", "*.bin")
MODEL_FILES = [*WEIGHT_FILES, "*.py", "*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken"]


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a local file.

    A file of the Hub cache is a link to a blob that is named by its SHA-256 when it is large: that name is
    taken. Others are hashed once and remembered by path, size and modification time.
    """
    real = Path(path).resolve()
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name):
        return real.name
    stat = real.stat()
    key = digest_json([str(real), stat.st_size, stat.st_mtime_ns])
    if (known := recall("sha256", key)) is not None:
        return str(known)
    with open(real, "rb") as file:
        value = hashlib.file_digest(file, "sha256").hexdigest()
    remember("sha256", key, value)
    return value


def model_folder(model: str, revision: str | None) -> Path:
    """Local directory of a model: itself, or the snapshot of a Hub id. Raises TeacherError."""
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=MODEL_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise TeacherError(f"{model!r} is no directory and cannot be fetched from the Hub: {reason}") from error


def weights_sha256(folder: Path) -> str:
    """Identity of a model: names and hashes of its weight files, and its architecture. Raises TeacherError."""
    files = next((found for pattern in WEIGHT_FILES if (found := sorted(folder.glob(pattern)))), [])
    if not files or not (folder / "config.json").exists():
        raise TeacherError(f"{folder} is no model directory: it needs config.json and weights (*.safetensors)")
    config = json.loads((folder / "config.json").read_text())
    for provenance in ("_name_or_path", "transformers_version", "dtype", "torch_dtype"):
        config.pop(provenance, None)
    identity = {"config": config, "weights": [[f.name, file_sha256(f)] for f in files]}
    if "auto_map" in config:  # code that comes with the model
        identity["code"] = [[f.name, file_sha256(f)] for f in sorted(folder.glob("*.py"))]
    return digest_json(identity)
