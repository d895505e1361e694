"""Hostile inputs to the command: files and arguments that once ended it with a traceback, hung it or took all memory.

Each must end within seconds, without a traceback, with exit status 0, 2 or 3. `inputs` yields them at random: what is wrong
with an input is drawn from its family's list, and so is the place where it is wrong.
"""

import functools
import gzip
import io
import json
import lzma
import os
import random
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from meadow.config.load import flatten, to_tree
from meadow.config.schema import Experiment

Random = random.Random
Files = dict[str, bytes | Path]
Made = tuple[list[str], Files]


@dataclass(frozen=True)
class Hostile:
    """An input of a family: what follows `meadow`, and the content of files by name; a path is a link to it."""

    family: str
    argv: list[str]
    files: Files

    def write(self, folder: Path) -> None:
        """Make the files in an empty folder, in which the command is to run; beside them a pipe, a loop and 64 GiB."""
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")
        with (folder / "huge").open("wb") as file:
            file.truncate(2**36)  # a hole
        for name, content in self.files.items():
            place = folder / name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(content) if isinstance(content, Path) else place.write_bytes(content)


def inputs(count: int, seed: int) -> Iterator[Hostile]:
    """`count` inputs, the families in turn; a function of the seed."""
    names = list(FAMILIES)
    for number in range(count):
        draw = Random(f"{seed} {number}")
        family = names[number % len(names)]
        yield Hostile(family, *FAMILIES[family](draw))


SETTINGS = dict(flatten(to_tree(Experiment())))
SMALL = ["run.rounds=1", "local.epochs=1", "partition.clients=2", "partition.law=iid"]
RUN = ["run", "--engine", "inline", "--quiet"]
COMMANDS = [["show"], ["plan"], ["audit"], ["show", "--split"], [*RUN, "--out", "o"]]
# fmt: off
TABLES = ["train.csv", "train.tsv", "train.jsonl", "train.csv.gz", "train.csv.xz", "train.jsonl.gz", "train.jsonl.xz"]
DEVICES = ["/dev/zero", "/dev/null", "/dev/full", "/proc/self/mem", "/proc/self/environ", "pipe", ".", "loop", "huge"]
NAMES = ["a" * 300, "a/../b", "x\n\x1b[2J", "\udcff", "~nobody", "~", "$HOME", "a" * 5000, "//", "..", " ", "\u00e9" * 130]
NUMBERS = ["0", "-1", "1e9", "1000000000", "9" * 19, "9" * 300, "9" * 5000, "1e308", "-1e-308", "5e-324", "inf", "nan"]
VALUES = [
    *NUMBERS, *NAMES, *DEVICES, "", "true", "''", '"', "[" * 500, "[]", "{}", "[[1]]", "{a=1}", "a:b", "0x" + "f" * 99,
    ",".join("abc") * 900, "1979-05-27", "file /dev/zero", "file pipe", "uniform 1 1e308", "choice " + "1 " * 900, "mlp,",
    "a.b:c", "last:" + "9" * 3000, "crop 1e9", "class 1000000000", "trunk.*", "*" * 300, "\\", "%s{0}[bold]", "\0",
]
CELLS = [*NUMBERS, "", "\0", '"', "x\n", "a|b", "|" * 9999, "\x1b[2J", "word " * 9999, "\ufeff", "\ud800", "\u00e9", "1e999"]
TEXTS = [
    "", "\n", ",\n", "\0" * 100, "a,b\n1,2,3\n", 'a,b\n"1,2\n', "a,a\n1,2\n", "a" * 10**6, "a," * 10**5 + "b\n",
    "a," * 10**4 + "b\n" + "1," * 10**4 + "2\n", '{"a":' * 500 + "1" + "}" * 500,
    '{"a":' + "[" * 500 + "]" * 500 + ',"b":1}',
    '{"a":' + "[" * 10**5, '{"a":' + "9" * 5000 + ',"b":1}', '{"a":{"b":1}}', "[1]", "1", "null", '"\\ud800"',
]
JSON: list[Any] = [
    None, True, -1, 0, 1e308, 10**4000, "", "\x1b[2J", "\ud800", "a" * 10**5, [], [1], {}, {"a": 1}, [[]], [{}],
]


