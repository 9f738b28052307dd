"""One process group for every engine that tests build in this process, as one rank."""

from collections.abc import Iterator

import pytest

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}


@pytest.fixture(scope="session")
def group_of_one() -> Iterator[None]:
    """DeepSpeed remembers the first group of a process, so that runs in it share one."""
    from unittest import mock

    from training.engine import free_port, process_group

    with mock.patch.dict("os.environ", {**ALONE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}):
        group = process_group()
        group.__enter__()
    yield
    group.__exit__(None, None, None)


@pytest.fixture(scope="module")
def one_rank(group_of_one: None) -> Iterator[None]:
    """While the tests of a file last, this process is the only rank."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ALONE.items():
            patch.setenv(name, value)
        yield
