"""What several tests of this folder share: networks with the numbers of trained ones, and a card
that is not there: its facts are stated, its memory is this process's, its clock a number.
"""

import importlib
import sys
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from latency_tables.ops import OpSpec
from profilers.cuda import Buffer, Card, Cuda, Launch
from profilers.modules import Network
from quant.layers import ActivationQuantiser, Fp8Cast
from quant.precision import ONNXRUNTIME, Runtime

Trained = Callable[..., Network]


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """The suite shares its machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def trained() -> Trained:
    """Networks whose norms are random (a quarter of the factors negative) and whose quantisers
    cover 98 % of what they see on `images`; `settled` norms have the statistics of `images`."""

    def make(
        ops: Sequence[OpSpec],
        images: np.ndarray,
        seed: int = 0,
        runtime: Runtime = ONNXRUNTIME,
        *,
        settled: bool = False,
    ) -> Network:
        torch.manual_seed(seed)
        network = Network(ops, runtime)
        rng = torch.Generator().manual_seed(seed)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                size = (module.num_features,)
                sign = torch.where(torch.rand(size, generator=rng) < 0.25, -1.0, 1.0)
                with torch.no_grad():
                    module.weight.copy_((torch.rand(size, generator=rng) + 0.5) * sign)
                    module.bias.copy_(torch.randn(size, generator=rng) * 0.3)
                    module.running_mean.copy_(torch.randn(size, generator=rng) * 0.3)
                    module.running_var.copy_(torch.rand(size, generator=rng) + 0.5)
                module.momentum = 1.0
        network.train(settled)

        def cover(quantiser: ActivationQuantiser | Fp8Cast, values: tuple[torch.Tensor]) -> None:
            quantiser.limit = 0.98 * float(values[0].abs().max()) + 1e-6

        hooks = [
            module.register_forward_pre_hook(cover)
            for module in network.modules()
            if isinstance(module, ActivationQuantiser | Fp8Cast)
        ]
        with torch.no_grad():
            network(torch.from_numpy(images))
        for hook in hooks:
            hook.remove()
        return network.eval()

    return make


# ---- a card that is not there

CARD = Card("Stated 9000", (8, 9), "580.65", 24_000_000_000)


@pytest.fixture
def stated_card(monkeypatch: pytest.MonkeyPatch) -> Card:
    """The card that the backends find."""
    for name in ("cuda", "trt", "trt_build", "torch_cuda"):
        monkeypatch.setattr(importlib.import_module(f"profilers.{name}"), "card", lambda: CARD)
    return CARD


class StatedCuda(Cuda):
    """CUDA on this process's memory. What is put on the stream is `work`: it runs at once and moves
    the clock on, `now_us`; in a capture it is kept for the replays. `told` lists what happened, and
    at most `free_bytes` can be had.
    """

    def __init__(self) -> None:
        self.name, self.stream = "stated", 77
        self.now_us, self.free_bytes = 0.0, 1 << 40
        self.told: list[str] = []
        self.captures: list[int] = []
        self._capturing: list[tuple[float, Callable[[], object]]] | None = None
        self._stream = SimpleNamespace(synchronize=lambda: self.told.append("wait"))
        self._before, self._after = (
            SimpleNamespace(record=self._mark(name), synchronize=lambda: None)
            for name in ("before", "after")
        )
        self._marks: dict[str, float] = {}

    def work(self, us: float, act: Callable[[], object] = lambda: None) -> None:
        """Put work on the stream."""
        if self._capturing is not None:
            self._capturing.append((us, act))
            return
        self.now_us += us
        act()

    def _mark(self, name: str) -> Callable[[object], None]:
        return lambda stream: self._marks.update({name: self.now_us})

    def _allocate(self, size: int) -> tuple[object, int]:
        if size > self.free_bytes:
            raise MemoryError
        held = np.full(size, 0xAB, np.uint8)
        return held, held.ctypes.data

    def _put(self, buffer: Buffer, content: np.ndarray) -> None:
        self.told.append("put")
        buffer.held[:] = content

    def _get(self, buffer: Buffer) -> np.ndarray:
        return buffer.held.copy()

    def _captured(self, launch: Launch) -> Launch:
        self._capturing = []
        try:
            launch()
        finally:
            kept, self._capturing = self._capturing, None
        self.captures.append(len(kept))

        def replay() -> None:
            for us, act in kept:
                self.work(us, act)

        return replay

    def _between_ms(self) -> float:
        return (self._marks["after"] - self._marks["before"]) / 1000

    def _is_refusal(self, error: Exception) -> bool:
        return isinstance(error, MemoryError)


@pytest.fixture
def stated_cuda(stated_card: Card, monkeypatch: pytest.MonkeyPatch) -> StatedCuda:
    """The memory layer that the backends find; only its own clock passes while blocks are timed."""
    cuda = StatedCuda()
    for name in ("cuda", "trt", "torch_cuda"):
        monkeypatch.setattr(sys.modules[f"profilers.{name}"], "open_cuda", lambda: cuda)
    clock = SimpleNamespace(perf_counter_ns=lambda: int(1000 * cuda.now_us))
    monkeypatch.setattr("profilers.measure.time", clock)
    return cuda
