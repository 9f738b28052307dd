"""`make demo`: the whole job on one machine, by the commands that a user types. Each is printed before it runs.

What is there already is kept, so that running it again is quick; `rm -r runs/demo` starts afresh.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path("runs/demo")
DECANT = str(Path(sys.executable).parent / "decant")
STUDENTS = ("small", "medium", "large")
CACHE = "configs/demo/cache.yaml"
TEACHER_TEXT = [f"tokens.path={ROOT}/teacher-tokens", f"tokens.source.files=[{ROOT}/corpus/teacher.jsonl]"]


def main() -> None:
    """Run every phase and print how long each took."""
    seconds: dict[str, float] = {}

    def phase(name: str, work: Callable[[], None]) -> None:
        print(f"\n== {name}", flush=True)
        started = time.monotonic()
        work()
        seconds[name] = time.monotonic() - started

    phase("corpus and tokenizer", lambda: run(sys.executable, "configs/demo/corpus.py", str(ROOT)))
    phase("tokenize the teacher's text", lambda: run("decant", "tokenize", CACHE, *TEACHER_TEXT))
    phase("train the teacher", lambda: run("decant", "train", "configs/demo/teacher.yaml"))
    phase("tokenize the students' text", lambda: run("decant", "tokenize", CACHE))
    phase("cache the teacher's labels", lambda: run("decant", "cache", CACHE))
    for size in STUDENTS:
        phase(f"train the {size} student and its twin", lambda size=size: train_pair(size))  # type: ignore[misc]
    runs = [str(ROOT / "students" / name) for size in STUDENTS for name in (size, f"{size}-ce")]
    phase("report", lambda: run("decant", "report", *runs, "--out", str(ROOT / "report")))
    seconds["in all"] = sum(seconds.values())
    print("\nseconds of each phase:")
    for name, value in seconds.items():
        print(f"  {value:6.1f}  {name}")
    write_summary(seconds)
    print(f"open {ROOT.absolute()}/report/report.html")


def write_summary(seconds: dict[str, float]) -> None:
    """Write `runs/demo/summary.md`: the table and the seconds with hardware, versions and date."""
    names = ("torch", "transformers", "ray", "deepspeed", "pyarrow")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names)
    store = json.loads(subprocess.check_output([DECANT, "inspect", str(ROOT / "store"), "--json"]))
    shown = ("shards", "rows", "positions", "k", "bytes", "bytes_per_position", "kept_mass")
    figures = [f"{store[key]:,.4g}" if isinstance(store[key], float) else f"{store[key]:,}" for key in shown]
    lines = [
        "# A run of `make demo`\n",
        f"{datetime.date.today()}, {os.cpu_count()} cores of {processor()}, Python {platform.python_version()}, "
        f"{versions}. Written by `configs/demo/run.py`.\n",
        (ROOT / "report" / "table.md").read_text(),
        "| store | |\n| --- | --- |",
        *(f"| {key} | {figure} |" for key, figure in zip(shown, figures, strict=True)),
        "\n| phase | seconds |\n| --- | --- |",
        *(f"| {name} | {value:.0f} |" for name, value in seconds.items()),
    ]
    (ROOT / "summary.md").write_text("\n".join(lines) + "\n")


def processor() -> str:
    """The processor's name as Linux tells it, or what Python knows."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())


def run(*command: str) -> None:
    """Run a command to its end; stop the demo where it fails."""
    wait([start(*command)])


def train_pair(size: str) -> None:
    """A student and its twin: the same model on the same batches with plain cross-entropy.

    Side by side, each on half of the cores: models this small do not gain from more threads.
    """
    config = f"configs/demo/student-{size}.yaml"
    twin = ["loss.alpha=0", f"run.path={ROOT}/students/{size}-ce"]
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    student = start("decant", "train", config, OMP_NUM_THREADS=threads)
    # One progress bar is enough for a terminal: rich takes TTY_COMPATIBLE=0 for none.
    wait([student, start("decant", "train", config, *twin, OMP_NUM_THREADS=threads, TTY_COMPATIBLE="0")])


def start(*command: str, **variables: str) -> "subprocess.Popen[bytes]":
    """Print and start a command; `decant` is the one beside this interpreter."""
    shown = ["python" if word == sys.executable else word for word in command]
    print("$", " ".join(shown), flush=True)
    program = DECANT if command[0] == "decant" else command[0]
    return subprocess.Popen([program, *command[1:]], env={**os.environ, **variables})


def wait(processes: "list[subprocess.Popen[bytes]]") -> None:
    """Wait for all; exit with the code of the first that failed."""
    codes = [process.wait() for process in processes]
    for code in codes:
        if code:
            sys.exit(code)


if __name__ == "__main__":
    os.chdir(Path(__file__).parents[2])
    main()
