"""The kinds of faults, by name."""

import signal
from collections.abc import Iterator
from dataclasses import replace

from meadow.benchmarks.faults import stories
from meadow.benchmarks.faults.stories import Story, chosen, cut, damaged, flipped, gone, newest, newest_state, replaced
from meadow.benchmarks.faults.tries import Kind, Statuses

Settings = tuple[str, ...]

KILL, TERM, HUP, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, signal.SIGINT
DONE, WRONG, STOPPED, KILLED = (frozenset({status}) for status in (0, 2, 3, -9))
REFUSED, MAYBE = WRONG | STOPPED, DONE | STOPPED
THROUGH = (KILLED | DONE, DONE)
"""Killed, unless the run had just ended; then done."""
ENDED = (MAYBE, DONE)
"""The same for what ends a run in order."""
BACK = (REFUSED, DONE)
"""Refused; done when the damage is mended."""

_SMALL = (
    "partition.clients=6", "partition.law=iid", "local.steps=1", "task.hidden=8", "evaluate.on=clients", "evaluate.every=99",
)  # fmt: skip
SMALL = ("run.rounds=30", *_SMALL)
PLAIN = ("fedavg", *SMALL)
PERSONAL = ("fedper", *SMALL)
ON_DISK = ("fedper", *SMALL, "engine.state_memory=0")
CONTROLS = ("scaffold", *SMALL)
NOISE = ("privacy.noise_multiplier=1.0",)
EXAMPLES = ("fedavg", *SMALL, "privacy.unit=example", "privacy.sample_rate=0.1", *NOISE)
CLIENTS = ("fedavg", *SMALL, "privacy.unit=client", "cohort.sampling=poisson", "cohort.fraction=0.5", *NOISE)
EXPERIMENTS = {
    "FedAvg": PLAIN, "personal layers": PERSONAL, "personal layers on disk": ON_DISK, "SCAFFOLD": CONTROLS,
    "example-level DP": EXAMPLES, "client-level DP": CLIENTS,
}  # fmt: skip
FEW = ("fedper", "run.rounds=3", *_SMALL, "engine.workers=2")
"""For real processes, where a round takes seconds."""
MANY = (
    "fedper", "run.rounds=3", "task.dataset=faulty:many", "task.targets=y", "partition.law=natural", "partition.min_size=3",
    "partition.clients=3000", "local.steps=1", "task.hidden=8", "evaluate.on=clients", "evaluate.every=99",
)  # fmt: skip


def kinds() -> dict[str, Kind]:
    """Every kind, by "NAME on ENGINE"."""
    every = [*_inline(), *_folders(), *_clients(), *_ray(), *_processes(), *_loads()]
    return {f"{kind.name} on {kind.engine}": kind for kind in every}


def _inline() -> Iterator[Kind]:
    for title, settings in EXPERIMENTS.items():
        yield Kind(f"SIGKILL ({title})", stories.signalled(KILL), THROUGH, settings, tries=12)
    yield Kind("SIGKILL three times", stories.killed_again, (*[KILLED | DONE] * 3, DONE), EXAMPLES, tries=6)
    for number in (TERM, HUP, INT):
        yield Kind(number.name, stories.signalled(number), ENDED, PERSONAL, tries=8)
    yield Kind("SIGTERM (DP)", stories.signalled(TERM), ENDED, EXAMPLES, tries=8)
    yield Kind("SIGINT three times", stories.signalled(INT, 3), ENDED, PLAIN, tries=8)
    yield Kind("SIGSTOP for a second", stories.paused, (DONE,), PERSONAL)
    yield Kind("run folder removed", stories.without(), (MAYBE,), PERSONAL, same=False, left=1)
    yield Kind("run folder renamed", stories.without(moved=True), (MAYBE,), PERSONAL, same=False, left=1)
    yield Kind("state removed", stories.without("state"), (MAYBE,), ON_DISK, same=False)
    yield Kind("no room for a file", stories.small_files, ENDED, ON_DISK, tries=8)
    yield Kind("standard output full", stories.output_full, (STOPPED, DONE), PLAIN)
    yield Kind("standard output closed", stories.output_closed, (STOPPED, DONE), PLAIN)
    yield Kind("compiled library cut", stories.library_cut, (DONE,), PLAIN)
    for how in (cut, flipped, gone):
        name = f"state in memory {how.__name__}"
        yield Kind(name, stories.in_memory(how), (KILLED | DONE, MAYBE), (*PERSONAL, "run.rounds=60"))


