"""Ops as stand-alone PyTorch modules, and the one interpreter of an op's layers in PyTorch.

`run_op` walks the layers; who calls it says where weights come from and how values are rounded. The
modules here own their weights; the supernet (`hwnas.supernet`) slices shared ones.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from latency_tables.ops import NORM_EPSILON, Layer, OpSpec
from profilers.graphs import OpParameters, kernel_biases
from quant import integer, layers
from quant.fakequant import cast, round_weight
from quant.precision import ONNXRUNTIME, Precision, Runtime

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
    quantise: Callable[[int, Tensor, bool], Tensor],
    casts: Mapping[int, Callable[[Tensor], Tensor]] | None = None,
) -> Tensor:
    """The output of an op.

    `weighted(index, layer, x)` runs a convolution or linear layer with its norm;
    `quantise(value index, x, relu)` rounds a value that the op quantises, max(x, 0) where `relu`
    says so. What a float op holds in less than 32 bits is cast by `casts`, by value index, and
    else here: that takes no parameters.
    Tensors are kept channels-last, in which depthwise layers train about twice as fast.
    """

    def rounded(index: int, value: Tensor, *, relu: bool = False) -> Tensor:
        if index in op.quantisers:
            return quantise(index, value, relu)
        if index not in op.casts:
            return value
        return casts[index](value) if casts and index in casts else cast(value, op.precision)

    values: list[Tensor] = []
    for index, value in enumerate(inputs):
        values.append(rounded(index, value.contiguous(memory_format=torch.channels_last)))
    for index, layer in enumerate(op.layers):
        sources = [values[i] for i in layer.inputs]
        position = len(op.inputs) + index
        if layer.function == "relu" and position in op.quantisers:
            values.append(rounded(position, sources[0], relu=True))
            continue
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
        values.append(rounded(position, value))
    return values[-1]


def weighted_layer(layer: Layer, value: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution or linear layer with the given weight and bias, its norm left out."""
    if layer.kind == "linear":
        return functional.linear(value, weight, bias)
    return functional.conv2d(
        value, weight, bias, layer.stride, layer.kernel // 2, groups=layer.groups
    )


class OpModule(nn.Module):
    """One op with weights of its own, held as its precision has them (`quant.layers`)."""

    def __init__(self, op: OpSpec, runtime: Runtime = ONNXRUNTIME) -> None:
        super().__init__()
        self.op = op
        self.runtime = runtime
        self.weighted = nn.ModuleDict()
        self.norms = nn.ModuleDict()
        self.quantisers = nn.ModuleDict()
        self.casts = nn.ModuleDict()
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
                    precision=self.layer_precision(index),
                )
                if layer.norm:
                    self.norms[str(index)] = nn.BatchNorm2d(layer.channels, eps=NORM_EPSILON)
            elif layer.kind == "linear":
                self.weighted[str(index)] = layers.linear(
                    source.elements,
                    layer.channels,
                    bias=layer.has_bias,
                    precision=self.layer_precision(index),
                )
        for index, quantiser in op.quantisers.items():
            grid = runtime.grid(quantiser.bits, signed=quantiser.signed)
            self.quantisers[str(index)] = (
                layers.PactQuantiser(grid)
                if op.precision.is_pact
                else layers.ActivationQuantiser(quantiser.bits, grid)
            )
        for index in sorted(op.scaled - op.quantisers.keys()):
            self.casts[str(index)] = layers.Fp8Cast()

    def forward(self, *inputs: Tensor) -> Tensor:
        """The op's output, (batch, channels, height, width) or logits (batch, classes)."""
        return run_op(self.op, inputs, self._weighted, self._quantise, self.fp8_casts)

    def parameters_for_graph(self) -> OpParameters:
        """The folded weights and activation ranges that the emitter writes; of the ranges of what
        is cast to fp8 those that are set.
        """
        weights: dict[int, integer.Weights] = {}
        for index, module in self.weighted_layers.items():
            layer, precision = self.op.layers[index], self.layer_precision(index)
            weight = _numpy(module.weight)
            bias = None if module.bias is None else _numpy(module.bias)
            norm = _folded_norm(self._norm(index)) if layer.norm else None
            if precision.is_pact:
                weight = _numpy(round_weight(module.weight, precision))
                weights[index] = integer.fold_dorefa(
                    weight, precision.weight_bits, bias, norm, name=layer.role or str(layer)
                )
            elif precision.is_integer:
                weights[index] = integer.fold_integer(weight, precision.weight_bits, bias, norm)
            elif precision.is_fp8:
                weights[index] = integer.fold_fp8(weight, bias, norm)
            else:
                weights[index] = integer.fold_float(weight, bias, norm)
        limits = {index: q.limit for index, q in self.activation_quantisers.items()}
        casts = {index: limit for index, c in self.fp8_casts.items() if (limit := c.limit)}
        return OpParameters(weights, limits | casts)

    def layer_precision(self, index: int) -> Precision:
        """What the weight of layer `index` is rounded to."""
        alone = self.op.is_channelwise(index)
        return self.runtime.layer_precision(self.op.precision, channelwise=alone)

    def folded(self) -> "FoldedOp":
        """The op as its file computes it, norms folded; it shares the quantisers."""
        return FoldedOp(self)

    @property
    def weighted_layers(self) -> dict[int, nn.Conv2d | nn.Linear]:
        """The convolutions and linear layers, by layer index."""
        found = {}
        for name, module in self.weighted.items():
            assert isinstance(module, nn.Conv2d | nn.Linear)
            found[int(name)] = module
        return found

    @property
    def activation_quantisers(self) -> dict[int, layers.ActivationQuantiser | layers.PactQuantiser]:
        """The quantisers, by value index."""
        found = {}
        for name, module in self.quantisers.items():
            assert isinstance(module, layers.ActivationQuantiser | layers.PactQuantiser)
            found[int(name)] = module
        return found

    @property
    def fp8_casts(self) -> dict[int, layers.Fp8Cast]:
        """What is cast to fp8, by value index."""
        return _fp8_casts(self.casts)

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

    def shift_bias(self, index: int, shift: integer.Floats) -> None:
        """Add `shift` (out,) to what layer `index` adds, in its norm or in itself; nothing to a
        layer that adds nothing.
        """
        bias = (
            self._norm(index) if self.op.layers[index].norm else self.weighted_layers[index]
        ).bias
        if bias is None:
            return
        with torch.no_grad():
            bias.add_(torch.from_numpy(shift).to(bias.device))

    def _weighted(self, index: int, layer: Layer, value: Tensor) -> Tensor:
        result: Tensor = self.weighted[str(index)](value)
        return self._norm(index)(result) if layer.norm else result

    def _norm(self, index: int) -> nn.BatchNorm2d:
        module = self.norms[str(index)]
        assert isinstance(module, nn.BatchNorm2d)
        return module

    def _quantise(self, index: int, value: Tensor, relu: bool) -> Tensor:
        result: Tensor = self.quantisers[str(index)](value, relu=relu)
        return result


