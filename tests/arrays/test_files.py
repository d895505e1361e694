"""Files of arrays: read by safetensors too, damage is found, and files of earlier versions are read."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save

from meadow.arrays.files import DamagedFile, read_arrays, write_arrays

ARRAYS = {
    "0" * 64: np.arange(6, dtype=np.float32).reshape(2, 3),
    "n": np.array(3),
    "none": np.zeros((0, 2)),
    "turned": np.arange(6.0).reshape(2, 3).T,
}


def same(found: dict[str, np.ndarray]) -> bool:
    return found.keys() == ARRAYS.keys() and all(
        found[n].dtype == v.dtype and found[n].shape == v.shape and found[n].tobytes() == v.tobytes()
        for n, v in ARRAYS.items()
    )


def test_what_is_written_is_read_by_us_and_by_safetensors(tmp_path: Path) -> None:
    write_arrays(tmp_path / "a.safetensors", ARRAYS)
    assert same(read_arrays(tmp_path / "a.safetensors")) and same(load_file(tmp_path / "a.safetensors"))
    write_arrays(tmp_path / "empty.safetensors", {})
    assert read_arrays(tmp_path / "empty.safetensors") == {} == load_file(tmp_path / "empty.safetensors")


def test_a_file_with_its_digest_behind_it_is_read(tmp_path: Path) -> None:
    content = save({name: np.ascontiguousarray(value).reshape(value.shape) for name, value in ARRAYS.items()})
    (tmp_path / "old").write_bytes(content + hashlib.sha256(content).digest())
    assert same(read_arrays(tmp_path / "old"))
    (tmp_path / "old").write_bytes(content + hashlib.sha256(content + b"x").digest())
    with pytest.raises(DamagedFile):
        read_arrays(tmp_path / "old")


def test_every_changed_byte_and_every_cut_is_found(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_arrays(path, ARRAYS)
    content = path.read_bytes()
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DamagedFile):
            read_arrays(path)
        path.write_bytes(content[:place])
        with pytest.raises(DamagedFile):
            read_arrays(path)
