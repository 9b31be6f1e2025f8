"""Learned ranges: against Brevitas's layers, to the last bit, the papers' formulas, and PyTorch's
batch norm.
"""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hwnas.placement import HOST, Placement
from quant import layers
from quant.precision import LEAST_SCALE, ONNXRUNTIME, TENSORRT, Grid, Runtime
from quant.ranges import fake_quantise_activation, first_limit, normalise_and_quantise

BITS = (2, 3, 4, 8)
GRIDS = [(bits, signed) for bits, signed in itertools.product(BITS, (False, True))]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- activations


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_a_rounded_activation_equals_brevitas_bit_for_bit(bits: int, signed: bool) -> None:
    grid = ONNXRUNTIME.grid(bits, signed=signed)
    brevitas = layers.ActivationQuantiser(bits, grid)
    for seed, limit in enumerate((0.03, 0.7, 3.3, 250.0)):
        value = _random(2, 3, 7, 7, seed=seed) * limit
        brevitas.limit = limit
        ours = fake_quantise_activation(value, torch.tensor(limit), grid)
        assert torch.equal(ours, brevitas(value))


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_the_gradients_of_an_activation_are_brevitas_with_lsqs_scale(
    bits: int, signed: bool
) -> None:
    grid = ONNXRUNTIME.grid(bits, signed=signed)
    brevitas = layers.ActivationQuantiser(bits, grid)
    for seed, start in enumerate((0.7, 3.3)):
        brevitas.limit = start
        value = _random(2, 3, 5, 5, seed=seed) * 3
        upstream = _random(2, 3, 5, 5, seed=seed + 10)
        theirs = value.clone().requires_grad_()
        brevitas.zero_grad()
        brevitas(theirs).backward(upstream)
        ours, limit = value.clone().requires_grad_(), torch.tensor(start, requires_grad=True)
        fake_quantise_activation(ours, limit, grid).backward(upstream)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=1e-6)
        share = (value.numel() * grid.high) ** -0.5
        expected = _range_gradient(brevitas)
        assert limit.grad is not None
        assert float(limit.grad) == pytest.approx(expected * share, rel=1e-3, abs=1e-5 * share)


def _range_gradient(quantiser: layers.ActivationQuantiser) -> float:
    (parameter,) = quantiser.parameters()
    assert parameter.grad is not None
    return float(parameter.grad)


def test_the_gradient_of_the_limit_matches_equation_3_of_lsq_written_out() -> None:
    """Esser et al. 2019: dx_q/ds is -x/s + round(x/s) inside, and -Q_N or Q_P outside."""
    grid, limit = Grid(-4, 3, 4), 2.0
    values = [-9.0, -2.3, -0.6, 0.0, 0.2, 1.1, 1.9, 8.0]
    step = limit / grid.top
    expected = 0.0
    for value in values:
        code = round(value / step)
        expected += min(max(code, grid.low), grid.high)
        expected -= value / step if grid.low <= code <= grid.high else 0.0
    expected *= (len(values) * grid.high) ** -0.5 / grid.top
    learned = torch.tensor(limit, requires_grad=True)
    fake_quantise_activation(torch.tensor(values), learned, grid).sum().backward()
    assert learned.grad is not None
    assert float(learned.grad) == pytest.approx(expected, rel=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from(BITS),
    signed=st.booleans(),
    limit=st.floats(2**-10, 2**10, width=32),
    values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=30),
)
def test_an_activation_lands_on_a_code_of_the_grid_within_half_a_step(
    bits: int, signed: bool, limit: float, values: list[float]
) -> None:
    for runtime in (ONNXRUNTIME, TENSORRT):
        grid = runtime.grid(bits, signed=signed)
        step = limit / grid.top
        value = torch.tensor(values)
        rounded = fake_quantise_activation(value, torch.tensor(limit), grid)
        codes = rounded.double() / step
        assert torch.all((codes - codes.round()).abs() < 1e-3)
        assert torch.all((codes.round() >= grid.low) & (codes.round() <= grid.high))
        inside = value.clamp(grid.low * step, grid.high * step)
        assert torch.all((rounded - inside).abs() <= 0.501 * step)
        again = fake_quantise_activation(rounded, torch.tensor(limit), grid)
        assert torch.equal(again, rounded)


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_a_fine_ramp_over_the_range_uses_all_codes_of_the_grid(bits: int, signed: bool) -> None:
    for runtime in (ONNXRUNTIME, TENSORRT):
        grid = runtime.grid(bits, signed=signed)
        rounded = fake_quantise_activation(torch.linspace(-2, 2, 9001), torch.tensor(1.0), grid)
        assert len((rounded + 0.0).unique()) == grid.high - grid.low + 1


