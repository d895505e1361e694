"""The clients' store: the same states from memory as from disk, the limit kept, nothing lost without a word."""

import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from helpers.runs import run_inline, small
from meadow.arrays.named import Arrays
from meadow.client.store import SHARED_MEMORY, LostState, Store
from meadow.strategies.wire.states import Known

ODD: Arrays = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
    "count": np.array(7, dtype=np.int64),
    "none": np.zeros((0, 3), np.float64),
    "c@trunk.w": np.array([np.nan, -0.0], dtype=np.float32),
}


@pytest.fixture
def store(tmp_path: Path) -> Callable[..., Store]:
    """Makes stores whose shared memory is a folder of this test."""
    (tmp_path / "shm").mkdir()
    return partial(Store, shared=tmp_path / "shm")


def same(found: Arrays, expected: Arrays) -> bool:
    return list(found) == list(expected) and all(
        (found[n].dtype, found[n].shape, found[n].tobytes()) == (v.dtype, v.shape, v.tobytes())
        for n, v in expected.items()
    )


def files(tmp_path: Path, place: str) -> list[str]:
    return sorted(f"{p.parent.name}/{p.stem}" for p in (tmp_path / place).rglob("round-*.safetensors"))


def test_what_memory_holds_comes_back_in_another_process_and_from_disk_at_the_end(
    tmp_path: Path, store: Callable[..., Store]
) -> None:
    kept = store(tmp_path / "state", "run", 10**6)
    kept.save(3, 1, ODD, 0)
    assert files(tmp_path, "shm") == ["3/round-00000001"] and not files(tmp_path, "state")
    for reader in (kept, store(tmp_path / "state", "run", 10**6), store(tmp_path / "state", "run", 0)):
        assert same(reader.load(3, 2), ODD)
        assert reader.load(3, 1) == {} and reader.load(4, 9) == {}
    kept.settle(range(4))
    assert files(tmp_path, "state") == ["3/round-00000001"] and not any((tmp_path / "shm").rglob("*3*"))
    found = store(tmp_path / "state", "run").load(3, 2)
    assert found.keys() == ODD.keys() and all(found[n].tobytes() == v.tobytes() for n, v in ODD.items())


def test_the_limit_is_kept_and_the_rest_is_on_disk(tmp_path: Path, store: Callable[..., Store]) -> None:
    """Each state takes 4,096 bytes and a line; three fit. A client's old state gives its place to its new one."""
    kept = store(tmp_path / "state", "run", 13_000)
    zeros = np.zeros(1024, np.float32)
    value: Arrays = {"w": zeros}
    for number in range(5):
        kept.save(number, 1, value, 0)
    assert (len(files(tmp_path, "shm")), len(files(tmp_path, "state"))) == (3, 2)
    for round_ in range(2, 9):
        for number in range(5):
            kept.save(
                number, round_, {"w": zeros + np.float32(round_)}, round_
            )  # the state before is not needed any more
            assert kept.load(number, round_ + 1)["w"][0] == round_
        used = sum(p.stat().st_size for p in (tmp_path / "shm").rglob("round-*"))
        assert used == kept._used <= 13_000
    assert store(tmp_path / "state", "run", 13_000).load(0, 99)["w"][0] == 8


def test_states_that_a_restart_of_the_machine_lost_are_missed(tmp_path: Path, store: Callable[..., Store]) -> None:
    store(tmp_path / "state", "run", 10**6).save(0, 1, ODD, 0)
    shutil.rmtree(next((tmp_path / "shm").iterdir()))
    for memory in (0, 10**6):
        with pytest.raises(LostState, match="state_memory"):
            store(tmp_path / "state", "run", memory).load(0, 2, known=Known(1))


@pytest.mark.parametrize("memory", [0, 10**6])
def test_a_damaged_state_is_found_and_so_is_an_older_one_than_the_server_knows(
    memory: int, tmp_path: Path, store: Callable[..., Store]
) -> None:
    kept = store(tmp_path / "state", "run", memory)
    kept.save(0, 3, ODD, 0)
    assert same(dict(sorted(kept.load(0, 9, known=Known(3)).items())), dict(sorted(ODD.items())))
    with pytest.raises(LostState, match="round 4"):
        kept.load(0, 9, known=Known(4))
    assert kept.load(0, 9, known=Known(0, forgotten=3)) == {}
    (path,) = tmp_path.rglob("round-00000003.safetensors")
    whole = path.read_bytes()
    for place in range(0, len(whole), 5):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(LostState):
            kept.load(0, 9)
    for size in (0, 3, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(LostState):
            kept.load(0, 9)
    kept.settle([0])  # what cannot be read does not hinder the others


def test_the_memory_of_a_run_whose_folder_is_gone_is_freed(tmp_path: Path, store: Callable[..., Store]) -> None:
    store(tmp_path / "gone", "old", 10**6).save(0, 1, ODD, 0)
    store(tmp_path / "there", "kept", 10**6).save(0, 1, ODD, 0)
    shutil.rmtree(tmp_path / "gone")
    for mark in (tmp_path / "shm").glob("*/*/*"):
        os.utime(mark, (0, 0))  # the folder of a run that has just begun may not be there yet
    store(tmp_path / "there", "new", 10**6).save(0, 1, ODD, 0)
    assert {p.name for p in next((tmp_path / "shm").iterdir()).iterdir()} == {"kept", "new"}


def test_a_run_leaves_nothing_in_memory_and_the_same_states_on_disk(tmp_path: Path) -> None:
    states = []
    for memory in (0, 1024):
        out = tmp_path / str(memory)
        summary = run_inline(small("fedper", f"engine.state_memory={memory}", "cohort.size=3"), out)
        store = Store(out / "state", next(p.name for p in (out / "state").iterdir() if p.is_dir()))
        states.append((summary["personal_sha256"], [store.load(c, 99) for c in range(8)]))
        assert not [p for p in (SHARED_MEMORY / f"meadow-{os.getuid()}" / store.run).rglob("*") if p.is_file()]
    assert states[0][0] == states[1][0]
    assert [{n: v.tobytes() for n, v in s.items()} for s in states[0][1]] == [
        {n: v.tobytes() for n, v in s.items()} for s in states[1][1]
    ]
