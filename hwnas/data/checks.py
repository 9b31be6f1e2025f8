"""What every data set goes through: its place, its arrays, its division and its classes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hwnas.data.splits import Images, Splits
from quant.errors import InvalidInput

LEAST_IMAGES = 30
"""Of a data set, in its three splits together."""

LEAST_TRAINING = 10
"""Of each class, in TRAIN."""

Numbers = npt.NDArray[np.int64]


def reason(error: BaseException) -> str:
    """Why something could not be read, in the words of the system or of its decoder: one line."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(words.split()).rstrip(".")


def check_place(path: Path, *, folder: bool, accepted: str) -> None:
    """Raise InvalidInput unless `path` is a folder, or a file, as the user said."""
    try:
        is_folder = path.is_dir()
        there = path.exists()
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {reason(error)}.", accepted=accepted) from error
    if not there:
        raise InvalidInput(f"{path} is not there.", accepted=accepted)
    if is_folder != folder:
        raise InvalidInput(
            f"{path} is a {'folder' if is_folder else 'file'}, not a "
            f"{'folder' if folder else 'file'}.",
            accepted=accepted,
        )


def paired(
    x: npt.NDArray[Any], y: npt.NDArray[Any], *, place: str, x_name: str, y_name: str
) -> Images:
    """A user's arrays as images: x bytes (n, height, width, 1 or 3) or (n, height, width), y whole
    numbers (n,) or (n, 1).

    `place` and the names say in an error where the arrays are from. Raises InvalidInput for
    another type or shape, or lengths that differ.
    """
    if x.dtype != np.uint8:
        how = (
            "x = (x * 255).round().astype('uint8'), where x is from 0 to 1"
            if x.dtype.kind == "f"
            else "x = x.astype('uint8'), where x is from 0 to 255"
        )
        raise InvalidInput(
            f"{place}: {x_name} holds {x.dtype}.", accepted="uint8", next_step=f"convert it: {how}"
        )
    x = x[..., None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[3] not in (1, 3) or 0 in x.shape[1:3]:
        turned = x.ndim == 4 and x.shape[1] in (1, 3)
        raise InvalidInput(
            f"{place}: {x_name} has the shape {x.shape}.",
            accepted="(images, height, width, channels) with 1 or 3 channels, "
            "or (images, height, width)",
            next_step="put the channels last: x = x.transpose(0, 2, 3, 1)" if turned else "",
        )
    y = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    if y.ndim != 1 or y.dtype.kind not in "iu":
        raise InvalidInput(
            f"{place}: {y_name} has the shape {y.shape} and holds {y.dtype}.",
            accepted="(images,), the number of each image's class as a whole number from 0",
            next_step="turn one-hot rows into numbers: y = y.argmax(1)" if y.ndim == 2 else "",
        )
    if len(x) != len(y):
        raise InvalidInput(
            f"{place}: {x_name} holds {len(x):,} images, {y_name} {len(y):,} classes.",
            accepted="one class for each image",
        )
    return Images(x, y.astype(np.int64))


def divided(y: Numbers, shares: Sequence[float], *, seed: int = 0) -> list[Numbers]:
    """Divide images by their classes y (n,): indices of the first part, then of one per share.

    Each class is divided by itself. A later part gets its share of the class's images, to the
    nearest whole number, but one at least; the first part gets the rest, and one at least before
    the others. The same y and seed give the same parts; the classes are mixed in each.

    >>> [len(part) for part in divided(np.repeat([0, 1], [60, 14]), (0.15, 0.15))]
    [52, 11, 11]
    """
    rng = np.random.default_rng(seed)
    parts: list[list[Numbers]] = [[] for _ in range(len(shares) + 1)]
    for number in np.unique(y):
        members = rng.permutation(np.flatnonzero(y == number))
        left = len(members)
        for part, share in zip(parts[1:], shares, strict=True):
            count = min(max(1, round(share * len(members))), left - 1)
            part.append(members[left - count : left])
            left -= count
        parts[0].append(members[:left])
    return [rng.permutation(np.concatenate([np.empty(0, np.int64), *part])) for part in parts]


def taken(images: Images, indices: Numbers) -> Images:
    """The images at indices (m,)."""
    return Images(images.x[indices], images.y[indices])


def checked(
    name: str, train: Images, search_val: Images, test: Images, class_names: Sequence[str] = ()
) -> Splits:
    """The splits of a data set that can be searched on.

    Raises InvalidInput where `check_classes` does, and where images differ in shape or are not
    square.
    """
    check_classes(name, train.y, search_val.y, test.y, class_names)
    shapes = sorted({images.x.shape[1:] for images in (train, search_val, test)})
    if len({channels for _, _, channels in shapes}) > 1:
        raise InvalidInput(
            f"{name} has images of 1 channel and images of 3.",
            accepted="the same number of channels in all",
        )
    if len(shapes) > 1 or shapes[0][0] != shapes[0][1]:
        sizes = " and ".join(f"{height} x {width}" for height, width, _ in shapes)
        raise InvalidInput(
            f"{name} has images of {sizes} pixels.",
            accepted="square images of one size",
            next_step="name a size to bring them to: --image-size PIXELS",
        )
    return Splits(name, train, search_val, test, class_names)


def check_classes(
    name: str, train: Numbers, search_val: Numbers, test: Numbers, class_names: Sequence[str] = ()
) -> None:
    """Raise InvalidInput unless the classes (n,) of the three splits can be learnt and told.

    That is where there are too few images, in all or of a class in TRAIN, or none in a split; where
    there is only one class; or where the classes are not 0, 1, 2, ... with images of each in TRAIN.
    """
    parts = {"TRAIN": train, "SEARCH-VAL": search_val, "TEST": test}
    enough = f"at least {LEAST_IMAGES} images, and {LEAST_TRAINING} of every class in TRAIN"
    total = sum(map(len, parts.values()))
    if total < LEAST_IMAGES:
        raise InvalidInput(f"{name} has {total} images.", accepted=enough)
    for part, y in parts.items():
        if not len(y):
            raise InvalidInput(f"{name} has no images in {part}.", accepted=enough)
    known, counts = np.unique(train, return_counts=True)
    for part, y in parts.items():
        strange = np.setdiff1d(y, known)
        if len(strange):
            raise InvalidInput(
                f"{name} has images of class {strange[0]} in {part}, but none in TRAIN.",
                accepted="the classes of TRAIN in every split",
                next_step="add images of that class to TRAIN, or leave it out",
            )
    if not np.array_equal(known, np.arange(len(known))):
        first = ", ".join(map(str, known[:5])) + (", ..." if len(known) > 5 else "")
        absent = next(i for i, number in enumerate(known) if i != number)
        gap = "" if known[0] < 0 else f", but none {absent}"
        raise InvalidInput(
            f"{name} has the classes {first}{gap}.",
            accepted="whole numbers from 0, without a gap",
            next_step="number them anew: y = numpy.searchsorted(numpy.unique(y_train), y)",
        )
    if len(known) == 1:
        raise InvalidInput(f"{name} has one class only.", accepted="at least two classes")
    fewest = int(counts.argmin())
    if counts[fewest] < LEAST_TRAINING:
        shown = repr(class_names[fewest]) if class_names else fewest
        of_class = sum(int((y == fewest).sum()) for y in parts.values())
        raise InvalidInput(
            f"{name} has {of_class} images of class {shown}, {counts[fewest]} of them in TRAIN.",
            accepted=enough,
            next_step="add images of that class, or leave it out",
        )
