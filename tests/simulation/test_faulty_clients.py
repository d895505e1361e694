"""A client that hangs, ends its process or interrupts it costs itself only, on Ray as inline."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message

from helpers.faulty import CLIENT, ROUND
from helpers.runs import SAME, clients_answer, run_inline, run_with, small
from meadow.client.answers import train_client
from meadow.client.app import app
from meadow.client.node import Node
from meadow.config.schema import Experiment
from meadow.simulation.launch import Launch, engine
from meadow.strategies.wire.packing import Answer, Request, add_errors, leave_out


@pytest.fixture(scope="module")
def ray_launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launch]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        with engine("ray", 2) as launch:
            yield launch


def faulty(name: str, *overrides: str) -> Experiment:
    return small("fedavg", f"strategy.name=helpers.faulty:{name}", "partition.clients=23", *overrides)


def without_the_client(experiment: Experiment, out: Path) -> dict[str, Any]:
    """The run in which this client raises an ordinary error, inline."""

    def one(node: Node, request: Request) -> Answer:
        if (request.config["round"], request.client) == (ROUND, CLIENT):
            raise ValueError
        return train_client(node, request)

    return run_with(clients_answer(one), experiment, out)


def releases(run: Path) -> dict[str, int]:
    """The lines of each client's ledger."""
    return {path.name: len(path.read_bytes().splitlines()) for path in (run / "state").rglob("*.ledger")}


def failures(run: Path) -> list[list[int]]:
    records = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    return [[failed["client"] for failed in record["failed"]] for record in records]


@pytest.mark.parametrize(
    "name",
    [
        "EXITS",
        "INTERRUPTS",
        "CANCELS",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("CRASHES", "HANGS", "HANGS_IN_C", "FREEZES")),
    ],
)
def test_the_others_get_the_bits_of_a_run_in_which_it_fails(name: str, ray_launch: Launch, tmp_path: Path) -> None:
    experiment = faulty(name, *(["cohort.timeout=20"] if name in ("HANGS", "HANGS_IN_C", "FREEZES") else []))
    summary = ray_launch(experiment, tmp_path / "ray")
    assert failures(tmp_path / "ray") == [[], [CLIENT], []]
    expected = without_the_client(faulty("FINE"), tmp_path / "inline")
    assert [summary[key] for key in SAME] == [expected[key] for key in SAME]
    assert (summary["status"], summary["clients"]) == ("done", expected["clients"])


def test_a_worker_serves_on_after_an_interrupt_at_any_time(ray_launch: Launch, tmp_path: Path) -> None:
    summary = ray_launch(faulty("INTERRUPTS_LATER"), tmp_path / "ray")
    found = failures(tmp_path / "ray")
    assert found[0] == found[2] == [] and len(found[1]) <= 1 and summary["status"] == "done"


@pytest.mark.slow
def test_several_clients_that_die_or_hang_in_one_round_are_all_that_is_lost(ray_launch: Launch, tmp_path: Path) -> None:
    summary = ray_launch(faulty("MANY", "cohort.timeout=20"), tmp_path / "ray")
    assert failures(tmp_path / "ray") == [[], [CLIENT, CLIENT + 1, CLIENT + 2], []] and summary["status"] == "done"


@pytest.mark.slow
def test_a_private_client_that_dies_is_charged_and_the_others_once(ray_launch: Launch, tmp_path: Path) -> None:
    private = (
        "privacy.unit=example",
        "privacy.noise_multiplier=1",
        "privacy.sample_rate=0.2",
        "privacy.epsilon=0",
        "privacy.clip=1",
    )
    summary = ray_launch(faulty("EXITS", *private), tmp_path / "ray")
    run_inline(faulty("FINE", *private), tmp_path / "inline")
    assert failures(tmp_path / "ray") == [[], [CLIENT], []] and summary["status"] == "done"
    assert releases(tmp_path / "ray") == releases(tmp_path / "inline")


def test_a_block_whose_clients_go_one_by_one_has_the_same_bits(tmp_path: Path) -> None:
    """As after a death in a block; then one of its clients is left out."""
    experiment = small("fedavg", "partition.clients=23")
    whole = run_inline(experiment, tmp_path / "whole")

    def apart(message: Message, context: Context) -> Message:
        if "pack" in message.content:
            leave_out(message.content, (), range(CLIENT, 23))
        return app(message, context)

    def without(message: Message, context: Context) -> Message:
        lost = {CLIENT: "its worker died"} if message.metadata.message_type == "train" else {}
        if "pack" in message.content:
            leave_out(message.content, lost)
        reply = app(message, context)
        if lost:
            add_errors(reply.content, lost)
        return reply

    found = run_with(apart, experiment, tmp_path / "apart")
    assert [found[key] for key in SAME] == [whole[key] for key in SAME]
    run_with(without, experiment, tmp_path / "without")
    assert failures(tmp_path / "without") == [[CLIENT]] * 3
