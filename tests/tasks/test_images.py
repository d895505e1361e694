"""Images: the formats that users have, what is said when something is wrong, kept decoded files, and pipelines."""

import csv
import fcntl
import hashlib
import lzma
import math
import os
import pickle
import re
import shutil
import struct
import threading
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from helpers.refusals import refused
from helpers.rounding import close
from meadow.client.loop.training import Training, train
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.runtime.seeds import torch_seeded
from meadow.strategies.check import load
from meadow.tasks.data import Data, Dataset
from meadow.tasks.models.multihead import inputs
from meadow.tasks.models.vision import torchvision
from meadow.tasks.pipeline import image_pipeline
from meadow.tasks.readers.datasets import open_dataset
from meadow.tasks.readers.decoding import decode_files
from meadow.tasks.task import open_task

REAL = os.environ.get("MEADOW_DATA", "")
needs_data = pytest.mark.skipif(not REAL, reason="set MEADOW_DATA to the folder of real data")
Pixels = np.ndarray


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEADOW_CACHE", str(tmp_path / "cache"))


def draw(shape: tuple[int, ...], seed: int = 0, high: int = 256) -> Pixels:
    return np.random.Generator(np.random.Philox(seed)).integers(high, size=shape, dtype=np.uint8)


def write_idx(path: Path, array: Pixels) -> None:
    """LeCun's format: two zero bytes, 8 for uint8, the number of dimensions, each as a big-endian int32, the bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def write_mnist(root: Path, name: str, n: int = 12, prefix: str = "", test: str = "t10k") -> dict[str, Pixels]:
    made = {}
    for part, count in (("train", n), (test, n // 2)):
        made[part] = draw((count, 28, 28), seed=count)
        write_idx(root / name / "raw" / f"{prefix}{part}-images-idx3-ubyte", made[part])
        write_idx(root / name / "raw" / f"{prefix}{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    return made


def write_png(path: Path, pixels: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_table(root: Path, name: str, rows: list[list[str]]) -> None:
    with (root / name).open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def an_image_table(root: Path) -> None:
    """Four images of one size, with a class, a value with a gap, names of labels and a client."""
    for i in range(4):
        write_png(root / "pictures" / f"{i}.png", draw((6, 8, 3), seed=i))
    write_table(root, "train.csv", [
        ["image", "grade", "age", "signs", "clinic"],
        ["pictures/0.png", "mild", "61.5", "red|dry", "north"],
        ["pictures/1.png", "none", "", "", "south"],
        ["pictures/2.png", "none", "40", "red", "north"],
    ])  # fmt: skip
    write_table(root, "test.csv", [["image", "grade", "age", "signs"], ["pictures/3.png", "mild", "7", "dry"]])


def table(root: Path, **settings: Any) -> Dataset:
    return open_dataset(Task(**{"dataset": "image-table", "root": str(root), "targets": ("grade",), **settings}))


def named(root: Path, name: str, **settings: Any) -> Dataset:
    return open_dataset(Task(**{"dataset": name, "root": str(root), "targets": ("label",), **settings}))


# torchvision's data sets by name


@pytest.mark.parametrize("name", ["MNIST", "FashionMNIST"])
def test_idx_files_are_read_as_they_are(tmp_path: Path, name: str) -> None:
    made = write_mnist(tmp_path, name)
    data = named(tmp_path, name)
    assert data.images and data.train.x.dtype == torch.uint8 and data.train.x.shape == (12, 1, 28, 28)
    assert np.array_equal(data.train.x[:, 0], made["train"]) and np.array_equal(data.test.x[:, 0], made["t10k"])
    assert data.train.y["label"].tolist() == [*range(10), 0, 1] and data.train.y["label"].dtype == torch.int64
    (label,) = data.targets
    assert (label.kind, label.size) == ("class", 10)  # though the test set has six of them


def test_emnist_is_balanced_unless_another_split_is_named(tmp_path: Path) -> None:
    balanced = write_mnist(tmp_path, "EMNIST", 8, "emnist-balanced-", "test")
    for part, labels in (("train", [1, 26, 3]), ("test", [2])):
        write_idx(tmp_path / "EMNIST/raw" / f"emnist-letters-{part}-images-idx3-ubyte", draw((len(labels), 28, 28)))
        write_idx(
            tmp_path / "EMNIST/raw" / f"emnist-letters-{part}-labels-idx1-ubyte", np.array(labels, dtype=np.uint8)
        )
    data = named(tmp_path, "EMNIST")
    assert np.array_equal(data.train.x[:, 0], balanced["train"]) and data.targets[0].size == 47
    letters = named(tmp_path, "EMNIST:letters")
    assert letters.train.y["label"].tolist() == [0, 25, 2] and letters.targets[0].size == 26
    with refused("EMNIST", "letters"):
        named(tmp_path, "EMNIST:leters")
    with refused("EMNIST"):
        named(tmp_path, "MNIST:letters")


@pytest.mark.parametrize(("name", "key", "classes"), [("CIFAR10", "labels", 10), ("CIFAR100", "fine_labels", 100)])
def test_cifar_batches_hold_red_green_and_blue_planes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, key: str, classes: int
) -> None:
    create = getattr(torchvision().datasets, name)
    batches = [(file, 4) for file, _ in create.train_list] + [(file, 3) for file, _ in create.test_list]
    folder, sums, planes = tmp_path / create.base_folder, {}, {}
    folder.mkdir()
    names = [str(c) for c in range(classes)]
    for number, (file, count) in enumerate([*batches, (create.meta["filename"], 0)]):
        if count:
            planes[file] = draw((count, 3072), seed=number)
        entry = {"data": planes.get(file), key: [classes - 1 - i for i in range(count)], create.meta["key"]: names}
        (folder / file).write_bytes(pickle.dumps(entry))
        sums[file] = hashlib.md5((folder / file).read_bytes()).hexdigest()
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(create, part, [[file, sums[file]] for file, _ in getattr(create, part)])
    monkeypatch.setattr(create, "meta", create.meta | {"md5": sums[create.meta["filename"]]})
    data = named(tmp_path, name)
    expected = np.concatenate([planes[file] for file, _ in create.train_list])
    assert np.array_equal(data.train.x.flatten(1), expected) and data.train.x.shape[1:] == (3, 32, 32)
    assert data.test.y["label"].tolist() == [classes - 1, classes - 2, classes - 3] and data.targets[0].size == classes
    (folder / batches[0][0]).write_bytes(b"not what was published")  # torchvision unpickles nothing else
    with refused(create.base_folder):
        named(tmp_path, name, image_size=8)


def test_svhn_s_ten_is_a_nought(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create, images = torchvision().datasets.SVHN, {}
    files = {part: [url, file, None] for part, (url, file, _) in create.split_list.items()}
    for part, count in (("train", 3), ("test", 2)):
        images[part] = draw((32, 32, 3, count), seed=count)
        savemat(tmp_path / files[part][1], {"X": images[part], "y": np.array([[10], [9], [1]][:count], dtype=np.uint8)})
    monkeypatch.setattr(create, "split_list", files)
    data = named(tmp_path, "SVHN")
    assert data.train.y["label"].tolist() == [0, 9, 1]
    assert data.train.x[1, 2, 5, 7] == images["train"][5, 7, 2, 1] and data.test.x.shape == (2, 3, 32, 32)


def test_a_missing_data_set_is_not_downloaded_unasked(tmp_path: Path) -> None:
    for name, place in (("FashionMNIST", "FashionMNIST/raw"), ("CIFAR10", "cifar-10-batches-py"), ("SVHN", "")):
        with pytest.raises(UserError) as error:
            named(tmp_path, name)
        assert str(tmp_path / place) in str(error.value) and "task.download = true" in str(error.value)
    assert not list(tmp_path.iterdir())
    with refused("task.root", "nowhere"):
        named(tmp_path / "nowhere", "MNIST")


def test_download_is_torchvision_s_and_happens_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetch(self: Any) -> None:
        asked.append(self.train)
        with (tmp_path / ".meadow-download.lock").open("w") as lock, pytest.raises(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # another process would wait
        write_mnist(tmp_path, "MNIST")

    monkeypatch.setattr(torchvision().datasets.MNIST, "download", fetch)
    assert len(named(tmp_path, "MNIST", download=True).train) == 12 and asked == [True]
    monkeypatch.setattr(
        torchvision().datasets.MNIST, "download", lambda self: (_ for _ in ()).throw(OSError("offline"))
    )
    shutil.rmtree(tmp_path / "MNIST")
    with refused("offline"):
        named(tmp_path, "MNIST", download=True, image_size=8)


def test_a_torn_idx_file_is_the_user_s_to_mend(tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST")
    file = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with refused("MNIST/raw"):
        named(tmp_path, "MNIST")


def test_writers_from_a_file_beside_the_data_are_the_clients(tmp_path: Path) -> None:
    write_mnist(tmp_path, "MNIST", 4)
    write_table(tmp_path, "who.csv", [["writer", "index"], ["zoe", "2"], ["ann", "0"], ["zoe", "1"], ["bob", "3"]])
    data = named(tmp_path, "MNIST", client="who.csv:writer")
    assert data.clients == ("ann", "bob", "zoe") and data.owner is not None
    assert [data.clients[i] for i in data.owner] == ["ann", "zoe", "zoe", "bob"]
    for client, why in (
        ("who.csv:pen", 'who.csv has no column "pen"; it has writer, index'),
        ("when.csv:writer", f"there is no file {tmp_path}/when.csv: write FILE:COLUMN"),
        ("writer", "write FILE:COLUMN"),
    ):
        with pytest.raises(UserError, match=re.escape(why)):
            named(tmp_path, "MNIST", client=client)
    write_table(tmp_path, "part.csv", [["index", "writer"], *([str(i), "ann"] for i in (1, 2, 3))])
    with refused("part.csv", 0, 4):
        named(tmp_path, "MNIST", client="part.csv:writer")


def test_arrays_are_resized_and_coloured_as_pillow_does(tmp_path: Path) -> None:
    made = write_mnist(tmp_path, "MNIST", 4)
    data = named(tmp_path, "MNIST", image_size=16, channels="rgb")
    for image, source in zip(data.train.x, made["train"], strict=True):
        by_hand = np.asarray(Image.fromarray(source).resize((16, 16), Image.Resampling.BILINEAR))
        assert all(np.array_equal(channel, by_hand) for channel in image)


# folders and tables


def test_an_image_folder_s_classes_are_its_sub_folders(tmp_path: Path) -> None:
    for place, seed in (
        ("train/bees/b.png", 1),
        ("train/ants/z.png", 2),
        ("train/ants/a.PNG", 3),
        ("val/bees/q.png", 4),
    ):
        write_png(tmp_path / place, draw((5, 5, 3), seed=seed))
    (tmp_path / "train/ants/notes.txt").write_text("not an image")
    data = named(tmp_path, "ImageFolder")
    assert data.targets[0].names == ("ants", "bees") and data.train.y["label"].tolist() == [0, 0, 1]
    assert [int(x[0, 0, 0]) for x in data.train.x] == [int(draw((5, 5, 3), seed=s)[0, 0, 0]) for s in (3, 2, 1)]
    assert data.test.y["label"].tolist() == [1]
    write_png(tmp_path / "exam/wasps/w.png", draw((5, 5, 3)))
    with refused("exam", "wasps", "ants, bees"):
        named(tmp_path, "ImageFolder", test="exam")
    with refused('task.test = "quiz"'):
        named(tmp_path, "ImageFolder", test="quiz")
    with pytest.raises(UserError, match=r"task.client = 'x': task.dataset = \"ImageFolder\" does not use it"):
        named(tmp_path, "ImageFolder", client="x")
    (tmp_path / "train/wasps").mkdir()
    with refused("train", "wasps"):
        named(tmp_path, "ImageFolder", image_size=4)


def test_a_plain_image_folder_has_a_share_held_out(tmp_path: Path) -> None:
    for i in range(10):
        write_png(tmp_path / ("even" if i % 2 == 0 else "odd") / f"{i}.png", np.full((2, 2), i, dtype=np.uint8))
    data = named(tmp_path, "ImageFolder", test_fraction=0.3)
    assert (len(data.train), len(data.test)) == (7, 3) and data.train.x.shape[1:] == (1, 2, 2)
    values = [x[0, 0, 0].item() for part in (data.train, data.test) for x in part.x]
    labels = [*data.train.y["label"].tolist(), *data.test.y["label"].tolist()]
    assert sorted(values) == list(range(10)) and [v % 2 for v in values] == labels


def test_a_table_beside_images_has_any_number_of_targets(tmp_path: Path) -> None:
    an_image_table(tmp_path)
    data = table(tmp_path, targets=("grade", "age", "signs"), kinds=("", "value scale 100", "labels"), client="clinic")
    assert data.train.x.shape == (3, 3, 6, 8) and data.images
    assert np.array_equal(data.train.x[1].permute(1, 2, 0), draw((6, 8, 3), seed=1))
    assert np.array_equal(data.test.x[0].permute(1, 2, 0), draw((6, 8, 3), seed=3))
    assert [t.names for t in data.targets] == [("mild", "none"), (), ("dry", "red")]
    assert data.train.y["grade"].tolist() == [0, 1, 1]
    age = data.train.y["age"]
    assert age[[0, 2]].tolist() == [61.5, 40] and age[1].isnan()
    assert data.train.y["signs"][[0, 2]].tolist() == [[1, 1], [0, 1]] and data.train.y["signs"][1].isnan().all()
    assert data.clients == ("north", "south") and data.owner is not None and data.owner.tolist() == [0, 1, 0]


def test_the_image_column_and_the_files_can_be_named(tmp_path: Path) -> None:
    an_image_table(tmp_path)
    rows = "grade,place\nmild,pictures/2.png\n\nnone,pictures/0.png\n"
    (tmp_path / "mine.csv.xz").write_bytes(lzma.compress(rows.encode("utf-8-sig")))
    with refused("mine.csv.xz", "image", "grade, place"):
        table(tmp_path, train="mine.csv.xz", test="test.csv", inputs=("image",))
    data = table(tmp_path, train="mine.csv.xz", test="mine.csv.xz", inputs=("place",))
    assert np.array_equal(data.train.x[0].permute(1, 2, 0), draw((6, 8, 3), seed=2))
    assert data.train.y["grade"].tolist() == data.test.y["grade"].tolist() == [0, 1]


def spoil_row(root: Path, text: str) -> None:
    with (root / "train.csv").open("a", newline="") as file:
        file.write(text)


WRONG: dict[str, tuple[Callable[[Path], Any], dict[str, Any], str]] = {
    "no table": (
        lambda root: (root / "train.csv").unlink(),
        {},
        r'task.train = "": ROOT has none of train.csv, .*; it has test.csv',
    ),
    "no such table": (lambda root: 0, {"test": "exam.csv"}, r'task.test = "exam.csv": ROOT has no file "exam.csv"'),
    "no such input": (
        lambda root: 0,
        {"inputs": ("imgae",)},
        r"task.inputs = \['imgae'\]: ROOT/train.csv has no column \"imgae\"; did you mean image\?; it has image, grade",
    ),
    "two inputs": (lambda root: 0, {"inputs": ("image", "age")}, r"give the one column that holds the images' paths"),
    "no such client": (
        lambda root: 0,
        {"client": "ward"},
        r'task.client = "ward": ROOT/train.csv has no column "ward"; it has image, grade, age, signs, clinic',
    ),
    "no such target": (
        lambda root: 0,
        {"targets": ("stage",)},
        r'no target "stage".*; it has grade, age, signs, clinic',
    ),
    "ragged row": (
        lambda root: spoil_row(root, '\n"pictures/0.png",mild,1\n'),
        {},
        "ROOT/train.csv, line 6: it has 3 cells, but the header has 5: image, grade, age, signs, clinic",
    ),
    "row after a cell of two lines": (
        lambda root: spoil_row(root, '"pictures/0.png",mild,1,"red\n|dry",north\nx.png,mild,1,red,north\n'),
        {},
        r'ROOT/train.csv, line 7, column "image": there is no image ROOT/x.png',
    ),
    "open quote": (
        lambda root: spoil_row(root, '"pictures/0.png'),
        {},
        "ROOT/train.csv, line 5: unexpected end of data",
    ),
    "no path": (
        lambda root: spoil_row(root, " ,mild,1,red,north\n"),
        {},
        r'ROOT/train.csv, line 5, column "image": this cell is empty; expected the path of an image',
    ),
    "double name": (
        lambda root: write_table(root, "train.csv", [["image", "grade", "grade"], ["pictures/0.png", "a", "b"]]),
        {},
        r"ROOT/train.csv, line 1: the header .* has an empty or repeated name",
    ),
    "empty file": (
        lambda root: (root / "train.csv").write_text(""),
        {},
        r"ROOT/train.csv: it has no rows",
    ),
    "not UTF-8": (
        lambda root: (root / "train.csv").write_bytes(b"image,grade\npictures/0.png,\xe9t\xe9\n"),
        {},
        r"ROOT/train.csv, line 2: byte 27 is not UTF-8",
    ),
    "not xz": (
        lambda root: (root / "t.csv.xz").write_bytes(b"image,grade\n"),
        {"train": "t.csv.xz"},
        r"ROOT/t.csv.xz: the compressed file is damaged or truncated",
    ),
    "not an image": (
        lambda root: (root / "pictures/1.png").write_text("hello"),
        {},
        r'ROOT/train.csv, line 3, column "image": ROOT/pictures/1.png cannot be read as an image: cannot identify',
    ),
    "torn image": (
        lambda root: (root / "pictures/2.png").write_bytes((root / "pictures/2.png").read_bytes()[:-60]),
        {},
        r'ROOT/train.csv, line 4, column "image": ROOT/pictures/2.png cannot be read as an image',
    ),
    "of another size": (
        lambda root: write_png(root / "pictures/1.png", draw((6, 9, 3))),
        {},
        r'line 3, column "image": ROOT/pictures/1.png is 9x6 pixels \(width x height\) of 3 channels, '
        r"but ROOT/pictures/0.png is 8x6 .* task.image_size = 224",
    ),
    "of another colour": (
        lambda root: write_png(root / "pictures/1.png", draw((6, 8))),
        {},
        r'of 1 channel, but .* of 3 channels: .* task.channels = "rgb" or "grey"',
    ),
    "with transparency": (
        lambda root: write_png(root / "pictures/1.png", draw((6, 8, 4))),
        {},
        r'neither grey nor RGB \(mode RGBA\): set task.channels to "rgb" or "grey"',
    ),
    "of 16 bits": (
        lambda root: write_png(root / "pictures/1.png", draw((6, 8)).astype(np.uint16) * 257),
        {"channels": "grey"},
        r"more than 8 bits a channel \(mode I;16\)",
    ),
    "number in one, text in the other": (
        lambda root: write_table(root, "test.csv", [["image", "grade", "age"], ["pictures/3.png", "mild", "old"]]),
        {},
        r'ROOT/test.csv, line 2, column "age": "old" is not a number, .*"age" of ROOT/train.csv has only numbers',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_with_a_table_is_said_with_its_place(tmp_path: Path, case: str) -> None:
    an_image_table(tmp_path)
    spoil, settings, expected = WRONG[case]
    spoil(tmp_path)
    with pytest.raises(UserError) as error:
        table(tmp_path, **settings)
    assert re.search(expected.replace("ROOT", str(tmp_path)), str(error.value)), str(error.value)


# decoding, and kept files


def files(root: Path, sizes: list[tuple[int, int]], mode: str = "RGB") -> list[Path]:
    """JPEG files of smooth random pictures of these sizes (width, height)."""
    root.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        coarse = Image.fromarray(draw((5, 7, 3), seed=i)).convert(mode)
        coarse.resize(size, Image.Resampling.BICUBIC).save(root / f"{i}.jpg")
    return [root / f"{i}.jpg" for i in range(len(sizes))]


def test_decoding_is_torchvision_s_loader_resize_and_centre_crop(tmp_path: Path) -> None:
    paths = files(tmp_path, [(40, 30), (31, 47), (20, 20), (90, 21)])
    found = decode_files(paths, str, 24, "rgb")
    old = torchvision().transforms  # version 1, as an oracle
    expected = old.Compose([old.Resize(24), old.CenterCrop(24), old.PILToTensor()])
    loader = torchvision().datasets.folder.pil_loader
    assert torch.equal(found, torch.stack([expected(loader(str(path))) for path in paths]))
    assert torch.equal(decode_files(paths, str, 24, "bgr"), found.flip(1))


def test_grey_is_weighted_by_hand(tmp_path: Path) -> None:
    write_png(tmp_path / "a.png", np.full((3, 3, 3), (200, 100, 50), dtype=np.uint8))
    grey = decode_files([tmp_path / "a.png"], str, 0, "grey")
    assert grey.shape == (1, 1, 3, 3) and set(grey.flatten().tolist()) == {124}  # .299 200 + .587 100 + .114 50 = 124.2
    coloured = decode_files([tmp_path / "a.png"], str, 0, "")
    assert coloured[0, :, 0, 0].tolist() == [200, 100, 50]
    write_png(tmp_path / "g.png", np.full((3, 3), 77, dtype=np.uint8))
    assert decode_files([tmp_path / "g.png"], str, 0, "rgb")[0, :, 0, 0].tolist() == [77, 77, 77]


def spoil(paths: list[Path]) -> None:
    """Make files that no decoder takes of images, of the same sizes and times."""
    for path in paths:
        status = path.stat()
        path.write_bytes(bytes(status.st_size))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "images").glob("*.npy"))


def test_a_second_opening_decodes_nothing(tmp_path: Path) -> None:
    paths = files(tmp_path, [(9, 7), (8, 8), (7, 9)])
    first = decode_files(paths, str, 6, "rgb")
    spoil(paths)
    again = decode_files(paths, str, 6, "rgb")
    assert torch.equal(first, again) and len(kept(tmp_path)) == 1
    for others, size, channels in ((paths, 5, "rgb"), (paths, 6, "bgr"), (paths[:2], 6, "rgb")):
        with pytest.raises(UserError):
            decode_files(others, str, size, channels)
    # It is mapped, privately: what is written to the tensor changes no file.
    assert str(kept(tmp_path)[0]) in Path("/proc/self/maps").read_text()
    before = kept(tmp_path)[0].read_bytes()
    again.zero_()
    assert kept(tmp_path)[0].read_bytes() == before and not torch.equal(first, again)
    # A changed image is decoded anew, be it only of another time.
    os.utime(paths[1], ns=(1, 1))
    with pytest.raises(UserError):
        decode_files(paths, str, 6, "rgb")


def test_without_room_or_right_the_values_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = files(tmp_path, [(9, 7), (8, 8), (7, 9)])
    with_file = decode_files(paths, str, 6, "rgb").clone()
    kept(tmp_path)[0].unlink()
    with monkeypatch.context() as patch:
        full = shutil.disk_usage(tmp_path)._replace(free=0)
        patch.setattr(shutil, "disk_usage", lambda _: full)
        assert torch.equal(decode_files(paths, str, 6, "rgb"), with_file) and not kept(tmp_path)
    with monkeypatch.context() as patch:
        patch.setenv("MEADOW_CACHE", str(paths[0]))  # a file, so no folder can be made in it
        assert torch.equal(decode_files(paths, str, 6, "rgb"), with_file)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        assert torch.equal(decode_files(paths, str, 6, "rgb"), with_file)
        assert not list((tmp_path / "cache" / "images").iterdir())


@pytest.mark.parametrize("damage", ["short", "long", "shape", "empty", "not an array"])
def test_a_damaged_kept_file_is_made_anew(tmp_path: Path, damage: str) -> None:
    paths = files(tmp_path, [(9, 7), (8, 8), (7, 9)])
    expected = decode_files(paths, str, 6, "rgb").clone()
    (place,) = kept(tmp_path)
    whole = place.read_bytes()
    if damage == "shape":
        np.save(place, np.zeros((2, 3, 6, 6), dtype=np.uint8))
    else:
        place.write_bytes({"short": whole[:-1], "long": whole + b"0", "empty": b""}.get(damage, b"\x80" * len(whole)))
    assert torch.equal(decode_files(paths, str, 6, "rgb"), expected)
    assert place.read_bytes() == whole


def test_two_at_once_make_one_whole_file(tmp_path: Path) -> None:
    paths = files(tmp_path, [(9, 7)] * 100)
    found: list[torch.Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(decode_files(paths, str, 6, ""))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert list((tmp_path / "cache" / "images").iterdir()) == kept(tmp_path) and len(kept(tmp_path)) == 1


# pipelines


def dataset(x: torch.Tensor, images: bool = True) -> Dataset:
    data = Data(x, {})
    return Dataset("made", data, data, (), "", images=images)


def prepared(x: torch.Tensor, seed: int | None = 0, **settings: Any) -> torch.Tensor:
    """The images after the pipeline of these settings; with no seed as for evaluation."""
    pipeline = image_pipeline(dataset(x), Task(**settings))
    assert pipeline is not None
    with torch_seeded(seed or 0, "test"):
        return pipeline(x, training=seed is not None)


def random_images(n: int = 64, channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.from_numpy(draw((n, channels, side, side)))


EVERY = ("flip", "vflip", "crop 2", "resized-crop 0.5", "rotate 20", "jitter 0.3", "erase 0.5")


def test_pixels_are_scaled_and_normalised_channel_by_channel() -> None:
    x = random_images(3)
    before = x.clone()
    plain = prepared(x, None)
    assert plain.dtype == torch.float32
    close(plain, x.double() / 255, 2)
    found = prepared(x, None, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), augment=EVERY)
    for c, (mean, std) in enumerate([(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]):
        close(found[:, c], (x[:, c].double() / 255 - mean) / std, 8, terms=(1 + mean) / std)
    one = prepared(x, None, mean=(0.5,), std=(0.25,))
    close(one, (x.double() / 255 - 0.5) / 0.25, 8, terms=1.5 / 0.25)
    prepared(x, 0, mean=(0.5,), std=(0.25,), augment=EVERY)
    assert torch.equal(x, before)


def test_samples_that_are_no_images_pass_through() -> None:
    task = open_task(load("local"))
    x = task.dataset.train.x[:3]
    assert task.prepare(x, training=True) is x
    for settings in ({"augment": ("flip",)}, {"mean": (0.5,), "std": (0.5,)}):
        with refused("made", "task."):
            image_pipeline(dataset(torch.zeros(2, 3), images=False), Task(**settings))


@pytest.mark.parametrize("augment", [(spec,) for spec in EVERY] + [EVERY])
def test_the_same_seed_gives_the_same_augmentation(augment: tuple[str, ...]) -> None:
    x = random_images()
    first = prepared(x, 1, augment=augment)
    assert first.shape == x.shape and first.dtype == torch.float32
    assert torch.equal(first, prepared(x, 1, augment=augment))
    assert not torch.equal(first, prepared(x, 2, augment=augment))
    # Each sample has its own draw: equal images do not stay equal.
    same = prepared(x[:1].expand_as(x), 1, augment=augment)
    assert len({image.numpy().tobytes() for image in same}) > 1


@pytest.mark.parametrize(("spec", "axis"), [("flip", -1), ("vflip", -2)])
def test_a_flip_mirrors_half_of_the_images(spec: str, axis: int) -> None:
    x = random_images(400)
    plain, found = prepared(x, None), prepared(x, augment=(spec,))
    mirrored = (found == plain.flip(axis)).flatten(1).all(1)
    assert (mirrored | (found == plain).flatten(1).all(1)).all()
    assert abs(int(mirrored.sum()) - 200) < 33  # 3.3 deviations of a binomial of 400 halves


def test_a_crop_is_any_window_of_the_padded_image() -> None:
    x = random_images(200, side=5)
    padded = torch.nn.functional.pad(prepared(x, None), (1, 1, 1, 1))
    windows = torch.stack([padded[:, :, i : i + 5, j : j + 5] for i in range(3) for j in range(3)])
    hits = (windows == prepared(x, augment=("crop 1",))).flatten(2).all(2)
    assert (hits.sum(0) == 1).all()
    counts = hits.sum(1).double()  # even: chi-squared with 8 degrees of freedom is above 26.1 once in a thousand
    assert ((counts - 200 / 9) ** 2 / (200 / 9)).sum() < 26.1


def test_a_resized_crop_keeps_the_area_that_was_asked_for() -> None:
    """Of ramps to the right and downwards, the spread that is left is the share of width and height that was kept.

    The cut is rounded to whole pixels, and interpolation is exact but within half an (enlarged) pixel of the border.
    """
    side = 64
    ramp = torch.arange(side, dtype=torch.uint8).expand(side, side)
    x = torch.stack([ramp, ramp.T, ramp]).expand(200, 3, side, side)
    found = prepared(x, augment=("resized-crop 0.25",)) * 255
    middle = found[:, :, 16:48, 16:48]  # the slope here is that of the cut, by 64 pixels
    wide = (middle[:, 0, 0, -1] - middle[:, 0, 0, 0]) / 31
    tall = (middle[:, 1, -1, 0] - middle[:, 1, 0, 0]) / 31
    share, ratio = wide * tall, wide / tall
    rounding = 1.1 / 32  # half a pixel of 32 or more in width and in height
    assert 0.25 * (1 - rounding) < share.min() < 0.35 and 0.9 < share.max() <= 1 + 1e-4
    assert 3 / 4 * (1 - rounding) < ratio.min() < 0.8 and 1.25 < ratio.max() < 4 / 3 * (1 + rounding)


def test_a_rotation_turns_by_no_more_than_it_says() -> None:
    x = torch.zeros((200, 1, 65, 65), dtype=torch.uint8)
    x[:, :, 31:34, 55:58] = 255  # 24 pixels to the right of the middle
    found = prepared(x, augment=("rotate 30",)).double()[:, 0]
    axis = torch.arange(65, dtype=torch.float64) - 32
    mass = found.sum((1, 2))
    right, down = (found.sum(1) * axis).sum(1) / mass, (found.sum(2) * axis).sum(1) / mass
    angle = torch.rad2deg(torch.atan2(down, right))
    assert (torch.hypot(right, down) - 24).abs().max() < 0.2
    blur = math.degrees(0.2 / 24)
    assert 28 < angle.max() < 30 + blur and -30 - blur < angle.min() < -28
    assert abs(angle.mean()) < 3.3 * 30 / math.sqrt(3 * 200)  # even in -30..30


def test_jitter_scales_brightness_within_its_strength() -> None:
    """Of an even grey image, contrast and saturation have nothing to change."""
    x = torch.full((200, 3, 4, 4), 100, dtype=torch.uint8)
    found = prepared(x, augment=("jitter 0.4",)) * 255
    assert ((found.amax((1, 2, 3)) - found.amin((1, 2, 3))) < 1e-3).all()
    level = found[:, 0, 0, 0]
    assert 60 - 1e-3 < level.min() < 64 and 136 < level.max() < 140 + 1e-3


def test_jitter_draws_contrast_and_saturation_and_keeps_the_hue() -> None:
    """Of an even colour, brightness b multiplies everything; contrast c and saturation s keep its grey and multiply
    each channel's distance from it."""
    colour = torch.tensor([120, 100, 90], dtype=torch.uint8)
    x = colour[None, :, None, None].expand(400, 3, 4, 4).contiguous()
    red, green, blue = (prepared(x, augment=("jitter 0.2",)) * 255)[:, :, 0, 0].double().unbind(1)
    assert torch.allclose((red - green) / (green - blue), torch.tensor(2.0, dtype=torch.float64), rtol=1e-3)
    weights = torch.tensor([0.2989, 0.587, 0.114], dtype=torch.float64)  # torchvision's, for grey
    b = (torch.stack([red, green, blue], 1) @ weights) / (colour.double() @ weights)
    both = (green - blue) / 10 / b  # c s, and either alone is in 0.8..1.2
    assert 0.64 - 1e-3 < both.min() < 0.7 and 1.38 < both.max() < 1.44 + 1e-3
    assert 0.8 - 1e-3 < b.min() < 0.81 and 1.19 < b.max() < 1.2 + 1e-3


