"""The little of CUDA that the GPU backends need: the card, memory, one stream, events, graphs.

What card there is, its driver says (through ctypes), so that it can be told without any package.
Memory, stream and events are PyTorch's where it was built with CUDA, else PyCUDA's in the card's
primary context. PyCUDA has no graphs: there the driver captures them.

A graph is captured as trtexec does: after launches outside it, in the mode that refuses what this
thread may not do meanwhile and lets others be (a runtime may compile in threads of its own).
"""

import atexit
import ctypes
import functools
import importlib
import math
import platform
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from latency_tables.host import Host
from profilers.base import Array
from profilers.measure import Protocol, Samples, now_s, time_replays, uncollected
from quant.errors import HwnasError, InvalidInput, MissingDependency

DRIVER_LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
_MANAGEMENT_LIBRARIES = ("libnvidia-ml.so.1", "nvml.dll")

_NO_MEMORY, _NO_DEVICE = 2, 100
"""CUDA_ERROR_OUT_OF_MEMORY, CUDA_ERROR_NO_DEVICE."""
_THREAD_LOCAL = 1
"""CU_STREAM_CAPTURE_MODE_THREAD_LOCAL."""
_CAPABILITY = (75, 76)
"""CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR."""

WITHOUT = "use --device cpu, or name a compute capability: hwnas export --format tensorrt " \
    "--compute-capability sm89"  # fmt: skip
"""What still works where there is no GPU."""

Launch = Callable[[], None]
"""Puts work on the stream, and returns at once."""

Bytes = npt.NDArray[np.uint8]

WARM_UPS = 3
"""So many launches come before a capture: libraries load kernels and choose between them there."""

SHORT_US, TARGET_US, COPIES = 50.0, 1000.0, (20, 100)
"""What is shorter than the first is timed in a graph of so many copies that they take about the
second, but no fewer and no more than the third says."""


@dataclass(frozen=True)
class Card:
    """An NVIDIA GPU, as its driver tells it; `capability` is its compute capability."""

    name: str
    capability: tuple[int, int]
    driver: str
    memory_bytes: int

    @property
    def sm(self) -> str:
        """The compute capability as tools write it.

        >>> Card("GeForce RTX 4090", (8, 9), "580.1", 0).sm
        'sm89'
        """
        return "sm{}{}".format(*self.capability)

    def host(
        self,
        device: str,
        runtime: str,
        version: str,
        *,
        threads: int,
        batch: int,
        library: str = "",
    ) -> Host:
        """The provenance of what a runtime measures on this card; `library` is one whose version
        counts too.
        """
        return Host(
            device=device,
            runtime=runtime,
            runtime_version=version,
            cpu=self.name,
            flags=f"{self.sm} driver {self.driver}" + (f" {library}" if library else ""),
            threads=threads,
            batch=batch,
            hostname=platform.node(),
        )


STILL_WARM = 0.1
"""The share of a warm-up that a card needs which worked just before."""

CHAINS = (2, 4, 8)
"""On a GPU an op's cost is the slope over chains of so many copies: their ends cost apart."""


class Buffer:
    """Memory on the card for an array of a shape and a type, at `address`; `held` owns it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], address: int, held: object):
        self.shape = shape
        self.dtype = dtype
        self.address = address
        self.held = held


class Cuda(ABC):
    """Memory, one stream of its own, events and graphs; `name` tells whose they are."""

    name: str
    stream: int
    """The handle of the stream."""
    worked_until_s: float = -math.inf
    """When the last block of times ended: a card that rests lowers its clocks."""

    _stream: Any
    _before: Any
    _after: Any

    def buffer(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Buffer:
        """New memory; raises InvalidInput where the card has no more."""
        size = max(1, int(np.prod(shape)) * dtype.itemsize)
        with self.enough():
            held, address = self._allocate(size)
        return Buffer(shape, dtype, address, held)

    @contextmanager
    def enough(self) -> Iterator[None]:
        """Turn the card's refusal of more memory into one sentence."""
        try:
            yield
        except Exception as error:
            if self._is_refusal(error):
                raise out_of_memory() from error
            raise

    def put(self, buffer: Buffer, values: Array) -> None:
        """Copy values, of the buffer's shape and type, to the card, behind what the stream does."""
        self._put(buffer, np.ascontiguousarray(values).reshape(-1).view(np.uint8))

    def get(self, buffer: Buffer) -> Array:
        """Copy values from the card, once the stream is done."""
        self.wait()
        return self._get(buffer).view(buffer.dtype).reshape(buffer.shape)

    def wait(self) -> None:
        """Wait until the stream is done."""
        self._stream.synchronize()

    def captured(self, launch: Launch) -> Launch:
        """A graph of what `launch` puts on the stream, as something to launch; it has run before.

        Raises HwnasError where its work cannot be captured, and what `launch` raises; the stream is
        as usable as before.
        """
        self.wait()
        with self.enough(), uncollected():
            try:
                return self._captured(launch)
            except RuntimeError as error:
                if self._is_refusal(error):
                    raise
                reason = str(error).partition("\n")[0]
                raise HwnasError(
                    f"Work on the {card().name} cannot be captured in a CUDA graph: {reason}.",
                    next_step="search another space or other precisions for this device",
                ) from error

    def elapsed_us(self, launch: Launch) -> float:
        """What a launch takes between an event before and one after it, in us; it is over then.

        A first launch, not timed, keeps the card at work while this process puts the rest on the
        stream: how long that takes is no part of the time.
        """
        launch()
        self._before.record(self._stream)
        launch()
        self._after.record(self._stream)
        self._after.synchronize()
        return 1000 * self._between_ms()

    @abstractmethod
    def _allocate(self, size: int) -> tuple[object, int]: ...

    @abstractmethod
    def _put(self, buffer: Buffer, content: Bytes) -> None: ...

    @abstractmethod
    def _get(self, buffer: Buffer) -> Bytes: ...

    @abstractmethod
    def _captured(self, launch: Launch) -> Launch: ...

    @abstractmethod
    def _between_ms(self) -> float: ...

    @abstractmethod
    def _is_refusal(self, error: Exception) -> bool:
        """Whether an error says that the card has no more memory."""


