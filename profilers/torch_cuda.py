"""NVIDIA GPUs under PyTorch: the emitted graph as a module, channels-last, timed as a CUDA graph.

For cards that TensorRT is not installed for, or does not run on. Its tables and certificates are
PyTorch's own, and what it ships is the module that was timed (`torch.export`). PyTorch has no
integer convolution on a GPU, so it runs fp32, tf32, fp16 and bf16.
"""

import hashlib
import io
import json
import logging
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import Tensor, nn

from latency_tables.files import write_atomically
from latency_tables.host import Host
from latency_tables.ops import OpSpec
from profilers.base import Array, Profiler, Session
from profilers.cuda import CHAINS, GraphTimer, TorchCuda, card, open_cuda
from profilers.graph_module import GraphModule
from profilers.graphs import OPS_METADATA, check_kernels, read_ops, runs_tf32
from profilers.measure import Protocol, Samples, time_block
from quant.errors import InvalidInput, MissingDependency
from quant.precision import TORCH

PROGRAM = ".pt2"
"""The suffix of an exported program's file."""


class TorchSession(Session):
    """A module on a device for a fixed batch; `tf32` says what fp32 convolutions run as."""

    def __init__(
        self, module: nn.Module, inputs: Sequence[Tensor], place: torch.device, *, tf32: bool
    ) -> None:
        super().__init__()
        self._module = module.to(place)
        self._place, self._tf32 = place, tf32
        self._types = [each.dtype for each in inputs]
        self._inputs = [_placed(each, place) for each in inputs]
        self._timer: GraphTimer | None = None

    def _run(self, *inputs: Array) -> Array:
        given = [
            _placed(torch.from_numpy(np.ascontiguousarray(values)).to(kind), self._place)
            for values, kind in zip(inputs, self._types, strict=True)
        ]
        with _arithmetic(tf32=self._tf32):
            output: Array = self._module(*given).float().cpu().numpy()
        return output

    def _block(self, protocol: Protocol) -> Samples:
        with _arithmetic(tf32=self._tf32):
            if self._place.type != "cuda":
                return time_block(self._call, protocol)
            if self._timer is None:
                cuda = open_cuda()
                with cuda.enough():
                    self._timer = GraphTimer(cuda, self._launch)
            return self._timer.block(protocol)

    def close(self) -> None:
        super().close()
        self._timer = None
        self._inputs = []

    def _call(self) -> Tensor:
        output: Tensor = self._module(*self._inputs)
        return output

    def _launch(self) -> None:
        """A call on the stream of the process's CUDA, whose graphs keep its output's memory."""
        cuda = open_cuda()
        assert isinstance(cuda, TorchCuda)
        with cuda.current():
            self._call()


class TorchProfiler(Profiler):
    """Times graphs with PyTorch on this machine's first NVIDIA GPU."""

    runtime = TORCH
    suffix = PROGRAM
    repeats = CHAINS
    seconds_per_row = 0.5
    place = torch.device("cuda")

    def __init__(self, *, threads: int = 1, batch: int = 1, portable: bool = False) -> None:
        super().__init__(threads=threads, batch=batch, portable=portable)
        self._programs = tempfile.TemporaryDirectory(prefix="hwnas-programs-")
        if self.place.type == "cuda" and not isinstance(open_cuda(), TorchCuda):
            raise MissingDependency(
                f"PyTorch {torch.__version__} cannot use the {card().name}.",
                accepted="a build of PyTorch for CUDA, as new as the driver takes",
                next_step="make setup DEVICE=gpu",
            )

    def host(self) -> Host:
        gpu = card()
        return Host(
            device="gpu-torch",
            runtime=TORCH.name,
            runtime_version=torch.__version__,
            cpu=gpu.name,
            flags=f"{gpu.sm} driver {gpu.driver} cudnn {cudnn_version()}",
            threads=self.threads,
            batch=self.batch,
            hostname=platform.node(),
        )

    def compiled(self, model: Path) -> Path:
        if model.suffix == PROGRAM:
            return model
        content = model.read_bytes()
        path = Path(self._programs.name) / f"{hashlib.sha256(content).hexdigest()}{PROGRAM}"
        if not path.exists():
            save_program(onnx.load_from_string(content), path, batch=self.batch)
        return path

    def prepare(self, model: onnx.ModelProto | Path) -> TorchSession:
        if isinstance(model, Path):
            module, ops = load_program(self.compiled(model))
        else:
            module, ops = GraphModule(model), read_ops(model)
        inputs = inputs_of(ops, self.batch)
        return TorchSession(module, inputs, self.place, tf32=runs_tf32(ops))

    def check(self, model: onnx.ModelProto) -> None:
        check_kernels(read_ops(model), TORCH)
        GraphModule(model)


def save_program(model: onnx.ModelProto, path: Path, *, batch: int) -> None:
    """Write an emitted graph as an exported program, for any batch."""
    ops = read_ops(model)
    example = tuple(inputs_of(ops, max(2, batch)))  # of one image it would hold for one alone
    batches = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(
            GraphModule(model),
            example,
            dynamic_shapes={"inputs": tuple({0: batches} for _ in example)},
        )
    told = {OPS_METADATA: json.dumps([op.to_json() for op in ops])}
    held = io.BytesIO()
    torch.export.save(program, held, extra_files=told)
    write_atomically(path, lambda temporary: temporary.write_bytes(held.getbuffer()))


def load_program(path: Path) -> tuple[nn.Module, list[OpSpec]]:
    """The module and the ops of what `save_program` wrote; raises InvalidInput for another file."""
    told = {OPS_METADATA: ""}
    try:
        with _unlogged("torch.export"):
            module: nn.Module = torch.export.load(path, extra_files=told).module()
        return module, [OpSpec.from_json(text) for text in json.loads(told[OPS_METADATA])]
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InvalidInput(
            f"{path} is not a whole program that hwnas exported ({type(error).__name__}).",
            next_step="export it again",
        ) from error


@contextmanager
def _unlogged(name: str) -> Iterator[None]:
    """Keep a logger silent: PyTorch logs a traceback before it raises what that says."""
    log = logging.getLogger(name)
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def inputs_of(ops: Sequence[OpSpec], batch: int) -> list[Tensor]:
    """Random inputs of a chain of ops, in the types of its graph."""
    rng = np.random.default_rng(0)
    found = []
    for tensor in ops[0].inputs:
        shape = (batch, tensor.channels, tensor.height, tensor.width)
        values = torch.from_numpy(rng.random(shape, np.float32))
        found.append(values.to(_TYPES.get(tensor.format.type, torch.float32)))
    return found


def cudnn_version() -> int:
    """The version of cuDNN, whose convolutions run."""
    return int(torch.backends.cudnn.version() or 0)  # type: ignore[no-untyped-call]


_TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""PyTorch's type of a tensor between two ops, where it is not fp32."""


def _placed(values: Tensor, place: torch.device) -> Tensor:
    return values.to(place).contiguous(memory_format=torch.channels_last)


@contextmanager
def _arithmetic(*, tf32: bool) -> Iterator[None]:
    """No gradients, and fp32 as it is declared."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark
    cudnn.allow_tf32 = matmul.allow_tf32 = tf32
    cudnn.benchmark = True  # as engines do, its convolutions are timed once and the best is kept
    try:
        with torch.no_grad():
            yield
    finally:
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark = before
