"""The `meadow` command. Exit status: 0 done; 1 a bug in Meadow; 2 the input is wrong; 3 ended early for a stated reason."""

import atexit
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from meadow.config.load import Tree, apply, parse_override, preset_about, preset_names, read_tree, to_toml
from meadow.config.schema import Experiment
from meadow.experiments.closing import close, close_group
from meadow.experiments.endings import outcome
from meadow.runtime.errors import Interrupted, UserError
from meadow.runtime.identity import versions
from meadow.runtime.logs import printable
from meadow.runtime.terminal import checked_output

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Federated-learning experiments: transfer, fine-tuning, multi-task and federated, on the same data.",
)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Name = Annotated[str, typer.Argument(metavar="EXPERIMENT", help="A preset's name (meadow presets) or a TOML file.")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="For example run.rounds=5.")]
Engine = Annotated[Literal["inline", "ray", "processes"] | None, typer.Option(help="How to launch the run.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Ray actors or SuperNodes.")]
Out = Annotated[Path | None, typer.Option(help="The folder to write; default runs/NAME-TIME.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the run in --out from its last checkpoint.")]
Without = Annotated[
    str, typer.Option(metavar="CLIENTS", help="With --resume: clients, as in 3,7, that start again from no state.")
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print errors only.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, all else on standard error.")]
Seeds = Annotated[int, typer.Option(min=1, help="Number of seeds.")]


@app.command()
def run(
    experiment: Name,
    overrides: Overrides = None,
    engine: Engine = None,
    workers: Workers = None,
    out: Out = None,
    resume: Resume = False,
    without_state: Without = "",
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run one experiment: a preset's name or a TOML file, then dotted overrides."""
    from meadow.server.folder import is_done

    changes = [*(overrides or []), *_engine_overrides(engine, workers)]
    wanted = _load(experiment, changes)
    if not (resume and out and is_done(out)):
        _warm_up(wanted)
    from meadow.experiments import api
    from meadow.experiments.ranking import ranking_table
    from meadow.experiments.results import find_runs
    from meadow.server.states import clients_in

    watch = _watch(Console(stderr=json_), quiet)
    lost, settings = clients_in(without_state), dict(map(parse_override, changes))
    summary = api.run(experiment, out=out, resume=resume, without_state=lost, watch=watch, **settings)
    table = ranking_table(find_runs([summary.folder])) if summary.folds else None
    found = json.loads((summary.folder / "summary.json").read_text())
    close(quiet, json_, found, table, summary.folder, [summary])
    raise typer.Exit(api.exit_status([summary]))


@app.command()
def compare(
    experiment: Annotated[str, typer.Argument(metavar="[EXPERIMENT]", help="Settings that the methods share.")] = "",
    overrides: Overrides = None,
    methods: Annotated[str, typer.Option(help="Presets to compare, separated by commas.")] = "",
    seeds: Seeds = 3,
    engine: Engine = None,
    workers: Workers = None,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run several methods on the same data, splits and seeds, and write one report."""
    from meadow.experiments import api
    from meadow.experiments.compare import METHODS

    experiment, given = _optional(experiment, overrides)
    names = [m.strip() for m in methods.split(",")] if methods else METHODS
    changes = dict(map(parse_override, [*given, *_engine_overrides(engine, workers)]))
    watch = _watch(Console(stderr=json_), quiet)
    summaries = api.compare(
        experiment or None, methods=names, seeds=seeds, out=out, resume=resume, watch=watch, **changes
    )
    close_group(summaries, quiet, json_)


@app.command()
def sweep(
    experiment: Name,
    overrides: Overrides = None,
    seeds: Seeds = 1,
    engine: Engine = None,
    workers: Workers = None,
    out: Out = None,
    resume: Resume = False,
    quiet: Quiet = False,
    json_: Json = False,
) -> None:
    """Run every combination of the values KEY=V1,V2 of several settings, and write one report."""
    from meadow.experiments import api

    changes = [*(overrides or []), *_engine_overrides(engine, workers)]
    axes = {parse_override(text)[0]: text.partition("=")[2] for text in changes}
    watch = _watch(Console(stderr=json_), quiet)
    close_group(api.sweep(experiment, seeds=seeds, out=out, resume=resume, watch=watch, **axes), quiet, json_)


@app.command()
def plan(experiment: Name, overrides: Overrides = None, json_: Json = False) -> None:
    """Print what a run would cost, before it runs: steps, bytes and epsilon."""
    from meadow.experiments import api

    costs = api.plan(experiment, **dict(map(parse_override, overrides or [])))
    if json_:
        typer.echo(json.dumps(costs, indent=2))
        return
    for kind in costs.pop("training"):
        typer.echo(f"{'trainer':22} {kind['trainer']}")
        for name, reason in kind["passed_over"].items():
            typer.echo(f"{f'  not {name}':22} {reason}")
    for name, value in costs.items():
        parts = value.items() if isinstance(value, dict) else [("", value)]
        for part, number in parts:
            typer.echo(
                f"{f'{name} {part}'.strip():22} {number:,}" if isinstance(number, int) else f"{name} {part}: {number}"
            )


@app.command()
def audit(experiment: Name, overrides: Overrides = None, json_: Json = False) -> None:
    """Measure whether the experiment's privacy claim holds; exit status 3 if it does not."""
    from rich.table import Table

    from meadow.experiments.audit import audit as make_audit

    checks = make_audit(_load(experiment, overrides or []))
    wrong = [check for check in checks if not check.holds]
    if json_:
        typer.echo(json.dumps({"holds": not wrong, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        table = Table("what", "claimed", "measured", "p", "")
        for check in checks:
            p = "" if check.p is None else f"{check.p:.2g}"
            verdict = "holds" if check.holds else "[red]does not hold[/red]"
            table.add_row(escape(check.name), escape(check.claimed), escape(check.measured), p, verdict)
        Console().print(table)
        result = "the claim holds" if not wrong else f"the claim does not hold: {', '.join(c.name for c in wrong)}"
        Console().print(escape(result), soft_wrap=True)
    raise typer.Exit(3 if wrong else 0)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or a comparison's folder.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; default report.html in the first folder.")
    ] = None,
) -> None:
    """Write the HTML report of finished runs, or of one that is still running."""
    from meadow.experiments.report import write_report

    Console().print(f"report: {write_report(runs, out or runs[0] / 'report.html')}", soft_wrap=True)


@app.command()
def presets() -> None:
    """List the presets."""
    for name in preset_names():
        typer.echo(f"{name:22} {preset_about(name)}")


@app.command()
def show(
    experiment: Annotated[str, typer.Argument()] = "",
    overrides: Overrides = None,
    split: Annotated[bool, typer.Option("--split", help="Show which client gets which samples, and draw it.")] = False,
    out: Annotated[
        Path | None, typer.Option(help="With --split: the figure to write (.png, .svg, .pdf); default split.png.")
    ] = None,
) -> None:
    """Print the resolved experiment as TOML: every setting with its value. With --split: the split, as table and figure."""
    experiment, given = _optional(experiment, overrides)
    tree: Tree = read_tree(experiment) if experiment else {}
    resolved = _load(apply(tree, map(parse_override, given)))
    if split:
        _show_split(resolved, out or Path("split.png"))
    elif out is not None:
        raise UserError(
            f"--out {out}: only --split writes a file; to save the settings, write: meadow show ... > {out}"
        )
    else:
        typer.echo(to_toml(resolved), nl=False)


@app.command()
def deal(
    experiment: Name,
    overrides: Overrides = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of machines that host the clients.")] = 4,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("shares"),
    below: Annotated[str, typer.Option(help="A subfolder within each machine's folder.")] = "",
) -> None:
    """Write each machine's share of the data for a deployment: OUT/coordinator, OUT/node-0, ... (docs/deploy.md)."""
    from meadow.tasks.splits.shares import write_shares

    for folder in write_shares(_load(experiment, overrides or []), nodes, out, below):
        typer.echo(folder)


@app.command()
def doctor() -> None:
    """Print what is installed, what is missing, and what to type."""
    missing = False
    for name, version in versions().items():
        missing |= version == "missing"
        typer.echo(f"{name:14} {version}")
    typer.echo(f"{'cores':14} {os.cpu_count()}")
    docker = shutil.which("docker") is not None
    typer.echo(f"{'docker':14} {'found' if docker else 'not found (needed for containers only)'}")
    if missing or importlib.util.find_spec("ray") is None:
        typer.echo("Something is missing: pip install -e .")
        raise typer.Exit(3)
    typer.echo("All there. Type: meadow compare")


def main() -> None:
    """Run the command. A user's mistake gives one message and exit status 2, never a traceback.

    SIGTERM and SIGHUP end a run like Ctrl-C: with a summary, resumable, exit status 3. More of them do not change it.
    """
    status, text, over = 3, "stopped by the user; to continue, add --resume --out DIR to the command", False

    def stop(*_: object) -> None:
        if over:
            os._exit(status)
        raise Interrupted

    atexit.register(_ignore_signals)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    try:
        status, text = outcome(_checked_app)
        over = True
    except KeyboardInterrupt:  # outside a run, which handles the first one itself, or one more
        over = True
    if text:
        Console(stderr=True).print(f"[bold red]meadow:[/] {escape(printable(text))}", highlight=False, soft_wrap=True)
    sys.exit(status)


def _ignore_signals() -> None:
    """At its end Python gives signals their default back, which would replace the exit status; but not to ignored ones."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _checked_app() -> None:
    with checked_output():
        app(standalone_mode=True)


def _optional(experiment: str, overrides: list[str] | None) -> tuple[str, list[str]]:
    """Experiment and overrides, where the experiment may be omitted: then the first override was parsed in its place."""
    given = overrides or []
    return ("", [experiment, *given]) if "=" in experiment else (experiment, given)


def _show_split(experiment: Experiment, picture: Path) -> None:
    from meadow.experiments.pictures import splits, style
    from meadow.tasks.task import open_task

    task = open_task(experiment)
    split = splits.facts(experiment, task)
    style.to_file(splits.picture(split), picture)
    first = next(target for target in task.dataset.targets if target.name == split["target"])
    console, table = Console(), splits.table(split, splits.label_names(first))
    # In a file or a narrow window the table keeps its full width: a long line is easier to read than a cut cell.
    console.width = max(console.width, console.measure(table, options=console.options.update(max_width=10_000)).maximum)
    console.print(table)
    console.print(f"figure: {picture}. {splits.picture_caption(split)}", soft_wrap=True, markup=False)


def _load(experiment: str | Tree, overrides: Sequence[str] = ()) -> Experiment:
    """Load an experiment and apply its algorithm's rules. Imported late because algorithms import torch."""
    from meadow.strategies.check import load

    return load(experiment, overrides)


def _warm_up(experiment: Experiment) -> None:
    """Start Ray, if that is the engine, while another thread imports the libraries and opens the data."""
    thread = threading.Thread(target=_open, args=(experiment,))
    thread.start()
    try:
        if experiment.engine.name == "ray":
            from meadow.simulation.ray_start import start_ray

            plan = experiment.engine
            start_ray(plan.workers, plan.threads, plan.address)
    finally:
        thread.join()


def _open(experiment: Experiment) -> None:
    from meadow.tasks.start import initial_state
    from meadow.tasks.task import settle

    with suppress(Exception):  # the run itself opens the data again and reports the error
        initial_state(settle(experiment))


def _watch(console: Console, quiet: bool) -> Any:
    from meadow.experiments.progress import follow

    def watch(folder: Path, experiment: Experiment) -> AbstractContextManager[None]:
        return follow(folder, experiment.run.rounds, folder.name, console, quiet)

    return watch


def _engine_overrides(engine: str | None, workers: int | None) -> list[str]:
    given = {"engine.name": engine, "engine.workers": workers}
    return [f"{key}={value}" for key, value in given.items() if value]
