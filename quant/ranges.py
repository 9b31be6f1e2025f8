"""Activations rounded to a grid whose range is learned, by LSQ or by PACT.

In training, most of what is rounded comes from a batch norm: `normalise_and_quantise` does both in
one pass. Sums over values are taken in the order in which they lie in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from quant.kernels import GROUP, Kernel, Sums, as_lying, dense, in_groups, is_apart, quotient
from quant.precision import LEAST_SCALE, Grid

_TINY = float(torch.finfo(torch.float32).tiny)
_BELOW = 1 - 2**-22
"""A quotient that the rounding of two divisions leaves below 1 counts as 1 from here on."""

_WIDTH = 64
"""Where values are added up with no regard to channels, rows are so wide."""

Number = Tensor | float


def fake_quantise_activation(
    value: Tensor, limit: Tensor, grid: Grid, *, pact: bool = False, relu: bool = False
) -> Tensor:
    """Round an activation to a grid with a learned range; with `relu`, on an unsigned grid, round
    max(x, 0), without a pass over the values for it.

    x_q = s * clamp(round(x / s), low, high), s = |limit| / top.

    LSQ (Esser et al. 2019, equations 1 to 3): the gradient of x passes where x rounds to a code of
    the grid (as Brevitas has it; the paper stops half a step earlier); that of `limit` is the
    paper's, scaled by 1 / sqrt(values * high).

    PACT (Choi et al. 2018, equations 1 to 3), with `limit` its alpha: the gradient of x passes
    inside the clipping range; that of alpha is 1 where x >= alpha, else 0. A signed grid clips on
    both sides, with -1 (low / top) where x <= -alpha.

    >>> unsigned = Grid(0, 3, 3)
    >>> fake_quantise_activation(torch.tensor([-1.0, 0.6, 9.0]), torch.tensor(3.0), unsigned)
    tensor([0., 1., 3.])
    """
    quantised: Tensor = _Quantiser.apply(value, limit, grid, pact, relu)  # type: ignore[no-untyped-call]
    return quantised


def normalise_and_quantise(
    value: Tensor,
    gamma: Tensor,
    beta: Tensor,
    limit: Tensor,
    grid: Grid,
    *,
    epsilon: float,
    pact: bool = False,
    relu: bool = False,
) -> Tensor:
    """A batch norm by the statistics of the batch (batch, channels, height, width), with factors
    `gamma` and shifts `beta` (channels,), and then `fake_quantise_activation`.

    On a CPU in one pass over the values, and two for the gradients: less than the norm alone takes.
    The same but for the last bits, which on a tie of two codes move a value by a step.

    >>> value = torch.tensor([-3.0, 1.0, 1.0, 1.0]).view(4, 1, 1, 1)
    >>> one, limit = torch.ones(1), torch.tensor(3.0)
    >>> normalise_and_quantise(value, one, one, limit, Grid(0, 3, 3), epsilon=0.0).flatten()
    tensor([0., 2., 2., 2.])
    """
    if is_apart(value):
        normed = functional.batch_norm(value, None, None, gamma, beta, training=True, eps=epsilon)
        return fake_quantise_activation(normed, limit, grid, pact=pact, relu=relu)
    held = value.contiguous(memory_format=torch.channels_last)
    arguments = (held, gamma, beta, limit, epsilon, grid, pact, relu)
    quantised: Tensor = _NormAndQuantiser.apply(*arguments)  # type: ignore[no-untyped-call]
    return quantised


def first_limit(value: Tensor, grid: Grid) -> Tensor:
    """LSQ's starting range for the values at hand: s = 2 mean|x| / sqrt(high), limit = s * top.

    It starts no further out than the largest value: at 8 bits, LSQ's own would. PACT starts there
    too: its paper's fixed start would round most values of a few bits to zero.
    """
    magnitude = value.detach().float().abs()
    limit = torch.minimum(2 * magnitude.mean() / grid.high**0.5 * grid.top, magnitude.amax())
    return torch.clamp(limit, min=LEAST_SCALE)


class LearnedRange(nn.Module):
    """A quantiser of activations whose range is learned, by LSQ or, with `pact`, by PACT."""

    def __init__(self, grid: Grid, *, pact: bool = False, start: float = math.nan) -> None:
        super().__init__()
        self.grid = grid
        self.pact = pact
        self.limit = nn.Parameter(torch.tensor(start))

    def forward(self, value: Tensor, *, relu: bool = False) -> Tensor:
        """The values, or max(value, 0), rounded to the grid."""
        return fake_quantise_activation(value, self.limit, self.grid, pact=self.pact, relu=relu)

    def after_norm(
        self, value: Tensor, gamma: Tensor, beta: Tensor, *, epsilon: float, relu: bool
    ) -> Tensor:
        """The values normalised by their own statistics, and rounded."""
        return normalise_and_quantise(
            value, gamma, beta, self.limit, self.grid, epsilon=epsilon, pact=self.pact, relu=relu
        )


# ---- value by value


def _on_grid(value: Tensor, scale: Number, low: Number, high: Number) -> Tensor:
    return (value / scale).clamp_(low, high).round_().mul_(scale)  # type: ignore[arg-type]


def _parts(
    scaled: Tensor, low: Number, high: Number, bottom: Number, ceiling: Number
) -> tuple[Tensor, Tensor]:
    """Each value's code, and 1 where it lies in bottom..ceiling, else 0: as numbers, for choosing
    by a mask takes several times as long where it is not compiled.
    """
    inside = scaled.clamp(bottom, ceiling).eq_(scaled)  # type: ignore[arg-type]
    return scaled.clamp(low, high).round_(), inside  # type: ignore[arg-type]


def _lsq(scaled: Tensor, gradient: Tensor, *ends: Number) -> tuple[Tensor, Tensor]:
    """The gradients of values (in units of their step), and those of the step."""
    codes, inside = _parts(scaled, *ends)
    return gradient * inside, codes.sub_(scaled * inside).mul_(gradient)


def _pact(scaled: Tensor, gradient: Tensor, *ends: Number) -> tuple[Tensor, Tensor]:
    """The same for PACT."""
    codes, inside = _parts(scaled, *ends)
    return gradient * inside, codes.mul_(inside.neg().add_(1)).mul_(gradient)


# ---- kernels


@Kernel
def _rounded(value: Tensor, scale: Number, low: Number, high: Number) -> Tensor:
    return _on_grid(value.float(), scale, low, high).to(value.dtype)


@Kernel
def _normed_and_rounded(
    rows: Tensor, factor: Tensor, shift: Tensor, scale: Number, low: Number, high: Number
) -> Tensor:
    return _on_grid((rows * factor).add_(shift), scale, low, high)


@Kernel
def _through_norm(
    rows: Tensor, gradient: Tensor, factor: Tensor, mean: Tensor, slope: Tensor, offset: Tensor
) -> Tensor:
    """The gradient of what is normalised, by that of what the norm gives."""
    return (rows - mean).mul_(slope).add_(offset).neg_().add_(gradient).mul_(factor)


def _gradients(scheme: Callable[..., tuple[Tensor, Tensor]]) -> Sums:
    """The gradients of values, and the sums of those of their step."""

    def function(value: Tensor, gradient: Tensor, scale: Number, *ends: Number) -> Any:
        passed, for_step = scheme(value.float() / scale, gradient, *ends)
        return passed.to(gradient.dtype), for_step

    return Sums(function)


def _normed_gradients(scheme: Callable[..., tuple[Tensor, Tensor]]) -> Sums:
    """The gradients of what a norm gives, and the sums of those of the step, of the norm's shifts,
    and of its factors times the standard deviation.
    """

    def function(
        rows: Tensor,
        gradient: Tensor,
        factor: Tensor,
        shift: Tensor,
        mean: Tensor,
        scale: Number,
        *ends: Number,
    ) -> Any:
        scaled = (rows * factor).add_(shift).div_(scale)
        passed, for_step = scheme(scaled, gradient, *ends)
        return passed, for_step, passed, (rows - mean).mul_(passed)

    return Sums(function)


_lsq_gradients, _pact_gradients = map(_gradients, (_lsq, _pact))
_normed_lsq_gradients, _normed_pact_gradients = map(_normed_gradients, (_lsq, _pact))


# ---- for autograd


class _Quantiser(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, value: Tensor, limit: Tensor, grid: Grid, pact: bool, relu: bool
    ) -> Tensor:
        value, scale = dense(value), _scale(limit, grid)
        ctx.save_for_backward(value, limit, scale)
        ctx.grid, ctx.pact, ctx.inside = grid, pact, _ends_inside(grid, pact, relu)
        rounded: Tensor = _rounded(as_lying(value), scale, grid.low, grid.high)
        return rounded.as_strided(value.size(), value.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        value, limit, scale = ctx.saved_tensors
        width = value.numel() if value.numel() % (GROUP * _WIDTH) else _WIDTH
        passed, for_step = (_pact_gradients if ctx.pact else _lsq_gradients)(
            in_groups(value, width),
            in_groups(_laid_as(gradients[0], value), width),
            scale, ctx.grid.low, ctx.grid.high, *ctx.inside,
        )  # fmt: skip
        for_limit = _of_limit(for_step, limit, ctx.grid, ctx.pact, value.numel())
        return passed.as_strided(value.size(), value.stride()), for_limit, None, None, None


class _NormAndQuantiser(torch.autograd.Function):
    """The values are kept as rows of channels, as channels-last has them."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        gamma: Tensor,
        beta: Tensor,
        limit: Tensor,
        epsilon: float,
        grid: Grid,
        pact: bool,
        relu: bool,
    ) -> Tensor:
        mean, variance = torch.batch_norm_update_stats(value, None, None, 0.0)
        per_deviation, scale = torch.rsqrt(variance + epsilon), _scale(limit, grid)
        factor = gamma * per_deviation
        shift = beta - mean * factor
        ctx.save_for_backward(value, limit, scale, mean, per_deviation, factor, shift)
        ctx.grid, ctx.pact, ctx.inside = grid, pact, _ends_inside(grid, pact, relu)
        rows = as_lying(value, value.numel() // value.shape[1], value.shape[1])
        rounded: Tensor = _normed_and_rounded(rows, factor, shift, scale, grid.low, grid.high)
        return rounded.as_strided(value.size(), value.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        value, limit, scale, mean, per_deviation, factor, shift = ctx.saved_tensors
        channels = value.shape[1]
        rows = value.numel() // channels
        passed, *sums = (_normed_pact_gradients if ctx.pact else _normed_lsq_gradients)(
            in_groups(value, channels),
            in_groups(_laid_as(gradients[0], value), channels),
            factor, shift, mean, scale, ctx.grid.low, ctx.grid.high, *ctx.inside,
        )  # fmt: skip
        for_step, for_beta, products = sums[0], sums[1].sum(0), sums[2].sum(0)
        for_gamma = products * per_deviation
        through: Tensor = _through_norm(
            as_lying(value, rows, channels),
            as_lying(passed, rows, channels),
            factor, mean, for_gamma * per_deviation / rows, for_beta / rows,
        )  # fmt: skip
        for_limit = _of_limit(for_step, limit, ctx.grid, ctx.pact, value.numel())
        for_value = through.as_strided(value.size(), value.stride())
        return for_value, for_gamma, for_beta, for_limit, None, None, None, None


def _of_limit(for_step: Tensor, limit: Tensor, grid: Grid, pact: bool, values: int) -> Tensor:
    """The gradient of a range by those of its step, of so many values."""
    share = 1.0 if pact else (values * grid.high) ** -0.5
    return (for_step.sum() * (share / grid.top) * limit.sign()).view_as(limit)


@functools.cache
def _ends_inside(grid: Grid, pact: bool, relu: bool) -> tuple[float, float]:
    """The least and the largest x / s, in fp32, at which the gradient of x passes."""
    if pact:
        low, high = grid.low * _BELOW or _TINY, grid.high * _BELOW
    else:
        half = np.float32(grid.high + 0.5)  # rounds to the even code after `high`
        low, high = grid.low - 0.5, float(np.nextafter(half, np.float32(0)))
    return _TINY if relu else low, high


def _scale(limit: Tensor, grid: Grid) -> Tensor:
    return quotient(torch.clamp(limit.abs(), min=LEAST_SCALE), grid.top)


def _laid_as(gradient: Tensor, value: Tensor) -> Tensor:
    """A gradient that lies in memory as its value does."""
    if gradient.stride() == value.stride():
        return gradient
    return torch.empty_like(value, dtype=gradient.dtype).copy_(gradient)
