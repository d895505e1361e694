"""Images as uint8 tensors: decoded by Pillow, resized, and kept decoded in a memory-mapped file.

Decoding a JPEG costs milliseconds, a slice of a mapped file microseconds, and all processes of a machine share its pages.
The files lie in $MEADOW_CACHE, else in ~/.cache/meadow, and may be deleted at any time. Where there is no room for one,
or the folder cannot be written to, the images are kept in memory: the values are the same.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL
import torch
from PIL import Image
from torch import Tensor

from meadow.runtime.errors import UserError
from meadow.tasks.models.vision import torchvision

Pixels = npt.NDArray[np.uint8]

_LAYOUT = "1"  # of a kept file and of how its pixels are made: raise it when either changes
_SPARE = 2**30  # bytes that stay free on the disk beside a new file
_AT_ONCE = 64  # images that are decoded in parallel and wait in memory to be written


def decode_files(paths: Sequence[Path], where: Callable[[int], str], size: int, channels: str) -> Tensor:
    """The images of these files: uint8 (n, channels, height, width), mapped from a kept file where there is room.

    `size` > 0: resized so that the short side is `size` (bilinear with antialiasing), and the square in the middle cut
    out; 0: as they are, and all must be of one size. `channels`: "grey" (0.299 red + 0.587 green + 0.114 blue), "rgb",
    "bgr", or "": as they are, grey or red, green and blue. `where(i)` says where the i-th path comes from, in errors.
    A kept file belongs to the paths, sizes and times of change of these files, to `size` and `channels`, and to the
    version of Pillow. Raises UserError for a file that is missing or cannot be decoded, and images of different sizes.
    """
    digest = _digest(size, channels)
    for i, path in enumerate(paths):
        try:
            status = path.stat()
        except OSError:
            raise UserError(f"{where(i)}: there is no image {path}") from None
        digest.update(f"{path.absolute()}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))

    def decode(i: int) -> Pixels:
        try:
            with Image.open(paths[i]) as image:
                return pixels(image, size, channels)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise UserError(f"{where(i)}: {paths[i]} cannot be taken as an image: {error}") from None

    def differs(i: int, found: tuple[int, ...], first: tuple[int, ...]) -> UserError:
        return _differs(f"{where(i)}: {paths[i]}", found, str(paths[0]), first)

    return _kept(digest.hexdigest(), len(paths), decode, differs)


def convert_images(images: Iterable[Image.Image], where: Callable[[int], str], size: int, channels: str) -> Tensor:
    """Images that are decoded already, as `decode_files` would give them, kept in memory. Raises UserError likewise."""
    made: list[Pixels] = []
    for i, image in enumerate(images):
        try:
            made.append(pixels(image, size, channels))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{where(i)}: it cannot be taken as an image: {error}") from None
        if made[-1].shape != made[0].shape:
            raise _differs(where(i), made[-1].shape, "the first", made[0].shape)
    return torch.from_numpy(np.stack(made))


def resize_arrays(images: Pixels, size: int, channels: str) -> Tensor:
    """Images (n, 1 or 3, height, width) of one array, as `decode_files` would give them; itself if nothing changes."""
    now = "grey" if images.shape[1] == 1 else "rgb"
    if channels in ("", now) and (size == 0 or images.shape[2:] == (size, size)):
        return torch.from_numpy(np.ascontiguousarray(images))
    digest = _digest(size, channels)
    digest.update(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)

    def resize(i: int) -> Pixels:
        image = images[i, 0] if now == "grey" else images[i].transpose(1, 2, 0)
        return pixels(Image.fromarray(np.ascontiguousarray(image)), size, channels)

    def differs(i: int, found: tuple[int, ...], first: tuple[int, ...]) -> UserError:
        raise AssertionError("images of one array are of one size")

    return _kept(digest.hexdigest(), len(images), resize, differs)


def _digest(size: int, channels: str) -> "hashlib._Hash":
    return hashlib.sha256(f"{_LAYOUT}\0{PIL.__version__}\0{size}\0{channels}\n".encode())


def pixels(image: Image.Image, size: int, channels: str) -> Pixels:
    """One image as `decode_files` gives it, uint8 (channels, height, width). Raises ValueError for a colour mode that
    would lose by it."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}): store it with 8 bits a channel")
    if channels:
        image = image.convert("L" if channels == "grey" else "RGB")
    elif image.mode not in ("L", "RGB"):
        raise ValueError(
            f'it is neither grey nor of three colours (mode {image.mode}): set task.channels to "rgb" or "grey"'
        )
    if size:
        function = torchvision().transforms.v2.functional
        image = function.center_crop(function.resize(image, [size]), [size])
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.ascontiguousarray(array[::-1] if channels == "bgr" else array)