class FoldedOp(nn.Module):
    """An op with the weights and biases that `parameters_for_graph` gives, and no norm.

    What an integer kernel computes, but for the bias: that is not on the accumulator's grid.
    """

    def __init__(self, module: OpModule) -> None:
        super().__init__()
        self.op = module.op
        self.quantisers = module.quantisers
        self.casts = module.casts
        self.parameters_in_graph = module.parameters_for_graph()
        for index, weights in self.parameters_in_graph.weights.items():
            if isinstance(weights, integer.IntegerWeights):
                scale = weights.scale.reshape(-1, *[1] * (weights.codes.ndim - 1))
                weight = torch.from_numpy(weights.codes * scale)
            elif isinstance(weights, integer.Fp8Weights):
                weight = torch.from_numpy(weights.values)
            else:
                weight = torch.from_numpy(weights.weight)
                weight = cast(weight, self.op.precision) if self.op.precision.is_cast else weight
            self.register_buffer(f"weight{index}", weight)
            self.register_buffer(f"bias{index}", torch.from_numpy(weights.bias))

    def forward(self, *inputs: Tensor) -> Tensor:
        """The op's output, as `OpModule` has it in inference."""
        return run_op(self.op, inputs, self._weighted, self._quantise, _fp8_casts(self.casts))

    def _weighted(self, index: int, layer: Layer, value: Tensor) -> Tensor:
        weight, bias = self.get_buffer(f"weight{index}"), self.get_buffer(f"bias{index}")
        weights = self.parameters_in_graph.weights[index]
        if not isinstance(weights, integer.Fp8Weights) or weights.factor is None:
            return weighted_layer(layer, value, weight, bias)
        products = weighted_layer(layer, value, weight, None)
        factor = torch.from_numpy(weights.factor).to(value.device)
        return products * factor.view(-1, 1, 1) + bias.view(-1, 1, 1)

    def _quantise(self, index: int, value: Tensor, relu: bool) -> Tensor:
        result: Tensor = self.quantisers[str(index)](value, relu=relu)
        return result


class Network(nn.Module):
    """A chain of ops with weights of its own."""

    def __init__(self, ops: Sequence[OpSpec], runtime: Runtime = ONNXRUNTIME) -> None:
        super().__init__()
        self.ops = tuple(ops)
        self.runtime = runtime
        self.chain = nn.Sequential(*(OpModule(op, runtime) for op in ops))

    @property
    def op_modules(self) -> list[OpModule]:
        """The ops' modules in order."""
        return [module for module in self.chain if isinstance(module, OpModule)]

    def forward(self, images: Tensor) -> Tensor:
        """The logits (batch, classes) of images (batch, channels, height, width)."""
        logits: Tensor = self.chain(images)
        return logits

    def folded(self) -> nn.Sequential:
        """The network as its file computes it, norms folded: the reference for integer kernels."""
        return nn.Sequential(*(module.folded() for module in self.op_modules)).eval()

    def parameters_for_graph(self) -> list[OpParameters]:
        """What `profilers.graphs.emit` needs, op by op."""
        return [module.parameters_for_graph() for module in self.op_modules]

    def round_biases(self) -> None:
        """Move the bias of each integer layer onto the grid of its accumulator, as the network's
        file has it: what then still differs is the rounding of codes that lie on a tie.

        Raises InvalidInput where the runtime has no kernel for an op.
        """
        numbers = self.parameters_for_graph()
        rounded = kernel_biases(self.ops, numbers, self.runtime)
        for module, own, biases in zip(self.op_modules, numbers, rounded, strict=True):
            for index, bias in biases.items():
                module.shift_bias(index, bias - own.weights[index].bias)


def _fp8_casts(casts: nn.ModuleDict) -> dict[int, layers.Fp8Cast]:
    found = {}
    for name, module in casts.items():
        assert isinstance(module, layers.Fp8Cast)
        found[int(name)] = module
    return found


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
