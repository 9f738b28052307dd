"""The same job on a running cluster: the `ray job submit` line, and what a submitted job may not do."""

import json
import shlex
from pathlib import Path

from cluster.config import CacheConfig
from cluster.ray_cluster import in_submitted_job
from logit_store.errors import ConfigError


def submit_line(verb: str, config_path: str, overrides: list[str], config: CacheConfig) -> str:
    """The `ray job submit` command that does the same on a running cluster, with every path absolute."""
    absolute = {
        "tokens.path": config.tokens.path,
        "tokens.tokenizer": config.tokens.tokenizer,
        "teacher.model": config.teacher.model,
        "store.path": config.store.path,
    }
    changed = [f"{key}={Path(value).absolute()}" for key, value in absolute.items() if _is_relative_local(key, value)]
    files = config.tokens.source.files
    if verb == "tokenize" and config.tokens.source.dataset is None and any("://" not in f for f in files):
        changed.append(
            f"tokens.source.files={json.dumps([f if '://' in f else str(Path(f).absolute()) for f in files])}"
        )
    kept = [o for o in overrides if o.split("=")[0] not in {c.split("=")[0] for c in changed}]
    return f"ray job submit --working-dir . -- python -m cluster {shlex.join([verb, config_path, *kept, *changed])}"


def check_job_paths(config: CacheConfig, verb: str) -> None:
    """In a submitted job, refuse a relative output path: it would be written into Ray's own folder and lost.

    Raises ConfigError.
    """
    key, path = ("store.path", config.store.path) if verb == "cache" else ("tokens.path", config.tokens.path)
    if in_submitted_job() and "://" not in path and not Path(path).is_absolute():
        raise ConfigError(
            f"{key}={path} is relative, and a job runs in a copy of the working directory that is thrown away: "
            f"give an absolute path or a URL ({key}=/shared/{path})"
        )


def _is_relative_local(key: str, value: str) -> bool:
    is_input = key in ("tokens.tokenizer", "teacher.model")  # may be a Hub id: relative only if it is there
    return "://" not in value and not Path(value).is_absolute() and (not is_input or Path(value).exists())