def test_jitter_of_images_in_blue_green_red_is_that_of_the_same_colours() -> None:
    x = random_images()
    rgb, bgr = (prepared(y, augment=("jitter 0.4",), channels=c) for y, c in ((x, "rgb"), (x.flip(1), "bgr")))
    assert torch.equal(rgb, bgr.flip(1))


def test_erased_rectangles_are_of_the_mean_colour() -> None:
    x = torch.full((200, 3, 32, 32), 255, dtype=torch.uint8)
    settings: dict[str, Any] = {"mean": (0.1, 0.2, 0.3), "std": (1.0, 1.0, 1.0)}
    found = prepared(x, augment=("erase 0.3",), **settings)
    gone = (found.abs() < 1e-6).all(1)
    assert torch.equal(
        found[~gone[:, None].expand_as(found)], prepared(x, None, **settings)[~gone[:, None].expand_as(x)]
    )
    hit = gone.any(2).any(1)
    assert abs(int(hit.sum()) - 60) < 3.3 * math.sqrt(200 * 0.3 * 0.7)
    for mask in gone[hit]:
        height, width = int(mask.any(1).sum()), int(mask.any(0).sum())
        assert int(mask.sum()) == height * width  # it is one rectangle
        assert 0.02 * 1024 - (height + width) / 2 < height * width < 0.33 * 1024 + (height + width) / 2


