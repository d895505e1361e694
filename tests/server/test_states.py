"""A client's state that is lost: the run stops and names the client, or goes on without it where the user said so."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message

from helpers.refusals import refused
from helpers.runs import RESUMED, run_inline, run_with, small
from meadow.client.app import app
from meadow.client.store import SHARED_MEMORY
from meadow.config.load import to_tree
from meadow.config.schema import Experiment
from meadow.experiments import api
from meadow.server.folder import RunFolder
from meadow.server.states import forget_states
from meadow.strategies.wire.states import Known, known_state, pack_states

Harm = Callable[[Path], None]


def stopped_after(round_: int, experiment: Experiment, out: Path) -> None:
    """A run that is stopped after a round, as by Ctrl-C."""

    def until(message: Message, context: Context) -> Message:
        if any(record.get("round") == round_ + 1 for record in message.content.config_records.values()):
            raise KeyboardInterrupt
        return app(message, context)

    assert run_with(until, experiment, out)["rounds"] == round_


def states(out: Path) -> Path:
    """The folder of the clients' states, on disk or in memory."""
    run = str(RunFolder(out).manifest()["run_id"])
    memory = SHARED_MEMORY / f"meadow-{os.getuid()}" / run
    return memory if memory.exists() else out / "state" / run / "clients"


def newest(out: Path, client: int) -> Path:
    return max((states(out) / str(client)).glob("*.safetensors"))


def cut(out: Path) -> None:
    os.truncate(newest(out, 3), 100)


def flipped(out: Path) -> None:
    path = newest(out, 3)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


HARMS: dict[str, Harm] = {
    "file gone": lambda out: newest(out, 3).unlink(),
    "client gone": lambda out: shutil.rmtree(states(out) / "3"),
    "cut": cut,
    "flipped bit": flipped,
}


@pytest.mark.parametrize("memory", [0, 1024])
@pytest.mark.parametrize("harm", HARMS)
def test_a_lost_state_stops_a_resumed_run_and_a_restored_one_gives_its_bits(
    harm: str, memory: int, tmp_path: Path
) -> None:
    experiment = small("fedper", "local.steps=1", "partition.clients=4", f"engine.state_memory={memory}")
    whole = run_inline(experiment, tmp_path / "whole")
    out = tmp_path / "run"
    stopped_after(2, experiment, out)
    shutil.copytree(place := states(out), tmp_path / "kept")
    HARMS[harm](out)
    summary = run_inline(experiment, out, resume=True)
    assert summary["status"] == "stopped" and "--without-state 3" in summary["reason"]
    shutil.copytree(tmp_path / "kept", place, dirs_exist_ok=True)
    resumed = run_inline(experiment, out, resume=True)
    assert [resumed[k] for k in RESUMED] == [whole[k] for k in RESUMED]


@pytest.mark.parametrize("memory", [0, 1024])
def test_the_user_may_go_on_without_lost_states(memory: int, tmp_path: Path) -> None:
    """The clients start again from nothing, once, and the summary names them; a second stop changes nothing."""
    experiment = small(
        "fedper",
        "local.steps=1",
        "run.rounds=4",
        "partition.clients=4",
        "engine.name=inline",
        f"engine.state_memory={memory}",
    )
    out, again = tmp_path / "run", tmp_path / "again"
    stopped_after(2, experiment, out)
    shutil.rmtree(states(out))
    shutil.rmtree(out / "state")
    assert "--without-state 0,1,2,3" in run_inline(experiment, out, resume=True)["reason"]
    shutil.copytree(out, again)
    found = api.run(to_tree(experiment), out=out, resume=True, without_state=[0, 1, 2, 3])
    assert found.status == "done"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["without_state"] == dict.fromkeys("0123", 2)
    assert run_inline(experiment, again, resume=True)["status"] == "stopped"
    forget_states(again, [0, 1, 2, 3], 4)

    def until(message: Message, context: Context) -> Message:
        if any(record.get("round") == 4 for record in message.content.config_records.values()):
            raise KeyboardInterrupt
        return app(message, context)

    run_with(until, experiment, again, resume=True)
    resumed = run_inline(experiment, again, resume=True)
    assert [resumed[k] for k in RESUMED] == [summary[k] for k in RESUMED]


def test_only_clients_of_a_run_that_has_begun_go_on_without_a_state(tmp_path: Path) -> None:
    experiment = small("fedper", "local.steps=1", "partition.clients=4", "engine.name=inline")
    with refused("--without-state", "--resume"):
        api.run(to_tree(experiment), out=tmp_path / "new", without_state=[3])
    (tmp_path / "new").mkdir(exist_ok=True)
    with refused("--without-state", "checkpoint"):
        api.run(to_tree(experiment), out=tmp_path / "new", resume=True, without_state=[3])
    with refused("--without-state 4", "0 to 3"):
        api.run(to_tree(experiment), out=tmp_path / "new", resume=True, without_state=[4])


def test_a_request_says_what_the_server_knows_of_each_of_its_clients() -> None:
    config = pack_states([9, 2, 5, 7], {5: 3, 9: 4, 11: 1}, {2: 8})
    assert [known_state(config, c) for c in (2, 5, 7, 9, 11)] == [Known(0, 8), Known(3), Known(), Known(4), Known()]
    assert pack_states([1], {}, {2: 3}) == {} and known_state({}, 1) == Known()
