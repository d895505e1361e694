"""What is installed: the packages of pyproject.toml are the folders, and a wheel runs where there is no checkout."""

import os
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

import meadow

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILT = SETTINGS["tool"]["setuptools"]
COMPILED = "meadow/native/built/"
"""Where the build leaves what it compiled, if there is a compiler."""
PLACES = {name: ROOT / folder for name, folder in BUILT["package-dir"].items()}


def files() -> Iterator[tuple[str, Path]]:
    """Every file of the package: its path below `meadow/` as it is installed, and where it is here."""
    for name, place in PLACES.items():
        for path in place.rglob("*"):
            installed = "/".join([*name.split("."), *path.relative_to(place).parts])
            if path.is_file() and "__pycache__" not in path.parts and not installed.startswith(COMPILED):
                yield installed, path


def test_every_folder_is_a_package() -> None:
    folders = {name.rpartition("/")[0].replace("/", ".") for name, _ in files()}
    assert set(BUILT["packages"]) == folders


def test_every_file_that_is_not_python_is_packed() -> None:
    others = {path.name for _, path in files() if path.suffix != ".py"}
    assert {name for name in others if not any(fnmatch(name, p) for p in BUILT["package-data"]["*"])} == set()


def test_mypy_sees_every_room() -> None:
    linked = {path.name: path.resolve() for path in (ROOT / "typings" / "meadow").iterdir()}
    here = {path.name: path for path in (ROOT / "meadow").iterdir() if path.name not in ("__pycache__", "py.typed")}
    rooms = {name.partition(".")[2]: place for name, place in PLACES.items() if name != "meadow"}
    assert linked == here | rooms | {
        "benchmarks": ROOT / "benchmarks"
    }  # of the checkout only: a wheel has no benchmarks


def test_the_version_is_said_once() -> None:
    assert meadow.__version__ == SETTINGS["project"]["version"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel of what stands in the checkout, built in a copy."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    named = [ROOT / name for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE")]
    for path in [*named, *(path for _, path in files())]:
        target = copy / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    words = ["wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(copy)]
    subprocess.run([sys.executable, "-m", "pip", *words], check=True, capture_output=True, text=True)
    (found,) = out.glob("meadow-*.whl")
    return found


@pytest.mark.slow
def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert {name for name in names if not name.startswith(COMPILED)} == {name for name, _ in files()}


LOOK = """
import sys
def hook(event, arguments):
    if event in ("open", "import") and any(str(a).startswith(FOLDER + "/") for a in arguments if isinstance(a, str)):
        print("OPENED", arguments[0], file=sys.stderr, flush=True)
sys.addaudithook(hook)
"""


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ray", "processes"])
def test_a_wheel_runs_where_there_is_no_checkout(engine: str, wheel: Path, tmp_path: Path) -> None:
    place = tmp_path / "place"
    venv.create(place, with_pip=False)
    site = place / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # The libraries are those of this interpreter, without what points to the checkout.
    libraries = [path for path in sys.path if path.endswith("site-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    (site / "sitecustomize.py").write_text(f"FOLDER = {str(ROOT)!r}\n{LOOK}")
    for name in (
        "flwr",
        "flower-superlink",
        "flower-superexec",
        "flower-supernode",
        "flwr-serverapp",
        "flwr-clientapp",
    ):
        script = (Path(sys.executable).parent / name).read_text().splitlines()
        (place / "bin" / name).write_text("\n".join([f"#!{place}/bin/python", *script[1:]]) + "\n")
        (place / "bin" / name).chmod(0o755)
    words = ["compare", "--methods", "local,fedper", "--seeds", "1", "run.rounds=2", "partition.clients=4"]
    words += ["--engine", engine, "--workers", "1", "--quiet", "--out", "out"]
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    (tmp_path / "empty").mkdir()
    done = subprocess.run(
        [str(place / "bin" / "python"), "-m", "meadow", *words],
        cwd=tmp_path / "empty", env=kept, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "OPENED" not in done.stderr
    assert (tmp_path / "empty" / "out" / "report.html").exists()
    logs = [path.read_text() for path in (tmp_path / "empty" / "out").rglob("*.log")]
    assert not any("OPENED" in text for text in logs)
