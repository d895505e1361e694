"""Data that would fill the memory, never end or confuse a reader is refused with its file's name."""

import gzip
import io
import json
import lzma
import os
import resource
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.refusals import refused
from meadow.config.schema import Task
from meadow.tasks.data import Inputs, Target
from meadow.tasks.models.multihead import build
from meadow.tasks.readers.datasets import open_dataset
from meadow.tasks.readers.decoding import decode_files
from meadow.tasks.readers.tables import read_table

HEAD = "{{'descr': '{}', 'fortran_order': False, 'shape': {}, }}"


def npy(kind: str, shape: str, content: bytes = b"") -> bytes:
    header = HEAD.format(kind, shape).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header.encode() + content


def whole(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


GOOD = whole(np.zeros((9, 2)))
MEMBERS = {
    "no array": b"hello",
    "nothing": b"",
    "an unfinished header": GOOD[:40],
    "a header that is no Python": GOOD[:10] + b"(" * 118 + GOOD[128:],
    "another version": b"\x93NUMPY\x09\x00" + GOOD[8:],
    "more than there is": npy("<f8", "(1000000000000, 4)", bytes(99)),
    "a negative shape": npy("<f8", "(-1, 4)", bytes(99)),
    "Python objects": npy("|O", "(9, 2)", bytes(144)),
    "zeros": npy("|b1", "(60000000, 1)", bytes(60_000_000)),
}


@pytest.mark.parametrize("name", MEMBERS)
def test_an_npz_is_judged_by_its_headers(tmp_path: Path, name: str) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("x.npy", MEMBERS[name])
        file.writestr("y.npy", whole(np.arange(9)))
    with refused(tmp_path / "a.npz"):
        open_dataset(Task(dataset="arrays", root=str(tmp_path), targets=("y",)))


@pytest.mark.parametrize("pack", [gzip.compress, lambda raw: lzma.compress(raw, preset=0)], ids=["gz", "xz"])
def test_a_small_file_that_expands_without_end_is_no_table(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    path = tmp_path / ("t.csv.gz" if pack is gzip.compress else "t.csv.xz")
    path.write_bytes(pack(b"a,b\n" + b"1,2\n" * 10**7))
    with refused(path):
        read_table(path)
    path.write_bytes(pack(b"a,b\n" + b"1,2\n" * 10**5))  # packs as well, and is small
    assert len(read_table(path)) == 10**5


@pytest.mark.parametrize("cell", ["[" * 500 + "]" * 500, "[" * 10**5, '{"a":' * 500 + "1" + "}" * 500, "9" * 5000])
def test_json_that_is_too_deep_or_too_long_is_told_with_its_line(tmp_path: Path, cell: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"a": 1}\n{"a": ' + cell + "}\n")
    with refused(path, "line 2"):
        read_table(path)


def test_a_table_is_a_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "t.csv")
    (tmp_path / "u.csv").symlink_to("/dev/zero")
    for name in ("t.csv", "u.csv"):
        with refused(tmp_path / name):
            read_table(tmp_path / name)


def png(width: int, height: int, rows: bytes) -> bytes:
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows)))
    chunks = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def test_an_image_is_a_regular_file_of_a_size_that_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEADOW_CACHE", str(tmp_path / "cache"))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "large.png").write_bytes(png(9000, 8000, bytes(9001)))
    (tmp_path / "larger.png").write_bytes(png(2**31 - 1, 2**31 - 1, b""))
    (tmp_path / "cut.png").write_bytes(png(8, 8, bytes(72))[:40])
    for path in sorted(tmp_path.glob("*.png")):
        with refused(path):
            decode_files([path], lambda i: "here", 8, "grey")


@pytest.mark.parametrize("name", ["task.vocabulary", "task.train", "task.public"])
@pytest.mark.parametrize("place", ["/dev/zero", "/dev/null", "/proc/self/mem", "pipe", "."])
def test_what_a_text_task_names_is_a_regular_file(tmp_path: Path, name: str, place: str) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "train.jsonl").write_text(json.dumps({"text": "a b", "y": 1}) + "\n")
    given = {
        "dataset": "text",
        "root": str(tmp_path),
        "targets": ("y",),
        "tokens": "words",
        name.partition(".")[2]: place,
    }
    with refused(name.partition(".")[2] if place != "/proc/self/mem" else ""):
        open_dataset(Task.model_validate(given))


@pytest.fixture
def on_64_gib() -> Iterator[None]:
    """At most 64 GiB of memory, as by `ulimit -v`, on machines with more."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**36, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.usefixtures("on_64_gib")
def test_sizes_are_computed_before_they_are_allocated(tmp_path: Path) -> None:
    target = Target("y", "class", 2)
    for task, inputs in (
        (Task(model="mlp", hidden=100_000), Inputs((9,), 0)),
        (Task(model="cnn", hidden=100_000), Inputs((1, 28, 28), 0)),
        (Task(model="bilstm", hidden=100_000), Inputs((9,), 9)),
        (Task(model="mlp", hidden=1000), Inputs((3, 10**5, 10**5), 0)),
    ):
        with refused("task.hidden", "GiB"):
            build(task, [target], inputs)
    (tmp_path / "train.csv").write_text("text,y\n" + "a,0\nb,1\n" * 60_000)
    with refused("task.length = 100000", "GiB"):
        open_dataset(Task(dataset="text", root=str(tmp_path), targets=("y",), length=100_000))
    categories = "".join(f"c{i},{i % 2}\n" for i in range(120_000))
    (tmp_path / "train.csv").write_text("text,y\n" + categories)
    with refused("task.inputs", "GiB"):
        wide = ("text category",)
        open_dataset(Task(dataset="tabular", root=str(tmp_path), targets=("y",), inputs=wide, public="train"))


def test_half_a_character_in_a_class_becomes_text(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"x": i, "y": "a\ud83d" if i % 2 else "b"}) + "\n" for i in range(20))
    (tmp_path / "train.jsonl").write_text(rows)
    data = open_dataset(Task(dataset="tabular", root=str(tmp_path), targets=("y",)))
    assert data.targets[0].names == (r"a\ud83d", "b") and set(data.train.y["y"].tolist()) == {0, 1}


@pytest.mark.parametrize("kind", ["V8", "<c16", "m8[s]"])
def test_a_target_is_numbers_or_text(tmp_path: Path, kind: str) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((9, 2)), y=np.zeros(9, kind))
    with refused("task.targets", "y"):
        open_dataset(Task(dataset="arrays", root=str(tmp_path), targets=("y",)))


@pytest.mark.parametrize("root", ["/", "//", "/tmp/.."])
def test_the_whole_file_system_is_no_data(root: str) -> None:
    with refused("task.root", root):
        open_dataset(Task(dataset="ImageFolder", root=root, targets=("label",)))
