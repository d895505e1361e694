"""The folder that `flwr run` makes an app bundle of: the checkout, or one that is written where Meadow is installed."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from meadow import __version__
from meadow.runtime.identity import ROOT


def app_folder(work: Path, config: Mapping[str, bool | int | float | str]) -> Path:
    """The app's folder. A wheel brings no pyproject.toml; then one with what Flower needs is written below `work`.

    config: every key that the run sets, by dotted name; Flower lets a run override declared keys only.
    """
    if (ROOT / "pyproject.toml").is_file():
        return ROOT
    folder = work / "app"
    shutil.copytree(
        ROOT / "meadow", folder / "meadow", ignore=shutil.ignore_patterns("__pycache__", "*.c"), dirs_exist_ok=True
    )
    declared: dict[str, Any] = {}
    for key, value in config.items():
        section, dot, name = key.partition(".")
        if dot:
            declared.setdefault(section, {})[name] = value
        else:
            declared[section] = value
    app = {
        "publisher": "meadow",
        "fab-include": ["meadow/**/*.py", "meadow/config/presets/*"],
        "components": {"serverapp": "meadow.server.app:app", "clientapp": "meadow.client.app:app"},
        "config": declared,
    }
    project = {"name": "meadow", "version": __version__, "description": "Meadow", "license": "Apache-2.0"}
    (folder / "pyproject.toml").write_text(tomli_w.dumps({"project": project, "tool": {"flwr": {"app": app}}}))
    return folder
