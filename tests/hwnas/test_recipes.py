"""The numbers behind a recipe: the named ones, what can be changed, and every way to be wrong."""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

import hwnas
from hwnas.recipes import (
    RECIPES,
    CalibrationRecipe,
    Recipe,
    SupernetRecipe,
    TrainingRecipe,
    first_error,
    recipe,
)
from profilers.measure import Protocol
from quant.errors import InvalidInput

DOCUMENT = Path(hwnas.__file__).parents[1] / "docs" / "commands.md"


def flat(fields: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in fields.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{above}{name}.") if inner else {f"{above}{name}": value}
    return found


def different(left: Recipe, right: Recipe) -> dict[str, Any]:
    """The fields in which two recipes differ, with the right one's value."""
    mine, theirs = flat(left.model_dump()), flat(right.model_dump())
    assert mine.keys() == theirs.keys()
    return {name: theirs[name] for name in mine if mine[name] != theirs[name]}


# ---- the named recipes


def test_every_recipe_is_found_by_its_name_and_makes_sense() -> None:
    assert list(RECIPES) == ["quick", "standard", "thorough", "smoke"]
    for name, found in RECIPES.items():
        assert recipe(name) == found
        assert found.name == name
        assert found.evaluations >= found.population >= found.finalists >= 1
        assert found.evaluations % found.population == 0
        for training in (found.supernet, found.retrain):
            assert training.steps > 0
            assert 0 < training.learning_rate < 1
        calibration = found.calibration
        assert calibration.networks == calibration.fit + calibration.bound + calibration.test
        # the split-conformal bound of 95 % needs at least 19 networks
        assert calibration.bound >= 19
    for name in ("quick", "standard", "thorough"):
        # that of 99 % needs 99
        assert RECIPES[name].calibration.bound >= 99


def test_widths_that_would_end_before_they_begin_are_refused_in_one_sentence() -> None:
    with pytest.raises(InvalidInput) as caught:
        recipe({"name": "quick", "supernet": {"widths_by": 0.3}})
    assert str(caught.value) == (
        "recipe.supernet: widths_by should be at least widths_from, after which widths join."
    )


def test_float_steps_are_whole_and_leave_a_quantised_one() -> None:
    for steps in range(1, 40):
        for share in (0.0, 0.1, 0.4, 0.5, 0.999):
            found = SupernetRecipe(steps=steps, batch=1, learning_rate=1, float_share=share)
            assert 0 <= found.float_steps <= share * steps
            assert found.float_steps + 1 > share * steps - 1e-9
            assert found.float_steps < steps


def test_each_recipe_does_more_than_the_one_before() -> None:
    for less, more in (("smoke", "quick"), ("quick", "standard"), ("standard", "thorough")):
        left, right = RECIPES[less], RECIPES[more]
        for part in ("supernet", "retrain"):
            images = [getattr(r, part).steps * getattr(r, part).batch for r in (left, right)]
            assert images[0] * 2 < images[1]
        assert left.evaluations < right.evaluations
        assert left.finalists <= right.finalists


def test_the_document_tells_the_numbers_of_every_recipe() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \| ([\d,]+) steps of (\d+) \| ([\d,]+) "
        r"\| (\d+) x ([\d,]+) steps(?: of (\d+))?",
        DOCUMENT.read_text(encoding="utf-8"),
        re.MULTILINE,
    )
    assert [name for name, *_ in rows] == list(RECIPES)
    for name, *told in rows:
        found = RECIPES[name]
        steps, batch, scored, finalists, retrained, *rest = (
            int(number.replace(",", "")) for number in told if number
        )
        assert (steps, batch) == (found.supernet.steps, found.supernet.batch)
        assert (scored, finalists) == (found.evaluations, found.finalists)
        assert retrained == found.retrain.steps
        assert rest in ([], [found.retrain.batch])


def test_recipes_are_data_without_torch(in_process: Callable[[str, str], str]) -> None:
    script = "import sys, hwnas.recipes; print('torch' in sys.modules, 'onnx' in sys.modules)"
    assert in_process(script, "0") == "False False"


