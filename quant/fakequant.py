"""Fake quantisation: values as an engine will hold them, with gradients to train them by.

| precision | weights | activations |
|---|---|---|
| w8a8, w4a8, ... | absmax, per output channel | LSQ: a learned range |
| pact-w4a4, ... | DoReFa, per tensor | PACT: a learned clipping range |
| fp16, bf16, fp8 | cast through the type | cast through the type |
| fp32, tf32 | as they are | as they are |

Ranges that are learned are in `quant.ranges`, all else is here. The stand-alone layers of
`quant.layers` give the same numbers to the last bit. All arithmetic is in fp32, whatever type
values come in and are handed on in: a scale of fewer bits would move codes. (Handed on in bf16, a
code of eight bits times its scale is rounded by up to one step.)
"""

from typing import Any

import torch
from torch import Tensor

from quant.kernels import Kernel, as_lying, dense, quotient
from quant.precision import FP8_TOP, LEAST_SCALE, Precision, weight_top

SHORT_FLOATS = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""The types that values are cast through without a scale."""


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
        scale = quotient(torch.clamp(largest, min=LEAST_SCALE), top)
        held = dense(weight)
        rows = as_lying(held, len(held), held.numel() // len(held))
        rounded = _on_levels(rows, scale.view(-1, 1), -top, top)
        rounded = rounded.as_strided(held.size(), held.stride())
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
            held = dense(value)
            largest = largest_magnitude(held)
            if limit is not None:
                largest = torch.where(limit.isnan(), largest, limit)
            scale = quotient(largest, FP8_TOP)
            rounded = _in_fp8(as_lying(held), scale).as_strided(held.size(), held.stride())
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
def _on_levels(rows: Tensor, scale: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    return (rows / scale).round_().clamp_(low, high).mul_(scale)  # type: ignore[arg-type]


@Kernel
def _in_fp8(value: Tensor, scale: Tensor) -> Tensor:
    rounded = (value.float() / scale).clamp_(-FP8_TOP, FP8_TOP).to(torch.float8_e4m3fn)
    return rounded.to(scale.dtype).mul_(scale).to(value.dtype)
