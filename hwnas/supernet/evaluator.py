"""Scores architectures with shared weights: recalibrated batch norms, SEARCH-VAL accuracy."""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from hwnas.batches import PlacedImages, evaluation_batch, in_order
from hwnas.data import Splits
from hwnas.placement import placement_of, total
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
    """Evaluates each architecture once, all on the same images, where the supernet's weights are
    and in fp32 there.

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
        self.where = placement_of(supernet)
        self.where.keep_memory()
        self._batch = batch or evaluation_batch(splits.train)
        self._recalibration = PlacedImages(splits.train.first(recalibration_images), self.where)
        self._validation = PlacedImages(splits.search_val.first(validation_images), self.where)
        self._known: dict[Architecture, Evaluation] = {}

    def statistics(self, architecture: Architecture) -> NormStatistics:
        """The architecture's recalibrated batch-norm statistics."""
        batches = in_order(self._recalibration, self._batch, whole=True)
        return self.supernet.recalibrate(architecture, (x for x, _ in batches))

    def __call__(self, architecture: Architecture) -> Evaluation:
        """The architecture's accuracy and loss on SEARCH-VAL."""
        if architecture not in self._known:
            self._known[architecture] = self._evaluated(architecture)
        return self._known[architecture]

    def _evaluated(self, architecture: Architecture) -> Evaluation:
        """The device is waited for once, at the end."""
        statistics = self.statistics(architecture)
        right: list[Tensor] = []
        losses: list[Tensor] = []
        with self.where.scoring():
            for x, y in in_order(self._validation, self._batch):
                logits = self.supernet(x, architecture, statistics)
                right.append((logits.argmax(1) == y).sum())
                losses.append(functional.cross_entropy(logits, y, reduction="sum"))
        seen = len(self._validation)
        return Evaluation(total(right) / seen, total(losses) / seen)
