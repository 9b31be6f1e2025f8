"""Ops as stand-alone PyTorch modules, and the one interpreter of an op's layers in PyTorch.

`run_op` walks the layers; who calls it says where weights come from and how values are rounded. The
modules here own their weights; the supernet (`hwnas.supernet`) slices shared ones.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_tables.ops import NORM_EPSILON, Layer, OpSpec
from profilers.graphs import OpParameters
from quant import integer, layers
from quant.precision import ONNXRUNTIME, Runtime

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "sigmoid": torch.sigmoid,
    "hard_sigmoid": functional.hardsigmoid,
    "hard_swish": functional.hardswish,
}


def run_op(
    op: OpSpec,
    inputs: Sequence[Tensor],
    weighted: Callable[[int, Layer, Tensor], Tensor],
    quantise: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """The output of an op.

    `weighted(index, layer, x)` runs a convolution or linear layer with its norm;
    `quantise(value index, x)` rounds a value that the op quantises. Tensors are kept channels-last,
    in which depthwise layers train about twice as fast.
    """
    values: list[Tensor] = []
    for index, value in enumerate(inputs):
        value = value.contiguous(memory_format=torch.channels_last)
        values.append(quantise(index, value) if index in op.quantisers else value)
    for index, layer in enumerate(op.layers):
        sources = [values[i] for i in layer.inputs]
        match layer.kind:
            case "conv":
                value = weighted(index, layer, sources[0])
            case "linear":
                value = weighted(index, layer, sources[0].flatten(1))
            case "activation":
                value = ACTIVATIONS[layer.function](sources[0])
            case "pool":
                value = sources[0].mean((2, 3), keepdim=True)
            case "add":
                value = sources[0] + sources[1]
            case "mul":
                value = sources[0] * sources[1]
            case _:
                raise ValueError(f"{layer} has no PyTorch form")
        position = len(op.inputs) + index
        values.append(quantise(position, value) if position in op.quantisers else value)
    return values[-1]


class OpModule(nn.Module):
    """One op with weights of its own: float layers, or Brevitas layers where the op is integer."""

    def __init__(self, op: OpSpec, runtime: Runtime = ONNXRUNTIME) -> None:
        super().__init__()
        self.op = op
        self.weighted = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self.quantisers = nn.ModuleDict()
        for index, layer in enumerate(op.layers):
            source = op.layer_inputs(index)[0]
            if layer.kind == "conv":
                self.weighted[str(index)] = layers.conv(
                    source.channels,
                    layer.channels,
                    kernel=layer.kernel,
                    stride=layer.stride,
                    groups=layer.groups,
                    bias=not layer.norm,
                    precision=op.precision,
                )
                if layer.norm:
                    self.norms[str(index)] = nn.BatchNorm2d(layer.channels, eps=NORM_EPSILON)
            elif layer.kind == "linear":
                self.weighted[str(index)] = layers.linear(
                    source.elements, layer.channels, precision=op.precision
                )
        for index, quantiser in op.quantisers.items():
            grid = runtime.grid(quantiser.bits, signed=quantiser.signed)
            self.quantisers[str(index)] = layers.ActivationQuantiser(quantiser.bits, grid)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The op's output, (batch, channels, height, width) or logits (batch, classes)."""
        return run_op(self.op, inputs, self._weighted, self._quantise)

    def parameters_for_graph(self) -> OpParameters:
        """The folded weights and activation ranges that the emitter writes."""
        weights: dict[int, integer.Weights] = {}
        for name, module in self.weighted.items():
            weight, bias = _numpy(module.weight), None
            if module.bias is not None:
                bias = _numpy(module.bias)
            norm = _norm(self.norms[name]) if name in self.norms else None
            if self.op.precision.is_integer:
                bits = self.op.precision.weight_bits
                weights[int(name)] = integer.fold_integer(weight, bits, bias, norm)
            else:
                weights[int(name)] = integer.fold_float(weight, bias, norm)
        limits = {int(name): quantiser.limit for name, quantiser in self.quantisers.items()}
        return OpParameters(weights, limits)

    def _weighted(self, index: int, layer: Layer, value: Tensor) -> Tensor:
        name = str(index)
        result: Tensor = self.weighted[name](value)
        return self.norms[name](result) if layer.norm else result

    def _quantise(self, index: int, value: Tensor) -> Tensor:
        result: Tensor = self.quantisers[str(index)](value)
        return result


class Network(nn.Module):
    """A chain of ops with weights of its own."""

    def __init__(self, ops: Sequence[OpSpec], runtime: Runtime = ONNXRUNTIME) -> None:
        super().__init__()
        self.ops = tuple(ops)
        self.modules_in_order = nn.ModuleList(OpModule(op, runtime) for op in ops)

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes) of images (batch, channels, height, width)."""
        value = images
        for module in self.modules_in_order:
            value = module(value)
        return value

    def parameters_for_graph(self) -> list[OpParameters]:
        """What `profilers.graphs.emit` needs, op by op."""
        return [module.parameters_for_graph() for module in self.modules_in_order]


def _numpy(tensor: Tensor) -> integer.Floats:
    array: integer.Floats = np.array(tensor.detach().cpu(), np.float32)
    return array


def _norm(module: nn.Module) -> integer.Norm:
    parts = (module.weight, module.bias, module.running_mean, module.running_var)
    return integer.Norm(*map(_numpy, parts), epsilon=NORM_EPSILON)
