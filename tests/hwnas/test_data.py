"""The data sets against other implementations, and the seal on TEST."""

import gzip
import hashlib
import os
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn import datasets
from torch.nn import functional

from hwnas.data import FORMS, SIZE, Images, Splits, as_input, digits, fashion_mnist, load
from quant.errors import InvalidInput


@pytest.fixture(scope="module")
def splits() -> Splits:
    return digits()


def parts(splits: Splits) -> dict[str, Images]:
    with splits.final() as test:
        return {"train": splits.train, "search_val": splits.search_val, "test": test}


def tiny(class_names: Sequence[str] = ()) -> Splits:
    rng = np.random.default_rng(0)

    def split(count: int) -> Images:
        x = rng.integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)
        return Images(x, np.arange(count) % 5)

    return Splits("tiny", split(10), split(6), split(7), class_names)


# ---- digits


def test_digits_come_in_the_stated_sizes_and_as_bytes_of_32_by_32(splits: Splits) -> None:
    found = parts(splits)
    assert {name: len(part) for name, part in found.items()} == {
        "train": 900,
        "search_val": 400,
        "test": 497,
    }
    for part in found.values():
        assert part.x.shape == (len(part), 32, 32, 1)
        assert part.x.dtype == np.uint8
        assert part.x.min() == 0
        assert part.x.max() == 255
        assert set(part.y.tolist()) == set(range(10))
    assert (splits.classes, splits.size, splits.channels) == (10, 32, 1)


def test_digits_are_the_bilinear_enlargement_and_each_is_in_one_split(splits: Splits) -> None:
    """torch's bilinear interpolation is the other implementation; the splits partition its images.

    Rounding may differ by one step of 255 where a value lies between two bytes.
    """
    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images / 16 * 255)[:, None]
    large = functional.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    expected = large[:, 0].numpy()
    order = np.random.default_rng(0).permutation(1797)
    found = parts(splits)
    x = np.concatenate([part.x[..., 0] for part in found.values()])
    y = np.concatenate([part.y for part in found.values()])
    assert np.abs(x - expected[order]).max() <= 0.5 + 1e-6
    np.testing.assert_array_equal(y, raw.target[order])


def test_no_image_of_digits_stands_in_two_splits(splits: Splits) -> None:
    counts = Counter(image.tobytes() for part in parts(splits).values() for image in part.x)
    assert sum(counts.values()) == 1797
    assert max(counts.values()) == 1


def test_digits_are_resized_only_when_asked(splits: Splits) -> None:
    assert load("digits", size=8).fingerprint == splits.fingerprint
    assert load("digits", size=32, resize=True).fingerprint == splits.fingerprint
    small = load("digits", size=8, resize=True)
    assert (small.size, small.channels, small.classes, small.name) == (8, 1, 10, "digits")
    for part, whole in zip(parts(small).values(), parts(splits).values(), strict=True):
        np.testing.assert_array_equal(part.y, whole.y)
        for image, large in zip(part.x[:20], whole.x[:20], strict=True):
            wanted = Image.fromarray(large[..., 0]).resize((8, 8), Image.Resampling.LANCZOS)
            np.testing.assert_array_equal(image[..., 0], np.asarray(wanted))


# ---- what a set says of itself


def test_a_set_describes_itself_in_one_line(splits: Splits) -> None:
    told = splits.describe()
    assert told == ("1,797 images of 10 classes, 32 x 32 x 1: 900 train, 400 search-val, 497 test")
    assert tiny().describe() == "23 images of 5 classes, 4 x 4 x 1: 10 train, 6 search-val, 7 test"


def test_classes_have_their_numbers_for_names_or_those_that_are_given(splits: Splits) -> None:
    assert splits.class_names == tuple("0123456789")
    assert tiny("abcde").class_names == ("a", "b", "c", "d", "e")
    with pytest.raises(ValueError, match="4 names for 5 classes"):
        tiny("abcd")


def test_mapped_splits_are_changed_alike_and_stay_sealed() -> None:
    base = tiny("abcde")
    turned = base.mapped(lambda x: 255 - x[:, ::2, ::2])
    assert turned.name == base.name
    assert (turned.size, turned.class_names) == (2, base.class_names)
    for part, whole in zip(parts(turned).values(), parts(base).values(), strict=True):
        np.testing.assert_array_equal(part.y, whole.y)
        np.testing.assert_array_equal(part.x, 255 - whole.x[:, ::2, ::2])
    with pytest.raises(RuntimeError, match="TEST is sealed"):
        _ = turned.test


# ---- the seal


