"""Settings of the test process."""

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

from helpers.kernels import other_kernels
from meadow.runtime.seeds import one_thread

# How long an example takes says more of the machine than of the code.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-hashes", action="store_true", help="write down the bits of tests/runs/test_hashes.py")
    parser.addoption(
        "--other-kernels", action="store_true", help="round as another processor might (helpers/kernels.py)"
    )


@pytest.fixture(autouse=True)
def _rounding(request: pytest.FixtureRequest) -> Iterator[None]:
    if not request.config.getoption("--other-kernels"):
        yield
        return
    with other_kernels():
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The bits depend on the number of threads: all tests use one, as the engines do."""
    with one_thread():
        yield