def _folders() -> Iterator[Kind]:
    def kind(
        name: str, story: Story, ends: tuple[Statuses, ...], settings: tuple[str, ...] = ON_DISK, told: str = ""
    ) -> Kind:
        return Kind(name, story, ends, settings, told=told, half=True)

    manifest, toml = "manifest.json", "experiment.toml"
    yield kind("manifest gone", damaged(lambda this: gone(this, this.run / manifest)), BACK, told=manifest)
    yield kind("manifest cut", damaged(lambda this: cut(this, this.run / manifest)), BACK, told=manifest)
    yield kind("manifest of a list", damaged(lambda this: replaced(this.run / manifest, "[1]")), BACK, told=manifest)
    yield kind("manifest of another run", damaged(stories.other_run), BACK, told=manifest)
    yield kind("experiment.toml gone", damaged(lambda this: gone(this, this.run / toml)), BACK, told=toml)
    yield kind("experiment.toml cut", damaged(lambda this: cut(this, this.run / toml)), (REFUSED | DONE, DONE))
    for how in (cut, flipped):
        name = how.__name__
        arrays = damaged(lambda this, how=how: how(this, newest(this, ".safetensors")))  # type: ignore[misc]
        yield kind(f"newest checkpoint {name}", arrays, (DONE,), told="checkpoint")
        header = damaged(lambda this, how=how: how(this, newest(this, ".json")))  # type: ignore[misc]
        yield kind(f"newest checkpoint's JSON {name}", header, (DONE,), told="checkpoint")
    yield kind("newest checkpoint's JSON gone", damaged(lambda this: gone(this, newest(this, ".json"))), (DONE,))
    header = damaged(lambda this: replaced(newest(this, ".json"), "[1]"))
    yield kind("newest checkpoint's JSON of a list", header, (DONE,), told="checkpoint")
    yield kind("strays among checkpoints", damaged(stories.strays), (DONE,), told="(1).json")
    line = kind("line of rounds.jsonl damaged", damaged(stories.line_damaged), (DONE,), told="rounds.jsonl")
    yield replace(line, lost=1)
    yield kind("last line of rounds.jsonl torn", damaged(stories.line_torn), (DONE,))
    for how in (cut, flipped, gone):
        state = damaged(lambda this, how=how: how(this, newest_state(this.run, this.random)))  # type: ignore[misc]
        yield kind(f"state file {how.__name__}", state, (MAYBE, DONE), told="state" if how is gone else "")
        ledger = damaged(lambda this, how=how: how(this, chosen(this, "*.ledger")))  # type: ignore[misc]
        alone = kind(f"ledger {how.__name__}", ledger, (MAYBE, DONE), EXAMPLES, told="ledger")
        yield replace(alone, lost=15, same=False)  # this client must not train any more
        releases = damaged(lambda this, how=how: how(this, this.run / "releases.json"))  # type: ignore[misc]
        yield kind(f"releases.json {how.__name__}", releases, (REFUSED, DONE), CLIENTS, told="releases.json")
    yield kind("all states gone", damaged(lambda this: gone(this, this.run / "state")), (STOPPED, DONE), told="state")
    yield kind("all ledgers gone", damaged(lambda this: gone(this, this.run / "state")), (STOPPED, DONE), EXAMPLES)
    yield kind("folder locked", stories.locked, (WRONG, DONE), told="--out")
    yield kind("resumed twice at once", stories.together, (WRONG | DONE, DONE))


