"""A teacher worker: loads the teacher once, then turns token shards into logit shards of the same number."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.config import CacheConfig
from cluster.hashing import model_folder
from logit_store import LogitRow, Storage, Targets, TokenStore, writer


class Teacher(Protocol):
    """What a backend offers."""

    def score(self, rows: list[np.ndarray]) -> list[Targets]:
        """Targets of each row; every row has at least two tokens."""


class TeacherWorker:
    """Scores shards and writes them to storage itself: labels never pass through the driver."""

    def __init__(self, config: CacheConfig, k: int, labels_id: str) -> None:
        import torch

        if not torch.cuda.is_available():
            torch.set_num_threads(config.cluster.cpus_per_worker)
        self.config, self.k, self.labels_id = config, k, labels_id
        self.tokens = TokenStore.open(config.tokens.path)
        self.teacher = build_teacher(config, k, self.tokens.manifest)

    def score_shard(self, shard: int) -> dict[str, Any]:
        """Score and commit one shard; its commit record."""
        rows = [self.tokens[row] for row in self.tokens.shard_rows(shard)]
        scored = iter(self.teacher.score([row.input_ids_T for row in rows if len(row.input_ids_T) > 1]))
        empty = empty_targets(self.k, len(self.config.targets.temperatures))
        labelled = [LogitRow(row, next(scored) if len(row.input_ids_T) > 1 else empty) for row in rows]
        store = self.config.store
        return writer.commit_logits(Storage(store.path), shard, labelled, store.logprob_dtype, self.labels_id)


def empty_targets(k: int, num_temperatures: int) -> Targets:
    """Targets of a row of one token, which has no position."""
    matrix, vector = np.zeros((0, k), np.float32), np.zeros(0, np.float32)
    return Targets(matrix.astype(np.int32), matrix, vector, vector, np.zeros((0, num_temperatures), np.float32))


def build_teacher(config: CacheConfig, k: int, tokens_manifest: dict[str, Any]) -> Teacher:
    """The configured backend with its model loaded; ``k`` is the head's size, at most V."""
    folder: Path = model_folder(config.teacher.model, config.teacher.revision)
    targets = config.targets.model_copy(update={"k": k})
    vocabulary_size, window = tokens_manifest["vocabulary_size"], tokens_manifest["window"]
    if config.teacher.backend == "vllm":
        from cluster.vllm_teacher import VllmTeacher

        return VllmTeacher(folder, config.teacher, targets, vocabulary_size, window)
    from cluster.transformers_teacher import TransformersTeacher

    return TransformersTeacher(folder, config.teacher, targets, vocabulary_size)