def test_test_is_open_inside_final_and_sealed_before_and_after() -> None:
    splits = tiny()
    with pytest.raises(RuntimeError, match="TEST is sealed"):
        _ = splits.test
    with splits.final() as images:
        assert len(images) == 7
        assert splits.test is images
    with pytest.raises(RuntimeError, match="TEST is sealed"):
        _ = splits.test


def test_test_is_sealed_again_after_an_error_in_final() -> None:
    splits = tiny()
    with pytest.raises(KeyError), splits.final():
        raise KeyError
    with pytest.raises(RuntimeError, match="TEST is sealed"):
        _ = splits.test


def test_the_seal_is_not_opened_by_the_fingerprint_or_the_description() -> None:
    splits = tiny()
    assert len(splits.fingerprint) == 16
    assert "7 test" in splits.describe()
    with pytest.raises(RuntimeError, match="TEST is sealed"):
        _ = splits.test


# ---- the fingerprint


def test_the_fingerprint_is_the_same_in_another_process(splits: Splits) -> None:
    code = "from hwnas.data import digits; print(digits().fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert told.stdout.strip() == splits.fingerprint == digits().fingerprint


def test_the_fingerprint_tells_any_change_of_images_classes_or_split() -> None:
    base = tiny()
    with base.final() as test:
        train, val = base.train, base.search_val
        pixel = train.x.copy()
        pixel[3, 2, 1, 0] ^= 1
        label = test.y.copy()
        label[-1] += 1
        joined = Images(np.concatenate([train.x, val.x]), np.concatenate([train.y, val.y]))
        variants = [
            base,
            Splits("tiny", Images(pixel, train.y), val, test),
            Splits("tiny", train, val, Images(test.x, label)),
            Splits("tiny", val, train, test),
            Splits("tiny", train, test, val),
            Splits("tiny", joined.first(11), Images(joined.x[11:], joined.y[11:]), test),
            Splits("tiny", train, val, test.first(6)),
        ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)
    assert tiny().fingerprint == base.fingerprint


def test_the_fingerprint_hashes_the_bytes_of_images_and_classes_in_order() -> None:
    base = tiny()
    digest = hashlib.sha256()
    for part in parts(base).values():
        digest.update(part.x.tobytes() + part.y.tobytes())
    assert base.fingerprint == digest.hexdigest()[:16]
    mirrored = base.mapped(lambda x: x[:, :, ::-1])  # no copy: its bytes lie the other way round
    copied = base.mapped(lambda x: x[:, :, ::-1].copy())
    assert mirrored.fingerprint == copied.fingerprint != base.fingerprint


def test_the_fingerprint_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny()
    before = base.fingerprint
    monkeypatch.delattr(hashlib, "sha256")
    assert base.fingerprint == before


def test_the_first_images_are_a_prefix() -> None:
    images = tiny().train
    assert len(images.first(4)) == 4
    np.testing.assert_array_equal(images.first(4).x, images.x[:4])
    np.testing.assert_array_equal(images.first(4).y, images.y[:4])
    assert len(images.first(99)) == 10


# ---- what a model takes


def test_an_input_is_the_transposed_bytes_over_255_by_a_slow_loop() -> None:
    x = np.random.default_rng(0).integers(0, 256, (2, 3, 4, 5), dtype=np.uint8)
    found = as_input(x)
    assert found.shape == (2, 5, 3, 4)
    assert found.dtype == np.float32
    assert found.flags["C_CONTIGUOUS"]
    for n, row, column, channel in np.ndindex(x.shape):
        expected = np.float32(x[n, row, column, channel]) / np.float32(255)
        assert found[n, channel, row, column] == expected
    ends = as_input(np.array([0, 255], np.uint8).reshape(1, 1, 2, 1))
    assert ends.ravel().tolist() == [0.0, 1.0]


# ---- names


