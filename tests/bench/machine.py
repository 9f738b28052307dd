"""What a benchmark was run on: said in every line of results."""

import datetime
import os
import platform
from importlib.metadata import version
from pathlib import Path


def about(*packages: str) -> dict[str, str]:
    """Columns ``machine``, ``versions`` (of the packages) and ``date``."""
    return {
        "machine": f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "versions": " ".join(f"{name} {version(name)}" for name in packages),
        "date": datetime.date.today().isoformat(),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
