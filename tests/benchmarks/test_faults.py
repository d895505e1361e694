"""The benchmark of faults: what was planted is judged, and an expectation that is not met is reported."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys
from dataclasses import replace
from meadow.benchmarks.faults.__main__ import main
from meadow.benchmarks.faults.kinds import WRONG, kinds
every = kinds()
kill, manifest = (every[name] for name in ("SIGKILL (FedAvg) on inline", "manifest gone on inline"))
if sys.argv[1] == "0":
    kill = replace(kill, ends=(WRONG, WRONG))
sys.exit(main({"kill": kill, "manifest": manifest}, ["--tries", "1", "--hostile", sys.argv[1], "--out", sys.argv[2]]))
"""


def unmet(hostile: int, out: Path) -> tuple[int, dict[str, str]]:
    """The benchmark's exit status, and of each of its rows how many tries were not as expected."""
    done = subprocess.run([sys.executable, "-c", CODE, str(hostile), out], capture_output=True, text=True, check=False)
    with out.open(newline="") as file:
        return done.returncode, {row["fault"]: row["unmet"] for row in csv.DictReader(file)}


@pytest.mark.slow
def test_faults_and_hostile_inputs_come_out_as_expected(tmp_path: Path) -> None:
    status, found = unmet(50, tmp_path / "faults.csv")
    assert status == 0 and len(found) > 5 and set(found.values()) == {"0"}


def test_what_is_not_as_expected_is_reported(tmp_path: Path) -> None:
    status, found = unmet(0, tmp_path / "faults.csv")
    assert status == 1 and found == {"SIGKILL (FedAvg)": "1", "manifest gone": "0"}
