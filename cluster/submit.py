"""The same job on a running cluster: the `ray job submit` line, and what a submitted job may not do."""

import json
import shlex
from pathlib import Path

from cluster.config import CacheConfig
from cluster.ray_cluster import in_submitted_job
from logit_store.errors import ConfigError


def submit_line(verb: str, config_path: str, overrides: list[str], config: CacheConfig) -> str:
    """The `ray job submit` command that does the same on a running cluster, with every path absolute."""
    paths = _local_paths(config).items()
    changed = [f"{key}={Path(path).absolute()}" for key, path in paths if not Path(path).is_absolute()]
    files = config.tokens.source.files
    if verb == "tokenize" and config.tokens.source.dataset is None and any("://" not in f for f in files):
        changed.append(
            f"tokens.source.files={json.dumps([f if '://' in f else str(Path(f).absolute()) for f in files])}"
        )
    replaced = {c.split("=")[0] for c in changed} | {"cluster.address"}  # a job has the cluster that it runs on
    kept = [o for o in overrides if o.split("=")[0] not in replaced]
    return f"ray job submit --working-dir . -- python -m cluster {shlex.join([verb, config_path, *kept, *changed])}"


def check_paths(config: CacheConfig, verb: str) -> None:
    """Refuse a relative path that would mean another place where it is used. Raises ConfigError.

    A submitted job runs in a copy of the working directory that is thrown away, so its output would be lost; workers
    of a joined cluster run in folders of their own.
    """
    output = "store.path" if verb == "cache" else "tokens.path"
    for key, path in _local_paths(config).items():
        if Path(path).is_absolute():
            continue
        if in_submitted_job() and key == output:
            reason = "a job runs in a copy of the working directory that is thrown away"
        elif config.cluster.address is not None and not in_submitted_job():
            reason = "workers of a joined cluster run in other folders"
        else:
            continue
        raise ConfigError(
            f"{key}={path} is relative, and {reason}: give an absolute path or a URL, as in {key}=/shared/{path}"
        )


def _local_paths(config: CacheConfig) -> dict[str, str]:
    """Paths of the config that are no URL and no Hub id, by key."""
    outputs = {"tokens.path": config.tokens.path, "store.path": config.store.path}
    inputs = {"tokens.tokenizer": config.tokens.tokenizer, "teacher.model": config.teacher.model}
    if config.tokens.chat_template is not None:
        inputs["tokens.chat_template"] = config.tokens.chat_template
    local = outputs | {key: value for key, value in inputs.items() if Path(value).exists()}
    return {key: value for key, value in local.items() if "://" not in value}
