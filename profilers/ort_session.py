"""A graph under ONNX Runtime on the CPU, opened and timed; and what is recorded of the host.

A bundle carries this file to machines that have NumPy and the runtime alone (`profilers.bundle`),
so it imports nothing else, and reads under Python 3.9.
"""

import platform
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Union

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from profilers import host
from profilers.measure import Protocol, Samples, time_block

WATCHED = (
    "Conv", "Gemm", "QLinearConv", "QGemm", "QLinearAdd", "QLinearMul", "QLinearSigmoid",
    "QLinearGlobalAveragePool", "QLinearConcat", "QuantizeLinear", "DequantizeLinear", "Clip",
)  # fmt: skip
"""Operators whose count in the optimised graph must be what the ops declare. A Clip is one of
codes, which has no lower end; one with both is an activation, alone or in its convolution.
"""

_SPELLINGS = {"FusedConv": "Conv", "FusedGemm": "Gemm", "MatMul": "Gemm", "FusedMatMul": "Gemm"}


def session_options(threads: int) -> ort.SessionOptions:
    """All optimisations, `threads` threads, quiet."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


def open_session(model: Union[bytes, str], threads: int) -> ort.InferenceSession:  # noqa: UP007
    """A model on the CPU, from its bytes or the path of its file."""
    return ort.InferenceSession(model, session_options(threads), providers=["CPUExecutionProvider"])


def timed(session: ort.InferenceSession, batch: int, protocol: Protocol) -> Samples:
    """One timed block on random inputs: `batch` images or activations each."""
    feed: dict[str, npt.NDArray[np.generic]] = {}
    for item in session.get_inputs():
        values = _CODES if item.type == "tensor(uint8)" else _PIXELS
        feed[item.name] = np.resize(values, (batch, *item.shape[1:]))
    return time_block(lambda: session.run(None, feed), protocol)


_RANDOM = np.random.default_rng(0)
_CODES = _RANDOM.integers(0, 256, 65_521, dtype=np.uint8)
_PIXELS = _RANDOM.random(65_521, dtype=np.float32)
"""Random numbers that inputs repeat, so many that no row of an image equals another's: a prime."""


def wrong_operators(expected: Mapping[str, int], found: Mapping[str, int]) -> str:
    """The watched operators that are not executed as often as declared; empty if all are."""
    return ", ".join(
        f"{kind} {found.get(kind, 0)} times, not {expected.get(kind, 0)}"
        for kind in WATCHED
        if found.get(kind, 0) != expected.get(kind, 0)
    )


def executed_operators(model: bytes, threads: int) -> Counter[str]:
    """How often each operator stands in the graph that ONNX Runtime really executes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = session_options(threads)
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        (graph,) = _values(path.read_bytes(), _GRAPH)
    nodes = [
        (_values(node, _INPUT), _values(node, _OUTPUT), _values(node, _OP_TYPE)[0].decode())
        for node in _values(graph, _NODE)
    ]
    constants = {name for inputs, outputs, _ in nodes for name in outputs if not inputs}
    return Counter(
        "Relu6" if kind == "Clip" and b"" not in inputs else _SPELLINGS.get(kind, kind)
        for inputs, outputs, kind in nodes
        if outputs[0] not in constants
    )


_GRAPH, _NODE, _INPUT, _OUTPUT, _OP_TYPE = 7, 1, 1, 2, 4
"""Numbers of fields in onnx.proto: of ModelProto, of GraphProto, and three of NodeProto."""


def _values(message: bytes, wanted: int) -> list[bytes]:
    """The values of one field."""
    return [value for field, value in _fields(message) if field == wanted]


def _fields(message: bytes) -> Iterator[tuple[int, bytes]]:
    """The fields of a protobuf message that have a length: texts, bytes and messages."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        kind = tag & 7
        if kind == 0:
            _, at = _varint(message, at)
        elif kind == 2:
            size, at = _varint(message, at)
            yield tag >> 3, message[at : at + size]
            at += size
        else:
            at += 8 if kind == 1 else 4


def _varint(message: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, the lowest first, and where it ends."""
    number = shift = 0
    while True:
        byte = message[at]
        number |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return number, at


def provenance(threads: int, batch: int) -> dict[str, Any]:
    """The fields of `latency_tables.table.Host` on this machine, in this condition."""
    return {
        "device": "cpu",
        "runtime": "onnxruntime",
        "runtime_version": ort.__version__,
        "cpu": host.cpu_model(),
        "flags": host.cpu_flags(),
        "threads": threads,
        "batch": batch,
        "governor": host.governor(),
        "hostname": platform.node(),
    }
