"""The one emitter: a chain of ops, and its parameters, as an ONNX graph.

What a profiler times for an op and what export ships for a network both come from `emit`, in the
flavour of a runtime. ONNX Runtime's is `_Writer`: activations are unsigned 8-bit (zero point 0
where nothing is negative, else 128), weights signed 8-bit per output channel, biases 32-bit on
exactly the accumulator's grid. Written so, every layer of an integer op runs in an integer kernel;
`expected_operators` says which operators the optimised graph must then hold, and a profiler checks.
TensorRT's and PyTorch's is `_TensorRTWriter`, which says where the two differ.

Fewer than eight bits run in the kernels of eight. Activations are kept below their highest code by
a Clip of the codes. Weights are stored in two or four bits, which the runtime unpacks when it loads
the file; what it multiplies is stretched (`quant.integer.IntegerWeights`).

An op adds as many bytes to a model wherever it stands (`profilers.sizes`): it is written in the
same nodes, and the names that tell its place have one length (up to 1000 ops).
"""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from latency_tables.ops import ACTIVATIONS, MOVES, Layer, OpSpec, Tensor
from quant.errors import InvalidInput
from quant.integer import (
    E4M3,
    Floats,
    FloatWeights,
    Fp8Weights,
    IntegerWeights,
    Weights,
    bias_codes,
    fold_fp8,
    packed,
)
from quant.precision import FP8_TOP, ONNXRUNTIME, TENSORRT, TORCH, Format, Grid, Runtime

# Two habits of ONNX Runtime (seen in 1.31.1) would change what runs of a float op between integer
# ones. Where its quantised input has several readers (a residual block), each gets a
# DequantizeLinear of its own, a Transpose moves past one of them, and two more conversions appear
# around it. Where its only convolution, or a pool or sigmoid, stands between the input's
# DequantizeLinear and the next op's QuantizeLinear, it is made integer without a word. A Max of one
# input after the conversion, which changes no value, keeps both away.
#
# A third: a sum runs in the layout of its convolution only where its other input has that layout,
# and else hands on a tensor that the next op must convert. So what a residual block converts to its
# own precision passes through a layer that changes the layout and no value: for floats an average
# over one pixel, for codes a convolution with weights of 1. An op then runs in the same operators
# after whatever op it comes, which is what makes the costs of ops add up.
#
# A fourth: layouts spread through a Concat and a strided Slice, or do not, as the ops around them
# would have it. So a concat joins its values flattened to channels x pixels, which no change of
# layout passes, and a half is a Gather: what they read and hand on is laid out channel by channel.
# And a QuantizeLinear moves back through a float MaxPool, so that also ends in an average over one
# pixel.

OPSET = 21
IR_VERSION = 10
INPUT, OUTPUT = "input", "output"
OPS_METADATA = "hwnas.ops"
CODE_BITS = 8
"""Bits of an activation's code as kernels take it."""

