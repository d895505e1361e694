"""Run folders whose figures are worked out by hand."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from meadow.config.load import to_toml
from meadow.strategies.check import load


def over_clients(values: Sequence[float]) -> dict[str, float]:
    mean = float(np.mean(values))
    return {
        "mean": mean, "weighted": mean, "std": float(np.std(values)),
        "p10": min(values), "worst_decile": min(values), "min": min(values),
    }  # fmt: skip


def round_line(number: int, values: Sequence[float], sent: int = 0, **more: Any) -> dict[str, Any]:
    return {
        "round": number, "cohort": [0, 1], "failed": [], "seconds": 2.0, "bytes_down": sent, "bytes_up": sent,
        "train": {"digit": {"loss": 1.0 / number}}, "global": {"digit": {"accuracy": float(np.mean(values))}},
        "clients": {"digit": {"accuracy": over_clients(values)}}, "clients_round": number - 1, "epsilon": None, **more,
    }  # fmt: skip


def make_run(
    folder: Path, method: str, seed: int, values: Sequence[float], sent: int = 0, ended: bool = True, **summary: Any
) -> Path:
    """A run of two rounds whose clients end at `values`; without `ended` it goes on and its last line is torn."""
    folder.mkdir(parents=True)
    clients = len(values)
    experiment = load(method, [f"run.seed={seed}", "run.rounds=2", f"partition.clients={clients}"])
    (folder / "experiment.toml").write_text(to_toml(experiment))
    split = {"law": "dirichlet", "tries": 1, "sha256": f"split{seed}"}
    manifest = {
        "created": "2025-01-02T03:04:05Z",
        "versions": {"torch": "2"},
        "split": split,
        "command": ["meadow", "<x>"],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    table = {"target": "digit", "labels": [[3, 2]] * clients, "sizes": [[3, 1, 1]] * clients}
    (folder / "split.json").write_text(json.dumps(split | table))
    lines = [json.dumps(round_line(r, [v * r / 2 for v in values], sent)) for r in (1, 2)]
    (folder / "rounds.jsonl").write_text("\n".join(lines) + "\n" if ended else lines[0] + "\n" + lines[1][:50])
    if ended:
        with (folder / "clients.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["client", "train_samples", "test_samples", "rounds", "epsilon", "used.digit.accuracy"])
            writer.writerows([c, 3, 1, 2, "", v] for c, v in enumerate(values))
        found = {
            "name": method, "status": "done", "reason": "", "rounds": 2, "model_sha256": "ab",
            "personal_sha256": "cd", "split_sha256": split["sha256"],
            "metrics": {"global": {"digit": {"accuracy": 0.5}},
                        "clients": {"digit": {"accuracy": over_clients(values)}},
                        "last10": {"global": {}, "clients": {"digit": {"accuracy": over_clients(values)}}}},
            "cost": {"seconds": 4.0, "bytes_up": 2 * sent, "bytes_down": 2 * sent, "steps": 9, "peak_rss_mb": 1.0},
            "privacy": {"unit": "none", "releases": [{"what": "model arrays", "mechanism": "not protected"}]},
            "clients": {"never_sampled": 0},
        }  # fmt: skip
        (folder / "summary.json").write_text(json.dumps(found | summary))
    return folder


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")
