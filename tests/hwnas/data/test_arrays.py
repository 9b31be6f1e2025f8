"""A .npz file of the user's own: what comes out of it, and what each mistake is answered with."""

import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from hwnas.data import Images, Splits, load, npz, pictures
from quant.errors import InvalidInput

Arrays = dict[str, Any]
TRAIN, TEST = 90, 12


def arrays(size: tuple[int, int] = (6, 6), channels: int = 3) -> Arrays:
    """Every image is different; its class is the first byte modulo 3."""
    rng = np.random.default_rng(0)
    found: Arrays = {}
    for part, count, start in (("train", TRAIN, 0), ("test", TEST, TRAIN)):
        x = rng.integers(0, 256, (count, *size, channels), dtype=np.uint8)
        x[:, 0, 0, 0] = start + np.arange(count)
        found |= {f"x_{part}": x, f"y_{part}": x[:, 0, 0, 0].astype(np.int64) % 3}
    return found


def save(path: Path, content: Arrays) -> str:
    np.savez(path, **content)
    return str(path)


def refused(path: Path, words: str, **options: Any) -> InvalidInput:
    """The one sentence that a file is answered with; it names the file."""
    with pytest.raises(InvalidInput, match=words) as caught:
        load(str(path), size=8, **options)
    assert str(path) in caught.value.what
    assert caught.value.accepted or caught.value.next_step
    assert "\n" not in str(caught.value)
    return caught.value


def parts(splits: Splits) -> list[Images]:
    with splits.final() as test:
        return [splits.train, splits.search_val, test]


# ---- what comes out


@pytest.mark.parametrize("saved", [np.savez, np.savez_compressed])
def test_test_is_x_test_and_a_sixth_of_each_class_of_x_train_is_search_val(
    saved: Callable[..., None], tmp_path: Path
) -> None:
    given = arrays()
    saved(tmp_path / "a.npz", **given)
    splits = load(str(tmp_path / "a.npz"), size=99)
    train, search_val, test = parts(splits)
    np.testing.assert_array_equal(test.x, given["x_test"])
    np.testing.assert_array_equal(test.y, given["y_test"])
    assert np.bincount(train.y).tolist() == [25] * 3
    assert np.bincount(search_val.y).tolist() == [5] * 3
    ids = np.concatenate([train.x, search_val.x])[:, 0, 0, 0]
    assert sorted(ids.tolist()) == list(range(TRAIN))  # each image in one split
    np.testing.assert_array_equal(np.concatenate([train.x, search_val.x]), given["x_train"][ids])
    for part in (train, search_val):
        np.testing.assert_array_equal(part.y, part.x[:, 0, 0, 0] % 3)
    assert (splits.classes, splits.size, splits.channels) == (3, 6, 3)
    assert splits.class_names == ("0", "1", "2")
    assert splits.describe() == (
        "102 images of 3 classes, 6 x 6 x 3: 75 train, 15 search-val, 12 test"
    )


def test_a_file_gives_the_same_splits_in_another_process(
    in_process: Callable[[str, str], str], tmp_path: Path
) -> None:
    name = save(tmp_path / "a.npz", arrays())
    script = f"from hwnas.data import load; print(load({name!r}, size=32).fingerprint)"
    assert in_process(script, "77") == load(name, size=32).fingerprint


def test_images_without_a_channel_axis_and_columns_of_classes_are_the_same_data(
    tmp_path: Path,
) -> None:
    full = arrays(channels=1)
    short = {key: value[..., 0] if key[0] == "x" else value[:, None] for key, value in full.items()}
    short["y_train"] = short["y_train"].astype(np.uint8)
    first, second = (load(save(tmp_path / "a.npz", each), size=8) for each in (full, short))
    assert first.fingerprint == second.fingerprint
    assert (first.channels, first.size) == (1, 6)


def test_other_arrays_in_the_file_are_left_alone(tmp_path: Path) -> None:
    plain = load(save(tmp_path / "a.npz", arrays()), size=8)
    more = arrays() | {"names": np.array([{"an": "object"}], dtype=object)}
    assert load(save(tmp_path / "b.npz", more), size=8).fingerprint == plain.fingerprint


