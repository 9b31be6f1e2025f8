"""Fake quantisation: values as an engine will hold them, with gradients to train them by.

| precision | weights | activations |
|---|---|---|
| w8a8, w4a8, ... | absmax, per output channel | LSQ: a learned range |
| pact-w4a4, ... | DoReFa, per tensor | PACT: a learned clipping range |
| fp16, bf16, fp8 | cast through the type | cast through the type |
| fp32, tf32 | as they are | as they are |

The stand-alone layers of `quant.layers` give the same numbers to the last bit. All arithmetic is in
fp32, whatever type values come in and are handed on in: a scale of fewer bits would move codes.
(Handed on in bf16, a code of eight bits times its scale is rounded by up to one step.) On a CPU
sums are taken over values in the order in which they lie in memory.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from quant.kernels import Kernel, is_apart
from quant.precision import FP8_TOP, LEAST_SCALE, Grid, Precision, weight_top

SHORT_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""The types that values are cast through without a scale."""

_TINY = float(torch.finfo(torch.float32).tiny)
_BELOW = 1 - 2**-22
"""A quotient that the rounding of two divisions leaves below 1 counts as 1 from here on."""


def round_weight(weight: Tensor, precision: Precision) -> Tensor:
    """A weight (out, ...) as the precision holds it."""
    if precision.is_pact:
        return dorefa_weight(weight, precision.weight_bits)
    if precision.is_integer:
        return fake_quantise_weight(weight, precision.weight_bits)
    return cast(weight, precision) if precision.is_cast else weight


# ---- weights


def fake_quantise_weight(weight: Tensor, bits: int) -> Tensor:
    """Round a weight (out, ...) to 2^bits - 1 levels per output channel.

    w_q = s * round(w / s), s = max|w| / (2^(bits-1) - 1), half to even. The range is the largest
    value, not learned: a learned step does not survive slicing. The gradient passes straight
    through.

    >>> fake_quantise_weight(torch.tensor([[1.0, 0.4, -0.2]]), 2)
    tensor([[1., 0., -0.]])
    """
    with torch.no_grad():
        top = weight_top(bits)
        largest = weight.abs().flatten(1).amax(1)
        scale = _quotient(torch.clamp(largest, min=LEAST_SCALE), top)
        scale = scale.view(-1, *[1] * (weight.ndim - 1))
        rounded = (weight / scale).round_().clamp_(-top, top).mul_(scale)
    return _straight(weight, rounded)


def dorefa_weight(weight: Tensor, bits: int) -> Tensor:
    """Round a weight to 2^bits levels in [-1, 1] (DoReFa: Zhou et al. 2016, equations 7 to 9).

    t = tanh(w), r = t / (2 max|t|) + 1/2, w_q = 2 round((2^bits - 1) r) / (2^bits - 1) - 1, with
    the maximum over the tensor. One bit is the sign times mean|w|. The gradient passes straight
    through the rounding, and truly through tanh and the maximum; with one bit, straight through.

    The levels stand for no size, so a batch norm has to follow; equal to the paper's but for the
    last bit, they are odd codes times one scale.

    >>> dorefa_weight(torch.tensor([3.0, 0.1, -0.2, -3.0]), 2)
    tensor([ 1.0000,  0.3333, -0.3333, -1.0000])
    >>> dorefa_weight(torch.tensor([3.0, 0.0, -1.5, -1.5]), 1)
    tensor([ 1.5000,  1.5000, -1.5000, -1.5000])
    """
    if bits == 1:
        with torch.no_grad():
            mean = weight.abs().mean()
            rounded = torch.where(weight < 0, -mean, mean)
        return _straight(weight, rounded)
    levels = 2**bits - 1
    squashed = torch.tanh(weight)
    share = squashed / (2 * squashed.abs().amax()).clamp(min=LEAST_SCALE) + 0.5
    scaled = levels * share
    codes = 2 * _straight(scaled, scaled.detach().round()) - levels
    rounded_weight: Tensor = codes * (1 / levels)
    return rounded_weight


# ---- activations


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
    quantised: Tensor = _ActivationQuantiser.apply(value, limit, grid, pact, relu)  # type: ignore[no-untyped-call]
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


# ---- floats


def cast(value: Tensor, precision: Precision, limit: Tensor | None = None) -> Tensor:
    """Values rounded to fp16, bf16 or fp8, held in the type they came in; the gradient passes
    straight through.

    fp8 is e4m3 with one scale for the tensor, limit / 448, and saturates there. Without a limit, or
    with one that is NaN, max|x| is in its place: an activation's scale follows the batch at hand.

    >>> cast(torch.tensor([1.0, 1 / 3]), Precision("fp8"))
    tensor([1.0000, 0.3214])
    >>> cast(torch.tensor([1.0, 1 / 3]), Precision("fp8"), torch.tensor(0.5))
    tensor([0.5000, 0.3214])
    """
    with torch.no_grad():
        if precision.name == "fp8":
            held = value if _is_dense(value) else value.contiguous()
            largest = largest_magnitude(held)
            if limit is not None:
                largest = torch.where(limit.isnan(), largest, limit)
            scale = _quotient(largest, FP8_TOP)
            rounded = _in_fp8(_flat(held), scale).as_strided(held.size(), held.stride())
        else:  # not compiled, for a compiler leaves out a cast and the cast back
            rounded = value.to(SHORT_FLOATS[precision.name]).to(value.dtype)
    return _straight(value, rounded)


