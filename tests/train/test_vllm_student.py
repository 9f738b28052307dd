"""A finished student is a model that vLLM loads: as the next teacher, by the code that scores with one."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from tests.students import run_here
from tests.toy import ROOT

SCORE = """
import sys
import numpy as np
from cluster.config import TargetsConfig, TeacherConfig
from cluster.teachers.targets import Selector
from cluster.teachers.teacher import build_teacher

if __name__ == "__main__":
    config = TeacherConfig(model=sys.argv[1], backend="vllm", dtype="float32", batch_tokens=64)
    teacher = build_teacher(config, Selector(TargetsConfig(k=4), 400, "labels"), 48, on_gpu=False)
    (targets,) = teacher.score([np.load(sys.argv[2])], [0])
    np.savez(sys.argv[3], next=targets.next_logprob_P, top=targets.padded_heads(4)[1])
    teacher.close()
"""


def test_vllm_scores_with_a_student_that_began_with_a_teachers_layers(
    store: Any, teacher: Path, tmp_path: Path, one_rank: None
) -> None:
    student = {"from_teacher": {"model": str(teacher), "layers": [1]}, "lora": {"rank": 2}}
    run_here(
        {
            "run": {"path": str(tmp_path / "run")},
            "data": {"store": store.storage.root},
            "student": student,
            "schedule": {"total_tokens": 400, "tokens_per_step": 200, "lr": 0.01},
            "evaluation": {"max_rows": 2},
        }
    )
    folder = tmp_path / "run/model"
    row = store.tokens(int(store.rows("train")[0])).input_ids_T
    np.save(tmp_path / "row.npy", row)
    with tempfile.TemporaryDirectory(prefix="vllm", dir="/tmp") as sockets:
        done = subprocess.run(
            [sys.executable, "-c", SCORE, str(folder), str(tmp_path / "row.npy"), str(tmp_path / "scored.npz")],
            cwd=ROOT, env={**os.environ, "VLLM_RPC_BASE_PATH": sockets}, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs_PV = model(input_ids=torch.from_numpy(row.astype(np.int64))[None]).logits[0, :-1].log_softmax(-1)
    scored = np.load(tmp_path / "scored.npz")
    next_P = logprobs_PV.gather(-1, torch.from_numpy(row[1:].astype(np.int64))[:, None])[:, 0]
    np.testing.assert_allclose(scored["next"], next_P, atol=2e-5)
    top_P4 = logprobs_PV[:, :400].topk(4).values
    np.testing.assert_allclose(-np.sort(-scored["top"], axis=1), top_P4, atol=2e-5)