@pytest.mark.parametrize(
    "augment",
    [
        "flp", "flip 1", "crop", "crop 1.5", "crop inf", "crop 4 4", "rotate x", "rotate 181", "resized-crop 0",
        "jitter -0.1", "erase nan",
    ],
)  # fmt: skip
def test_an_augmentation_that_is_not_understood_is_named(augment: str) -> None:
    with pytest.raises(UserError, match=r"task.augment = \['flip', '" + re.escape(augment) + r"'\]: ."):
        image_pipeline(dataset(random_images(1)), Task(augment=("flip", augment)))


def test_means_are_one_or_one_a_channel() -> None:
    with refused("task.mean = [0.1, 0.2]", "made", 3):
        image_pipeline(dataset(random_images(1)), Task(mean=(0.1, 0.2), std=(1.0, 1.0)))


STARS = {
    "task": {
        "dataset": "stars",
        "targets": ["points", "size"],
        "model": "mlp",
        "hidden": 8,
        "augment": ["flip", "crop 2"],
    },
    "local": {"epochs": 1, "lr": 0.01},
}


def test_models_are_built_for_prepared_samples() -> None:
    task = open_task(load(STARS))
    x = task.prepare(task.client(0).train.x[:5], training=True)
    assert tuple(x.shape[1:]) == inputs(task.dataset).shape == (1, 32, 32) and x.dtype == torch.float32
    with refused("task.augment"):
        open_task(load(STARS, ["task.augment=flop"]))


