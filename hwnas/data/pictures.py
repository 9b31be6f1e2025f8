"""Pictures of any size as bytes (n, size, size, channels), and whether memory will hold them."""

import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from hwnas.data.checks import reason
from hwnas.data.splits import Bytes
from quant.errors import InvalidInput

MEMORY = Path("/proc/meminfo")

CHUNK = 64
"""How many pictures a thread takes at a time."""

WIDE_MODES = ("I", "F")
"""Pillow's modes with more than 8 bits a channel begin so; converting them to RGB would clip."""


def check_memory(what: str, needed: int, *, size: int | None = None) -> None:
    """Raise InvalidInput where `needed` bytes are more than the machine has available.

    `what` is the sentence's subject, in the plural; `size` is the side of the images, where a
    smaller one would help. Where the system does not tell what is available, nothing is refused.
    """
    available = _available()
    if available is None or needed <= available:
        return
    advice = "use fewer images, or a machine with more memory"
    if size is not None:
        fits = int(size * math.sqrt(available / needed))
        advice = f"use fewer images, or a smaller --image-size{f': {fits} fits' if fits else ''}"
    raise InvalidInput(
        f"{what} need {needed / 1e9:.3g} GB of memory; {available / 1e9:.3g} GB are available.",
        next_step=advice,
    )


def _available() -> int | None:
    """Bytes that a process can still use; None where the system does not say."""
    try:
        lines = MEMORY.read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))
    except (OSError, StopIteration):
        return None


def fit(image: Image.Image, size: int) -> Image.Image:
    """The picture with its shorter side resized to `size` (Lanczos), its centre size x size.

    One that already is size x size keeps every pixel.
    """
    side = min(image.size)
    left, top = ((whole - side) // 2 for whole in image.size)
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.LANCZOS, box=box)


def resized(x: Bytes, size: int) -> Bytes:
    """Images (n, height, width, 1 or 3), each brought to size x size as `fit` does."""
    if x.shape[1:3] == (size, size):
        return x
    count, _, _, channels = x.shape
    flat = x[..., 0] if channels == 1 else x
    return _filled(count, size, channels, lambda i: fit(Image.fromarray(flat[i]), size))


def decoded(paths: Sequence[Path], size: int) -> Bytes:
    """The pictures in files, in their order, as RGB bytes (n, size, size, 3).

    Raises InvalidInput with the name of a file that is not a readable image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        return _filled(len(paths), size, 3, lambda i: decode(paths[i], size))


def decode(path: Path, size: int) -> Image.Image:
    """One picture in RGB, upright as its camera says, brought to size x size by `fit`.

    Of several frames it is the first; transparency is dropped. Raises InvalidInput where it is not
    a readable image.
    """
    try:
        with Image.open(path) as image:
            # A JPEG decoder can halve a large picture cheaply; twice the size is left to resize.
            image.draft(None, (2 * size, 2 * size))
            if image.mode.startswith(WIDE_MODES):
                raise ValueError(f"its pixels are not bytes (mode {image.mode})")
            return fit(ImageOps.exif_transpose(image).convert("RGB"), size)
    except Exception as error:  # a decoder raises whatever its format's damage leads to
        raise InvalidInput(
            f"{path} is not a readable image: {reason(error)}.", next_step="remove it or replace it"
        ) from error


def _filled(count: int, size: int, channels: int, picture: Callable[[int], Image.Image]) -> Bytes:
    """Pictures 0 to count - 1, size x size, each put in its place by a small pool of threads."""
    x = np.empty((count, size, size, channels), np.uint8)

    def fill(start: int) -> None:
        for i in range(start, min(start + CHUNK, count)):
            x[i] = np.asarray(picture(i)).reshape(x.shape[1:])

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for _ in pool.map(fill, range(0, count, CHUNK)):
            pass
    return x