@pytest.mark.parametrize(
    "name",
    [
        "",
        ":",
        "mnist",
        "digits:somewhere",
        "fashion-mnist",
        "fashion-mnist:",
        "DIGITS",
        "folder",
        "folder:",
        "torchvision",
        "torchvision:",
        "images.npy",
        "none",
        "none:",
        "none:0",
        "none:1",
        "none:-3",
        "none:many",
        "none:2.5",
    ],
)
def test_an_unknown_data_set_is_refused_with_what_is_accepted(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load(name, size=32)
    assert caught.value.what == f"--data is {name!r}."
    for form in (
        "digits",
        "fashion-mnist:DIR",
        "FILE.npz",
        "folder:DIR",
        "torchvision:NAME",
        "none:CLASSES",
    ):
        assert form in FORMS
        assert form in caught.value.accepted
    assert caught.value.next_step


@pytest.mark.parametrize("size", [0, -3])
@pytest.mark.parametrize("name", ["digits", "folder:nowhere", "nowhere.npz"])
def test_a_size_without_pixels_is_refused(name: str, size: int) -> None:
    with pytest.raises(InvalidInput, match=f"--image-size is {size}"):
        load(name, size=size)


@pytest.mark.parametrize(("classes", "size"), [(2, 8), (1000, 224)])
def test_classes_alone_make_splits_without_an_image(classes: int, size: int) -> None:
    """Colour pictures of the size, so that what will be trained later can be profiled now."""
    found = load(f"none:{classes}", size=size)
    assert (found.classes, found.size, found.channels) == (classes, size, 3)
    assert found.class_names == tuple(str(number) for number in range(classes))
    assert len(found.train) == len(found.search_val) == 0
    with found.final() as test:
        assert len(test) == 0
    assert found.fingerprint == load(f"none:{classes}", size=size).fingerprint


def test_digits_are_loaded_by_name(splits: Splits) -> None:
    assert load("digits", size=32).fingerprint == splits.fingerprint


@pytest.mark.parametrize("place", ["nowhere", "empty", "file"])
def test_a_folder_without_fashion_mnist_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InvalidInput, match="train-images-idx3-ubyte") as caught:
        load(f"fashion-mnist:{tmp_path / place}", size=32)
    assert str(tmp_path / place) in caught.value.what
    assert "four files" in caught.value.accepted


# ---- idx files


def idx(array: np.ndarray) -> bytes:
    """The idx format: 0 0, type 8 (bytes), dimensions, then each as a big-endian int32."""
    header = struct.pack(f">BBBB{array.ndim}i", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_set(folder: Path, *, zipped: bool, train: int = 180, test: int = 12) -> None:
    """Image i is filled with the byte i; its class is i % 10."""
    folder.mkdir(parents=True)
    for stem, count in (("train", train), ("t10k", test)):
        number = np.arange(count)
        images = np.broadcast_to(number[:, None, None] + 1, (count, 28, 28))
        for name, content in (("images-idx3", images), ("labels-idx1", number % 10)):
            raw = idx(content)
            path = folder / f"{stem}-{name}-ubyte{'.gz' if zipped else ''}"
            path.write_bytes(gzip.compress(raw) if zipped else raw)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inner", ["", "FashionMNIST/raw"])
def test_idx_files_are_read_gzipped_or_not_anywhere_under_the_folder(
    zipped: bool, inner: str, tmp_path: Path
) -> None:
    write_set(tmp_path / "set" / inner, zipped=zipped)
    splits = fashion_mnist(tmp_path / "set")
    assert (len(splits.train), len(splits.search_val)) == (150, 30)  # SEARCH-VAL is a sixth
    both = (splits.train, splits.search_val)
    train = Images(*(np.concatenate([getattr(part, axis) for part in both]) for axis in "xy"))
    assert train.x.shape == (180, SIZE, SIZE, 1)
    assert train.x.dtype == np.uint8
    with splits.final() as test:
        for images, count in ((train, 180), (test, 12)):
            number = images.x[:, 16, 16, 0].astype(int) - 1
            assert sorted(number.tolist()) == list(range(count))
            np.testing.assert_array_equal(images.y, number % 10)  # labels move with their images
            inside = images.x[:, 2:30, 2:30, 0]
            assert (inside == inside[:, :1, :1]).all()
            assert (images.x.sum((1, 2, 3), dtype=int) == 28 * 28 * (number + 1)).all()
        assert test.x[:, 16, 16, 0].tolist() == list(range(1, 13))  # TEST stays in its order
    # TRAIN and SEARCH-VAL are one permutation, on which results depend
    order = np.random.default_rng(0).permutation(180)
    np.testing.assert_array_equal(train.x[:, 16, 16, 0], order + 1)


def test_gzipped_and_plain_files_give_the_same_data(tmp_path: Path) -> None:
    write_set(tmp_path / "plain", zipped=False)
    write_set(tmp_path / "zipped", zipped=True)
    plain, zipped = fashion_mnist(tmp_path / "plain"), fashion_mnist(tmp_path / "zipped")
    assert plain.fingerprint == zipped.fingerprint


@pytest.mark.parametrize("missing", ["train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"])
def test_one_missing_idx_file_is_named(missing: str, tmp_path: Path) -> None:
    write_set(tmp_path / "set", zipped=False)
    (tmp_path / "set" / f"{missing}-ubyte").unlink()
    with pytest.raises(InvalidInput, match=missing):
        fashion_mnist(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("train-images-idx3-ubyte", b""),
        ("train-images-idx3-ubyte", idx(np.zeros((30, 28, 28)))[:5000]),
        ("train-labels-idx1-ubyte", b"not an idx file, only some text"),
        ("train-labels-idx1-ubyte", idx(np.zeros((180, 1)))),
        ("train-images-idx3-ubyte", idx(np.zeros((180, 784)))),
        ("t10k-images-idx3-ubyte.gz", b"not gzip"),
        ("t10k-images-idx3-ubyte.gz", gzip.compress(idx(np.zeros((12, 28, 28))))[:30]),
    ],
    ids=["empty", "truncated", "text", "two-dimensional labels", "flat", "not gzip", "cut gzip"],
)
def test_a_damaged_idx_file_is_refused_with_its_path(
    name: str, content: bytes, tmp_path: Path
) -> None:
    write_set(tmp_path / "set", zipped=name.endswith(".gz"))
    (tmp_path / "set" / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=name):
        fashion_mnist(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t10k-labels-idx1", np.zeros(11), "holds 12 images, t10k-labels 11 classes"),
        ("train-images-idx3", np.zeros((180, 28, 20)), "32 x 24 and 32 x 32 pixels"),
        ("train-images-idx3", np.zeros((180, 30, 30)), "32 x 32 and 34 x 34 pixels"),
        ("t10k-labels-idx1", np.full(12, 10), "of class 10 in TEST, but none in TRAIN"),
        ("train-labels-idx1", np.arange(180) % 10 + 1, "class 0 in TEST, but none in TRAIN"),
        ("train-labels-idx1", np.arange(180) // 176, "has 4 images of class 1"),
    ],
)
def test_idx_files_that_do_not_belong_together_are_refused(
    name: str, content: np.ndarray, words: str, tmp_path: Path
) -> None:
    write_set(tmp_path / "set", zipped=False)
    if words.endswith("class 1"):
        (tmp_path / "set" / "t10k-labels-idx1-ubyte").write_bytes(idx(np.zeros(12)))
    (tmp_path / "set" / f"{name}-ubyte").write_bytes(idx(content))
    with pytest.raises(InvalidInput, match=words):
        fashion_mnist(tmp_path / "set")


