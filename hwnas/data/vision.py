"""The classification data sets of torchvision, which is an optional dependency.

torchvision is imported inside `datasets` alone, by importlib: it is the one package that an
install without its extra can lack, and whose presence does not mean that it can be imported.
"""

import contextlib
import difflib
import importlib
import inspect
import operator
import os
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from hwnas.data.checks import checked, divided, reason, taken
from hwnas.data.pictures import check_memory, fit
from hwnas.data.splits import Images, Splits
from quant.errors import InvalidInput, MissingDependency

NOT_SETS = {"DatasetFolder", "ImageFolder", "VisionDataset"}
"""Classes of torchvision.datasets that other sets are made of; `folder:DIR` reads folders."""

EXAMPLES = ("CIFAR10", "FashionMNIST", "SVHN")

TRAIN_NAMES = ("train", "trainval")
TEST_NAMES = ("test", "val", "valid")
"""What data sets with an argument `split` call their splits; the first that one knows is taken."""


def torchvision(name: str, size: int) -> Splits:
    """The splits of torchvision.datasets.`name`, downloaded where needed, at size x size pixels.

    A set with a training and a test split keeps the latter as TEST, and SEARCH-VAL is a sixth of
    each class of the former; any other set is divided 70 : 15 : 15 by class. Images have one
    channel where the first has (mode L), else they are RGB. Files are kept in $HWNAS_HOME/data,
    else in ./data. Raises MissingDependency where torchvision cannot be imported; InvalidInput
    where there is no such set, it cannot be downloaded or read, or it is not one of images and
    classes.
    """
    factory = _factory(name)
    with _told(name):
        sets = _opened(name, factory)
        first, _ = _example(name, sets[0][0])
        names = tuple(map(_class_name, getattr(sets[0], "classes", ())))
    mode = "L" if first.mode == "L" else "RGB"
    count, channels = sum(map(len, sets)), len(mode)
    what = f"torchvision:{name}: {count:,} images of {size} x {size} x {channels}, and their splits"
    check_memory(what, 2 * count * size * size * channels, size=size)
    with _told(name):
        images = [_read(name, data, size, mode) for data in sets]
    if len(images) == 2:
        chosen = divided(images[0].y, (1 / 6,))
        train, search_val, test = *(taken(images[0], part) for part in chosen), images[1]
    else:
        chosen = divided(images[0].y, (0.15, 0.15))
        train, search_val, test = (taken(images[0], part) for part in chosen)
    named = len(names) == len(np.unique(images[0].y))
    return checked(f"torchvision:{name}", train, search_val, test, names if named else ())


def datasets() -> ModuleType:
    """torchvision.datasets; raises MissingDependency where it is not there or does not load."""
    try:
        return importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError, AttributeError, OSError) as error:
        # beside a torch that it was not built for, it fails with any of these
        raise MissingDependency(
            f"torchvision cannot be imported: {reason(error)}.",
            accepted=f"the build of torchvision that belongs to torch {version('torch')}",
            next_step="pip install 'hwnas[vision]'",
        ) from error


def _factory(name: str) -> type[Any]:
    module = datasets()
    known = {
        each: found
        for each in module.__all__
        if inspect.isclass(found := getattr(module, each)) and each not in NOT_SETS
    }
    if name in known:
        return known[name]
    lower = {each.lower(): each for each in known}
    close = [lower[each] for each in difflib.get_close_matches(name.lower(), lower, n=3)]
    raise InvalidInput(
        f"torchvision.datasets has no {name!r}.",
        accepted="a classification data set of it, such as " + ", ".join(close or EXAMPLES),
    )


def _opened(name: str, factory: type[Any]) -> list[Any]:
    """The training and the test set, or the only one."""
    takes = _parameters(factory)
    by = next((each for each in ("train", "split") if each in takes), "")
    home = os.environ.get("HWNAS_HOME")
    offered = {"root": str(Path(home) / "data" if home else Path("data")), "download": True}
    given = {key: value for key, value in offered.items() if key in takes}
    needed = [
        each.name
        for each in inspect.signature(factory).parameters.values()
        if each.default is each.empty
        and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        and each.name not in (*given, by)
    ]
    if needed:
        raise InvalidInput(
            f"torchvision:{name} needs {', '.join(needed)}, which --data cannot give.",
            accepted=f"a classification data set, such as {', '.join(EXAMPLES)}",
            next_step="save its images in folders, or in a .npz file",
        )
    if by == "train":
        return [factory(**given, train=train) for train in (True, False)]
    if by == "split":
        return [_named(factory, given, names) for names in (TRAIN_NAMES, TEST_NAMES)]
    return [factory(**given)]


def _parameters(factory: type[Any]) -> set[str]:
    """The names of what a class can be made with, with those that it hands on to its parents."""
    names: set[str] = set()
    for each in inspect.getmro(factory):
        own = inspect.signature(each).parameters.values()
        names.update(parameter.name for parameter in own)
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in own):
            break
    return names


def _named(factory: type[Any], given: dict[str, Any], names: tuple[str, ...]) -> Any:
    """The set with the first of the names of a split that it knows."""
    refusals = []
    for name in names:
        try:
            return factory(**given, split=name)
        except ValueError as error:
            refusals.append(error)
    raise refusals[0]


def _read(name: str, data: Any, size: int, mode: str) -> Images:
    x = np.empty((len(data), size, size, len(mode)), np.uint8)
    y = np.empty(len(data), np.int64)
    for i in range(len(data)):
        image, y[i] = _example(name, data[i])
        x[i] = np.asarray(fit(image.convert(mode), size)).reshape(x.shape[1:])
    return Images(x, y)


def _example(name: str, example: Any) -> tuple[Image.Image, int]:
    """An image and its class; raises InvalidInput where a set holds anything else."""
    try:
        image, target = example
        number = operator.index(target)
    except (TypeError, ValueError):
        image, number = None, 0
    if not isinstance(image, Image.Image):
        raise InvalidInput(
            f"torchvision:{name} is not a set of images and their classes.",
            accepted=f"a classification data set, such as {', '.join(EXAMPLES)}",
        )
    return image, number


def _class_name(name: Any) -> str:
    """A class's name; ImageNet gives each a tuple of them."""
    return str(name[0]) if isinstance(name, tuple) else str(name)


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Turn whatever a data set raises into one sentence, and keep standard output for results."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except InvalidInput:
        raise
    except ImportError as error:
        raise MissingDependency(
            f"torchvision:{name} needs another package: {reason(error)}.",
            next_step="install that package",
        ) from error
    except Exception as error:  # each set fetches and parses in its own way
        raise InvalidInput(
            f"torchvision:{name} could not be fetched and read: {reason(error)}.",
            next_step="check the connection and run the same command again, or put its files where "
            "torchvision looks for them: in $HWNAS_HOME/data, else in ./data",
        ) from error
