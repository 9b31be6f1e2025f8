"""The small data sets that every machine has or can fetch: digits and Fashion-MNIST, 32 x 32."""

import gzip
import zlib
from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn import datasets

from hwnas.data.checks import checked, paired, taken
from hwnas.data.splits import Bytes, Images, Splits
from quant.errors import InvalidInput

SIZE = 32
"""The side, in pixels, to which the small data sets here are brought."""


def digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32: 900 / 400 / 497."""
    found = datasets.load_digits()
    small = found.images / 16 * 255
    large = ndimage.zoom(small, (1, SIZE / 8, SIZE / 8), order=1, mode="nearest", grid_mode=True)
    everything = Images(np.rint(large).astype(np.uint8)[..., None], found.target.astype(np.int64))
    order = np.random.default_rng(0).permutation(len(everything))
    train, search_val, test = (taken(everything, part) for part in np.split(order, [900, 1300]))
    return checked("digits", train, search_val, test)


def fashion_mnist(folder: Path) -> Splits:
    """Fashion-MNIST from its four idx files under `folder`, padded to 32 x 32: 50k / 10k / 10k.

    SEARCH-VAL is a sixth of the training images. Raises InvalidInput where a file is not there or
    not whole, or where images and labels do not belong together.
    """
    train_all, test = (
        paired(
            _padded(_idx(folder, f"{stem}-images-idx3", dimensions=3)),
            _idx(folder, f"{stem}-labels-idx1", dimensions=1),
            place=str(folder),
            x_name=f"{stem}-images",
            y_name=f"{stem}-labels",
        )
        for stem in ("train", "t10k")
    )
    order = np.random.default_rng(0).permutation(len(train_all))
    train, search_val = (taken(train_all, part) for part in np.split(order, [len(order) * 5 // 6]))
    return checked("fashion-mnist", train, search_val, test)


def _padded(x: Bytes) -> Bytes:
    """Images (n, height, width) with the margin that makes 28 pixels 32."""
    margin = (SIZE - 28) // 2
    return np.pad(x, ((0, 0), (margin, margin), (margin, margin)))


def _idx(folder: Path, stem: str, *, dimensions: int) -> Bytes:
    """An idx file of bytes, gzipped or not, anywhere under a folder."""
    for path in sorted(folder.rglob(f"{stem}-ubyte*")):
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            if raw[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(
                    f"it does not begin as an idx file of bytes in {dimensions} dimensions does"
                )
            shape = np.frombuffer(raw, ">i4", count=dimensions, offset=4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions).reshape(shape)
        except (OSError, EOFError, ValueError, zlib.error) as error:
            raise InvalidInput(
                f"{path} is not a whole idx file: {error}.", next_step="fetch it again"
            ) from error
    raise InvalidInput(
        f"{folder} holds no {stem}-ubyte file.",
        accepted="a folder with the four files of Fashion-MNIST, gzipped or not",
        next_step="name that folder: --data fashion-mnist:DIR",
    )


def no_images(classes: int, size: int) -> Splits:
    """Splits without an image, of so many classes of colour pictures of `size` x `size` pixels."""
    none = Images(np.zeros((0, size, size, 3), np.uint8), np.zeros(0, np.int64))
    return Splits("none", none, none, none, [str(number) for number in range(classes)])