def test_fashion_mnist_is_resized_only_when_asked(tmp_path: Path) -> None:
    write_set(tmp_path / "set", zipped=False)
    whole = load(f"fashion-mnist:{tmp_path / 'set'}", size=16)
    small = load(f"fashion-mnist:{tmp_path / 'set'}", size=16, resize=True)
    assert (whole.size, small.size) == (SIZE, 16)
    assert whole.fingerprint == fashion_mnist(tmp_path / "set").fingerprint
    np.testing.assert_array_equal(small.train.x[:, 8, 8], whole.train.x[:, 16, 16])  # flat inside
    np.testing.assert_array_equal(small.train.y, whole.train.y)


@pytest.fixture(scope="module")
def real() -> Splits:
    folder = os.environ.get("HWNAS_DATA_DIR")
    if not folder or not (Path(folder) / "fashion-mnist").is_dir():
        pytest.skip("HWNAS_DATA_DIR names no folder with fashion-mnist/ in it")
    return load(f"fashion-mnist:{folder}/fashion-mnist", size=32)


def test_fashion_mnist_comes_in_the_stated_sizes_without_overlap(real: Splits) -> None:
    found = parts(real)
    assert [len(part) for part in found.values()] == [50_000, 10_000, 10_000]
    assert (real.classes, real.size, real.channels) == (10, 32, 1)
    for part in found.values():
        assert part.x.shape[1:] == (32, 32, 1)
        assert part.x.dtype == np.uint8
        margin = part.x.copy()
        margin[:, 2:30, 2:30] = 0
        assert not margin.any()
    # TRAIN and SEARCH-VAL together hold the 60,000: each class 6,000 times, TEST 1,000 times
    both = np.concatenate([found["train"].y, found["search_val"].y])
    assert np.bincount(both).tolist() == [6000] * 10
    assert np.bincount(found["test"].y).tolist() == [1000] * 10
    assert np.bincount(found["search_val"].y).min() > 900
    # the data set itself repeats a handful of images; a split by index shares no more than those
    train = {image.tobytes() for image in found["train"].x}
    shared = sum(image.tobytes() in train for image in found["search_val"].x)
    assert shared < 30
