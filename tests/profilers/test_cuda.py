"""The card and its memory: against a driver that is compiled here, PyCUDA on this process's memory,
a stated clock; and on a real card where there is one (`-m gpu`).
"""

import ctypes
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import profilers.cuda
from profilers.cuda import (
    COPIES,
    SHORT_US,
    STILL_WARM,
    TARGET_US,
    WARM_UPS,
    Buffer,
    Card,
    Cuda,
    GraphTimer,
    PyCuda,
    TorchCuda,
    card,
    open_cuda,
)
from profilers.measure import GPU_PROTOCOL, Protocol
from quant.errors import HwnasError, InvalidInput, MissingDependency

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.int8]

DRIVER = """
#include <string.h>
#include <stddef.h>
#ifndef INIT
#define INIT 0
#endif
#ifndef NAME
#define NAME 0
#endif
int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuDeviceGet(int *device, int place) { *device = 40 + place; return 0; }
int cuDeviceGetName(char *name, int size, int device) {
  strncpy(name, device == 40 ? "Compiled 1" : "another", size);
  return NAME;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = 85520809984; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 9 : attribute == 76 ? 0 : -1;
  return 0;
}
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
"""

MANAGEMENT = """
#include <string.h>
#ifndef NVML
#define NVML 0
#endif
#ifndef VERSION
#define VERSION 0
#endif
static int opened = 0;
int nvmlInit_v2(void) { if (!NVML) opened++; return NVML; }
int nvmlShutdown(void) { opened--; return 0; }
int left_open(void) { return opened; }
int nvmlSystemGetDriverVersion(char *text, unsigned size) {
  strncpy(text, "580.65.06", size);
  return VERSION;
}
"""

Compiled = Callable[..., str]


@pytest.fixture
def compiled(tmp_path: Path) -> Compiled:
    """A shared library of a source with some definitions."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")

    def make(source: str, **defined: int) -> str:
        stem = "-".join(["lib", *(f"{name}{value}" for name, value in defined.items())])
        written, library = tmp_path / f"{stem}.c", tmp_path / f"{stem}-{len(source)}.so"
        written.write_text(source)
        flags = [f"-D{name}={value}" for name, value in defined.items()]
        command = [compiler, "-shared", "-fPIC", *flags, "-o", str(library), str(written)]
        subprocess.run(command, check=True)
        return str(library)

    return make


@pytest.fixture(autouse=True)
def nothing_is_known() -> Iterator[None]:
    """What was found before, and what is found here, is forgotten."""
    card.cache_clear()
    open_cuda.cache_clear()
    yield
    card.cache_clear()
    open_cuda.cache_clear()


Install = Callable[..., None]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Name the libraries that are looked for: the driver's, and that of management."""

    def install(driver: str = "libabsent.so.1", management: str = "libabsent.so.2") -> None:
        monkeypatch.setattr(profilers.cuda, "DRIVER_LIBRARIES", (driver,))
        monkeypatch.setattr(profilers.cuda, "_MANAGEMENT_LIBRARIES", (management,))

    return install


# ---- the card


def test_a_card_is_told_by_its_driver(compiled: Compiled, installed: Install) -> None:
    management = compiled(MANAGEMENT)
    installed(compiled(DRIVER), management)
    assert card() == Card("Compiled 1", (9, 0), "580.65.06", 85520809984)
    assert card().sm == "sm90"
    assert ctypes.CDLL(management).left_open() == 0


@pytest.mark.parametrize("failing", [{"NVML": 12}, {"VERSION": 3}, None])
def test_without_its_management_the_driver_tells_its_cuda(
    failing: dict[str, int] | None, compiled: Compiled, installed: Install
) -> None:
    libraries = [compiled(DRIVER)]
    if failing is not None:
        libraries.append(compiled(MANAGEMENT, **failing))
    installed(*libraries)
    assert card().driver == "CUDA 13.2"