def largest_magnitude(value: Tensor) -> Tensor:
    """max|x|, in fp32, and no less than the smallest scale."""
    low, high = torch.aminmax(value)
    return torch.maximum(-low, high).float().clamp_(min=LEAST_SCALE)


# ---- gradients


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor, rounded: Tensor) -> Tensor:
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


def _straight(value: Tensor, rounded: Tensor) -> Tensor:
    """The rounded values, with the gradient of the values."""
    result: Tensor = _Straight.apply(value, rounded)  # type: ignore[no-untyped-call]
    return result


@Kernel
def _on_grid(value: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    rounded = (value.float() / scale).clamp_(low, high).round_()  # type: ignore[arg-type]
    return rounded.mul_(scale).to(value.dtype)


@Kernel
def _in_fp8(value: Tensor, scale: Tensor) -> Tensor:
    rounded = (value.float() / scale).clamp_(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn)
    return rounded.to(scale.dtype).mul_(scale).to(value.dtype)


def _parts(
    scaled: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    bottom: Tensor | float,
    ceiling: Tensor | float,
) -> tuple[Tensor, Tensor]:
    """Each value's code, and 1 where it lies in bottom..ceiling, else 0: by arithmetic, since
    choosing by a mask takes six times as long.
    """
    inside = (scaled - scaled.clamp(bottom, ceiling)).sign_().abs_().neg_().add_(1)  # type: ignore[arg-type]
    return scaled.clamp(low, high).round_(), inside  # type: ignore[arg-type]


@Kernel
def _lsq_gradients(
    value: Tensor, gradient: Tensor, scale: Tensor, *ends: Tensor | float
) -> tuple[Tensor, Tensor]:
    scaled = value.float() / scale
    codes, inside = _parts(scaled, *ends)
    passed = (gradient * inside).to(gradient.dtype)
    return passed, codes.sub_(scaled.mul_(inside)).mul_(gradient)


@Kernel
def _pact_gradients(
    value: Tensor, gradient: Tensor, scale: Tensor, *ends: Tensor | float
) -> tuple[Tensor, Tensor]:
    codes, inside = _parts(value.float() / scale, *ends)
    passed = (gradient * inside).to(gradient.dtype)
    return passed, codes.mul_(inside.neg_().add_(1)).mul_(gradient)


def _summed(gradients: Kernel) -> Kernel:
    """The same gradients with those of the range added up, in one pass where that is compiled."""

    def function(*arguments: Any) -> tuple[Tensor, Tensor]:
        passed, per_step = gradients.function(*arguments)
        return passed, per_step.sum()

    return Kernel(function)


_lsq_gradients_summed, _pact_gradients_summed = map(_summed, (_lsq_gradients, _pact_gradients))


class _ActivationQuantiser(torch.autograd.Function):
    """The kernels see values as they lie in memory, as one dimension."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, limit: Tensor, grid: Grid, pact: bool, relu: bool
    ) -> Tensor:
        value = value if _is_dense(value) else value.contiguous()
        ctx.save_for_backward(value, limit)
        ctx.grid, ctx.pact, ctx.inside = grid, pact, _inside(grid, pact, relu)
        rounded: Tensor = _on_grid(_flat(value), _scale(limit, grid), grid.low, grid.high)
        return rounded.as_strided(value.size(), value.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        value, limit = ctx.saved_tensors
        grid, gradient = ctx.grid, gradients[0]
        if gradient.stride() != value.stride():
            gradient = torch.empty_like(value).copy_(gradient)
        share = 1.0 if ctx.pact else (value.numel() * grid.high) ** -0.5
        arguments = (
            _flat(value), _flat(gradient), _scale(limit, grid), grid.low, grid.high, *ctx.inside
        )  # fmt: skip
        if is_apart(value):
            kernel = _pact_gradients_summed if ctx.pact else _lsq_gradients_summed
            passed, steps = kernel(*arguments)
        else:
            passed, per_step = (_pact_gradients if ctx.pact else _lsq_gradients)(*arguments)
            steps = per_step.sum()
        for_limit = steps * share * limit.sign() / grid.top
        passed = passed.as_strided(value.size(), value.stride())
        return passed, for_limit.view_as(limit), None, None, None


@functools.cache
def _inside(grid: Grid, pact: bool, relu: bool) -> tuple[float, float]:
    """The least and the largest x / s, in fp32, at which the gradient of x passes."""
    if pact:
        low, high = grid.low * _BELOW or _TINY, grid.high * _BELOW
    else:
        half = np.float32(grid.high + 0.5)  # rounds to the even code after `high`
        low, high = grid.low - 0.5, float(np.nextafter(half, np.float32(0)))
    return _TINY if relu else low, high


def _scale(limit: Tensor, grid: Grid) -> Tensor:
    return _quotient(torch.clamp(limit.abs(), min=LEAST_SCALE), grid.top)


def _quotient(value: Tensor, number: float) -> Tensor:
    """The quotient of two numbers, rounded correctly on every device."""
    divisor = torch.full((), number, device=value.device) if is_apart(value) else number
    return value / divisor


def _is_dense(value: Tensor) -> bool:
    """Whether the values fill one piece of memory."""
    channels_last = value.ndim == 4 and value.is_contiguous(memory_format=torch.channels_last)
    return channels_last or value.is_contiguous()


def _flat(value: Tensor) -> Tensor:
    """The values in one dimension; no view, for a compiled kernel would be tied to its base."""
    storage, first = value.untyped_storage(), value.storage_offset()
    return value.detach().new_empty(0).set_(storage, first, (value.numel(),), (1,))
