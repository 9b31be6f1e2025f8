"""Stand-alone modules: they hold what an op counts, and round as an engine will.

Oracles: the counts of `OpSpec`, Brevitas' own integer codes, the shared-weight quantisers of
`quant.fakequant`, and PyTorch's batch norm.
"""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor as Values
from torch import nn
from torch.nn import functional

from hwnas.spaces.blocks import (
    basic_block,
    classifier,
    conv_norm_activation,
    inverted_residual,
    pooled_classifier,
    xception_unit,
)
from latency_tables.ops import Layer, OpBuilder, OpSpec, Tensor
from profilers.graphs import OpParameters
from profilers.modules import ACTIVATIONS, Network, OpModule, run_op
from quant.fakequant import fake_quantise_weight
from quant.integer import FloatWeights, IntegerWeights, bias_codes, fold_float
from quant.layers import ActivationQuantiser, Fp8Cast, QuantConv2d, QuantLinear
from quant.precision import ONNXRUNTIME, TENSORRT, Format, Precision, Runtime, weight_top
from quant.ranges import fake_quantise_activation

FP32, FP8, W8A8, W4A8, W4A4 = map(Precision, ("fp32", "fp8", "w8a8", "w4a8", "w4a4"))
INPUT = Tensor(8, 6, 6)
Trained = Callable[..., Network]


def blocks(precision: Precision, spec: Tensor = INPUT) -> list[OpSpec]:
    return [
        conv_norm_activation(spec, 12, kernel=3, stride=2, precision=precision),
        inverted_residual(spec, 8, kernel=5, expansion=3, precision=precision),
        inverted_residual(spec, 16, kernel=3, expansion=3, stride=2, precision=precision),
        inverted_residual(spec, 8, kernel=3, expansion=4, squeeze=4, precision=precision),
        inverted_residual(spec, 12, kernel=3, expansion=1, precision=precision),
        classifier(spec, 16, 5, precision=precision, activation="hard_swish"),
        xception_unit(spec, 12, middle=8, precision=precision),
        basic_block(spec, 16, inner=12, stride=2, precision=precision),
        pooled_classifier(spec, 5, precision=precision, bias=False),
    ]


def images(batch: int = 4, seed: int = 0, spec: Tensor = INPUT) -> np.ndarray:
    shape = (batch, spec.channels, spec.height, spec.width)
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def by_position(number: int) -> str:
    return f"block {number}"


every = pytest.mark.parametrize("number", range(9), ids=by_position)


# ---- what a module holds


@every
def test_a_float_module_has_the_parameters_that_its_op_counts(number: int) -> None:
    op = blocks(FP32)[number]
    assert sum(p.numel() for p in OpModule(op).parameters()) == op.parameters


@every
def test_an_integer_module_has_one_learned_range_a_quantiser_more(number: int) -> None:
    op = blocks(W8A8)[number]
    count = sum(p.numel() for p in OpModule(op).parameters())
    assert count == op.parameters + len(op.quantisers)


@pytest.mark.parametrize("precision", [FP32, W8A8, W4A4], ids=str)
@every
def test_only_integer_ops_use_brevitas_layers(number: int, precision: Precision) -> None:
    op = blocks(precision)[number]
    module = OpModule(op)
    for index, layer in module.weighted_layers.items():
        assert isinstance(layer, (QuantConv2d, QuantLinear)) == precision.is_integer
        assert isinstance(layer, nn.Conv2d if op.layers[index].kind == "conv" else nn.Linear)
    assert set(module.activation_quantisers) == set(op.quantisers)
    assert bool(op.quantisers) == precision.is_integer


