"""CPUs under ONNX Runtime."""

import platform
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort

from latency_tables.table import Host
from profilers import host
from profilers.base import Array, Profiler, Session, WrongKernels
from profilers.graphs import expected_operators, read_ops
from profilers.measure import Protocol, Samples, time_block
from quant.precision import ONNXRUNTIME

WATCHED = (
    "Conv", "Gemm", "QLinearConv", "QGemm", "QLinearAdd", "QLinearMul", "QLinearSigmoid",
    "QLinearGlobalAveragePool", "QuantizeLinear", "DequantizeLinear",
)  # fmt: skip
"""Operators whose count in the optimised graph must be what the ops declare."""

_SPELLINGS = {"FusedConv": "Conv", "FusedGemm": "Gemm", "MatMul": "Gemm", "FusedMatMul": "Gemm"}


def session_options(threads: int) -> ort.SessionOptions:
    """All optimisations, `threads` threads, quiet."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return options


class OrtSession(Session):
    """A model in ONNX Runtime on the CPU, from its bytes or the path of its file."""

    def __init__(self, model: bytes | str, *, threads: int, batch: int) -> None:
        super().__init__()
        self._session = ort.InferenceSession(
            model, session_options(threads), providers=["CPUExecutionProvider"]
        )
        self._batch = batch

    def _run(self, *inputs: Array) -> Array:
        names = [item.name for item in self._session.get_inputs()]
        output: Array = self._session.run(None, dict(zip(names, inputs, strict=True)))[0]
        return output

    def _block(self, protocol: Protocol) -> Samples:
        rng = np.random.default_rng(0)
        feed: dict[str, Array] = {}
        for item in self._session.get_inputs():
            shape = (self._batch, *item.shape[1:])
            if item.type == "tensor(uint8)":
                feed[item.name] = rng.integers(0, 256, shape, dtype=np.uint8)
            else:
                feed[item.name] = rng.random(shape, dtype=np.float32)
        session = self._session
        return time_block(lambda: session.run(None, feed), protocol)

    def close(self) -> None:
        super().close()
        self._session = None


class OrtProfiler(Profiler):
    """Times graphs with ONNX Runtime on this machine's CPU."""

    runtime = ONNXRUNTIME
    seconds_per_row = 0.02

    def host(self) -> Host:
        return Host(
            device="cpu",
            runtime="onnxruntime",
            runtime_version=ort.__version__,
            cpu=host.cpu_model(),
            flags=host.cpu_flags(),
            threads=self.threads,
            batch=self.batch,
            governor=host.governor(),
            hostname=platform.node(),
        )

    def prepare(self, model: onnx.ModelProto | Path) -> OrtSession:
        source = str(model) if isinstance(model, Path) else model.SerializeToString()
        return OrtSession(source, threads=self.threads, batch=self.batch)

    def check(self, model: onnx.ModelProto) -> None:
        expected = expected_operators(read_ops(model))
        found = optimised_operators(model, self.threads)
        wrong = [kind for kind in WATCHED if found[kind] != expected[kind]]
        if wrong:
            raise WrongKernels(
                "ONNX Runtime does not run this graph as declared: "
                + ", ".join(f"{kind} {found[kind]} times, not {expected[kind]}" for kind in wrong)
                + f"; ops: {'; '.join(op.key for op in read_ops(model))}"
            )


def optimised_operators(model: onnx.ModelProto, threads: int = 1) -> Counter[str]:
    """How often each operator stands in the graph that ONNX Runtime really executes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimised.onnx"
        options = session_options(threads)
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        nodes = onnx.load(path).graph.node
    constants = {name for node in nodes for name in node.output if not node.input}
    return Counter(
        _SPELLINGS.get(n.op_type, n.op_type) for n in nodes if n.output[0] not in constants
    )
