"""Compiled quantisers: the same bits as uncompiled ones, one graph each; none where it fails."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from quant import fakequant, kernels
from quant.fakequant import cast, fake_quantise_activation
from quant.kernels import SMALLEST, Kernel
from quant.precision import ONNXRUNTIME, TENSORRT, Grid, Precision

SHAPES = [(4, 32, 17, 19), (300, 128), (SMALLEST,)]
GRIDS = [
    runtime.grid(bits, signed=signed)
    for runtime, bits, signed in itertools.product(
        (ONNXRUNTIME, TENSORRT), (2, 3, 8), (False, True)
    )
]


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels that were never used, in a process where compiling has not failed."""
    monkeypatch.setattr(Kernel, "possible", True)
    for name in ("_on_grid", "_lsq_gradients", "_pact_gradients", "_in_fp8"):
        monkeypatch.setattr(fakequant, name, Kernel(getattr(fakequant, name).function))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def results(
    shape: tuple[int, ...], grid: Grid, pact: bool, relu: bool, seed: int
) -> list[torch.Tensor]:
    """The rounded values and both gradients; the values have exact zeros, ties and outliers."""
    rng = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=rng) * 2
    flat = value.view(-1)
    step = 1.7 / grid.top
    flat[::7] = (torch.randint(-300, 300, flat[::7].shape, generator=rng) + 0.5) * step
    flat[::11] = 0
    flat[::101] *= 1000
    if value.ndim == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    value.requires_grad_()
    limit = torch.tensor(1.7, requires_grad=True)
    rounded = fake_quantise_activation(value, limit, grid, pact=pact, relu=relu)
    rounded.backward(torch.randn(shape, generator=rng))
    assert value.grad is not None
    assert limit.grad is not None
    return [rounded.detach(), value.grad, limit.grad]


@pytest.mark.usefixtures("fresh")
def test_compiled_quantisers_give_the_same_bits_in_one_graph_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch._dynamo.utils.counters.clear()
    cases = [
        (shape, grid, pact, relu, seed)
        for seed, (shape, grid, pact, relu) in enumerate(
            itertools.product(SHAPES, GRIDS, (False, True), (False, True))
        )
        if not relu or grid.low == 0
    ]
    for case in cases:
        found = []
        for switch in ("1", "0"):
            monkeypatch.setenv(kernels.SWITCH, switch)
            found.append(results(*case))
        for compiled, plain in zip(*found, strict=True):
            assert torch.equal(compiled.view(torch.int32), plain.view(torch.int32)), case
    for seed, shape in enumerate(SHAPES):
        value = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 10.0**seed
        casts = []
        for switch in ("1", "0"):
            monkeypatch.setenv(kernels.SWITCH, switch)
            casts.append(cast(value, Precision("fp8")).view(torch.int32))
        assert torch.equal(*casts), shape
    assert Kernel.possible
    counted = torch._dynamo.utils.counters["stats"]
    assert counted["unique_graphs"] == 4  # rounding, LSQ's gradients, PACT's, fp8
    assert not torch._dynamo.utils.counters["graph_break"]


def test_a_kernel_is_compiled_once_it_pays_and_small_tensors_never(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def compiling(function: object, **_: object) -> object:
        return lambda value, *rest: calls.append(value.numel()) or value

    monkeypatch.setattr(torch, "compile", compiling)
    monkeypatch.setattr(kernels, "PAYS_AFTER", 3 * SMALLEST)
    for switch, expected in (("", [SMALLEST] * 2), ("0", []), ("1", [SMALLEST] * 5)):
        monkeypatch.setenv(kernels.SWITCH, switch)
        kernel = Kernel(lambda value: value)
        calls.clear()
        for _ in range(5):
            kernel(torch.zeros(SMALLEST))
            kernel(torch.zeros(SMALLEST - 1))
        assert calls == expected


def test_where_compiling_fails_one_line_says_so_and_results_are_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refusing(function: object, **_: object) -> object:
        def call(*_: object) -> object:
            raise RuntimeError("no compiler here\nand a long trace")

        return call

    monkeypatch.setattr(torch, "compile", refusing)
    monkeypatch.setattr(Kernel, "possible", True)
    monkeypatch.setenv(kernels.SWITCH, "1")
    double, triple = Kernel(lambda value: value * 2), Kernel(lambda value: value * 3)
    ones = torch.ones(SMALLEST)
    for _ in range(3):
        assert torch.equal(double(ones), ones * 2)
        assert torch.equal(triple(ones), ones * 3)
    assert [r.getMessage() for r in caplog.records] == [
        "quantisers run uncompiled, which takes longer: no compiler here (RuntimeError)"
    ]


@pytest.mark.slow
def test_a_process_without_a_compiler_trains_all_the_same(tmp_path: object) -> None:
    program = (
        "import torch\n"
        "from quant.fakequant import fake_quantise_activation\n"
        "from quant.precision import ONNXRUNTIME\n"
        "x = torch.randn(40000, requires_grad=True)\n"
        "grid = ONNXRUNTIME.grid(4, signed=True)\n"
        "fake_quantise_activation(x, torch.tensor(1.0), grid).sum().backward()\n"
        "print(int(x.grad.sum()) > 0)\n"
    )
    environment = {
        **os.environ,
        kernels.SWITCH: "1",
        "CXX": "/nonexistent/g++",
        "PATH": "/nonexistent",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout == "True\n"
    assert done.stderr.count("quantisers run uncompiled") == 1
