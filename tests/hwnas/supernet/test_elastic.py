"""Sliced layers and learned ranges against hand-written arithmetic."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from hwnas.supernet.elastic import ElasticLayer, ElasticRange
from latency_tables.ops import Layer
from quant.precision import ONNXRUNTIME, TENSORRT, Precision, Runtime

FP32, W8A8, W4A8 = Precision("fp32"), Precision("w8a8"), Precision("w4a8")


def dense(channels: int, *, kernel: int = 3, stride: int = 1, norm: bool = True) -> Layer:
    return Layer("conv", (0,), "conv", channels, kernel, stride, norm=norm)


@pytest.mark.parametrize(("width_in", "width_out"), [(1, 1), (3, 4), (5, 2), (6, 8)])
@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 2), (5, 1)])
def test_a_narrow_convolution_uses_the_first_channels(
    width_in: int, width_out: int, kernel: int, stride: int
) -> None:
    torch.manual_seed(0)
    full = dense(8, kernel=kernel, stride=stride, norm=False)
    elastic = ElasticLayer(full, full.weight_shape(6))
    torch.nn.init.normal_(elastic.bias)
    x = torch.randn(2, width_in, 7, 7)
    found = elastic(x, dense(width_out, kernel=kernel, stride=stride, norm=False), FP32)
    expected = functional.conv2d(
        x,
        elastic.weight[:width_out, :width_in],
        elastic.bias[:width_out],
        stride=stride,
        padding=kernel // 2,
    )
    assert found.shape[1] == width_out
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_narrow_depthwise_convolution_filters_each_of_the_first_channels_alone() -> None:
    torch.manual_seed(0)
    full = Layer("conv", (0,), "depthwise", 8, 3, groups=8, norm=True)
    elastic = ElasticLayer(full, full.weight_shape(8))
    x = torch.randn(2, 5, 6, 6)
    found = elastic(x, Layer("conv", (0,), "depthwise", 5, 3, groups=5, norm=True), FP32)
    for channel in range(5):
        kernel = elastic.weight[channel : channel + 1]
        alone = functional.conv2d(x[:, channel : channel + 1], kernel, padding=1)
        torch.testing.assert_close(found[:, channel : channel + 1], alone, rtol=1e-5, atol=1e-6)


def test_a_narrow_linear_layer_is_the_product_with_the_first_columns() -> None:
    torch.manual_seed(0)
    full = Layer("linear", (0,), "linear", 4)
    elastic = ElasticLayer(full, full.weight_shape(10))
    torch.nn.init.normal_(elastic.bias)
    x = torch.randn(3, 6)
    found = elastic(x, Layer("linear", (0,), "linear", 2), FP32)
    expected = x @ elastic.weight[:2, :6].T + elastic.bias[:2]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("precision", [W8A8, W4A8])
def test_an_integer_weight_is_rounded_after_slicing_on_the_scale_of_what_is_left(
    precision: Precision,
) -> None:
    """The largest weight lies outside the slice, so a scale of the whole tensor would be seen."""
    torch.manual_seed(0)
    full = dense(4, kernel=1, norm=False)
    elastic = ElasticLayer(full, full.weight_shape(6))
    with torch.no_grad():
        elastic.weight[:, 5] = 100.0
    unit = torch.eye(3).reshape(3, 3, 1, 1)  # image i is channel i alone: reads the weights back
    found = elastic(unit, dense(2, kernel=1, norm=False), precision)[:, :, 0, 0].T.detach().numpy()
    weight = elastic.weight[:2, :3, 0, 0].detach().numpy()
    top = 2 ** (precision.weight_bits - 1) - 1
    scale = np.abs(weight).max(axis=1, keepdims=True) / np.float32(top)
    np.testing.assert_array_equal(found, np.rint(weight / scale) * scale)
    assert not np.array_equal(found, weight)


def test_without_statistics_a_norm_makes_the_batch_zero_mean_and_unit_variance() -> None:
    torch.manual_seed(0)
    elastic = ElasticLayer(dense(6), (6, 1, 3, 3))
    x = 3 + 2 * torch.randn(8, 4, 5, 5)
    y = elastic.normalise(x, dense(4), None, None)
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(4), atol=1e-4, rtol=0)


def test_with_statistics_a_norm_is_the_formula_and_leaves_them_alone() -> None:
    torch.manual_seed(0)
    elastic = ElasticLayer(dense(6), (6, 1, 3, 3))
    torch.nn.init.normal_(elastic.gamma)
    torch.nn.init.normal_(elastic.bias)
    mean, variance = torch.randn(4), torch.rand(4) + 0.5
    before = mean.clone(), variance.clone()
    x = torch.randn(2, 4, 5, 5)
    found = elastic.normalise(x, dense(4), (mean, variance), None)
    m, v, g, b = (t[:4].reshape(1, 4, 1, 1) for t in (mean, variance, elastic.gamma, elastic.bias))
    torch.testing.assert_close(found, (x - m) / torch.sqrt(v + 1e-5) * g + b)
    assert torch.equal(mean, before[0])
    assert torch.equal(variance, before[1])


def test_a_range_is_set_once_from_the_first_values_that_it_sees() -> None:
    elastic = ElasticRange(ONNXRUNTIME.grid(8, signed=False))
    assert not elastic.is_set
    values = torch.zeros(1000)
    values[:10] = 3.0
    elastic.initialise(values)
    assert elastic.is_set
    # s = 2 mean|x| / sqrt(high), limit = s * top (Esser et al. 2019, section 2.1)
    assert elastic.limit.item() == pytest.approx(2 * 0.03 / 255**0.5 * 255)
    first = elastic.limit.item()
    elastic.initialise(torch.full((4, 4), 50.0))
    assert elastic.limit.item() == first


def test_a_first_range_reaches_no_further_than_the_largest_value() -> None:
    elastic = ElasticRange(ONNXRUNTIME.grid(8, signed=False))
    elastic.initialise(torch.full((4, 4), 3.0))  # LSQ's formula alone would say 95.8
    assert elastic.limit.item() == 3.0


@pytest.mark.parametrize("runtime", [ONNXRUNTIME, TENSORRT])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("limit", [0.7, -0.7, 12.0])
def test_a_range_gives_only_values_of_its_grid(
    runtime: Runtime, signed: bool, bits: int, limit: float
) -> None:
    grid = runtime.grid(bits, signed=signed)
    elastic = ElasticRange(grid)
    with torch.no_grad():
        elastic.limit.fill_(limit)
    x = torch.linspace(-20, 20, 4001)
    found = elastic(x).detach().double().numpy()
    step = abs(limit) / grid.top
    codes = found / step
    np.testing.assert_allclose(codes, np.rint(codes), atol=1e-4)
    assert {int(c) for c in np.rint(codes)} <= set(range(grid.low, grid.high + 1))
    # it rounds to the nearest value: nothing inside the range moves by more than half a step
    inside = (x.numpy() > grid.low * step) & (x.numpy() < grid.high * step)
    assert np.abs(found - x.numpy())[inside].max() <= step / 2 * (1 + 1e-4)


# ---- layout, and what goes back


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize(("out", "width"), [(8, 6), (8, 4), (5, 6), (3, 2), (1, 1)])
def test_a_slice_is_autograds_own_slice_in_the_weights_layout(
    out: int, width: int, kernel: int, layout: torch.memory_format
) -> None:
    """Values and gradient to the last bit, and neither is laid out anew: a copy a layer a step."""
    torch.manual_seed(0)
    full = dense(8, kernel=kernel)
    elastic = ElasticLayer(full, full.weight_shape(6)).to(memory_format=layout)  # type: ignore[call-overload]
    shape = (out, width, kernel, kernel)
    found = elastic.sliced_weight(shape)
    assert found.shape == shape
    assert found.is_contiguous(memory_format=layout)
    gradient = torch.randn(shape).contiguous(memory_format=layout)
    found.backward(gradient)
    plain = elastic.weight.detach().clone().requires_grad_()
    plain[:out, :width].backward(gradient)
    assert torch.equal(found, plain[:out, :width])
    assert elastic.weight.grad is not None
    assert torch.equal(elastic.weight.grad, plain.grad)
    assert elastic.weight.grad.stride() == elastic.weight.stride()


def test_a_layer_in_full_width_takes_its_tensors_without_a_copy() -> None:
    elastic = ElasticLayer(dense(8), (8, 6, 3, 3))
    assert elastic.sliced_weight((8, 6, 3, 3)) is elastic.weight
    assert elastic.sliced_weight((8, 5, 3, 3)) is not elastic.weight