def test_the_second_name_of_a_library_will_do(
    compiled: Compiled, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("libabsent.so.1", compiled(DRIVER))
    monkeypatch.setattr(profilers.cuda, "DRIVER_LIBRARIES", names)
    assert card().name == "Compiled 1"


@pytest.mark.parametrize(
    ("defined", "told"),
    [
        (None, r"No NVIDIA driver is on this machine: libabsent\.so\.1 was not found"),
        ({"INIT": 100}, "The NVIDIA driver of this machine sees no GPU"),
        ({"INIT": 803}, "fails: cuInit gives 803"),
        ({"NAME": 101}, "fails: cuDeviceGetName gives 101"),
    ],
)
@pytest.mark.parametrize("asked", [card, open_cuda], ids=["card", "open_cuda"])
def test_without_a_card_it_is_said_why_and_what_still_works(
    asked: Callable[[], object],
    defined: dict[str, int] | None,
    told: str,
    compiled: Compiled,
    installed: Install,
) -> None:
    installed(*([] if defined is None else [compiled(DRIVER, **defined)]))
    with pytest.raises(MissingDependency, match=told) as caught:
        asked()
    assert "--device cpu" in caught.value.next_step
    assert "\n" not in str(caught.value)


def test_a_card_that_came_late_is_found(compiled: Compiled, installed: Install) -> None:
    """A failure is not remembered; a card is."""
    installed()
    with pytest.raises(MissingDependency):
        card()
    installed(compiled(DRIVER))
    assert card() is card()


# ---- which layer reaches it


@pytest.fixture
def no_torch_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_torch_cuda")
@pytest.mark.parametrize(
    "error", [ImportError("No module named 'pycuda'"), RuntimeError("no context"), OSError("x")]
)
def test_a_card_that_no_layer_reaches_is_a_missing_dependency(
    error: Exception, compiled: Compiled, installed: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed(compiled(DRIVER))

    def refuse(name: str) -> ModuleType:
        raise error

    monkeypatch.setattr(profilers.cuda, "importlib", SimpleNamespace(import_module=refuse))
    with pytest.raises(MissingDependency, match=r"reaches the memory of the Compiled 1") as caught:
        open_cuda()
    assert str(error) in caught.value.what
    assert torch.__version__ in caught.value.what
    assert "a CUDA build of PyTorch, or PyCUDA" in caught.value.accepted


@pytest.mark.usefixtures("no_torch_cuda")
def test_pycuda_serves_where_pytorch_has_no_cuda(
    compiled: Compiled, installed: Install, pycuda: "Pycuda"
) -> None:
    installed(compiled(DRIVER))
    layer = open_cuda()
    assert isinstance(layer, PyCuda)
    assert layer is open_cuda()
    assert layer.name == "PyCUDA 2026.1"
    assert layer.stream == 4321
    assert pycuda.imported[:2] == ["pycuda", "pycuda.autoprimaryctx"]


# ---- PyCUDA


class Pycuda:
    """PyCUDA's driver on this process's memory, and the driver's own graphs, as they are called."""

    Error = type("Error", (Exception,), {})
    MemoryError = type("MemoryError", (Error,), {})
    VERSION_TEXT = "2026.1"

    def __init__(self) -> None:
        self.imported: list[str] = []
        self.called: list[tuple[Any, ...]] = []
        self.now_ms, self.failing = 0.0, {"": 0}
        self.free = 1 << 20

    def import_module(self, name: str) -> "Pycuda":
        self.imported.append(name)
        return self

    def Stream(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(handle=4321, synchronize=lambda: None)

    def Event(self) -> SimpleNamespace:  # noqa: N802
        event = SimpleNamespace(synchronize=lambda: None)
        event.record = lambda stream: setattr(event, "ms", self.now_ms)
        event.time_till = lambda other: other.ms - event.ms
        return event

    def mem_alloc(self, size: int) -> "Memory":
        if size > self.free:
            raise self.MemoryError("cuMemAlloc failed: out of memory")
        return Memory(size)

    def memcpy_htod(self, address: int, source: Any) -> None:
        content = memoryview(source).cast("B")
        ctypes.memmove(address, bytes(content), content.nbytes)

    def memcpy_dtoh(self, target: Any, address: int) -> None:
        content = memoryview(target).cast("B")
        content[:] = ctypes.string_at(address, content.nbytes)

    def __getattr__(self, name: str) -> Callable[..., int]:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            values = [getattr(each, "_obj", each) for each in arguments]
            code = self.failing.get(name, 0)
            if name == "cuStreamEndCapture" and not code:
                values[1].value = 7
            if name == "cuGraphInstantiateWithFlags" and not code:
                values[0].value = 8
            self.called.append((name, *(each.value for each in values)))
            return code

        return call


class Memory:
    """An allocation, which PyCUDA gives as something that is its address."""

    def __init__(self, size: int) -> None:
        self.held = ctypes.create_string_buffer(size)

    def __int__(self) -> int:
        return ctypes.addressof(self.held)


@pytest.fixture
def pycuda(monkeypatch: pytest.MonkeyPatch) -> Pycuda:
    found = Pycuda()
    monkeypatch.setattr(profilers.cuda, "importlib", found)
    return found


@pytest.fixture
def layer(pycuda: Pycuda, stated_card: Card) -> PyCuda:
    return PyCuda(pycuda, pycuda)  # type: ignore[arg-type]


def round_trip(cuda: Cuda, dtype: Any) -> tuple[np.ndarray, np.ndarray]:
    values = np.random.default_rng(0).integers(-100, 100, (2, 3, 4, 5)).astype(dtype)
    strided = values.transpose(0, 2, 3, 1)
    buffer = cuda.buffer(strided.shape, np.dtype(dtype))
    cuda.put(buffer, strided)
    return strided, cuda.get(buffer)


@pytest.mark.parametrize("dtype", DTYPES)
def test_pycuda_copies_every_type_there_and_back(layer: PyCuda, dtype: Any) -> None:
    given_, back = round_trip(layer, dtype)
    assert back.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(back, given_)


def test_pycuda_short_of_memory_is_one_sentence(layer: PyCuda, pycuda: Pycuda) -> None:
    with pytest.raises(InvalidInput, match=r"Stated 9000 has not enough free memory \(24 GB"):
        layer.buffer((pycuda.free + 1,), np.dtype(np.int8))
    with pytest.raises(ZeroDivisionError), layer.enough():
        raise ZeroDivisionError


def test_pycuda_captures_by_the_driver_and_gives_everything_back(
    layer: PyCuda, pycuda: Pycuda
) -> None:
    replay = layer.captured(lambda: pycuda.called.append(("launch",)))
    assert pycuda.called == [
        ("cuStreamBeginCapture_v2", 4321, 1),
        ("launch",),
        ("cuStreamEndCapture", 4321, 7),
        ("cuGraphInstantiateWithFlags", 8, 7, 0),
        ("cuGraphDestroy", 7),
    ]
    pycuda.called.clear()
    replay()
    replay()
    assert pycuda.called == [("cuGraphLaunch", 8, 4321)] * 2
    del replay
    assert pycuda.called[2:] == [("cuGraphExecDestroy", 8)]


def test_pycuda_ends_a_capture_whose_launch_fails(layer: PyCuda, pycuda: Pycuda) -> None:
    def fail() -> None:
        raise InvalidInput("the launch's own reason")

    with pytest.raises(InvalidInput, match="own reason"):
        layer.captured(fail)
    assert [name for name, *_ in pycuda.called] == [
        "cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphDestroy"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("function", "code", "told", "graph"),
    [
        ("cuStreamBeginCapture_v2", 901, "cuStreamBeginCapture_v2 gives 901", False),
        ("cuStreamEndCapture", 901, "cannot be captured .* cuStreamEndCapture gives 901", False),
        ("cuGraphInstantiateWithFlags", 1, "cuGraphInstantiateWithFlags gives 1", True),
        ("cuGraphInstantiateWithFlags", 2, "has not enough free memory", True),
    ],
)
def test_what_pycudas_driver_refuses_is_one_sentence(
    function: str, code: int, told: str, graph: bool, layer: PyCuda, pycuda: Pycuda
) -> None:
    pycuda.failing = {function: code}
    with pytest.raises(HwnasError, match=told) as caught:
        layer.captured(lambda: None)
    assert "\n" not in str(caught.value)
    assert (("cuGraphDestroy", 7) in pycuda.called) == graph


def test_pycuda_times_the_second_of_two_launches(layer: PyCuda, pycuda: Pycuda) -> None:
    times = iter([5.0, 0.25])

    def launch() -> None:
        pycuda.now_ms += next(times)

    assert layer.elapsed_us(launch) == 250
    layer._leave()
    assert layer._stream is None


# ---- PyTorch's capture, without its CUDA


class Graph:
    """PyTorch's graph as it is called; `broken` captures fail when they end."""

    def __init__(self, told: list[str], broken: bool) -> None:
        self.told, self.broken = told, broken

    def capture_begin(self, *, capture_error_mode: str) -> None:
        self.told.append(f"begin {capture_error_mode}")

    def capture_end(self) -> None:
        self.told.append("end")
        if self.broken:
            raise RuntimeError("CUDA error: capture invalidated\nfor debugging")

    def replay(self) -> None:
        self.told.append("replay")


@pytest.fixture(params=[False, True], ids=["whole", "broken"])
def torch_layer(
    request: pytest.FixtureRequest, stated_card: Card, monkeypatch: pytest.MonkeyPatch
) -> TorchCuda:
    told: list[str] = []

    class Current:
        def __init__(self, stream: object) -> None:
            assert stream is layer._stream

        def __enter__(self) -> None:
            told.append("on")

        def __exit__(self, *_: object) -> None:
            told.append("off")

    layer = TorchCuda.__new__(TorchCuda)
    layer._stream = SimpleNamespace(synchronize=lambda: None)
    layer.told, layer.broken = told, request.param  # type: ignore[attr-defined]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(told, request.param))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", Current)
    return layer


def test_pytorch_captures_on_its_stream_or_says_why_not(torch_layer: Any) -> None:
    told = torch_layer.told
    if torch_layer.broken:
        with pytest.raises(HwnasError, match=r"cannot be captured.*capture invalidated") as caught:
            torch_layer.captured(lambda: None)
        assert "\n" not in str(caught.value)
        assert told == ["on", "begin thread_local", "end", "off"]
    else:
        torch_layer.captured(lambda: told.append("launch"))()
        assert told == [
            "on", "begin thread_local", "launch", "end", "off", "on", "replay", "off"
        ]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "seen", "told"),
    [
        (InvalidInput("own reason"), InvalidInput, "own reason"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), InvalidInput, "not enough free"),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), InvalidInput, "not enough free"),
        (RuntimeError("operation not permitted"), HwnasError, "captured.*not permitted"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
)
def test_a_launch_that_fails_in_a_capture_ends_it_and_tells_its_own_reason(
    error: BaseException, seen: type[BaseException], told: str, torch_layer: Any
) -> None:
    def fail() -> None:
        raise error

    with pytest.raises(seen, match=told):
        torch_layer.captured(fail)
    assert torch_layer.told == ["on", "begin thread_local", "end", "off"]


