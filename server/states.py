"""Clients' states as the server knows them: no client may start from nothing because its state was lost.

A client's state stays with its client; the records say after which rounds there is one. Every request tells it to the
client, and a resumed run first asks every client to read its state. If one cannot, the run stops, unless the user went on
without it: `without-state.json` in the run folder maps such clients to the last round whose states do not count.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meadow.arrays.files import DamagedFile, locked, read_json, write_json
from meadow.runtime.errors import RunStopped, UserError
from meadow.server.checkpoints import latest
from meadow.strategies.wire.packing import Answer
from meadow.strategies.wire.states import pack_states

_FILE = "without-state.json"


@dataclass
class States:
    """newest: client -> the round of its newest state. forgotten: client -> the last round whose states do not count."""

    newest: dict[int, int] = field(default_factory=dict)
    forgotten: dict[int, int] = field(default_factory=dict)

    def read(self, folder: Path, records: Iterable[Mapping[str, Any]]) -> None:
        """Read the run's records, and for which clients the user goes on without. Raises DamagedFile."""
        if (file := folder / _FILE).exists():
            try:
                self.forgotten = {int(client): int(round_) for client, round_ in read_json(file, dict).items()}
            except (TypeError, ValueError) as error:
                raise DamagedFile(f'{file}: clients and rounds are expected, as in {{"3": 5}}: {error}') from None
        for record in records:
            self.note(record)

    def note(self, record: Mapping[str, Any]) -> None:
        """Note the states that a round made."""
        round_ = record["round"]
        self.newest |= {c: round_ for c in record.get("kept", ()) if round_ > self.forgotten.get(c, -1)}

    def at(self, round_: int, records: Iterable[Mapping[str, Any]]) -> "States":
        """The states as they were after a round."""
        before = States(forgotten=self.forgotten)
        for record in records:
            if record["round"] <= round_:
                before.note(record)
        return before

    def about(self, clients: Collection[int]) -> dict[str, bytes]:
        """What a request to these clients says about their states."""
        return pack_states(clients, self.newest, self.forgotten)


def require_states(answers: Sequence[Answer]) -> None:
    """Raise RunStopped if a client could not read the state that it kept."""
    lost = [answer for answer in answers if answer.lost]
    if lost:
        clients = ",".join(str(answer.client) for answer in lost)
        raise RunStopped(
            f"the states that clients {clients} kept cannot be read ({lost[0].error.strip().splitlines()[-1]}): restore "
            f"them and continue with --resume, or let these clients start again from nothing: --without-state {clients}"
        )


def clients_in(text: str) -> list[int]:
    """The clients in the text of --without-state: numbers and commas. Raises UserError."""
    numbers = [number.strip() for number in text.split(",")] if text else []
    if not all(number.isdecimal() for number in numbers):
        raise UserError(f"--without-state {text}: write clients' numbers, separated by commas, as in 3,7")
    return [int(number) for number in numbers]


def forget_states(out: Path, clients: Sequence[int], total: int) -> None:
    """Note in the run folder that these clients (of `total`) go on without the states of the rounds so far.

    Raises UserError if there is no such client, or no run to continue.
    """
    if wrong := [client for client in clients if not 0 <= client < total]:
        raise UserError(f"--without-state {wrong[0]}: there is no such client; the run has clients 0 to {total - 1}")
    with locked(out):
        found, _ = latest(out / "checkpoints")
        if found is None:
            raise UserError(f"--without-state: {out} has no checkpoint, so no client has a state yet; omit it")
        before = States()
        before.read(out, [])
        write_json(
            out / _FILE, {str(c): r for c, r in (before.forgotten | dict.fromkeys(clients, found.round)).items()}
        )
