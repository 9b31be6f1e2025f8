"""Fake quantisation: against Brevitas's layers, to the last bit, and the papers' formulas."""

import itertools

import numpy as np
import pytest
import torch

from hwnas.placement import Placement
from quant import layers
from quant.fakequant import (
    cast,
    dorefa_weight,
    fake_quantise_weight,
    round_weight,
)
from quant.precision import Precision

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


@pytest.mark.parametrize("name", ["fp8", "fp16", "bf16"])
def test_casting_values_in_bf16_is_casting_them_in_fp32(name: str) -> None:
    value = _random(8, 16, 5, 5).bfloat16() * 10
    found = cast(value, Precision(name))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, cast(value.float(), Precision(name)).bfloat16())


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
@pytest.mark.parametrize("precision", ["w8a8", "w4a4", "w2a4", "fp8", "fp16"])
def test_on_a_card_weights_are_rounded_as_on_a_cpu(precision: str, cuda: Placement) -> None:
    """DoReFa is left out: its tanh has a last bit of its own on every device."""
    for seed in range(20):
        weight = _random(24, 12, 3, 3, seed=seed)
        here = round_weight(weight, Precision(precision))
        assert torch.equal(round_weight(weight.to(cuda.device), Precision(precision)).cpu(), here)
