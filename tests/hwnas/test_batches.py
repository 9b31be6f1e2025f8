"""Batches: what they depend on, and how they are made, against NumPy and against a slow loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.batches import (
    PlacedImages,
    TrainingBatches,
    evaluation_batch,
    in_order,
    shifts,
    step_batch,
)
from hwnas.data import Bytes, Images, as_input
from hwnas.placement import HOST, Placement, placement


def numbered(count: int, side: int = 6) -> Images:
    """Image i is filled with the byte i, so that a shift changes nothing; its class is i."""
    x = np.broadcast_to(
        np.arange(count, dtype=np.uint8)[:, None, None, None], (count, side, side, 1)
    )
    return Images(np.ascontiguousarray(x), np.arange(count))


def random_images(count: int, seed: int = 0, channels: int = 1) -> Images:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 256, (count, 6, 7, channels), dtype=np.uint8)
    return Images(x, rng.integers(0, 3, count))


def shifted(x: Bytes, rng: np.random.Generator, most: int) -> Bytes:
    """Images moved by `shifts`, which draws from `rng`, picked by NumPy."""
    rows, columns = shifts(rng, *x.shape[:3], most=most)
    return x[np.arange(len(x))[:, None, None], rows[:, :, None], columns[:, None, :]]


def batch_by_numpy(
    images: Images, size: int, *, seed: int, step: int, flip: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The batch of a step, made by NumPy alone: padded, shifted by a window, mirrored in place."""
    size = min(size, len(images))
    epoch, place = divmod(step, len(images) // size)
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(images))
    chosen = order[place * size : (place + 1) * size]
    rng = np.random.default_rng([seed, 2, step])
    x = images.x[chosen]
    height, width = x.shape[1:3]
    most = max(1, height // 16)
    padded = np.pad(x, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    down, right = rng.integers(0, 2 * most + 1, (2, size))
    rows, columns = down[:, None] + np.arange(height), right[:, None] + np.arange(width)
    x = padded[np.arange(size)[:, None, None], rows[:, :, None], columns[:, None, :]]
    if flip:
        mirrored = rng.random(size) < 0.5
        x[mirrored] = x[mirrored, :, ::-1]
    return as_input(x), images.y[chosen]


class Crowded(Placement):
    """A device without room for a split."""

    def holds(self, array: np.ndarray) -> bool:
        return False


PLACES = [HOST, Crowded(HOST.device)]


@pytest.mark.parametrize("where", PLACES, ids=["resident", "copied"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(6, 7, 1), (32, 32, 1), (32, 32, 3), (48, 33, 3), (65, 64, 2)])
def test_batches_are_those_of_numpy_bit_for_bit(
    shape: tuple[int, int, int], flip: bool, where: Placement
) -> None:
    """Over three epochs, forward and then back again, with a copy left out of every epoch."""
    assert_numpys_batches(shape, flip, where)


def assert_numpys_batches(shape: tuple[int, int, int], flip: bool, where: Placement) -> None:
    rng = np.random.default_rng(1)
    images = Images(rng.integers(0, 256, (29, *shape), dtype=np.uint8), rng.integers(0, 9, 29))
    batches = TrainingBatches(PlacedImages(images, where), 9, seed=5, flip=flip)
    for step in [*range(9), *reversed(range(9))]:
        x, y = batches.at(step)
        expected_x, expected_y = batch_by_numpy(images, 9, seed=5, step=step, flip=flip)
        assert x.device.type == y.device.type == where.device.type
        assert x.dtype == torch.float32
        np.testing.assert_array_equal(x.cpu().numpy().view(np.int32), expected_x.view(np.int32))
        np.testing.assert_array_equal(y.cpu().numpy(), expected_y)
    for size in (4, 29, 40):
        found = list(in_order(PlacedImages(images, where), size))
        assert [len(y) for _, y in found][:-1] == [size] * (len(found) - 1)
        np.testing.assert_array_equal(torch.cat([x for x, _ in found]).cpu(), as_input(images.x))
        np.testing.assert_array_equal(torch.cat([y for _, y in found]).cpu(), images.y)


def test_on_a_cpu_a_batch_lies_in_memory_as_a_file_takes_it() -> None:
    """Kernels are chosen by it, and what they add up in which order: it is part of a result."""
    x, _ = step_batch(random_images(9, channels=3), 4, seed=0, step=0)
    assert x.is_contiguous()
    assert next(in_order(random_images(9, channels=3), 4))[0].is_contiguous()


@pytest.mark.parametrize("where", PLACES, ids=["resident", "copied"])
def test_images_that_may_not_be_written_to_or_lie_apart_are_taken(where: Placement) -> None:
    every = random_images(40, channels=3)
    apart = Images(every.x[::2], every.y[::2])
    locked = Images(apart.x.copy(), apart.y.copy())
    for array in (locked.x, locked.y):
        array.flags.writeable = False
    for images in (apart, locked):
        x, y = TrainingBatches(PlacedImages(images, where), 8, seed=1).at(3)
        expected_x, expected_y = batch_by_numpy(images, 8, seed=1, step=3, flip=False)
        np.testing.assert_array_equal(x, expected_x)
        np.testing.assert_array_equal(y, expected_y)


@pytest.mark.gpu
@pytest.mark.parametrize("room", [True, False], ids=["resident", "copied"])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shape", [(6, 7, 1), (32, 32, 3), (65, 64, 2)])
def test_batches_on_cuda_are_those_of_numpy_bit_for_bit(
    shape: tuple[int, int, int], flip: bool, room: bool, cuda: Placement
) -> None:
    """Every byte is among them: 255 quotients that are rounded as on a CPU."""
    assert_numpys_batches(shape, flip, cuda if room else Crowded(cuda.device))


@pytest.mark.gpu
def test_batches_on_cuda_are_channels_last_and_on_the_card_where_they_fit(cuda: Placement) -> None:
    placed = PlacedImages(random_images(20, channels=3), placement("cuda"))
    assert placed.is_resident
    x, _ = TrainingBatches(placed, 8, seed=0).at(0)
    assert x.is_contiguous(memory_format=torch.channels_last)


def test_in_order_gives_every_image_once_and_in_order() -> None:
    images = random_images(23)
    batches = list(in_order(images, 8))
    assert [len(y) for _, y in batches] == [8, 8, 7]
    np.testing.assert_array_equal(torch.cat([x for x, _ in batches]).numpy(), as_input(images.x))
    np.testing.assert_array_equal(torch.cat([y for _, y in batches]).numpy(), images.y)


@pytest.mark.parametrize(
    ("side", "most", "size"),
    [
        (32, 128, 128),
        (16, 128, 128),
        (64, 128, 32),
        (48, 128, 56),
        (96, 128, 16),
        (224, 128, 16),
        (32, 10, 10),
        (224, 10, 10),
        (64, 256, 64),
        (32, 1, 1),
    ],
)
def test_fewer_images_are_run_at_once_the_larger_they_are(side: int, most: int, size: int) -> None:
    """As many pixels as `most` images of 32 x 32 have, but at least 16 images."""
    images = Images(np.zeros((1, side, side, 3), np.uint8), np.zeros(1, np.int64))
    assert evaluation_batch(images, most) == size
    if most == 128:
        assert evaluation_batch(images) == size
    if size > 16:
        assert size * side**2 <= most * 32**2


def test_the_images_at_once_depend_on_both_sides() -> None:
    images = Images(np.zeros((1, 32, 64, 1), np.uint8), np.zeros(1, np.int64))
    assert evaluation_batch(images) == 64


def test_a_step_depends_on_its_seed_and_its_number_alone() -> None:
    images = random_images(40)
    forward = [step_batch(images, 8, seed=3, step=step) for step in range(12)]
    np.random.seed(99)  # noqa: NPY002 (what global state there is must not matter)
    torch.manual_seed(99)
    backward = [step_batch(images, 8, seed=3, step=step) for step in reversed(range(12))]
    for (x, y), (again_x, again_y) in zip(forward, reversed(backward), strict=True):
        assert torch.equal(x, again_x)
        assert torch.equal(y, again_y)
    others = [step_batch(images, 8, seed=4, step=step) for step in range(12)]
    assert all(
        not torch.equal(x, other) for (x, _), (other, _) in zip(forward, others, strict=True)
    )
    pairs = [(i, j) for i in range(12) for j in range(i)]
    assert all(not torch.equal(forward[i][0], forward[j][0]) for i, j in pairs)


@given(
    count=st.integers(1, 60),
    size=st.integers(1, 70),
    seed=st.integers(0, 5),
    epoch=st.integers(0, 3),
)
@settings(deadline=None, max_examples=60, derandomize=True)
def test_an_epoch_visits_every_image_at_most_once_and_all_but_a_rest(
    count: int, size: int, seed: int, epoch: int
) -> None:
    images = numbered(count, side=3)
    steps = count // min(size, count)
    seen: list[int] = []
    for step in range(epoch * steps, (epoch + 1) * steps):
        x, y = step_batch(images, size, seed=seed, step=step)
        assert len(x) == min(size, count)
        np.testing.assert_allclose(x[:, 0, 1, 1].numpy() * 255, y.numpy(), atol=1e-3)
        seen += y.tolist()
    assert len(seen) == len(set(seen)) == steps * min(size, count)
    assert count - len(seen) < min(size, count)


def test_each_epoch_has_an_order_of_its_own() -> None:
    images = numbered(32)
    epochs = [
        tuple(
            torch.cat(
                [step_batch(images, 8, seed=0, step=4 * epoch + i)[1] for i in range(4)]
            ).tolist()
        )
        for epoch in range(5)
    ]
    assert len(set(epochs)) == 5
    assert all(sorted(order) == list(range(32)) for order in epochs)


def test_a_batch_is_its_images_shifted_by_up_to_a_pixel_where_they_are_small() -> None:
    images = random_images(30, channels=3)
    given_x = as_input(images.x)
    x, y = step_batch(images, 10, seed=1, step=2)
    assert x.shape == (10, 3, 6, 7)
    shifts = set()
    for image, kind in zip(x.numpy(), y.tolist(), strict=True):
        middle = image[:, 1:5, 1:6]
        candidates = [
            (n, down, right)
            for n in range(30)
            for down in range(-1, 2)
            for right in range(-1, 2)
            if np.array_equal(middle, given_x[n, :, 1 + down : 5 + down, 1 + right : 6 + right])
        ]
        assert len(candidates) == 1
        assert images.y[candidates[0][0]] == kind
        shifts.add(candidates[0][1:])
    assert len(shifts) > 3


@pytest.mark.parametrize(
    ("side", "most"), [(4, 1), (8, 1), (16, 1), (31, 1), (32, 2), (48, 3), (64, 4), (224, 14)]
)
def test_images_are_shifted_by_up_to_a_sixteenth_of_their_side(side: int, most: int) -> None:
    """One bright pixel in the middle tells where each image went; over a hundred go everywhere."""
    count = 128
    x = np.zeros((count, side, side, 1), np.uint8)
    x[:, side // 2, side // 2] = 255
    images = Images(x, np.zeros(count, np.int64))
    moves = []
    for step in range(4):
        batch, _ = step_batch(images, count, seed=0, step=step)
        moves.append(np.argwhere(batch[:, 0].numpy() == 1)[:, 1:] - side // 2)
    found = np.concatenate(moves)
    assert len(found) == 4 * count
    for axis in (0, 1):
        assert found[:, axis].min() == -most
        assert found[:, axis].max() == most


# ---- mirroring


def cornered(count: int, side: int = 32) -> Images:
    """Image i says i in its upper left quarter, i + 64, i + 128, i + 192 in the others."""
    x = np.zeros((count, side, side, 1), np.uint8)
    half = side // 2
    numbers = np.arange(count, dtype=np.uint8)[:, None, None, None]
    for corner, (rows, columns) in enumerate(
        (r, c) for r in (slice(half), slice(half, None)) for c in (slice(half), slice(half, None))
    ):
        x[:, rows, columns] = numbers + 64 * corner
    return Images(x, np.arange(count))


def corners(image: torch.Tensor) -> list[int]:
    ends = [image[0, row, column] for row in (0, -1) for column in (0, -1)]
    return [round(float(value) * 255) for value in ends]


def test_about_half_of_the_images_are_mirrored_left_to_right_and_none_upside_down() -> None:
    images = cornered(64)
    mirrored = total = 0
    for step in range(30):
        x, y = step_batch(images, 32, seed=0, step=step, flip=True)
        for image, number in zip(x, y.tolist(), strict=True):
            plain = [number, number + 64, number + 128, number + 192]
            found = corners(image)
            assert found in (plain, [plain[1], plain[0], plain[3], plain[2]])
            mirrored += found != plain
            total += 1
    assert total == 960
    assert abs(mirrored - total / 2) < 4 * (total / 4) ** 0.5  # four standard deviations


def test_a_mirrored_batch_is_the_plain_one_with_some_images_turned() -> None:
    """The same images, shifted the same way: mirroring is all that differs."""
    images = random_images(40, channels=3)
    patterns = set()
    for step in range(20):
        plain, plain_y = step_batch(images, 16, seed=2, step=step)
        mirrored, mirrored_y = step_batch(images, 16, seed=2, step=step, flip=True)
        assert torch.equal(plain_y, mirrored_y)
        turned = [not torch.equal(a, b) for a, b in zip(plain, mirrored, strict=True)]
        for image, other, turn in zip(plain, mirrored, turned, strict=True):
            assert torch.equal(other, image.flip(-1) if turn else image)
        patterns.add(tuple(turned))
    assert len(patterns) == 20


def test_mirroring_depends_on_the_seed_and_the_step_alone() -> None:
    images = random_images(40)
    before = images.x.copy()
    once = [step_batch(images, 8, seed=3, step=step, flip=True)[0] for step in range(10)]
    np.random.seed(99)  # noqa: NPY002 (what global state there is must not matter)
    torch.manual_seed(99)
    again = [step_batch(images, 8, seed=3, step=step, flip=True)[0] for step in reversed(range(10))]
    assert all(torch.equal(a, b) for a, b in zip(once, reversed(again), strict=True))
    np.testing.assert_array_equal(images.x, before)


@pytest.mark.parametrize("most", [0, 1, 2, 3])
@pytest.mark.parametrize("channels", [1, 3])
def test_shifting_is_a_slow_loop_that_repeats_the_edges(most: int, channels: int) -> None:
    x = random_images(12, channels=channels).x
    found = shifted(x, np.random.default_rng(7), most)
    down, right = np.random.default_rng(7).integers(0, 2 * most + 1, (2, 12))
    expected = np.empty_like(x)
    for n, row, column, channel in np.ndindex(x.shape):
        from_row = min(max(row + down[n] - most, 0), 5)
        from_column = min(max(column + right[n] - most, 0), 6)
        expected[n, row, column, channel] = x[n, from_row, from_column, channel]
    np.testing.assert_array_equal(found, expected)
    assert found.dtype == np.uint8


def test_shifts_are_every_pair_up_to_two_about_equally_often() -> None:
    """One bright pixel in the middle tells where each image went."""
    count = 5000
    x = np.zeros((count, 9, 9, 1), np.uint8)
    x[:, 4, 4] = 255
    found = shifted(x, np.random.default_rng(0), 2)
    where = np.argwhere(found[..., 0] == 255)
    assert where[:, 0].tolist() == list(range(count))
    moves = where[:, 1:] - 4
    assert np.abs(moves).max() == 2
    cells = np.zeros((5, 5), int)
    np.add.at(cells, (moves[:, 0] + 2, moves[:, 1] + 2), 1)
    expected = count / 25
    chi_square = ((cells - expected) ** 2 / expected).sum()
    assert chi_square < 51.2  # 24 degrees of freedom, p = 0.001
