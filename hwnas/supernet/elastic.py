"""Shared weights that are sliced to what an architecture asks for."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_tables.ops import NORM_EPSILON, Layer
from profilers.modules import weighted_layer
from quant.fakequant import round_weight
from quant.precision import Precision
from quant.ranges import LearnedRange, first_limit

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
        if self.weight.shape == shape:
            return self.weight
        sliced: Tensor = _Sliced.apply(self.weight, *shape[:2])  # type: ignore[no-untyped-call]
        return sliced

    def forward(self, value: Tensor, layer: Layer, precision: Precision) -> Tensor:
        """The convolution or linear layer itself, its norm left out."""
        weight = self.sliced_weight(layer.weight_shape(value.shape[1]))
        bias = _first(self.bias, layer.channels) if layer.has_bias else None
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
            _first(self.gamma, layer.channels),
            _first(self.bias, layer.channels),
            training=statistics is None or momentum is not None,
            momentum=momentum or 0.0,
            eps=NORM_EPSILON,
        )

    def normalise_and_quantise(
        self, value: Tensor, layer: Layer, quantiser: LearnedRange, *, relu: bool
    ) -> Tensor:
        """The batch norm by the statistics of the batch, and the quantiser behind it, with a ReLU
        between them where `relu` says so.
        """
        gamma, beta = _first(self.gamma, layer.channels), _first(self.bias, layer.channels)
        return quantiser.after_norm(value, gamma, beta, epsilon=NORM_EPSILON, relu=relu)


class _Sliced(torch.autograd.Function):
    """weight[:out, :width] in one piece, laid out as the weight is. Going back, one tensor is
    filled with zeros and the gradient: half of what two slices and a copy would do.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, out: int, width: int) -> Tensor:
        ctx.shape, ctx.strides = weight.shape, weight.stride()
        return _corner(weight, out, width).contiguous(memory_format=_layout(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        whole = gradient.new_empty_strided(ctx.shape, ctx.strides).zero_()
        _corner(whole, *gradient.shape[:2]).copy_(gradient)
        return whole, None, None


def _corner(weight: Tensor, out: int, width: int) -> Tensor:
    return weight.narrow(0, 0, out).narrow(1, 0, width)


def _layout(weight: Tensor) -> torch.memory_format:
    if weight.is_contiguous() or weight.ndim != 4:
        return torch.contiguous_format
    return torch.channels_last


def _first(vector: Tensor, count: int) -> Tensor:
    """The first values; no slice, which would cost a copy going back, where they are all."""
    return vector if len(vector) == count else vector.narrow(0, 0, count)


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