class TorchCuda(Cuda):
    """PyTorch's CUDA."""

    def __init__(self) -> None:
        self.name = f"PyTorch {torch.__version__}"
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self.stream = int(self._stream.cuda_stream)
        self._before = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._after = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def current(self) -> AbstractContextManager[Any]:
        """Run PyTorch's own work on the stream, for as long as the block lasts."""
        return torch.cuda.stream(self._stream)

    def _allocate(self, size: int) -> tuple[object, int]:
        with self.current():  # so that whoever gets the memory next works behind this stream
            held = torch.empty(size, dtype=torch.uint8, device="cuda")
        return held, held.data_ptr()

    def _put(self, buffer: Buffer, content: Bytes) -> None:
        with self.current():
            _tensor(buffer).copy_(torch.from_numpy(content))

    def _get(self, buffer: Buffer) -> Bytes:
        with self.current():
            content: Bytes = _tensor(buffer).cpu().numpy()
        return content

    def _captured(self, launch: Launch) -> Launch:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.empty_cache()  # a graph has memory of its own
        with self.current():
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                launch()
            except BaseException:
                with suppress(RuntimeError):  # which would only say that the capture failed
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay() -> None:
            with self.current():
                graph.replay()

        return replay

    def _between_ms(self) -> float:
        return float(self._before.elapsed_time(self._after))

    def _is_refusal(self, error: Exception) -> bool:
        told = ("out of memory", "ALLOC_FAILED")  # of CUDA, of cuDNN and cuBLAS
        return isinstance(error, RuntimeError) and any(part in str(error) for part in told)


def _tensor(buffer: Buffer) -> torch.Tensor:
    assert isinstance(buffer.held, torch.Tensor)
    return buffer.held


class PyCuda(Cuda):
    """PyCUDA's, in the primary context, which it shares with whatever else the process runs."""

    def __init__(self, pycuda: ModuleType, driver: ctypes.CDLL) -> None:
        importlib.import_module("pycuda.autoprimaryctx")
        self._driver: Any = importlib.import_module("pycuda.driver")
        self._library = driver
        self.name = f"PyCUDA {pycuda.VERSION_TEXT}"
        self._stream = self._driver.Stream()
        self.stream = int(self._stream.handle)
        self._before, self._after = self._driver.Event(), self._driver.Event()
        atexit.register(self._leave)

    def _leave(self) -> None:
        """Give back what is the context's, which PyCUDA leaves after this."""
        self._stream = self._before = self._after = None

    def _allocate(self, size: int) -> tuple[object, int]:
        held = self._driver.mem_alloc(size)
        return held, int(held)

    def _put(self, buffer: Buffer, content: Bytes) -> None:
        self.wait()
        self._driver.memcpy_htod(buffer.address, content)

    def _get(self, buffer: Buffer) -> Bytes:
        content = np.empty(int(np.prod(buffer.shape)) * buffer.dtype.itemsize, np.uint8)
        self._driver.memcpy_dtoh(content, buffer.address)
        return content

    def _captured(self, launch: Launch) -> Launch:
        stream, graph, ready = ctypes.c_void_p(self.stream), ctypes.c_void_p(), ctypes.c_void_p()
        self._call("cuStreamBeginCapture_v2", stream, ctypes.c_int(_THREAD_LOCAL))
        try:
            launch()
        except BaseException:
            self._library.cuStreamEndCapture(stream, ctypes.byref(graph))
            if graph:
                self._library.cuGraphDestroy(graph)
            raise
        self._call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            flags = ctypes.c_ulonglong(0)
            self._call("cuGraphInstantiateWithFlags", ctypes.byref(ready), graph, flags)
        finally:
            self._library.cuGraphDestroy(graph)

        def replay() -> None:
            self._call("cuGraphLaunch", ready, stream)

        weakref.finalize(replay, self._library.cuGraphExecDestroy, ready).atexit = False
        return replay

    def _between_ms(self) -> float:
        return float(self._before.time_till(self._after))

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code == _NO_MEMORY:
            raise out_of_memory()
        if code:
            raise RuntimeError(f"{function} gives {code}")

    def _is_refusal(self, error: Exception) -> bool:
        return isinstance(error, self._driver.MemoryError)


