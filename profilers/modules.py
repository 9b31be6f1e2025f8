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
            case "max_pool":
                padding = layer.kernel // 2
                value = functional.max_pool2d(sources[0], layer.kernel, layer.stride, padding)
            case "half":
                value = sources[0][:, layer.start :: 2]
            case "concat":
                value = torch.cat(sources, 1)
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
                    bias=layer.has_bias,
                    precision=op.precision,
                )
                if layer.norm:
                    self.norms[str(index)] = nn.BatchNorm2d(layer.channels, eps=NORM_EPSILON)
            elif layer.kind == "linear":
                self.weighted[str(index)] = layers.linear(
                    source.elements, layer.channels, bias=layer.has_bias, precision=op.precision
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
        for index, module in self.weighted_layers.items():
            weight = _numpy(module.weight)
            bias = None if module.bias is None else _numpy(module.bias)
            norm = _folded_norm(self._norm(index)) if self.op.layers[index].norm else None
            if self.op.precision.is_integer:
                bits = self.op.precision.weight_bits
                weights[index] = integer.fold_integer(weight, bits, bias, norm)
            else:
                weights[index] = integer.fold_float(weight, bias, norm)
        limits = {index: q.limit for index, q in self.activation_quantisers.items()}
        return OpParameters(weights, limits)

    @property
    def weighted_layers(self) -> dict[int, nn.Conv2d | nn.Linear]:
        """The convolutions and linear layers, by layer index."""
        found = {}
        for name, module in self.weighted.items():
            assert isinstance(module, nn.Conv2d | nn.Linear)
            found[int(name)] = module
        return found

    @property
    def activation_quantisers(self) -> dict[int, layers.ActivationQuantiser]:
        """The quantisers, by value index."""
        found = {}
        for name, module in self.quantisers.items():
            assert isinstance(module, layers.ActivationQuantiser)
            found[int(name)] = module
        return found

    def set_norm(
        self, index: int, gamma: Tensor, beta: Tensor, mean: Tensor, variance: Tensor
    ) -> None:
        """Set all that the batch norm of layer `index` holds."""
        norm = self._norm(index)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        with torch.no_grad():
            norm.weight.copy_(gamma)
            norm.bias.copy_(beta)
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(variance)

    def _weighted(self, index: int, layer: Layer, value: Tensor) -> Tensor:
        result: Tensor = self.weighted[str(index)](value)
        return self._norm(index)(result) if layer.norm else result

    def _norm(self, index: int) -> nn.BatchNorm2d:
        module = self.norms[str(index)]
        assert isinstance(module, nn.BatchNorm2d)
        return module

    def _quantise(self, index: int, value: Tensor) -> Tensor:
        result: Tensor = self.quantisers[str(index)](value)
        return result


class Network(nn.Module):
    """A chain of ops with weights of its own."""

    def __init__(self, ops: Sequence[OpSpec], runtime: Runtime = ONNXRUNTIME) -> None:
        super().__init__()
        self.ops = tuple(ops)
        self.chain = nn.Sequential(*(OpModule(op, runtime) for op in ops))

    @property
    def op_modules(self) -> list[OpModule]:
        """The ops' modules in order."""
        return [module for module in self.chain if isinstance(module, OpModule)]

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes) of images (batch, channels, height, width)."""
        logits: Tensor = self.chain(images)
        return logits

    def parameters_for_graph(self) -> list[OpParameters]:
        """What `profilers.graphs.emit` needs, op by op."""
        return [module.parameters_for_graph() for module in self.op_modules]


def _numpy(tensor: Tensor) -> integer.Floats:
    array: integer.Floats = np.array(tensor.detach().cpu(), np.float32)
    return array


def _folded_norm(norm: nn.BatchNorm2d) -> integer.Norm:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return integer.Norm(
        _numpy(norm.weight),
        _numpy(norm.bias),
        _numpy(norm.running_mean),
        _numpy(norm.running_var),
        NORM_EPSILON,
    )
