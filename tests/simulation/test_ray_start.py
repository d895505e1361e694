"""Ray that does not start."""

from typing import Any

import pytest
import ray

from meadow.runtime.errors import RunStopped
from meadow.simulation.ray_start import start_ray


def test_it_is_started_again_where_its_processes_miss_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    tries = []

    def fails(**settings: Any) -> None:
        tries.append(settings["num_cpus"])
        raise RuntimeError("Failed to start GCS.")

    monkeypatch.setattr(ray, "init", fails)
    with pytest.raises(RunStopped, match=r"Failed to start GCS\."):
        start_ray(3, 1)
    assert tries == [3, 3, 3]
