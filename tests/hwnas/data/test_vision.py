"""torchvision's data sets: through a stand-in for it everywhere, through itself where it loads."""

import importlib
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image

from hwnas.data import Images, Splits, load, pictures, torchvision
from quant.errors import HwnasError, InvalidInput, MissingDependency

SIDE = 4
CLASSES = 3


def picture(number: int, mode: str = "RGB", side: int = SIDE) -> Image.Image:
    """A picture of one shade, which is its number."""
    return Image.new("L", (side, side), number).convert(mode)


class Shades:
    """Pictures of the shades `first` to `first + count - 1`; the class is the shade modulo 3."""

    mode = "RGB"

    def __init__(self, count: int, first: int) -> None:
        self.numbers = range(first, first + count)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[Any, Any]:
        return picture(self.numbers[i], self.mode), self.numbers[i] % CLASSES


class Train(Shades):
    """As CIFAR10 and MNIST: `train` tells the splits apart."""

    made: list[dict[str, Any]]

    def __init__(
        self, root: str, train: bool = True, transform: Any = None, download: bool = False
    ) -> None:
        self.made.append({"root": root, "train": train, "download": download})
        super().__init__(90 if train else 12, 0 if train else 90)


class Child(Train):
    """As QMNIST: what its parent takes is hidden in keywords."""

    def __init__(self, root: str, what: str | None = None, **kwargs: Any) -> None:
        super().__init__(root, **kwargs)


class Named(Shades):
    """As SVHN: `split` tells the splits apart, and there is nothing to download."""

    known: tuple[str, ...] = ("train", "test")

    def __init__(self, root: str, split: str = "train", transform: Any = None) -> None:
        if split not in self.known:
            raise ValueError(f"Unknown value '{split}' for argument split")
        train = split.startswith("train")
        super().__init__(90 if train else 12, 0 if train else 90)


class Alone(Shades):
    """As FakeData: one split, no root."""

    def __init__(self, size: int = 120, transform: Any = None) -> None:
        super().__init__(size, 0)


Install = Callable[..., None]


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Install:
    """Put data sets where torchvision's would be; nothing is made outside a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HWNAS_HOME", raising=False)
    monkeypatch.setattr(Train, "made", [], raising=False)

    def put(**sets: object) -> None:
        module = ModuleType("torchvision.datasets")
        vars(module).update(sets, __all__=list(sets))
        monkeypatch.setitem(sys.modules, "torchvision", ModuleType("torchvision"))
        monkeypatch.setitem(sys.modules, "torchvision.datasets", module)

    return put


def parts(splits: Splits) -> list[Images]:
    with splits.final() as test:
        return [splits.train, splits.search_val, test]


def shades(images: Images) -> list[int]:
    """Each picture's number; every pixel of a picture shows it."""
    assert (images.x == images.x[:, :1, :1, :1]).all()
    np.testing.assert_array_equal(images.y, images.x[:, 0, 0, 0] % CLASSES)
    found: list[int] = images.x[:, 0, 0, 0].tolist()
    return found


def all_shades(found: list[Images]) -> list[int]:
    return sorted(shade for images in found for shade in shades(images))


def refused(name: str, words: str, kind: type[HwnasError] = InvalidInput) -> HwnasError:
    with pytest.raises(kind, match=words) as caught:
        load(f"torchvision:{name}", size=SIDE)
    assert type(caught.value) is kind
    assert "\n" not in str(caught.value)
    return caught.value


# ---- splits


@pytest.mark.parametrize("made", [Train, Child, Named])
def test_a_set_of_two_splits_keeps_its_test(made: type[Shades], install: Install) -> None:
    install(Some=made)
    splits = load("torchvision:Some", size=6)
    train, search_val, test = parts(splits)
    assert shades(test) == list(range(90, 102))  # in its order
    assert sorted(shades(train) + shades(search_val)) == list(range(90))
    assert np.bincount(train.y).tolist() == [25] * 3
    assert np.bincount(search_val.y).tolist() == [5] * 3
    assert (splits.size, splits.channels, splits.classes) == (6, 3, 3)
    assert splits.class_names == ("0", "1", "2")
    assert splits.name == "torchvision:Some"


