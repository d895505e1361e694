"""Settings of the test process."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from meadow.runtime.seeds import one_thread

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The bits depend on the number of threads: all tests use one, as the engines do."""
    with one_thread():
        yield
