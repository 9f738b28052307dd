"""The wheel ships exactly the three packages and decant.py."""

import subprocess
import sys
import zipfile
from pathlib import Path

from tests.toy import ROOT


def test_the_wheel_ships_the_packages_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(source)], check=True)  # no build folder in the working tree
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path / "out"),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (tmp_path / "out").glob("*.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name.split("/")[0] for name in names} == {"cluster", "logit_store", "training", "decant.py"}
    tracked = subprocess.run(["git", "ls-files"], cwd=source, capture_output=True, text=True, check=True).stdout.split()
    assert names == {
        name for name in tracked if name.split("/")[0] in ("cluster", "logit_store", "training", "decant.py")
    }
