"""The client's store: personal layers on disk, by run, client and round. They never travel.

Flower's `Context.state` is lost when a SuperNode restarts, so state lives in files. Each is written before the reply
leaves, under the round that made it. A resumed server may go back to any checkpoint that it still holds, and a client
must then start from the state of that round; so states newer than the server's oldest checkpoint are kept.
"""

from collections.abc import Collection
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

    def load(self, client: int, before: int, void: Collection[str] = ()) -> Arrays:
        """The client's arrays as its last round earlier than `before` left them; empty if there was none.

        `void`: attempts at rounds that did not count, "ROUND.ATTEMPT"; what they left is as if it were not there, and so is
        what an attempt after the one that counted left (a server was stopped in it, and began the round anew). Raises
        DamagedFile if the file is torn or changed: training on would silently lose what the client learned.
        """
        kept = [key for key in self._keys(client) if key[0] < before and _counts(key, void)]
        return read_arrays(self._path(client, *kept[-1])) if kept else {}

    def save(
        self,
        client: int,
        round_: int,
        arrays: Arrays,
        keep_from: int,
        attempt: int = 1,
        void: Collection[str] = (),
    ) -> None:
        """Keep the state after `round_`, and delete those that no server can come back to.

        `keep_from`: the round of the server's oldest checkpoint. The newest state not after it must stay as well.
        """
        write_arrays(self._path(client, round_, attempt), arrays)
        past = [key for key in self._keys(client) if key[0] <= keep_from]
        counting = [key for key in past if _counts(key, void)]
        for old in past:
            if old not in counting[-1:]:
                self._path(client, *old).unlink(missing_ok=True)

    def _path(self, client: int, round_: int, attempt: int = 1) -> Path:
        again = f"-{attempt}" if attempt > 1 else ""
        return self._folder / "clients" / str(client) / f"round-{round_:08d}{again}.safetensors"

    def _keys(self, client: int) -> list[tuple[int, int]]:
        """(round, attempt) of each file, in order."""
        folder = self._folder / "clients" / str(client)
        parts = [p.stem.removeprefix("round-").split("-") for p in folder.glob("round-*.safetensors")]
        return sorted((int(part[0]), int(part[1]) if len(part) > 1 else 1) for part in parts)


def _counts(key: tuple[int, int], void: Collection[str]) -> bool:
    """Whether a (round, attempt) is the one that counted: the first after all that did not."""
    round_, attempt = key
    return attempt == 1 + sum(entry.startswith(f"{round_}.") for entry in void)
