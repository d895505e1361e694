"""A user's folder whose files are named like Meadow's rooms, or like anything in a Flower tutorial, on every engine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from meadow.config.load import load, to_flat
from meadow.runtime.identity import ROOT
from meadow.simulation.children import children
from meadow.simulation.processes import run_app, superlink

FILES = {
    "config.py": "WIDTH = 6\n",
    "utils.py": "from config import WIDTH\n\n\ndef double(width):\n    return 2 * width\n",
    "client.py": "from utils import double\n\nSPEED = double(0.25)\n",
    "server.py": "import client\n\nRATE = client.SPEED + 0.5\n",
    "models.py": (
        "import torch\nfrom config import WIDTH\nfrom utils import double\n\n\n"
        "def trunk(task, inputs):\n"
        "    from server import RATE  # when the model is made, not when this module is read\n\n"
        "    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(8, double(WIDTH)), torch.nn.Tanh()), "
        "int(double(WIDTH) * RATE)\n"
    ),
    "tasks/__init__.py": "from config import WIDTH\n",
    "tasks/data.py": (
        "import numpy as np\nimport torch\nfrom meadow.tasks.data import Part, Raw\nfrom tasks import WIDTH\n"
        "from utils import double\n\n\n"
        "def points(task):\n"
        "    random = np.random.default_rng(double(WIDTH))\n"
        "    x = random.normal(size=(200, 8)).astype(np.float32)\n"
        '    return Raw("points", Part(torch.from_numpy(x), {"side": np.where(x.sum(1) > 0, "right", "left")}), None)\n'
    ),
    "strategies/__init__.py": "from server import RATE\n",
    "strategies/mine.py": (
        "import client\nimport server\nfrom meadow.strategies.algorithms.fedavg import FEDAVG\n"
        "from strategies import RATE\n\nassert client.SPEED + 0.5 == server.RATE == RATE\nMINE = FEDAVG\n"
    ),
}
SETTINGS = [
    "fedavg", "task.dataset=tasks.data:points", "task.targets=side", "task.model=models:trunk",
    "strategy.name=strategies.mine:MINE", "run.rounds=2", "partition.clients=4", "partition.law=iid",
]  # fmt: skip


def play(folder: Path, engine: str) -> str:
    """Run the experiment as its user would, in the folder; the model's hash."""
    words = ["run", *SETTINGS, "--engine", engine, "--workers", "1", "--quiet", "--json", "--out", engine]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([".", str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-m", "meadow", *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout)["model_sha256"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("mine")
    for name, text in FILES.items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_text(text)
    return place


@pytest.fixture(scope="module")
def inline(folder: Path) -> str:
    return play(folder, "inline")


@pytest.mark.slow
def test_modules_named_like_ours_run_under_flwr_run(
    folder: Path, inline: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("MEADOW_STATE", str(tmp_path / "state"))
    config = {**to_flat(load(SETTINGS[0], SETTINGS[1:])), "out": str(tmp_path / "out"), "resume": False}
    nodes = {"num-supernodes": 4, "client-resources-num-cpus": 1}
    with children(tmp_path / "logs") as group, superlink(group, tmp_path / "flower", simulation=True) as link:
        run_app(group, link, ROOT, config, federation_config=nodes)
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["model_sha256"] == inline


@pytest.mark.parametrize("engine", ["ray", pytest.param("processes", marks=pytest.mark.slow)])
def test_modules_named_like_ours_run_on_every_engine(engine: str, folder: Path, inline: str) -> None:
    assert play(folder, engine) == inline
