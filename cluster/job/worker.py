"""A teacher worker: loads the teacher once, then turns token shards into logit shards of the same number."""

import os
import socket
import threading
import time
from typing import TYPE_CHECKING, Any

from cluster.config import CacheConfig
from cluster.hashing import model_folder, weights_sha256
from cluster.job.phases import Phases
from cluster.job.schedule import Task
from logit_store import LogitRow, Storage, Targets, TokenRow, TokenStore, writer
from logit_store.errors import StoreError, TeacherError
from logit_store.identity import require_equal

if TYPE_CHECKING:
    from cluster.teachers.teacher import Teacher


class TeacherWorker:
    """Scores shards and writes them to storage itself: labels never pass through the driver.

    Two tasks run at a time, in threads: one has the teacher while the other reads its tokens, or encodes and writes.
    """

    def __init__(self, config: CacheConfig, header: dict[str, Any]) -> None:
        self.config, self.header = config, header
        self._has_teacher = threading.Lock()
        self._idle_since = time.perf_counter()

    def arrive(self) -> None:
        """Nothing: who can answer has been given a place."""

    def start(self) -> dict[str, Any]:
        """Load the teacher; say where. Not the constructor's work: an actor that fails there has no last words."""
        self.tokens = TokenStore.open(self.config.tokens.path)
        self._check_origin()
        self.teacher = self.load_teacher()
        self._idle_since = time.perf_counter()
        return {"host": socket.gethostname(), "pid": os.getpid()}

    def _check_origin(self) -> None:
        """Refuse tokens and weights on this node that are not those of the job. Raises IdentityError, TeacherError."""
        host, wanted = socket.gethostname(), self.header["labels"]["teacher"]
        there = {"text_id": self.tokens.manifest["text_id"]}
        require_equal(there, {"text_id": self.header["text_id"]}, self.config.tokens.path, f"So it is seen on {host}")
        found = weights_sha256(model_folder(self.config.teacher.model, self.config.teacher.revision))
        if found != wanted:
            raise TeacherError(
                f"{self.config.teacher.model} has weights {found[:12]}… on {host}, and {wanted[:12]}… where the job "
                "was begun: give all nodes the same files, or a Hub id with teacher.revision"
            )

    def load_teacher(self) -> "Teacher":
        """The configured teacher."""
        import torch

        from cluster.teachers.targets import Selector
        from cluster.teachers.teacher import build_teacher

        if not self.config.cluster.gpus_per_worker:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray does not hide GPUs; torch looks at them on first use
            torch.set_num_threads(self.config.cluster.cpus_per_worker)
        selector = Selector(self.config.targets, self.header["vocabulary_size"], self.header["labels_id"])
        longest, on_gpu = int(self.tokens.lengths_N.max()), self.config.cluster.gpus_per_worker > 0
        executor = "ray" if self.config.cluster.multi_node_workers else "mp"
        return build_teacher(self.config.teacher, selector, longest, on_gpu, executor)

    def work(self, task: Task) -> dict[str, Any]:
        """Score a shard and commit it, or try a part of it and write nothing; what that came to, in figures."""
        numbers, left_out = self.tokens.shard_rows(task.shard), dict(task.left_out)
        rows = {i: self.tokens[numbers[i]] for i in task.probe or range(len(numbers))}
        scorable = {i: row for i, row in rows.items() if i not in left_out and len(row.input_ids_T) > 1}
        targets, seconds, oom_splits = self._score(task, numbers, scorable)
        phases = Phases()
        with phases.measure("encode"):
            prepared = self._prepare(task, rows, targets)
        if task.probe is not None:
            return {"seconds": seconds | phases.take(), "oom_splits": oom_splits}
        with phases.measure("write"):
            record = writer.commit(Storage(self.config.store.path), task.shard, prepared)
        seconds |= phases.take()
        figures = {name: record[name] for name in ("rows", "tokens", "positions", "bytes")}
        return {**figures, "left_out": len(left_out), "seconds": seconds, "oom_splits": oom_splits}

    def stop(self) -> None:
        """Let go of the teacher, and of processes that it has started."""
        if hasattr(self, "teacher"):
            self.teacher.close()

    def _score(
        self, task: Task, numbers: range, rows: dict[int, TokenRow]
    ) -> tuple[dict[int, Targets], dict[str, float], int]:
        """Targets of rows that have positions; seconds by phase; how often a batch was split for want of memory."""
        with self._has_teacher:
            waited = time.perf_counter() - self._idle_since
            self.teacher.batch_tokens = max(1, self.config.teacher.batch_tokens >> task.halvings)
            splits = self.teacher.oom_splits
            scored = self.teacher.score([row.input_ids_T for row in rows.values()], [numbers[i] for i in rows])
            seconds = {**self.teacher.phases.take(), "wait": waited}
            self._idle_since = time.perf_counter()
            return dict(zip(rows, scored, strict=True)), seconds, self.teacher.oom_splits - splits

    def _prepare(self, task: Task, rows: dict[int, TokenRow], targets: dict[int, Targets]) -> writer.Prepared:
        """Put labels to the rows and encode them."""
        shape = len(self.header["temperatures"]), len(self.header["forced_ids"])
        for i in rows.keys() - targets.keys():
            targets[i] = Targets.of_nothing(max(len(rows[i].input_ids_T) - 1, 0), *shape)
        labelled = [LogitRow(row, targets[i]) for i, row in rows.items()]
        try:
            return writer.prepare_logits(labelled, self.header, dict(task.left_out))
        except StoreError as error:  # about these labels, and no others
            raise TeacherError(f"labels of shard {task.shard} cannot be stored: {error}") from error
