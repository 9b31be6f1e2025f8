"""The spaces that `--space` names, and spaces of the user's own."""

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path

from hwnas.spaces.base import SearchSpace
from hwnas.spaces.mobile import mobile_tiny
from quant.errors import InvalidInput

SpaceFactory = Callable[..., SearchSpace]
"""Called with classes, image_channels and size of the data; returns the space."""

SPACES: dict[str, SpaceFactory] = {"mobile-tiny": mobile_tiny}


def load_space(name: str, *, classes: int, image_channels: int, size: int) -> SearchSpace:
    """The space of a name, or of `path.py:function`, for images of a data set."""
    factory = SPACES.get(name) or _own(name)
    return factory(classes=classes, image_channels=image_channels, size=size)


def _own(name: str) -> SpaceFactory:
    place, _, attribute = name.rpartition(":")
    path = Path(place)
    if not place.endswith(".py") or not attribute:
        raise InvalidInput(
            f"--space is {name!r}.", accepted=f"{', '.join(SPACES)}, or path.py:function"
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InvalidInput(f"--space names {place}, which is not there.")
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise InvalidInput(f"{place} cannot be loaded: {type(error).__name__}: {error}.") from error
    factory: SpaceFactory | None = getattr(module, attribute, None)
    if not callable(factory):
        raise InvalidInput(f"{place} has no {attribute!r}.", accepted="a function in that file")
    return factory
