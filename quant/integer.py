"""From a trained layer to an integer kernel: codes, scales and the bias grid. NumPy only."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from quant.errors import InvalidInput
from quant.precision import weight_top

Floats = npt.NDArray[np.float32]

_BIAS_TOP = 2**30
"""The largest bias code: half of 32 bits, so that the products added to it have the other half."""

_TINY = np.finfo(np.float32).tiny


@dataclass(frozen=True)
class Norm:
    """A batch norm in inference: y = (x - mean) / sqrt(variance + epsilon) * gamma + beta."""

    gamma: Floats
    beta: Floats
    mean: Floats
    variance: Floats
    epsilon: float

    @property
    def factor(self) -> Floats:
        """What the norm multiplies each channel by."""
        factor: Floats = self.gamma / np.sqrt(self.variance + np.float32(self.epsilon))
        return factor


@dataclass(frozen=True)
class FloatWeights:
    """The weight (out, in, ...) and bias (out,) of a float kernel, norm folded."""

    weight: Floats
    bias: Floats


@dataclass(frozen=True)
class IntegerWeights:
    """The weight of an integer kernel: codes (out, in, ...) int8, value = code * scale[out]."""

    codes: npt.NDArray[np.int8]
    scale: Floats
    bias: Floats


Weights = FloatWeights | IntegerWeights


def fold_float(weight: Floats, bias: Floats | None, norm: Norm | None) -> FloatWeights:
    """Fold a batch norm into the convolution before it.

    >>> one = np.ones(1, np.float32)
    >>> folded = fold_float(np.full((1, 1, 1, 1), 2, np.float32), None,
    ...                     Norm(gamma=3 * one, beta=one, mean=one, variance=one, epsilon=0.0))
    >>> folded.weight.item(), folded.bias.item()
    (6.0, -2.0)
    """
    bias = np.zeros(len(weight), np.float32) if bias is None else bias
    if norm is None:
        return FloatWeights(weight, bias)
    factor = norm.factor
    folded = weight * factor.reshape(-1, *[1] * (weight.ndim - 1))
    return FloatWeights(folded, norm.beta + (bias - norm.mean) * factor)


def fold_integer(
    weight: Floats, bits: int, bias: Floats | None, norm: Norm | None
) -> IntegerWeights:
    """Quantise a weight per output channel, then fold a batch norm without changing a code.

    Codes come from the weight as it was trained: code = round(w / s), half to even, with
    s = max|w| / (2^(bits-1) - 1). The norm multiplies the scale by |factor|, and a negative factor
    flips the signs of the codes, which the symmetric narrow range allows. A channel of zeros, or
    of values that vanish in fp32, gets scale 1.

    >>> w = np.array([[[[-1.0]], [[0.5]]]], np.float32)
    >>> fold_integer(w, 8, None, None).codes.ravel().tolist()
    [-127, 64]
    """
    shape = (-1, *[1] * (weight.ndim - 1))
    top = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = top / np.float32(weight_top(bits))
    scale = np.where(scale >= _TINY, scale, np.float32(1)).astype(np.float32)
    codes = np.rint(weight / scale.reshape(shape)).astype(np.int8)
    return _folded(codes, scale, bias, norm)


def fold_dorefa(
    rounded: Floats, bits: int, bias: Floats | None, norm: Norm | None, *, name: str
) -> IntegerWeights:
    """The codes of a weight that DoReFa rounded, a batch norm folded without changing a code.

    Codes are odd, from -(2^bits - 1) to 2^bits - 1, on one scale, 1 / (2^bits - 1); those of one
    bit are -1 and 1, on the scale mean|w|. They come from the rounded weight, so none can differ.

    Raises InvalidInput for eight bits, which make codes up to 255; `name` is the layer's.

    >>> rounded = np.array([[1, 1 / 3, -1 / 3, -1]], np.float32)
    >>> fold_dorefa(rounded, 2, None, None, name="conv").codes
    array([[ 3,  1, -1, -3]], dtype=int8)
    """
    top = 2**bits - 1
    if top > np.iinfo(np.int8).max:
        raise InvalidInput(
            f"The layer {name} has {bits}-bit DoReFa weights, whose codes go to {top}: more than "
            "an 8-bit kernel holds.",
            accepted="pact-w1 to pact-w7 in a file; pact-w8 in training and scoring",
            next_step="choose pact-w7 or w8 weights for that layer",
        )
    size = np.float32(1 / top) if bits > 1 else np.abs(rounded).max().astype(np.float32)
    size = size if size >= _TINY else np.float32(1)
    codes = np.rint(rounded / size).astype(np.int8)
    return _folded(codes, np.full(len(rounded), size, np.float32), bias, norm)


def _folded(
    codes: npt.NDArray[np.int8], scale: Floats, bias: Floats | None, norm: Norm | None
) -> IntegerWeights:
    """Codes with a norm folded into their scale (out,) and their bias."""
    shape = (-1, *[1] * (codes.ndim - 1))
    if norm is None:
        bias = np.zeros(len(codes), np.float32) if bias is None else bias
        return IntegerWeights(codes, scale, bias)
    factor = norm.factor
    codes = (codes * np.where(factor < 0, -1, 1).reshape(shape)).astype(np.int8)
    folded = scale * np.abs(factor)
    codes[folded < _TINY] = 0
    scale = np.where(folded < _TINY, np.float32(1), folded).astype(np.float32)
    shift = -norm.mean if bias is None else bias - norm.mean
    return IntegerWeights(codes, scale, norm.beta + shift * factor)


def bias_codes(
    weights: IntegerWeights, input_scale: float
) -> tuple[npt.NDArray[np.int32], IntegerWeights]:
    """The bias on the accumulator's grid, input_scale * scale[out], and the weights to go with it.

    Where a channel's grid is so fine that its bias would not fit 32 bits, its weights are below
    anything that can show in the sum: its scale is widened until the bias fits, and its codes
    follow.
    """
    grid = np.float32(input_scale) * weights.scale
    need = np.abs(weights.bias).astype(np.float64) / _BIAS_TOP
    if np.any(narrow := need > grid):
        scale = np.where(narrow, need / input_scale * 1.001, weights.scale).astype(np.float32)
        ratio = (weights.scale / scale).reshape(-1, *[1] * (weights.codes.ndim - 1))
        codes = np.rint(weights.codes * ratio).astype(np.int8)
        weights = IntegerWeights(codes, scale, weights.bias)
        grid = np.float32(input_scale) * scale
    codes32 = np.rint(weights.bias.astype(np.float64) / grid)
    return codes32.astype(np.int32), weights
