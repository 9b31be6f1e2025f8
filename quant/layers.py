"""Stand-alone quantised layers. The only file that names Brevitas classes."""

import os
import warnings

import torch
from torch import nn

from quant.precision import Grid, Precision

os.environ.setdefault(
    "BREVITAS_JIT", "0"
)  # read at import; compiled scripts are not faster on CPUs

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
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
    """A convolution padded by kernel // 2; integer precisions quantise its weight per channel."""
    shape = {"stride": stride, "padding": kernel // 2, "groups": groups, "bias": bias}
    if not precision.is_integer:
        return nn.Conv2d(channels_in, channels, kernel, **shape)  # type: ignore[arg-type]
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
    """A linear layer; integer precisions quantise its weight per output."""
    if not precision.is_integer:
        return nn.Linear(features_in, features, bias=bias)
    layer: nn.Linear = QuantLinear(
        features_in,
        features,
        bias=bias,
        weight_quant=Int8WeightPerChannelFloat,
        weight_bit_width=precision.weight_bits,
    )
    return layer


class ActivationQuantiser(nn.Module):
    """Rounds activations to a grid whose range is learned.

    The unsigned grid of ONNX Runtime has 2^bits - 1 steps and the signed one 2^bits, as Brevitas
    has them; other grids are not supported here.
    """

    def __init__(self, bits: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        if grid.low == 0 and grid.high == 2**bits - 1:
            self.quantiser = QuantIdentity(
                act_quant=Uint8ActPerTensorFloatMaxInit, max_val=1.0, bit_width=bits
            )
        elif grid.low == -(2 ** (bits - 1)):
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

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The values, rounded."""
        result: torch.Tensor = self.quantiser(value)
        return result
