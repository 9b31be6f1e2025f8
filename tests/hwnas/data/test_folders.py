"""Pictures in folders: the layouts, the division, and what each mistake is answered with."""

import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from hwnas.data import Images, Splits, folder, load, pictures
from quant.errors import InvalidInput

SIZE = 4
COLOURS = {"ant": (200, 10, 10), "bee": (10, 200, 10), "cat": (10, 10, 200)}


def write(place: Path, count: int, colour: tuple[int, int, int], start: int = 0) -> None:
    """Pictures of one colour; the pixel at the top left holds the picture's number."""
    place.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        image = Image.new("RGB", (SIZE, SIZE), colour)
        image.putpixel((0, 0), (i % 256, i // 256, 99))
        image.save(place / f"{i:04}.png")


def classes_under(place: Path, count: int, start: int = 0) -> None:
    for number, (name, colour) in enumerate(COLOURS.items()):
        write(place / name, count, colour, start + 100 * number)


def ids(images: Images) -> list[int]:
    return [int(x[0, 0, 0]) + 256 * int(x[0, 0, 1]) for x in images.x]


def parts(splits: Splits) -> list[Images]:
    with splits.final() as test:
        return [splits.train, splits.search_val, test]


def refused(place: Path, words: str) -> InvalidInput:
    with pytest.raises(InvalidInput, match=words) as caught:
        load(f"folder:{place}", size=SIZE)
    assert str(place) in caught.value.what
    assert "\n" not in str(caught.value)
    return caught.value


def check_colours(splits: Splits) -> None:
    """Every picture has its class's colour and its number, and stands in one split."""
    for part in parts(splits):
        expected = np.array(list(COLOURS.values()))[part.y]
        for row, column in ((0, 1), (1, 0), (SIZE - 1, SIZE - 1)):
            np.testing.assert_array_equal(part.x[:, row, column], expected)
        assert [number // 100 % 3 for number in ids(part)] == part.y.tolist()
    numbers = [number for part in parts(splits) for number in ids(part)]
    assert len(set(numbers)) == len(numbers)


# ---- layouts


def test_classes_alone_are_divided_70_15_15_each(tmp_path: Path) -> None:
    classes_under(tmp_path, 40)
    splits = load(f"folder:{tmp_path}", size=SIZE)
    assert splits.class_names == ("ant", "bee", "cat")
    assert [np.bincount(part.y).tolist() for part in parts(splits)] == [[28] * 3, [6] * 3, [6] * 3]
    check_colours(splits)
    assert splits.describe() == (
        "120 images of 3 classes, 4 x 4 x 3: 84 train, 18 search-val, 18 test"
    )
    for part in parts(splits):  # a prefix holds every class
        assert set(part.y[:12].tolist()) == {0, 1, 2}


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_three_folders_are_the_three_splits(val: str, tmp_path: Path) -> None:
    for number, (name, count) in enumerate({"train": 12, val: 3, "test": 2}.items()):
        classes_under(tmp_path / name, count, 300 * number)
    splits = folder(tmp_path, SIZE)
    for number, (part, count) in enumerate(zip(parts(splits), (12, 3, 2), strict=True)):
        start = 300 * number
        wanted = [start + 100 * c + i for c in range(3) for i in range(count)]
        assert sorted(ids(part)) == wanted
        assert ids(part) != wanted  # shuffled
    assert splits.class_names == ("ant", "bee", "cat")
    check_colours(splits)


@pytest.mark.parametrize("second", ["val", "validation", "test", "TEST"])
def test_of_two_folders_the_second_is_test(second: str, tmp_path: Path) -> None:
    classes_under(tmp_path / "train", 18)
    classes_under(tmp_path / second, 2, 300)
    splits = folder(tmp_path, SIZE)
    train, search_val, test = parts(splits)
    assert sorted(ids(test)) == [300, 301, 400, 401, 500, 501]
    assert np.bincount(train.y).tolist() == [15] * 3
    assert np.bincount(search_val.y).tolist() == [3] * 3
    assert sorted(ids(train) + ids(search_val)) == [
        100 * c + i for c in range(3) for i in range(18)
    ]
    check_colours(splits)


def test_folders_beside_the_splits_are_left_out(tmp_path: Path) -> None:
    classes_under(tmp_path / "train", 18)
    classes_under(tmp_path / "test", 2, 300)
    before = folder(tmp_path, SIZE).fingerprint
    write(tmp_path / "unlabelled", 3, (0, 0, 0))
    assert folder(tmp_path, SIZE).fingerprint == before


@pytest.mark.parametrize("name", ["train", "test", "val"])
def test_a_class_may_be_called_like_a_split_where_there_are_no_splits(
    name: str, tmp_path: Path
) -> None:
    write(tmp_path / "bicycle", 40, (1, 1, 1))
    write(tmp_path / name, 40, (2, 2, 2), 100)
    assert folder(tmp_path, SIZE).class_names == ("bicycle", name)


def test_splits_through_links_are_the_same(tmp_path: Path) -> None:
    classes_under(tmp_path / "real", 40)
    (tmp_path / "linked").mkdir()
    for name in COLOURS:
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "whole").symlink_to(tmp_path / "linked")
    expected = folder(tmp_path / "real", SIZE).fingerprint
    assert folder(tmp_path / "linked", SIZE).fingerprint == expected
    assert folder(tmp_path / "whole", SIZE).fingerprint == expected


# ---- what is read, and in which order


def test_hidden_files_other_files_and_inner_folders_are_left_out(tmp_path: Path) -> None:
    classes_under(tmp_path, 40)
    before = folder(tmp_path, SIZE)
    (tmp_path / "README.md").write_text("about")
    write(tmp_path / ".cache", 3, (1, 2, 3))
    (tmp_path / "ant" / "notes.txt").write_text("text")
    (tmp_path / "ant" / "Thumbs.db").write_bytes(b"\0")
    (tmp_path / "ant" / "noending").write_bytes(b"\0")
    (tmp_path / "ant" / "._0001.png").write_bytes(b"\0")
    write(tmp_path / "ant" / "inner.png", 1, (9, 9, 9))
    assert folder(tmp_path, SIZE).fingerprint == before.fingerprint


@pytest.mark.parametrize(
    "suffix", [".png", ".PNG", ".jpg", ".JPEG", ".bmp", ".gif", ".webp", ".tif", ".TIFF"]
)
def test_every_recognised_suffix_is_read_in_any_case(suffix: str, tmp_path: Path) -> None:
    classes_under(tmp_path, 40)
    Image.new("RGB", (9, 5), COLOURS["bee"]).save(tmp_path / "bee" / f"extra{suffix}")
    splits = folder(tmp_path, SIZE)
    counts = sum(np.bincount(part.y, minlength=3) for part in parts(splits))
    assert counts.tolist() == [40, 41, 40]
    (extra,) = (
        x
        for part in parts(splits)
        for x in part.x
        if x[0, 0, 2] != 99  # it bears no number
    )
    assert np.abs(extra.astype(int) - COLOURS["bee"]).max() <= 3  # JPEG rounds its colours


def test_pictures_of_any_size_come_out_in_the_asked_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (tmp_path / name).mkdir()
        for i in range(20):
            width, height = rng.integers(3, 90, 2)
            Image.new("RGB", (int(width), int(height)), colour).save(tmp_path / name / f"{i}.png")
    splits = folder(tmp_path, 16)
    assert (splits.size, splits.channels, splits.classes) == (16, 3, 3)
    for part in parts(splits):
        expected = np.array(list(COLOURS.values()))[part.y][:, None, None]
        np.testing.assert_array_equal(part.x, np.broadcast_to(expected, part.x.shape))


def test_the_same_folder_gives_the_same_splits_in_another_process(
    in_process: Callable[[str, str], str], tmp_path: Path
) -> None:
    classes_under(tmp_path, 40)
    script = (
        "from hwnas.data import load; "
        f"print(load({f'folder:{tmp_path}'!r}, size={SIZE}).fingerprint)"
    )
    assert in_process(script, "5") == folder(tmp_path, SIZE).fingerprint


def test_neither_the_time_nor_the_order_of_writing_matters(tmp_path: Path) -> None:
    classes_under(tmp_path / "a", 40)
    for file in sorted((tmp_path / "a").rglob("*.png"), reverse=True):
        copy = tmp_path / "b" / file.relative_to(tmp_path / "a")
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
        os.utime(copy, (0, 0))
    assert folder(tmp_path / "a", SIZE).fingerprint == folder(tmp_path / "b", SIZE).fingerprint


# ---- mistakes


def test_a_place_that_is_no_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    assert "sub-folder a class" in refused(tmp_path / "nowhere", "is not there").accepted
    refused(tmp_path / "file", "is a file, not a folder")


@pytest.mark.parametrize("inside", ["", "a.png", ".hidden/a.png"])
def test_a_folder_without_classes_is_refused(inside: str, tmp_path: Path) -> None:
    if inside:
        (tmp_path / inside).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / inside)
    assert "sub-folder a class" in refused(tmp_path, "holds no sub-folders").accepted


@pytest.mark.parametrize("files", [(), ("notes.txt", ".hidden.png")])
@pytest.mark.parametrize("inner", ["", "test"])
def test_a_class_without_images_is_named(
    files: tuple[str, ...], inner: str, tmp_path: Path
) -> None:
    if inner:
        classes_under(tmp_path / "train", 20)
        write(tmp_path / "train" / "empty", 20, (1, 1, 1), 900)
    classes_under(tmp_path / inner, 20, 300)
    empty = tmp_path / inner / "empty"
    empty.mkdir()
    for name in files:
        (empty / name).write_bytes(b"text")
    assert ".jpg, .png" in refused(tmp_path, f"{empty} holds no images").accepted.replace(
        ".jpeg, ", ""
    )


def test_one_class_only_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "ant", 60, COLOURS["ant"])
    refused(tmp_path, "has one class only")


