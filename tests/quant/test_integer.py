"""From a trained layer to an integer kernel, against PyTorch's convolution and batch norm."""

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from quant.errors import InvalidInput
from quant.fakequant import dorefa_weight, fake_quantise_weight
from quant.integer import (
    Floats,
    IntegerWeights,
    Norm,
    bias_codes,
    fold_dorefa,
    fold_float,
    fold_integer,
    packed,
)
from quant.precision import weight_top

INT32_TOP = 2**31 - 1


def _floats(rng: np.random.Generator, *shape: int) -> Floats:
    return rng.standard_normal(shape).astype(np.float32)


def _norm(rng: np.random.Generator, channels: int) -> Norm:
    """A trained-looking norm: about half of the gammas are negative, the first one is zero."""
    gamma = _floats(rng, channels)
    gamma[0] = 0
    return Norm(
        gamma=gamma,
        beta=_floats(rng, channels),
        mean=_floats(rng, channels),
        variance=rng.uniform(0.1, 3, channels).astype(np.float32),
        epsilon=1e-5,
    )


def _reference(
    value: npt.NDArray[np.float64],
    weight: npt.NDArray[np.float64],
    bias: Floats | None,
    norm: Norm | None,
) -> npt.NDArray[np.float64]:
    """Convolution (or linear) and batch norm by PyTorch, in double precision."""

    def double(array: npt.NDArray[np.floating]) -> torch.Tensor:
        return torch.from_numpy(array.astype(np.float64))

    shift = None if bias is None else double(bias)
    if weight.ndim == 4:
        result = functional.conv2d(double(value), double(weight), shift, padding=1)
    else:
        result = functional.linear(double(value), double(weight), shift)
    if norm is not None:
        result = functional.batch_norm(
            result,
            double(norm.mean),
            double(norm.variance),
            double(norm.gamma),
            double(norm.beta),
            eps=norm.epsilon,
        )
    array: npt.NDArray[np.float64] = result.numpy()
    return array


SHAPES = [((6, 4, 3, 3), (2, 4, 7, 7)), ((6, 20), (3, 20))]
CASES = [(b, n) for b in (False, True) for n in (False, True)]


@pytest.mark.parametrize(("weight_shape", "value_shape"), SHAPES, ids=["conv", "linear"])
@pytest.mark.parametrize(("with_bias", "with_norm"), CASES)
def test_a_folded_float_layer_equals_layer_then_norm(
    weight_shape: tuple[int, ...], value_shape: tuple[int, ...], with_bias: bool, with_norm: bool
) -> None:
    rng = np.random.default_rng(0)
    weight, value = _floats(rng, *weight_shape), _floats(rng, *value_shape)
    bias = _floats(rng, 6) if with_bias else None
    norm = _norm(rng, 6) if with_norm else None
    folded = fold_float(weight, bias, norm)
    assert folded.weight.dtype == folded.bias.dtype == np.float32
    found = _reference(value.astype(float), folded.weight.astype(float), folded.bias, None)
    expected = _reference(value.astype(float), weight.astype(float), bias, norm)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("weight_shape", "value_shape"), SHAPES, ids=["conv", "linear"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("with_bias", "with_norm"), CASES)
