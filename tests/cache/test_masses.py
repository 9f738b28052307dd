"""The kernels that choose targets on a GPU, run by Triton's interpreter, beside torch on the same logits.

Triton decides when it is imported whether kernels are interpreted, so that they are in a process of their own.
"""

import os
import subprocess
import sys
from typing import Any
from unittest import mock

import numpy as np
import torch

from tests.toy import ROOT

V, W = 500, 515
KINDS: list[dict[str, Any]] = [
    {"k": 16, "always": [3, 7]},
    {"kind": "top_p", "p": 0.9, "k": 32, "temperatures": [0.5, 2.0]},
    {"kind": "threshold", "tau": 0.02},
    {"kind": "threshold", "tau": 0.02, "temperatures": [2.0], "always": [3]},
    {"kind": "counts", "draws": 8},
]


def test_the_kernels_are_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.cache.test_masses"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "10 cases\n"


def check_all() -> int:
    """Every kind, from float32 and bfloat16 logits with ties, −inf, offsets and certainties; how many cases."""
    from cluster.teachers import masses_triton, targets

    masses_triton.BLOCK, masses_triton.GROUP = 256, 128
    logits_NW = torch.randn(7, W, generator=torch.Generator().manual_seed(0)) * 4
    logits_NW[3:, 100:200] = -torch.inf
    logits_NW[4, 1:V] = -torch.inf  # all but one, and the rows beyond V
    logits_NW[5] -= 1000
    logits_NW[6, 40] += 200
    for dtype in (torch.float32, torch.bfloat16):
        for kind in KINDS:
            wanted = select(kind, logits_NW.to(dtype))
            with mock.patch.object(targets, "masses_of", masses_triton.TritonMasses):
                found = select(kind, logits_NW.to(dtype))
            assert_same(found, wanted)
    return 2 * len(KINDS)


def select(kind: dict[str, Any], logits_NW: torch.Tensor) -> Any:
    """Targets of positions that are followed by token 1, 2, …"""
    from cluster.config import TargetsConfig
    from cluster.teachers.targets import Selector

    n = torch.arange(len(logits_NW), device=logits_NW.device)
    return Selector(TargetsConfig(**kind), V, "labels").select(logits_NW, n + 1, n // 7, n % 7)


def assert_same(found: Any, wanted: Any) -> None:
    """The same ids, and numbers but for rounding."""
    for name, ours, theirs in zip(type(found)._fields, found, wanted, strict=True):
        if np.issubdtype(theirs.dtype, np.integer):
            np.testing.assert_array_equal(ours, theirs, err_msg=name)
        else:
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)


if __name__ == "__main__":
    print(check_all(), "cases")
