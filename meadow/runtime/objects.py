"""A user's own objects: what an experiment file names as `module:object`, found on the Python path."""

import importlib
import inspect
import os
import sys
from pathlib import Path

from meadow.runtime.errors import UserError
from meadow.runtime.identity import ROOT


def user_paths() -> list[str]:
    """The folders of PYTHONPATH, absolute: what another process of the run, with another current folder, must look in."""
    return [str(Path(place).absolute()) for place in os.environ.get("PYTHONPATH", "").split(os.pathsep) if place]


def user_object(setting: str, name: str) -> object:
    """The object that `name`, "module:object", stands for. Raises UserError, which names `setting`, if there is none.

    A user's folder may hold a `client.py` or a `strategies/` of its own, and its modules import each other by those names.
    So they are looked for everywhere else before the folder in which Meadow's own `client/` and `strategies/` stand (a
    checkout, or the app bundle that Flower puts at the head of the path).
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
    """As `user_object`; of a class, a new object of it. Raises UserError if the class needs arguments, or refuses."""
    found = user_object(setting, name)
    if not inspect.isclass(found):
        return found
    try:
        return found()
    except (TypeError, ValueError) as error:
        raise UserError(f'{setting} = "{name}": {error}; write a class that needs no arguments, or an object') from None