def test_a_recipe_cannot_be_changed_in_place() -> None:
    found = RECIPES["quick"]
    for part, field in (
        (found, "finalists"),
        (found.supernet, "steps"),
        (found.protocol, "rounds"),
    ):
        with pytest.raises((ValidationError, AttributeError)):
            setattr(part, field, 1)
    assert recipe("quick") == found


# ---- changed fields


def test_a_name_alone_is_the_plain_recipe_however_it_is_written() -> None:
    for name, plain in RECIPES.items():
        assert recipe({"name": name}) == plain
        assert recipe(plain) is plain
        assert recipe(plain.model_dump()) == plain
        assert recipe(yaml.safe_load(yaml.safe_dump(plain.model_dump()))) == plain


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"finalists": 1}, {"finalists": 1}),
        ({"supernet": {"steps": 20000}}, {"supernet.steps": 20000}),
        ({"retrain": {"flip": True}}, {"retrain.flip": True}),
        ({"retrain": {"teacher": "float"}}, {"retrain.teacher": "float"}),
        ({"supernet": {"float_share": 0.8, "quantised_rate": 0.1}},
         {"supernet.float_share": 0.8, "supernet.quantised_rate": 0.1}),
        ({"protocol": {"rounds": 3}}, {"protocol.rounds": 3}),
        ({"calibration": {"test": 7}}, {"calibration.test": 7}),
        (
            {"supernet": {"learning_rate": 1, "batch": 8}, "retrain": {"batch": 9}},
            {"supernet.learning_rate": 1.0, "supernet.batch": 8, "retrain.batch": 9},
        ),
        ({"supernet": {"weight_decay": 0}, "least_agreement": 0},
         {"supernet.weight_decay": 0.0, "least_agreement": 0.0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["quick", "standard"])
def test_what_is_given_changes_and_nothing_else(
    name: str, change: dict[str, Any], told: dict[str, Any]
) -> None:
    plain = RECIPES[name].model_copy(deep=True)
    found = recipe({"name": name, **change})
    assert different(RECIPES[name], found) == told
    assert RECIPES[name] == plain
    assert isinstance(found.supernet, TrainingRecipe)
    assert isinstance(found.calibration, CalibrationRecipe)
    assert isinstance(found.protocol, Protocol)
    assert recipe(found.model_dump()) == found


def test_a_changed_recipe_is_another_one() -> None:
    changed = recipe({"name": "quick", "supernet": {"steps": 1601}})
    assert changed.name == "quick"
    assert changed != RECIPES["quick"]
    assert changed.model_dump() != RECIPES["quick"].model_dump()


# ---- wrong fields


@pytest.mark.parametrize("name", ["", "Quick", "slow", 5, ["quick"], True])
def test_an_unknown_recipe_is_refused_with_the_names(name: Any) -> None:
    for asked in (name, {"name": name}) if isinstance(name, str) else ({"name": name},):
        with pytest.raises(InvalidInput) as caught:
            recipe(asked)
        assert caught.value.what == f"--recipe is {name!r}."
        assert caught.value.accepted == "quick, standard, thorough, smoke"


@pytest.mark.parametrize("asked", [{}, {"supernet": {"steps": 3}}, {"name": None}])
def test_fields_without_the_recipe_that_they_change_are_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"^recipe\.name: it is missing\.") as caught:
        recipe(asked)
    assert caught.value.accepted == "quick, standard, thorough, smoke"


COUNTS = ("evaluations", "recalibration_images", "validation_images", "finalists", "processes")
TRAINING = [(f"{part}.{field}", value)
            for part in ("supernet", "retrain")
            for field, values in {
                "steps": (0, -1, 1.5, "many", None, [1], math.nan),
                "batch": (0, -1, 2.5, None),
                "learning_rate": (0, -0.1, math.nan, math.inf, "fast"),
                "weight_decay": (-1e-9, math.nan, "none"),
                "label_smoothing": (-0.1, 1, 1.5, math.nan),
                "clip_norm": (0, -1, math.inf, math.nan),
                "flip": ("sideways", 2, None),
                "step": (3,),
                "": (5, None, "many", [1]),
            }.items()
            for value in values]  # fmt: skip