class GraphTimer:
    """Times a launch as a CUDA graph: of a short one many copies in a graph, since two events and
    the gap between two launches take some microseconds themselves.
    """

    def __init__(self, cuda: Cuda, launch: Launch) -> None:
        for _ in range(WARM_UPS):
            launch()
        self._cuda, self.copies = cuda, 1
        self._replay = cuda.captured(launch)
        once_us = min(cuda.elapsed_us(self._replay) for _ in range(10))
        if once_us < SHORT_US:
            self.copies = int(np.clip(TARGET_US / max(once_us, 1e-3), *COPIES))
            self._replay = cuda.captured(self._many(launch))

    def block(self, protocol: Protocol) -> Samples:
        """One block, (runs, 2), as `time_replays` has it; a replay's copies share its time.

        The protocol's warm-up is for a card that rested for as long; one that did not gets a
        `STILL_WARM` part of it.
        """
        rested_s = now_s() - self._cuda.worked_until_s
        if 1000 * rested_s < protocol.warmup_ms:
            protocol = replace(protocol, warmup_ms=STILL_WARM * protocol.warmup_ms)
        samples = time_replays(lambda: self._cuda.elapsed_us(self._replay) / self.copies, protocol)
        self._cuda.worked_until_s = now_s()
        return samples

    def _many(self, launch: Launch) -> Launch:
        def launches() -> None:
            for _ in range(self.copies):
                launch()

        return launches


@functools.cache
def card() -> Card:
    """This machine's first NVIDIA GPU; raises MissingDependency where there is none."""
    driver = _driver()
    device, memory = ctypes.c_int(), ctypes.c_size_t()
    name = ctypes.create_string_buffer(256)
    _ask(driver, "cuDeviceGet", ctypes.byref(device), 0)
    _ask(driver, "cuDeviceGetName", name, len(name), device)
    _ask(driver, "cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    capability = []
    for attribute in _CAPABILITY:
        value = ctypes.c_int()
        _ask(driver, "cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
        capability.append(value.value)
    major, minor = capability
    return Card(name.value.decode(), (major, minor), _driver_version(driver), memory.value)


@functools.cache
def open_cuda() -> Cuda:
    """The first memory layer that works on this machine's GPU, one for the whole process.

    Raises MissingDependency where there is no GPU, or neither PyTorch nor PyCUDA reaches it.
    """
    driver, gpu = _driver(), card()
    if torch.version.cuda and torch.cuda.is_available():
        return TorchCuda()
    try:
        return PyCuda(importlib.import_module("pycuda"), driver)
    except Exception as error:  # PyCUDA's own have no name where it cannot be imported
        raise MissingDependency(
            f"Nothing here reaches the memory of the {gpu.name}: PyTorch {torch.__version__} is "
            "built without CUDA, or for another driver, and PyCUDA does not start "
            f"({error}).",
            accepted="a CUDA build of PyTorch, or PyCUDA",
            next_step="make setup DEVICE=gpu",
        ) from error


def out_of_memory() -> InvalidInput:
    """The error for a card that has no more memory."""
    gpu = card()
    return InvalidInput(
        f"The {gpu.name} has not enough free memory ({gpu.memory_bytes / 1e9:.3g} GB in all).",
        next_step="name a smaller --batch, or stop what else uses the card (nvidia-smi lists it)",
    )


def _driver() -> ctypes.CDLL:
    """The driver's library, ready; raises MissingDependency where there is none, or no GPU."""
    library = _library(DRIVER_LIBRARIES)
    if library is None:
        raise MissingDependency(
            f"No NVIDIA driver is on this machine: {DRIVER_LIBRARIES[0]} was not found.",
            accepted="an NVIDIA GPU with its driver",
            next_step=WITHOUT,
        )
    _ask(library, "cuInit", 0)
    return library


def _ask(driver: ctypes.CDLL, function: str, *arguments: Any) -> None:
    """Call the driver; raises MissingDependency where it refuses."""
    code = getattr(driver, function)(*arguments)
    if code:
        reason = "sees no GPU" if code == _NO_DEVICE else f"fails: {function} gives {code}"
        raise MissingDependency(
            f"The NVIDIA driver of this machine {reason}.",
            accepted="an NVIDIA GPU that nvidia-smi lists",
            next_step=WITHOUT,
        )


def _driver_version(driver: ctypes.CDLL) -> str:
    """The driver's own version, or the newest CUDA that it runs."""
    management = _library(_MANAGEMENT_LIBRARIES)
    text = ctypes.create_string_buffer(96)
    if management is not None and not management.nvmlInit_v2():
        try:
            if not management.nvmlSystemGetDriverVersion(text, len(text)):
                return text.value.decode()
        finally:
            management.nvmlShutdown()
    newest = ctypes.c_int()
    _ask(driver, "cuDriverGetVersion", ctypes.byref(newest))
    return f"CUDA {newest.value // 1000}.{newest.value % 1000 // 10}"


def _library(names: tuple[str, ...]) -> ctypes.CDLL | None:
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
