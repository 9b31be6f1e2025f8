"""Shared weights that are sliced to what an architecture asks for."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_tables.ops import NORM_EPSILON, Layer
from profilers.modules import weighted_layer
from quant.fakequant import LearnedRange, first_limit, round_weight
from quant.precision import Precision

Statistics = tuple[Tensor, Tensor]
"""The mean and variance of one batch norm's channels."""


class ElasticLayer(nn.Module):
    """The weight of one (position, group, role), as wide as any architecture needs it.

    A width c uses the first c output channels, and the first channels of each input. `gamma` is
    where the norm's factors start; `bias` is the norm's shift, or the layer's own bias.
    """

    def __init__(self, layer: Layer, shape: tuple[int, ...], gamma: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        if layer.kind == "linear":
            nn.init.normal_(self.weight, std=0.01)
        else:
            nn.init.kaiming_normal_(self.weight, mode="fan_out" if layer.groups == 1 else "fan_in")
        if layer.norm:
            self.gamma = nn.Parameter(torch.full(shape[:1], gamma))
        if layer.norm or layer.has_bias:
            self.bias = nn.Parameter(torch.zeros(shape[0]))

    def sliced_weight(self, shape: tuple[int, ...]) -> Tensor:
        """The weight of a layer whose own has the given shape."""
        out, width, *_ = shape
        return self.weight[:out, :width].contiguous()

    def forward(self, value: Tensor, layer: Layer, precision: Precision) -> Tensor:
        """The convolution or linear layer itself, its norm left out."""
        weight = self.sliced_weight(layer.weight_shape(value.shape[1]))
        bias = self.bias[: layer.channels] if layer.has_bias else None
        return weighted_layer(layer, value, round_weight(weight, precision), bias)

    def normalise(
        self, value: Tensor, layer: Layer, statistics: Statistics | None, momentum: float | None
    ) -> Tensor:
        """The batch norm after the convolution.

        Without statistics those of the batch are used. With `momentum` they are used too, and
        `statistics` moves towards them; with statistics alone, these are used.
        """
        mean, variance = statistics or (None, None)
        return functional.batch_norm(
            value,
            mean,
            variance,
            self.gamma[: layer.channels],
            self.bias[: layer.channels],
            training=statistics is None or momentum is not None,
            momentum=momentum or 0.0,
            eps=NORM_EPSILON,
        )


class ElasticRange(LearnedRange):
    """The learned range of one quantised value, set from the first batch it sees."""

    @property
    def is_set(self) -> bool:
        """Whether a batch was seen."""
        return not bool(torch.isnan(self.limit))

    def initialise(self, value: Tensor) -> None:
        """Set the range from a batch, once."""
        if not self.is_set:
            with torch.no_grad():
                self.limit.copy_(first_limit(value, self.grid))
