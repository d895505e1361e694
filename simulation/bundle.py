"""Writes the folder from which `flwr run` makes the app bundle, from the installed Meadow or the checkout that runs here."""

import shutil
from importlib import metadata
from pathlib import Path

import tomli_w

import meadow
from meadow.config.load import to_flat
from meadow.config.schema import Experiment
from meadow.runtime.identity import ROOMS, ROOT


def write_app(folder: Path) -> Path:
    """Write Meadow's Flower app into `folder`, replacing its contents; return the folder.

    The app has the packages that server and nodes run, in `meadow/` as in a wheel, and therefore this process's code hash.
    Its `pyproject.toml` declares every key of an experiment with its default.
    """
    shutil.rmtree(folder, ignore_errors=True)
    package = folder / "meadow"
    package.mkdir(parents=True)
    shutil.copy(Path(str(meadow.__file__)), package)
    for room in ROOMS:
        place = next(place for place in (ROOT / "meadow" / room, ROOT / room) if place.is_dir())
        shutil.copytree(place, package / room, ignore=shutil.ignore_patterns("__pycache__", "*.c", "built"))
    (folder / "pyproject.toml").write_text(tomli_w.dumps(_declared()), encoding="utf-8")
    (folder / "README.md").write_text("Meadow's app, written for one run.\n")
    return folder


def _declared() -> dict[str, object]:
    try:
        version = metadata.version("meadow")
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        version = "0.0.0"
    app = {
        "publisher": "meadow",
        "fab-include": ["meadow/**/*.py", "meadow/config/presets/*"],
        "components": {"serverapp": "meadow.server.app:app", "clientapp": "meadow.client.app:app"},
        "config": {"out": "", "resume": False, **to_flat(Experiment())},
    }
    return {
        "project": {"name": "meadow", "version": version, "license": "Apache-2.0"},
        "tool": {"flwr": {"app": app}},
    }
