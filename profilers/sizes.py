"""The bytes of a model file, op by op: what a limit on the size of the shipped file adds up.

The emitter writes an op in as many bytes wherever it stands, whatever its weights are. So the file
of a network is never larger than `BASE_BYTES + sum(map(file_bytes, ops))`, and at most some thirty
bytes smaller.
"""

import numpy as np

from latency_tables.ops import OpSpec
from profilers.graphs import INPUT, OpParameters, emit
from quant.integer import E4M3, FloatWeights, Fp8Weights, IntegerWeights, Weights
from quant.precision import ONNXRUNTIME, Runtime

BASE_BYTES = 136
"""The most that a model of float images has besides its ops, in bytes: header, input, output, and
the lengths that stand before graph and metadata. It covers sides and channels below 2^21, up to
1000 ops, and files up to 2 GiB, which no ONNX file exceeds."""


def file_bytes(op: OpSpec, runtime: Runtime = ONNXRUNTIME) -> int:
    """The bytes that an op adds to a network's file: nodes, weights, its text in the metadata.

    They depend on its layers' roles too, which stand in names and metadata but not in `op.key`.
    Raises InvalidInput where the runtime has no kernel for the op.
    """
    model = emit([op], [_zeros(op)], runtime)
    graph = model.graph
    for constant in [item for item in graph.initializer if item.name.startswith(INPUT)]:
        graph.initializer.remove(constant)  # where its input is codes, they are the op's before it
    graph.node[-1].output[:] = [INPUT]  # as long as the name of what an op hands on
    for field in ("name", "input", "output"):
        graph.ClearField(field)
    size: int = graph.ByteSize() + len(model.metadata_props[0].value)
    return size


def _zeros(op: OpSpec) -> OpParameters:
    """Parameters of the right sizes, quickly made."""
    weights: dict[int, Weights] = {}
    for index, shape in op.weight_shapes.items():
        bias = np.zeros(shape[0], np.float32)
        if op.precision.is_integer:
            codes, top = np.zeros(shape, np.int8), op.precision.weight_top
            weights[index] = IntegerWeights(codes, bias + 1, bias, top)
        elif op.precision.is_fp8:
            factor = bias + 1 if op.layers[index].norm else None
            weights[index] = Fp8Weights(np.zeros(shape, E4M3), np.float32(1), bias, factor)
        else:
            weights[index] = FloatWeights(np.zeros(shape, np.float32), bias)
    return OpParameters(weights, dict.fromkeys(range(len(op.values)), 1.0))
