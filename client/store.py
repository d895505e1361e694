"""The client's store: personal layers on disk, by run, client and round. They never travel.

Flower's `Context.state` is lost when a SuperNode restarts, so state lives in files. Each is written before the reply
leaves, under the round that made it. A resumed server may go back to any checkpoint that it still holds, and a client
must then start from the state of that round; so states newer than the server's oldest checkpoint are kept.
"""

from pathlib import Path

from config.durable import Arrays, read_arrays, write_arrays


class Store:
    """State files of one run below `root`: what arrived once for all (base), and each client's personal arrays."""

    def __init__(self, root: Path, run_id: str) -> None:
        self.run = run_id
        self._folder = root / run_id

    def put_base(self, arrays: Arrays) -> None:
        """Keep the arrays that every client starts from and that do not travel in the rounds."""
        write_arrays(self._folder / "base.safetensors", arrays)

    def base(self) -> Arrays:
        """What `put_base` kept. Raises DamagedFile if this node never joined the run."""
        return read_arrays(self._folder / "base.safetensors")

    def load(self, client: int, before: int) -> Arrays:
        """The client's personal arrays as its last round earlier than `before` left them; empty if there was none.

        Raises DamagedFile if that file is torn or changed: training on would silently lose what the client learned.
        """
        rounds = [r for r in self._rounds(client) if r < before]
        return read_arrays(self._path(client, rounds[-1])) if rounds else {}

    def save(self, client: int, round_: int, arrays: Arrays, keep_from: int) -> None:
        """Keep the state after `round_`, and delete those that no server can come back to.

        `keep_from`: the round of the server's oldest checkpoint. The newest state not after it must stay as well.
        """
        write_arrays(self._path(client, round_), arrays)
        reachable = [r for r in self._rounds(client) if r <= keep_from]
        for old in reachable[:-1]:
            self._path(client, old).unlink(missing_ok=True)

    def _path(self, client: int, round_: int) -> Path:
        return self._folder / "clients" / str(client) / f"round-{round_:08d}.safetensors"

    def _rounds(self, client: int) -> list[int]:
        folder = self._folder / "clients" / str(client)
        return sorted(int(p.stem.removeprefix("round-")) for p in folder.glob("round-*.safetensors"))
