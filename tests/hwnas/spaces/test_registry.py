from pathlib import Path

import pytest

from hwnas.spaces.registry import SPACES, load_space
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
