"""Batches: what they depend on, and the shift against a slow loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hwnas.batches import evaluation_batch, in_order, shifted, step_batch
from hwnas.data import Images, as_input


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
