"""A teacher worker: loads the teacher once, then turns token shards into logit shards of the same number."""

from functools import cached_property
from typing import Any

import numpy as np

from cluster.config import CacheConfig
from cluster.targets import Selector
from cluster.teacher import Teacher, build_teacher
from logit_store import LogitRow, Storage, Targets, TokenStore, writer


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
        selector = Selector(self.config.targets, self.header["vocabulary_size"], self.header["labels_id"])
        longest, on_gpu = int(self.tokens.lengths_N.max()), self.config.cluster.gpus_per_worker > 0
        return build_teacher(self.config.teacher, selector, longest, on_gpu)

    def score_shard(self, shard: int) -> dict[str, Any]:
        """Score and commit one shard; its commit record."""
        numbers = self.tokens.shard_rows(shard)
        rows = [self.tokens[row] for row in numbers]
        scorable = [(row.input_ids_T, i) for row, i in zip(rows, numbers, strict=True) if len(row.input_ids_T) > 1]
        scored = iter(self.teacher.score([ids for ids, _ in scorable], [i for _, i in scorable]))
        empty = empty_targets(len(self.config.targets.temperatures))
        labelled = [LogitRow(row, next(scored) if len(row.input_ids_T) > 1 else empty) for row in rows]
        return writer.commit_logits(Storage(self.config.store.path), shard, labelled, self.header)


def empty_targets(num_temperatures: int) -> Targets:
    """Targets of a row of one token, which has no position."""
    matrix, vector = np.zeros((0, 0), np.float32), np.zeros(0, np.float32)
    return Targets.of_heads(matrix, matrix, vector, vector, np.zeros((0, num_temperatures), np.float32))