@pytest.mark.parametrize("precision", [FP32, W8A8], ids=str)
@every
def test_shapes_are_those_of_the_op(number: int, precision: Precision) -> None:
    op = blocks(precision)[number]
    module = OpModule(op).eval()
    output = module(torch.from_numpy(images(3)))
    tensor = op.output
    wanted = (tensor.channels,) if op.logits else (tensor.channels, tensor.height, tensor.width)
    assert output.shape == (3, *wanted)
    for index, layer in module.weighted_layers.items():
        source = op.layer_inputs(index)[0]
        into = source.elements if op.layers[index].kind == "linear" else source.channels
        assert tuple(layer.weight.shape) == op.layers[index].weight_shape(into)


@pytest.mark.parametrize("precision", [FP32, W8A8, FP8], ids=str)
def test_a_module_reads_back_from_its_state(precision: Precision) -> None:
    op, x = blocks(precision)[3], torch.from_numpy(images())
    torch.manual_seed(0)
    module, other = OpModule(op).eval(), OpModule(op).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(0.7)
        for cast in module.fp8_casts.values():
            cast.limit = 0.5
        assert not torch.equal(module(x), other(x))
        other.load_state_dict(module.state_dict())
        assert torch.equal(module(x), other(x))


# ---- ranges of fp8


def plainly(module: OpModule, x: torch.Tensor) -> torch.Tensor:
    """An op's output where every value is cast by the batch's own largest."""

    def weighted(index: int, _: Layer, value: torch.Tensor) -> torch.Tensor:
        result = module.weighted[str(index)](value)
        return module.norms[str(index)](result) if str(index) in module.norms else result

    return run_op(module.op, [x], weighted, lambda *_: pytest.fail("fp8 is not quantised"))


@pytest.mark.parametrize("number", range(5))
def test_fp8_without_ranges_takes_them_from_the_batch(number: int) -> None:
    op = blocks(FP8)[number]
    module, x = OpModule(op), torch.from_numpy(images(spec=op.inputs[0]))
    assert set(module.fp8_casts) == op.casts == op.scaled
    assert module.parameters_for_graph().limits == {}
    with torch.no_grad():
        for training in (True, False):
            module.train(training)
            assert torch.equal(module(x), plainly(module, x))
        for cast in module.fp8_casts.values():
            cast.limit = 0.2
        assert not torch.equal(module(x), plainly(module, x))
        assert dict.fromkeys(op.casts, pytest.approx(0.2)) == module.parameters_for_graph().limits
        module.train()  # in which ranges are the batch's still
        assert torch.equal(module(x), plainly(module, x))


def test_with_ranges_an_image_is_answered_alike_in_every_batch(trained: Trained) -> None:
    x = torch.from_numpy(images())
    network = trained([blocks(FP8)[3]], images())
    with torch.no_grad():
        whole, alone = network(x), torch.cat([network(each[None]) for each in x])
        torch.testing.assert_close(alone, whole, rtol=0, atol=1e-6)
        for cast in network.op_modules[0].fp8_casts.values():
            cast.limit = None
        assert (network(x) - torch.cat([network(each[None]) for each in x])).abs().max() > 1e-3


def test_what_a_cast_sees_widens_its_range() -> None:
    cast = Fp8Cast().eval()
    assert cast.limit is None
    for value, limit in ((0.0, 1e-10), (-3.0, 3.0), (2.0, 3.0), (4.5, 4.5)):
        cast.see(torch.tensor([0.0, value]))
        assert cast.limit == pytest.approx(limit)
    assert cast(torch.tensor([100.0, -100.0])).tolist() == [4.5, -4.5]


def test_a_state_of_before_there_were_ranges_has_none(trained: Trained) -> None:
    network = trained([blocks(FP8)[3]], images())
    old = {name: x for name, x in network.state_dict().items() if "casts" not in name}
    assert len(old) < len(network.state_dict())
    network.load_state_dict(old)
    assert network.parameters_for_graph()[0].limits == {}
    assert "casts" not in " ".join(old)
    with pytest.raises(RuntimeError, match="Missing key"):
        network.load_state_dict(dict(list(old.items())[1:]))


