"""From a trained layer to a kernel: codes, scales and the bias grid. NumPy only."""

from dataclasses import dataclass, replace
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from quant.errors import InvalidInput
from quant.precision import FP8_TOP, LEAST_SCALE, weight_top

Floats = npt.NDArray[np.float32]

E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
"""NumPy's type of an fp8 code."""

_BIAS_TOP = 2**30
"""The largest bias code: half of 32 bits, so that the products added to it have the other half."""

_SAFE_TOP = 64
"""The largest weight code whose products with unsigned bytes add up in 16 bits, pair by pair."""

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
    """The weight of an integer kernel: codes (out, in, ...) int8, value = code * scale[out].

    No code is beyond +-`top`, as the precision has it. Where there is room, what the kernel
    multiplies is `stretch` times the code, at a scale so much finer: the products stay, the grid of
    the bias gets finer, and up to 64 no CPU saturates (those without VNNI add two products in 16
    bits).
    """

    codes: npt.NDArray[np.int8]
    scale: Floats
    bias: Floats
    top: int = 127

    @property
    def stretch(self) -> int:
        """What codes are multiplied by.

        >>> nothing = np.zeros(1, np.float32)
        >>> [IntegerWeights(nothing.astype(np.int8), nothing, nothing, t).stretch
        ...  for t in (1, 3, 7, 15, 31, 63, 127)]
        [64, 21, 9, 4, 2, 1, 1]
        """
        return max(1, _SAFE_TOP // self.top)

    @property
    def kernel_codes(self) -> npt.NDArray[np.int8]:
        """The stretched codes (out, in, ...)."""
        return (self.stretch * self.codes).astype(np.int8)

    @property
    def kernel_scale(self) -> Floats:
        """The scale (out,) of a stretched code."""
        scale: Floats = self.scale / np.float32(self.stretch)
        return scale


@dataclass(frozen=True)
class Fp8Weights:
    """The weight of an fp8 kernel: codes (out, in, ...) e4m3, value = code * scale, one scale for
    the tensor, as fp8 kernels multiply.

    What the layer then adds is a bias (out,). A norm is not folded into the codes, which would be
    others: it multiplies each channel of the products by `factor` (out,).
    """

    codes: npt.NDArray[Any]
    scale: np.float32
    bias: Floats
    factor: Floats | None = None

    @property
    def values(self) -> Floats:
        """The weight (out, in, ...), its norm left out."""
        values: Floats = self.codes.astype(np.float32) * self.scale
        return values


Weights = FloatWeights | IntegerWeights | Fp8Weights


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


def fold_fp8(weight: Floats, bias: Floats | None, norm: Norm | None) -> Fp8Weights:
    """Round a weight to fp8 as it was trained, with the scale max|w| / 448 (half to even), and
    keep a batch norm beside it.

    >>> folded = fold_fp8(np.array([[1, 1 / 3]], np.float32), None, None)
    >>> folded.codes.astype(float).tolist(), folded.bias.tolist(), folded.factor
    ([[448.0, 144.0]], [0.0], None)
    """
    scale = np.maximum(np.abs(weight).max(), np.float32(LEAST_SCALE)) / np.float32(FP8_TOP)
    codes = (weight / scale).astype(E4M3)
    bias = np.zeros(len(weight), np.float32) if bias is None else bias
    if norm is None:
        return Fp8Weights(codes, scale, bias)
    return Fp8Weights(codes, scale, norm.beta + (bias - norm.mean) * norm.factor, norm.factor)


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
    return _folded(codes, scale, bias, norm, weight_top(bits))


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
    scale = np.full(len(rounded), size, np.float32)
    return _folded(codes, scale, bias, norm, top if bits > 1 else 1)


def _folded(
    codes: npt.NDArray[np.int8], scale: Floats, bias: Floats | None, norm: Norm | None, top: int
) -> IntegerWeights:
    """Codes with a norm folded into their scale (out,) and their bias."""
    shape = (-1, *[1] * (codes.ndim - 1))
    if norm is None:
        bias = np.zeros(len(codes), np.float32) if bias is None else bias
        return IntegerWeights(codes, scale, bias, top)
    factor = norm.factor
    codes = (codes * np.where(factor < 0, -1, 1).reshape(shape)).astype(np.int8)
    folded = scale * np.abs(factor)
    codes[folded < _TINY] = 0
    scale = np.where(folded < _TINY, np.float32(1), folded).astype(np.float32)
    shift = -norm.mean if bias is None else bias - norm.mean
    return IntegerWeights(codes, scale, norm.beta + shift * factor, top)


PackedCodes = tuple[npt.NDArray[np.uint8], npt.NDArray[np.int8]]
"""Indices below 16, and a table: `table[indices]` has codes in their order."""


def packed(weights: IntegerWeights) -> list[PackedCodes]:
    """The ways to keep the stretched codes in half a byte or less; none beyond four bits.

    An index of the codes' own shape for each, from a table (16,); where two bits hold a code and
    the count is even, also an index (n,) for two of them, from a table (16, 2).

    >>> one = np.ones(1, np.float32)
    >>> weights = IntegerWeights(np.array([[-1, 0, 1, 1]], np.int8), one, one, top=1)
    >>> [(indices.tolist(), table[indices].ravel().tolist()) for indices, table in packed(weights)]
    [([[0, 1, 2, 2]], [-64, 0, 64, 64]), ([4, 10], [-64, 0, 64, 64])]
    """
    if weights.top > 7:
        return []
    digits = (weights.codes + np.int8(weights.top)).astype(np.uint8)
    values = weights.stretch * np.minimum(np.arange(16) - weights.top, weights.top)
    table = values.astype(np.int8)
    found = [(digits, table)]
    if weights.top == 1 and digits.size % 2 == 0:
        low, high = digits.reshape(-1, 2).T
        pairs = np.stack([table[np.arange(16) % 4], table[np.arange(16) // 4]], axis=1)
        found.append(((low | high << 2).astype(np.uint8), pairs))
    return found


def bias_codes(
    weights: IntegerWeights, input_scale: float
) -> tuple[npt.NDArray[np.int32], IntegerWeights]:
    """The bias on the accumulator's grid, input_scale * kernel_scale[out], and its weights.

    Where a channel's grid is so fine that its bias would not fit 32 bits, its weights are below
    anything that can show in the sum: its scale is widened until the bias fits, and its codes
    follow.
    """
    grid = np.float32(input_scale) * weights.kernel_scale
    need = np.abs(weights.bias).astype(np.float64) / _BIAS_TOP
    if np.any(narrow := need > grid):
        widest = need / input_scale * 1.001 * weights.stretch
        scale = np.where(narrow, widest, weights.scale).astype(np.float32)
        ratio = (weights.scale / scale).reshape(-1, *[1] * (weights.codes.ndim - 1))
        codes = np.rint(weights.codes * ratio).astype(np.int8)
        weights = replace(weights, codes=codes, scale=scale)
        grid = np.float32(input_scale) * weights.kernel_scale
    codes32 = np.rint(weights.bias.astype(np.float64) / grid)
    return codes32.astype(np.int32), weights
