"""Teacher → shard on disk → reader → collate → loss, against online distillation, to what the format stores."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from training.config import LossConfig
from training.curriculum.batches import Prefix
from training.data.micro_batch import collate
from training.data.source import Source
from training.students.student import Student

V = 400


def online_loss(teacher: Any, student: Any, ids_T: np.ndarray, positions: int, temperature: float) -> torch.Tensor:
    """Dense KL of the first positions with both models alive, summed. Padded rows are no part of either."""
    ids = torch.from_numpy(ids_T[:positions].astype(np.int64))[None]
    with torch.no_grad():
        log_p = (teacher(input_ids=ids).logits[0, :, :V].double() / temperature).log_softmax(-1)
    log_q = (student(input_ids=ids).logits[0, :, :V].double() / temperature).log_softmax(-1)
    return torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="sum") * temperature**2


@pytest.mark.parametrize(("codec", "tolerance"), [("exact", 2e-6), ("lossy", 5e-3)])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_path_is_online_distillation(
    make_store: Callable[..., Any], teacher: Path, shared: Path, tmp_path: Path, codec: str, tolerance: float,
    temperature: float,
) -> None:  # fmt: skip
    from tests.toy import make_teacher

    # A teacher without padded rows: with them, their mass is tail, and online distillation has no such bucket.
    exact = shared / "teacher-exact"
    if not exact.exists():
        make_teacher(exact, shared / "tokenizer", vocab_size=V)
    store = make_store(
        f"whole-{codec}", teacher={"model": str(exact)}, targets={"k": V}, store={"codec": {"kind": codec}}
    )
    make_teacher(tmp_path / "student", shared / "tokenizer", vocab_size=V + 24, seed=1)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student", dtype=torch.float32)
    loss = LossConfig(alpha=1.0, temperature=temperature, chunk_positions=7)
    student = Student(model, V, loss, store.manifest["temperatures"])
    rows = store.rows("train")[:5]
    prefixes = [Prefix(int(row), min(int(store.lengths_N[row]) - 1, 30)) for row in rows if store.lengths_N[row] > 1]
    cached = student(collate(Source.of(store), prefixes)).loss
    reference = AutoModelForCausalLM.from_pretrained(exact, dtype=torch.float32)
    online = sum(
        (online_loss(reference, model, store[p.row].tokens.input_ids_T, p.positions, temperature) for p in prefixes),
        torch.tensor(0.0),
    )
    assert float(cached) == pytest.approx(float(online), rel=tolerance)
    for parameter, (a, b) in zip(
        model.parameters(),
        zip(
            *(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (cached, online)),
            strict=True,
        ),
        strict=True,
    ):
        assert float((a - b).norm()) <= tolerance * 10 * float(b.norm()) + 1e-7, parameter.shape


def test_a_shifted_label_is_noticed(store: Any, teacher: Path) -> None:
    """At the teacher's own weights the distance to its labels is its codec's error; one position off, it is not."""
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    student = Student(model, V, LossConfig(alpha=1.0, tail="ghost"))
    row = int(np.flatnonzero(store.lengths_N == 48)[0])
    batch = collate(Source.of(store), [Prefix(row, 47)])
    (teachers,) = batch.targets
    # Padded rows of this teacher hold mass that a student may not use, so the distance is small, not zero.
    aligned = float(student(batch).loss) / 47
    rolled = teachers.targets._replace(
        **{name: getattr(teachers.targets, name).roll(1, 0) for name in ("head_ids_NK", "head_logprobs_NK")}
    )
    shifted = float(student(batch._replace(targets=(teachers._replace(targets=rolled),))).loss) / 47
    assert aligned < 0.1
    assert shifted > 10 * aligned
