"""What a backend offers, and the one that a config asks for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from cluster.config import TeacherConfig
from cluster.hashing import model_folder
from cluster.job.phases import Phases
from cluster.teachers.targets import Selector
from logit_store import Targets
from logit_store.errors import TeacherError


class Teacher(Protocol):
    """A loaded model that scores rows."""

    phases: Phases
    """Seconds spent in ``forward`` and ``targets``."""
    batch_tokens: int
    """Tokens of a batch, at most (or one row)."""
    oom_splits: int
    """How often a batch was split because memory did not suffice."""

    def score(self, rows: Sequence[np.ndarray], numbers: Sequence[int]) -> list[Targets]:
        """Targets of each row of at least two token ids; ``numbers`` are the rows' numbers in the store, by which
        draws are made.
        """

    def close(self) -> None:
        """End what the teacher has started."""


def build_teacher(
    teacher: TeacherConfig, selector: Selector, longest: int, on_gpu: bool, executor: str = "mp"
) -> Teacher:
    """The configured backend with its model loaded; ``longest`` is the number of tokens of the longest row.

    ``executor`` starts vLLM's processes where a model has several GPUs: ``mp`` on one node, ``ray`` in the actor's
    placement group. Raises ConfigError, TeacherError.
    """
    if on_gpu and not torch.cuda.is_available():
        raise TeacherError(
            "the config demands a GPU (cluster.gpus_per_worker), but PyTorch sees none here: install a build of torch "
            "for this machine's driver, or set cluster.gpus_per_worker=0"
        )
    folder: Path = model_folder(teacher.model, teacher.revision)
    if teacher.backend == "vllm":
        from cluster.teachers.vllm_teacher import VllmTeacher

        return VllmTeacher(folder, teacher, selector, longest, executor)
    from cluster.teachers.transformers_teacher import TransformersTeacher

    return TransformersTeacher(folder, teacher, selector, "cuda" if on_gpu else "cpu")
