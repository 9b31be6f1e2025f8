"""An emitted graph in PyTorch, node by node, in the types that it is written in.

What `torch_cuda` times and ships, and what the output of a TensorRT engine is held against. It
reads the flavour that both of them take (`profilers.graphs`), in which types alone tell precision.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn
from torch.nn import functional

from profilers.graphs import OUTPUT
from quant.errors import InvalidInput
from quant.precision import FP8_TOP

_TYPES: dict[int, torch.dtype] = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.BFLOAT16: torch.bfloat16,
    TensorProto.FLOAT8E4M3FN: torch.float8_e4m3fn,
    TensorProto.INT8: torch.int8,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
}

_BITS: dict[int, type[np.signedinteger]] = {
    TensorProto.BFLOAT16: np.int16,
    TensorProto.FLOAT8E4M3FN: np.int8,
}
"""What holds the bits of a type that NumPy lacks."""

Attributes = Mapping[str, Any]


@dataclass(frozen=True)
class _Node:
    """A node: its form, what it reads, what it writes, and whose last reader it is."""

    form: Callable[..., Tensor]
    attributes: Attributes
    inputs: tuple[str, ...]
    output: str
    last: tuple[str, ...]


class GraphModule(nn.Module):
    """The module of an emitted graph; raises InvalidInput for a node that is not in it.

    It takes the graph's inputs in order, (batch, channels, height, width) each, and gives its one
    output, all in the graph's own types. Convolutions run channels-last.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        super().__init__()
        graph = model.graph
        self.input_names = [item.name for item in graph.input]
        self.input_types = [_TYPES[item.type.tensor_type.elem_type] for item in graph.input]
        self.input_sides = [
            tuple(side.dim_value for side in item.type.tensor_type.shape.dim[1:])
            for item in graph.input
        ]
        self._constants: dict[str, str] = {}
        shapes: dict[str, list[int]] = {}
        for number, item in enumerate(graph.initializer):
            if item.data_type == TensorProto.INT64:
                shapes[item.name] = numpy_helper.to_array(item).tolist()
                continue
            self._constants[item.name] = f"constant{number}"
            self.register_buffer(f"constant{number}", _tensor(item))
        self._nodes = _nodes(graph.node, shapes)

    def forward(self, *inputs: Tensor) -> Tensor:
        """The graph's output."""
        values = {name: self.get_buffer(held) for name, held in self._constants.items()}
        for name, value in zip(self.input_names, inputs, strict=True):
            values[name] = value.contiguous(memory_format=torch.channels_last)
        for node in self._nodes:
            sources = [values[name] for name in node.inputs]
            values[node.output] = node.form(node.attributes, *sources)
            for name in node.last:
                del values[name]
        return values[OUTPUT]


def _nodes(nodes: Sequence[onnx.NodeProto], shapes: Mapping[str, list[int]]) -> list[_Node]:
    """The nodes, each with the values that nobody reads after it; `shapes` are held as such."""
    readers = {name: place for place, node in enumerate(nodes) for name in node.input}
    found = []
    for place, node in enumerate(nodes):
        if node.op_type not in _FORMS:
            raise InvalidInput(
                f"{node.op_type} ({node.name}) has no form in PyTorch.",
                accepted="a graph that hwnas wrote for TensorRT or PyTorch",
            )
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        if node.op_type == "Reshape":
            attributes["shape"] = shapes[node.input[1]]
        inputs = tuple(name for name in node.input if name not in shapes)
        read = dict.fromkeys(name for name in inputs if name != OUTPUT)
        last = tuple(name for name in read if readers[name] == place)
        found.append(_Node(_FORMS[node.op_type], attributes, inputs, node.output[0], last))
    return found


def _tensor(item: TensorProto) -> Tensor:
    """An initialiser in its own type."""
    values = numpy_helper.to_array(item)
    if (bits := _BITS.get(item.data_type)) is not None:
        return torch.from_numpy(values.view(bits).copy()).view(_TYPES[item.data_type])
    held = torch.from_numpy(np.array(values))
    return held.contiguous(memory_format=torch.channels_last) if held.ndim == 4 else held


def _per_channel(value: Tensor, factor: Tensor) -> Tensor:
    """A factor of each first index, or one of all, shaped to go with a value."""
    return factor.reshape(-1, *[1] * (value.ndim - 1)) if factor.ndim else factor


def _quantise(_: Attributes, value: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    if zero.dtype.is_floating_point:
        return (value / scale).clamp(-FP8_TOP, FP8_TOP).to(zero.dtype)
    low, high = torch.iinfo(zero.dtype).min, torch.iinfo(zero.dtype).max
    return (value / scale).round().add(zero.float()).clamp(low, high).to(zero.dtype)


def _dequantise(_: Attributes, codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return (codes.float() - _per_channel(codes, zero.float())) * _per_channel(codes, scale)


def _convolve(a: Attributes, value: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    stride, padding = a.get("strides", (1, 1)), a.get("pads", (0, 0, 0, 0))[:2]
    return functional.conv2d(
        value, weight, bias, tuple(stride), tuple(padding), groups=a.get("group", 1)
    )


def _largest(a: Attributes, value: Tensor) -> Tensor:
    return functional.max_pool2d(
        value, tuple(a["kernel_shape"]), tuple(a["strides"]), tuple(a["pads"][:2])
    )


def _reshape(a: Attributes, value: Tensor) -> Tensor:
    return value.reshape(
        [value.shape[i] if side == 0 else side for i, side in enumerate(a["shape"])]
    )


_FORMS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda _, a, b: a + b,
    "Cast": lambda a, value: value.to(_TYPES[a["to"]]),
    "Clip": lambda _, value, low, high: value.clamp(low, high),
    "Concat": lambda a, *values: torch.cat(values, a["axis"]),
    "Conv": _convolve,
    "DequantizeLinear": _dequantise,
    "Flatten": lambda _, value: value.flatten(1),
    "Gather": lambda a, value, index: value.index_select(a["axis"], index),
    "Gemm": lambda _, value, weight, bias: functional.linear(value, weight, bias),
    "GlobalAveragePool": lambda _, value: value.mean((2, 3), keepdim=True),
    "HardSigmoid": lambda _, value: functional.hardsigmoid(value),
    "HardSwish": lambda _, value: functional.hardswish(value),
    "AveragePool": lambda _, value: value,  # over one pixel, as the emitter writes it
    "MaxPool": _largest,
    "Mul": lambda _, a, b: a * b,
    "QuantizeLinear": _quantise,
    "Relu": lambda _, value: value.relu(),
    "Reshape": _reshape,
    "Sigmoid": lambda _, value: value.sigmoid(),
}
