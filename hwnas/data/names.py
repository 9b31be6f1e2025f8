"""What `--data` can name."""

from pathlib import Path

from hwnas.data.arrays import npz
from hwnas.data.folders import folder
from hwnas.data.pictures import resized
from hwnas.data.small import digits, fashion_mnist, no_images
from hwnas.data.splits import Splits
from hwnas.data.vision import torchvision
from quant.errors import InvalidInput

FORMS = (
    "digits", "fashion-mnist:DIR", "FILE.npz", "folder:DIR", "torchvision:NAME", "none:CLASSES",
)  # fmt: skip


def load(name: str, *, size: int, resize: bool = False) -> Splits:
    """The splits that `--data` names.

    Pictures (folder:, torchvision:) are brought to size x size pixels. Arrays, which have one size
    already, are brought to it only with `resize`. `none:CLASSES` has no images, but says how many
    classes there will be: enough to profile and to predict. Raises InvalidInput where the name is
    not known, or what it names is not there or cannot be used.
    """
    if size < 1:
        raise InvalidInput(
            f"--image-size is {size}.", accepted="a whole number of pixels, at least 1"
        )
    kind, _, place = name.partition(":")
    match kind:
        case "digits" if not place:
            found = digits()
        case "fashion-mnist" if place:
            found = fashion_mnist(Path(place))
        case "folder" if place:
            return folder(Path(place), size)
        case "torchvision" if place:
            return torchvision(place, size)
        case "none" if place.isdecimal() and int(place) > 1:
            return no_images(int(place), size)
        case _ if name.lower().endswith(".npz"):
            return npz(Path(name), size if resize else None)
        case _:
            raise InvalidInput(
                f"--data is {name!r}.",
                accepted=", ".join(FORMS),
                next_step="hwnas search --data digits",
            )
    return found.mapped(lambda x: resized(x, size)) if resize else found
