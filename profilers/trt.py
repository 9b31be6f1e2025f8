"""NVIDIA GPUs under TensorRT: engines (`profilers.trt_build`), run and timed on this machine.

Engines have a fixed batch and one stream, and are timed as CUDA graphs. Before an engine is used,
its output is held against PyTorch's: on cards that it does not know, the runtime has been seen to
answer zeros without a word.
"""

import hashlib
import os
import re
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import torch

from latency_tables.host import Host
from profilers.base import Array, Profiler, Session, WrongKernels
from profilers.cuda import CHAINS, Buffer, Card, Cuda, GraphTimer, card, open_cuda
from profilers.graph_module import GraphModule
from profilers.graphs import read_ops
from profilers.measure import Protocol, Samples
from profilers.trt_build import (
    Kernel,
    build,
    inspected,
    loaded,
    package,
    refusal,
    unsupported,
    version,
    wrong_kernels,
)
from quant.errors import HwnasError
from quant.integer import E4M3
from quant.precision import FP8_TOP, TENSORRT, Runtime

PLAN = ".plan"
"""The suffix of an engine's file."""

CHECKED = 2
"""So many images of a batch are held against PyTorch's output."""

FP8_CAPABILITY = (8, 9)
"""The compute capability of the first cards that multiply fp8."""

TOLERATED = {"fp32": 0.02, "tf32": 0.02, "fp16": 0.1, "bf16": 0.1, "fp8": 0.25, "int8": 0.25}
"""How far an engine's output may be from PyTorch's, |difference| / |output| in 2-norms, by the
kernels of its ops: a wide mesh, which catches what is wrong and lets rounding through."""


class TrtSession(Session):
    """An engine on this machine's card, from its plan, for a fixed batch."""

    def __init__(self, plan: bytes, cuda: Cuda, batch: int) -> None:
        super().__init__()
        trt = package()
        self._cuda, self._batch = cuda, batch
        self._engine = loaded(plan)
        with cuda.enough():
            self._context = self._engine.create_execution_context()
        if self._context is None:
            raise refusal("gives the engine no memory to run in")
        self._inputs: list[Buffer] = []
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        rng = np.random.default_rng(0)
        for name in names:
            if self._engine.get_tensor_mode(name) != trt.TensorIOMode.INPUT:
                continue
            shape = (batch, *tuple(self._engine.get_tensor_shape(name))[1:])
            if not self._context.set_input_shape(name, shape):
                raise refusal(f"takes no batches of {batch} in this engine")
            self._inputs.append(self._bound(name, shape))
            cuda.put(self._inputs[-1], random_values(rng, shape, self._inputs[-1].dtype))
        (output,) = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.OUTPUT]
        self._output: Buffer | None = self._bound(
            output, tuple(self._context.get_tensor_shape(output))
        )
        self._timer: GraphTimer | None = None

    def kernel_us(self, runs: int = 20) -> dict[str, float]:
        """The median time of each kernel, in us: without a graph, each waited for, so that their
        sum exceeds the engine's own latency.
        """
        self._check_open()
        trt = package()

        class Times(trt.IProfiler):  # type: ignore[name-defined, misc]
            def __init__(self) -> None:
                trt.IProfiler.__init__(self)
                self.found: dict[str, list[float]] = {}

            def report_layer_time(self, layer_name: str, ms: float) -> None:
                self.found.setdefault(layer_name, []).append(1000 * ms)

        times = Times()
        self._context.profiler = times
        self._context.enqueue_emits_profile = False
        for _ in range(runs):
            self._launch()
            self._cuda.wait()
            self._context.report_to_profiler()
        self._context.profiler = None
        return {name: float(np.median(found)) for name, found in times.found.items()}

    def kernels(self) -> tuple[Kernel, ...]:
        """The engine's kernels, as its inspector tells them."""
        self._check_open()
        trt = package()
        inspector = self._engine.create_engine_inspector()
        return inspected(inspector.get_engine_information(trt.LayerInformationFormat.JSON))

    def _run(self, *inputs: Array) -> Array:
        assert self._output is not None
        count = len(inputs[0])
        outputs = []
        for start in range(0, count, self._batch):
            for buffer, values in zip(self._inputs, inputs, strict=True):
                self._cuda.put(buffer, _filled(values[start : start + self._batch], buffer))
            self._launch()
            outputs.append(self._cuda.get(self._output))
        whole = np.concatenate(outputs)[:count]
        return whole.astype(np.float32) if whole.dtype.kind not in "fiu" else whole

    def _block(self, protocol: Protocol) -> Samples:
        if self._timer is None:
            with self._cuda.enough():
                self._timer = GraphTimer(self._cuda, self._launch)
        return self._timer.block(protocol)

    def close(self) -> None:
        """Release the graph, what it runs, and the memory that they use, in this order."""
        super().close()
        self._cuda.wait()
        self._timer = self._context = self._engine = self._output = None
        self._inputs = []

    def _launch(self) -> None:
        if not self._context.execute_async_v3(self._cuda.stream):
            raise refusal("does not run the engine")

    def _bound(self, name: str, shape: tuple[int, ...]) -> Buffer:
        buffer = self._cuda.buffer(shape, _dtype(self._engine.get_tensor_dtype(name)))
        if not self._context.set_tensor_address(name, buffer.address):
            raise refusal(f"takes no memory for {name}")
        return buffer