def _overrides(draw: Random) -> Made:
    given = [f"{draw.choice(list(SETTINGS))}={draw.choice(VALUES)}" for _ in range(draw.choice([1, 1, 2]))]
    odd = ["=", "a=1", "run.name", "a.b.c=1", ".=1", ".".join("a" * 50_000) + "=1", "run=1", "run.=1", "run.\n=1", "--=1"]
    return [*draw.choice(COMMANDS[:3]), "fedavg", *SMALL, *given, *draw.sample(odd, draw.choice([0, 0, 1]))], {}


def _toml(draw: Random) -> Made:
    key, value = draw.choice(list(SETTINGS)), draw.choice(VALUES)
    section, name = key.split(".")
    begin = f"[{section}]\n{name} = "
    texts = [
        *(begin + one for one in (value, json.dumps(value), "[" * 90 + "]" * 90, "[" + "'x',\n" * 9000 + "]")),
        *(f"{section} = {json.dumps(value)}", f"[[{section}]]\n{name} = 1", f"[{key}]\na = 1", f"{key} = [1]"),
        *(begin + "{" + "a." * draw.choice([9, 1900]) + "c=1}", ".".join("a" * draw.choice([50, 1900, 50_000])) + " = 1"),
        *("a = " + "[" * draw.choice([90, 300, 1900]), "a = " + "{a=" * 300, "[run" * 500, "x = 9999-99-99", '"" = 1', "\r"),
        *("".join(f"[a{i}]\n" for i in range(9000)), "".join(f"run.k{i}=1\n" for i in range(5000)), "[run]\n" * 2, "\0"),
    ]
    text = draw.choice(texts).encode(errors="surrogateescape")
    if draw.random() < 0.2:
        text = b"\xff" + text * draw.choice([1, 5000])
    return [*draw.choice(COMMANDS[:2]), "e.toml"], {"e.toml": text}


def _paths(draw: Random) -> Made:
    place = draw.choice([*DEVICES, *NAMES])
    data = ["task.root=.", "task.targets=b"]
    dataset = f"task.dataset={draw.choice(['arrays', 'tabular', 'ImageFolder', 'text', 'MNIST', 'CIFAR10'])}"
    setting, *more = draw.choice([
        ("cohort.schedule", "cohort.sampling=schedule"), ("anchor.teacher", "anchor.kl=0.5"), ("task.pretrained",),
        ("privacy.budgets", "privacy.unit=example", "privacy.sample_rate=0.1"), ("task.root", dataset),
        ("task.vocabulary", "task.dataset=text", "task.tokens=words", "task.model=bilstm", *data),
        ("task.public", "task.dataset=tabular", "task.inputs=a scaled", *data), ("task.train", dataset, *data),
        ("adapt.root", "adapt.method=mmd", "adapt.dataset=arrays"),
    ])
    given = ["fedavg", *SMALL, *more, f"{setting}={'file ' * (setting == 'privacy.budgets')}{place}"]
    argv = draw.choice([
        *(["plan", *given], [*RUN, *given, "--out", "o"], ["show", place], ["plan", place], ["report", place]),
        *([*RUN, "fedavg", *SMALL, "--out", place], [*RUN, "fedavg", *SMALL, "--resume", "--out", place]),
        *(["show", "fedavg", "--split", "--out", place], ["deal", "fedavg", "--out", place], ["compare", place]),
        *(["compare", "--methods", place], ["sweep", "fedavg", *SMALL, "--engine", "inline", f"run.name={place},b"]),
    ])
    return argv, {"train.csv": b"a,b,text\n" + b"1,2,x\n3,4,y\n" * 30}