def test_a_network_is_the_chain_of_its_modules() -> None:
    body = blocks(W8A8)[1]
    network = Network([body, classifier(body.output, 16, 5, precision=FP32)]).eval()
    x = torch.from_numpy(images())
    first, second = network.op_modules
    with torch.no_grad():
        assert torch.equal(network(x), second(first(x)))
    assert [module.op for module in network.op_modules] == list(network.ops)
    assert len(network.parameters_for_graph()) == 2


# ---- how values are rounded


@pytest.mark.parametrize(("bits", "signed"), itertools.product((2, 4, 8), (True, False)))
def test_an_activation_takes_the_codes_of_its_grid_and_no_others(bits: int, signed: bool) -> None:
    grid = ONNXRUNTIME.grid(bits, signed=signed)
    quantiser = ActivationQuantiser(bits, grid).eval()
    quantiser.limit = 1.7
    assert quantiser.limit == pytest.approx(1.7)
    output = quantiser(torch.linspace(-3, 3, 5001)).detach().double()
    codes = output / (np.float32(1.7) / grid.top)
    assert torch.allclose(codes, codes.round(), atol=1e-4)
    assert sorted({round(code) for code in codes.tolist()}) == list(range(grid.low, grid.high + 1))


@pytest.mark.parametrize("name", ["w8a8", "w8a4", "w4a2"])
def test_an_ops_output_lies_on_its_grid(trained: Trained, name: str) -> None:
    precision = Precision(name)
    for op in [op for op in blocks(precision) if not op.logits]:
        x = images()
        module = trained([op], x).op_modules[0]
        last = len(op.values) - 1
        quantiser = op.quantisers[last]
        grid = ONNXRUNTIME.grid(quantiser.bits, signed=quantiser.signed)
        step = module.activation_quantisers[last].limit / grid.top
        with torch.no_grad():
            codes = module(torch.from_numpy(x)).double() / step
        assert torch.allclose(codes, codes.round(), atol=1e-3)
        assert grid.low <= codes.min().round() < codes.max().round() <= grid.high
        distinct = len({round(code) for code in codes.flatten().tolist()})
        assert 2**precision.activation_bits // 4 < distinct <= 2**precision.activation_bits


@pytest.mark.parametrize("runtime", [ONNXRUNTIME, TENSORRT], ids=lambda r: r.name)
@pytest.mark.parametrize(("bits", "signed"), itertools.product((4, 8), (True, False)))
def test_the_supernets_activations_are_the_same_to_the_last_bit(
    bits: int, signed: bool, runtime: Runtime
) -> None:
    grid = runtime.grid(bits, signed=signed)
    quantiser = ActivationQuantiser(bits, grid).eval()
    quantiser.limit = 2.3
    values = torch.from_numpy(images(64))
    shared = fake_quantise_activation(values, torch.tensor(quantiser.limit), grid)
    assert torch.equal(quantiser(values), shared)


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w2a8"])
@every
def test_the_supernets_weights_are_the_same_to_the_last_bit(number: int, name: str) -> None:
    precision = Precision(name)
    for layer in OpModule(blocks(precision)[number]).weighted_layers.values():
        shared = fake_quantise_weight(layer.weight.detach(), precision.weight_bits)
        assert torch.equal(layer.quant_weight().value, shared)


def test_a_quantised_input_is_not_quantised_again() -> None:
    op = blocks(W8A8, Tensor(8, 6, 6, Format("a8")))[1]
    seen: list[int] = []
    with torch.no_grad():
        module = OpModule(op).eval()
        run_op(
            op,
            [torch.from_numpy(images())],
            lambda index, layer, value: module.weighted[str(index)](value),
            lambda index, value, relu: seen.append(index) or (value.relu() if relu else value),
        )
    assert seen == sorted(op.quantisers)
    assert 0 not in seen


