"""DP on real SuperNodes: the processes engine gives the bits of inline, and a deployment's noise comes from the nodes."""

import json
import stat
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from helpers.runs import SAME, run_inline, small
from meadow.config.load import to_flat
from meadow.config.schema import Experiment
from meadow.privacy.accounting import epsilon
from meadow.runtime.identity import ROOT
from meadow.simulation.children import children, free_port
from meadow.simulation.launch import engine
from meadow.simulation.processes import command, environment, inline_config, run_app, superlink

pytestmark = pytest.mark.slow

EXAMPLE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.sample_rate=0.1", "local.steps=3")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "cohort.sampling=poisson", "cohort.fraction=0.5")
QUICK = ("run.rounds=2", "partition.clients=4", "privacy.accountant=rdp")
ROUND = [(0.1, 1.0, 3)]


def entries(root: Path) -> dict[int, list[dict[str, Any]]]:
    """The entries of every client's ledger below a folder, by client, without the heads."""
    return {
        int(path.name.split("-")[1]): [json.loads(line) for line in path.read_text().splitlines()][1:]
        for path in root.rglob("client-*.ledger")
    }


@pytest.mark.parametrize("settings", [EXAMPLE, CLIENT], ids=["example", "client"])
def test_the_processes_engine_gives_the_bits_of_inline(settings: tuple[str, ...], tmp_path: Path) -> None:
    """It is a simulation on one machine: its noise is of the seed, as the summary says."""
    experiment = small("fedper", *settings, *QUICK)
    expected = run_inline(experiment, tmp_path / "inline")
    with engine("processes", 2) as launch:
        found = launch(experiment, tmp_path / "run")
    assert [found[key] for key in (*SAME, "privacy")] == [expected[key] for key in (*SAME, "privacy")]
    assert "not secret" in found["privacy"]["noise"]
    assert entries(tmp_path / "run" / "state") == entries(tmp_path / "inline" / "state")


def deploy(experiment: Experiment, out: Path, states: Sequence[Path]) -> dict[str, Any]:
    """A run on fresh SuperNodes, one for each folder of `states`; each knows nothing but where it keeps its state."""
    with (
        children(out.parent / f"{out.name}-logs") as group,
        superlink(group, out.parent / f"{out.name}-flower") as link,
        ExitStack() as ports,
    ):
        for index, state in enumerate(states):
            port = ports.enter_context(free_port())
            work = link.work.parent / f"node-{index}"
            settings: dict[str, bool | int | float | str] = {
                "partition-id": index,
                "num-partitions": len(states),
                "state": str(state),
            }
            start = [command("flower-supernode"), "--insecure", "--superlink", link.address, "--host", "127.0.0.1"]
            start += ["--port", str(port), "--node-config", inline_config(settings)]
            group.start(f"node-{index}", start, work, environment(work / "flwr"))
        run_app(group, link, ROOT, {**to_flat(experiment), "out": str(out), "resume": False})
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def test_a_deployments_noise_is_of_its_nodes_and_their_ledgers_outlive_them(tmp_path: Path) -> None:
    experiment, states = small("fedavg", *EXAMPLE, *QUICK), [tmp_path / "state-0", tmp_path / "state-1"]
    simulated = run_inline(experiment, tmp_path / "inline")
    first = deploy(experiment, tmp_path / "a", states)
    assert first["privacy"]["noise"] == "from secrets that are in no experiment file"
    assert first["model_sha256"] != simulated["model_sha256"]
    assert first["privacy"]["epsilon"]["max"] == pytest.approx(epsilon(ROUND * 2, 1e-5, "rdp"))
    held = [set(entries(state)) for state in states]
    assert held[0] | held[1] == {0, 1, 2, 3} and not held[0] & held[1]  # each client's with its own node
    secrets = [(state / "ledgers" / "secret").read_bytes() for state in states]
    assert len({*secrets}) == 2 and {len(secret) for secret in secrets} == {32}
    assert {stat.S_IMODE((state / "ledgers" / "secret").stat().st_mode) for state in states} == {0o600}
    assert not entries(tmp_path / "a")  # nor a ledger or a secret in what the server has
    written = [path.read_bytes() for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert written and not any(form in text for secret in secrets for form in (secret, secret.hex().encode())
                               for text in written)  # fmt: skip

    again = deploy(small("fedavg", *EXAMPLE, *QUICK, "run.seed=1"), tmp_path / "b", states)
    assert again["privacy"]["epsilon"]["max"] == pytest.approx(epsilon(ROUND * 4, 1e-5, "rdp"))
    assert {len(found) for state in states for found in entries(state).values()} == {4}
    assert [(state / "ledgers" / "secret").read_bytes() for state in states] == secrets


def test_whole_clients_in_a_deployment_have_noise_that_is_in_no_file_of_the_experiment(tmp_path: Path) -> None:
    experiment, states = small("fedavg", *CLIENT, *QUICK), [tmp_path / "state-0", tmp_path / "state-1"]
    simulated = run_inline(experiment, tmp_path / "inline")
    deployed = deploy(experiment, tmp_path / "a", states)
    assert deployed["privacy"]["noise"] == "from secrets that are in no experiment file"
    assert deployed["privacy"]["epsilon"] == simulated["privacy"]["epsilon"]
    assert deployed["model_sha256"] != simulated["model_sha256"]
    assert len((tmp_path / "a" / "secret").read_bytes()) == 32