# ---- times of graphs

REPLAYS = 10
"""A timer's own look at a launch."""


def timer_of(cuda: Any, us: float) -> GraphTimer:
    return GraphTimer(cuda, lambda: cuda.work(us))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(us=st.floats(0.01, 5000))
def test_a_block_tells_what_one_launch_takes(us: float, stated_cuda: Any) -> None:
    timer = timer_of(stated_cuda, us)
    short = us < SHORT_US
    assert COPIES[0] <= timer.copies <= COPIES[1] if short else timer.copies == 1
    if short and COPIES[0] < timer.copies < COPIES[1]:
        assert timer.copies * us == pytest.approx(TARGET_US, rel=1 / COPIES[0])
    samples = timer.block(Protocol(warmup_ms=1, block_ms=2, min_runs=3, max_runs=9))
    np.testing.assert_allclose(samples, [[us, 1.0]] * len(samples), rtol=1e-6)


@pytest.mark.parametrize(
    ("us", "copies"), [(0.1, 100), (10.0, 100), (12.5, 80), (49.9, 20), (50.0, 1), (3000.0, 1)]
)
def test_short_launches_are_copied_in_a_graph(us: float, copies: int, stated_cuda: Any) -> None:
    timer = timer_of(stated_cuda, us)
    assert timer.copies == copies
    assert stated_cuda.captures == [1] if copies == 1 else [1, copies]