def _npz(draw: Random) -> Made:
    good, kind = _npy(np.arange(240.0).reshape(60, 4)), draw.choice(["<f8", "|O", "<U9", "|V8", "?"])
    shapes = ["(1000000000000, 4)", "(-1, 4)", f"({2**63}, 2)", "(0, 4)", "()", "(60,)", "(60, 4, 1)", "(1, 60)", "((", "x"]
    members: list[bytes] = [
        *(b"", b"no array", good[: draw.randrange(len(good))], good[:10] + b"{" * 118 + good[128:], bytes(10**8)),
        *(_head(draw.choice(shapes), kind) + bytes(1920), b"\x93NUMPY\x09\x00" + good[8:]),
        _head("(100000000, 1)", "|b1") + bytes(10**8),
        *(_npy(np.full((60, 4), value)) for value in (np.nan, 1e300, "a", 1j, np.datetime64(1, "s"), np.uint64(2**64 - 1))),
    ]
    names = draw.choice([["x", "b"], ["x_train", "b_train", "x_test", "b_test"], ["b"], ["../x", "b"], ["x", "b", "c"]])
    bad, content = draw.choice(names), io.BytesIO()
    with zipfile.ZipFile(content, "w", draw.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_STORED])) as file:
        for name in names:
            usual = _npy(np.arange(60) % 3) if "b" in name else good
            file.writestr(zipfile.ZipInfo(f"{name}.npy"), draw.choice(members) if name == bad else usual, file.compression)
    return _data(draw, "arrays", "task.targets=b"), {"data/train.npz": _damaged(draw, content.getvalue())}


def _tables(draw: Random) -> Made:
    name, text = draw.choice(TABLES), draw.choice(TEXTS).encode("utf-8", "surrogatepass")
    if draw.random() < 0.7:
        rows = [{"a": str(i % 7), "b": str(i % 3), "text": f"word {i}"} for i in range(60)]
        rows[draw.randrange(60)][draw.choice(["a", "b", "text"])] = draw.choice(CELLS)
        cells = [["a", "b", "text"], *(list(row.values()) for row in rows)]
        lines = map(json.dumps, rows) if ".jsonl" in name else map(("\t" if ".tsv" in name else ",").join, cells)
        text = "\n".join(lines).encode("utf-8", "surrogatepass")
    elif draw.random() < 0.2:
        text = draw.choice([b"a,b\n1,2\n", b"\n" * 9, b'{"a":1,"b":2}\n', b"a" * 9]) * 10**draw.choice([5, 6, 7])
        name = f"train{draw.choice(['.csv', '.jsonl'])}{draw.choice(['.gz', '.xz'])}"
    packed = gzip.compress(text, 1, mtime=0) if name.endswith(".gz") else lzma.compress(text, preset=0)
    raw = _damaged(draw, packed if name.endswith((".gz", ".xz")) else text)
    kind = draw.choice(["tabular", "text", "characters", "image-table"])
    column = draw.choice(["a", "text", "a category", "text category", "a scaled", "a mean 0 std 0", "a among x y", '"'])
    settings = [f"task.inputs={column if kind == 'tabular' else 'text'}", f"task.length={draw.choice([1, 10**4, 10**9])}"]
    settings += [f"task.targets={'next' if kind == 'characters' else draw.choice('ab')}", "task.public=train"]
    settings += [f"task.model={draw.choice(['bilstm', 'charlstm'])}"] if kind in ("text", "characters") else []
    return _data(draw, kind, *settings), {f"data/{name}": raw}


def _images(draw: Random) -> Made:
    sizes = [(2**31 - 1, 2**31 - 1), (30000, 30000), (9000, 7000), (0, 0), (8, 9), (1, 1)]
    links: list[bytes | Path] = [Path(name) for name in ("/dev/zero", ".", "../../pipe", "x.png")]
    bad = draw.choice([*links, *(_png(*size) for size in sizes), b"", b"GIF89a"])
    files: Files = {f"data/{name}/{i}.png": _png(8, 8) for name in "ab" for i in range(20)}
    place = draw.choice(["a/x.png", "a/x.jpg", "b/x.webp", "a/x.tiff", "a/x.pgm", "c/x.png"])
    files[f"data/{place}"] = _damaged(draw, bad) if isinstance(bad, bytes) else bad
    size, channels = draw.choice([0, 1, 8, 64, 5000, 10**9]), draw.choice(["", "grey", "rgb"])
    settings = ["task.targets=label", f"task.image_size={size}", f"task.channels={channels}"]
    return _data(draw, "ImageFolder", *settings), files


