"""What every data set goes through: arrays, division by class, and the checks of the whole."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwnas.data import Images
from hwnas.data.checks import check_place, checked, divided, paired, reason, taken
from quant.errors import InvalidInput


def images(y: list[int] | np.ndarray, shape: tuple[int, ...] = (4, 4, 1)) -> Images:
    numbers = np.asarray(y, np.int64)
    return Images(np.zeros((len(numbers), *shape), np.uint8), numbers)


def of_classes(*counts: int) -> Images:
    """So many images of class 0, 1, ..."""
    return images(np.repeat(np.arange(len(counts)), counts))


# ---- division


@given(
    counts=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    shares=st.sampled_from([(), (1 / 6,), (0.15, 0.15), (0.3, 0.2)]),
    seed=st.integers(0, 3),
)
def test_a_division_is_a_partition_with_each_class_in_its_share(
    counts: list[int], shares: tuple[float, ...], seed: int
) -> None:
    y = np.random.default_rng(9).permutation(np.repeat(np.arange(len(counts)) * 3 - 2, counts))
    parts = divided(y, shares, seed=seed)
    assert len(parts) == len(shares) + 1
    assert sorted(np.concatenate(parts).tolist()) == list(range(len(y)))  # each once
    for number, count in zip(np.arange(len(counts)) * 3 - 2, counts, strict=True):
        found = [int((y[part] == number).sum()) for part in parts]
        assert found[0] >= 1
        assert sum(found) == count
        if count >= 3:
            assert min(found) >= 1
        for share, got in zip(shares, found[1:], strict=True):
            if share * count >= 1:
                assert abs(got - share * count) <= 0.5
            else:
                assert got <= 1


def test_a_division_comes_out_in_the_stated_counts() -> None:
    y = np.repeat([0, 1, 2], [60, 12, 100])
    train, search_val = divided(y, (1 / 6,))
    assert np.bincount(y[train]).tolist() == [50, 10, 83]
    assert np.bincount(y[search_val]).tolist() == [10, 2, 17]
    three = divided(y, (0.15, 0.15))
    assert [np.bincount(y[part]).tolist() for part in three] == [
        [42, 8, 70],
        [9, 2, 15],
        [9, 2, 15],
    ]


def test_a_division_mixes_classes_and_depends_on_its_seed_alone() -> None:
    y = np.repeat(np.arange(4), 50)
    first, again, other = (divided(y, (1 / 6,), seed=seed) for seed in (0, 0, 1))
    for part, same, different in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(part, same)
        assert not np.array_equal(part, different)
        assert set(y[part[:20]].tolist()) == {0, 1, 2, 3}  # a prefix holds every class
    (whole,) = divided(y, ())
    assert sorted(whole.tolist()) == list(range(200))
    assert whole.tolist() != list(range(200))


def test_which_images_of_a_class_are_held_out_is_drawn() -> None:
    """Files are often in an order that means something: neither end of it is a split."""
    _, search_val = divided(np.zeros(600, np.int64), (1 / 6,))
    quarters = np.bincount(search_val // 150, minlength=4)
    assert quarters.sum() == 100
    assert quarters.min() >= 10  # 25 expected; fewer than 10 once in 10,000 draws


def test_a_division_of_nothing_is_empty() -> None:
    assert [part.tolist() for part in divided(np.empty(0, np.int64), (0.5,))] == [[], []]


def test_images_are_taken_with_their_classes() -> None:
    numbers = np.arange(10)
    base = Images(np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1), numbers)
    found = taken(base, np.array([7, 2, 2]))
    assert found.x.ravel().tolist() == found.y.tolist() == [7, 2, 2]


# ---- a user's arrays


def pair(x: Any, y: Any) -> Images:
    return paired(x, y, place="f.npz", x_name="x_train", y_name="y_train")


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "int64", "uint64", ">i4"])
@pytest.mark.parametrize("column", [False, True])
def test_classes_of_any_whole_type_are_taken(dtype: str, column: bool) -> None:
    y = np.array([2, 0, 1], dtype)
    found = pair(np.zeros((3, 5, 4, 3), np.uint8), y[:, None] if column else y)
    assert found.y.tolist() == [2, 0, 1]
    assert found.y.dtype == np.int64
    assert found.y.dtype.isnative


def test_images_without_a_channel_axis_have_one_channel() -> None:
    x = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    found = pair(x, np.zeros(2, int))
    assert found.x.shape == (2, 3, 4, 1)
    np.testing.assert_array_equal(found.x[..., 0], x)


@pytest.mark.parametrize(
    ("dtype", "advice"),
    [
        ("float32", "(x * 255).round().astype('uint8')"),
        ("float64", "(x * 255).round().astype('uint8')"),
        ("int64", "x.astype('uint8')"),
        ("bool", "x.astype('uint8')"),
    ],
)
def test_images_of_another_type_are_refused_with_how_to_convert(dtype: str, advice: str) -> None:
    with pytest.raises(InvalidInput, match=f"f.npz: x_train holds {dtype}") as caught:
        pair(np.zeros((3, 4, 4, 3), dtype), np.zeros(3, int))
    assert caught.value.accepted == "uint8"
    assert advice in caught.value.next_step


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((3, 3, 32, 32), "x.transpose(0, 2, 3, 1)"),
        ((3, 1, 28, 28), "x.transpose(0, 2, 3, 1)"),
        ((3, 32, 32, 4), ""),
        ((3, 784), ""),
        ((3,), ""),
        ((), ""),
        ((3, 0, 0, 3), ""),
        ((3, 2, 4, 4, 3), ""),
    ],
)
def test_images_of_another_shape_are_refused(shape: tuple[int, ...], advice: str) -> None:
    with pytest.raises(InvalidInput, match=re.escape(f"has the shape {shape}")) as caught:
        pair(np.zeros(shape, np.uint8), np.zeros(3, int))
    assert "1 or 3 channels" in caught.value.accepted
    assert bool(caught.value.next_step) == bool(advice)
    assert advice in caught.value.next_step


@pytest.mark.parametrize(
    ("y", "words"),
    [
        (np.zeros(3), "holds float64"),
        (np.zeros(3, bool), "holds bool"),
        (np.array(["a", "b", "c"]), "holds <U1"),
        (np.eye(3, dtype=int), "shape (3, 3)"),
        (np.zeros((3, 1, 1), int), "shape (3, 1, 1)"),
        (np.array(1), "shape ()"),
    ],
)
def test_classes_of_another_type_or_shape_are_refused(y: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=r"f\.npz: y_train has the shape") as caught:
        pair(np.zeros((3, 4, 4, 3), np.uint8), y)
    assert words in caught.value.what
    assert "whole number from 0" in caught.value.accepted
    assert ("argmax" in caught.value.next_step) == (y.shape == (3, 3))


@pytest.mark.parametrize("count", [0, 2, 4])
def test_images_and_classes_of_different_lengths_are_refused(count: int) -> None:
    words = f"f.npz: x_train holds 3 images, y_train {count} classes"
    with pytest.raises(InvalidInput, match=words):
        pair(np.zeros((3, 4, 4, 3), np.uint8), np.zeros(count, int))


# ---- the whole


def test_a_set_of_the_least_size_is_accepted() -> None:
    splits = checked("least", of_classes(10, 10), of_classes(5), of_classes(0, 5), ("a", "b"))
    assert (splits.name, splits.classes, splits.class_names) == ("least", 2, ("a", "b"))
    assert (len(splits.train), len(splits.search_val)) == (20, 5)
    with splits.final() as test:
        assert test.y.tolist() == [1] * 5


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(10, 10), (5,), (4,)], "some has 29 images"),
        ([(0,), (0,), (0,)], "some has 0 images"),
        ([(0,), (20, 20), (20, 20)], "some has no images in TRAIN"),
        ([(20, 20), (0,), (20, 20)], "some has no images in SEARCH-VAL"),
        ([(20, 20), (20, 20), (0,)], "some has no images in TEST"),
        ([(40, 9), (5, 3), (5, 4)], "some has 16 images of class 1, 9 of them in TRAIN"),
        ([(40,), (5,), (5,)], "some has one class only"),
        ([(40, 40), (0, 0, 1), (5,)], "of class 2 in SEARCH-VAL, but none in TRAIN"),
        ([(40, 40), (5,), (0, 0, 0, 2)], "of class 3 in TEST, but none in TRAIN"),
    ],
)
def test_a_set_that_cannot_be_searched_on_is_refused(
    parts: list[tuple[int, ...]], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words) as caught:
        checked("some", *(of_classes(*counts) for counts in parts))
    assert caught.value.accepted


def test_a_class_with_too_few_images_is_called_by_its_name() -> None:
    with pytest.raises(InvalidInput, match="11 images of class 'cat', 9 of them in TRAIN"):
        checked("some", of_classes(9, 40), of_classes(1, 5), of_classes(1, 5), ("cat", "dog"))


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        ((3, 7), "the classes 3, 7, but none 0."),
        (tuple(range(1, 11)), "the classes 1, 2, 3, 4, 5, ..., but none 0."),
        ((0, 1, 3), "the classes 0, 1, 3, but none 2."),
        ((5,), "the classes 5, but none 0."),
        ((-1, 0, 1), "the classes -1, 0, 1."),
        ((0, 2**40), f"the classes 0, {2**40}, but none 1."),
    ],
)
def test_classes_that_are_not_counted_from_0_are_refused(
    numbers: tuple[int, ...], told: str
) -> None:
    part = images(np.repeat(np.array(numbers), 30))
    with pytest.raises(InvalidInput) as caught:
        checked("some", part, part, part)
    assert caught.value.what == f"some has {told}"
    assert "whole numbers from 0" in caught.value.accepted


def test_the_advice_for_numbering_classes_anew_works() -> None:
    y_train, y_test = np.repeat([3, 7, 9], 20), np.repeat([7, 9], 5)
    part, other = images(y_train), images(y_test)
    with pytest.raises(InvalidInput) as caught:
        checked("some", part, part, other)
    advice = caught.value.next_step.removeprefix("number them anew: ")
    found = []
    for y in (y_train, y_test):
        names: dict[str, Any] = {"numpy": np, "y_train": y_train, "y": y}
        exec(advice, names)
        found.append(names["y"])
    assert np.unique(found[0]).tolist() == [0, 1, 2]
    assert found[1].tolist() == [1] * 5 + [2] * 5
    checked("some", images(found[0]), images(found[0]), images(found[1]))


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (((4, 6, 3), (4, 6, 3)), "images of 4 x 6 pixels"),
        (((4, 4, 3), (5, 5, 3)), "images of 4 x 4 and 5 x 5 pixels"),
    ],
)
def test_images_that_are_not_square_or_of_one_size_are_refused(
    shapes: tuple[tuple[int, ...], ...], words: str
) -> None:
    train, test = (images(np.repeat([0, 1], 20), shape) for shape in shapes)
    with pytest.raises(InvalidInput, match=words) as caught:
        checked("some", train, train, test)
    assert "--image-size" in caught.value.next_step


def test_images_of_one_and_of_three_channels_do_not_mix() -> None:
    train, test = (images(np.repeat([0, 1], 20), (4, 4, channels)) for channels in (1, 3))
    with pytest.raises(InvalidInput, match="1 channel and images of 3"):
        checked("some", train, train, test)


# ---- places


def test_a_place_is_there_and_of_the_kind_that_is_asked_for(tmp_path: Path) -> None:
    file, folder = tmp_path / "file", tmp_path / "folder"
    file.write_text("x")
    folder.mkdir()
    check_place(file, folder=False, accepted="a file")
    check_place(folder, folder=True, accepted="a folder")
    with pytest.raises(InvalidInput, match="file is a file, not a folder"):
        check_place(file, folder=True, accepted="a folder")
    with pytest.raises(InvalidInput, match="folder is a folder, not a file") as caught:
        check_place(folder, folder=False, accepted="what is wanted")
    assert caught.value.accepted == "what is wanted"
    for kind in (False, True):
        with pytest.raises(InvalidInput, match="nowhere is not there"):
            check_place(tmp_path / "nowhere", folder=kind, accepted="")


def test_a_place_of_which_the_system_tells_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="cannot be read: File name too long"):
        check_place(tmp_path / ("x" * 300), folder=True, accepted="")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (OSError(13, "Permission denied"), "Permission denied"),
        (OSError("image file is truncated."), "image file is truncated"),
        (ValueError("two\n  lines"), "two lines"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_reason_is_one_line_in_the_words_of_the_error(error: Exception, told: str) -> None:
    assert reason(error) == told
