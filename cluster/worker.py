"""A teacher worker: loads the teacher once, then turns token shards into logit shards of the same number."""

from functools import cached_property
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

        if not config.cluster.gpus_per_worker:
            torch.set_num_threads(config.cluster.cpus_per_worker)
        self.config, self.k, self.labels_id = config, k, labels_id

    @cached_property
    def tokens(self) -> TokenStore:
        """The token shards."""
        return TokenStore.open(self.config.tokens.path)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, loaded with the first shard: an actor whose constructor fails dies without a reason."""
        return build_teacher(self.config, self.k, self.tokens)

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


def build_teacher(config: CacheConfig, k: int, tokens: TokenStore) -> Teacher:
    """The configured backend with its model loaded; ``k`` is the head's size, at most V."""
    folder: Path = model_folder(config.teacher.model, config.teacher.revision)
    targets = config.targets.model_copy(update={"k": k})
    vocabulary_size = int(tokens.manifest["vocabulary_size"])
    if config.teacher.backend == "vllm":
        from cluster.vllm_teacher import VllmTeacher

        return VllmTeacher(folder, config.teacher, targets, vocabulary_size, int(tokens.lengths_N.max()))
    from cluster.transformers_teacher import TransformersTeacher

    device = "cuda" if config.cluster.gpus_per_worker else "cpu"
    return TransformersTeacher(folder, config.teacher, targets, vocabulary_size, device)
