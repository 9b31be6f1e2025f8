"""How much is trained, measured and searched: the numbers behind `--recipe`. Data alone."""

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError

from profilers.measure import Protocol
from quant.errors import InvalidInput


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):
        raise PydanticCustomError("truth", "Input should be a number, not a truth value")
    return value


Count = Annotated[int, BeforeValidator(_no_truth), Field(gt=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Part(BaseModel):
    """A part of a recipe: frozen, and no field that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingRecipe(Part):
    """AdamW with a linear decay of the learning rate to zero, and label smoothing.

    Images are shifted by up to a sixteenth of their side; `flip` mirrors half of them.
    `clipping_decay` is PACT's L2 on its clipping values, in AdamW's form.
    """

    steps: Count
    batch: Count
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    clipping_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    label_smoothing: Share = 0.1
    clip_norm: Positive = 5.0
    flip: bool = False


class CalibrationRecipe(Part):
    """How many whole networks fit, bound and test the latency model."""

    fit: Count = 40
    bound: Count = 99
    test: Count = 40

    @property
    def networks(self) -> int:
        """All of them."""
        return self.fit + self.bound + self.test


class Recipe(Part):
    """A whole search. `evaluations` is the number of architectures that each strategy scores, in
    generations of `population`; `finalists` are retrained. Whole networks are measured in
    `processes` fresh processes. A file ships only if it answers as its PyTorch network on
    `least_agreement` of the images: integer files round biases to the accumulator's grid, which
    moves answers near a tie.
    """

    name: str
    supernet: TrainingRecipe
    retrain: TrainingRecipe
    evaluations: Count
    population: Annotated[int, Field(ge=2)]
    recalibration_images: Count
    validation_images: Count
    finalists: Count
    processes: Count = 5
    least_agreement: Annotated[float, Field(ge=0, le=1)] = 0.97
    calibration: CalibrationRecipe = CalibrationRecipe()
    protocol: Protocol = Protocol()


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="quick",
            supernet=TrainingRecipe(steps=1600, batch=32, learning_rate=0.02),
            retrain=TrainingRecipe(steps=300, batch=32, learning_rate=0.003),
            evaluations=120,
            population=30,
            recalibration_images=256,
            validation_images=1000,
            finalists=3,
        ),
        Recipe(
            name="standard",
            supernet=TrainingRecipe(steps=8000, batch=64, learning_rate=0.02),
            retrain=TrainingRecipe(steps=2000, batch=64, learning_rate=0.003),
            evaluations=400,
            population=50,
            recalibration_images=512,
            validation_images=2000,
            finalists=3,
        ),
        Recipe(
            name="thorough",
            supernet=TrainingRecipe(steps=50_000, batch=128, learning_rate=0.02),
            retrain=TrainingRecipe(steps=20_000, batch=128, learning_rate=0.003),
            evaluations=1000,
            population=50,
            recalibration_images=2048,
            validation_images=10_000,
            finalists=5,
        ),
        Recipe(
            name="smoke",
            supernet=TrainingRecipe(steps=10, batch=16, learning_rate=0.01),
            retrain=TrainingRecipe(steps=5, batch=16, learning_rate=0.003),
            evaluations=12,
            population=6,
            recalibration_images=64,
            validation_images=100,
            finalists=2,
            processes=2,
            least_agreement=0.0,
            calibration=CalibrationRecipe(fit=12, bound=19, test=8),
        ),
    )
}
"""`quick` takes minutes on two cores for small images, `standard` tens of minutes, `thorough`
hours; `smoke` trains nothing worth having, to try the path."""


def recipe(asked: str | Mapping[str, Any] | Recipe) -> Recipe:
    """The recipe of a name, or of a name with fields that differ, such as
    `{"name": "quick", "supernet": {"steps": 10}}`.

    Raises InvalidInput for a name that is not there, and with the path of a field that is wrong.

    >>> recipe({"name": "quick", "supernet": {"steps": 10}}).supernet.batch
    32
    """
    if isinstance(asked, Recipe):
        return asked
    fields = {"name": asked} if isinstance(asked, str) else dict(asked)
    name = fields.get("name")
    if name is None:
        raise InvalidInput(
            "recipe.name: it is missing.",
            accepted=", ".join(RECIPES),
            next_step="name the recipe that the other fields change",
        )
    if not isinstance(name, str) or name not in RECIPES:
        raise InvalidInput(f"--recipe is {name!r}.", accepted=", ".join(RECIPES))
    try:
        found = Recipe.model_validate(_merged(RECIPES[name].model_dump(), fields))
    except ValidationError as error:
        raise InvalidInput(f"recipe.{first_error(error)}.") from error
    for field, value in found.protocol.to_dict().items():
        if not 0 < value < math.inf:
            raise InvalidInput(
                f"recipe.protocol.{field}: it is {value}.", accepted="a positive number"
            )
    return found


def first_error(error: ValidationError) -> str:
    """The path of the first field at fault, and what is wrong with it."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"])) or "the file"
    unknown = first["type"] in ("extra_forbidden", "unexpected_keyword_argument")
    return f"{where}: {'no such field' if unknown else first['msg']}"


def _merged(known: dict[str, Any], changed: Mapping[str, Any]) -> dict[str, Any]:
    """Nested fields, those of `changed` first."""
    result = dict(known)
    for name, value in changed.items():
        inner = result.get(name)
        if isinstance(inner, dict) and isinstance(value, Mapping):
            value = _merged(inner, value)
        result[name] = value
    return result
