"""Images and their three splits.

TRAIN trains weights, SEARCH-VAL scores candidates, TEST is read after retraining only: `test`
raises unless it is opened by `Splits.final`.
"""

import gzip
import hashlib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy import ndimage
from sklearn import datasets

from quant.errors import InvalidInput

SIZE = 32
"""The side to which the small data sets here are brought."""

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Images:
    """Images (n, height, width, channels) as bytes, and their classes (n,)."""

    x: Bytes
    y: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def first(self, count: int) -> "Images":
        """The first `count` images."""
        return Images(self.x[:count], self.y[:count])


class Splits:
    """A data set with its three disjoint splits."""

    def __init__(self, name: str, train: Images, search_val: Images, test: Images) -> None:
        self.name = name
        self.train = train
        self.search_val = search_val
        self._test = test
        self._open = False
        self.classes = int(train.y.max()) + 1
        self.size, self.channels = train.x.shape[1], train.x.shape[3]

    @property
    def test(self) -> Images:
        """The TEST split; raises RuntimeError outside `final`."""
        if not self._open:
            raise RuntimeError("TEST is sealed until a retrained network is certified")
        return self._test

    @contextmanager
    def final(self) -> Iterator[Images]:
        """Open the TEST split, to state the accuracy of what ships."""
        before, self._open = self._open, True
        try:
            yield self._test
        finally:
            self._open = before

    @property
    def fingerprint(self) -> str:
        """A hash of all images, classes and their split."""
        digest = hashlib.sha256()
        for part in (self.train, self.search_val, self._test):
            digest.update(part.x.tobytes())
            digest.update(part.y.tobytes())
        return digest.hexdigest()[:16]


def as_input(x: Bytes) -> npt.NDArray[np.float32]:
    """What a shipped model takes: float32 (n, channels, height, width), bytes / 255."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32) / np.float32(255)


def load(name: str) -> Splits:
    """The splits that `--data` names; raises InvalidInput where it is not known or not there."""
    kind, _, place = name.partition(":")
    match kind:
        case "digits" if not place:
            return digits()
        case "fashion-mnist" if place:
            return fashion_mnist(Path(place))
        case _:
            raise InvalidInput(
                f"--data is {name!r}.",
                accepted="digits, or fashion-mnist:DIR",
                next_step="hwnas search --data digits",
            )


def digits() -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 enlarged to 32 x 32: 900 / 400 / 497."""
    found = datasets.load_digits()
    small = found.images / 16 * 255
    large = ndimage.zoom(small, (1, SIZE / 8, SIZE / 8), order=1, mode="nearest", grid_mode=True)
    x = np.rint(large).astype(np.uint8)[..., None]
    y = found.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(y))
    parts = np.split(order, [900, 1300])
    return Splits("digits", *(Images(x[part], y[part]) for part in parts))


def fashion_mnist(folder: Path) -> Splits:
    """Fashion-MNIST from its four idx files under `folder`, padded to 32 x 32: 50k / 10k / 10k.

    SEARCH-VAL is a sixth of the training images.
    """
    x_train, y_train = _idx(folder, "train-images-idx3"), _idx(folder, "train-labels-idx1")
    x_test, y_test = _idx(folder, "t10k-images-idx3"), _idx(folder, "t10k-labels-idx1")
    margin = (SIZE - 28) // 2
    x_train, x_test = (
        np.pad(x, ((0, 0), (margin, margin), (margin, margin)))[..., None]
        for x in (x_train, x_test)
    )
    order = np.random.default_rng(0).permutation(len(y_train))
    train, search_val = np.split(order, [len(order) * 5 // 6])
    return Splits(
        "fashion-mnist",
        Images(x_train[train], y_train[train].astype(np.int64)),
        Images(x_train[search_val], y_train[search_val].astype(np.int64)),
        Images(x_test, y_test.astype(np.int64)),
    )


def _idx(folder: Path, stem: str) -> Bytes:
    """An idx file of bytes, gzipped or not, anywhere under a folder."""
    for path in sorted(folder.rglob(f"{stem}-ubyte*")):
        try:
            raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
            if raw[:3] != b"\0\0\x08":
                raise ValueError("it does not begin as an idx file of bytes does")
            shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
        except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
            raise InvalidInput(
                f"{path} is not a whole idx file: {error}.", next_step="fetch it again"
            ) from error
    raise InvalidInput(
        f"{folder} holds no {stem}-ubyte file.",
        accepted="a folder with the four files of Fashion-MNIST, gzipped or not",
        next_step="name that folder: --data fashion-mnist:DIR",
    )
