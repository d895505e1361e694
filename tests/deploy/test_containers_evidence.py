"""The figures of the containers, printed: `pytest -m 'docker and evidence' -s tests/deploy/test_containers_evidence.py`."""

import json
import re
import statistics
import subprocess
import time
from datetime import datetime
from pathlib import Path

import pytest

from helpers.runs import run_inline
from helpers.stack import PROXY, REFUSED, Stack, ask, compose, container, docker, start_engine
from meadow.strategies.check import load

pytestmark = [pytest.mark.docker, pytest.mark.evidence]
SERVICES = ("superlink", "serverapp", "proxy", "run", *(f"node-{i}" for i in range(4)))
ROUNDS = 5


def memory() -> dict[str, float]:
    """MiB that each service's container uses now."""
    names = {container(service): service for service in SERVICES}
    lines = docker("stats", "--no-stream", "--no-trunc", "--format", "{{.ID}} {{.MemUsage}}").splitlines()
    found = {}
    for line in lines:
        number, used = line.split()[:2]
        amount, unit = re.fullmatch(r"([\d.]+)([KMG]iB)", used).groups()  # type: ignore[union-attr]
        if service := next((names[short] for short in names if number.startswith(short)), ""):
            found[service] = float(amount) * {"KiB": 1 / 1024, "MiB": 1, "GiB": 1024}[unit]
    return found


def seconds_to(service: str, event: str, since: float) -> float:
    """Seconds from `since` to the first line of a container's log that has `event` in it, by Docker's clock."""
    return next(when for when, line in _lines(service) if event in line) - since


STEPS = {
    "Receiving: train": "a node asks for messages (every 3 s)",
    "Received successfully": "the message comes",
    "Start `flwr-clientapp`": "its SuperExec asks for work; a Python starts, with Flower",
    'text="trained"': "with torch and the app; the clients train",
    "Sending: train": "it hands over the reply (the SuperNode looks every 0.5 s)",
    "Sent successfully": "the reply goes",
}


def time_line() -> dict[str, float]:
    """Seconds of each step of a round, the mean over the nodes and the rounds but the first, and what is left to the server
    between the last node's reply and the round's end."""
    ends = [when for when, line in _lines("run") if "event=round" in line]
    took: dict[str, list[float]] = {step: [] for step in STEPS.values()}
    last = [0.0] * len(ends)
    for node in (f"node-{i}" for i in range(4)):
        lines = _lines(node)
        trained = [i for i, (_, line) in enumerate(lines) if 'text="trained"' in line]
        for number in range(1, len(ends)):
            place = next(i for i in trained if f"round={number + 1} " in lines[i][1])
            before = ends[number - 1]
            for event, step in STEPS.items():
                earlier = list(STEPS).index(event) < 3
                where = reversed(lines[:place]) if earlier else lines[place:]
                when = next(when for when, line in where if event in line)
                took[step].append(when - before)
                before = when
            last[number] = max(last[number], before)
    server = [end - sent for end, sent in zip(ends, last, strict=True)][1:]
    return {step: statistics.fmean(values) for step, values in took.items()} | {
        "from the last node's reply until the round is told": statistics.fmean(server)
    }


def _lines(service: str) -> list[tuple[float, str]]:
    found = (line.partition(" ") for line in docker("logs", "-t", container(service)).splitlines())
    return [(datetime.fromisoformat(when[:26] + "+00:00").timestamp(), line) for when, _, line in found]


def test_figures(tmp_path: Path) -> None:
    start_engine()
    stack = Stack(tmp_path / "meadow", "fedavg", ROUNDS)

    def build() -> float:
        began = time.monotonic()
        subprocess.run([*compose(), "build"], cwd=stack.place, env=stack.environment, check=True, capture_output=True)
        return time.monotonic() - began

    build()
    (stack.place / "client/loop/training.py").open("a").write("# a change\n")
    print(f"\nrebuild after a change of code  {build():.1f} s")
    (stack.place / "client/loop/training.py").write_bytes(
        (Path(__file__).parents[2] / "client/loop/training.py").read_bytes()
    )
    build()
    peak: dict[str, float] = {}
    subprocess.run([*compose(), "down", "-v"], cwd=stack.place, env=stack.environment, capture_output=True, timeout=120)
    began = time.time()
    stack.up()
    try:
        stack.until(stack.rounds, 600)
        while stack.process.poll() is None and not (stack.run / "summary.json").exists():
            peak = {service: max(peak.get(service, 0.0), used) for service, used in memory().items()} or peak
            if len(stack.rounds()) == 2 and not (stack.place / "asked").exists():
                (stack.place / "asked").touch()
                health, *answers = ask({"url": f"{PROXY}/health"}, *(request for request, _ in REFUSED.values()))
        stack.process.wait(120)
        print(f"from `up` to the run's submission {seconds_to('run', 'event=submit', began):.0f} s")
        print(f"from `up` to the end of round 1   {seconds_to('run', 'round=1 ', began):.0f} s")
        for step, seconds in time_line().items():
            print(f"of a round: {step:58} {seconds:.1f} s")
        size = json.loads(docker("image", "inspect", "meadow"))[0]["Size"]
    finally:
        stack.down()
    rounds = stack.rounds()
    inline = run_inline(load("fedavg", stack.overrides), tmp_path / "inline")
    own = [json.loads(line)["seconds"] for line in (tmp_path / "inline/rounds.jsonl").open()]
    here, there = (statistics.median(values) for values in ([r["seconds"] for r in rounds], own))
    print(
        f"seconds a round, median of {ROUNDS}      {here:.1f} (inline {there:.2f}; the overhead is {here - there:.1f})"
    )
    print(f"bytes of arrays a round, 20 clients {rounds[1]['bytes_up'] + rounds[1]['bytes_down']}")
    print(f"image                            {size / 1e9:.2f} GB")
    for service, used in sorted(peak.items()):
        print(f"memory of {service:22} {used:.0f} MiB at most, as sampled")
    for what, answer in zip(REFUSED, answers, strict=True):
        print(f"refused: {what:26} {' '.join(re.sub('</?[a-z0-9]+>', ' ', answer).split())[:110]}")
    assert health == "200"
    assert json.loads((stack.run / "summary.json").read_text())["model_sha256"] == inline["model_sha256"]
