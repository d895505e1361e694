"""Two Ray nodes on this machine stand in for two machines: a run joins them, and goes on when one of them is lost."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
from ray.cluster_utils import Cluster

from helpers.faulty import CLIENT
from helpers.runs import run_inline, small
from meadow.runtime.errors import UserError
from meadow.simulation.launch import _run_local, engine
from meadow.simulation.ray_engine import ray_grid, ray_workers

SAME = ("model_sha256", "personal_sha256", "split_sha256", "metrics")


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    AuthenticationTokenLoader.instance().reset_cache()
    found: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    found.second = found.add_node(num_cpus=1)
    yield found
    ray.shutdown()
    found.shutdown()


@pytest.mark.slow
def test_a_run_joins_a_cluster_and_goes_on_without_a_lost_machine(cluster: Any, tmp_path: Path) -> None:
    with ray_workers(4, 1, cluster.address) as pool:
        homes: list[str] = ray.get(
            [a.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id()) for a in pool.actors]
        )
        assert len(set(homes)) == 2
    experiment = small("fedper", f"engine.address={cluster.address}", "run.rounds=5")
    with engine("ray", 2, address=cluster.address) as launch:
        whole = launch(experiment, tmp_path / "whole")
        cluster.remove_node(cluster.second)
        after = launch(experiment, tmp_path / "after")
    expected = run_inline(experiment, tmp_path / "inline")
    for found, folder in ((whole, "whole"), (after, "after")):
        assert found["status"] == "done" and [found[key] for key in SAME] == [expected[key] for key in SAME]
        records = [json.loads(line) for line in (tmp_path / folder / "rounds.jsonl").read_text().splitlines()]
        assert [r["failed"] for r in records] == [[]] * 5


@pytest.mark.slow
def test_a_client_that_ends_its_process_or_hangs_costs_itself_only(
    cluster: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
    address, out = f"engine.address={cluster.address}", tmp_path / "run"
    experiment = small("fedavg", "strategy.name=helpers.faulty:MANY", address, "cohort.timeout=20")
    with engine("ray", 2, address=cluster.address) as launch:
        summary = launch(experiment, out)
    records = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    failed = [[each["client"] for each in record["failed"]] for record in records]
    assert failed == [[], [CLIENT, CLIENT + 1, CLIENT + 2], []] and summary["status"] == "done"


@pytest.mark.slow
def test_the_data_is_held_once_a_machine(cluster: Any, tmp_path: Path) -> None:
    """All workers of a machine have the pieces of one process: of the command on its own, of the first worker elsewhere."""

    def pieces(worker: Any) -> tuple[str, int, set[str]]:
        from meadow.arrays import memory

        found = {piece.path.split("/")[2] for piece in memory._shared.values()}
        return ray.get_runtime_context().get_node_id(), os.getpid(), found

    experiment = small("fedavg", f"engine.address={cluster.address}")
    with ray_workers(4, 1, cluster.address) as pool:
        run = _run_local(ray_grid(experiment, tmp_path / "state", pool), experiment, tmp_path / "run", False)
        here = ray.get_runtime_context().get_node_id()
        workers: list[tuple[str, int, set[str]]] = ray.get([actor.__ray_call__.remote(pieces) for actor in pool.actors])
    elsewhere = [pid for home, pid, _ in workers if home != here]
    assert len(elsewhere) == 2
    assert all(found == {str(os.getpid() if home == here else elsewhere[0])} for home, _, found in workers)
    assert run["model_sha256"] == run_inline(experiment, tmp_path / "inline")["model_sha256"]


@pytest.mark.slow
def test_an_address_where_no_cluster_is_names_the_setting() -> None:
    with pytest.raises(UserError, match=r'engine\.address = "127\.0\.0\.1:1"'), engine("ray", 1, address="127.0.0.1:1"):
        pass