def test_an_integer_kernel_is_within_one_step_of_fake_quantised_layer_then_norm(
    weight_shape: tuple[int, ...],
    value_shape: tuple[int, ...],
    bits: int,
    with_bias: bool,
    with_norm: bool,
) -> None:
    """A step of the accumulator is input_scale * kernel_scale[out].

    The bias is rounded to it, which costs half a step; the float32 factors cost the rest, for sums
    of up to 10^6 steps.
    """
    rng = np.random.default_rng(bits)
    weight = _floats(rng, *weight_shape)
    bias = _floats(rng, 6) if with_bias else None
    norm = _norm(rng, 6) if with_norm else None
    codes_in = rng.integers(-128, 128, value_shape)
    input_scale = float(np.float32(0.037))
    codes, weights = bias_codes(fold_integer(weight, bits, bias, norm), input_scale)

    trained = fake_quantise_weight(torch.from_numpy(weight), bits).numpy()
    expected = _reference(codes_in * input_scale, trained.astype(float), bias, norm)
    sums = _reference(codes_in.astype(float), weights.kernel_codes.astype(float), None, None)
    channels = (1, -1, *[1] * (sums.ndim - 2))
    step = (input_scale * weights.kernel_scale.astype(float)).reshape(channels)
    assert np.all(np.abs(sums) + np.abs(codes).reshape(channels) <= INT32_TOP)
    found = (sums + codes.reshape(channels)) * step
    assert np.max(np.abs(found - expected) / step) <= 1


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 20)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_times_scale_are_the_fake_quantised_weight(bits: int, shape: tuple[int, ...]) -> None:
    weight = _floats(np.random.default_rng(1), *shape)
    folded = fold_integer(weight, bits, None, None)
    scale = folded.scale.reshape(-1, *[1] * (len(shape) - 1))
    trained = fake_quantise_weight(torch.from_numpy(weight), bits).numpy()
    np.testing.assert_array_equal(folded.codes * scale, trained)
    assert np.abs(folded.codes).max() == weight_top(bits)
    assert np.all(folded.bias == 0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_folding_changes_no_code_but_signs_and_channels_that_the_norm_switches_off(
    bits: int,
) -> None:
    rng = np.random.default_rng(2)
    weight, norm = _floats(rng, 8, 4, 3, 3), _norm(rng, 8)
    assert (norm.gamma == 0).any()
    assert (norm.gamma < 0).any()
    assert (norm.gamma > 0).any()
    plain = fold_integer(weight, bits, None, None)
    folded = fold_integer(weight, bits, None, norm)
    sign = np.sign(norm.gamma).astype(np.int8).reshape(-1, 1, 1, 1)
    np.testing.assert_array_equal(folded.codes, plain.codes * sign)
    assert folded.codes.dtype == np.int8
    assert np.all(folded.scale > 0)


def test_a_channel_with_zero_gamma_gives_its_beta_whatever_comes_in() -> None:
    rng = np.random.default_rng(3)
    norm = _norm(rng, 4)
    folded = fold_integer(_floats(rng, 4, 2, 3, 3), 8, _floats(rng, 4), norm)
    assert np.all(folded.codes[0] == 0)
    assert (folded.scale[0], folded.bias[0]) == (1, norm.beta[0])


def test_a_channel_of_zeros_keeps_its_bias() -> None:
    weight = _floats(np.random.default_rng(4), 3, 4, 3, 3)
    weight[1] = 0
    bias = np.array([0.5, -0.25, 2], np.float32)
    folded = fold_integer(weight, 8, bias, None)
    assert np.all(folded.codes[1] == 0)
    np.testing.assert_array_equal(folded.bias, bias)
    codes, weights = bias_codes(folded, 2**-10)
    assert codes[1] == -256  # a channel of zeros has scale 1
    assert np.all(np.isfinite(weights.scale))


def test_half_a_step_rounds_to_the_even_code() -> None:
    weight = np.array([[7.0, 0.5, 1.5, 2.5, -0.5, -1.5]], np.float32)
    assert fold_integer(weight, 4, None, None).codes.tolist() == [[7, 0, 2, 2, 0, -2]]


@settings(max_examples=300, deadline=None)
@given(
    scale=st.floats(-36, 0),
    bias=st.floats(-1e4, 1e4, width=32),
    input_scale=st.floats(-5, 2),
    seed=st.integers(0, 99),
)
def test_bias_codes_fit_int32_and_keep_the_bias(
    scale: float, bias: float, input_scale: float, seed: int
) -> None:
    """Scales from 1e-36, of a channel that decayed to almost nothing, to 1."""
    codes = np.random.default_rng(seed).integers(-127, 128, (2, 3, 1, 1)).astype(np.int8)
    weights = IntegerWeights(
        codes, np.array([0.01, 10**scale], np.float32), np.array([0.1, bias], np.float32)
    )
    step_in = float(np.float32(10**input_scale))
    found, kept = bias_codes(weights, step_in)
    assert found.dtype == np.int32
    step = step_in * kept.scale.astype(np.float64)
    error = np.abs(found * step - weights.bias)
    assert np.all(error <= 0.501 * step + 1e-6 * np.abs(weights.bias))
    moved = kept.codes * kept.scale.reshape(-1, 1, 1, 1).astype(float)
    moved -= codes * weights.scale.reshape(-1, 1, 1, 1).astype(float)
    assert np.all(np.abs(moved) <= 0.501 * kept.scale.reshape(-1, 1, 1, 1))


def test_only_a_channel_whose_bias_would_overflow_is_widened() -> None:
    codes = np.full((2, 3, 1, 1), 100, np.int8)
    weights = IntegerWeights(
        codes, np.array([0.01, 1e-12], np.float32), np.array([0.1, 5], np.float32)
    )
    found, kept = bias_codes(weights, 0.02)
    assert kept.scale[0] == weights.scale[0]
    assert np.all(kept.codes[0] == 100)
    assert found[0] == 500
    assert kept.scale[1] > weights.scale[1]
    assert found[1] * 0.02 * float(kept.scale[1]) == pytest.approx(5, rel=1e-6)


def test_bias_codes_leave_the_weights_alone_where_every_bias_fits() -> None:
    weights = fold_integer(_floats(np.random.default_rng(5), 4, 8), 8, None, None)
    codes, kept = bias_codes(weights, 0.1)
    assert kept is weights
    assert np.all(codes == 0)


@pytest.mark.parametrize("gamma", [1e-30, 1e-38, 1e-42, 1e-45])
@pytest.mark.parametrize("beta", [0.0, 1e-41, 0.5])
def test_a_channel_that_weight_decay_shrank_to_nothing_gives_its_beta(
    gamma: float, beta: float
) -> None:
    one = np.ones(1, np.float32)
    norm = Norm(gamma * one, beta * one, 0 * one, one, 1e-5)
    with np.errstate(all="raise", under="ignore"):
        folded = fold_integer(np.array([[0.3, -0.01]], np.float32), 8, None, norm)
        codes, kept = bias_codes(folded, 1e-3)
    assert float(codes[0] * 1e-3 * kept.scale.astype(float)[0]) == pytest.approx(
        beta, rel=1e-5, abs=1e-30
    )
    assert np.all(np.isfinite(kept.scale))
    assert np.all(kept.scale > 0)


@pytest.mark.parametrize("share", [0.999, 1.0005, 1.5])
def test_a_huge_bias_leaves_room_for_the_sum_in_the_accumulator(share: float) -> None:
    """An int32 accumulator that starts at the bias must not wrap: 960 inputs of code 255."""
    scale, input_scale = np.float32(1e-6), 2**-10
    bias = np.array([share * INT32_TOP * input_scale * scale], np.float32)
    weights = IntegerWeights(np.full((1, 960), 127, np.int8), np.array([scale]), bias)
    codes, kept = bias_codes(weights, input_scale)
    assert int(codes[0]) + 255 * int(np.abs(kept.codes.astype(np.int64)).sum()) <= INT32_TOP


# ---- low-bit codes


TOPS = {"w2": 1, "w3": 3, "w4": 7, "w5": 15, "w6": 31, "w7": 63, "w8": 127}


def _low_bit(top: int, shape: tuple[int, ...], seed: int = 6) -> IntegerWeights:
    """Codes over their whole range, with scales of a trained layer's size."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-top, top + 1, shape).astype(np.int8)
    codes.reshape(-1)[:2] = (-top, top)
    scale = rng.uniform(0.001, 0.1, shape[0]).astype(np.float32)
    return IntegerWeights(codes, scale, rng.uniform(-1, 1, shape[0]).astype(np.float32), top)


@pytest.mark.parametrize("top", TOPS.values(), ids=list(TOPS))
def test_stretched_codes_stand_for_the_same_weights_and_do_not_saturate(top: int) -> None:
    """Two products of 64 and an unsigned byte fit 16 bits, which those of 65 do not."""
    weights = _low_bit(top, (6, 5, 3, 3))
    values = weights.codes * weights.scale.astype(float).reshape(-1, 1, 1, 1)
    kernel = weights.kernel_codes * weights.kernel_scale.astype(float).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(kernel, values, rtol=2**-23)
    largest = int(np.abs(weights.kernel_codes.astype(int)).max())
    assert largest == weights.stretch * top
    if top < 127:
        assert 2 * 255 * largest <= 2**15 - 1
        assert 2 * 255 * (largest + top) > 2**15 - 1, "no larger factor would do"
    else:
        assert weights.stretch == 1


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (5, 3, 3, 3), (10, 7), (8, 1, 5, 5), (1, 1)])
@pytest.mark.parametrize("top", TOPS.values(), ids=list(TOPS))
def test_packed_codes_come_back_from_their_table(top: int, shape: tuple[int, ...]) -> None:
    """Two of two bits share an index where their number is even."""
    weights = IntegerWeights(
        np.resize(np.arange(-top, top + 1), shape).astype(np.int8),
        np.ones(shape[0], np.float32),
        np.zeros(shape[0], np.float32),
        top,
    )
    count = weights.codes.size
    sizes = [] if top > 7 else [count, count // 2] if top == 1 and count % 2 == 0 else [count]
    ways = packed(weights)
    assert [indices.size for indices, _ in ways] == sizes
    for indices, table in ways:
        assert indices.max() < 16 == len(table)
        np.testing.assert_array_equal(table[indices].reshape(shape), weights.kernel_codes)


@pytest.mark.parametrize("top", [1, 7])
def test_a_low_bit_channel_that_is_widened_keeps_low_bit_codes_and_its_bias(top: int) -> None:
    weights = _low_bit(top, (3, 4, 3, 3))
    tiny = np.where([False, True, False], np.float32(1e-14), weights.scale).astype(np.float32)
    weights = IntegerWeights(weights.codes, tiny, weights.bias, top)
    codes, kept = bias_codes(weights, 0.02)
    assert kept.scale[1] > tiny[1]
    assert kept.scale[0] == tiny[0]
    assert np.abs(kept.codes).max() <= top
    assert kept.top == top
    step = np.float32(0.02) * kept.kernel_scale
    np.testing.assert_allclose(codes * step, weights.bias, atol=0.501 * step.max())
    assert abs(codes[1] * step[1] / weights.bias[1] - 1) < 1e-6


def test_the_grid_of_a_bias_is_finer_by_the_stretch() -> None:
    """Rounded to a grid of 9 (64) times as many steps, the error is so much smaller."""
    for top, stretch in ((7, 9), (1, 64)):
        weights = _low_bit(top, (400, 3))
        plain = IntegerWeights(weights.codes, weights.scale, weights.bias, 127)
        errors = []
        for each in (plain, weights):
            codes, kept = bias_codes(each, 0.02)
            errors.append(np.abs(codes * (0.02 * kept.kernel_scale) - weights.bias).mean())
        assert errors[0] / errors[1] == pytest.approx(stretch, rel=0.2)


# ---- DoReFa


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (6, 20)])
@pytest.mark.parametrize("bits", range(1, 8))
def test_dorefa_codes_are_odd_half_steps_and_times_their_scale_the_trained_weight(
    bits: int, shape: tuple[int, ...]
) -> None:
    weight = _floats(np.random.default_rng(bits), *shape)
    trained = dorefa_weight(torch.from_numpy(weight), bits).numpy()
    folded = fold_dorefa(trained, bits, None, None, name="conv")
    assert np.all(folded.codes % 2 == 1)
    assert np.abs(folded.codes).max() == 2**bits - 1
    assert len(set(folded.scale.tolist())) == 1
    np.testing.assert_array_equal(folded.codes * folded.scale[0], trained)


@pytest.mark.parametrize("bits", [1, 2, 4, 7])
def test_folding_a_norm_into_dorefa_weights_flips_signs_and_changes_no_code(bits: int) -> None:
    rng = np.random.default_rng(bits)
    weight, norm = _floats(rng, 6, 4, 3, 3), _norm(rng, 6)
    norm.gamma[1] = -0.7
    trained = dorefa_weight(torch.from_numpy(weight), bits).numpy()
    plain = fold_dorefa(trained, bits, None, None, name="conv")
    folded = fold_dorefa(trained, bits, None, norm, name="conv")
    signs = np.sign(norm.factor).reshape(-1, 1, 1, 1)
    assert {-1, 0} <= set(signs.ravel().tolist())
    np.testing.assert_array_equal(folded.codes, plain.codes * signs)
    value = _floats(rng, 2, 4, 7, 7).astype(float)
    scale = folded.scale.astype(float).reshape(-1, 1, 1, 1)
    found = _reference(value, folded.codes * scale, folded.bias, None)
    expected = _reference(value, trained.astype(float), None, norm)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_eight_bit_dorefa_weights_are_refused_with_the_layers_name() -> None:
    trained = dorefa_weight(torch.randn(3, 4), 8).numpy()
    with pytest.raises(InvalidInput, match=r"project.*255"):
        fold_dorefa(trained, 8, None, None, name="project")


@pytest.mark.parametrize("bits", [1, 2])
def test_dorefa_weights_of_zeros_fold(bits: int) -> None:
    trained = dorefa_weight(torch.zeros(3, 4), bits).numpy()
    folded = fold_dorefa(trained, bits, None, None, name="conv")
    np.testing.assert_array_equal(folded.codes * folded.scale[0], trained)