def _differs(what: str, shape: tuple[int, ...], other: str, first: tuple[int, ...]) -> UserError:
    return UserError(
        f"{what} is {_form(shape)}, but {other} is {_form(first)}: write the size that all are to have (for example "
        'task.image_size = 224), and task.channels = "rgb" or "grey"'
    )


def _form(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels (width x height) of {channels} {'channel' if channels == 1 else 'channels'}"


Differs = Callable[[int, tuple[int, ...], tuple[int, ...]], UserError]


def _kept(key: str, n: int, make: Callable[[int], Pixels], differs: Differs) -> Tensor:
    """The images make(0), ..., make(n - 1), from the kept file of this key, which is written if it is not there."""
    if n == 0:
        return torch.empty((0, 1, 1, 1), dtype=torch.uint8)
    try:
        place = _folder() / f"{key}.npy"
        found = _open(place, n)
        if found is not None:
            return torch.from_numpy(found)
        shape = (n, *make(0).shape)
        place.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(place.parent).free - int(np.prod(shape)) >= _SPARE:
            _write(place, shape, _all(n, make, differs))
            found = _open(place, n)
            if found is not None:
                return torch.from_numpy(found)
    except (OSError, RuntimeError):  # no home, no right to write, or no room after all
        pass
    shape = (n, *make(0).shape)
    images = np.empty(shape, dtype=np.uint8)
    for i, image in enumerate(_all(n, make, differs)):
        images[i] = image
    return torch.from_numpy(images)


def _folder() -> Path:
    place = os.environ.get("MEADOW_CACHE")
    return (Path(place) if place else Path.home() / ".cache" / "meadow") / "images"


def _all(n: int, make: Callable[[int], Pixels], differs: Differs) -> Iterator[Pixels]:
    """make(0), ..., make(n - 1), in order, made by all cores."""
    first: tuple[int, ...] = ()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, n, _AT_ONCE):
            stop = min(start + _AT_ONCE, n)
            for i, image in zip(range(start, stop), threads.map(make, range(start, stop)), strict=True):
                first = first or image.shape
                if image.shape != first:
                    raise differs(i, image.shape, first)
                yield image


def _open(place: Path, n: int) -> Pixels | None:
    """The kept file, mapped; None if it is not there or not whole. Writes to the array change no file: torch, which
    knows no read-only tensors, need not warn."""
    try:
        found = np.load(place, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(found, np.memmap) and found.ndim == 4 and len(found) == n and found.dtype == np.uint8
    if not whole or found.offset + found.nbytes != place.stat().st_size:
        return None
    return np.asarray(found)


def _write(place: Path, shape: tuple[int, ...], images: Iterator[Pixels]) -> None:
    """Write a .npy file, whole or not at all. By plain writes: a full disk is an error then, and no bus error."""
    handle, temporary = tempfile.mkstemp(dir=place.parent, prefix=f".{place.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for image in images:
                file.write(image.data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(place)
    except BaseException:
        with suppress(OSError):
            Path(temporary).unlink()
        raise
