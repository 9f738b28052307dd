"""What a benchmark was run on: said in every line of results."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parents[2] / "docs" / "benchmarks"


def about(*packages: str) -> dict[str, str]:
    """Columns ``machine``, ``versions`` (of the packages) and ``date``."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": " ".join(f"{name} {version(name)}" for name in packages),
        "date": datetime.date.today().isoformat(),
    }


def device() -> str:
    """``cuda`` where PyTorch sees a GPU; benchmarks then take sizes that fill it."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def settled() -> None:
    """Wait for what the GPU still has to do, so that a clock may be read."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def result_path(name: str) -> Path:
    """Where a benchmark's figures go: those of GPUs beside those of CPUs."""
    return RESULTS / (f"{name}-gpu.csv" if device() == "cuda" else f"{name}.csv")


def _processor() -> str:
    if device() == "cuda":
        import torch

        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
