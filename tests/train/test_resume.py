"""A run that is stopped anywhere goes on as if it had not been."""

from pathlib import Path
from typing import Any

from tests.students import assert_same_when_stopped_after_every_step, student_config


def test_stopped_after_every_step_is_the_same_run(store: Any, one_rank: None, tmp_path: Path) -> None:
    assert_same_when_stopped_after_every_step(student_config(tmp_path, store.storage.root), tmp_path)
