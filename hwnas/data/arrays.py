"""Arrays of the user's own: one .npz file with training and test images."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hwnas.data.checks import check_place, checked, divided, paired, reason, taken
from hwnas.data.pictures import check_memory, resized
from hwnas.data.splits import Images, Splits
from quant.errors import InvalidInput

NAMES = ("x_train", "y_train", "x_test", "y_test")
ACCEPTED = f"a file that numpy.savez wrote, with the arrays {', '.join(NAMES)}"


def npz(path: Path, size: int | None = None) -> Splits:
    """The splits in a .npz file of x_train, y_train, x_test, y_test.

    x is uint8 (n, height, width, 1 or 3) or (n, height, width); y is whole numbers (n,) or (n, 1),
    the classes from 0. TEST is x_test in its order; SEARCH-VAL is a sixth of each class of x_train.
    With `size`, images are brought to size x size pixels, else they must be square. Raises
    InvalidInput where the file or an array cannot be used.
    """
    arrays = _read(path)
    train_all, test = (
        paired(
            arrays[f"x_{part}"],
            arrays[f"y_{part}"],
            place=str(path),
            x_name=f"x_{part}",
            y_name=f"y_{part}",
        )
        for part in ("train", "test")
    )
    if size is not None:
        train_all, test = (_brought_to(size, path, images) for images in (train_all, test))
    train, search_val = (taken(train_all, part) for part in divided(train_all.y, (1 / 6,)))
    return checked(str(path), train, search_val, test)


def _brought_to(size: int, path: Path, images: Images) -> Images:
    what = f"{path}: {len(images):,} images of {size} x {size} x {images.x.shape[3]}"
    check_memory(what, len(images) * size * size * images.x.shape[3], size=size)
    return Images(resized(images.x, size), images.y)


def _read(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The four arrays; pickled objects are never loaded."""
    check_place(path, folder=False, accepted=ACCEPTED)
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info.file_size for info in archive.infolist()}
            _check_members(path, members)
            return {name: _array(path, archive, name) for name in NAMES}
    except (OSError, zipfile.BadZipFile) as error:
        raise InvalidInput(
            f"{path} is not a whole .npz file: {reason(error)}.", accepted=ACCEPTED
        ) from error


def _check_members(path: Path, members: dict[str, int]) -> None:
    """`members` maps what an archive holds to its bytes when unpacked."""
    missing = [name for name in NAMES if f"{name}.npy" not in members]
    if missing:
        there = ", ".join(name.removesuffix(".npy") for name in members) or "nothing"
        raise InvalidInput(
            f"{path} lacks {', '.join(missing)}; it holds {there}.", accepted=ACCEPTED
        )
    # twice: once to unpack, once more to divide
    check_memory(f"The arrays of {path}", 2 * sum(members[f"{name}.npy"] for name in NAMES))


def _array(path: Path, archive: zipfile.ZipFile, name: str) -> npt.NDArray[Any]:
    try:
        with archive.open(f"{name}.npy") as member:
            found: npt.NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
            if member.read(1):
                raise ValueError("it is longer than its header says")
    except Exception as error:  # damage shows as whatever zip or numpy stumbles over
        raise InvalidInput(
            f"{path}: {name} cannot be read: {reason(error)}.",
            accepted="whole arrays of numbers, no objects",
            next_step="write it again with numpy.savez",
        ) from error
    return found
