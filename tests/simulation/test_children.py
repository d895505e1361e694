"""The processes of a run, and the ports that are reserved for them."""

import os
import sys
import tempfile
from pathlib import Path

import pytest

from meadow.runtime.errors import RunStopped
from meadow.simulation.children import PORTS, children, free_port


def test_reserved_ports_differ_and_leave_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with free_port() as first:
        (folder,) = tmp_path.iterdir()
        (folder / str(PORTS[0])).touch()  # by a killed run
        with free_port() as second:
            assert first != second
            assert {path.name for path in folder.iterdir()} == {str(first), str(second)}
    assert [*folder.iterdir()] == []


@pytest.mark.parametrize(("code", "kind"), [("import os; os.kill(os.getpid(), 9)", RunStopped), ("0/0", RuntimeError)])
def test_a_process_that_was_killed_stops_the_run_and_one_that_fails_is_a_fault(
    code: str, kind: type[Exception], tmp_path: Path
) -> None:
    with children(tmp_path) as group:
        group.start("node", [sys.executable, "-c", code], tmp_path, os.environ).process.wait()
        with pytest.raises(kind, match="node"):
            group.require_alive()
