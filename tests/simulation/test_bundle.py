"""The app that the processes engine submits is the code that runs here, and Flower takes it."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk

from meadow.runtime.identity import code_sha256
from meadow.simulation.bundle import write_app
from meadow.simulation.processes import environment


def test_the_bundle_has_the_code_hash_that_wrote_it(tmp_path: Path) -> None:
    app = write_app(write_app(tmp_path / "app"))  # again, in the place of what was there
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(app))) as bundle:
        bundle.extractall(tmp_path / "bundle")
    ask = "import meadow; from meadow.runtime.identity import code_sha256; print(meadow.__file__, code_sha256())"
    clean = {"PATH": os.environ["PATH"], "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", ask], cwd=tmp_path / "bundle", env=clean, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(tmp_path / "bundle" / "meadow" / "__init__.py"), code_sha256()]


def test_code_in_a_bundle_finds_compiled_code(tmp_path: Path) -> None:
    """As a node does: the bundle holds no C file, and what the launcher names has the libraries or their sources."""
    app = write_app(tmp_path / "app")
    assert not list(app.rglob("*.c")) and not list(app.rglob("*.so"))
    ask = "from meadow.native import sums; print(sums.__file__, sums.available())"

    def asked(**more: str) -> list[str]:
        env = environment(tmp_path / "home") | more
        done = subprocess.run([sys.executable, "-c", ask], cwd=app, env=env, capture_output=True, text=True, check=True)
        return done.stdout.split()

    from meadow.native import sums

    assert asked() == [str(app / "meadow" / "native" / "sums.py"), str(sums.available())]
    assert asked(MEADOW_NATIVE="off")[1] == "False"


def test_loopback_goes_by_no_proxy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "example.org")
    assert environment(tmp_path)["no_proxy"] == "example.org,127.0.0.1,localhost"
