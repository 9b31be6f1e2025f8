"""Batches of a split as tensors, the same for the same seed in any process."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from hwnas.data import Bytes, Images, as_input


def evaluation_batch(images: Images, most: int = 128) -> int:
    """How many images to run at once where no gradient is kept: `most` of 32 x 32, fewer of larger
    ones, so that the values between two layers stay near the caches; at least 16.
    """
    height, width = images.x.shape[1:3]
    return int(max(min(16, most), min(most, most * 32 * 32 // (height * width))))


def in_order(images: Images, size: int, *, whole: bool = False) -> Iterator[tuple[Tensor, Tensor]]:
    """All images (batch, channels, height, width) in [0, 1] and classes, in order.

    `whole` leaves out a short last batch, unless it is the only one: for means over batches.
    """
    count = len(images) // size * size if whole and len(images) > size else len(images)
    for start in range(0, count, size):
        stop = start + size
        x = torch.from_numpy(as_input(images.x[start:stop]))
        yield x, torch.from_numpy(images.y[start:stop])


def step_batch(
    images: Images, size: int, *, seed: int, step: int, flip: bool = False
) -> tuple[Tensor, Tensor]:
    """The batch of one training step: a shuffled epoch at a time, each image shifted by up to a
    sixteenth of its side and, with `flip`, mirrored half of the time.

    It depends on the seed and the step alone, so that training goes on exactly after a stop.
    """
    size = min(size, len(images))
    per_epoch = len(images) // size
    epoch, place = divmod(step, per_epoch)
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(images))
    chosen = order[place * size : (place + 1) * size]
    rng = np.random.default_rng([seed, 2, step])
    pixels = shifted(images.x[chosen], rng, most=max(1, images.x.shape[1] // 16))
    if flip:
        mirrored = rng.random(size) < 0.5
        pixels[mirrored] = pixels[mirrored, :, ::-1]
    return torch.from_numpy(as_input(pixels)), torch.from_numpy(images.y[chosen])


def shifted(x: Bytes, rng: np.random.Generator, most: int) -> Bytes:
    """Images (n, height, width, channels) moved by up to `most` pixels each way, edges repeated."""
    n, height, width, _ = x.shape
    padded = np.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    down, right = rng.integers(0, 2 * most + 1, (2, n))
    rows = down[:, None] + np.arange(height)
    columns = right[:, None] + np.arange(width)
    moved: Bytes = padded[np.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved
