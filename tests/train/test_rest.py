"""The GPU kernels of the loss, run by Triton's interpreter, beside the torch reference in float64.

Triton decides when it is imported whether kernels are interpreted, so that they are in a process of their own.
"""

import itertools
import os
import subprocess
import sys
import warnings

import torch

from tests.toy import ROOT


def test_the_kernels_are_the_reference() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.test_rest"],
        env={**os.environ, "TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "24 cases\n"


def check_all() -> int:
    """Compare widths within a block, of several and of a part of one, with and without temperatures; how many cases."""
    from training.losses import rest_triton

    rest_triton.BLOCK = 128
    warnings.filterwarnings("ignore", message="invalid value encountered")  # numpy's of 0 · −inf, which is left out
    temperatures = [(None, False), (2.0, False), (2.5, True)]
    cases = list(itertools.product([1, 7, 300, 515], temperatures, [torch.float32, torch.bfloat16]))
    for width, (temperature, learned), dtype in cases:
        check(width, temperature, learned, dtype)
    return len(cases)


def check(width: int, temperature: float | None, learned: bool, dtype: torch.dtype, device: str = "cpu") -> None:
    """Sums and gradient of rows of which one has no logits, and one has one."""
    from training.losses.rest import TorchRest
    from training.losses.rest_triton import TritonRest

    rng = torch.Generator().manual_seed(0)
    logits_CW = torch.randn(5, width, generator=rng) * 20
    logits_CW[torch.rand(5, width, generator=rng) < 0.2] = -torch.inf
    logits_CW[2], logits_CW[3, 1:] = -torch.inf, -torch.inf
    logits_CW = logits_CW.to(device)
    wanted = TorchRest(logits_CW.double(), temperature, learned)
    found = TritonRest(logits_CW, temperature, learned)
    for name in ("lse_C", "lse_at_T_C", "slope_C"):
        ours, theirs = getattr(found, name), getattr(wanted, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    by_lse_C, by_lse_at_T_C = torch.randn(2, 5, generator=rng).to(device)
    at_T = temperature is not None
    theirs = wanted.gradient(by_lse_C.double(), by_lse_at_T_C.double() if at_T else None, torch.float64)
    ours = found.gradient(by_lse_C, by_lse_at_T_C if at_T else None, dtype)
    assert ours.dtype == dtype
    assert ours.data_ptr() == logits_CW.data_ptr(), "it takes the place of the logits"
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=1e-6)


if __name__ == "__main__":
    print(check_all(), "cases")