OTHERS = [
    *(
        (f"supernet.{name}", value)
        for name in ("float_share", "widths_from")
        for value in (-0.1, 1, math.nan, "half", None)
    ),
    *(("supernet.widths_by", value) for value in (-0.1, 1.1, math.nan, None)),
    *(("supernet.quantised_rate", value) for value in (0, -0.1, math.inf, "slow")),
    *(("supernet.cost_bins", value) for value in (-1, 1.5, True, None)),
    *(("retrain.teacher", value) for value in ("large", None, 1)),
    *(("retrain.teacher_weight", value) for value in (-0.1, 1.1, math.nan, None)),
    *(("retrain.temperature", value) for value in (0, -1, math.inf, None)),
    ("retrain.float_share", 0.3),
    ("supernet.teacher", "float"),
    ("supernet", {"widths_from": 0.5, "widths_by": 0.3}),
    *((field, value) for field in COUNTS for value in (0, -1, 1.5, "many", None)),
    *(("population", value) for value in (1, 0, -2, 2.5)),
    *(("least_agreement", value) for value in (-0.1, 1.1, math.nan, "most")),
    *((f"calibration.{name}", v) for name in ("fit", "bound", "test") for v in (0, -1, None)),
    ("calibration", 100),
    ("calibration.fits", 3),
    ("protocol.rounds", "many"),
    ("protocol.block_ms", "long"),
    ("protocol", 5),
    ("steps", 3),
    ("Supernet", {"steps": 3}),
]


def nested(path: str, value: Any) -> dict[str, Any]:
    first, _, rest = path.rstrip(".").partition(".")
    return {first: nested(rest, value) if rest else value}


@pytest.mark.parametrize(("path", "value"), TRAINING + OTHERS)
def test_a_wrong_field_is_refused_with_its_path(path: str, value: Any) -> None:
    with pytest.raises(InvalidInput) as caught:
        recipe({"name": "quick", **nested(path, value)})
    told = str(caught.value)
    assert told.startswith(f"recipe.{path.rstrip('.')}: ")
    assert told.endswith(".")
    assert "\n" not in told


@pytest.mark.parametrize(
    "path",
    [
        "supernet.step",
        "stepz",
        "calibration.fits",
        "protocol.round",
    ],
)
def test_a_field_that_is_not_known_is_told_so(path: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        recipe({"name": "quick", **nested(path, 3)})
    assert str(caught.value) == f"recipe.{path}: no such field."


def test_a_key_that_is_no_text_is_refused() -> None:
    for change in ({5: 1}, {"supernet": {5: 1}}):
        with pytest.raises(InvalidInput, match=r"^recipe\.(supernet\.)?5: "):
            recipe({"name": "quick", **change})


@pytest.mark.parametrize(
    ("field", "value"),
    [("rounds", 0), ("rounds", -3), ("min_runs", 0), ("max_runs", 0), ("block_ms", math.nan),
     ("warmup_ms", -1.0), ("warmup_ms", math.inf), ("max_spread", -1.0)],
)  # fmt: skip
def test_a_protocol_that_measures_nothing_is_refused(field: str, value: float) -> None:
    with pytest.raises(InvalidInput, match=rf"^recipe\.protocol\.{field}: "):
        recipe({"name": "quick", "protocol": {field: value}})


@pytest.mark.parametrize(
    ("path", "value"),
    [("supernet.steps", True), ("supernet.weight_decay", math.inf), ("finalists", True)],
)
def test_a_number_that_is_none_is_refused(path: str, value: Any) -> None:
    with pytest.raises(InvalidInput, match=rf"^recipe\.{path}: "):
        recipe({"name": "quick", **nested(path, value)})


def test_the_first_of_several_errors_is_told() -> None:
    with pytest.raises(ValidationError) as caught:
        TrainingRecipe.model_validate({"steps": 0, "batch": 0, "learning_rate": 0.1})
    assert first_error(caught.value) == "steps: Input should be greater than 0"
    with pytest.raises(ValidationError) as caught:
        TrainingRecipe.model_validate([1])
    assert first_error(caught.value).startswith("the file: ")
