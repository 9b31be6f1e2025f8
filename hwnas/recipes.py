"""How much is trained, measured and searched: the numbers behind `--recipe`."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from profilers.measure import Protocol
from quant.errors import InvalidInput


@dataclass(frozen=True)
class TrainingRecipe:
    """AdamW with a linear decay of the learning rate to zero, and label smoothing.

    Weight decay is on weights alone, not on norms, biases and ranges.
    """

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float = 1e-4
    label_smoothing: float = 0.1
    clip_norm: float = 5.0

    def optimiser(self, module: nn.Module) -> torch.optim.Optimizer:
        """AdamW over a module's parameters."""
        parameters = list(module.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": self.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self.learning_rate)

    def set_rate(self, optimiser: torch.optim.Optimizer, step: int) -> None:
        """The learning rate of a step."""
        for group in optimiser.param_groups:
            group["lr"] = self.learning_rate * (1 - step / self.steps)

    def loss(self, logits: Tensor, classes: Tensor) -> Tensor:
        """The loss to minimise."""
        return functional.cross_entropy(logits, classes, label_smoothing=self.label_smoothing)


@dataclass(frozen=True)
class CalibrationRecipe:
    """How many whole networks fit, bound and test the latency model."""

    fit: int = 60
    bound: int = 99
    test: int = 40

    @property
    def networks(self) -> int:
        """All of them."""
        return self.fit + self.bound + self.test


@dataclass(frozen=True)
class Recipe:
    """A whole search. `evaluations` is the number of architectures that each strategy scores, in
    generations of `population`; `finalists` are retrained. Whole networks are measured in
    `processes` fresh processes. A file ships only if it answers as its PyTorch network on
    `least_agreement` of the images: integer files round biases to the accumulator's grid, which
    moves answers near a tie.
    """

    name: str
    supernet: TrainingRecipe
    retrain: TrainingRecipe
    evaluations: int
    population: int
    recalibration_images: int
    validation_images: int
    finalists: int
    processes: int = 5
    least_agreement: float = 0.97
    calibration: CalibrationRecipe = field(default_factory=CalibrationRecipe)
    protocol: Protocol = field(default_factory=Protocol)


RECIPES = {
    "quick": Recipe(
        name="quick",
        supernet=TrainingRecipe(steps=1600, batch=32, learning_rate=0.02),
        retrain=TrainingRecipe(steps=300, batch=32, learning_rate=0.003),
        evaluations=120,
        population=30,
        recalibration_images=256,
        validation_images=1000,
        finalists=3,
    ),
    "smoke": Recipe(
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
}
"""`quick` takes minutes on two cores; `smoke` trains nothing worth having, to try the path."""


def recipe(name: str) -> Recipe:
    """The recipe of a name; raises InvalidInput for one that is not there."""
    if name not in RECIPES:
        raise InvalidInput(f"--recipe is {name!r}.", accepted=", ".join(RECIPES))
    return RECIPES[name]
