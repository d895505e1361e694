"""What a user's input may take: files end, arrays fit into memory, messages can be read."""

import os
from pathlib import Path

import pytest

from helpers.refusals import refused
from meadow.runtime.errors import RunStopped, UserError
from meadow.runtime.limits import LARGEST_RATIO, SMALL, check_fits, check_ratio, is_file, is_folder, memory, read_file


def test_only_a_regular_file_that_ends_is_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "zero").symlink_to("/dev/zero")
    with (tmp_path / "hole").open("wb") as hole:
        hole.truncate(2**40)
    for name in ("pipe", "loop", "zero", ".", "hole", "a" * 300, "missing"):
        with pytest.raises(OSError):
            read_file(tmp_path / name)
    with pytest.raises(OSError):
        read_file(Path("/proc/self/mem"))
    (tmp_path / "five").write_bytes(b"12345")
    assert read_file(tmp_path / "five", 5) == b"12345"
    with pytest.raises(OSError):
        read_file(tmp_path / "five", 4)
    assert b"VmPeak" in read_file(Path("/proc/self/status"))  # of size 0, but it ends


def test_no_name_is_an_exception() -> None:
    for name in ("a" * 300, "a" * 5000, "a\0b", "\udcff"):
        assert not is_file(Path(name)) and not is_folder(Path(name))


def test_what_does_not_fit_twice_is_refused() -> None:
    check_fits("x", memory() // 2)
    with refused("task.length = 9", "GiB"):
        check_fits("task.length = 9", memory() // 2 + 1)
    with refused("task.length = 9"):
        check_fits("task.length = 9", 10**4000)


def test_data_that_expands_as_only_a_trap_does_is_refused() -> None:
    check_ratio("x.gz", SMALL, 1)
    check_ratio("x.gz", LARGEST_RATIO * SMALL, SMALL)
    for size, packed in ((SMALL + 1, 1), (LARGEST_RATIO * SMALL + 1, SMALL)):
        with refused("x.gz"):
            check_ratio("x.gz", size, packed)


@pytest.mark.parametrize("kind", [UserError, RunStopped])
def test_a_message_keeps_its_ends_and_can_be_read(kind: type[Exception]) -> None:
    message = str(kind(f"task.root = {'a' * 10**6}: write a folder"))
    assert message.startswith("task.root = aaa") and message.endswith(": write a folder") and len(message) < 3000
    assert len(str(kind("one fault\n" * 10**5))) < 3000
    assert str(kind("short\nand clear")) == "short\nand clear"
