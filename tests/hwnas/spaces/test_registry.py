"""Names of spaces, and functions of the user's own that may do anything."""

from pathlib import Path

import pytest

from hwnas.spaces.registry import DEFAULT_SIZE, SPACES, image_size, load_space
from quant.errors import InvalidInput

OWN = """
from hwnas.spaces.mobile import Stage, mobile

def two_blocks(*, classes, image_channels, size):
    return mobile("own", (Stage(1, 2, (16, 24)), Stage(1, 1, (24,))), classes=classes,
                  image_channels=image_channels, size=size)

NOT_A_FUNCTION = None
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    path = tmp_path / "my_space.py"
    path.write_text(OWN)
    return path


@pytest.mark.parametrize("name", SPACES)
def test_every_named_space_takes_the_shape_of_the_data(name: str) -> None:
    space = load_space(name, classes=7, image_channels=3, size=64)
    assert space.name == name
    first, *_, last = space.lower(next(space.enumerate()))
    (image,) = first.inputs
    assert (image.channels, image.height, image.width) == (3, 64, 64)
    assert last.output.channels == space.classes == 7


def test_a_function_in_a_file_is_a_space(own: Path) -> None:
    space = load_space(f"{own}:two_blocks", classes=3, image_channels=1, size=28)
    assert (space.name, space.classes) == ("own", 3)
    assert space.input.height == 28
    assert space.count == len(list(space.enumerate()))


def test_two_files_of_one_name_do_not_stand_in_for_each_other(own: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere" / own.name
    other.parent.mkdir()
    other.write_text(OWN.replace('"own"', '"other"'))
    places = [f"{own}:two_blocks", f"{other}:two_blocks"]
    spaces = [load_space(p, classes=3, image_channels=1, size=28) for p in places]
    assert [space.name for space in spaces] == ["own", "other"]


@pytest.mark.parametrize(
    "name", ["mobile-huge", "", "mobile-tiny.py", "space.py:", "space.txt:function", ":function"]
)
def test_an_unknown_name_is_answered_with_those_accepted(name: str) -> None:
    with pytest.raises(InvalidInput, match=f"--space is '{name}'") as caught:
        load_space(name, classes=10, image_channels=1, size=32)
    assert all(known in caught.value.accepted for known in SPACES)
    assert "path.py:function" in caught.value.accepted
    assert caught.value.exit_code == 2


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "absent.py"
    with pytest.raises(InvalidInput, match=r"absent\.py, which is not there"):
        load_space(f"{path}:f", classes=10, image_channels=1, size=32)


@pytest.mark.parametrize("function", ["three_blocks", "NOT_A_FUNCTION"])
def test_a_function_that_is_not_in_the_file_is_named(own: Path, function: str) -> None:
    with pytest.raises(InvalidInput, match=function):
        load_space(f"{own}:{function}", classes=10, image_channels=1, size=32)


# ---- the size that a space is meant for


def test_the_presets_are_meant_for_the_sizes_that_the_documents_state() -> None:
    assert {name: image_size(name) for name in SPACES} == {
        "mobile-tiny": 32, "shufflenet-tiny": 32, "resnet-tiny": 32,
        "mobile": 224, "shufflenet": 224, "resnet18": 224, "resnet34": 224,
    }  # fmt: skip


def test_a_space_of_ones_own_is_meant_for_the_default_of_its_size(tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(
        "def large(*, classes, image_channels, size=96): ...\n"
        "def silent(*, classes, image_channels, size): ...\n"
        "def anything(**kwargs): ...\n"
        "def wrong(*, classes, image_channels, size='large'): ...\n"
    )
    assert image_size(f"{path}:large") == 96
    for name in ("silent", "anything", "wrong"):
        assert image_size(f"{path}:{name}") == DEFAULT_SIZE == 224


@pytest.mark.parametrize("name", ["mobile-huge", "absent.py:space"])
def test_the_size_of_an_unknown_space_is_refused_as_the_space_is(name: str) -> None:
    with pytest.raises(InvalidInput) as of_size:
        image_size(name)
    with pytest.raises(InvalidInput) as of_space:
        load_space(name, classes=10, image_channels=1, size=32)
    assert str(of_size.value) == str(of_space.value)


# ---- functions that fail, and spaces that do not fit

FAILING = """
from hwnas import Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import classifier, conv_norm_activation
from latency_tables.ops import Tensor
from quant.errors import InvalidInput
from quant.precision import Precision


