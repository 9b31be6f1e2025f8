"""The stand-alone layers: float precisions give PyTorch's own, integer ones round their weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from quant import layers
from quant.fakequant import fake_quantise_weight
from quant.precision import ONNXRUNTIME, TENSORRT, Grid, Precision
from quant.ranges import fake_quantise_activation


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_float_convolution_is_plain_and_padded_to_keep_the_size(kernel: int, stride: int) -> None:
    layer = layers.conv(
        4, 8, kernel=kernel, stride=stride, groups=2, bias=True, precision=Precision("fp32")
    )
    assert type(layer) is nn.Conv2d
    value = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(0))
    expected = functional.conv2d(
        value, layer.weight, layer.bias, stride=stride, padding=kernel // 2, groups=2
    )
    assert torch.equal(layer(value), expected)
    assert layer(value).shape[-1] == -(-9 // stride)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_an_integer_convolution_runs_with_its_rounded_weight(bits: int) -> None:
    precision = Precision(f"w{bits}a8")
    layer = layers.conv(4, 8, kernel=3, stride=2, groups=4, bias=True, precision=precision)
    value = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    rounded = fake_quantise_weight(layer.weight, bits)
    expected = functional.conv2d(value, rounded, layer.bias, stride=2, padding=1, groups=4)
    torch.testing.assert_close(layer(value), expected)


def test_an_integer_linear_layer_runs_with_its_rounded_weight_and_its_own_bias() -> None:
    layer = layers.linear(20, 5, precision=Precision("w4a8"))
    value = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    expected = functional.linear(value, fake_quantise_weight(layer.weight, 4), layer.bias)
    torch.testing.assert_close(layer(value), expected)
    assert type(layers.linear(20, 5, precision=Precision("fp32"))) is nn.Linear


@pytest.mark.parametrize("signed", [True, False])
def test_the_limit_of_a_quantiser_reads_back_and_moves_the_range(signed: bool) -> None:
    quantiser = layers.ActivationQuantiser(8, ONNXRUNTIME.grid(8, signed=signed))
    for limit in (0.25, 6.0):
        quantiser.limit = limit
        assert quantiser.limit == limit
        step = limit / quantiser.grid.top
        largest = quantiser(torch.tensor([1e6])).item()
        assert largest == pytest.approx(step * quantiser.grid.high, rel=1e-6)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_tensorrts_grid_is_rounded_to_as_shared_weights_round_to_it(
    bits: int, signed: bool
) -> None:
    grid = TENSORRT.grid(bits, signed=signed)
    quantiser = layers.ActivationQuantiser(bits, grid).eval()
    quantiser.limit = 1.7
    values = torch.linspace(-4, 4, 9001)
    found = quantiser(values)
    assert torch.equal(found, fake_quantise_activation(values, torch.tensor(1.7), grid))
    assert len(found.unique()) == grid.high - grid.low + 1


@pytest.mark.parametrize("grid", [Grid(0, 100, 100), Grid(-127, 127, 127), Grid(0, 31, 31)])
def test_a_grid_that_brevitas_does_not_have_is_refused(grid: Grid) -> None:
    with pytest.raises(ValueError, match="at 8 bits"):
        layers.ActivationQuantiser(8, grid)
