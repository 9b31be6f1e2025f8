"""What one table row measures: layers, ops, and everything that is counted from them.

An `OpSpec` is the one definition of an op. Its shapes, its quantisers, its MACs, its table key, its
ONNX graph (`profilers.graphs`), its stand-alone PyTorch module (`profilers.modules`) and its
shared-weight forward (`hwnas.supernet`) are all read from it.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from quant.precision import Format, Precision

RANGES = {"relu": (0, None), "relu6": (0, 6), "sigmoid": (0, 1), "hard_sigmoid": (0, 1)}
"""Activations whose output cannot be negative, with the ends of their range."""

ACTIVATIONS = (*RANGES, "hard_swish")
FUSED_ACTIVATIONS = ("relu",)
"""Activations that a quantiser swallows: the value before them needs no quantiser of its own."""

MOVES = ("half", "max_pool")
"""Layers that hand on some of their input's values as they are: codes stay on their grid."""

_ARITY = {"add": 2, "mul": 2, "concat": 2}
_PARITY = {"even": 0, "odd": 1}

NORM_EPSILON = 1e-5
"""The epsilon of every batch norm, in training and in the folded graph alike."""


@dataclass(frozen=True)
class Tensor:
    """One image's tensor between layers: channels x height x width, and its format."""

    channels: int
    height: int
    width: int
    format: Format = Format()

    @property
    def elements(self) -> int:
        """Values in the tensor, for one image."""
        return self.channels * self.height * self.width

    @property
    def size_bytes(self) -> float:
        """Bytes of the tensor, for one image."""
        return self.elements * self.format.bits / 8

    def __str__(self) -> str:
        return f"{self.format}:{self.channels}x{self.height}x{self.width}"


