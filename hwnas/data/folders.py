"""Pictures in folders: a sub-folder a class, with or without folders for the splits."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hwnas.data.checks import Numbers, check_classes, check_place, checked, divided, reason
from hwnas.data.pictures import check_memory, decoded
from hwnas.data.splits import Images, Splits
from quant.errors import InvalidInput

SUFFIXES = frozenset((".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff"))
"""Of the files that are read, in any case; other files and hidden ones are left out."""

ROLES = {"train": "train", "test": "test"} | dict.fromkeys(("val", "valid", "validation"), "val")
"""What a folder of such a name, in any case, holds where there is one for training too."""

ACCEPTED = (
    "a folder with a sub-folder a class, or with train and val or test, each with a sub-folder a "
    "class; images directly in a class's folder"
)

Listing = dict[str, list[Path]]
"""The image files of each class, classes and files in the order of their names."""


def folder(path: Path, size: int) -> Splits:
    """The splits of the pictures under a folder, each RGB and brought to size x size pixels.

    With train, val and test folders these are the splits; with train and one of them, that one is
    TEST and SEARCH-VAL is a sixth of each class of train. Else every class is divided 70 : 15 : 15.
    Beside train and val or test, other folders are left out. The classes are in the order of their
    names; each split is shuffled. Raises InvalidInput where something cannot be used.
    """
    check_place(path, folder=True, accepted=ACCEPTED)
    inside, _ = _inside(path)
    roles = _roles(path, inside)
    if roles:
        listings = {role: _listing(place) for role, place in roles.items()}
        _check_same_classes(roles, listings)
        classes = list(listings["train"])
        parts = _given(listings)
    else:
        listing = _listing(path)
        classes = list(listing)
        files, y = _flat(listing)
        parts = [(files, y, part) for part in divided(y, (0.15, 0.15))]
    y_train, y_val, y_test = (y[chosen] for _, y, chosen in parts)
    check_classes(str(path), y_train, y_val, y_test, classes)
    count = sum(len(chosen) for _, _, chosen in parts)
    what = f"{path}: {count:,} images of {size} x {size} x 3"
    check_memory(what, count * size * size * 3, size=size)
    train, search_val, test = (
        Images(decoded([files[i] for i in chosen], size), y[chosen]) for files, y, chosen in parts
    )
    return checked(str(path), train, search_val, test, classes)


Part = tuple[list[Path], Numbers, Numbers]
"""Files, their classes, and the indices of those that make up a split."""


def _given(listings: Mapping[str, Listing]) -> list[Part]:
    """TRAIN, SEARCH-VAL and TEST where there are folders for two or three of them."""
    whole = {role: _flat(listing) for role, listing in listings.items()}
    parts = {role: (files, y, divided(y, ())[0]) for role, (files, y) in whole.items()}
    if len(parts) == 3:
        return [parts["train"], parts["val"], parts["test"]]
    files, y = whole["train"]
    train, search_val = divided(y, (1 / 6,))
    return [(files, y, train), (files, y, search_val), parts.get("test") or parts["val"]]


def _flat(listing: Listing) -> tuple[list[Path], Numbers]:
    """All files, and the number of each one's class."""
    y = np.repeat(np.arange(len(listing)), [len(files) for files in listing.values()])
    return [file for files in listing.values() for file in files], y.astype(np.int64)


def _roles(path: Path, inside: Mapping[str, Path]) -> dict[str, Path]:
    """The folders of the splits; none where the sub-folders are classes."""
    found: dict[str, list[Path]] = {}
    for name, place in inside.items():
        if role := ROLES.get(name.lower()):
            found.setdefault(role, []).append(place)
    if "train" not in found or len(inside) > len(found) == 1:
        return {}
    twice = next((places for places in found.values() if len(places) > 1), None)
    if twice or len(found) == 1:
        names = " and ".join(place.name for place in twice or found["train"])
        raise InvalidInput(
            f"{path} holds {names}" + ("." if twice else " only."),
            accepted="train with val (or valid, or validation) or test or both, one folder each",
        )
    return {role: places[0] for role, places in found.items()}


def _check_same_classes(roles: Mapping[str, Path], listings: Mapping[str, Listing]) -> None:
    for role, listing in listings.items():
        for name in sorted(set(listing) ^ set(listings["train"])):
            here, there = ("train", role) if name in listings["train"] else (role, "train")
            raise InvalidInput(
                f"{roles[here] / name} has no counterpart {roles[there] / name}.",
                accepted="the same classes in every split",
                next_step="add that folder, or remove the class from the other splits",
            )


def _listing(path: Path) -> Listing:
    """The images of each class under a folder; raises InvalidInput where a class has none."""
    classes, _ = _inside(path)
    if not classes:
        raise InvalidInput(f"{path} holds no sub-folders.", accepted=ACCEPTED)
    listing = {
        name: [file for file in _inside(place)[1] if file.suffix.lower() in SUFFIXES]
        for name, place in classes.items()
    }
    for name, files in listing.items():
        if not files:
            raise InvalidInput(
                f"{classes[name]} holds no images.",
                accepted=f"files whose names end in {', '.join(sorted(SUFFIXES))}",
                next_step="add images of that class, or remove its folder",
            )
    return listing


def _inside(path: Path) -> tuple[dict[str, Path], list[Path]]:
    """The folders in a folder by name, and its files, both in order; hidden ones are left out."""
    try:
        entries = sorted(entry for entry in path.iterdir() if not entry.name.startswith("."))
        folders = {entry.name: entry for entry in entries if entry.is_dir()}
        return folders, [entry for entry in entries if entry.name not in folders]
    except OSError as error:
        raise InvalidInput(f"{path} cannot be read: {reason(error)}.") from error
