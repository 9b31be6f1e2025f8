"""Fake quantisation for shared weights: values rounded to the codes that an engine will use.

The stand-alone layers of `quant.layers` (Brevitas) give the same numbers to the last bit.
"""

from typing import Any

import torch
from torch import Tensor

from quant.precision import Grid, weight_top

LEAST_SCALE = 1e-10
"""The smallest scale; a channel of zeros stays zeros."""


def fake_quantise_weight(weight: Tensor, bits: int) -> Tensor:
    """Round a weight (out, ...) to 2^bits - 1 levels per output channel.

    w_q = s * round(w / s), s = max|w| / (2^(bits-1) - 1), half to even. The range is the largest
    value, not learned: a learned step does not survive slicing. The gradient passes straight
    through.

    >>> fake_quantise_weight(torch.tensor([[1.0, 0.4, -0.2]]), 2)
    tensor([[1., 0., -0.]])
    """
    quantised: Tensor = _WeightQuantiser.apply(weight, weight_top(bits))  # type: ignore[no-untyped-call]
    return quantised


def fake_quantise_activation(value: Tensor, limit: Tensor, grid: Grid) -> Tensor:
    """Round an activation to a grid with a learned range (LSQ: Esser et al. 2019, equations 1-3).

    x_q = s * clamp(round(x / s), low, high), s = |limit| / top. The gradient of x passes where x
    rounds to a code of the grid (as Brevitas has it; the paper stops half a step earlier); that of
    `limit` is LSQ's, scaled by 1 / sqrt(values * high).

    >>> unsigned = Grid(0, 3, 3)
    >>> fake_quantise_activation(torch.tensor([-1.0, 0.6, 9.0]), torch.tensor(3.0), unsigned)
    tensor([0., 1., 3.])
    """
    quantised: Tensor = _ActivationQuantiser.apply(value, limit, grid)  # type: ignore[no-untyped-call]
    return quantised


def first_limit(value: Tensor, grid: Grid) -> Tensor:
    """LSQ's starting range for the values at hand: s = 2 mean|x| / sqrt(high), limit = s * top.

    It starts no further out than the largest value: at 8 bits, LSQ's own would.
    """
    magnitude = value.detach().abs()
    limit = torch.minimum(2 * magnitude.mean() / grid.high**0.5 * grid.top, magnitude.amax())
    return torch.clamp(limit, min=LEAST_SCALE)


class _WeightQuantiser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, top: int) -> Tensor:
        largest = weight.abs().flatten(1).amax(1)
        scale = torch.clamp(largest, min=LEAST_SCALE) / top
        scale = scale.view(-1, *[1] * (weight.ndim - 1))
        return torch.clamp(torch.round(weight / scale), -top, top) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


class _ActivationQuantiser(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, limit: Tensor, grid: Grid) -> Tensor:
        scale = torch.clamp(limit.abs(), min=LEAST_SCALE) / grid.top
        ctx.save_for_backward(value, limit)
        ctx.grid = grid
        return (value / scale).round_().clamp_(grid.low, grid.high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (gradient,) = gradients
        value, limit = ctx.saved_tensors
        grid = ctx.grid
        scaled = value / (torch.clamp(limit.abs(), min=LEAST_SCALE) / grid.top)
        codes = torch.round(scaled)
        kept = codes.clamp(grid.low, grid.high)
        outside = codes != kept
        per_step = torch.where(outside, kept, kept - scaled)
        share = (value.numel() * grid.high) ** -0.5
        for_limit = per_step.mul_(gradient).sum() * share * limit.sign() / grid.top
        return gradient.masked_fill(outside, 0), for_limit.view_as(limit), None