def test_too_few_images_of_a_class_are_refused_with_its_name(tmp_path: Path) -> None:
    classes_under(tmp_path, 40)
    write(tmp_path / "dog", 13, (1, 1, 1), 900)
    refused(tmp_path, "has 13 images of class 'dog', 9 of them in TRAIN")
    write(tmp_path / "dog", 14, (1, 1, 1), 900)
    assert [int((part.y == 3).sum()) for part in parts(folder(tmp_path, SIZE))] == [10, 2, 2]


def test_too_few_images_are_told_before_any_is_decoded(tmp_path: Path) -> None:
    classes_under(tmp_path, 13)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    refused(tmp_path, "has 13 images of class 'ant', 9 of them in TRAIN")


def test_too_few_images_in_all_are_refused(tmp_path: Path) -> None:
    for number, name in enumerate(("ant", "bee")):
        write(tmp_path / name, 14, COLOURS[name], 100 * number)
    refused(tmp_path, "has 28 images")


def test_training_images_without_any_others_are_refused(tmp_path: Path) -> None:
    classes_under(tmp_path / "train", 20)
    assert "val" in refused(tmp_path, "holds train only").accepted


def test_two_folders_for_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("train", "val", "valid"):
        classes_under(tmp_path / name, 20)
    refused(tmp_path, "holds val and valid")