MISBEHAVIOURS = {
    "raises": "RAISES", "SystemExit": "EXITS", "KeyboardInterrupt": "INTERRUPTS", "NaN": "NAN", "3e38": "HUGE",
    "another shape": "SHAPE", "an array that nobody asked for": "MORE",
}  # fmt: skip
DEATHS = {"hangs": "HANGS", "hangs in C": "HANGS_IN_C", "os._exit": "ENDS", "SIGSEGV": "CRASHES"}


def _client(name: str, engine: str, tries: int = 2, more: Settings = ("run.rounds=6",)) -> Kind:
    """A client does this in round 2. It alone is lost: the bits are those of a run where it raised."""
    settings = (*PLAIN, "cohort.timeout=20", *more)
    this, like = ((*settings, f"strategy.name=faulty:{what}") for what in ({**MISBEHAVIOURS, **DEATHS}[name], "RAISES"))
    return Kind(f"client: {name}", stories.plain, (DONE,), this, engine, tries, lost=1, like=like)


def _clients() -> Iterator[Kind]:
    for name in MISBEHAVIOURS:
        yield _client(name, "inline", 4)
    for name in (*MISBEHAVIOURS, *DEATHS):
        yield _client(name, "ray", more=("run.rounds=6", "engine.workers=2"))
    few = ("run.rounds=3", "engine.workers=2", "cohort.timeout=90")
    for name in ("raises", "NaN", "KeyboardInterrupt"):
        yield _client(name, "processes", 1, few)
    several = (*few, "partition.clients=40")  # so that each node has some
    yield replace(_client("os._exit", "processes", 1, several), lost=20, same=False)  # with the others of its node


def _ray() -> Iterator[Kind]:
    personal, private = ((*settings, "run.rounds=200", "engine.workers=2") for settings in (PERSONAL, EXAMPLES))
    yield Kind("worker killed", stories.one_killed("ray::NodeActor"), (DONE,), personal, "ray", 4)
    yield Kind("worker killed (DP)", stories.one_killed("ray::NodeActor"), (DONE,), private, "ray", 2)
    yield Kind("raylet killed", stories.one_killed("raylet/raylet"), ENDED, personal, "ray", 3)
    yield Kind("GCS killed", stories.one_killed("gcs_server"), ENDED, personal, "ray", 3)
    yield Kind("SIGKILL", stories.signalled(KILL), THROUGH, personal, "ray", 4)
    yield Kind("SIGKILL (DP)", stories.signalled(KILL), THROUGH, private, "ray", 2)
    for number in (TERM, HUP, INT):
        yield Kind(number.name, stories.signalled(number), ENDED, personal, "ray", 2)


def _processes() -> Iterator[Kind]:
    for name in ("flower-supernode", "flower-superlink", "flwr-clientapp", "flwr-serverapp"):
        yield Kind(f"{name} killed", stories.one_killed(name), ENDED, FEW, "processes", 1, lost=3, same=False)
    yield Kind("SIGKILL", stories.signalled(KILL), THROUGH, FEW, "processes", 2)
    for number in (TERM, INT):
        yield Kind(number.name, stories.signalled(number), ENDED, FEW, "processes", 1)


def _loads() -> Iterator[Kind]:
    yield Kind("four runs at once", stories.four_at_once, (DONE,) * 4, PERSONAL)
    ray = (*PERSONAL, "engine.workers=2")
    yield Kind("four runs at once", stories.four_at_once, (DONE,) * 4, ray, "ray", 1)
    yield Kind("four runs at once", stories.four_at_once, (DONE,) * 4, FEW, "processes", 1)
    yield Kind("report during a run", stories.reported, (DONE,) * 4, (*PERSONAL, "run.rounds=1000"))
    yield Kind("3000 clients with personal layers", stories.signalled(KILL), THROUGH, MANY, tries=1)