ONNX_ACTIVATIONS = {
    "relu": ("Relu", {}),
    "sigmoid": ("Sigmoid", {}),
    "hard_sigmoid": ("HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
    "hard_swish": ("HardSwish", {}),
}
"""The ONNX node of each activation; relu6 is a Clip."""

INTEGER_ACTIVATIONS = {"relu": "", "sigmoid": "QLinearSigmoid"}
"""Activations that integer ops run in integer kernels; the quantiser swallows a relu."""

FLOAT_ISLANDS = ("hard_sigmoid", "hard_swish")
"""Declared: ONNX Runtime has no integer kernel for these; they run in float between Q and DQ."""


@dataclass
class OpParameters:
    """The numbers of one op.

    `weights` by layer index; `limits` by value index, the end of the range of each value that the
    op makes codes of (also that of an input of codes where the op stands first in its graph).
    """

    weights: dict[int, Weights]
    limits: dict[int, float] = field(default_factory=dict)


def random_parameters(op: OpSpec, rng: np.random.Generator) -> OpParameters:
    """Parameters with values of a trained network's size, to time an op before it is trained."""
    weights: dict[int, Weights] = {}
    for index, shape in op.weight_shapes.items():
        deviation = np.float32(np.sqrt(2 / np.prod(shape[1:])))
        weight = deviation * rng.standard_normal(shape, np.float32)
        bias = np.float32(0.1) * rng.standard_normal(len(weight), np.float32)
        if op.precision.is_integer:
            top = op.precision.weight_top
            scale = np.full(len(weight), 3 * deviation / top, np.float32)
            codes = np.clip(np.rint(weight / scale[:, *[None] * (weight.ndim - 1)]), -top, top)
            weights[index] = IntegerWeights(codes.astype(np.int8), scale, bias, top)
        elif op.precision.is_fp8:
            factor = np.ones_like(bias) if op.layers[index].norm else None
            weights[index] = replace(fold_fp8(weight, bias, None), factor=factor)
        else:
            weights[index] = FloatWeights(weight, bias)
    codes_in = [i for i, tensor in enumerate(op.inputs) if tensor.format.has_scale]
    return OpParameters(weights, dict.fromkeys((*op.scaled, *codes_in), 4.0))


def emit(
    ops: Sequence[OpSpec], parameters: Sequence[OpParameters], runtime: Runtime = ONNXRUNTIME
) -> onnx.ModelProto:
    """The ONNX graph of a chain of ops: input NCHW in the first op's format, fp32 for images.

    The batch is symbolic; logits are fp32. The ops themselves are stored in the model's metadata.
    Raises InvalidInput where the runtime has no kernel for a precision or an activation.
    """
    writer = _written(ops, parameters, runtime)
    graph = helper.make_graph(
        writer.nodes, "hwnas", writer.inputs, writer.outputs, writer.initializers
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", writer.opset)], ir_version=IR_VERSION
    )
    helper.set_model_props(model, {OPS_METADATA: json.dumps([op.to_json() for op in ops])})
    return model


def check_kernels(ops: Iterable[OpSpec], runtime: Runtime) -> None:
    """Raise InvalidInput, with the op, where the runtime has no kernel for an op's precision."""
    for number, op in enumerate(ops):
        try:
            runtime.kernel(op.precision)
        except InvalidInput as error:
            raise InvalidInput(
                f"{error.what} Op {number} has it: {op.key}.",
                accepted=error.accepted,
                next_step=error.next_step,
            ) from error
    runs_tf32(ops)


def runs_tf32(ops: Iterable[OpSpec]) -> bool:
    """Whether fp32 arithmetic runs as tf32; raises InvalidInput where some ops have it and others
    not, for a GPU's runtimes know it of a whole network alone.
    """
    found = {op.precision.name for op in ops} & {"fp32", "tf32"}
    if len(found) > 1:
        raise InvalidInput(
            "One network cannot have both fp32 and tf32: what fp32 runs as is set for all of it.",
            accepted="fp32 or tf32, beside any other precision",
            next_step="leave one of them out of --precisions",
        )
    return found == {"tf32"}


def kernel_biases(
    ops: Sequence[OpSpec], parameters: Sequence[OpParameters], runtime: Runtime = ONNXRUNTIME
) -> list[dict[int, Floats]]:
    """The biases (out,) that integer kernels of the same graph add, by op and layer index: each
    rounded to the grid of its accumulator. Raises InvalidInput as `emit` does.
    """
    found: list[dict[int, Floats]] = [{} for _ in ops]
    for label, bias in _written(ops, parameters, runtime).biases.items():
        op, layer, _ = label.split(".", 2)
        found[int(op.removeprefix("op"))][int(layer)] = bias
    return found


def _written(
    ops: Sequence[OpSpec], parameters: Sequence[OpParameters], runtime: Runtime
) -> "_Writer":
    """A writer that wrote a chain of ops."""
    check_kernels(ops, runtime)
    writer = _FLAVOURS.get(runtime.name, _Writer)(runtime)
    inputs = [
        writer.graph_input(INPUT if index == 0 else f"{INPUT}{index}", tensor, parameters[0], index)
        for index, tensor in enumerate(ops[0].inputs)
    ]
    for number, (op, numbers) in enumerate(zip(ops, parameters, strict=True)):
        inputs = [writer.op(f"op{number:03d}", op, numbers, inputs)]
    writer.graph_output(inputs[0], ops[-1])
    return writer


def read_ops(model: onnx.ModelProto) -> list[OpSpec]:
    """The ops that a model of ours was emitted from; raises InvalidInput for any other model."""
    for item in model.metadata_props:
        if item.key == OPS_METADATA:
            return [OpSpec.from_json(text) for text in json.loads(item.value)]
    raise InvalidInput(
        f"The ONNX model holds no {OPS_METADATA} metadata.", accepted="a model that hwnas wrote"
    )


def written_for(model: onnx.ModelProto) -> Runtime:
    """The runtime in whose flavour a model of ours is written: each has an opset of its own."""
    versions = {item.version for item in model.opset_import}
    return TENSORRT if _TensorRTWriter.opset in versions else ONNXRUNTIME


def expected_operators(ops: Sequence[OpSpec]) -> Counter[str]:
    """How many operators of each watched kind the optimised graph must hold.

    `Conv` and `Gemm` stand for all their fused and reordered float forms.
    """
    count: Counter[str] = Counter()
    for op in ops:
        inputs = range(len(op.inputs))
        if not op.precision.is_integer:
            count["Conv"] += sum(layer.kind == "conv" for layer in op.layers)
            count["Gemm"] += sum(layer.kind == "linear" for layer in op.layers)
            count["DequantizeLinear"] += sum(op.inputs[i].format.is_quantised for i in inputs)
            continue
        count["QuantizeLinear"] += sum(i in op.quantisers for i in inputs)
        count["Clip"] += sum(q.bits < CODE_BITS for q in op.quantisers.values())
        count["QLinearConv"] += sum(i in op.quantisers and op.adds(i) for i in inputs)
        for layer in op.layers:
            match layer.kind:
                case "conv":
                    count["QLinearConv"] += 1
                case "linear":
                    count["QGemm"] += 1
                case "add":
                    count["QLinearAdd"] += 1
                case "mul":
                    count["QLinearMul"] += 1
                case "pool":
                    count["QLinearGlobalAveragePool"] += 1
                case "concat":
                    count["QLinearConcat"] += 1
                case "activation" if layer.function in FLOAT_ISLANDS:
                    count["DequantizeLinear"] += 1
                    count["QuantizeLinear"] += 1
                case "activation" if kernel := INTEGER_ACTIVATIONS[layer.function]:
                    count[kernel] += 1
    return +count


def _needs_shield(op: OpSpec, index: int) -> bool:
    """Whether a float op's quantised input must be kept apart from its readers (see above)."""
    readers = [n for n, layer in enumerate(op.layers) if index in layer.inputs]
    tail = [layer.kind for layer in op.layers[readers[0] + 1 :]]
    first_is_last = tail in ([], ["activation"])
    return len(readers) > 1 or first_is_last or not op.layers[readers[0]].has_weights


def _grid_of(op: OpSpec, index: int) -> int:
    """The value that value `index` has its grid from: what is only moved keeps its grid."""
    while index >= len(op.inputs) and op.layers[index - len(op.inputs)].kind in MOVES:
        (index,) = op.layers[index - len(op.inputs)].inputs
    return index


@dataclass(frozen=True)
class _Codes:
    """A quantised value in the graph: the tensor of codes, with what turns codes into values."""

    name: str
    scale: str
    zero_point: str
    step: float


def _named(name: str, value: str | _Codes) -> str | _Codes:
    """The tensor `name`, which stands for what `value` stands for: floats, or codes of its grid."""
    return name if isinstance(value, str) else replace(value, name=name)


class _Writer:
    """Collects nodes and initialisers; values are float tensor names or `_Codes`.

    What an op hands on is named after the op, in as many letters as `INPUT`.
    """

    opset = OPSET
    integer_activations: tuple[str, ...] = (*INTEGER_ACTIVATIONS, *FLOAT_ISLANDS)

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.readers: Counter[str] = Counter()
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []
        self.outputs: list[onnx.ValueInfoProto] = []
        self.biases: dict[str, Floats] = {}
        """Of integer kernels, by their layer's label, as they are rounded."""

    @property
    def size_bytes(self) -> int:
        """What nodes and initialisers take in a file, without their lengths."""
        protos: list[onnx.NodeProto | TensorProto] = [*self.nodes, *self.initializers]
        return sum(proto.ByteSize() for proto in protos)

    def graph_input(
        self, name: str, tensor: Tensor, parameters: OpParameters, index: int
    ) -> str | _Codes:
        shape: list[int | str | None] = ["batch", tensor.channels, tensor.height, tensor.width]
        kind = self.tensor_type(tensor.format)
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        if not tensor.format.has_scale:
            return name
        return self.codes_of(name, parameters.limits[index], tensor.format)

    def graph_output(self, value: str | _Codes, op: OpSpec) -> None:
        tensor = op.output
        flat = any(layer.kind == "linear" for layer in op.layers)
        shape: list[int | str | None] = ["batch", tensor.channels]
        shape += [] if flat else [tensor.height, tensor.width]
        kind = self.tensor_type(Format() if op.logits else tensor.format)
        name = value if isinstance(value, str) else value.name
        for node in self.nodes:
            node.output[:] = [OUTPUT if old == name else old for old in node.output]
            node.input[:] = [OUTPUT if old == name else old for old in node.input]
        self.outputs.append(helper.make_tensor_value_info(OUTPUT, kind, shape))

    def op(
        self, name: str, op: OpSpec, parameters: OpParameters, inputs: list[str | _Codes]
    ) -> str | _Codes:
        values = [
            self.op_input(f"{name}.in{index}", value, op, parameters, index)
            for index, value in enumerate(inputs)
        ]
        handed_on = _grid_of(op, len(op.values) - 1)
        for index, layer in enumerate(op.layers):
            position = len(op.inputs) + index
            label = f"{name}.{index}.{layer.role or layer.function or layer.kind}"
            sources = [values[i] for i in layer.inputs]
            output = self.layer(label, op, index, sources, parameters.weights.get(index))
            if position in op.scaled:
                whose = name if position == handed_on else f"{label}.codes"
                value = self.as_float(output)
                output = self.quantise(f"{label}.codes", value, op, parameters, position, whose)
            if layer.kind == "concat":
                whole = op.values[position]
                output = self.reshape(f"{label}.whole", output, (whole.height, whole.width), whole)
            values.append(output)
        self.nodes[-1].output[:] = [name]
        return _named(name, values[-1])

    def op_input(
        self, label: str, value: str | _Codes, op: OpSpec, parameters: OpParameters, index: int
    ) -> str | _Codes:
        """An input of an op, in the op's own precision."""
        if index in op.quantisers:
            codes = self.quantise(f"{label}.codes", self.as_float(value), op, parameters, index)
            return (
                self.unchanged(label, codes, op.inputs[index].channels) if op.adds(index) else codes
            )
        if not op.precision.is_integer and isinstance(value, _Codes):
            value = self.as_float(value)
            if _needs_shield(op, index):
                one = {"kernel_shape": [1, 1]} if op.adds(index) else {}
                return self.node("AveragePool" if one else "Max", label, [value], **one)
        return value

    def layer(
        self,
        label: str,
        op: OpSpec,
        index: int,
        sources: list[str | _Codes],
        weights: Weights | None,
    ) -> str | _Codes:
        layer, shapes = op.layers[index], op.layer_inputs(index)
        match layer.kind:
            case "conv":
                assert weights is not None
                pad = layer.kernel // 2
                return self.node(
                    "Conv",
                    label,
                    [self.as_float(sources[0]), *self.weights(label, weights, sources[0])],
                    kernel_shape=[layer.kernel] * 2,
                    strides=[layer.stride] * 2,
                    pads=[pad] * 4,
                    group=layer.groups,
                )
            case "linear":
                assert weights is not None
                flat = self.flatten(label, sources[0])
                inputs = [self.as_float(flat), *self.weights(label, weights, flat)]
                return self.node("Gemm", label, inputs, transB=1)
            case "activation":
                return self.activation(label, layer.function, sources[0], op)
            case "pool":
                return self.node("GlobalAveragePool", label, [self.as_float(sources[0])])
            case "max_pool":
                return self.max_pool(label, layer, sources[0])
            case "half":
                taken = np.arange(layer.start, shapes[0].channels, 2, dtype=np.int32)
                indices = self.constant(f"{label}.channels", taken)
                return self.move("Gather", label, sources[0], indices, axis=1)
            case "concat":
                parts = [
                    self.as_float(self.reshape(f"{label}.part{n}", source, (-1,), shape))
                    for n, (source, shape) in enumerate(zip(sources, shapes, strict=True))
                ]
                return self.node("Concat", label, parts, axis=1)
            case "add" | "mul":
                kind = layer.kind.capitalize()
                return self.node(kind, label, [self.as_float(source) for source in sources])
            case _:
                raise InvalidInput(f"The emitter has no ONNX form of the layer {layer}.")

    def activation(self, label: str, function: str, source: str | _Codes, op: OpSpec) -> str:
        if op.precision.is_integer and function not in self.integer_activations:
            raise InvalidInput(
                f"{self.runtime.name} has no integer form of {function}.",
                accepted=", ".join(self.integer_activations),
                next_step="use relu: its quantiser saturates as relu6 does",
            )
        value = self.as_float(source)
        if function == "relu6":
            ends = [self.constant(f"{label}.{end}", np.float32(end)) for end in (0, 6)]
            return self.node("Clip", label, [value, *ends])
        kind, attributes = ONNX_ACTIVATIONS[function]
        return self.node(kind, label, [value], **attributes)

    def weights(self, label: str, weights: Weights, source: str | _Codes) -> tuple[str, ...]:
        """The weight and bias inputs of a convolution or linear layer."""
        if isinstance(weights, FloatWeights):
            return (
                self.constant(f"{label}.weight", weights.weight.astype(np.float32)),
                self.constant(f"{label}.bias", weights.bias.astype(np.float32)),
            )
        assert isinstance(source, _Codes), "integer weights need a quantised input"
        assert isinstance(weights, IntegerWeights)
        bias, weights = bias_codes(weights, source.step)
        scale, zero = weights.kernel_scale, np.zeros(len(bias))
        grid = np.float32(source.step) * scale
        self.biases[label] = (bias * grid.astype(np.float64)).astype(np.float32)
        codes = self.weight_codes(f"{label}.weight.codes", weights)
        return (
            self.dequantised(f"{label}.weight", codes, scale, zero.astype(np.int8)),
            self.dequantise(f"{label}.bias", bias, grid, zero.astype(np.int32)),
        )

    def weight_codes(self, name: str, weights: IntegerWeights) -> str:
        """The stretched codes, stored in the way that takes the fewest bytes."""
        ways = [_Writer(self.runtime)]
        ways[0].constant(name, weights.kernel_codes)
        for indices, table in packed(weights):
            ways.append(_Writer(self.runtime))
            ways[-1].unpack(name, weights.codes.shape, indices, table)
        best = min(ways, key=lambda way: way.size_bytes)
        self.nodes += best.nodes
        self.initializers += best.initializers
        return name

    def unpack(
        self,
        name: str,
        shape: tuple[int, ...],
        indices: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        table: np.ndarray[tuple[int, ...], np.dtype[np.int8]],
    ) -> None:
        """Codes (shape) from 4-bit indices and their table (`quant.integer.packed`)."""
        halves = np.append(indices.ravel(), np.zeros(indices.size % 2, np.uint8)).reshape(-1, 2)
        self.initializers.append(
            TensorProto(
                name=f"{name}.in4",
                data_type=TensorProto.UINT4,
                dims=indices.shape,
                raw_data=(halves[:, 0] | halves[:, 1] << 4).astype(np.uint8).tobytes(),
            )
        )
        whole = self.node("Cast", f"{name}.in32", [f"{name}.in4"], to=TensorProto.INT32)
        looked_up = [self.constant(f"{name}.of", table), whole]
        if table.ndim == 1:
            self.node("Gather", name, looked_up)
        else:
            pairs = self.node("Gather", f"{name}.two", looked_up)
            self.node("Reshape", name, [pairs, self.constant(f"{name}.as", np.array(shape))])

    def dequantise(
        self,
        label: str,
        codes: np.ndarray[tuple[int, ...], np.dtype[Any]],
        scale: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        zero: np.ndarray[tuple[int, ...], np.dtype[Any]],
    ) -> str:
        return self.dequantised(label, self.constant(f"{label}.codes", codes), scale, zero)

    def dequantised(
        self,
        label: str,
        codes: str,
        scale: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
        zero: np.ndarray[tuple[int, ...], np.dtype[Any]],
    ) -> str:
        """The values of codes that are there already."""
        inputs = [
            codes,
            self.constant(f"{label}.scale", scale),
            self.constant(f"{label}.zero", zero),
        ]
        return self.node("DequantizeLinear", label, inputs, **({"axis": 0} if scale.ndim else {}))

    def unchanged(self, label: str, value: _Codes, channels: int) -> _Codes:
        """The same codes, out of a convolution with a single weight of 1 for each channel."""
        ones = self.dequantise(
            f"{label}.ones", np.ones((channels, 1, 1, 1), np.int8), np.array(1, np.float32),
            np.array(0, np.int8),
        )  # fmt: skip
        same = self.node(
            "Conv", label, [self.as_float(value), ones], kernel_shape=[1, 1], group=channels
        )
        codes = f"{label}.kept"
        self.node("QuantizeLinear", codes, [same, value.scale, value.zero_point])
        return _Codes(codes, value.scale, value.zero_point, value.step)

    def max_pool(self, label: str, layer: Layer, source: str | _Codes) -> str | _Codes:
        window = {
            "kernel_shape": [layer.kernel] * 2,
            "strides": [layer.stride] * 2,
            "pads": [layer.kernel // 2] * 4,
        }
        largest = self.move("MaxPool", label, source, **window)
        if isinstance(largest, _Codes):
            return largest
        return self.node("AveragePool", f"{label}.kept", [largest], kernel_shape=[1, 1])

    def flatten(self, label: str, source: str | _Codes) -> str | _Codes:
        return self.move("Flatten", f"{label}.flatten", source, axis=1)

    def reshape(
        self, label: str, source: str | _Codes, sides: tuple[int, ...], tensor: Tensor
    ) -> str | _Codes:
        """The same channels, with other sides."""
        shape = self.constant(f"{label}.shape", np.array([0, tensor.channels, *sides], np.int64))
        return self.move("Reshape", label, source, shape)

    def move(
        self, kind: str, label: str, source: str | _Codes, *inputs: str, **attributes: Any
    ) -> str | _Codes:
        """A node that hands on values as they are: codes stay on their grid."""
        name = source if isinstance(source, str) else source.name
        return _named(self.node(kind, label, [name, *inputs], **attributes), source)

    def quantise(
        self,
        label: str,
        value: str,
        op: OpSpec,
        parameters: OpParameters,
        index: int,
        whose: str = "",
    ) -> _Codes:
        """A value of the op as codes; the grid's numbers are named after `whose` (or the label)."""
        quantiser = op.quantisers[index]
        grid = self.runtime.grid(quantiser.bits, signed=quantiser.signed)
        codes = self.codes(whose or label, parameters.limits[index], grid)
        if quantiser.bits == CODE_BITS:
            self.node("QuantizeLinear", label, [value, codes.scale, codes.zero_point])
        else:
            self.quantise_low(label, value, codes, grid)
        return replace(codes, name=label)

    def quantise_low(self, label: str, value: str, codes: _Codes, grid: Grid) -> None:
        """Codes of fewer bits: below the lowest, 0, the bytes saturate by themselves."""
        wide = self.node("QuantizeLinear", f"{label}.wide", [value, codes.scale, codes.zero_point])
        top = self.constant(f"{label}.top", np.uint8(grid.high - grid.low))
        self.node("Clip", label, [wide, "", top])

    def codes_of(self, name: str, limit: float, format_: Format) -> _Codes:
        """What turns the codes of a format into values."""
        return self.codes(name, limit, self.runtime.grid(format_.bits, signed=format_.signed))

    def codes(self, name: str, limit: float, grid: Grid) -> _Codes:
        step = float(np.float32(limit) / np.float32(grid.top))
        scale = self.constant(f"{name}.scale", np.float32(step))
        zero = self.constant(f"{name}.zero", self.zero_point(grid))
        return _Codes(name, scale, zero, step)

    def tensor_type(self, format_: Format) -> int:
        """The ONNX type of a tensor between two ops."""
        return int(TensorProto.UINT8 if format_.is_quantised else TensorProto.FLOAT)

    def zero_point(self, grid: Grid) -> np.generic:
        """The stored code that stands for zero."""
        return np.uint8(-grid.low)

    def as_float(self, value: str | _Codes) -> str:
        if isinstance(value, str):
            return value
        label = f"{value.name}.float{self.readers[value.name]}"
        self.readers[value.name] += 1
        return self.node("DequantizeLinear", label, [value.name, value.scale, value.zero_point])

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, label: str, inputs: list[str], **attributes: Any) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [label], f"{label}.{kind}", **attributes))
        return label


