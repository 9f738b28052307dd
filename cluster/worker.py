"""A teacher worker: loads the teacher once, then turns token shards into logit shards of the same number."""

from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from cluster.config import CacheConfig, TargetsConfig, TeacherConfig
from cluster.hashing import model_folder
from logit_store import LogitRow, Storage, Targets, TokenStore, writer


class Teacher(Protocol):
    """What a backend offers."""

    def score(self, rows: list[np.ndarray]) -> list[Targets]:
        """Targets of each row; every row has at least two tokens."""


class TeacherWorker:
    """Scores shards and writes them to storage itself: labels never pass through the driver."""

    def __init__(self, config: CacheConfig, header: dict[str, Any]) -> None:
        import torch

        if not config.cluster.gpus_per_worker:
            torch.set_num_threads(config.cluster.cpus_per_worker)
        self.config, self.header = config, header

    @cached_property
    def tokens(self) -> TokenStore:
        """The token shards."""
        return TokenStore.open(self.config.tokens.path)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher, loaded with the first shard: an actor whose constructor fails dies without a reason."""
        targets = self.config.targets.model_copy(update={"k": self.header["k"]})
        longest, on_gpu = int(self.tokens.lengths_N.max()), self.config.cluster.gpus_per_worker > 0
        return build_teacher(self.config.teacher, targets, self.header["vocabulary_size"], longest, on_gpu)

    def score_shard(self, shard: int) -> dict[str, Any]:
        """Score and commit one shard; its commit record."""
        rows = [self.tokens[row] for row in self.tokens.shard_rows(shard)]
        scored = iter(self.teacher.score([row.input_ids_T for row in rows if len(row.input_ids_T) > 1]))
        empty = empty_targets(len(self.config.targets.temperatures))
        labelled = [LogitRow(row, next(scored) if len(row.input_ids_T) > 1 else empty) for row in rows]
        return writer.commit_logits(Storage(self.config.store.path), shard, labelled, self.header)


def empty_targets(num_temperatures: int) -> Targets:
    """Targets of a row of one token, which has no position."""
    matrix, vector = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    return Targets.of_heads(matrix, matrix, vector, vector, np.zeros((0, num_temperatures), np.float32))


def build_teacher(
    teacher: TeacherConfig, targets: TargetsConfig, vocabulary_size: int, longest: int, on_gpu: bool
) -> Teacher:
    """The configured backend with its model loaded; ``longest`` is the number of tokens of the longest row."""
    folder: Path = model_folder(teacher.model, teacher.revision)
    if teacher.backend == "vllm":
        from cluster.vllm_teacher import VllmTeacher

        return VllmTeacher(folder, teacher, targets, vocabulary_size, longest)
    from cluster.transformers_teacher import TransformersTeacher

    return TransformersTeacher(folder, teacher, targets, vocabulary_size, "cuda" if on_gpu else "cpu")
