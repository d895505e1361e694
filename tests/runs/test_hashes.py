"""The bits of small experiments, over presets, privacy units and engines, as they were before Meadow had one import name.

`pytest tests/runs/test_hashes.py -m slow` compares them; `--write-hashes` writes down those of a kind of machine that
`hashes.json` does not have. The bits depend on the processor's kind and on torch's release.
"""

import json
from pathlib import Path

import pytest

from meadow.config.load import preset_names
from meadow.experiments.api import run_many
from meadow.experiments.compare import Job
from meadow.runtime.identity import versions
from meadow.strategies.check import load

FILE = Path(__file__).with_name("hashes.json")
QUICK = ("run.rounds=3", "partition.clients=8", "task.source_samples=200", "task.source_epochs=1")
DIGIT = ("task.targets=digit",)
STARS = ("task.dataset=stars", "task.targets=points", "task.model=lenet")
EXAMPLE = ("privacy.unit=example", "privacy.noise_multiplier=1.0", "privacy.sample_rate=0.2", "local.steps=4")
CLIENT = ("privacy.unit=client", "privacy.noise_multiplier=1.0", "cohort.sampling=poisson", "cohort.fraction=0.5")
LOCAL = ("privacy.unit=local", "privacy.noise_multiplier=0.5")
ATTACKED = ("attack.fraction=0.25",)

CASES: dict[str, tuple[str, ...]] = {name: (name,) for name in preset_names()} | {
    "bulyan": ("bulyan", "partition.clients=12"),
    "fedbn": ("fedbn", "task.model=cnn"),
    "fedavg-cnn": ("fedavg", "task.model=cnn"),
    "fedavg-digit-cnn": ("fedavg", "task.model=cnn", *DIGIT),
    "fedavg-hidden": ("fedavg", "task.hidden=128", "partition.clients=23"),
    "fedavg-lenet": ("fedavg", *STARS, "local.epochs=1"),
    "fedavg-one-target": ("fedavg", *DIGIT),
    "fedavg-one-target-big": ("fedavg", *DIGIT, "partition.clients=33"),
    "fedprox-one-target": ("fedprox", *DIGIT),
    "scaffold-one-target": ("scaffold", *DIGIT),
    "fedper-one-target": ("fedper", *DIGIT),
    "fedavg-adam": ("fedavg", "local.optimizer=adam", "local.lr=0.001"),
    "fedavg-unseen": ("fedavg", "evaluate.unseen=0.25", "evaluate.fine_tune_epochs=1"),
    "fedavg-dropout": (
        "fedavg", "cohort.dropout=0.3", "cohort.stragglers=0.3", "cohort.attempts=3", "cohort.quorum=2",
    ),
    "fedavg-over": ("fedavg", "cohort.fraction=0.5", "cohort.over_selection=0.5"),
    "fedavg-noise": ("fedavg", "attack.kind=noise", *ATTACKED),
    "fedavg-sign": ("fedavg", "attack.kind=sign-flip", *ATTACKED),
    "median-sign": ("median", "attack.kind=sign-flip", *ATTACKED),
    "fedavg-label-flip": ("fedavg", "attack.kind=label-flip", *ATTACKED),
    "bucket": ("trimmed-mean", "strategy.bucket=2"),
    "holds": ("fedavg", "partition.holds=digit 0-3,slant 4-7"),
    "stars": ("fedavg", "task.dataset=stars", "task.targets=points,size", "local.epochs=1"),
    "dp-fedavg": ("fedavg", *EXAMPLE),
    "dp-fedper": ("fedper", *EXAMPLE),
    "dp-fedprox": ("fedprox", *EXAMPLE),
    "dp-ditto": ("ditto", *EXAMPLE),
    "dp-hooks": ("fedavg", *EXAMPLE, "privacy.grad_sample=hooks"),
    "dp-loop": ("fedavg", *EXAMPLE, "privacy.grad_sample=loop"),
    "dp-scaffold": ("scaffold", *EXAMPLE),
    "dp-cnn": ("fedavg", *EXAMPLE, "task.model=cnn", "task.norm=group"),
    "dp-lenet": ("fedavg", *EXAMPLE, *STARS),
    "dp-lora": ("lora", *EXAMPLE),
    "dp-transfer": ("federated-transfer", *EXAMPLE),
    "dp-pooled": ("pooled", *EXAMPLE),
    "client-fedavg": ("fedavg", *CLIENT),
    "client-fedper": ("fedper", *CLIENT),
    "local-fedavg": ("fedavg", *LOCAL),
    "local-fedper": ("fedper", *LOCAL),
    "local-epsilon": (
        "fedavg", "privacy.unit=example", "privacy.epsilon=5", "privacy.sample_rate=0.2", "local.steps=4",
    ),
    "ray-fedavg": ("fedavg", "engine.name=ray", "partition.clients=23"),
    "ray-fedper": ("fedper", "engine.name=ray"),
}  # fmt: skip


def kind_of_machine() -> str:
    """The processor's vendor, family and model, the vector instructions that it has, and torch's release."""
    text = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    vectors = [flag for flag in ("avx2", "avx512f", "amx_tile") if flag in facts.get("flags", "").split()]
    named = [facts.get(key, "?") for key in ("vendor_id", "cpu family", "model")]
    return " ".join([*named, *vectors, "torch", versions()["torch"].partition("+")[0]])


def bits(case: str, out: Path) -> list[str | int]:
    """Status, hashes of the shared model and of all personal layers, and rounds."""
    name, *overrides = CASES[case]
    summary = run_many([Job(load(name, [*QUICK, "engine.name=inline", *overrides]), out)])[0]
    return [summary.status, summary.model_sha256[:16], summary.personal_sha256[:16], summary.rounds]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_bits_are_those_written_down(case: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    known = json.loads(FILE.read_text())
    machine = kind_of_machine()
    if request.config.getoption("--write-hashes"):
        known.setdefault(machine, {})[case] = bits(case, tmp_path / "run")
        FILE.write_text(as_lines(known))
    elif case not in known.get(machine, {}):
        pytest.skip(f"hashes.json has no bits for {machine}")
    else:
        assert bits(case, tmp_path / "run") == known[machine][case]


def as_lines(known: dict[str, dict[str, list[str | int]]]) -> str:
    """JSON with a line for each case."""
    parts = []
    for machine, cases in sorted(known.items()):
        lines = ",\n".join(f"    {json.dumps(case)}: {json.dumps(found)}" for case, found in sorted(cases.items()))
        parts.append(f"  {json.dumps(machine)}: {{\n{lines}\n  }}")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def test_every_preset_has_its_bits() -> None:
    assert all(set(preset_names()) <= known.keys() for known in json.loads(FILE.read_text()).values())
