"""Loads a user's own objects, which an experiment file names as `module:object`, from the Python path."""

import importlib
import inspect
import os
import sys
from pathlib import Path

from meadow.runtime.errors import UserError
from meadow.runtime.identity import ROOT


def user_paths() -> list[str]:
    """The folders of PYTHONPATH as absolute paths, for processes of the run with another current folder."""
    return [str(Path(place).absolute()) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


def user_object(setting: str, name: str) -> object:
    """Load the object named "module:object". Raises UserError, which names `setting`, if it does not exist.

    A user's folder may have its own `client.py` or `strategies/`. So the folder of Meadow's own `client/` and
    `strategies/` (a checkout, or the app bundle that Flower puts first on the path) is searched last.
    """
    own = str(ROOT)
    if own in sys.path and not (ROOT / "meadow" / "strategies").is_dir():
        sys.path[:] = [*(place for place in sys.path if place != own), own]
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f'{setting} = "{name}": {error}; the module must be on the Python path (for example PYTHONPATH=.)'
        ) from None


def user_instance(setting: str, name: str) -> object:
    """Load an object as `user_object` does, and instantiate a class. Raises UserError if the class needs arguments or
    fails."""
    found = user_object(setting, name)
    if not inspect.isclass(found):
        return found
    try:
        return found()
    except (TypeError, ValueError) as error:
        raise UserError(f'{setting} = "{name}": {error}; write a class that needs no arguments, or an object') from None