class _TensorRTWriter(_Writer):
    """The flavour of TensorRT and PyTorch: a tensor's ONNX type is its precision, and all that is.

    Codes are signed with zero point 0, and those of less than 8 bits are clipped before they are
    rounded. Biases stay float: the runtime takes no 32-bit one. An fp16 or bf16 op has weights of
    its type, and a Cast where a value of another type comes in; quantisers work in fp32. tf32 is an
    fp32 graph, which the builder of the engine is told to run so. The runtime keeps every operator
    in the precision that is written, so nothing keeps its rewriting away.

    What an fp8 op casts is codes of e4m3, handed on as such: a value of one scale like any codes.
    Its kernels multiply tensors of one scale each, so a norm is a product and a sum behind them.
    """

    opset = 22  # the first whose Conv takes bf16
    integer_activations = ACTIVATIONS

    def __init__(self, runtime: Runtime) -> None:
        super().__init__(runtime)
        self.float_type = int(TensorProto.FLOAT)

    def op(
        self, name: str, op: OpSpec, parameters: OpParameters, inputs: list[str | _Codes]
    ) -> str | _Codes:
        self.float_type = _FLOAT_TYPES.get(op.precision.name, int(TensorProto.FLOAT))
        output = super().op(name, op, parameters, inputs)
        if op.logits and self.float_type != TensorProto.FLOAT:
            self.nodes[-1].output[:] = [f"{name}.{op.precision}"]
            self.node("Cast", name, [f"{name}.{op.precision}"], to=int(TensorProto.FLOAT))
        return output

    def op_input(
        self, label: str, value: str | _Codes, op: OpSpec, parameters: OpParameters, index: int
    ) -> str | _Codes:
        if index not in op.quantisers and op.precision.is_integer:
            return value
        held = op.inputs[index].format
        if op.precision.is_fp8 and index not in op.casts:
            return value
        given = TensorProto.FLOAT if held.has_scale else self.tensor_type(held)
        value = self.as_float(value)
        if given != self.float_type:
            value = self.node("Cast", label, [value], to=self.float_type)
        if index in op.scaled:
            return self.quantise(f"{label}.codes", value, op, parameters, index)
        return value

    def layer(
        self,
        label: str,
        op: OpSpec,
        index: int,
        sources: list[str | _Codes],
        weights: Weights | None,
    ) -> str | _Codes:
        value = super().layer(label, op, index, sources, weights)
        if not isinstance(weights, Fp8Weights) or weights.factor is None:
            return value
        shape = (-1, *[1] * (weights.codes.ndim - 2))
        factor = self.constant(f"{label}.factor", weights.factor.reshape(shape))
        bias = self.constant(f"{label}.bias", weights.bias.reshape(shape))
        product = self.node("Mul", f"{label}.product", [self.as_float(value), factor])
        return self.node("Add", f"{label}.sum", [product, bias])

    def activation(self, label: str, function: str, source: str | _Codes, op: OpSpec) -> str:
        if function == "hard_swish" and self.float_type == TensorProto.BFLOAT16:
            value = self.as_float(source)  # the parser (seen in 1.7) takes no HardSwish in bf16
            gate = super().activation(f"{label}.gate", "hard_sigmoid", value, op)
            return self.node("Mul", label, [value, gate])
        return super().activation(label, function, source, op)

    def weights(self, label: str, weights: Weights, source: str | _Codes) -> tuple[str, ...]:
        if isinstance(weights, FloatWeights):
            return super().weights(label, weights, source)
        scale = np.asarray(weights.scale)
        zero = np.zeros(scale.shape, weights.codes.dtype)
        weight = self.dequantise(f"{label}.weight", weights.codes, scale, zero)
        if isinstance(weights, Fp8Weights) and weights.factor is not None:
            return (weight,)
        return weight, self.constant(f"{label}.bias", weights.bias)

    def quantise(
        self,
        label: str,
        value: str,
        op: OpSpec,
        parameters: OpParameters,
        index: int,
        whose: str = "",
    ) -> _Codes:
        if index in op.quantisers:
            return super().quantise(label, value, op, parameters, index, whose)
        if index not in parameters.limits:
            raise InvalidInput(
                f"A value that is cast to fp8 has no range ({label}).",
                accepted="a network that was retrained, whose ranges are set then",
                next_step="hwnas retrain",
            )
        codes = self.codes_of(whose or label, parameters.limits[index], Format("fp8"))
        self.node("QuantizeLinear", label, [value, codes.scale, codes.zero_point])
        return replace(codes, name=label)

    def codes_of(self, name: str, limit: float, format_: Format) -> _Codes:
        if format_.is_quantised:
            return super().codes_of(name, limit, format_)
        step = np.float32(limit) / np.float32(FP8_TOP)
        zero = self.constant(f"{name}.zero", np.zeros((), E4M3))
        return _Codes(name, self.constant(f"{name}.scale", step), zero, float(step))

    def quantise_low(self, label: str, value: str, codes: _Codes, grid: Grid) -> None:
        ends = [
            self.constant(f"{label}.{end}", np.float32(code * codes.step))
            for end, code in (("low", grid.low), ("high", grid.high))
        ]
        clipped = self.node("Clip", f"{label}.clipped", [value, *ends])
        self.node("QuantizeLinear", label, [clipped, codes.scale, codes.zero_point])

    def move(
        self, kind: str, label: str, source: str | _Codes, *inputs: str, **attributes: Any
    ) -> str | _Codes:
        if isinstance(source, str):
            return super().move(kind, label, source, *inputs, **attributes)
        moved = self.node(kind, f"{label}.moved", [self.as_float(source), *inputs], **attributes)
        self.node("QuantizeLinear", label, [moved, source.scale, source.zero_point])
        return replace(source, name=label)

    def tensor_type(self, format_: Format) -> int:
        if format_.is_quantised:
            return int(TensorProto.INT8)
        if format_.has_scale:
            return int(TensorProto.FLOAT8E4M3FN)
        return _FLOAT_TYPES.get(format_.type, int(TensorProto.FLOAT))

    def zero_point(self, grid: Grid) -> np.generic:
        return np.int8(0)

    def constant(self, name: str, value: np.ndarray | np.generic) -> str:
        if value.dtype == np.float32:
            value = value.astype(helper.tensor_dtype_to_np_dtype(self.float_type))
        return super().constant(name, value)


_FLOAT_TYPES = {"fp16": int(TensorProto.FLOAT16), "bf16": int(TensorProto.BFLOAT16)}
"""The ONNX type of each float precision that is not fp32's own."""

_FLAVOURS: dict[str, type[_Writer]] = {
    TENSORRT.name: _TensorRTWriter,
    TORCH.name: _TensorRTWriter,
}
"""Who writes for a runtime, where that is not `_Writer`."""
