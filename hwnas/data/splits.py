"""Images, and a data set as three splits of them.

TRAIN trains weights, SEARCH-VAL scores candidates, TEST is read after retraining only: `test`
raises unless it is opened by `Splits.final`.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

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
    """A data set with its three disjoint splits.

    `classes` counts the classes, `class_names` names them in their order (their numbers as text
    where none are given); `size` is the side of an image in pixels, `channels` is 1 or 3.
    """

    def __init__(
        self,
        name: str,
        train: Images,
        search_val: Images,
        test: Images,
        class_names: Sequence[str] = (),
    ) -> None:
        self.name = name
        self.train = train
        self.search_val = search_val
        self._test = test
        self._open = False
        self.classes = int(train.y.max()) + 1 if len(train) else len(class_names)
        self.class_names = tuple(class_names or map(str, range(self.classes)))
        if len(self.class_names) != self.classes:
            raise ValueError(f"{len(self.class_names)} names for {self.classes} classes")
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

    @cached_property
    def fingerprint(self) -> str:
        """A hash of all images, classes and their split; the names of classes are not in it."""
        digest = hashlib.sha256()
        for part in (self.train, self.search_val, self._test):
            digest.update(np.ascontiguousarray(part.x).data)
            digest.update(np.ascontiguousarray(part.y).data)
        return digest.hexdigest()[:16]

    def describe(self) -> str:
        """One line for people: how many images of what size, in how many classes and splits."""
        counts = len(self.train), len(self.search_val), len(self._test)
        train, search_val, test = (f"{count:,}" for count in counts)
        return (
            f"{sum(counts):,} images of {self.classes} classes, "
            f"{self.size} x {self.size} x {self.channels}: "
            f"{train} train, {search_val} search-val, {test} test"
        )

    def mapped(self, change: Callable[[Bytes], Bytes]) -> "Splits":
        """The same splits, TEST sealed, with `change` applied to the images of each.

        `change` takes images (n, height, width, channels) and returns as many in the same order.
        """
        train, search_val, test = (
            Images(change(part.x), part.y) for part in (self.train, self.search_val, self._test)
        )
        return Splits(self.name, train, search_val, test, self.class_names)


def as_input(x: Bytes) -> npt.NDArray[np.float32]:
    """What a shipped model takes: float32 (n, channels, height, width), bytes / 255."""
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2), np.float32) / np.float32(255)