def test_a_residual_adds_the_input_as_the_convolutions_see_it() -> None:
    """With a coarse quantiser on the input and zero weights, the output is the rounded input."""
    op = blocks(Precision("w8a2"))[1]
    assert op.layers[-1].kind == "add"
    module = OpModule(op).eval()
    with torch.no_grad():
        for layer in module.weighted_layers.values():
            layer.weight.zero_()
    for quantiser in module.activation_quantisers.values():
        quantiser.limit = 2.0
    x = torch.from_numpy(images())
    with torch.no_grad():
        found, rounded = module(x), module.activation_quantisers[0](x)
    assert torch.equal(found, rounded)
    assert len(found.unique()) == 4


# ---- what is handed to the emitter


@every
def test_float_weights_are_those_of_the_layer_and_its_norm(trained: Trained, number: int) -> None:
    op = blocks(FP32)[number]
    module = trained([op], images()).op_modules[0]
    parameters = module.parameters_for_graph()
    assert parameters.limits == {}
    for index, layer in module.weighted_layers.items():
        folded = parameters.weights[index]
        assert isinstance(folded, FloatWeights)
        weight, bias = torch.from_numpy(folded.weight), torch.from_numpy(folded.bias)
        rng = torch.Generator().manual_seed(0)
        source = op.layer_inputs(index)[0]
        if isinstance(layer, nn.Linear):
            x = torch.randn((4, source.elements), generator=rng)
            found = functional.linear(x, weight, bias)
        else:
            x = torch.randn((4, source.channels, 9, 9), generator=rng)
            found = functional.conv2d(
                x, weight, bias, layer.stride, layer.padding, groups=layer.groups
            )
        with torch.no_grad():
            wanted = layer(x)
            if op.layers[index].norm:
                wanted = module.norms[str(index)](wanted)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w2a8"])
@every
def test_folding_a_norm_changes_no_code(trained: Trained, number: int, name: str) -> None:
    """The codes are those of Brevitas; a norm of negative factor flips their signs."""
    precision = Precision(name)
    op = blocks(precision)[number]
    module = trained([op], images()).op_modules[0]
    parameters = module.parameters_for_graph()
    flipped = 0
    for index, layer in module.weighted_layers.items():
        quantised = layer.quant_weight()
        codes = quantised.int().numpy()
        sign = np.ones(len(codes), np.int8)
        if op.layers[index].norm:
            sign = np.sign(module.norms[str(index)].weight.detach().numpy()).astype(np.int8)
            flipped += int((sign < 0).sum())
        weights = parameters.weights[index]
        assert isinstance(weights, IntegerWeights)
        shape = (-1, *[1] * (codes.ndim - 1))
        np.testing.assert_array_equal(weights.codes, codes * sign.reshape(shape))
        assert np.abs(weights.codes).max() == weight_top(precision.weight_bits)
    assert flipped > 0 or not module.norms
    assert parameters.limits == {i: q.limit for i, q in module.activation_quantisers.items()}