def test_a_suffix_in_capitals_is_one_too(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", arrays())
    (tmp_path / "a.npz").rename(tmp_path / "A.NPZ")
    assert load(str(tmp_path / "A.NPZ"), size=8).size == 6


# ---- the size


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [(6, 6), (9, 6)])
def test_images_are_resized_only_when_asked(
    size: tuple[int, int], channels: int, tmp_path: Path
) -> None:
    """Pillow on the centred square, image by image, is the other implementation."""
    given = arrays(size, channels)
    splits = load(save(tmp_path / "a.npz", given), size=4, resize=True)
    assert (splits.size, splits.channels) == (4, channels)
    _, _, test = parts(splits)
    np.testing.assert_array_equal(test.y, given["y_test"])
    top = (size[0] - 6) // 2
    for found, x in zip(test.x, given["x_test"], strict=True):
        picture = Image.fromarray(x if channels == 3 else x[..., 0])
        square = picture.resize((4, 4), Image.Resampling.LANCZOS, box=(0, top, 6, top + 6))
        np.testing.assert_array_equal(found, np.asarray(square).reshape(4, 4, channels))


def test_images_that_have_the_size_keep_every_pixel(tmp_path: Path) -> None:
    name = save(tmp_path / "a.npz", arrays())
    assert load(name, size=6, resize=True).fingerprint == load(name, size=32).fingerprint


def test_images_that_are_not_square_are_refused_unless_resized(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", arrays((6, 8)))
    error = refused(tmp_path / "a.npz", "6 x 8 pixels")
    assert "--image-size" in error.next_step
    assert npz(tmp_path / "a.npz", 5).size == 5


def test_images_of_two_sizes_are_refused_unless_resized(tmp_path: Path) -> None:
    given = arrays((6, 6)) | {"x_test": arrays((8, 8))["x_test"]}
    save(tmp_path / "a.npz", given)
    assert "--image-size" in refused(tmp_path / "a.npz", "6 x 6 and 8 x 8").next_step
    assert npz(tmp_path / "a.npz", 8).size == 8


# ---- mistakes in the arrays


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_train": np.zeros((TRAIN, 6, 6, 3), np.float32)}, "x_train holds float32"),
        ({"x_test": np.zeros((TEST, 6, 6, 3))}, "x_test holds float64"),
        ({"x_train": np.zeros((TRAIN, 3, 6, 6), np.uint8)}, "x_train has the shape (90, 3, 6, 6)"),
        ({"x_test": np.zeros((TEST, 6, 6, 1), np.uint8)}, "1 channel and images of 3"),
        ({"x_train": np.zeros((TRAIN - 1, 6, 6, 3), np.uint8)}, "89 images, y_train 90 classes"),
        ({"y_test": np.zeros(TEST + 1, int)}, "12 images, y_test 13 classes"),
        ({"y_train": np.zeros(TRAIN)}, "y_train has the shape (90,) and holds float64"),
        ({"y_train": np.eye(3, dtype=int)[[0] * TRAIN]}, "y_train has the shape (90, 3)"),
        ({"y_train": np.zeros(TRAIN, int)}, "of class 1 in TEST, but none in TRAIN"),
        ({"y_test": np.full(TEST, 5)}, "of class 5 in TEST, but none in TRAIN"),
        ({"y_train": np.repeat([0, 1, 2], [5, 40, 45])}, "has 9 images of class 0, 4 of them"),
        (
            {"x_test": np.zeros((0, 6, 6, 3), np.uint8), "y_test": np.zeros(0, int)},
            "has no images in TEST",
        ),
        (
            {"x_train": np.zeros((0, 6, 6, 3), np.uint8), "y_train": np.zeros(0, int)},
            "has 12 images",
        ),
        ({"y_train": np.zeros(TRAIN, int), "y_test": np.zeros(TEST, int)}, "has one class only"),
        (
            {"y_train": np.arange(TRAIN) % 3 + 1, "y_test": np.arange(TEST) % 3 + 1},
            "has the classes 1, 2, 3, but none 0",
        ),
    ],
)
def test_arrays_that_cannot_be_used_are_refused(change: Arrays, words: str, tmp_path: Path) -> None:
    save(tmp_path / "a.npz", arrays() | change)
    refused(tmp_path / "a.npz", re.escape(words))


def test_a_class_of_one_image_is_counted_and_not_called_missing(tmp_path: Path) -> None:
    given = arrays() | {"y_train": np.repeat([0, 1, 2], [1, 44, 45]), "y_test": np.ones(TEST, int)}
    save(tmp_path / "a.npz", given)
    refused(tmp_path / "a.npz", "has 1 images of class 0, 1 of them in TRAIN")


