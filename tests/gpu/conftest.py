"""What only a GPU can show: `make test-gpu`. Elsewhere, and among other tests, nothing here is collected."""

from typing import Any

import pytest

from training.engine import on_gpus

collect_ignore_glob = [] if on_gpus() else ["test_*.py"]


@pytest.fixture(scope="session")
def store(cache_config: dict[str, Any]) -> Any:
    """The shared logit store, made in this process: machines with a GPU at hand need no Ray for these tests."""
    from logit_store import LogitStore
    from tests.toy import make_here

    make_here(cache_config)
    return LogitStore.open(cache_config["store"]["path"])
