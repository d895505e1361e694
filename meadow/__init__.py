"""Meadow: federated-learning experiments that compare methods on the same data.

>>> import meadow
>>> summary = meadow.run("fedavg", run={"rounds": 2}, partition={"clients": 4}, engine={"name": "inline"})
>>> summary.status
'done'

`run`, `compare`, `sweep` and `plan` do what the commands of these names do; `load` returns a run's trained model.
Importing this module is quick: each name is loaded when it is first used.
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from meadow.experiments.api import compare, plan, run, sweep
    from meadow.experiments.models import load
    from meadow.runtime.errors import UserError

__all__ = ["UserError", "__version__", "compare", "load", "plan", "run", "sweep"]

__version__ = "0.2.0.dev0"

_PLACES = {
    **dict.fromkeys(("compare", "plan", "run", "sweep"), "meadow.experiments.api"),
    "UserError": "meadow.runtime.errors",
    "load": "meadow.experiments.models",
}

_HERE = Path(__file__).resolve().parent
if not (_HERE / "strategies").is_dir():
    # In a checkout and in Flower's app bundle, four rooms (strategies, client, server, simulation) are siblings of this
    # folder. In a wheel all rooms are inside it.
    __path__.append(str(_HERE.parent))


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