@pytest.mark.parametrize("lacking", [("x_train",), ("y_test",), ("x_train", "y_train", "x_test")])
def test_missing_arrays_are_named_with_those_that_are_there(
    lacking: tuple[str, ...], tmp_path: Path
) -> None:
    given = {key: value for key, value in arrays().items() if key not in lacking}
    save(tmp_path / "a.npz", given)
    error = refused(tmp_path / "a.npz", f"lacks {', '.join(lacking)}; it holds {', '.join(given)}")
    assert "x_train, y_train, x_test, y_test" in error.accepted


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    trap = tmp_path / "trap"

    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trap,)

    objects = np.array([Trap()] * TRAIN, dtype=object)
    save(tmp_path / "a.npz", arrays() | {"y_train": objects})
    error = refused(tmp_path / "a.npz", "y_train cannot be read: Object arrays cannot be loaded")
    assert "no objects" in error.accepted
    assert not trap.exists()
    with np.load(tmp_path / "a.npz", allow_pickle=True) as file:
        _ = file["y_train"]
    assert trap.exists()  # it was a real trap


# ---- mistakes in the file


@pytest.mark.parametrize(
    "content",
    [b"", b"only some text", b"\x93NUMPY\x01\x00", b"PK\x03\x04", b"\x80\x04N."],
    ids=["empty", "text", "npy", "zip", "pickle"],
)
def test_a_file_that_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.npz").write_bytes(content)
    error = refused(tmp_path / "a.npz", "is not a whole .npz file: File is not a zip file")
    assert "numpy.savez" in error.accepted


@pytest.mark.parametrize("saved", [np.savez, np.savez_compressed])
def test_a_damaged_file_is_refused_or_its_damage_changed_nothing(
    saved: Callable[..., None], tmp_path: Path
) -> None:
    """Cut anywhere, a file is refused; with a byte changed it is refused or gives the same data."""
    path = tmp_path / "a.npz"
    saved(path, **{key: value[..., :1] if key[0] == "x" else value
                   for key, value in arrays((2, 2)).items()})  # fmt: skip
    whole = path.read_bytes()
    fingerprint = npz(path).fingerprint
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        refused(path, "is not a whole .npz file")
    outcomes = set()
    for place in np.random.default_rng(0).permutation(len(whole))[:400]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        try:
            outcomes.add(npz(path).fingerprint)
        except InvalidInput as error:
            outcomes.add(f"refused with its path: {str(path) in error.what}")
    assert outcomes == {fingerprint, "refused with its path: True"}


def test_a_member_that_is_no_array_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", {key: v for key, v in arrays().items() if key != "y_test"})
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("y_test.npy", "not an array")
    refused(tmp_path / "a.npz", "y_test cannot be read")


def test_a_member_longer_than_its_header_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.npz", {key: v for key, v in arrays().items() if key != "y_test"})
    np.save(tmp_path / "y.npy", arrays()["y_test"])
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("y_test.npy", (tmp_path / "y.npy").read_bytes() + b"more")
    refused(tmp_path / "a.npz", "y_test cannot be read: it is longer than its header says")


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.npz", "is not there")
    (tmp_path / "folder.npz").mkdir()
    refused(tmp_path / "folder.npz", "is a folder, not a file")


# ---- memory


def test_a_file_that_memory_cannot_hold_is_refused_before_it_is_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    save(tmp_path / "a.npz", arrays())
    stored = sum(128 + value.nbytes for value in arrays().values())  # a header is 128 bytes
    told = tmp_path / "meminfo"
    monkeypatch.setattr(pictures, "MEMORY", told)
    told.write_text(f"MemAvailable: {-(-2 * stored // 1024)} kB\n")
    assert len(npz(tmp_path / "a.npz").train) == 75
    told.write_text(f"MemAvailable: {2 * stored // 1024 - 1} kB\n")
    refused(tmp_path / "a.npz", "The arrays of .* need 2.47e-05 GB of memory; 2.36e-05 GB")
    told.write_text(f"MemAvailable: {-(-2 * stored // 1024)} kB\n")
    with pytest.raises(InvalidInput, match="90 images of 30 x 30 x 3 need") as caught:
        npz(tmp_path / "a.npz", 30)
    assert "smaller --image-size" in caught.value.next_step
