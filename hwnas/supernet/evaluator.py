"""Scores architectures with shared weights: recalibrated batch norms, SEARCH-VAL accuracy."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from hwnas.batches import evaluation_batch, in_order
from hwnas.data import Splits
from hwnas.spaces.base import Architecture
from hwnas.supernet.network import NormStatistics, Supernet


@dataclass(frozen=True)
class Evaluation:
    """How an architecture did on SEARCH-VAL; `loss` is the mean cross-entropy."""

    accuracy: float
    loss: float

    @property
    def score(self) -> tuple[float, float]:
        """Accuracy first; the loss breaks ties."""
        return (self.accuracy, -self.loss)


class Evaluator:
    """Evaluates each architecture once, all on the same images.

    Batch norms are recalibrated on the first `recalibration_images` of TRAIN before every score.
    """

    def __init__(
        self,
        supernet: Supernet,
        splits: Splits,
        *,
        recalibration_images: int,
        validation_images: int,
        batch: int | None = None,
    ) -> None:
        self.supernet = supernet
        train, val = splits.train, splits.search_val
        batch = batch or evaluation_batch(train)
        self._recalibration = [
            x for x, _ in in_order(train.first(recalibration_images), batch, whole=True)
        ]
        self._validation = list(in_order(val.first(validation_images), batch))
        self._known: dict[Architecture, Evaluation] = {}

    def statistics(self, architecture: Architecture) -> NormStatistics:
        """The architecture's recalibrated batch-norm statistics."""
        return self.supernet.recalibrate(architecture, self._recalibration)

    def __call__(self, architecture: Architecture) -> Evaluation:
        """The architecture's accuracy and loss on SEARCH-VAL."""
        if architecture not in self._known:
            statistics = self.statistics(architecture)
            right, loss, seen = 0, 0.0, 0
            with torch.no_grad():
                for x, y in self._validation:
                    logits = self.supernet(x, architecture, statistics)
                    right += int((logits.argmax(1) == y).sum())
                    loss += float(functional.cross_entropy(logits, y, reduction="sum"))
                    seen += len(y)
            self._known[architecture] = Evaluation(right / seen, loss / seen)
        return self._known[architecture]