@pytest.mark.parametrize(
    "known", [("train", "val"), ("trainval", "test"), ("trainval", "valid"), ("train", "test")]
)
def test_the_first_known_name_of_a_split_is_taken(
    known: tuple[str, ...], install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Named, "known", known)
    install(Some=Named)
    assert [len(part) for part in parts(torchvision("Some", SIDE))] == [75, 15, 12]


def test_a_set_of_one_split_is_divided_by_class(install: Install) -> None:
    install(Some=Alone)
    found = parts(torchvision("Some", SIDE))
    assert [np.bincount(part.y).tolist() for part in found] == [[28] * 3, [6] * 3, [6] * 3]
    assert all_shades(found) == list(range(120))


def test_files_are_downloaded_into_the_home_of_hwnas(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    install(Some=Train, Other=Child)
    for name in ("Some", "Other"):
        Train.made.clear()
        torchvision(name, SIDE)
        assert Train.made == [
            {"root": "data", "train": train, "download": True} for train in (True, False)
        ]
    monkeypatch.setenv("HWNAS_HOME", str(tmp_path / "home"))
    Train.made.clear()
    torchvision("Some", SIDE)
    assert {made["root"] for made in Train.made} == {str(tmp_path / "home" / "data")}


# ---- images and classes


@pytest.mark.parametrize(
    ("mode", "channels"), [("L", 1), ("RGB", 3), ("RGBA", 3), ("P", 3), ("CMYK", 3)]
)
def test_images_have_one_channel_where_the_first_has(
    mode: str, channels: int, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Shades, "mode", mode)
    install(Some=Alone)
    splits = torchvision("Some", SIDE)
    assert splits.channels == channels
    assert all_shades(parts(splits)) == list(range(120))


def test_images_of_any_mode_and_size_follow_the_first(install: Install) -> None:
    class Mixed(Alone):
        def __getitem__(self, i: int) -> tuple[Any, Any]:
            mode, side = ("RGB", "L", "RGBA")[i % 3], SIDE + i % 7
            return picture(i, mode, side), torch.tensor(i % CLASSES)

    install(Some=Mixed)
    splits = torchvision("Some", SIDE)
    assert (splits.channels, splits.size) == (3, SIDE)
    assert all_shades(parts(splits)) == list(range(120))


@pytest.mark.parametrize(
    ("classes", "names"),
    [
        (["ant", "bee", "cat"], ("ant", "bee", "cat")),
        ([("ant", "emmet"), ("bee",), ("cat", "moggy")], ("ant", "bee", "cat")),
        (["N/A", "ant", "bee", "cat"], ("0", "1", "2")),
        ([], ("0", "1", "2")),
    ],
)
def test_classes_have_the_names_of_the_set_where_they_match(
    classes: list[Any], names: tuple[str, ...], install: Install
) -> None:
    install(Some=type("Some", (Alone,), {"classes": classes}))
    assert torchvision("Some", SIDE).class_names == names


@pytest.mark.parametrize(
    "example",
    [
        (np.zeros((4, 4, 3), np.uint8), 0),
        (picture(0), (1, 2)),
        (picture(0), "ant"),
        (picture(0), 0.5),
        (picture(0), torch.zeros(3)),
        (picture(0), picture(1)),
        (picture(0), 0, 0),
        picture(0),
    ],
    ids=["array", "two classes", "name", "number", "vector", "mask", "three", "no class"],
)
def test_a_set_of_anything_but_images_and_classes_is_refused(
    example: Any, install: Install
) -> None:
    install(Some=type("Some", (Alone,), {"__getitem__": lambda self, i: example}))
    error = refused("Some", "torchvision:Some is not a set of images and their classes")
    assert "CIFAR10" in error.accepted


def test_the_common_checks_hold_here_too(install: Install) -> None:
    class Counted(Alone):
        def __getitem__(self, i: int) -> tuple[Any, Any]:
            return picture(i), i % CLASSES + 1

    install(Counted=Counted, Tiny=type("Tiny", (Alone,), {"__len__": lambda self: 20}))
    refused("Counted", "torchvision:Counted has the classes 1, 2, 3, but none 0")
    refused("Tiny", "torchvision:Tiny has 20 images")


def test_what_memory_cannot_hold_is_refused(
    install: Install, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """90 + 12 images of 4 x 4 x 3 bytes, once read and once divided: 9,792 bytes."""
    install(Some=Train)
    monkeypatch.setattr(pictures, "MEMORY", tmp_path / "meminfo")
    (tmp_path / "meminfo").write_text("MemAvailable: 10 kB\n")
    assert len(torchvision("Some", SIDE).train) == 75
    (tmp_path / "meminfo").write_text("MemAvailable: 9 kB\n")
    assert "--image-size: 3 fits" in refused("Some", "102 images of 4 x 4 x 3").next_step


# ---- names


def test_an_unknown_name_is_refused_with_close_ones(install: Install) -> None:
    install(CIFAR10=Train, CIFAR100=Train, SVHN=Named, FakeData=Alone)
    error = refused("cifar", "torchvision.datasets has no 'cifar'")
    assert "such as CIFAR10, CIFAR100" in error.accepted
    assert "such as SVHN" in refused("svhn", "no 'svhn'").accepted
    assert "such as CIFAR10, FashionMNIST" in refused("qqqqqq", "no 'qqqqqq'").accepted


@pytest.mark.parametrize("name", ["ImageFolder", "VisionDataset", "wrap", "__all__", "os"])
def test_what_is_no_data_set_is_refused_like_an_unknown_name(name: str, install: Install) -> None:
    install(ImageFolder=Train, VisionDataset=Train, wrap=lambda root: None, SVHN=Named)
    refused(name, f"torchvision.datasets has no '{name}'")


# ---- failures


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


@pytest.mark.parametrize("method", ["__init__", "__getitem__"])
@pytest.mark.parametrize(
    ("error", "words"),
    [
        (URLError("Name or service not known"), "<urlopen error Name or service not known>"),
        (RuntimeError("Dataset not found or corrupted."), "Dataset not found or corrupted"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (TypeError("missing a required argument: 'annFile'"), "missing a required argument"),
        (KeyError(), "KeyError"),
    ],
)
def test_a_set_that_cannot_be_fetched_or_read_is_told_in_one_sentence(
    method: str, error: Exception, words: str, install: Install
) -> None:
    install(Some=type("Some", (Alone,), {method: raising(error)}))
    told = refused("Some", f"torchvision:Some could not be fetched and read: {words}")
    assert "run the same command again" in told.next_step


def test_a_set_that_fails_half_way_is_told_in_one_sentence(install: Install) -> None:
    class Breaking(Alone):
        def __getitem__(self, i: int) -> tuple[Any, Any]:
            if i == 70:
                raise OSError("image file is truncated")
            return super().__getitem__(i)

    install(Some=Breaking)
    refused("Some", "could not be fetched and read: image file is truncated")


def test_a_split_that_no_name_opens_is_told_in_the_words_about_the_first(
    install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Named, "known", ("byclass", "test"))
    install(Some=Named)
    refused("Some", "read: Unknown value 'train' for argument split")


@pytest.mark.parametrize(
    ("takes", "needs"),
    [
        ("root, annFile, transform=None", "annFile"),  # CocoCaptions
        ("root, frames_per_clip, fold, *args, split='train'", "frames_per_clip, fold"),  # Kinetics
        ("root, split, train=True, **kwargs", "split"),  # EMNIST: its split is not train or test
    ],
)
def test_a_set_that_needs_more_than_a_name_is_refused_before_it_downloads(
    takes: str, needs: str, install: Install
) -> None:
    made: dict[str, Any] = {}
    exec(f"def __init__(self, {takes}): raise AssertionError('made')", made)
    install(Some=type("Some", (Shades,), {"__init__": made["__init__"]}))
    error = refused("Some", f"torchvision:Some needs {needs}, which --data cannot give")
    assert "folders" in error.next_step


def test_a_set_that_needs_another_package_names_it(install: Install) -> None:
    install(Some=type("Some", (Alone,), {"__init__": raising(ImportError("No module h5py"))}))
    error = refused("Some", "torchvision:Some needs another package: No module h5py",
                    MissingDependency)  # fmt: skip
    assert error.next_step


def test_what_a_set_prints_leaves_standard_output_to_results(
    install: Install, capsys: pytest.CaptureFixture[str]
) -> None:
    class Talking(Alone):
        def __init__(self, size: int = 120) -> None:
            sys.stdout.write("Files already downloaded")
            super().__init__(size)

    install(Some=Talking)
    torchvision("Some", SIDE)
    told = capsys.readouterr()
    assert told.out == ""
    assert "Files already downloaded" in told.err


# ---- torchvision not there, or not loading


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torchvision as it was before anything imported it, and again afterwards."""
    before = {n: m for n, m in sys.modules.items() if n.partition(".")[0] == "torchvision"}
    for name in before:
        del sys.modules[name]
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
        del sys.modules[name]
    sys.modules.update(before)


def told_of_the_extra(words: str) -> None:
    error = refused("CIFAR10", words, MissingDependency)
    assert "torchvision cannot be imported: " in error.what
    assert "pip install 'hwnas[vision]'" in error.next_step
    assert torch.__version__ in error.accepted


@pytest.mark.usefixtures("without")
def test_without_torchvision_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("torchvision", "torchvision.datasets"):  # None is Python's way to say not there
        monkeypatch.setitem(sys.modules, name, None)
    told_of_the_extra("import of torchvision.datasets halted")


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize(
    ("failure", "words"),
    [
        ("RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms"),
        ("AttributeError('partially initialized module')", "partially initialized module"),
        ("OSError('libcudart.so.12: cannot open shared object file')", "libcudart.so.12"),
        ("ImportError('undefined symbol: _ZN5torch')", "undefined symbol"),
    ],
)
def test_a_torchvision_that_does_not_load_is_told_with_its_reason(
    failure: str, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {failure}\n")
    monkeypatch.syspath_prepend(tmp_path)
    told_of_the_extra(words)


def test_nothing_else_needs_torchvision(in_process: Callable[[str, str], str]) -> None:
    script = (
        "import sys; sys.modules['torchvision'] = None; from hwnas.data import load; "
        "print(load('digits', size=32).describe())"
    )
    assert in_process(script, "1").startswith("1,797 images")


# ---- torchvision itself


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("HWNAS_HOME", str(tmp_path))
    try:
        return importlib.import_module("torchvision.datasets")
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision cannot be imported here: {error}")


def test_fake_data_comes_out_as_torchvision_makes_it(real: ModuleType) -> None:
    splits = load("torchvision:FakeData", size=16)
    assert (splits.size, splits.channels, splits.classes) == (16, 3, 10)
    found = {x.tobytes(): y for part in parts(splits) for x, y in zip(part.x, part.y, strict=True)}
    assert len(found) == 1000
    data = real.FakeData()
    for i in range(0, 1000, 97):
        image, target = data[i]
        small = np.asarray(image.resize((16, 16), Image.Resampling.LANCZOS))
        assert found[small.tobytes()] == int(target)
    assert [len(part) for part in parts(splits)] == [
        sum(count - 2 * round(0.15 * count) for count in counts(found.values())),
        *2 * [sum(round(0.15 * count) for count in counts(found.values()))],
    ]


def counts(numbers: Any) -> list[int]:
    found: list[int] = np.bincount(list(numbers)).tolist()
    return found


def test_mnist_files_come_out_through_torchvision_as_they_lie(
    real: ModuleType, tmp_path: Path
) -> None:
    """Image i has the shade i and the class i % 10, in the idx files that MNIST keeps."""
    place = tmp_path / "data" / "MNIST" / "raw"
    place.mkdir(parents=True)
    for stem, count in (("train", 180), ("t10k", 20)):
        numbers = np.arange(count, dtype=np.uint8)
        images = np.broadcast_to(numbers[:, None, None], (count, 28, 28))
        for name, content in (("images-idx3", images), ("labels-idx1", numbers % 10)):
            header = struct.pack(f">BBBB{content.ndim}i", 0, 0, 8, content.ndim, *content.shape)
            (place / f"{stem}-{name}-ubyte").write_bytes(header + content.tobytes())
    splits = load("torchvision:MNIST", size=28)
    assert (splits.size, splits.channels, splits.classes) == (28, 1, 10)
    assert splits.class_names == tuple(real.MNIST.classes)
    train, search_val, test = parts(splits)
    for part in (train, search_val, test):
        assert (part.x == part.x[:, :1, :1]).all()
        np.testing.assert_array_equal(part.y, part.x[:, 0, 0, 0] % 10)
    assert test.x[:, 0, 0, 0].tolist() == list(range(20))
    both = np.concatenate([train.x, search_val.x])[:, 0, 0, 0]
    assert sorted(both.tolist()) == list(range(180))
    assert np.bincount(search_val.y).tolist() == [3] * 10