@every
def test_folded_codes_and_scales_stand_for_the_folded_values(trained: Trained, number: int) -> None:
    op = blocks(W8A8)[number]
    module = trained([op], images()).op_modules[0]
    parameters = module.parameters_for_graph()
    for index, layer in module.weighted_layers.items():
        weights = parameters.weights[index]
        value = layer.quant_weight().value.detach().numpy()
        bias = np.zeros(len(value)) if layer.bias is None else layer.bias.detach().numpy()
        factor = np.ones(len(value), np.float32)
        if op.layers[index].norm:
            norm = module.norms[str(index)]
            factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).detach().numpy()
            bias = (norm.bias - norm.running_mean * torch.from_numpy(factor)).detach().numpy()
        shape = (-1, *[1] * (value.ndim - 1))
        found = weights.codes * weights.scale.reshape(shape)
        np.testing.assert_allclose(found, value * factor.reshape(shape), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(weights.bias, bias, rtol=1e-4, atol=1e-6)
        assert (weights.scale > 0).all()


@pytest.mark.parametrize("precision", [FP32, W8A8], ids=str)
def test_a_channel_that_its_norm_silences_hands_on_its_bias(precision: Precision) -> None:
    op = blocks(precision)[0]
    module = OpModule(op).eval()
    channels = op.layers[0].channels
    zero, one = torch.zeros(channels), torch.ones(channels)
    module.set_norm(0, gamma=zero, beta=3 * one, mean=one, variance=one)
    weights = module.parameters_for_graph().weights[0]
    np.testing.assert_array_equal(weights.bias, np.full(channels, 3, np.float32))
    if isinstance(weights, IntegerWeights):
        assert not weights.codes.any()
        assert (weights.scale > 0).all()
    else:
        assert not weights.weight.any()


def test_a_norm_is_set_whole() -> None:
    module = OpModule(blocks(FP32)[0]).eval()
    given = [torch.rand(12) + 0.5 for _ in range(4)]
    module.set_norm(0, *given)
    norm = module.norms["0"]
    for mine, theirs in zip(
        (norm.weight, norm.bias, norm.running_mean, norm.running_var), given, strict=True
    ):
        assert torch.equal(mine, theirs)
    raw = module.weighted_layers[0]
    gamma, beta, mean, variance = (value.double() for value in given)
    weights = module.parameters_for_graph().weights[0]
    factor = gamma / (variance + 1e-5).sqrt()
    wanted = raw.weight.detach().double() * factor[:, None, None, None]
    np.testing.assert_allclose(weights.weight, wanted.numpy(), rtol=1e-5)
    np.testing.assert_allclose(weights.bias, (beta - mean * factor).numpy(), rtol=1e-4, atol=1e-6)


def test_training_moves_every_weight_and_every_range() -> None:
    op = blocks(W8A8)[3]
    module = OpModule(op).train()
    module(torch.from_numpy(images(8))).square().sum().backward()
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name


# ---- the interpreter


@pytest.mark.parametrize(
    ("function", "formula"),
    [
        ("relu", lambda x: np.maximum(x, 0)),
        ("relu6", lambda x: np.clip(x, 0, 6)),
        ("sigmoid", lambda x: 1 / (1 + np.exp(-x))),
        ("hard_sigmoid", lambda x: np.clip(x / 6 + 0.5, 0, 1)),
        ("hard_swish", lambda x: x * np.clip(x / 6 + 0.5, 0, 1)),
    ],
)
def test_activations_are_their_formulas(
    function: str, formula: Callable[[np.ndarray], np.ndarray]
) -> None:
    builder = OpBuilder(FP32, INPUT)
    builder.activation(0, function)
    x = 5 * images()
    found = OpModule(builder.build())(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, formula(x.astype(np.float64)), rtol=1e-5, atol=1e-6)
    assert function in ACTIVATIONS


def test_the_interpreter_walks_any_dag_of_layers() -> None:
    """Two inputs, a gate, and a value that is read three times, against plain NumPy."""
    layers = (
        Layer("add", (0, 1)),
        Layer("pool", (2,)),
        Layer("activation", (3,), function="sigmoid"),
        Layer("mul", (2, 4)),
        Layer("add", (5, 2)),
    )
    op = OpSpec((INPUT, INPUT), layers, FP32)
    left, right = images(seed=1), images(seed=2)
    both = left + right
    gate = 1 / (1 + np.exp(-both.mean((2, 3), keepdims=True)))

    def never(*_: object) -> Values:
        raise AssertionError("nothing here has weights or is quantised")

    inputs = [torch.from_numpy(left), torch.from_numpy(right)]
    found = run_op(op, inputs, never, never)
    np.testing.assert_allclose(found.numpy(), both * gate + both, rtol=1e-5, atol=1e-6)


def test_halves_that_are_joined_and_shuffled_back_are_what_went_in() -> None:
    """PyTorch's own channel shuffle is the oracle: even before odd, and back."""
    builder = OpBuilder(FP32, INPUT)
    builder.concat(builder.half(0, "even"), builder.half(0, "odd"))
    x = torch.from_numpy(images())
    apart = OpModule(builder.build())(x)
    assert torch.equal(apart, nn.ChannelShuffle(4)(x))
    assert torch.equal(nn.ChannelShuffle(2)(apart), x)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (3, 1), (3, 2), (5, 3)])