def test_a_launch_runs_before_it_is_captured(stated_cuda: Any) -> None:
    seen = []
    GraphTimer(stated_cuda, lambda: seen.append(stated_cuda._capturing is None))
    assert seen[: WARM_UPS + 1] == [True] * WARM_UPS + [False]


@pytest.mark.parametrize("us", [10.0, 400.0, 30_000.0])
def test_a_block_warms_up_as_the_protocol_says_and_lasts_as_long(
    us: float, stated_cuda: Any
) -> None:
    """Each time takes two replays: one of them keeps the card at work."""
    timer = timer_of(stated_cuda, us)
    replay_us, start = 2 * us * timer.copies, stated_cuda.now_us
    samples = timer.block(GPU_PROTOCOL)
    spent_us = stated_cuda.now_us - start
    timed_us = len(samples) * replay_us
    assert GPU_PROTOCOL.min_runs <= len(samples) <= GPU_PROTOCOL.max_runs
    warm_us = 1000 * GPU_PROTOCOL.warmup_ms
    assert warm_us <= spent_us - timed_us < warm_us + replay_us + 1
    wanted_us = max(1000 * GPU_PROTOCOL.block_ms, GPU_PROTOCOL.min_runs * replay_us)
    assert timed_us == pytest.approx(wanted_us, abs=2 * replay_us) or len(samples) == 200


