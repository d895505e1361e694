"""Checkpoints: the shared arrays after a round and what the next round needs, so that a resumed run gives the same bits.

A checkpoint is `round-N.safetensors`, then `round-N.json` with the arrays' SHA-256 and its own. Without a whole, matching
JSON file the checkpoint is ignored and the one before it is used. The last `KEEP` checkpoints stay.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meadow.arrays.files import DamagedFile, read_arrays, read_json, write_arrays, write_json
from meadow.arrays.named import Arrays, arrays_sha256, auxiliary, of_kind, split_auxiliary
from meadow.runtime.errors import RunStopped

KEEP = 3

_NAME = re.compile(r"round-\d{8}\.(json|safetensors)")

_OWN = "own_sha256"
"""Key of the SHA-256 of the JSON file's other entries."""
_STRATEGY = "strategy"
"""Prefix of the strategy's arrays in a checkpoint: its "m@w" is stored as "strategy@m@w", next to the shared "w"."""


@dataclass(frozen=True)
class Checkpoint:
    """The state after `round`: the shared arrays, the strategy's state and, under DP, the protection's state (JSON).

    run: the run's id, "" in files of earlier versions.
    """

    round: int
    arrays: Arrays
    strategy: Arrays = field(default_factory=dict)
    privacy: dict[str, Any] = field(default_factory=dict)
    run: str = ""


def save(folder: Path, checkpoint: Checkpoint, keep: int = KEEP) -> None:
    """Write a checkpoint, then delete those older than the last `keep`."""
    stem = folder / f"round-{checkpoint.round:08d}"
    everything = checkpoint.arrays | auxiliary(_STRATEGY, checkpoint.strategy)
    write_arrays(stem.with_suffix(".safetensors"), everything, private=True)
    about = {
        "round": checkpoint.round,
        "sha256": arrays_sha256(everything),
        "privacy": checkpoint.privacy,
        "run": checkpoint.run,
    }
    write_json(stem.with_suffix(".json"), about | {_OWN: _digest(about)}, private=True)
    for old in _rounds(folder)[:-keep]:
        (folder / f"round-{old:08d}.json").unlink(missing_ok=True)
        (folder / f"round-{old:08d}.safetensors").unlink(missing_ok=True)


def latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, or None; and a line about each file passed over: damaged, or of another name.

    Raises RunStopped if the folder cannot be read.
    """
    strays = [path for path in _files(folder) if not _NAME.fullmatch(path.name) and not path.name.startswith(".")]
    passed_over = [f"{path}: the name is not one of Meadow's" for path in strays]
    for round_ in reversed(_rounds(folder)):
        try:
            return read(folder, round_), passed_over
        except DamagedFile as error:
            passed_over.append(str(error))
    return None, passed_over


def read(folder: Path, round_: int) -> Checkpoint:
    """The checkpoint of a round. Raises DamagedFile if one of its files is missing or damaged."""
    stem = folder / f"round-{round_:08d}"
    about = read_json(stem.with_suffix(".json"), dict)
    arrays = read_arrays(stem.with_suffix(".safetensors"))
    if about.pop(_OWN, None) not in (None, _digest(about)):  # files of earlier versions have none
        raise DamagedFile(f"{stem}.json: its content does not match its SHA-256")
    if about.get("round") != round_ or about.get("sha256") != arrays_sha256(arrays):
        raise DamagedFile(f"{stem}.safetensors: the arrays do not match the SHA-256 in {stem.name}.json")
    shared, kept = split_auxiliary(arrays)[0], of_kind(_STRATEGY, arrays)
    return Checkpoint(round_, shared, kept, about.get("privacy", {}), about.get("run", ""))


def oldest_round(folder: Path) -> int:
    """The round of the oldest checkpoint; 0 if there is none."""
    return next(iter(_rounds(folder)), 0)


def _rounds(folder: Path) -> list[int]:
    """The rounds with at least one of the two files: a checkpoint that lacks the other one counts as damaged, not absent."""
    return sorted({int(path.stem.removeprefix("round-")) for path in _files(folder) if _NAME.fullmatch(path.name)})


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
    except OSError as error:
        raise RunStopped(
            f"{folder} cannot be read ({error.strerror}); restore it, and continue with --resume"
        ) from None


def _digest(about: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