def _runs(draw: Random) -> Made:
    files = dict(_finished())
    if draw.random() < 0.3:
        del files["summary.json"]
    name = draw.choice(list(files))
    raw, device = files[name], draw.choice([None] * 9 + ["/dev/zero", "../pipe", ".", name.rpartition("/")[2]])
    if name.endswith((".json", ".jsonl")) and draw.random() < 0.8:
        values = [json.loads(line) for line in ([raw] if name.endswith(".json") else raw.splitlines())]
        at = draw.randrange(len(values))
        values[at] = _changed(draw, values[at])
        raw = "\n".join(map(json.dumps, values)).encode() + b"\n"
    else:
        raw = draw.choice([_damaged(draw, raw), raw[:9], b"\0" * 99, b"[" * 10**5, draw.choice(TEXTS).encode()])

    made: Files = {f"run/{each}": content for each, content in files.items()}
    made[f"run/{name}"] = Path(device) if device else raw
    experiment = "run/experiment.toml"
    resume = [*RUN, experiment, "--resume", "--out", "run"]
    return draw.choice([["report", "run"], ["report", "."], resume, resume, ["plan", experiment]]), made


FAMILIES = {maker.__name__[1:]: maker for maker in (_overrides, _toml, _paths, _npz, _tables, _images, _runs)}
# fmt: on


def _data(draw: Random, kind: str, *settings: str) -> list[str]:
    command = draw.choice(COMMANDS[1:2] + COMMANDS[3:])
    return [*command, "fedavg", *SMALL, f"task.dataset={kind}", "task.root=data", "partition.min_size=3", *settings]


def _damaged(draw: Random, raw: bytes) -> bytes:
    """The bytes as they are, cut short, or with some of them changed."""
    if draw.random() < 0.6 or not raw:
        return raw
    result = bytearray(raw if draw.random() < 0.7 else raw[: draw.randrange(1, len(raw) + 1)])
    for _ in range(draw.choice([1, 3, 20])):
        result[draw.randrange(len(result))] = draw.randrange(256)
    return bytes(result)


def _changed(draw: Random, value: Any) -> Any:
    """A JSON value with one value in it, at a random place, replaced or removed."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(JSON)
    key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if draw.random() < 0.15:
        del value[key]
    else:
        value[key] = _changed(draw, value[key])
    return value


def _npy(array: npt.NDArray[Any]) -> bytes:
    content = io.BytesIO()
    np.save(content, array)
    return content.getvalue()


def _head(shape: str, kind: str) -> bytes:
    text = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode()


@functools.cache
def _png(width: int, height: int) -> bytes:
    """A black image, of few bytes; beyond 10^8 pixels without most of its rows."""
    rows = zlib.compress(bytes(min((width + 1) * height, 10**8)), 9)
    parts = ((b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", rows), (b"IEND", b""))
    chunks = (struct.pack(">I", len(d)) + name + d + struct.pack(">I", zlib.crc32(name + d)) for name, d in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


@functools.cache
def _finished() -> dict[str, bytes]:
    """The files of a small run, by their paths in its folder."""
    from meadow.experiments import api

    folder = Path(tempfile.mkdtemp())
    small: dict[str, Any] = {
        "run.rounds": 2,
        "partition.clients": 3,
        "engine.name": "inline",
        "local.epochs": 1,
        "task.hidden": 4,
    }
    api.run("fedper", out=folder / "run", **small)
    files = {str(p.relative_to(folder / "run")): p.read_bytes() for p in (folder / "run").rglob("*") if p.is_file()}
    shutil.rmtree(folder)
    return {name: content for name, content in files.items() if not name.startswith(("report", "."))}
