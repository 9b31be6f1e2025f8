"""Stand-alone quantised layers: Brevitas' for absmax weights and LSQ's ranges, else our own.

The only file that names Brevitas classes.
"""

import math
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from quant.fakequant import cast, largest_magnitude, round_weight
from quant.precision import Grid, Precision
from quant.ranges import LearnedRange

os.environ.setdefault(
    "BREVITAS_JIT", "0"
)  # read at import; compiled scripts are not faster on CPUs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from brevitas.export import export_onnx_qcdq
    from brevitas.nn import QuantConv2d, QuantIdentity, QuantLinear
    from brevitas.quant import (
        Int8ActPerTensorFloatMinMaxInit,
        Int8WeightPerChannelFloat,
        Uint8ActPerTensorFloatMaxInit,
    )


def conv(
    channels_in: int,
    channels: int,
    *,
    kernel: int,
    stride: int,
    groups: int,
    bias: bool,
    precision: Precision,
) -> nn.Conv2d:
    """A convolution padded by kernel // 2, whose weight is held at the precision."""
    shape = {"stride": stride, "padding": kernel // 2, "groups": groups, "bias": bias}
    if not (precision.is_integer or precision.is_cast):
        return nn.Conv2d(channels_in, channels, kernel, **shape)  # type: ignore[arg-type]
    if precision.is_pact or precision.is_cast:
        return RoundedConv2d(channels_in, channels, kernel, precision=precision, **shape)
    layer: nn.Conv2d = QuantConv2d(
        channels_in,
        channels,
        kernel,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=precision.weight_bits,
        **shape,
    )
    return layer


def linear(
    features_in: int, features: int, *, bias: bool = True, precision: Precision
) -> nn.Linear:
    """A linear layer, whose weight is held at the precision."""
    if not (precision.is_integer or precision.is_cast):
        return nn.Linear(features_in, features, bias=bias)
    if precision.is_pact or precision.is_cast:
        return RoundedLinear(features_in, features, bias=bias, precision=precision)
    layer: nn.Linear = QuantLinear(
        features_in,
        features,
        bias=bias,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=precision.weight_bits,
    )
    return layer


class RoundedConv2d(nn.Conv2d):
    """A convolution whose weight is rounded at each use, as `precision` holds it."""

    def __init__(self, *shape: int, precision: Precision, **options: Any) -> None:
        super().__init__(*shape, **options)  # type: ignore[arg-type]
        self.precision = precision

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The convolution."""
        weight = round_weight(self.weight, self.precision)
        result: torch.Tensor = self._conv_forward(value, weight, self.bias)
        return result


class RoundedLinear(nn.Linear):
    """A linear layer whose weight is rounded at each use, as `precision` holds it."""

    def __init__(
        self, features_in: int, features: int, *, bias: bool, precision: Precision
    ) -> None:
        super().__init__(features_in, features, bias=bias)
        self.precision = precision

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The product."""
        return functional.linear(value, round_weight(self.weight, self.precision), self.bias)


class PactQuantiser(nn.Module):
    """Rounds activations to a grid whose range is PACT's clipping value; any grid."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        self.range = LearnedRange(grid, pact=True, start=1.0)

    @property
    def limit(self) -> float:
        """The end of the range: the value of code `grid.top`."""
        return float(self.range.limit.detach().abs())

    @limit.setter
    def limit(self, limit: float) -> None:
        with torch.no_grad():
            self.range.limit.fill_(limit)

    def forward(self, value: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
        """The values, or max(value, 0), rounded."""
        result: torch.Tensor = self.range(value, relu=relu)
        return result


class ActivationQuantiser(nn.Module):
    """Rounds activations to a grid whose range is learned.

    Brevitas has grids of 2^n codes, from zero or in two's complement. That of a runtime whose codes
    are signed, and which stores what is never negative in their upper half, is its unsigned grid of
    a bit less.
    """

    def __init__(self, bits: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        if grid.low == 0 and grid.top == grid.high in (2**bits - 1, 2 ** (bits - 1) - 1):
            self.quantiser = QuantIdentity(
                act_quant=Uint8ActPerTensorFloatMaxInit,
                max_val=1.0,
                bit_width=grid.high.bit_length(),
            )
        elif grid == Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2 ** (bits - 1)):
            self.quantiser = QuantIdentity(
                act_quant=Int8ActPerTensorFloatMinMaxInit, min_val=-1.0, max_val=1.0, bit_width=bits
            )
        else:
            raise ValueError(f"no Brevitas quantiser has the grid {grid} at {bits} bits")

    @property
    def _range(self) -> nn.Parameter:
        proxy = self.quantiser.act_quant.fused_activation_quant_proxy
        value: nn.Parameter = proxy.tensor_quant.scaling_impl.value
        return value

    @property
    def limit(self) -> float:
        """The end of the range: the value of code `grid.top`."""
        return float(self._range.detach().abs())

    @limit.setter
    def limit(self, limit: float) -> None:
        with torch.no_grad():
            self._range.fill_(limit)

    def forward(self, value: torch.Tensor, *, relu: bool = False) -> torch.Tensor:
        """The values, or max(value, 0), rounded; in fp32, whatever type they come in."""
        floats = value.float()
        result: torch.Tensor = self.quantiser(functional.relu(floats) if relu else floats)
        return result.to(value.dtype)


class Fp8Cast(nn.Module):
    """Rounds activations to fp8 with one scale for a tensor (`quant.fakequant.cast`).

    An engine needs a scale before it sees a value, so the end of the range is set once, from what
    `see` is shown; values beyond it saturate. Until then, and in training, it is the largest of the
    values at hand.
    """

    largest: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("largest", torch.tensor(math.nan))

    @property
    def limit(self) -> float | None:
        """The end of the range, None where it is not set."""
        limit = float(self.largest)
        return None if math.isnan(limit) else limit

    @limit.setter
    def limit(self, limit: float | None) -> None:
        self.largest.fill_(math.nan if limit is None else limit)

    def see(self, value: torch.Tensor) -> None:
        """Widen the range to hold the values; no value is read back from their device."""
        self.largest.copy_(torch.fmax(self.largest, largest_magnitude(value)))

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The values, rounded."""
        return cast(value, Precision("fp8"), None if self.training else self.largest)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """States of before there were ranges have none."""
        state_dict.setdefault(f"{prefix}largest", torch.tensor(math.nan))
        super()._load_from_state_dict(state_dict, prefix, *others)


def write_qcdq(module: nn.Module, images: torch.Tensor, path: Path) -> None:
    """Write a module of these layers as Brevitas itself exports it: quantise, clip and dequantise
    nodes, norms unfolded, biases in float.

    No file of hwnas: another implementation to hold them against. It needs onnxoptimizer. `images`
    is an example of the input, (batch, channels, height, width); the batch is symbolic.
    """
    names = {"input_names": ["input"], "output_names": ["output"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        export_onnx_qcdq(
            module,
            args=images,
            export_path=str(path),
            dynamo=False,
            opset_version=17,
            keep_initializers_as_inputs=False,
            dynamic_axes={name: {0: "batch"} for name in ("input", "output")},
            **names,
        )