def test_a_negative_limit_rounds_as_its_magnitude_and_learns_in_the_mirror() -> None:
    grid = ONNXRUNTIME.grid(4, signed=False)
    value, upstream = _random(40), _random(40, seed=1)
    results = []
    for start in (1.5, -1.5):
        limit = torch.tensor(start, requires_grad=True)
        rounded = fake_quantise_activation(value, limit, grid)
        rounded.backward(upstream)
        assert limit.grad is not None
        results.append((rounded.detach(), float(limit.grad)))
    assert torch.equal(results[0][0], results[1][0])
    assert results[0][1] == -results[1][1] != 0


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("signed", [True, False])
def test_the_first_limit_is_lsqs_step_times_the_top_code_up_to_the_largest_value(
    bits: int, signed: bool
) -> None:
    grid = ONNXRUNTIME.grid(bits, signed=signed)
    spread, flat = [1.0] * 9_999 + [-500.0], [1.0, -3.0, 2.0, 0.0]
    for values, lsq in ((spread, True), (flat, False)):
        value = torch.tensor(values, requires_grad=True)
        limit = first_limit(value, grid)
        mean, largest = np.mean(np.abs(values)), np.max(np.abs(values))
        expected = 2 * mean / grid.high**0.5 * grid.top
        assert (expected < largest) == lsq
        assert float(limit) == pytest.approx(expected if lsq else largest, rel=1e-5)
        assert not limit.requires_grad


def test_the_first_limit_of_zeros_is_positive_and_rounds_zeros_to_zeros() -> None:
    grid = ONNXRUNTIME.grid(8, signed=False)
    zeros = torch.zeros(10)
    limit = first_limit(zeros, grid)
    assert float(limit) >= LEAST_SCALE * 0.999
    assert torch.equal(fake_quantise_activation(zeros, limit, grid), zeros)


@pytest.mark.parametrize("pact", [False, True])
@pytest.mark.parametrize("bits", BITS)
def test_a_folded_relu_is_a_relu_and_then_the_quantiser(bits: int, pact: bool) -> None:
    grid = ONNXRUNTIME.grid(bits, signed=False)
    start, upstream = _random(3, 4, 6, 6) * 2, _random(3, 4, 6, 6, seed=1)
    results = []
    for fold in (False, True):
        value, limit = start.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
        given = value if fold else functional.relu(value)
        rounded = fake_quantise_activation(given, limit, grid, pact=pact, relu=fold)
        rounded.backward(upstream)
        results.append((rounded.detach(), value.grad, limit.grad))
    for plain, folded in zip(*results, strict=True):
        assert plain is not None
        assert torch.equal(plain, folded)


@pytest.mark.parametrize("pact", [False, True])
def test_how_values_lie_in_memory_changes_nothing_but_the_order_of_a_sum(pact: bool) -> None:
    grid, start, upstream = Grid(-8, 7, 8), _random(4, 6, 5, 7), _random(4, 6, 5, 7, seed=1)
    results = []
    for layout in (
        lambda x: x,
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0),  # neither
        lambda x: torch.cat([x, x], 1)[:, 6:],  # a part of something larger
    ):
        value, limit = layout(start).detach().requires_grad_(), torch.tensor(1.1).requires_grad_()
        rounded = fake_quantise_activation(value, limit, grid, pact=pact)
        rounded.backward(upstream)
        results.append((rounded.detach(), value.grad, limit.grad))
    for rounded, passed, for_limit in results[1:]:
        assert torch.equal(rounded, results[0][0])
        assert torch.equal(passed, results[0][1])
        torch.testing.assert_close(for_limit, results[0][2], rtol=1e-5, atol=1e-6)


# ---- PACT


@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_pact_rounds_as_lsq_and_learns_as_its_paper(bits: int, signed: bool) -> None:
    """Autograd of the clip itself, min(max(x, -alpha * low / top), alpha * high / top): Choi et al.
    2018, equations 1 to 3, with the rounding passed straight through.
    """
    for runtime in (ONNXRUNTIME, TENSORRT):
        grid = runtime.grid(bits, signed=signed)
        start, upstream = _random(3, 4, 5, 5) * 2, _random(3, 4, 5, 5, seed=1)
        value, alpha = start.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
        rounded = fake_quantise_activation(value, alpha, grid, pact=True)
        assert torch.equal(rounded, fake_quantise_activation(start, alpha, grid))
        rounded.backward(upstream)
        plain, edge = start.clone().requires_grad_(), torch.tensor(1.3, requires_grad=True)
        low, high = edge * (grid.low / grid.top), edge * (grid.high / grid.top)
        torch.minimum(torch.maximum(plain, low), high).backward(upstream)
        assert torch.equal(value.grad, plain.grad)
        assert value.grad.count_nonzero() < value.numel()
        torch.testing.assert_close(alpha.grad, edge.grad, rtol=1e-5, atol=1e-6)
        assert alpha.grad != 0


