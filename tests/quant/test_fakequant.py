"""Fake quantisation: against Brevitas's layers, to the last bit, and the papers' formulas."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hwnas.placement import HOST, Placement
from quant import layers
from quant.fakequant import (
    LEAST_SCALE,
    cast,
    dorefa_weight,
    fake_quantise_activation,
    fake_quantise_weight,
    first_limit,
    round_weight,
)
from quant.precision import ONNXRUNTIME, TENSORRT, Grid, Precision, Runtime

BITS = (2, 3, 4, 8)
GRIDS = [(bits, signed) for bits, signed in itertools.product(BITS, (False, True))]


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _brevitas(weight: torch.Tensor, bits: int) -> torch.nn.Module:
    """The Brevitas layer that holds a weight (out, in, k, k) or (out, in)."""
    precision = Precision(f"w{bits}a8")
    out, channels, *kernel = weight.shape
    layer: torch.nn.Module
    if kernel:
        layer = layers.conv(
            channels, out, kernel=kernel[0], stride=1, groups=1, bias=False, precision=precision
        )
    else:
        layer = layers.linear(channels, out, precision=precision)
    with torch.no_grad():
        layer.weight.copy_(weight)
    return layer


# ---- weights


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (12, 1, 5, 5), (10, 32)], ids=str)
@pytest.mark.parametrize("bits", BITS)
def test_a_rounded_weight_equals_brevitas_bit_for_bit(bits: int, shape: tuple[int, ...]) -> None:
    for seed in range(5):
        weight = _random(*shape, seed=seed) * 10.0 ** (seed - 3)
        expected = _brevitas(weight, bits).quant_weight().value
        assert torch.equal(fake_quantise_weight(weight, bits), expected)


@pytest.mark.parametrize("bits", BITS)
def test_a_long_channel_uses_every_level_and_no_other(bits: int) -> None:
    rounded = fake_quantise_weight(torch.linspace(-1, 1, 4001).repeat(2, 1), bits)
    assert len((rounded[0] + 0.0).unique()) == 2**bits - 1  # -0.0 is 0.0


@pytest.mark.parametrize("bits", BITS)
def test_the_largest_value_of_a_channel_stays_and_no_value_moves_more_than_half_a_step(
    bits: int,
) -> None:
    weight = _random(5, 3, 3, 3)
    rounded = fake_quantise_weight(weight, bits)
    top = weight.abs().flatten(1).amax(1)
    torch.testing.assert_close(rounded.abs().flatten(1).amax(1), top, rtol=1e-6, atol=0)
    step = top / (2 ** (bits - 1) - 1)
    moved = (rounded - weight).abs().flatten(1).amax(1)
    assert torch.all(moved <= step * 0.5001)


@pytest.mark.parametrize("bits", BITS)
def test_rounding_a_rounded_weight_keeps_its_codes(bits: int) -> None:
    once = fake_quantise_weight(_random(8, 4, 3, 3), bits)
    twice = fake_quantise_weight(once, bits)
    torch.testing.assert_close(twice, once, rtol=1e-6, atol=0)


def test_a_channel_of_zeros_stays_zeros_and_does_not_touch_its_neighbours() -> None:
    weight = _random(3, 4, 3, 3)
    weight[1] = 0
    rounded = fake_quantise_weight(weight, 8)
    assert torch.all(rounded[1] == 0)
    others = fake_quantise_weight(weight[[0, 2]], 8)
    assert torch.equal(rounded[[0, 2]], others)


def test_a_slice_of_channels_rounds_as_it_does_inside_the_whole() -> None:
    weight = _random(8, 4, 3, 3)
    whole = fake_quantise_weight(weight, 4)
    assert torch.equal(fake_quantise_weight(weight[:5], 4), whole[:5])
    assert not torch.equal(fake_quantise_weight(weight[:, :2], 4), whole[:, :2])


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_a_weight_passes_unchanged(bits: int) -> None:
    weight = _random(6, 4, 3, 3).requires_grad_()
    upstream = _random(6, 4, 3, 3, seed=1)
    fake_quantise_weight(weight, bits).backward(upstream)
    assert weight.grad is not None
    assert torch.equal(weight.grad, upstream)


@pytest.mark.parametrize("bits", BITS)
def test_the_gradient_of_a_weight_is_brevitas_but_for_each_channels_largest(bits: int) -> None:
    """Brevitas also differentiates the range, which only the largest value of a channel sets."""
    weight = _random(6, 4, 3, 3)
    layer = _brevitas(weight, bits)
    upstream = _random(6, 4, 3, 3, seed=1)
    layer.quant_weight().value.backward(upstream)
    ours = weight.clone().requires_grad_()
    fake_quantise_weight(ours, bits).backward(upstream)
    assert ours.grad is not None
    difference = (layer.weight.grad - ours.grad).abs().flatten(1)
    assert torch.equal((difference > 1e-6).sum(1), torch.ones(6, dtype=torch.int64))
    assert torch.equal(difference.argmax(1), weight.abs().flatten(1).argmax(1))


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


# ---- DoReFa


@pytest.mark.parametrize("bits", range(1, 9))
def test_dorefa_weights_are_the_papers_formula_on_all_of_its_levels(bits: int) -> None:
    """Zhou et al. 2016: w_q = 2 quantise_k(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, in double."""
    weight = torch.linspace(-2.5, 2.5, 40_001)
    levels = 2**bits - 1
    if bits == 1:
        expected = np.where(weight >= 0, 1, -1) * weight.abs().double().mean().item()
    else:
        squashed = np.tanh(weight.double().numpy())
        share = squashed / (2 * np.abs(squashed).max()) + 0.5
        expected = 2 * np.rint(share * levels) / levels - 1
    found = dorefa_weight(weight, bits)
    assert len(found.unique()) == 2**bits
    differing = np.abs(found.numpy() - expected) > 1e-5
    assert differing.mean() < 1e-4  # a share that lies on half a step in fp32 alone


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_dorefas_gradient_is_that_of_its_formula_without_the_rounding(bits: int) -> None:
    """Finite differences in double of tanh(w) / max|tanh(w)|, the maximum included."""
    weight, upstream = _random(4, 3, 2, 2), _random(4, 3, 2, 2, seed=1)
    ours = weight.clone().requires_grad_()
    dorefa_weight(ours, bits).backward(upstream)

    def smooth(values: np.ndarray) -> float:
        squashed = np.tanh(values)
        return float((squashed / np.abs(squashed).max() * upstream.numpy()).sum())

    point, step = weight.double().numpy(), 1e-6
    for place in np.ndindex(point.shape):
        moved = np.zeros_like(point)
        moved[place] = step
        slope = (smooth(point + moved) - smooth(point - moved)) / (2 * step)
        assert float(ours.grad[place]) == pytest.approx(slope, rel=1e-3, abs=1e-4)


def test_one_bit_dorefa_passes_its_gradient_straight_and_has_no_zero() -> None:
    weight, upstream = _random(4, 3, 2, 2), _random(4, 3, 2, 2, seed=1)
    weight[0] = 0
    ours = weight.clone().requires_grad_()
    rounded = dorefa_weight(ours, 1)
    rounded.backward(upstream)
    assert torch.equal(ours.grad, upstream)
    assert torch.all(rounded.abs() == weight.abs().mean())


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_dorefa_weights_of_zeros_are_finite(bits: int) -> None:
    weight = torch.zeros(3, 2, 1, 1, requires_grad=True)
    rounded = dorefa_weight(weight, bits)
    rounded.sum().backward()
    assert torch.isfinite(rounded).all()
    assert torch.isfinite(weight.grad).all()


# ---- floats


def _nearest(values: np.ndarray, table: np.ndarray) -> np.ndarray:
    """The nearest number of a sorted table, for values that lie half-way between none."""
    place = np.clip(np.searchsorted(table, values), 1, len(table) - 1)
    below, above = table[place - 1], table[place]
    return np.where(values - below < above - values, below, above)


@pytest.mark.parametrize(("name", "exponent", "mantissa"), [("fp16", 5, 10), ("bf16", 8, 7)])
def test_a_cast_float_has_the_types_significant_bits(
    name: str, exponent: int, mantissa: int
) -> None:
    value = _random(10_000) * 3
    fraction, power = np.frexp(value.double().numpy())
    expected = np.ldexp(np.rint(np.ldexp(fraction, mantissa + 1)), power - mantissa - 1)
    np.testing.assert_allclose(
        cast(value, Precision(name)).numpy(), expected, rtol=0, atol=2.0 ** -(2 ** (exponent - 1))
    )


def test_fp8_is_the_nearest_e4m3_number_under_one_scale_for_the_tensor() -> None:
    positive = [m / 8 * 2.0**-6 for m in range(8)]
    positive += [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    positive.remove(480.0)  # the code of NaN
    table = np.unique([*positive, *(-x for x in positive)])
    assert table[-1] == 448
    for factor in (1e-6, 1.0, 1e4):
        value = _random(5_000) * factor
        scale = float(value.abs().max()) / 448
        expected = _nearest(value.double().numpy() / scale, table) * scale
        found = cast(value, Precision("fp8")).double().numpy()
        assert (np.abs(found - expected) > 1e-6 * np.abs(expected)).mean() < 1e-3  # ties in fp32
        assert len(np.unique(found)) > 100


def test_fp8_with_a_limit_is_the_cast_of_clipped_values_beside_the_limit() -> None:
    """A tensor whose largest value is the limit has its scale: another way to the same bits."""
    value, precision = _random(5_000), Precision("fp8")
    for limit in (0.5, 1.7, 100.0):
        end = torch.tensor(limit)
        beside = cast(torch.cat([value.clamp(-limit, limit), end.view(1)]), precision)
        assert torch.equal(cast(value, precision, end), beside[:-1])
    unset = torch.tensor(torch.nan)
    assert torch.equal(cast(value, precision, unset), cast(value, precision))


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp8"])
def test_a_cast_passes_its_gradient_straight_and_leaves_what_it_made(name: str) -> None:
    precision = Precision(name)
    value, upstream = _random(4, 3, 5, 5).requires_grad_(), _random(4, 3, 5, 5, seed=1) * 1e-9
    rounded = cast(value, precision)
    rounded.backward(upstream)
    assert torch.equal(value.grad, upstream)  # 1e-9 would be 0 in fp16
    assert not torch.equal(rounded, value)
    torch.testing.assert_close(cast(rounded, precision), rounded, rtol=3e-7, atol=0)
    assert torch.equal(cast(torch.zeros(3), precision), torch.zeros(3))


def test_the_scheme_follows_from_the_precision() -> None:
    weight = _random(4, 3, 3, 3)
    for name, expected in {
        "fp32": weight,
        "tf32": weight,
        "fp16": weight.half().float(),
        "bf16": weight.bfloat16().float(),
        "fp8": cast(weight, Precision("fp8")),
        "w4a8": fake_quantise_weight(weight, 4),
        "pact-w4a8": dorefa_weight(weight, 4),
    }.items():
        assert torch.equal(round_weight(weight, Precision(name)), expected), name


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


@pytest.mark.parametrize("name", ["fp8", "fp16", "bf16"])
def test_casting_values_in_bf16_is_casting_them_in_fp32(name: str) -> None:
    value = _random(8, 16, 5, 5).bfloat16() * 10
    found = cast(value, Precision(name))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, cast(value.float(), Precision(name)).bfloat16())


def test_a_first_range_is_measured_in_fp32() -> None:
    grid = ONNXRUNTIME.grid(8, signed=True)
    value = _random(64, 64).bfloat16()
    assert torch.equal(first_limit(value, grid), first_limit(value.float(), grid))


@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w2a4", "pact-w4a4"])
def test_a_convolution_under_autocast_rounds_its_weight_in_fp32(precision: str) -> None:
    """What the convolution gets is the rounded weight, cast once: images of one bright pixel read
    it back.
    """
    layer = layers.conv(
        16, 8, kernel=1, stride=1, groups=1, bias=False, precision=Precision(precision)
    )
    with torch.autocast("cpu", torch.bfloat16):
        found = layer(torch.eye(16).reshape(16, 16, 1, 1))
    assert found.dtype == torch.bfloat16
    exact = round_weight(layer.weight.detach(), Precision(precision))
    assert torch.equal(found[:, :, 0, 0].T, exact[:, :, 0, 0].bfloat16())


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


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w2a4", "fp8", "fp16"])
def test_on_a_card_weights_are_rounded_as_on_a_cpu(precision: str, cuda: Placement) -> None:
    """DoReFa is left out: its tanh has a last bit of its own on every device."""
    for seed in range(20):
        weight = _random(24, 12, 3, 3, seed=seed)
        here = round_weight(weight, Precision(precision))
        assert torch.equal(round_weight(weight.to(cuda.device), Precision(precision)).cpu(), here)
