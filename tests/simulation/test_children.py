"""Ports that are reserved for the processes of a run."""

import tempfile
from pathlib import Path

import pytest

from meadow.simulation.children import PORTS, free_port


def test_reserved_ports_differ_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with free_port() as first:
        (folder,) = tmp_path.iterdir()
        (folder / str(PORTS[0])).touch()  # by a killed run
        with free_port() as second:
            assert first != second
            assert {path.name for path in folder.iterdir()} == {str(first), str(second)}
    assert [*folder.iterdir()] == []
