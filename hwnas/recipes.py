"""How much is trained, measured and searched: the numbers behind `--recipe`. Data alone."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)
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


DEFAULT_PROTOCOL = Protocol()


class Part(BaseModel):
    """A part of a recipe: frozen, and no field that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingRecipe(Part):
    """AdamW with a linear decay of the learning rate to zero, and label smoothing.

    Images are shifted by up to a sixteenth of their side; `flip` mirrors half of them.
    `clipping_decay` is PACT's L2 on its clipping values, in AdamW's form.

    >>> TrainingRecipe(steps=4, batch=8, learning_rate=0.5).rate(2)
    0.25
    """

    steps: Count
    batch: Count
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    clipping_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1e-4
    label_smoothing: Share = 0.1
    clip_norm: Positive = 5.0
    flip: bool = False

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        return self.learning_rate * (1 - step / self.steps)


class SupernetRecipe(TrainingRecipe):
    """A supernet's training: float at first, then quantised, and from one width to all.

    The first `float_share` of the steps train weights in float; then the ranges of activations are
    set, and precisions are sampled. With `quantised_rate` the quantised steps are a training of
    their own: the rate decays to zero over the float steps, and again over the quantised ones, from
    `quantised_rate` times the learning rate. Without it one decay spans both.

    Until `widths_from` of the steps each choice of a width takes the largest one; then the smaller
    ones join one at a time, and from `widths_by` on all are sampled.

    `cost_bins` > 0 draws paths uniformly over so many bins of MACs, not uniformly.

    >>> tuned = SupernetRecipe(steps=10, batch=8, learning_rate=1, float_share=0.8,
    ...                        quantised_rate=0.1)
    >>> tuned.float_steps, [round(tuned.rate(step), 3) for step in (0, 4, 7, 8, 9)]
    (8, [1.0, 0.5, 0.125, 0.1, 0.05])
    """

    float_share: Share = 0.4
    quantised_rate: Positive | None = None
    widths_from: Share = 0.4
    widths_by: Annotated[float, Field(ge=0, le=1)] = 0.4
    cost_bins: Annotated[int, BeforeValidator(_no_truth), Field(ge=0)] = 0

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.widths_by < self.widths_from:
            raise PydanticCustomError(
                "order", "widths_by should be at least widths_from, after which widths join"
            )
        return self

    @property
    def float_steps(self) -> int:
        """How many steps train in float."""
        return int(self.float_share * self.steps)

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        if self.quantised_rate is None:
            return super().rate(step)
        if step < self.float_steps:
            return self.learning_rate * (1 - step / self.float_steps)
        left = (self.steps - step) / (self.steps - self.float_steps)
        return self.learning_rate * self.quantised_rate * left


class RetrainRecipe(TrainingRecipe):
    """A found network's training, with a teacher beside the classes or without (`none`).

    The teacher is the same network in `float`, trained by the same recipe first, or the `largest`
    network of the space, with shared weights. `teacher_weight` is its share of the loss; both
    sides' answers are softened by `temperature` (Hinton et al. 2015, section 2).
    """

    teacher: Literal["none", "float", "largest"] = "none"
    teacher_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    temperature: Positive = 4.0


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
    supernet: SupernetRecipe
    retrain: RetrainRecipe
    evaluations: Count
    population: Annotated[int, Field(ge=2)]
    recalibration_images: Count
    validation_images: Count
    finalists: Count
    processes: Count = 5
    least_agreement: Annotated[float, Field(ge=0, le=1)] = 0.97
    calibration: CalibrationRecipe = CalibrationRecipe()
    protocol: Protocol = DEFAULT_PROTOCOL


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            name="quick",
            supernet=SupernetRecipe(steps=1600, batch=32, learning_rate=0.02),
            retrain=RetrainRecipe(steps=300, batch=32, learning_rate=0.003),
            evaluations=120,
            population=30,
            recalibration_images=256,
            validation_images=1000,
            finalists=3,
        ),
        Recipe(
            name="standard",
            supernet=SupernetRecipe(steps=8000, batch=64, learning_rate=0.02),
            retrain=RetrainRecipe(steps=2000, batch=64, learning_rate=0.003),
            evaluations=400,
            population=50,
            recalibration_images=512,
            validation_images=2000,
            finalists=3,
        ),
        Recipe(
            name="thorough",
            supernet=SupernetRecipe(steps=50_000, batch=128, learning_rate=0.02),
            retrain=RetrainRecipe(steps=20_000, batch=128, learning_rate=0.003),
            evaluations=1000,
            population=50,
            recalibration_images=2048,
            validation_images=10_000,
            finalists=5,
        ),
        Recipe(
            name="smoke",
            supernet=SupernetRecipe(steps=10, batch=16, learning_rate=0.01),
            retrain=RetrainRecipe(steps=5, batch=16, learning_rate=0.003),
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


def recipe(
    asked: str | Mapping[str, Any] | Recipe, protocol: Protocol = DEFAULT_PROTOCOL
) -> Recipe:
    """The recipe of a name, or of a name with fields that differ, such as
    `{"name": "quick", "supernet": {"steps": 10}}`. Latencies are taken by `protocol`, but for the
    fields of it that differ.

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
        known = RECIPES[name].model_copy(update={"protocol": protocol})
        found = Recipe.model_validate(_merged(known.model_dump(), fields))
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