def test_a_card_that_just_worked_warms_up_for_a_tenth_and_one_that_rested_in_full(
    stated_cuda: Any,
) -> None:
    timer = timer_of(stated_cuda, 400.0)

    def warm_up_us() -> float:
        start = stated_cuda.now_us
        samples = timer.block(GPU_PROTOCOL)
        return float(stated_cuda.now_us - start - 2 * 400.0 * len(samples))

    full, rest_us = 1000 * GPU_PROTOCOL.warmup_ms, 1000 * GPU_PROTOCOL.warmup_ms
    found = []
    for pause_us in (0.0, 0.0, 0.9 * rest_us, 1.1 * rest_us):
        stated_cuda.now_us += pause_us
        found.append(warm_up_us())
    wanted = [full, STILL_WARM * full, STILL_WARM * full, full]
    assert found == pytest.approx(wanted, abs=2 * 400.0 + 1)


def test_memory_is_refused_in_one_sentence(stated_cuda: Any) -> None:
    stated_cuda.free_bytes = 100
    held = stated_cuda.buffer((5, 5), np.dtype(np.float32))
    assert isinstance(held, Buffer)
    with pytest.raises(InvalidInput, match="Stated 9000 has not enough free memory") as caught:
        stated_cuda.buffer((5, 6), np.dtype(np.float32))
    assert "--batch" in caught.value.next_step


# ---- on a real card


@pytest.fixture(params=["PyTorch", "PyCUDA"])
def real(request: pytest.FixtureRequest) -> Cuda:
    if request.param == "PyTorch":
        if not torch.cuda.is_available():
            pytest.skip(f"PyTorch {torch.__version__} reaches no GPU here")
        return TorchCuda()
    if importlib.util.find_spec("pycuda") is None:
        pytest.skip("PyCUDA is not installed")
    return PyCuda(importlib.import_module("pycuda"), profilers.cuda._driver())


