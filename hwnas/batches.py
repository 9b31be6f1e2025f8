"""Batches of a split as tensors, the same for the same seed in any process and on any device.

What is random is drawn by NumPy on the host, as small tables of indices. Images are gathered,
shifted, mirrored and brought to [0, 1] where they are.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from hwnas.data import Images
from hwnas.placement import HOST, Placement

Indices = npt.NDArray[np.int64]


class PlacedImages:
    """A split beside the weights: bytes on their device where they fit, else on the host, from
    where each batch is copied.
    """

    def __init__(self, images: Images, where: Placement = HOST) -> None:
        self.images = images
        self.where = where
        self.is_resident = where.holds(images.x)

    def __len__(self) -> int:
        return len(self.images)

    def part(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """The images start..stop as a network takes them, and their classes."""
        if self.is_resident:
            pixels = self._pixels[start:stop]
        else:
            pixels = self.where.send(self.images.x[start:stop])
        return self._as_input(pixels), self._classes[start:stop]

    def gathered(self, chosen: Indices, rows: Indices, columns: Indices) -> tuple[Tensor, Tensor]:
        """Images `chosen` (n,) with their `rows` (n, height) and `columns` (n, width) in that
        order, as a network takes them, and their classes.
        """
        height, width, channels = self.images.x.shape[1:]
        if self.is_resident:
            pixels, numbers = self._pixels, chosen
        else:
            pixels, numbers = self.where.send(self.images.x[chosen]), np.arange(len(chosen))
        sent = self.where.send(np.concatenate([chosen, numbers, rows.ravel(), columns.ravel()]))
        n = len(chosen)
        picked, image, row, column = sent.split_with_sizes([n, n, n * height, n * width])
        first = (image.view(n, 1) * height + row.view(n, height)) * width
        places = first.view(n, height, 1) + column.view(n, 1, width)
        found = pixels.view(-1, channels).index_select(0, places.flatten())
        batch = self._as_input(found.view(n, height, width, channels))
        return batch, self._classes.index_select(0, picked)

    @cached_property
    def _pixels(self) -> Tensor:
        return self.where.put(self.images.x)

    @cached_property
    def _classes(self) -> Tensor:
        return self.where.put(self.images.y)

    @cached_property
    def _white(self) -> Tensor:
        """The byte of white, on the device: there a number from the host would be divided by as if
        multiplied by its reciprocal, which is not always the same float.
        """
        return self.where.put(np.array(255, np.float32))

    def _as_input(self, pixels: Tensor) -> Tensor:
        """Bytes (n, height, width, channels) as a shipped model takes them (`data.as_input`)."""
        ordered = pixels.permute(0, 3, 1, 2)
        floats = ordered.to(torch.float32, memory_format=self.where.memory_format)
        return floats.div_(self._white)


class TrainingBatches:
    """The batch of each training step: a shuffled epoch at a time, each image shifted by up to a
    sixteenth of its side and, with `flip`, mirrored half of the time.

    A batch depends on the seed and the step alone, so that training goes on exactly after a stop.
    """

    def __init__(self, images: PlacedImages, size: int, *, seed: int, flip: bool = False) -> None:
        self.images = images
        self.size = min(size, len(images))
        self.seed = seed
        self.flip = flip
        self._epoch = -1
        self._order: Indices = np.empty(0, np.int64)

    def at(self, step: int) -> tuple[Tensor, Tensor]:
        """Images (batch, channels, height, width) in [0, 1] and classes of a step."""
        epoch, place = divmod(step, len(self.images) // self.size)
        chosen = self._shuffled(epoch)[place * self.size : (place + 1) * self.size]
        rng = np.random.default_rng([self.seed, 2, step])
        height, width = self.images.images.x.shape[1:3]
        rows, columns = shifts(rng, self.size, height, width, most=max(1, height // 16))
        if self.flip:
            mirrored = rng.random(self.size) < 0.5
            columns[mirrored] = columns[mirrored, ::-1]
        return self.images.gathered(chosen, rows, columns)

    def _shuffled(self, epoch: int) -> Indices:
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, 1, epoch])
            self._epoch, self._order = epoch, rng.permutation(len(self.images))
        return self._order


def shifts(
    rng: np.random.Generator, count: int, height: int, width: int, *, most: int
) -> tuple[Indices, Indices]:
    """Which rows (count, height) and columns (count, width) of themselves images show that are
    moved by up to `most` pixels each way, edges repeated.
    """
    down, right = rng.integers(0, 2 * most + 1, (2, count)) - most
    rows = (down[:, None] + np.arange(height)).clip(0, height - 1)
    columns = (right[:, None] + np.arange(width)).clip(0, width - 1)
    return rows, columns


def step_batch(
    images: Images, size: int, *, seed: int, step: int, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """The batch of one training step, on the host."""
    return TrainingBatches(PlacedImages(images), size, seed=seed, flip=flip).at(step)


def in_order(
    images: Images | PlacedImages, size: int, *, whole: bool = False
) -> Iterator[tuple[Tensor, Tensor]]:
    """All images (batch, channels, height, width) in [0, 1] and classes, in order.

    `whole` leaves out a short last batch, unless it is the only one: for means over batches.
    """
    placed = images if isinstance(images, PlacedImages) else PlacedImages(images)
    count = len(placed) // size * size if whole and len(placed) > size else len(placed)
    for start in range(0, count, size):
        yield placed.part(start, min(start + size, count))


def evaluation_batch(images: Images, most: int = 128) -> int:
    """How many images to run at once where no gradient is kept: `most` of 32 x 32, fewer of larger
    ones, so that the values between two layers stay near the caches; at least 16.
    """
    height, width = images.x.shape[1:3]
    return int(max(min(16, most), min(most, most * 32 * 32 // (height * width))))
