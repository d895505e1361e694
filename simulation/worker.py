"""A worker of the Ray engine: an actor that answers messages by the ClientApp."""

import pickle
import traceback
from contextlib import suppress
from pathlib import Path
from tempfile import gettempdir
from typing import Any, NamedTuple

import ray
from flwr.app import ArrayRecord, Context, Message

from meadow.arrays.memory import Address, Place, Segment
from meadow.config.load import from_flat
from meadow.runtime.hand import Hand
from meadow.simulation.connections import RETRIES, connect, note_of
from meadow.simulation.grid import error_reply
from meadow.strategies.wire.packing import NodeReply, add_errors, leave_out, pack_replies
from meadow.tasks.task import share_task


class Call(NamedTuple):
    """A call to a worker on this machine, pickled by the command that started the worker.

    message, records: places in the segment `sent`; the records belong to the message, by name. context: pickled, the same
    for all calls of a run. reply: the segment for the reply.
    """

    message: Place
    records: dict[str, Place]
    context: bytes
    sent: Address
    reply: Address


class NodeActor:
    """Runs the ClientApp in a worker. Records that messages share arrive separately from the messages."""

    def __init__(self) -> None:
        self._segments: dict[int, Segment] = {}
        self._contexts: dict[bytes, Context] = {}
        self._hand: Hand | None = None

    def home(self) -> str:
        """Ray's id of this worker's machine."""
        return ray.get_runtime_context().get_node_id()

    def share(self, flat: dict[str, Any]) -> str:
        """Put an experiment's data into this machine's shared memory; return the addresses, "" without shared memory."""
        return " ".join(share_task(from_flat(flat)))

    def serve(self, path: str, key: bytes, worker: int) -> None:
        """Answer calls over a connection, one after another, until the command closes it or is gone."""
        self._hand = Hand(note_of(path, worker))
        with suppress(EOFError, OSError):
            while True:
                # A client's code may interrupt this process after its turn, too; the next connection brings the call again.
                with suppress(KeyboardInterrupt), connect(path, key, worker) as connection:
                    while True:
                        connection.send_bytes(self.handle_pickled(connection.recv_bytes()))

    def handle_pickled(self, call: bytes) -> bytes:
        """`handle` for a pickled `Call`. Returns the pickled place of the reply, or a pickled traceback."""
        try:
            return pickle.dumps(self._answer(pickle.loads(call)))
        except BaseException:  # a segment that cannot be opened costs this call, not the worker
            return pickle.dumps(traceback.format_exc())

    def _answer(self, call: Call) -> Place:
        if call.context not in self._contexts:
            self._contexts = {call.context: pickle.loads(call.context)}
        segment = self._segment(call.sent)
        message, *records = (segment.read(place) for place in (call.message, *call.records.values()))
        answer = self.handle(message, self._contexts[call.context], list(call.records), *records)
        (place,) = self._segment(call.reply).write([answer])
        return place

    def _segment(self, address: Address) -> Segment:
        if address.number not in self._segments:
            self._segments[address.number] = Segment(address)
        return self._segments[address.number]

    def handle(self, message: Message, context: Context, names: list[str], *records: ArrayRecord) -> Message:
        """Answer a message, with the records put back under their names."""
        for name, record in zip(names, records, strict=True):
            message.content[name] = record
        try:
            return self._by_app(message, context)
        except BaseException:  # a node that fails costs its clients, not the run
            return error_reply(message, traceback.format_exc())

    def _by_app(self, message: Message, context: Context) -> Message:
        """Let the ClientApp answer. Clients that earlier workers hung or died of are left out."""
        from meadow.client.app import app  # imported only in the worker

        if "pack" not in message.content:
            return app(message, context)
        if self._hand is None:  # in a cluster: a restarted worker has the same id
            self._hand = Hand(Path(gettempdir()) / f"meadow-hand-{ray.get_runtime_context().get_actor_id()}")
        name, config = f"{message.metadata.message_id} {message.metadata.created_at}", context.run_config
        limit, tells = float(config["cohort.timeout"]), config["privacy.unit"] == "none"
        with self._hand.holding(name, limit, tells) as past:
            if past.idle > RETRIES:
                raise RuntimeError(f"its worker died {past.idle} times with no client in hand")
            leave_out(message.content, past.lost, past.deaths)
            if not message.content.config_records["pack"]["requests"]:
                reply = Message(pack_replies(NodeReply([])), reply_to=message)
            else:
                reply = app(message, context)
            add_errors(reply.content, past.lost)
            return reply
