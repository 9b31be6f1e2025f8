"""Compiled quantisers: the same bits as uncompiled ones, one graph each; none where it fails."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from hwnas.placement import Placement
from quant import fakequant, kernels, ranges
from quant.fakequant import cast, fake_quantise_weight
from quant.kernels import APART_SMALLEST, GROUP, SMALLEST, Kernel, Sums
from quant.precision import ONNXRUNTIME, TENSORRT, Grid, Precision
from quant.ranges import fake_quantise_activation, normalise_and_quantise

SHAPES = [(4, 32, 17, 19), (8, 33, 12, 12), (300, 128), (SMALLEST,)]
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
    for module in (fakequant, ranges):
        for name, known in vars(module).copy().items():
            if isinstance(known, Kernel):
                monkeypatch.setattr(module, name, type(known)(known.function))
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def results(
    shape: tuple[int, ...], grid: Grid, pact: bool, relu: bool, seed: int
) -> list[torch.Tensor]:
    """The rounded values and all gradients, and those behind a norm where there are channels; the
    values have exact zeros, ties and outliers.
    """
    rng = torch.Generator().manual_seed(seed)
    value = torch.randn(shape, generator=rng) * 2
    flat = value.view(-1)
    step = 1.7 / grid.top
    flat[::7] = (torch.randint(-300, 300, flat[::7].shape, generator=rng) + 0.5) * step
    flat[::11] = 0
    flat[::101] *= 1000
    if value.ndim == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    gradient = torch.randn(shape, generator=rng)
    given = [value.requires_grad_(), torch.tensor(1.7, requires_grad=True)]
    rounded = fake_quantise_activation(*given, grid, pact=pact, relu=relu)
    found = [rounded.detach(), *torch.autograd.grad(rounded, given, gradient)]
    if value.ndim == 4:
        norm = [torch.randn(shape[1], generator=rng).requires_grad_() for _ in range(2)]
        given[1:1] = norm
        rounded = normalise_and_quantise(*given, grid, epsilon=1e-5, pact=pact, relu=relu)
        found += [rounded.detach(), *torch.autograd.grad(rounded, given, gradient)]
    return found


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
    for seed, shape in enumerate([(64, 64, 3, 3), (300, 128), (1200, 5, 3, 3)]):
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        for bits in (2, 8):
            levels = []
            for switch in ("1", "0"):
                monkeypatch.setenv(kernels.SWITCH, switch)
                levels.append(fake_quantise_weight(weight, bits).view(torch.int32))
            assert torch.equal(*levels), shape
    assert Kernel.possible
    counted = torch._dynamo.utils.counters["stats"]
    once = 5  # weights; rounding, and behind a norm; through the norm; fp8
    by_group = 2 * 4  # LSQ's gradients and PACT's, and behind a norm; rows in groups, and in ones
    assert counted["unique_graphs"] == once + by_group
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
        "from quant.ranges import fake_quantise_activation\n"
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


# ---- devices apart


class Elsewhere:
    """What a kernel asks of a value, of one on another device."""

    def __init__(self, count: int, device: str = "cuda") -> None:
        self.count, self.device = count, torch.device(device)

    def numel(self) -> int:
        return self.count


@pytest.mark.parametrize("exact", [True, False])
def test_on_a_device_apart_compiling_needs_larger_tensors_and_exact_quotients(
    exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "divides", lambda: exact)
    monkeypatch.setattr(kernels, "APART_PAYS_AFTER", 3 * APART_SMALLEST)
    for switch, expected in (("", [0, 0, 0, 1, 1]), ("0", [0] * 5), ("1", [1] * 5)):
        monkeypatch.setenv(kernels.SWITCH, switch)
        kernel = Kernel(lambda value: value)
        assert not kernel._compiles(Elsewhere(APART_SMALLEST - 1))  # type: ignore[arg-type]
        found = [kernel._compiles(Elsewhere(APART_SMALLEST)) for _ in range(5)]  # type: ignore[arg-type]
        assert found == [bool(x) and exact for x in expected]


def test_the_option_for_exact_quotients_is_passed_where_the_compiler_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given: list[object] = []
    monkeypatch.setattr(torch, "compile", lambda f, **options: given.append(options["options"]))
    for known in (True, False):
        monkeypatch.setattr(kernels, "divides", lambda known=known: known)
        _ = Kernel(lambda value: value).compiled
    assert given == [{kernels.CUTS: 0, kernels.DIVISION: True}, {kernels.CUTS: 0}]


@pytest.mark.parametrize("group", [1, 2, GROUP])
def test_sums_are_those_of_each_group_in_order_in_both_forms(group: int) -> None:
    rng = torch.Generator().manual_seed(0)
    value, other = (torch.randn(50, group, 33, generator=rng) for _ in range(2))
    factor = torch.randn(33, generator=rng)
    kernel = Sums(lambda x, y, f: (x + y, x * y * f, x * f))
    for form in (kernel.as_written, kernel.to_compile()):
        whole, products, scaled = form(value, other, factor)
        assert torch.equal(whole, value + other)
        for found, parts in ((products, value * other * factor), (scaled, value * factor)):
            expected = parts[:, 0]
            for place in range(1, group):
                expected = expected + parts[:, place]
            assert torch.equal(found, expected)
            torch.testing.assert_close(found, parts.double().sum(1).float())


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_card_compiled_quantisers_give_the_same_codes(
    dtype: torch.dtype, cuda: Placement, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, and the gradients of values too; those of ranges but for a sum's order."""
    shape = (4, 64, 65, 67)
    assert APART_SMALLEST < 4 * 64 * 65 * 67
    for grid in GRIDS:
        for pact in (False, True):
            found = []
            for switch in ("1", "0"):
                monkeypatch.setenv(kernels.SWITCH, switch)
                rng = torch.Generator(cuda.device).manual_seed(1)
                value, gradient = (
                    torch.randn(shape, device=cuda.device, generator=rng).to(dtype)
                    for _ in range(2)
                )
                value = value.contiguous(memory_format=torch.channels_last).requires_grad_()
                limit = torch.tensor(1.7, device=cuda.device, requires_grad=True)
                rounded = fake_quantise_activation(value, limit, grid, pact=pact)
                rounded.backward(gradient)
                assert value.grad is not None
                assert limit.grad is not None
                found.append((rounded.detach(), value.grad, limit.grad))
            (codes, passed, steps), (plain_codes, plain_passed, plain_steps) = found
            assert torch.equal(codes, plain_codes), grid
            assert torch.equal(passed, plain_passed), grid
            torch.testing.assert_close(steps, plain_steps, rtol=1e-3, atol=1e-4)
    assert Kernel.possible