def test_pacts_alpha_has_gradient_one_from_alpha_on_and_none_below() -> None:
    grid = ONNXRUNTIME.grid(4, signed=False)
    for start in np.random.default_rng(0).uniform(0.01, 50, 200):
        alpha = torch.tensor(float(start), dtype=torch.float32, requires_grad=True)
        for times, expected in (
            (1.0, 1.0),
            (1 + 1e-6, 1.0),
            (3.0, 1.0),
            (1 - 1e-6, 0.0),
            (-2.0, 0),
        ):
            alpha.grad = None
            value = (alpha.detach() * times).requires_grad_()
            fake_quantise_activation(value, alpha, grid, pact=True).backward()
            assert (float(alpha.grad), float(value.grad)) == (expected, float(0.5 < times < 1))


# ---- behind a batch norm

SHAPES = [(8, 24, 6, 6), (16, 3, 8, 8), (5, 7, 3, 3), (64, 16, 1, 1)]
"""Channels of whole vectors and of parts, rows in groups of eight and not, single pixels."""
EPSILON = 1e-5


def _normed(
    shape: tuple[int, ...], seed: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values with means and deviations of their own in each channel, factors, shifts, gradients."""
    channels = (1, shape[1], 1, 1)
    value = _random(*shape, seed=seed) * _random(*channels, seed=seed + 1).exp()
    value = value + _random(*channels, seed=seed + 2)
    gamma, beta = _random(shape[1], seed=seed + 3), _random(shape[1], seed=seed + 4)
    return value, gamma, beta, _random(*shape, seed=seed + 5)


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("pact", [False, True], ids=["lsq", "pact"])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_norm_and_quantiser_in_one_are_pytorchs_norm_and_then_the_quantiser(
    shape: tuple[int, ...], bits: int, pact: bool, relu: bool
) -> None:
    """But for the last bits, by which a value next to a tie gets another code: such are left out of
    the gradients, and few.
    """
    grid = ONNXRUNTIME.grid(bits, signed=not relu)
    value, gamma, beta, upstream = _normed(shape, seed=bits)

    def together(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        return normalise_and_quantise(x, *rest, grid, epsilon=EPSILON, pact=pact, relu=relu)

    def apart(x: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        *norm, limit = rest
        normed = functional.batch_norm(x, None, None, *norm, training=True, eps=EPSILON)
        return fake_quantise_activation(normed, limit, grid, pact=pact, relu=relu)

    given = [t.clone().requires_grad_() for t in (value, gamma, beta, torch.tensor(1.3))]
    rounded = [way(*given) for way in (together, apart)]
    same = (rounded[0] - rounded[1]).abs() < 1e-5
    assert same.float().mean() > 0.999
    found = [torch.autograd.grad(result, given, upstream * same) for result in rounded]
    for ours, plain in zip(*found, strict=True):
        assert ours.shape == plain.shape
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=2e-5 * float(plain.abs().max()))


def test_the_gradient_through_norm_and_quantiser_is_that_of_the_clip_in_double_precision() -> None:
    """With steps so fine that rounding is the identity inside the range: autograd of norm and clip
    is the truth, and our fp32 is as near to it as PyTorch's own norm.
    """
    grid = Grid(-(2**20), 2**20, 2**20)
    value, gamma, beta, upstream = _normed((16, 12, 7, 8), seed=3)
    exact = [t.double().requires_grad_() for t in (value, gamma, beta)]
    truth = functional.batch_norm(exact[0], None, None, *exact[1:], training=True, eps=EPSILON)
    truth = truth.clamp(-1.5, 1.5)
    expected = [truth, *torch.autograd.grad(truth, exact, upstream.double())]
    errors = []
    for one in (True, False):
        given = [t.clone().requires_grad_() for t in (value, gamma, beta)]
        given[0] = value.contiguous(memory_format=torch.channels_last).requires_grad_()
        if one:
            result = normalise_and_quantise(*given, torch.tensor(1.5), grid, epsilon=EPSILON)
        else:
            normed = functional.batch_norm(
                given[0], None, None, *given[1:], training=True, eps=EPSILON
            )
            result = normed.clamp(-1.5, 1.5)
        found = [result, *torch.autograd.grad(result, given, upstream)]
        errors.append([float((f - e).abs().max()) for f, e in zip(found, expected, strict=True)])
    for ours, pytorchs, truth in zip(*errors, expected, strict=True):
        assert ours < 2 * pytorchs + 2e-6 * float(truth.detach().abs().max())


def test_norm_and_quantiser_take_values_as_they_lie() -> None:
    grid = ONNXRUNTIME.grid(4, signed=True)
    value, gamma, beta, upstream = _normed((8, 16, 5, 5), seed=4)
    found = []
    for layout in (torch.contiguous_format, torch.channels_last):
        given = [
            value.contiguous(memory_format=layout).requires_grad_(),
            *(t.clone().requires_grad_() for t in (gamma, beta, torch.tensor(1.1))),
        ]
        result = normalise_and_quantise(*given, grid, epsilon=EPSILON)
        found.append(torch.autograd.grad(result, given, upstream.contiguous(memory_format=layout)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


# ---- values of fewer bits, as a training step in bf16 has them


@pytest.mark.parametrize("pact", [False, True], ids=["lsq", "pact"])
@pytest.mark.parametrize("runtime", [ONNXRUNTIME, TENSORRT], ids=["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_values_in_bf16_have_the_codes_and_gradients_of_fp32(
    bits: int, signed: bool, runtime: Runtime, pact: bool
) -> None:
    grid = runtime.grid(bits, signed=signed)
    value, gradient = (_random(8, 64, 5, 5, seed=seed).bfloat16() for seed in (1, 2))
    found = []
    for held in (value, value.float()):
        x, limit = held.clone().requires_grad_(), torch.tensor(1.7, requires_grad=True)
        rounded = fake_quantise_activation(x, limit, grid, pact=pact, relu=grid.low == 0)
        rounded.backward(gradient.to(held.dtype))
        assert rounded.dtype == held.dtype
        assert x.grad is not None
        assert x.grad.dtype == held.dtype
        assert limit.grad is not None
        assert limit.grad.dtype == torch.float32
        found.append((rounded.detach(), x.grad, limit.grad))
    (short, short_x, short_limit), (exact, exact_x, exact_limit) = found
    assert torch.equal(short, exact.bfloat16())
    assert torch.equal(short_x, exact_x.bfloat16())
    assert torch.equal(short_limit, exact_limit)
    if grid.high <= 127:
        scale = 1.7 / grid.top
        assert torch.equal((short.float() / scale).round(), (exact / scale).round())


def test_arithmetic_in_bf16_would_move_codes() -> None:
    """The negative control: the same formula, computed in bf16 throughout."""
    grid = ONNXRUNTIME.grid(8, signed=True)
    value, limit = _random(4096).bfloat16(), torch.tensor(1.7)
    scale = (limit / grid.top).bfloat16()
    computed = (value / scale).round().clamp(grid.low, grid.high) * scale
    assert not torch.equal(computed, fake_quantise_activation(value, limit, grid))


def test_a_first_range_is_measured_in_fp32() -> None:
    grid = ONNXRUNTIME.grid(8, signed=True)
    value = _random(64, 64).bfloat16()
    assert torch.equal(first_limit(value, grid), first_limit(value.float(), grid))


# ---- a card


@pytest.mark.gpu
@pytest.mark.parametrize("pact", [False, True], ids=["lsq", "pact"])
@pytest.mark.parametrize(("bits", "signed"), GRIDS)
def test_on_a_card_codes_are_those_of_a_cpu_to_the_last_bit(
    bits: int, signed: bool, pact: bool, cuda: Placement
) -> None:
    """Scales too, which are quotients by numbers of the host; gradients but for a sum's order."""
    grid = ONNXRUNTIME.grid(bits, signed=signed)
    for seed in range(20):
        value = _random(8, 64, 5, 5, seed=seed)
        start = torch.rand((), generator=torch.Generator().manual_seed(seed)) * 3 + 0.1
        found = []
        for device in (HOST.device, cuda.device):
            x = value.to(device).requires_grad_()
            limit = start.to(device).requires_grad_()
            rounded = fake_quantise_activation(x, limit, grid, pact=pact)
            rounded.backward(_random(8, 64, 5, 5, seed=seed + 100).to(device))
            assert x.grad is not None
            assert limit.grad is not None
            found.append([t.detach().cpu() for t in (rounded, x.grad, limit.grad)])
        (here, here_x, here_limit), (there, there_x, there_limit) = found
        assert torch.equal(here, there)
        assert torch.equal(here_x, there_x)
        torch.testing.assert_close(there_limit, here_limit, rtol=1e-3, atol=1e-4)