class TrtProfiler(Profiler):
    """Times graphs with TensorRT on this machine's first NVIDIA GPU."""

    runtime = TENSORRT
    suffix = PLAN
    repeats = CHAINS
    seconds_per_row = 1.0

    def __init__(self, *, threads: int = 1, batch: int = 1, portable: bool = False) -> None:
        self._cuda = open_cuda()
        self.runtime = runtime_on(card())
        super().__init__(threads=threads, batch=batch, portable=portable)
        package()
        self._plans = tempfile.TemporaryDirectory(prefix="hwnas-plans-")

    def host(self) -> Host:
        trt = package()
        return card().host(
            "gpu", trt.__name__, trt.__version__, threads=self.threads, batch=self.batch
        )

    @property
    def memory_layer(self) -> str:
        return self._cuda.name

    def compiled(self, model: Path) -> Path:
        return model if model.suffix == PLAN else self._plan(onnx.load(model))

    def prepare(self, model: onnx.ModelProto | Path) -> TrtSession:
        path = self.compiled(model) if isinstance(model, Path) else self._plan(model)
        return TrtSession(path.read_bytes(), self._cuda, self.batch)

    def check(self, model: onnx.ModelProto) -> None:
        ops = read_ops(model)
        with self.prepare(model) as session:
            if wrong := wrong_kernels(ops, session.kernels()):
                raise WrongKernels(
                    f"{version()} does not run this graph as declared: {wrong}; ops: "
                    f"{'; '.join(op.key for op in ops)}"
                )

    def _plan(self, model: onnx.ModelProto) -> Path:
        """The engine of a graph, built once and held against PyTorch."""
        content = model.SerializeToString()
        path = Path(self._plans.name) / f"{hashlib.sha256(content).hexdigest()}{PLAN}"
        if not path.exists():
            plan = build(model, batch=self.batch, cache=_timing_cache()).plan
            with TrtSession(plan, self._cuda, self.batch) as session:
                check_output(session, model, self.batch)
            path.write_bytes(plan)
        return path


def runtime_on(gpu: Card) -> Runtime:
    """TensorRT as a card has it: before compute capability 8.9 there are no fp8 kernels."""
    if gpu.capability >= FP8_CAPABILITY:
        return TENSORRT
    kernels = {name: kernel for name, kernel in TENSORRT.kernels.items() if kernel != "fp8"}
    return replace(TENSORRT, kernels=kernels)


def check_output(session: Session, model: onnx.ModelProto, batch: int) -> None:
    """Raise where a session answers zeros, or otherwise than PyTorch does from the same graph."""
    module, rng = GraphModule(model), np.random.default_rng(0)
    inputs = [
        random_values(rng, (batch, *sides), _NUMPY.get(kind, np.dtype(np.float32)))
        for sides, kind in zip(module.input_sides, module.input_types, strict=True)
    ]
    with torch.no_grad():
        few = [torch.from_numpy(each[:CHECKED].astype(np.float32)) for each in inputs]
        given = [x.to(kind) for x, kind in zip(few, module.input_types, strict=True)]
        wanted = module(*given).float().numpy()
    found = session.run(*inputs)[:CHECKED].astype(np.float32)
    away = float(np.linalg.norm(found - wanted)) / max(float(np.linalg.norm(wanted)), 1e-12)
    most = max(TOLERATED[TENSORRT.kernel(op.precision)] for op in read_ops(model))
    if not found.any() and wanted.any():
        raise unsupported("answers zeros")
    if not away <= most:
        raise HwnasError(
            f"{version()} computes something else than PyTorch from the same graph: its output is "
            f"{away:.1%} away, where {most:.0%} is tolerated.",
            next_step="use --device gpu-torch on this card",
        )


_NUMPY = {torch.int8: np.dtype(np.int8), torch.float8_e4m3fn: E4M3}
"""The types of inputs that are codes."""


def random_values(rng: np.random.Generator, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
    """Random codes, or floats like pixels, of a type."""
    if np.dtype(dtype) == np.int8:
        return rng.integers(-128, 128, shape, np.int8)
    if np.dtype(dtype) == E4M3:
        return rng.uniform(-FP8_TOP, FP8_TOP, shape).astype(E4M3)
    return rng.random(shape, np.float32).astype(dtype)


def _dtype(kind: Any) -> np.dtype[Any]:
    """NumPy's type of one of TensorRT's."""
    return _DTYPES[str(kind.name)]


_DTYPES: dict[str, np.dtype[Any]] = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "FP8": E4M3,
    "INT8": np.dtype(np.int8),
}


def _filled(values: Array, buffer: Buffer) -> Array:
    """Values in a buffer's type, with zeros up to its batch."""
    whole = np.zeros(buffer.shape, buffer.dtype)
    whole[: len(values)] = values
    return whole


def _timing_cache() -> Path:
    """The file of the builder's timings, of this package on this card with this driver alone."""
    home = os.environ.get("HWNAS_HOME")
    gpu = card()
    name = re.sub(r"[^\w.]+", "-", f"{version()} {gpu.name} {gpu.driver}")
    folder = Path(home) if home else Path.home() / ".cache" / "hwnas"
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.timings"