@dataclass(frozen=True)
class Layer:
    """A primitive of an op.

    `inputs` are value indices: the op's inputs come first, then the outputs of its layers in order.
    `role` names the layer inside its block (expand, depthwise, ...): shared weights are stored
    under it; it is not part of the table key.

    | kind | uses |
    |---|---|
    | conv | channels, kernel, stride, groups, norm (batch norm, else a bias), bias |
    | linear | channels, bias; the input is flattened |
    | activation | function, one of `ACTIVATIONS` |
    | pool | the global average, to 1 x 1 |
    | max_pool | kernel, stride; padded by kernel // 2 with what is below every value |
    | half | function: the even or the odd channels (Ma et al. 2018, figure 3: shuffle and split) |
    | add, mul | two inputs; mul broadcasts a 1 x 1 gate |
    | concat | two inputs, the channels of the first before those of the second |
    """

    kind: str
    inputs: tuple[int, ...]
    role: str = ""
    channels: int = 0
    kernel: int = 1
    stride: int = 1
    groups: int = 1
    norm: bool = False
    function: str = ""
    bias: bool = True

    @property
    def start(self) -> int:
        """The first channel that a half takes."""
        return _PARITY[self.function]

    @property
    def has_weights(self) -> bool:
        """Whether the layer holds a weight."""
        return self.kind in ("conv", "linear")

    @property
    def has_bias(self) -> bool:
        """Whether the layer adds a bias that is not its norm's."""
        return self.has_weights and self.bias and not self.norm

    def weight_shape(self, channels_in: int) -> tuple[int, ...]:
        """Shape of the weight: (out, in / groups, kernel, kernel), or (out, in) for linear."""
        if self.kind == "linear":
            return (self.channels, channels_in)
        return (self.channels, channels_in // self.groups, self.kernel, self.kernel)

    def __str__(self) -> str:
        inputs = ",".join(map(str, self.inputs))
        bare = "" if self.bias else " no bias"
        match self.kind:
            case "conv":
                shape = f" c{self.channels} k{self.kernel} s{self.stride} g{self.groups}"
                return f"conv({inputs}){shape}{' n' if self.norm else ''}{bare}"
            case "linear":
                return f"linear({inputs}) c{self.channels}{bare}"
            case "activation":
                return f"{self.function}({inputs})"
            case "half":
                return f"{self.function} half({inputs})"
            case "max_pool":
                return f"max_pool({inputs}) k{self.kernel} s{self.stride}"
            case _:
                return f"{self.kind}({inputs})"


@dataclass(frozen=True)
class Quantiser:
    """Where an op turns a float value into codes: how many bits, and whether codes have a sign."""

    bits: int
    signed: bool


@dataclass(frozen=True)
class OpSpec:
    """An op: a small DAG of layers in topological order, at one precision.

    The last layer is the output. `logits` marks the end of a network, whose output stays float.

    >>> stem = OpSpec((Tensor(3, 32, 32),),
    ...               (Layer("conv", (0,), "conv", 16, kernel=3, stride=2, norm=True),
    ...                Layer("activation", (1,), function="relu")), Precision("fp32"))
    >>> stem.key
    'fp32 [fp32:3x32x32] conv(0) c16 k3 s2 g1 n; relu(1)'
    >>> str(stem.output), stem.macs, stem.parameters
    ('fp32+:16x16x16', 110592, 464)

    Raises ValueError where an input is not defined before its layer, or a shape does not fit.
    """

    inputs: tuple[Tensor, ...]
    layers: tuple[Layer, ...]
    precision: Precision
    logits: bool = False

    def __post_init__(self) -> None:
        if not self.inputs or not self.layers:
            raise ValueError("an op needs at least one input and one layer")
        for position, layer in enumerate(self.layers):
            if len(layer.inputs) != _ARITY.get(layer.kind, 1):
                raise ValueError(f"layer {position} ({layer}) reads {len(layer.inputs)} values")
            if any(not 0 <= i < len(self.inputs) + position for i in layer.inputs):
                raise ValueError(f"layer {position} ({layer}) uses a value that is not there yet")
        _ = self.values

    @cached_property
    def key(self) -> str:
        """The canonical text: precision, inputs, layers; never names or positions."""
        inputs = " ".join(map(str, self.inputs))
        tail = " -> logits" if self.logits else ""
        return f"{self.precision} [{inputs}] {'; '.join(map(str, self.layers))}{tail}"

    @cached_property
    def values(self) -> tuple[Tensor, ...]:
        """Every value: the op's inputs, then each layer's output with its shape and format."""
        values = list(self.inputs)
        for layer in self.layers:
            values.append(_output(layer, [values[i] for i in layer.inputs]))
        quantisers = _quantisers(self, values)
        formats = [value.format for value in values]
        for index, layer in enumerate(self.layers, start=len(self.inputs)):
            signed = formats[index].signed
            codes = layer.inputs[0] if layer.kind in MOVES else index
            if not self.precision.is_integer:
                formats[index] = Format(self.precision.name, signed)
            elif codes in quantisers:
                formats[index] = Format(f"a{quantisers[codes].bits}", signed)
            else:
                formats[index] = replace(formats[codes], signed=signed)
        return tuple(replace(v, format=f) for v, f in zip(values, formats, strict=True))

    @cached_property
    def quantisers(self) -> Mapping[int, Quantiser]:
        """The values that this op quantises, by value index.

        A float op quantises nothing. An integer op quantises each float input, and every layer's
        output but the one before a fused activation, those of `MOVES`, and the logits.
        """
        return _quantisers(self, self.values)

    @cached_property
    def rounded_norms(self) -> Mapping[int, tuple[int, bool]]:
        """The layers whose norm a quantiser follows, at once or after a ReLU that alone reads it:
        the index of the value that it rounds, and whether the ReLU is there; by layer index.
        """
        return _rounded_norms(self)

    @cached_property
    def casts(self) -> frozenset[int]:
        """The values that a float op of less than 32 bits rounds to its type, by value index: each
        input of another type, and of the layers' outputs those that an integer op would quantise.
        """
        if not self.precision.is_cast:
            return frozenset()
        first, integer = len(self.inputs), replace(self, precision=Precision("w8a8"))
        entering = (
            index
            for index, tensor in enumerate(self.inputs)
            if tensor.format.type != self.precision.name
        )
        return frozenset(entering) | {index for index in integer.quantisers if index >= first}

    @cached_property
    def scaled(self) -> frozenset[int]:
        """The values that this op turns into codes with a scale, by value index: those that it
        quantises, or casts to fp8.
        """
        casts = self.casts if self.precision.is_fp8 else frozenset()
        return frozenset(self.quantisers) | casts

    @cached_property
    def output(self) -> Tensor:
        """What the op hands on."""
        return self.values[-1]

    def adds(self, index: int) -> bool:
        """Whether the op adds value `index` to another: a residual block its input."""
        return any(layer.kind == "add" and index in layer.inputs for layer in self.layers)

    @cached_property
    def boundary(self) -> str:
        """What entering the op costs hangs on this alone: each input with its format and whether
        it is added to what the op makes of it, and the precision of its kernels.

        >>> op = OpBuilder(Precision("w8a8"), Tensor(16, 8, 8))
        >>> y = op.conv(0, 16, kernel=3, role="conv")
        >>> op.add(y, 0) and op.build().boundary
        'fp32:16x8x8 added > w8a8'
        """
        inputs = [f"{t} added" if self.adds(i) else str(t) for i, t in enumerate(self.inputs)]
        return f"{', '.join(inputs)} > {self.precision.executed}"

    @cached_property
    def executed(self) -> "OpSpec":
        """The op that runs in its place, at the precision of its kernels: what is measured of it.

        >>> op = OpBuilder(Precision("w4a8"), Tensor(16, 8, 8))
        >>> _ = op.conv(0, 16, role="conv")
        >>> op.build().executed.key
        'w8a8 [fp32:16x8x8] conv(0) c16 k1 s1 g1 n'
        """
        precision = self.precision.executed
        return self if precision == self.precision else replace(self, precision=precision)

    def layer_inputs(self, index: int) -> list[Tensor]:
        """The inputs of layer `index`."""
        return [self.values[i] for i in self.layers[index].inputs]

    @cached_property
    def weight_shapes(self) -> Mapping[int, tuple[int, ...]]:
        """The shape of each weight, by layer index; a linear layer reads its input flattened."""
        shapes = {}
        for index, layer in enumerate(self.layers):
            if layer.has_weights:
                source = self.layer_inputs(index)[0]
                width = source.elements if layer.kind == "linear" else source.channels
                shapes[index] = layer.weight_shape(width)
        return shapes

    def is_channelwise(self, index: int) -> bool:
        """Whether layer `index` convolves every channel alone."""
        layer = self.layers[index]
        alone = layer.kind == "conv" and 1 < layer.groups == layer.channels
        return alone and self.layer_inputs(index)[0].channels == layer.groups

    # ---- counts

    @cached_property
    def layer_macs(self) -> tuple[int, ...]:
        """Multiply-accumulates of each layer for one image: convolutions and linear layers only."""
        counts = [0] * len(self.layers)
        for index, shape in self.weight_shapes.items():
            output = self.values[len(self.inputs) + index]
            counts[index] = math.prod(shape) * output.height * output.width
        return tuple(counts)

    @cached_property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return sum(self.layer_macs)

    @cached_property
    def parameters(self) -> int:
        """Trainable values: weights, biases, and the two of every batch-norm channel."""
        count = 0
        for index, shape in self.weight_shapes.items():
            layer = self.layers[index]
            count += math.prod(shape) + layer.channels * (2 if layer.norm else int(layer.has_bias))
        return count

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of the shipped weights: codes, scales and biases, norm folded; fp8 has one scale
        for a tensor, and its norm's factors for its channels.
        """
        count = 0
        for index, shape in self.weight_shapes.items():
            weights, channels = math.prod(shape), shape[0]
            count += -(-weights * self.precision.weight_bits // 8) + 4 * channels
            if self.precision.is_integer:  # weight scale and bias scale
                count += 8 * channels
            elif self.precision.is_fp8:
                count += 4 + (4 * channels if self.layers[index].norm else 0)
        return count

    @cached_property
    def bitops(self) -> int:
        """MACs x weight bits x bits that the layer's input really has; fp32 counts as 32 x 32."""
        return sum(
            macs * self.precision.weight_bits * self._seen_bits(layer.inputs[0])
            for layer, macs in zip(self.layers, self.layer_macs, strict=True)
            if macs
        )

    @cached_property
    def peak_activation_bytes(self) -> float:
        """The most bytes of activations alive at once inside the op, for one image.

        While a layer runs, its output and every value that it or a later layer reads are alive. A
        value that only a fused activation reads is written as that activation's output.
        """
        peak, first, swallowed = 0.0, len(self.inputs), _swallowed(self)
        written_as = {
            layer.inputs[0]: first + position
            for position, layer in enumerate(self.layers)
            if layer.inputs[0] in swallowed
        }
        for position in range(len(self.layers)):
            alive = {first + position}
            alive.update(i for layer in self.layers[position:] for i in layer.inputs)
            alive = {written_as.get(i, i) for i in alive if i <= first + position}
            peak = max(peak, sum(self.values[i].size_bytes for i in alive))
        return peak

    def _seen_bits(self, index: int) -> int:
        """Bits of value `index` as a convolution of this op reads it."""
        if index in self.quantisers:
            return self.quantisers[index].bits
        if not self.precision.is_integer:
            return self.precision.activation_bits
        return self.values[index].format.bits

    # ---- as data

    def to_json(self) -> str:
        """The op as JSON text."""
        return json.dumps(
            {
                "precision": self.precision.name,
                "inputs": [str(tensor) for tensor in self.inputs],
                "layers": [_without_defaults(layer) for layer in self.layers],
                "logits": self.logits,
            }
        )

    @classmethod
    def from_json(cls, text: str) -> "OpSpec":
        """The op that `to_json` wrote."""
        data = json.loads(text)
        inputs = []
        for tensor in data["inputs"]:
            kind, _, shape = tensor.partition(":")
            channels, height, width = map(int, shape.split("x"))
            inputs.append(Tensor(channels, height, width, Format.parse(kind)))
        layers = [Layer(**{**item, "inputs": tuple(item["inputs"])}) for item in data["layers"]]
        return cls(tuple(inputs), tuple(layers), Precision(data["precision"]), data["logits"])


class OpBuilder:
    """Writes an OpSpec layer by layer; every method returns the index of the new value.

    >>> op = OpBuilder(Precision("w8a8"), Tensor(16, 8, 8))
    >>> y = op.conv(0, 16, kernel=3, role="conv")
    >>> op.add(op.relu(y), 0) and str(op.build().output)
    'a8:16x8x8'
    """

    def __init__(self, precision: Precision, *inputs: Tensor) -> None:
        self.precision = precision
        self.inputs = inputs
        self.layers: list[Layer] = []

    def conv(
        self,
        value: int,
        channels: int,
        *,
        role: str,
        kernel: int = 1,
        stride: int = 1,
        groups: int = 1,
        norm: bool = True,
    ) -> int:
        """A convolution, padded by kernel // 2, with batch norm or else a bias."""
        return self._append(Layer("conv", (value,), role, channels, kernel, stride, groups, norm))

    def linear(self, value: int, channels: int, *, role: str, bias: bool = True) -> int:
        """A fully connected layer, with a bias or without."""
        return self._append(Layer("linear", (value,), role, channels, bias=bias))

    def activation(self, value: int, function: str) -> int:
        """An activation, one of `ACTIVATIONS`."""
        return self._append(Layer("activation", (value,), function=function))

    def relu(self, value: int) -> int:
        """max(x, 0)."""
        return self.activation(value, "relu")

    def pool(self, value: int) -> int:
        """The global average pool."""
        return self._append(Layer("pool", (value,)))

    def max_pool(self, value: int, *, kernel: int, stride: int) -> int:
        """The largest value of each window, padded by kernel // 2."""
        return self._append(Layer("max_pool", (value,), kernel=kernel, stride=stride))

    def half(self, value: int, parity: str) -> int:
        """Every other channel: those of `even` or of `odd` numbers, counted from 0."""
        return self._append(Layer("half", (value,), function=parity))

    def concat(self, left: int, right: int) -> int:
        """The channels of two values, those of `left` first."""
        return self._append(Layer("concat", (left, right)))

    def add(self, left: int, right: int) -> int:
        """The sum of two values."""
        return self._append(Layer("add", (left, right)))

    def mul(self, value: int, gate: int) -> int:
        """The product of a value and a 1 x 1 gate."""
        return self._append(Layer("mul", (value, gate)))

    def channels(self, value: int) -> int:
        """Channels of a value that is already there."""
        return self.build().values[value].channels if self.layers else self.inputs[value].channels

    def build(self, *, logits: bool = False) -> OpSpec:
        """The op as written so far; its last layer is the output."""
        return OpSpec(tuple(self.inputs), tuple(self.layers), self.precision, logits)

    def _append(self, layer: Layer) -> int:
        self.layers.append(layer)
        return len(self.inputs) + len(self.layers) - 1


COUNTS: dict[str, Callable[[OpSpec], float]] = {
    "params": lambda op: op.parameters,
    "macs": lambda op: op.macs,
    "bitops": lambda op: op.bitops,
    "weight_bytes": lambda op: op.weight_bytes,
}
"""The additive costs that need no measurement, each a number for one op."""


def total(cost: str, ops: Iterable[OpSpec]) -> float:
    """An additive cost of a whole network."""
    return sum(COUNTS[cost](op) for op in ops)


def peak_activation_bytes(ops: Iterable[OpSpec]) -> float:
    """The most activation bytes alive at once in a chain of ops, for one image."""
    return max(op.peak_activation_bytes for op in ops)


def _output(layer: Layer, inputs: list[Tensor]) -> Tensor:
    """Shape and sign of a layer's output; the format's type is decided by the op."""
    first = inputs[0]
    signed = any(tensor.format.signed for tensor in inputs)
    match layer.kind:
        case "conv" | "linear" if min(layer.channels, layer.stride, layer.groups) < 1:
            raise ValueError(f"{layer}: channels, stride and groups are at least 1")
        case "conv" | "max_pool" if layer.kernel < 1 or layer.kernel % 2 == 0 or layer.stride < 1:
            raise ValueError(f"{layer} does not fit {first}: odd kernels, strides of at least 1")
        case "conv":
            if first.channels % layer.groups:
                raise ValueError(f"{layer} does not fit {first}: whole groups")
            if layer.channels % layer.groups:
                raise ValueError(f"{layer}: {layer.groups} groups do not divide its channels")
            height, width = _strided(first, layer)
            return Tensor(layer.channels, height, width)
        case "max_pool":
            height, width = _strided(first, layer)
            return Tensor(first.channels, height, width, Format(signed=first.format.signed))
        case "half":
            if layer.function not in _PARITY or first.channels % 2:
                raise ValueError(f"{layer} of {first}: the even or odd half of paired channels")
            return replace(
                first, channels=first.channels // 2, format=Format(signed=first.format.signed)
            )
        case "linear":
            return Tensor(layer.channels, 1, 1)
        case "activation":
            if layer.function not in ACTIVATIONS:
                raise ValueError(f"{layer.function!r} is not one of {', '.join(ACTIVATIONS)}")
            return replace(first, format=Format(signed=layer.function not in RANGES))
        case "pool":
            return Tensor(first.channels, 1, 1, Format(signed=first.format.signed))
        case "add":
            if any(replace(t, format=first.format) != first for t in inputs):
                raise ValueError(f"{layer}: the shapes {', '.join(map(str, inputs))} differ")
            return replace(first, format=Format(signed=signed))
        case "concat":
            if any((t.height, t.width) != (first.height, first.width) for t in inputs):
                raise ValueError(f"{layer}: the sides of {', '.join(map(str, inputs))} differ")
            channels = sum(tensor.channels for tensor in inputs)
            return replace(first, channels=channels, format=Format(signed=signed))
        case "mul":
            gate = inputs[1]
            if (gate.channels, gate.height, gate.width) != (first.channels, 1, 1):
                raise ValueError(f"{layer}: {gate} is not a 1 x 1 gate for {first}")
            return replace(first, format=Format(signed=signed))
        case _:
            raise ValueError(f"{layer.kind!r} is not a layer kind")


def _strided(tensor: Tensor, layer: Layer) -> tuple[int, int]:
    """Height and width after a window that is padded by kernel // 2."""
    return -(-tensor.height // layer.stride), -(-tensor.width // layer.stride)


def _quantisers(op: OpSpec, values: tuple[Tensor, ...] | list[Tensor]) -> dict[int, Quantiser]:
    if not op.precision.is_integer:
        return {}
    bits = op.precision.activation_bits
    found = {
        index: Quantiser(bits, tensor.format.signed)
        for index, tensor in enumerate(op.inputs)
        if not tensor.format.is_quantised
    }
    swallowed, last = _swallowed(op), len(values) - 1
    for index, layer in enumerate(op.layers, start=len(op.inputs)):
        kept = layer.kind in MOVES or index in swallowed
        if not kept and not (index == last and op.logits):
            found[index] = Quantiser(bits, values[index].format.signed)
    return found


def _rounded_norms(op: OpSpec) -> dict[int, tuple[int, bool]]:
    found, swallowed = {}, _swallowed(op)
    for index, layer in enumerate(op.layers):
        position = len(op.inputs) + index
        if layer.norm and position in op.quantisers:
            found[index] = (position, False)
        elif layer.function == "relu" and layer.inputs[0] in swallowed:
            source = layer.inputs[0] - len(op.inputs)
            if position in op.quantisers and op.layers[source].norm:
                found[source] = (position, True)
    return found


def _swallowed(op: OpSpec) -> set[int]:
    """The layer outputs that one fused activation reads and nothing else."""
    readers: dict[int, list[Layer]] = {}
    for layer in op.layers:
        for index in layer.inputs:
            readers.setdefault(index, []).append(layer)
    return {
        index
        for index, reading in readers.items()
        if index >= len(op.inputs) and [r.function in FUSED_ACTIVATIONS for r in reading] == [True]
    }


def _without_defaults(layer: Layer) -> dict[str, Any]:
    default = Layer(layer.kind, layer.inputs)
    return {
        name: value
        for name, value in asdict(layer).items()
        if name in ("kind", "inputs") or value != getattr(default, name)
    }