@pytest.mark.gpu
def test_a_real_card_is_what_pytorch_tells(real: Cuda) -> None:
    if not isinstance(real, TorchCuda):
        pytest.skip("told by PyTorch")
    told = torch.cuda.get_device_properties(0)
    found = card()
    assert (found.name, found.capability) == (told.name, (told.major, told.minor))
    assert found.memory_bytes == pytest.approx(told.total_memory, rel=0.02)
    assert found.driver


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_real_card_keeps_every_type(real: Cuda, dtype: Any) -> None:
    given_, back = round_trip(real, dtype)
    assert back.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(back, given_)


@pytest.mark.gpu
def test_a_real_card_short_of_memory_is_one_sentence(real: Cuda) -> None:
    with pytest.raises(InvalidInput, match="has not enough free memory"):
        real.buffer((2 * card().memory_bytes,), np.dtype(np.int8))
    given_, back = round_trip(real, np.float32)
    np.testing.assert_array_equal(back, given_)


SIDES = (512, 4096)
"""Of products that take a card some microseconds and some hundreds of them."""


@pytest.fixture(params=SIDES)
def product(request: pytest.FixtureRequest) -> Iterator[tuple[TorchCuda, Callable[[], None]]]:
    if not torch.cuda.is_available():
        pytest.skip(f"PyTorch {torch.__version__} reaches no GPU here")
    cuda, side = TorchCuda(), request.param
    with cuda.current():
        a, b = torch.rand(2, side, side, device="cuda", dtype=torch.float16)
        out = torch.empty_like(a)

        def launch() -> None:
            torch.mm(a, b, out=out)

        yield cuda, launch
        cuda.wait()


@pytest.mark.gpu
def test_a_graph_takes_as_long_as_many_launches_between_two_events(
    product: tuple[TorchCuda, Callable[[], None]],
) -> None:
    """Launches queue behind each other, so that what a launch costs the process is hidden: long
    products alone, for short ones are quicker than this process puts them there."""
    cuda, launch = product
    timer = GraphTimer(cuda, launch)
    graph_us = float(np.median(timer.block(GPU_PROTOCOL)[:, 0]))

    def many() -> None:
        for _ in range(50):
            launch()

    plain_us = float(np.median([cuda.elapsed_us(many) / 50 for _ in range(20)]))
    if timer.copies == 1:
        assert graph_us == pytest.approx(plain_us, rel=0.1)
    else:
        assert graph_us <= 1.1 * plain_us
        alone_us = min(cuda.elapsed_us(launch) for _ in range(50))
        assert graph_us <= 1.1 * alone_us


@pytest.mark.gpu
def test_copies_in_a_graph_share_its_time(product: tuple[TorchCuda, Callable[[], None]]) -> None:
    cuda, launch = product
    timer = GraphTimer(cuda, launch)
    each = []
    for copies in (20, 80):
        replay = cuda.captured(lambda copies=copies: [launch() for _ in range(copies)])  # type: ignore[misc]
        for _ in range(20):
            replay()
        each.append(np.median([cuda.elapsed_us(replay) for _ in range(30)]) / copies)
    assert each[0] == pytest.approx(each[1], rel=0.1)
    if timer.copies > 1:
        block = timer.block(GPU_PROTOCOL)[:, 0]
        assert float(np.median(block)) == pytest.approx(float(each[1]), rel=0.1)


@pytest.mark.gpu
def test_a_capture_that_fails_leaves_the_stream_as_it_was(
    product: tuple[TorchCuda, Callable[[], None]],
) -> None:
    cuda, launch = product
    before = torch.cuda.current_stream()

    def synchronising() -> None:
        launch()
        torch.cuda.synchronize()

    with pytest.raises(HwnasError, match="cannot be captured in a CUDA graph"):
        cuda.captured(synchronising)
    assert torch.cuda.current_stream() == before
    launch()
    assert cuda.elapsed_us(cuda.captured(launch)) > 0
