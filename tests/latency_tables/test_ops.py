"""Ops: shapes, formats, quantisers, keys and JSON, checked against PyTorch and by hand."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from hwnas.spaces.blocks import (
    basic_block,
    classifier,
    conv_norm_activation,
    inverted_residual,
    pooled_stem,
    shuffle_unit,
    xception_unit,
)
from latency_tables.ops import Layer, OpBuilder, OpSpec, Quantiser, Tensor
from profilers.modules import run_op
from quant.precision import Format, Precision

PRECISIONS = ["fp32", "fp16", "w8a8", "w4a8", "w4a4", "w2a3"]
FORMATS = [Format(kind, sign) for kind in ("fp32", "fp16", "a8", "a4") for sign in (True, False)]
FUNCTIONS = ["relu", "relu6", "hard_swish", "sigmoid", "hard_sigmoid"]


@st.composite
def ops(draw: st.DrawFn) -> OpSpec:
    """Blocks of every kind, at every precision, after every format."""
    tensor = Tensor(
        draw(st.integers(1, 6)),
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        draw(st.sampled_from(FORMATS)),
    )
    precision = Precision(draw(st.sampled_from(PRECISIONS)))
    activation = draw(st.sampled_from(FUNCTIONS))
    channels = draw(st.integers(1, 6))
    kernel, stride = draw(st.sampled_from([1, 3, 5])), draw(st.integers(1, 2))
    paired = replace(tensor, channels=2 * tensor.channels)
    match draw(st.sampled_from(["residual", "conv", "head", "shuffle", "deep", "basic", "stem"])):
        case "shuffle":
            return shuffle_unit(
                paired, channels + 12, kernel=kernel, middle=4, stride=stride, precision=precision
            )
        case "deep":
            return xception_unit(
                paired, channels + 12, middle=4, stride=stride, precision=precision
            )
        case "basic":
            width = draw(st.sampled_from([channels, tensor.channels]))
            return basic_block(tensor, width, inner=4, stride=stride, precision=precision)
        case "stem":
            return pooled_stem(tensor, channels, precision=precision)
        case "residual":
            return inverted_residual(
                tensor,
                draw(st.sampled_from([channels, tensor.channels])),
                kernel=kernel,
                stride=stride,
                expansion=draw(st.integers(1, 4)),
                squeeze=draw(st.sampled_from([0, 0, 1])),
                precision=precision,
                activation=activation,
            )
        case "conv":
            return conv_norm_activation(
                tensor,
                channels,
                kernel=kernel,
                stride=stride,
                precision=precision,
                activation=activation,
            )
        case _:
            return classifier(tensor, channels, 5, precision=precision, activation=activation)


def _residual(precision: str, fmt: str = "fp32", activation: str = "relu") -> OpSpec:
    return inverted_residual(
        Tensor(4, 6, 6, Format.parse(fmt)),
        4,
        kernel=3,
        expansion=3,
        precision=Precision(precision),
        activation=activation,
    )


def _signs(op: OpSpec) -> dict[int, str]:
    return {index: "+-" if q.signed else "+" for index, q in op.quantisers.items()}


# ---- shapes and signs, against PyTorch


@settings(max_examples=60, deadline=None)
@given(op=ops(), seed=st.integers(0, 99))
def test_shapes_and_signs_are_those_of_the_op_run_in_pytorch(op: OpSpec, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=rng)

    outputs: dict[int, torch.Tensor] = {}

    def weighted(index: int, layer: Layer, value: torch.Tensor) -> torch.Tensor:
        weight = random(*layer.weight_shape(value.shape[1]))
        if layer.kind == "linear":
            return functional.linear(value, weight)
        return functional.conv2d(
            value, weight, stride=layer.stride, padding=layer.kernel // 2, groups=layer.groups
        )

    def keep(index: int, value: torch.Tensor, relu: bool) -> torch.Tensor:
        outputs[index] = value.relu() if relu else value
        return outputs[index]

    tensor = op.inputs[0]
    given_value = random(2, tensor.channels, tensor.height, tensor.width)
    given_value = given_value if tensor.format.signed else given_value.abs()
    final = run_op(op, [given_value], weighted, keep)
    outputs[len(op.values) - 1] = final
    for index, value in outputs.items():
        stated = op.values[index]
        expected = (2, stated.channels, stated.height, stated.width)
        assert tuple(value.shape) == expected[: value.ndim]
        assert stated.format.signed or value.min() >= 0


@given(op=ops())
@settings(max_examples=60, deadline=None)
def test_a_float_op_hands_on_its_own_type_and_an_integer_op_its_activation_bits(op: OpSpec) -> None:
    if op.logits and op.precision.is_integer:
        assert not op.output.format.is_quantised
    else:
        assert op.output.format == op.precision.format(signed=op.output.format.signed)
    assert op.values[0] == op.inputs[0]


# ---- where an op quantises, or casts


@given(op=ops())
@settings(max_examples=60, deadline=None)
def test_a_short_float_casts_what_an_integer_op_of_float_inputs_quantises(op: OpSpec) -> None:
    floats = tuple(replace(t, format=Format(signed=t.format.signed)) for t in op.inputs)
    integer = replace(op, inputs=floats, precision=Precision("w8a8"))
    for name in ("fp16", "bf16", "fp8"):
        assert replace(op, inputs=floats, precision=Precision(name)).casts == set(
            integer.quantisers
        )
        inputs = tuple(replace(t, format=Format(name, t.format.signed)) for t in op.inputs)
        inside = replace(op, inputs=inputs, precision=Precision(name)).casts
        assert inside == {i for i in integer.quantisers if i >= len(inputs)}
    for name in ("fp32", "tf32", "w4a8", "pact-w2a2"):
        assert not replace(op, precision=Precision(name)).casts


def test_a_float_op_quantises_nothing_whatever_its_input() -> None:
    for fmt in ("fp32", "a8", "a4+"):
        assert _residual("fp16", fmt).quantisers == {}


def test_a_residual_block_quantises_all_but_what_feeds_a_relu() -> None:
    # input, (conv), relu, (depthwise), relu, project, sum
    assert _signs(_residual("w8a8")) == {0: "+-", 2: "+", 4: "+", 5: "+-", 6: "+-"}
    assert set(_residual("w8a4").quantisers.values()) == {Quantiser(4, True), Quantiser(4, False)}


def test_codes_that_come_in_are_not_quantised_again() -> None:
    assert _signs(_residual("w8a8", "a8")) == {2: "+", 4: "+", 5: "+-", 6: "+-"}
    assert 0 not in _residual("w4a4", "a8+").quantisers
    assert _residual("w8a8", "fp16+").quantisers[0] == Quantiser(8, False)


@settings(max_examples=200, deadline=None)
@given(op=ops())
def test_a_rounded_norm_is_one_whose_very_values_a_quantiser_is_given(op: OpSpec) -> None:
    """Seen by running the op: which values of layers with a norm arrive at which quantiser."""
    made: dict[int, int] = {}
    arrived: dict[int, tuple[int, bool]] = {}
    kept: list[torch.Tensor] = []

    def weighted(index: int, layer: Layer, value: torch.Tensor) -> torch.Tensor:
        stated = op.values[len(op.inputs) + index]
        shape = (2, stated.channels, stated.height, stated.width)
        kept.append(torch.zeros(shape if layer.kind == "conv" else shape[:2]))
        if layer.norm:
            made[id(kept[-1])] = index
        return kept[-1]

    def quantise(index: int, value: torch.Tensor, relu: bool) -> torch.Tensor:
        if id(value) in made:
            arrived[made[id(value)]] = (index, relu)
        kept.append(value.clone())
        return kept[-1]

    run_op(
        op, [torch.zeros(2, t.channels, t.height, t.width) for t in op.inputs], weighted, quantise
    )
    assert op.rounded_norms == arrived


def test_the_value_before_another_activation_than_relu_is_quantised_too() -> None:
    for activation, sign in [("relu6", "+"), ("hard_swish", "+-"), ("sigmoid", "+")]:
        op = _residual("w8a8", "a8", activation)
        assert _signs(op) == {1: "+-", 2: sign, 3: "+-", 4: sign, 5: "+-", 6: "+-"}


def test_squeeze_excite_quantises_the_means_and_both_sides_of_its_sigmoid() -> None:
    op = inverted_residual(
        Tensor(4, 6, 6, Format("a8")),
        8,
        kernel=3,
        expansion=2,
        precision=Precision("w8a8"),
        squeeze=4,
    )
    assert [str(layer) for layer in op.layers[4:10]] == [
        "pool(4)",
        "conv(5) c2 k1 s1 g1",
        "relu(6)",
        "conv(7) c8 k1 s1 g1",
        "sigmoid(8)",
        "mul(4,9)",
    ]
    # 5 the means, 6 feeds a relu, 8 and 9 around the sigmoid, 10 the product, 11 the projection
    assert _signs(op) == {2: "+", 4: "+", 5: "+", 7: "+", 8: "+-", 9: "+", 10: "+", 11: "+-"}


def test_logits_stay_float_and_the_same_layers_without_logits_do_not() -> None:
    op = classifier(Tensor(4, 6, 6), 8, 5, precision=Precision("w8a8"))
    assert _signs(op) == {0: "+-", 2: "+", 3: "+"}
    assert op.output.format == Format("fp32")
    assert _signs(replace(op, logits=False)) == {0: "+-", 2: "+", 3: "+", 4: "+-"}


def test_a_value_that_a_relu_and_a_sum_both_read_is_quantised() -> None:
    op = OpBuilder(Precision("w8a8"), Tensor(4, 6, 6, Format("a8")))
    value = op.conv(0, 4, role="conv")
    op.add(op.relu(value), value)
    assert _signs(op.build()) == {1: "+-", 2: "+", 3: "+-"}


def test_a_sum_is_unsigned_only_if_both_sides_are() -> None:
    for left, right, sign in [("a8+", "a8+", "+"), ("a8+", "a8", "+-"), ("a8", "a8+", "+-")]:
        inputs = [Tensor(4, 6, 6, Format.parse(text)) for text in (left, right)]
        op = OpBuilder(Precision("w8a8"), *inputs)
        op.add(0, 1)
        assert _signs(op.build()) == {2: sign}


def test_what_is_moved_stays_on_its_grid_and_what_is_joined_gets_one() -> None:
    """value 1 even, 2 odd, 3 the convolution, 4 its relu, 5 both, 6 its largest"""
    for fmt, bits in [("fp32+", 4), ("a8+", 8), ("a2+", 2)]:
        op = OpBuilder(Precision("w4a4"), Tensor(4, 6, 6, Format.parse(fmt)))
        even, odd = op.half(0, "even"), op.half(0, "odd")
        op.max_pool(op.concat(even, op.relu(op.conv(odd, 6, role="a"))), kernel=3, stride=2)
        spec = op.build()
        expected = {4: "+", 5: "+"} if fmt.startswith("a") else {0: "+", 4: "+", 5: "+"}
        assert _signs(spec) == expected
        assert [str(v.format) for v in spec.values[1:3]] == [f"a{bits}+"] * 2
        assert [str(v) for v in spec.values[4:]] == ["a4+:6x6x6", "a4+:8x6x6", "a4+:8x3x3"]
        assert spec.bitops == 2 * 6 * 36 * 4 * bits


def test_what_is_joined_is_unsigned_only_if_both_sides_are() -> None:
    for left, right, sign in [("a8+", "a8+", "+"), ("a8+", "a8", "+-"), ("a8", "a8+", "+-")]:
        inputs = [Tensor(4, 6, 6, Format.parse(text)) for text in (left, right)]
        op = OpBuilder(Precision("w8a8"), *inputs)
        op.concat(0, 1)
        assert _signs(op.build()) == {2: sign}


# ---- keys


def test_roles_are_not_part_of_the_key() -> None:
    op = _residual("w8a8")
    renamed = replace(op, layers=tuple(replace(x, role=f"{x.role}?") for x in op.layers))
    assert renamed != op
    assert renamed.key == op.key


def test_everything_that_changes_the_graph_changes_the_key() -> None:
    layers = (
        Layer("conv", (0,), "a", 8, kernel=3, stride=1, groups=2, norm=True),
        Layer("activation", (1,), function="relu"),
        Layer("conv", (2,), "b", 8),
        Layer("add", (3, 2)),
    )
    base = OpSpec((Tensor(4, 6, 6),), layers, Precision("w8a8"))

    def first(**change: object) -> OpSpec:
        return replace(base, layers=(replace(layers[0], **change), *layers[1:]))

    def one(index: int, layer: Layer) -> OpSpec:
        return replace(base, layers=(*layers[:index], layer, *layers[index + 1 :]))

    tensor = base.inputs[0]
    variants = [
        base,
        first(kernel=5),
        first(stride=2),
        first(groups=1),
        first(norm=False),
        one(1, Layer("activation", (1,), function="relu6")),
        one(2, Layer("conv", (1,), "b", 8)),
        one(3, Layer("add", (2, 3))),
        one(3, Layer("half", (3,), function="even")),
        one(3, Layer("half", (3,), function="odd")),
        one(3, Layer("max_pool", (3,), kernel=3)),
        one(3, Layer("max_pool", (3,), kernel=5)),
        one(3, Layer("max_pool", (3,), kernel=3, stride=2)),
        one(2, Layer("conv", (2,), "b", 8, bias=False)),
        one(3, Layer("concat", (3, 2))),
        one(3, Layer("linear", (3,), "c", 8)),
        one(3, Layer("linear", (3,), "c", 8, bias=False)),
        replace(base, precision=Precision("w4a8")),
        replace(base, logits=True),
        *(
            replace(base, inputs=(replace(tensor, **change),))
            for change in (
                {"channels": 6},
                {"height": 7},
                {"width": 7},
                {"format": Format("a8")},
                {"format": Format("fp32", False)},
                {"format": Format("fp16")},
            )
        ),
        replace(base, inputs=(tensor, tensor), layers=tuple(_shift(x) for x in layers)),
    ]
    keys = [op.key for op in variants]
    assert len(set(keys)) == len(keys)


def _shift(layer: Layer) -> Layer:
    return replace(layer, inputs=tuple(i + 1 for i in layer.inputs))


# ---- JSON


@given(op=ops())
@settings(max_examples=100, deadline=None)
def test_an_op_reads_back_from_its_json(op: OpSpec) -> None:
    text = op.to_json()
    read = OpSpec.from_json(text)
    assert read == op
    assert read.key == op.key
    assert read.to_json() == text
    assert json.loads(text)["precision"] == op.precision.name


def test_a_layer_tells_of_its_bias_only_where_it_has_none() -> None:
    """Keys and texts that were stored before there was a choice are read and found as ever."""
    op = classifier(IMAGE, 8, 5, precision=Precision("fp32"))
    bare = classifier(IMAGE, 8, 5, precision=Precision("fp32"), bias=False)
    assert "bias" not in op.key + op.to_json()
    assert bare.key == op.key.replace("c5", "c5 no bias")
    assert bare.parameters == op.parameters - 5
    assert OpSpec.from_json(bare.to_json()) == bare


def test_an_op_with_two_inputs_of_different_formats_reads_back_from_its_json() -> None:
    inputs = (Tensor(4, 6, 5, Format("a8", False)), Tensor(4, 6, 5, Format("bf16")))
    op = OpBuilder(Precision("w4a8"), *inputs)
    op.add(0, 1)
    spec = op.build(logits=True)
    assert OpSpec.from_json(spec.to_json()) == spec


# ---- what is refused

IMAGE = Tensor(4, 6, 6)
GATE = Tensor(4, 1, 1)
MALFORMED = {
    "no layer": ((IMAGE,), ()),
    "no input": ((), (Layer("pool", (0,)),)),
    "its own output": ((IMAGE,), (Layer("pool", (1,)),)),
    "a later value": ((IMAGE,), (Layer("pool", (2,)), Layer("pool", (0,)))),
    "a negative value": ((IMAGE,), (Layer("pool", (-1,)),)),
    "an even kernel": ((IMAGE,), (Layer("conv", (0,), channels=4, kernel=2),)),
    "groups that split the input": ((IMAGE,), (Layer("conv", (0,), channels=6, groups=3),)),
    "groups that split the output": ((IMAGE,), (Layer("conv", (0,), channels=6, groups=4),)),
    "an unknown kind": ((IMAGE,), (Layer("shuffle", (0,)),)),
    "a concat of one value": ((IMAGE,), (Layer("concat", (0,)),)),
    "a concat of other sides": ((IMAGE, Tensor(4, 6, 5)), (Layer("concat", (0, 1)),)),
    "half of an odd number": ((Tensor(5, 6, 6),), (Layer("half", (0,), function="odd"),)),
    "neither half": ((IMAGE,), (Layer("half", (0,)),)),
    "an even window": ((IMAGE,), (Layer("max_pool", (0,), kernel=2),)),
    "a window that stays": ((IMAGE,), (Layer("max_pool", (0,), kernel=3, stride=0),)),
    "an unknown activation": ((IMAGE,), (Layer("activation", (0,), function="gelu"),)),
    "no activation": ((IMAGE,), (Layer("activation", (0,)),)),
    "a sum of different shapes": ((IMAGE, Tensor(4, 6, 5)), (Layer("add", (0, 1)),)),
    "a sum with a gate": ((IMAGE, GATE), (Layer("add", (0, 1)),)),
    "a gate that is not 1 x 1": ((IMAGE, IMAGE), (Layer("mul", (0, 1)),)),
    "a gate of other channels": ((IMAGE, Tensor(3, 1, 1)), (Layer("mul", (0, 1)),)),
    "a gate on the left": ((GATE, IMAGE), (Layer("mul", (0, 1)),)),
    "a layer that reads nothing": ((IMAGE,), (Layer("conv", (), channels=4),)),
    "a product of one value": ((IMAGE,), (Layer("mul", (0,)),)),
    "a sum of one value": ((IMAGE,), (Layer("add", (0,)),)),
    "a sum of three values": ((IMAGE,), (Layer("add", (0, 0, 0)),)),
    "zero groups": ((IMAGE,), (Layer("conv", (0,), channels=4, groups=0),)),
    "zero stride": ((IMAGE,), (Layer("conv", (0,), channels=4, stride=0),)),
    "zero channels": ((IMAGE,), (Layer("conv", (0,), channels=0),)),
    "a negative kernel": ((IMAGE,), (Layer("conv", (0,), channels=4, kernel=-3),)),
    "a linear layer without channels": ((IMAGE,), (Layer("linear", (0,)),)),
}


@pytest.mark.parametrize(("inputs", "layers"), MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_op_raises_value_error(
    inputs: tuple[Tensor, ...], layers: tuple[Layer, ...]
) -> None:
    with pytest.raises(ValueError, match=r"."):
        OpSpec(inputs, layers, Precision("fp32"))


def test_a_shape_that_does_not_fit_is_told_with_both_shapes() -> None:
    with pytest.raises(ValueError, match=r"4x6x6.*4x6x5"):
        OpSpec((IMAGE, Tensor(4, 6, 5)), (Layer("add", (0, 1)),), Precision("fp32"))


# ---- the builder


def test_the_builder_writes_what_the_layers_say() -> None:
    builder = OpBuilder(Precision("fp32"), IMAGE)
    value = builder.conv(0, 8, kernel=3, stride=2, groups=2, role="a")
    assert builder.channels(0) == 4
    assert builder.channels(value) == 8
    builder.mul(value, builder.activation(builder.pool(value), "sigmoid"))
    builder.linear(builder.relu(4), 5, role="b", bias=False)
    builder.concat(builder.half(1, "odd"), builder.max_pool(1, kernel=1, stride=1))
    by_hand = OpSpec(
        (IMAGE,),
        (
            Layer("conv", (0,), "a", 8, 3, 2, 2, True),
            Layer("pool", (1,)),
            Layer("activation", (2,), function="sigmoid"),
            Layer("mul", (1, 3)),
            Layer("activation", (4,), function="relu"),
            Layer("linear", (5,), "b", 5, bias=False),
            Layer("half", (1,), function="odd"),
            Layer("max_pool", (1,)),
            Layer("concat", (7, 8)),
        ),
        Precision("fp32"),
    )
    assert builder.build() == by_hand
    assert OpBuilder(Precision("fp32"), IMAGE, GATE).channels(1) == 4
