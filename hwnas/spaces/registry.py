"""The spaces that `--space` names, and spaces of the user's own."""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from hwnas.spaces.base import SearchSpace
from hwnas.spaces.mobile import mobile_224, mobile_tiny
from hwnas.spaces.resnet import resnet18, resnet34, resnet_tiny
from hwnas.spaces.shufflenet import shufflenet_224, shufflenet_tiny
from latency_tables.ops import Tensor
from quant.errors import InvalidInput
from quant.precision import Precision

SpaceFactory = Callable[..., SearchSpace]
"""Called with classes, image_channels and size of the data, and with precisions where a user names
them; returns the space. The default of `size`, where there is one, is the side in pixels to which
pictures are brought."""

SPACES: dict[str, SpaceFactory] = {
    "mobile-tiny": mobile_tiny,
    "mobile": mobile_224,
    "shufflenet-tiny": shufflenet_tiny,
    "shufflenet": shufflenet_224,
    "resnet-tiny": resnet_tiny,
    "resnet18": resnet18,
    "resnet34": resnet34,
}
"""The presets."""

DEFAULT_SIZE = 224
"""The side of pictures where a space of the user's own states none."""


def load_space(
    name: str,
    *,
    classes: int,
    image_channels: int,
    size: int,
    precisions: Sequence[str] | None = None,
) -> SearchSpace:
    """The space of a name, or of `path.py:function`, for images of a data set; `precisions` are
    what its blocks choose from, where they are not the space's own.

    Raises InvalidInput where the name is not known, the file or function not there, the function
    fails, or what it returns is no space for such images.
    """
    factory = SPACES.get(name) or _own(name)
    options = {"precisions": _known(name, factory, precisions)} if precisions else {}
    try:
        space = factory(classes=classes, image_channels=image_channels, size=size, **options)
        starts = space.input == Tensor(image_channels, size, size)
        ends = {step.op.output.elements for step in space.lattice.levels[-1].steps if step.op}
    except InvalidInput:
        raise
    except Exception as error:  # whatever a user's own function raises
        raise InvalidInput(
            f"--space {name} cannot be built for {size} x {size} images of {image_channels} "
            f"channels and {classes} classes: {type(error).__name__}: "
            f"{' '.join(str(error).split())}.",
            next_step="call the function in Python to see where, or name another --image-size",
        ) from error
    if not starts or ends != {classes}:
        raise InvalidInput(
            f"--space {name} does not lead from {image_channels} x {size} x {size} images to "
            f"{classes} classes.",
            accepted="a SearchSpace whose input is Tensor(image_channels, size, size) and whose "
            "last op puts out one value a class",
        )
    return space


def image_size(name: str) -> int:
    """The side in pixels that a space is meant for."""
    size = inspect.signature(SPACES.get(name) or _own(name)).parameters.get("size")
    return size.default if size and isinstance(size.default, int) else DEFAULT_SIZE


def _known(name: str, factory: SpaceFactory, precisions: Sequence[str]) -> tuple[str, ...]:
    """The precisions, each once; raises InvalidInput for what is none, or not for the space."""
    parameters = inspect.signature(factory).parameters.values()
    if not any(p.name == "precisions" or p.kind == p.VAR_KEYWORD for p in parameters):
        raise InvalidInput(
            f"--space {name} has precisions of its own.",
            accepted="a space whose function takes `precisions`",
            next_step="drop --precisions",
        )
    return tuple(dict.fromkeys(Precision(each).name for each in precisions))


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
        raise InvalidInput(
            f"{place} cannot be loaded: {type(error).__name__}: {' '.join(str(error).split())}."
        ) from error
    factory: SpaceFactory | None = getattr(module, attribute, None)
    if not callable(factory):
        raise InvalidInput(f"{place} has no {attribute!r}.", accepted="a function in that file")
    return factory