def chain(channels, side, classes, head=classifier):
    def build(state, values):
        op = head(state.tensor, 8, classes, precision=Precision(values["precision"]))
        return Choice(op, State(op.output))

    positions = (Position("head", {"precision": ["fp32", "w8a8"]}, build),)
    return SearchSpace("own", Tensor(channels, side, side), positions)


def fits(*, classes, image_channels, size):
    return chain(image_channels, size, classes)

def raises(*, classes, image_channels, size):
    raise KeyError("width")

def takes_nothing():
    return None

def returns_nothing(*, classes, image_channels, size):
    return None

def returns_a_list(*, classes, image_channels, size):
    return [1, 2]

def has_no_position(*, classes, image_channels, size):
    return SearchSpace("own", Tensor(image_channels, size, size), ())

def has_no_network(*, classes, image_channels, size):
    positions = (Position("p", {"kernel": [1, 3]}, lambda state, values: None),)
    return SearchSpace("own", Tensor(image_channels, size, size), positions)

def builds_wrongly(*, classes, image_channels, size):
    def even(tensor, channels, classes, precision):
        return conv_norm_activation(tensor, classes, kernel=2, precision=precision)
    return chain(image_channels, size, classes, even)

def says_so_itself(*, classes, image_channels, size):
    raise InvalidInput("This space takes colour images.", accepted="3 channels")

def always_grey(*, classes, image_channels, size):
    return chain(1, size, classes)

def always_32(*, classes, image_channels, size):
    return chain(image_channels, 32, classes)

def always_ten(*, classes, image_channels, size):
    return chain(image_channels, size, 10)

def not_pooled(*, classes, image_channels, size):
    def conv(tensor, channels, classes, precision):
        return conv_norm_activation(tensor, classes, kernel=3, precision=precision)
    return chain(image_channels, size, classes, conv)
"""


@pytest.fixture
def failing(tmp_path: Path) -> str:
    (tmp_path / "failing.py").write_text(FAILING)
    return str(tmp_path / "failing.py")


def test_a_function_whose_space_fits_is_taken(failing: str) -> None:
    space = load_space(f"{failing}:fits", classes=3, image_channels=2, size=16)
    assert space.count == 2


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("raises", "KeyError: 'width'"),
        ("takes_nothing", "TypeError: "),
        ("returns_nothing", "AttributeError: "),
        ("returns_a_list", "AttributeError: "),
        ("has_no_position", "IndexError: "),
        ("has_no_network", "ValueError: "),
        ("builds_wrongly", "ValueError: "),
    ],
)
def test_a_function_that_fails_is_answered_with_what_it_raised(
    failing: str, function: str, reason: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_space(f"{failing}:{function}", classes=3, image_channels=2, size=16)
    what = f"--space {failing}:{function} cannot be built for 16 x 16 images of 2 channels and 3 "
    assert caught.value.what.startswith(f"{what}classes: {reason}")
    assert "\n" not in str(caught.value)
    assert "--image-size" in caught.value.next_step


def test_a_refusal_of_the_functions_own_is_passed_on(failing: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_space(f"{failing}:says_so_itself", classes=3, image_channels=1, size=16)
    assert caught.value.what == "This space takes colour images."


@pytest.mark.parametrize(
    "function",
    [
        "always_grey",
        "always_32",
        "always_ten",
        "not_pooled",
    ],
)
def test_a_space_for_other_images_or_classes_is_refused(failing: str, function: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        load_space(f"{failing}:{function}", classes=3, image_channels=2, size=16)
    assert caught.value.what == (
        f"--space {failing}:{function} does not lead from 2 x 16 x 16 images to 3 classes."
    )
    assert "Tensor(image_channels, size, size)" in caught.value.accepted


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        ("always_grey", {"classes": 3, "image_channels": 1, "size": 16}),
        ("always_32", {"classes": 3, "image_channels": 2, "size": 32}),
        ("always_ten", {"classes": 10, "image_channels": 2, "size": 16}),
    ],
)
def test_the_same_space_is_taken_where_it_fits(
    failing: str, function: str, shape: dict[str, int]
) -> None:
    assert load_space(f"{failing}:{function}", **shape).count == 2


@pytest.mark.parametrize(
    ("text", "reason"), [("1 / 0", "ZeroDivisionError"), ("def (", "SyntaxError")]
)
def test_a_file_that_cannot_be_loaded_is_answered_with_why(
    text: str, reason: str, tmp_path: Path
) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    for read in (
        lambda: image_size(f"{path}:space"),
        lambda: load_space(f"{path}:space", classes=3, image_channels=1, size=16),
    ):
        with pytest.raises(InvalidInput) as caught:
            read()
        assert caught.value.what.startswith(f"{path} cannot be loaded: {reason}: ")
