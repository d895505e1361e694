"""Decodes and resizes images with Pillow, and caches the uint8 tensors in memory-mapped files.

Decoding a JPEG takes milliseconds, a slice of a mapped file microseconds, and all processes of a machine share its pages.
The files are in $MEADOW_CACHE, else in ~/.cache/meadow, and may be deleted at any time. If a file cannot be written, the
same images are kept in memory.
"""

import hashlib
import math
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
from meadow.runtime.limits import check_fits, opened
from meadow.tasks.models.vision import torchvision

Pixels = npt.NDArray[np.uint8]

_LAYOUT = "1"  # version of the cache files and of their pixels: increase it when either changes
_SPARE = 2**30  # bytes of disk space that a new file must leave free
_MOST_PIXELS = 2**26  # of an image: each core has one in memory, with its copies
_AT_ONCE = 64  # images decoded in parallel before they are written


def decode_files(paths: Sequence[Path], where: Callable[[int], str], size: int, channels: str) -> Tensor:
    """The images of these files: uint8 (n, channels, height, width), mapped from a cache file where possible.

    `size` > 0: resized so that the short side is `size` (bilinear with antialiasing), then centre-cropped to a square;
    0: unchanged, and all must have one size. `channels`: "grey" (0.299 red + 0.587 green + 0.114 blue), "rgb", "bgr",
    or "": unchanged, grey or RGB. `where(i)`: the location of the i-th path, for errors. The cache key: the files' paths,
    sizes and modification times, `size`, `channels`, and Pillow's version. Raises UserError for files that are missing or
    cannot be decoded, and for images of different sizes.
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
            with opened(paths[i]) as file, Image.open(file) as image:
                if image.width * image.height > _MOST_PIXELS:
                    raise ValueError(
                        f"it has {image.width}x{image.height} pixels, over {_MOST_PIXELS:,}; make it smaller"
                    )
                return pixels(image, size, channels)
        except Exception as error:  # Pillow's readers raise exceptions of many kinds for damaged files
            raise UserError(f"{where(i)}: {paths[i]} cannot be read as an image: {error}") from None

    return _cached(digest.hexdigest(), len(paths), decode, lambda i: f"{where(i)}: {paths[i]}" if i else str(paths[0]))


def convert_images(images: Iterable[Image.Image], where: Callable[[int], str], size: int, channels: str) -> Tensor:
    """Convert decoded images as `decode_files` does, in memory. Raises UserError as it does."""
    made: list[Pixels] = []
    for i, image in enumerate(images):
        try:
            made.append(pixels(image, size, channels))
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{where(i)}: it cannot be read as an image: {error}") from None
        _check_shape(where(i), made[-1].shape, "the first", made[0].shape)
    return torch.from_numpy(np.stack(made))


def resize_arrays(images: Pixels, size: int, channels: str) -> Tensor:
    """Convert images (n, 1 or 3, height, width) as `decode_files` does; the same array if nothing changes."""
    now = "grey" if images.shape[1] == 1 else "rgb"
    if channels in ("", now) and (size == 0 or images.shape[2:] == (size, size)):
        return torch.from_numpy(np.ascontiguousarray(images))
    digest = _digest(size, channels)
    digest.update(str(images.shape).encode())
    digest.update(np.ascontiguousarray(images).data)

    def resize(i: int) -> Pixels:
        image = images[i, 0] if now == "grey" else images[i].transpose(1, 2, 0)
        return pixels(Image.fromarray(np.ascontiguousarray(image)), size, channels)

    return _cached(digest.hexdigest(), len(images), resize, str)


def _digest(size: int, channels: str) -> "hashlib._Hash":
    return hashlib.sha256(f"{_LAYOUT}\0{PIL.__version__}\0{size}\0{channels}\n".encode())


def pixels(image: Image.Image, size: int, channels: str) -> Pixels:
    """Convert one image as `decode_files` does, to uint8 (channels, height, width). Raises ValueError for colour modes that
    this would degrade."""
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"it has more than 8 bits a channel (mode {image.mode}): store it with 8 bits a channel")
    if channels:
        image = image.convert("L" if channels == "grey" else "RGB")
    elif image.mode not in ("L", "RGB"):
        raise ValueError(f'it is neither grey nor RGB (mode {image.mode}): set task.channels to "rgb" or "grey"')
    if size:
        function = torchvision().transforms.v2.functional
        image = function.center_crop(function.resize(image, [size]), [size])
    array = np.asarray(image)
    array = array[None] if array.ndim == 2 else array.transpose(2, 0, 1)
    return np.ascontiguousarray(array[::-1] if channels == "bgr" else array)


def _check_shape(what: str, shape: tuple[int, ...], other: str, first: tuple[int, ...]) -> None:
    if shape != first:
        raise UserError(
            f"{what} is {_form(shape)}, but {other} is {_form(first)}: write the size that all are to have (for example "
            'task.image_size = 224), and task.channels = "rgb" or "grey"'
        )


def _form(shape: tuple[int, ...]) -> str:
    channels, height, width = shape
    return f"{width}x{height} pixels (width x height) of {channels} {'channel' if channels == 1 else 'channels'}"


def _cached(key: str, n: int, make: Callable[[int], Pixels], name: Callable[[int], str]) -> Tensor:
    """The images make(0), ..., make(n - 1), from the cache file of this key, which is written if missing.

    `name(i)`: the i-th image in an error.
    """
    if n == 0:
        return torch.empty((0, 1, 1, 1), dtype=torch.uint8)
    try:
        place = _folder() / f"{key}.npy"
        if (found := _open(place, n)) is not None:
            return torch.from_numpy(found)
        shape = (n, *make(0).shape)
        place.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(place.parent).free - math.prod(shape) >= _SPARE:
            _write(place, shape, _make_all(n, make, name))
            if (found := _open(place, n)) is not None:
                return torch.from_numpy(found)
    except (OSError, RuntimeError):  # no home folder, no write permission, or a full disk
        pass
    check_fits(f"{name(0)} and {n - 1:,} other images of its size", math.prod((n, *make(0).shape)))
    images = np.empty((n, *make(0).shape), dtype=np.uint8)
    for i, image in enumerate(_make_all(n, make, name)):
        images[i] = image
    return torch.from_numpy(images)


def _folder() -> Path:
    place = os.environ.get("MEADOW_CACHE")
    return (Path(place) if place else Path.home() / ".cache" / "meadow") / "images"


def _make_all(n: int, make: Callable[[int], Pixels], name: Callable[[int], str]) -> Iterator[Pixels]:
    """Yield make(0), ..., make(n - 1), computed on all cores."""
    first: tuple[int, ...] = ()
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for start in range(0, n, _AT_ONCE):
            stop = min(start + _AT_ONCE, n)
            for i, image in zip(range(start, stop), threads.map(make, range(start, stop)), strict=True):
                first = first or image.shape
                _check_shape(name(i), image.shape, name(0), first)
                yield image


def _open(place: Path, n: int) -> Pixels | None:
    """Map a cache file; None if it is missing or incomplete. Mapped copy-on-write, because torch warns of read-only
    arrays."""
    try:
        found = np.load(place, mmap_mode="c", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = isinstance(found, np.memmap) and found.ndim == 4 and len(found) == n and found.dtype == np.uint8
    if not whole or found.offset + found.nbytes != place.stat().st_size:
        return None
    return np.asarray(found)


def _write(place: Path, shape: tuple[int, ...], images: Iterator[Pixels]) -> None:
    """Write a .npy file atomically; with plain writes, so that a full disk is an OSError and not a bus error."""
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