def test_training_augments_by_seed_round_and_client() -> None:
    experiment, plain = load(STARS), load(STARS, ["task.augment="])

    def weights(round_: int, client: int, augmented: bool = True) -> torch.Tensor:
        setting = experiment if augmented else plain
        task = open_task(setting)
        model = task.new_model()
        train(
            model, Training(task.client(0).train.take(torch.arange(16)), round_, client, setting.local), task, setting
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    def far(a: torch.Tensor, b: torch.Tensor) -> bool:
        return float((a - b).abs().max()) > 1e-4

    assert torch.equal(weights(1, 3), weights(1, 3))
    # One batch is all of the data: without augmentation, round and client change the last bits of a sum alone.
    assert not far(weights(1, 3, False), weights(2, 3, False)) and not far(weights(1, 3, False), weights(1, 4, False))
    assert (
        far(weights(1, 3), weights(2, 3))
        and far(weights(1, 3), weights(1, 4))
        and far(weights(1, 3), weights(1, 3, False))
    )


# documents, and real data


def test_the_lines_in_the_document_are_read() -> None:
    text = (Path(__file__).parents[2] / "docs" / "data-images.md").read_text()
    fragments = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    assert len(fragments) >= 8
    for fragment in fragments:
        task = load(tomllib.loads(fragment)).task
        if task.augment or task.mean:
            image_pipeline(dataset(random_images(1)), task)
    for name in (
        "MNIST",
        "FashionMNIST",
        "EMNIST",
        "CIFAR10",
        "CIFAR100",
        "SVHN",
        "ImageFolder",
        "image-table",
        "stars",
    ):
        assert any(f'"{name}' in fragment for fragment in fragments), name


@needs_data
def test_real_mnist_has_its_writers_for_clients() -> None:
    data = named(Path(REAL), "MNIST", client="MNIST/train-writers.csv:writer")
    assert (len(data.train), len(data.test), len(data.clients)) == (60000, 10000, 539)
    # The set's own fact: LeCun's training set starts with a five, a nought and a four.
    assert data.train.y["label"][:3].tolist() == [5, 0, 4] and data.owner is not None and len(data.owner) == 60000
    assert data.clients[data.owner[0]] == "2154"


@needs_data
def test_real_fashion_mnist_has_as_many_of_each_class() -> None:
    data = named(Path(REAL), "FashionMNIST")
    assert data.train.y["label"].bincount().tolist() == [6000] * 10
    assert data.test.y["label"].bincount().tolist() == [1000] * 10
    # The known mean and deviation of its pixels: 0.2860 and 0.3530.
    pixels = data.train.x.double() / 255
    assert (round(pixels.mean().item(), 4), round(pixels.std().item(), 4)) == (0.2860, 0.3530)


@needs_data
def test_real_photographs_of_eyes_have_two_targets() -> None:
    data = table(Path(REAL) / "idrid", targets=("retinopathy_grade", "edema_risk"), image_size=32, channels="rgb")
    assert data.train.x.shape == (413, 3, 32, 32) and data.test.x.shape == (103, 3, 32, 32)
    assert [(t.kind, t.size) for t in data.targets] == [("class", 5), ("class", 3)]
    assert [int(y[0]) for y in data.train.y.values()] == [3, 2]


@needs_data
def test_real_ants_and_bees_are_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    data = named(Path(REAL) / "hymenoptera", "ImageFolder", image_size=64, channels="rgb")
    assert data.train.x.shape == (245, 3, 64, 64) and data.test.x.shape == (153, 3, 64, 64)
    assert data.targets[0].names == ("ants", "bees")
    with refused("task.image_size = 224"):
        named(Path(REAL) / "hymenoptera", "ImageFolder")