def test_a_max_pool_is_pytorchs(kernel: int, stride: int) -> None:
    builder = OpBuilder(FP32, INPUT)
    builder.max_pool(0, kernel=kernel, stride=stride)
    x = torch.from_numpy(images() - 5)
    wanted = nn.MaxPool2d(kernel, stride, kernel // 2)(x)
    assert torch.equal(OpModule(builder.build())(x), wanted)
    assert tuple(wanted.shape[1:]) == (8, builder.build().output.height, wanted.shape[-1])


def test_folding_without_a_norm_keeps_the_weights() -> None:
    weight = images()
    folded = fold_float(weight, None, None)
    np.testing.assert_array_equal(folded.weight, weight)
    np.testing.assert_array_equal(folded.bias, np.zeros(len(weight), np.float32))


# ---- biases on the accumulator's grid


IMAGE = Tensor(1, 8, 8)


def step_of(op: OpSpec, parameters: OpParameters, index: int) -> float:
    """The step of a value that the op quantises."""
    quantiser = op.quantisers[index]
    grid = ONNXRUNTIME.grid(quantiser.bits, signed=quantiser.signed)
    return float(np.float32(parameters.limits[index]) / np.float32(grid.top))


def chain_of(precision: Precision) -> list[OpSpec]:
    stem = conv_norm_activation(IMAGE, 8, kernel=3, precision=W8A8)
    block = inverted_residual(stem.output, 8, kernel=3, expansion=2, squeeze=2, precision=precision)
    return [stem, block, classifier(block.output, 16, 4, precision=precision)]


@pytest.mark.parametrize("precision", [W8A8, W4A8, W4A4, Precision("w2a4")], ids=str)
def test_rounded_biases_are_those_of_the_integer_kernel(
    trained: Trained, precision: Precision
) -> None:
    """By `bias_codes`, from each layer's own input; weights and ranges stay as they are."""
    ops = chain_of(precision)
    network = trained(ops, images(16, spec=IMAGE))
    before = network.parameters_for_graph()
    network.round_biases()
    after = network.parameters_for_graph()
    given, moved = 0.0, []
    for op, old, new in zip(ops, before, after, strict=True):
        assert old.limits == new.limits
        for index, weights in new.weights.items():
            source = op.layers[index].inputs[0]
            step = step_of(op, old, source) if source in op.quantisers else given
            np.testing.assert_array_equal(weights.codes, old.weights[index].codes)
            np.testing.assert_array_equal(weights.scale, old.weights[index].scale)
            codes, kept = bias_codes(old.weights[index], step)
            grid_step = np.float32(step) * kept.kernel_scale
            np.testing.assert_allclose(weights.bias, codes * grid_step, rtol=1e-5, atol=1e-6)
            moved.append(np.abs(weights.bias - old.weights[index].bias).max() / grid_step.max())
        if not op.logits:
            given = step_of(op, old, len(op.values) - 1)
    assert 0.2 < max(moved) <= 0.51, "by up to half a step"


def test_rounding_biases_again_changes_nothing_that_shows(trained: Trained) -> None:
    ops = chain_of(W8A8)
    network = trained(ops, images(16, spec=IMAGE))
    seen = torch.from_numpy(images(16, spec=IMAGE))
    unrounded = network(seen)
    network.round_biases()
    once = network(seen)
    network.round_biases()
    torch.testing.assert_close(network(seen), once, rtol=0, atol=1e-5)
    assert not torch.equal(unrounded, once)


def test_a_float_networks_biases_stay(trained: Trained) -> None:
    stem = conv_norm_activation(IMAGE, 8, kernel=3, precision=FP32)
    network = trained([stem], images(4, spec=IMAGE))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.round_biases()
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