@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_a_class_that_one_split_lacks_is_named(role: str, tmp_path: Path) -> None:
    for number, name in enumerate(("train", "val", "test")):
        classes_under(tmp_path / name, 20, 300 * number)
    for file in (tmp_path / role / "bee").iterdir():
        file.unlink()
    (tmp_path / role / "bee").rmdir()
    error = refused(tmp_path, f"has no counterpart {tmp_path / role / 'bee'}")
    others = {"train", "val", "test"} - {role}
    assert sum(f"{tmp_path / other / 'bee'} has no" in error.what for other in others) == 1
    assert "the same classes" in error.accepted


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    classes_under(tmp_path, 20)
    bad = tmp_path / "bee" / "0105.png"
    bad.write_bytes(bad.read_bytes()[:40])
    error = refused(tmp_path, f"{bad} is not a readable image: ")
    assert error.next_step == "remove it or replace it"


def test_pictures_that_memory_cannot_hold_are_refused_before_any_is_decoded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    classes_under(tmp_path, 40)
    told = tmp_path / "meminfo"
    told.write_text("MemAvailable:  6 kB\n")
    monkeypatch.setattr(pictures, "MEMORY", told)
    for file in tmp_path.rglob("*.png"):
        file.write_bytes(b"")
    refused(tmp_path, "is not a readable image")  # 120 x 4 x 4 x 3 = 5,760 bytes would fit
    with pytest.raises(InvalidInput, match="120 images of 5 x 5 x 3 need 9e-06 GB") as caught:
        folder(tmp_path, 5)
    assert "--image-size: 4 fits" in caught.value.next_step


# ---- what the system does not let us read


@contextmanager
def without_privilege() -> Iterator[None]:
    """As another user, where the tests run as one whom no permission stops."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize(
    ("closed", "mode"),
    [("", 0), ("ant", 0), ("ant/0003.png", 0), ("outer", 0), ("", 0o444), ("ant", 0o444)],
)
def test_what_may_not_be_read_is_named(closed: str, mode: int) -> None:
    """A folder of mode 444 can be listed, but nothing in it can be looked at."""
    with tempfile.TemporaryDirectory() as name:
        outer = Path(name)
        place = outer / "set"
        classes_under(place, 20)
        for each in (outer, place, *place.rglob("*")):
            each.chmod(0o755)
        target = outer if closed == "outer" else place / closed
        folder(place, SIZE)  # every decoder is loaded, and all can be read
        target.chmod(mode)
        try:
            with without_privilege():
                words = (
                    "is not a readable image: " if closed.endswith("png") else "cannot be read: "
                )
                told = place if closed == "outer" else target
                with pytest.raises(InvalidInput, match=f"{told} {words}Permission denied"):
                    folder(place, SIZE)
        finally:
            target.chmod(0o755)


def test_no_picture_stands_twice(tmp_path: Path) -> None:
    classes_under(tmp_path, 33)
    counts = Counter(number for part in parts(folder(tmp_path, SIZE)) for number in ids(part))
    assert counts == Counter(100 * c + i for c in range(3) for i in range(33))
