"""The emitter: what it writes computes what the PyTorch module computes, in the declared kernels.

Oracles: the stand-alone PyTorch module, ONNX Runtime without optimisation (a float simulation of
the integer graph), the ONNX checker, and hand-counted operators.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import (
    basic_block,
    classifier,
    conv_norm_activation,
    inverted_residual,
    pooled_classifier,
    pooled_stem,
    shuffle_unit,
    xception_unit,
)
from hwnas.spaces.mobile import Stage, mobile, mobile_tiny
from hwnas.spaces.resnet import resnet_tiny
from hwnas.spaces.shufflenet import shufflenet_tiny
from latency_tables.ops import OpBuilder, OpSpec, Tensor
from profilers.base import WrongKernels
from profilers.graphs import (
    OPS_METADATA,
    OpParameters,
    emit,
    expected_operators,
    kernel_biases,
    random_parameters,
    read_ops,
)
from profilers.modules import Network
from profilers.ort import OrtProfiler, optimised_operators
from profilers.ort_session import WATCHED, session_options
from quant.errors import InvalidInput
from quant.precision import ONNXRUNTIME, Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
FORMATS = ("fp32", "fp32+", "a8", "a8+")
LOW = tuple(map(Precision, ("w4a8", "w2a8", "w8a4", "w4a4", "w2a4", "w3a5", "w5a2")))
"""Precisions of fewer than eight bits: of weights, of activations, of both."""
CHANNELS, SIDE, BATCH = 8, 10, 3
INPUT_LIMIT = 3.0
SIMULATION = ort.GraphOptimizationLevel.ORT_DISABLE_ALL

Block = Callable[[Tensor, Precision, str], OpSpec]
Trained = Callable[..., Network]

BLOCKS: dict[str, Block] = {
    "conv": lambda t, p, a: conv_norm_activation(t, 12, kernel=3, precision=p, activation=a),
    "conv stride 2": lambda t, p, a: conv_norm_activation(
        t, 12, kernel=5, stride=2, precision=p, activation=a
    ),
    "residual": lambda t, p, a: inverted_residual(
        t, t.channels, kernel=3, expansion=3, precision=p, activation=a
    ),
    "no residual": lambda t, p, a: inverted_residual(
        t, 16, kernel=5, expansion=3, precision=p, activation=a
    ),
    "stride 2": lambda t, p, a: inverted_residual(
        t, 16, kernel=7, expansion=6, stride=2, precision=p, activation=a
    ),
    "squeeze": lambda t, p, a: inverted_residual(
        t, t.channels, kernel=3, expansion=4, squeeze=4, precision=p, activation=a
    ),
    "squeeze, no residual": lambda t, p, a: inverted_residual(
        t, 12, kernel=3, expansion=4, squeeze=4, precision=p, activation=a
    ),
    "expansion 1": lambda t, p, a: inverted_residual(
        t, 16, kernel=3, expansion=1, precision=p, activation=a
    ),
    "expansion 1 with residual": lambda t, p, a: inverted_residual(
        t, t.channels, kernel=3, expansion=1, precision=p, activation=a
    ),
    "classifier": lambda t, p, a: classifier(t, 32, 10, precision=p, activation=a),
}

RELU_BLOCKS: dict[str, Block] = {
    "shuffle": lambda t, p, a: shuffle_unit(t, t.channels, kernel=5, middle=12, precision=p),
    "shuffle, stride 2": lambda t, p, a: shuffle_unit(
        t, 2 * t.channels, kernel=3, middle=8, stride=2, precision=p
    ),
    "xception": lambda t, p, a: xception_unit(t, t.channels + 4, middle=12, precision=p),
    "xception, stride 2": lambda t, p, a: xception_unit(t, 20, middle=4, stride=2, precision=p),
    "basic": lambda t, p, a: basic_block(t, t.channels, inner=12, precision=p),
    "basic, stride 2": lambda t, p, a: basic_block(t, 12, inner=8, stride=2, precision=p),
    "pooled stem": lambda t, p, a: pooled_stem(t, 12, precision=p),
    "pooled classifier": lambda t, p, a: pooled_classifier(t, 10, precision=p, bias=False),
}
"""Those of other spaces, whose one activation is relu."""

every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=list(BLOCKS))
any_block = pytest.mark.parametrize(
    "block", (BLOCKS | RELU_BLOCKS).values(), ids=list(BLOCKS | RELU_BLOCKS)
)


def with_functions(*functions: str) -> pytest.MarkDecorator:
    """Every block with every activation that it can have."""
    cases = {f"{name}-{f}": (block, f) for name, block in BLOCKS.items() for f in functions}
    cases |= {f"{name}-relu": (block, "relu") for name, block in RELU_BLOCKS.items()}
    return pytest.mark.parametrize(("block", "function"), cases.values(), ids=list(cases))


every_format = pytest.mark.parametrize("kind", FORMATS)
every_low = pytest.mark.parametrize("precision", LOW, ids=str)
every_precision = pytest.mark.parametrize("precision", [FP32, W8A8], ids=str)


def tensor(kind: str = "fp32", channels: int = CHANNELS, side: int = SIDE) -> Tensor:
    return Tensor(channels, side, side, Format.parse(kind))


@dataclass(frozen=True)
class Feed:
    """The same images twice: as PyTorch takes them, and as the graph's input takes them."""

    values: np.ndarray
    graph: np.ndarray


def images(spec: Tensor, batch: int = BATCH, seed: int = 1) -> Feed:
    rng = np.random.default_rng(seed)
    shape = (batch, spec.channels, spec.height, spec.width)
    values = rng.standard_normal(shape).astype(np.float32)
    values = values if spec.format.signed else np.abs(values)
    if not spec.format.is_quantised:
        return Feed(values, values)
    grid = ONNXRUNTIME.grid(spec.format.bits, signed=spec.format.signed)
    step = np.float32(INPUT_LIMIT) / np.float32(grid.top)
    codes = np.clip(np.rint(values / step), grid.low, grid.high)
    return Feed((codes * step).astype(np.float32), (codes - grid.low).astype(np.uint8))


def run(
    model: onnx.ModelProto, feed: np.ndarray, level: ort.GraphOptimizationLevel | None = None
) -> np.ndarray:
    options = session_options(1)
    if level is not None:
        options.graph_optimization_level = level
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"input": feed})[0]


def both(
    trained: Trained, ops: list[OpSpec], seed: int = 0
) -> tuple[onnx.ModelProto, list[OpParameters], Feed, np.ndarray]:
    """The graph of trained ops, the images for it, and PyTorch's output on them."""
    feed = images(ops[0].inputs[0], seed=seed + 1)
    network = trained(ops, feed.values, seed=seed)
    parameters = network.parameters_for_graph()
    if ops[0].inputs[0].format.is_quantised:
        parameters[0].limits[0] = INPUT_LIMIT
    with torch.no_grad():
        reference = network(torch.from_numpy(feed.values)).numpy()
    return emit(ops, parameters), parameters, feed, reference


def steps(op: OpSpec, parameters: OpParameters, *outputs: np.ndarray) -> list[np.ndarray]:
    """Outputs of an integer op in its output's quantisation steps.

    Logits are not quantised: their step is a 255th of the range of the first output.
    """
    if op.logits:
        step = (outputs[0].max() - outputs[0].min()) / 255
        return [output / step for output in outputs]
    last = max(op.quantisers)  # a max pool after it keeps its grid
    quantiser = op.quantisers[last]
    grid = ONNXRUNTIME.grid(quantiser.bits, signed=quantiser.signed)
    step = parameters.limits[last] / grid.top
    return [
        output.astype(np.float64) + grid.low if output.dtype == np.uint8 else output / step
        for output in outputs
    ]


def random_model(ops: list[OpSpec], seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    parameters = [random_parameters(op, rng) for op in ops]
    for numbers in parameters:
        numbers.limits = {index: float(rng.uniform(0.5, 8)) for index in numbers.limits}
    return emit(ops, parameters)


# ---- every block runs in its declared kernels


@every_format
@every_precision
@any_block
def test_every_block_is_valid_onnx_and_runs_in_its_declared_kernels(
    block: Block, precision: Precision, kind: str
) -> None:
    model = random_model([block(tensor(kind), precision, "relu")])
    onnx.checker.check_model(model, full_check=True)
    OrtProfiler().check(model)


@every_format
@pytest.mark.parametrize("function", ["sigmoid", "hard_sigmoid", "hard_swish"])
@every_block
def test_integer_blocks_with_other_activations_run_as_declared(
    block: Block, function: str, kind: str
) -> None:
    model = random_model([block(tensor(kind), W8A8, function)])
    onnx.checker.check_model(model, full_check=True)
    OrtProfiler().check(model)


@pytest.mark.parametrize("function", ["hard_sigmoid", "hard_swish"])
@every_block
def test_only_the_declared_activations_run_in_float_inside_an_integer_op(
    block: Block, function: str
) -> None:
    op = block(tensor("a8"), W8A8, function)
    islands = sum(layer.function == function for layer in op.layers)
    found = optimised_operators(random_model([op]))
    # ONNX Runtime writes HardSwish as a HardSigmoid and a Mul.
    assert found["HardSigmoid"] + found["HardSwish"] == islands
    assert found["QuantizeLinear"] == found["DequantizeLinear"] == islands
    assert found["Conv"] == found["Gemm"] == found["Add"] == found["GlobalAveragePool"] == 0


def test_the_number_of_threads_changes_no_kernel() -> None:
    model = random_model([BLOCKS["squeeze"](tensor(), W8A8, "hard_swish")])
    assert optimised_operators(model, threads=2) == optimised_operators(model, threads=1)


@pytest.mark.parametrize(
    ("op", "counted"),
    [
        (
            BLOCKS["squeeze"](tensor("fp32"), W8A8, "relu"),
            {
                "QuantizeLinear": 1,
                "QLinearConv": 6,  # one with weights of 1 on the input that is added
                "QLinearGlobalAveragePool": 1,
                "QLinearSigmoid": 1,
                "QLinearMul": 1,
                "QLinearAdd": 1,
            },
        ),
        (
            BLOCKS["squeeze"](tensor("a8"), W8A8, "hard_swish"),
            {
                "QuantizeLinear": 2,
                "DequantizeLinear": 2,
                "QLinearConv": 5,
                "QLinearGlobalAveragePool": 1,
                "QLinearSigmoid": 1,
                "QLinearMul": 1,
                "QLinearAdd": 1,
            },
        ),
        (BLOCKS["squeeze"](tensor("a8"), FP32, "relu"), {"DequantizeLinear": 1, "Conv": 5}),
        (
            BLOCKS["classifier"](tensor("a8+"), W8A8, "relu"),
            {"QLinearConv": 1, "QLinearGlobalAveragePool": 1, "QGemm": 1},
        ),
        (BLOCKS["classifier"](tensor("fp32"), FP32, "relu6"), {"Conv": 1, "Gemm": 1}),
        (
            RELU_BLOCKS["shuffle"](tensor("fp32"), W8A8, "relu"),
            {"QuantizeLinear": 1, "QLinearConv": 3, "QLinearConcat": 1},
        ),
        (
            RELU_BLOCKS["xception, stride 2"](tensor("a8"), W8A8, "relu"),
            {"QLinearConv": 8, "QLinearConcat": 1},
        ),
        (RELU_BLOCKS["shuffle"](tensor("a8"), FP32, "relu"), {"DequantizeLinear": 1, "Conv": 3}),
        (
            RELU_BLOCKS["basic"](tensor("fp32"), W8A8, "relu"),
            {"QuantizeLinear": 1, "QLinearConv": 3, "QLinearAdd": 1},
        ),
        (
            RELU_BLOCKS["basic, stride 2"](tensor("fp32"), W8A8, "relu"),
            {"QuantizeLinear": 1, "QLinearConv": 3, "QLinearAdd": 1},
        ),
        (RELU_BLOCKS["pooled stem"](tensor("a8"), W8A8, "relu"), {"QLinearConv": 1}),
    ],
    ids=[
        "squeeze",
        "hard_swish",
        "fp32",
        "classifier",
        "fp32 classifier",
        "shuffle",
        "xception",
        "fp32 shuffle",
        "basic",
        "projected",
        "pooled stem",
    ],
)
def test_expected_and_optimised_operators_are_those_counted_by_hand(
    op: OpSpec, counted: dict[str, int]
) -> None:
    assert expected_operators([op]) == counted
    found = optimised_operators(random_model([op]))
    assert {kind: found[kind] for kind in WATCHED if found[kind]} == counted


# ---- numbers


@every_format
@with_functions("relu", "relu6", "sigmoid", "hard_sigmoid", "hard_swish")
def test_a_float_graph_computes_what_pytorch_computes(
    trained: Trained, block: Block, function: str, kind: str
) -> None:
    model, _, feed, reference = both(trained, [block(tensor(kind), FP32, function)])
    np.testing.assert_allclose(run(model, feed.graph), reference, rtol=1e-4, atol=1e-4)


@every_format
@with_functions("relu", "sigmoid", "hard_sigmoid", "hard_swish")
def test_an_integer_graph_is_within_a_step_of_pytorch(
    trained: Trained, block: Block, function: str, kind: str
) -> None:
    """Two exact differences are allowed for. The graph's bias is rounded to the accumulator's grid
    (PyTorch's is not) and sums are ordered differently, so a value near a tie may take the
    neighbouring code (under 2 % of the values); where such a code lies inside the block, the
    convolutions after it may carry it one step further (one, or under 0.1 % for each convolution
    after the second; never beyond 2 steps).
    """
    op = block(tensor(kind), W8A8, function)
    model, (parameters,), feed, reference = both(trained, [op])
    wanted, found = steps(op, parameters, reference, run(model, feed.graph, SIMULATION))
    away = np.abs(found - wanted)
    assert away.max() < 2.5
    after = sum(layer.kind == "conv" for layer in op.layers) - 2
    assert (away > 1.5).sum() <= max(1, 0.001 * after * away.size)
    assert (away > 0.5).mean() <= 0.02
    assert np.ptp(wanted) > 60, "the images must reach a good part of the grid"


@every_format
@with_functions("relu", "sigmoid", "hard_swish")
def test_integer_kernels_compute_what_the_float_simulation_computes(
    trained: Trained, block: Block, function: str, kind: str
) -> None:
    """Kernels requantise in one multiplication where the simulation divides: ties may differ."""
    op = block(tensor(kind), W8A8, function)
    model, (parameters,), feed, _ = both(trained, [op])
    simulated, found = steps(
        op, parameters, run(model, feed.graph, SIMULATION), run(model, feed.graph)
    )
    away = np.abs(found - simulated)
    assert away.max() < 1.5
    assert (away > 0.5).mean() <= 0.005


def test_a_float_network_computes_what_pytorch_computes(trained: Trained) -> None:
    space = mobile_tiny(classes=10)
    ops = list(space.lower(space.architecture([0] * len(space.genes))))
    assert {op.precision for op in ops} == {FP32}
    model, _, feed, reference = both(trained, ops)
    np.testing.assert_allclose(run(model, feed.graph), reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("names", [("w8a8", "fp32"), ("fp32", "w8a8"), ("w8a8", "w8a8")])
def test_a_chain_hands_on_scale_and_format(trained: Trained, names: tuple[str, str]) -> None:
    """Between ops of any precision; in steps of the output (or of 1/255 of a float one's range):
    the first op's tied codes reach the second, so 2 steps and 3 % of the values."""
    first = BLOCKS["residual"](tensor(), Precision(names[0]), "relu")
    second = BLOCKS["residual"](first.output, Precision(names[1]), "relu")
    model, parameters, feed, reference = both(trained, [first, second])
    found = run(model, feed.graph)
    if names[1] == "fp32":
        unit = np.ptp(reference) / 255
        wanted, found = reference / unit, found / unit
    else:
        wanted, found = steps(second, parameters[1], reference, found)
    away = np.abs(found - wanted)
    assert away.max() < 2.5
    assert (away > 0.5).mean() <= 0.03


@every_precision
@any_block
def test_the_batch_is_symbolic(block: Block, precision: Precision) -> None:
    model = random_model([block(tensor(), precision, "relu")])
    (graph_input,) = model.graph.input
    assert graph_input.type.tensor_type.shape.dim[0].dim_param == "batch"
    feed = images(tensor(), batch=3).graph
    together = run(model, feed)
    alone = np.concatenate([run(model, feed[i : i + 1]) for i in range(3)])
    assert together.shape == alone.shape
    if together.dtype == np.uint8:
        np.testing.assert_array_equal(together, alone)
    else:
        np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kinds", list(itertools.product(FORMATS, repeat=2)), ids="/".join)
def test_an_op_of_two_inputs_adds_them(kinds: tuple[str, str]) -> None:
    """Within half a step of the output, plus a step of each input that the op quantises (half for
    rounding; a whole one at the end of a signed grid, whose last code stands a step below)."""
    builder = OpBuilder(W8A8, *(tensor(kind) for kind in kinds))
    builder.add(0, 1)
    op = builder.build()
    left, right = (images(spec, seed=seed) for seed, spec in enumerate(op.inputs))
    limits = {0: INPUT_LIMIT, 1: INPUT_LIMIT, 2: 2 * INPUT_LIMIT}
    model = emit([op], [OpParameters({}, limits)])
    OrtProfiler().check(model)
    with OrtProfiler().prepare(model) as session:
        codes = session.run(left.graph, right.graph)
    grid = ONNXRUNTIME.grid(8, signed=op.quantisers[2].signed)
    found = (codes.astype(np.float64) + grid.low) * limits[2] / grid.top
    ends = [INPUT_LIMIT if spec.format.signed else 0 for spec in op.inputs]
    wanted = sum(
        np.clip(feed.values, -end, INPUT_LIMIT)
        for feed, end in zip((left, right), ends, strict=True)
    )
    wanted = np.clip(wanted, grid.low / grid.top * limits[2], grid.high / grid.top * limits[2])
    allowed = limits[2] / grid.top / 2
    for index, spec in enumerate(op.inputs):
        if index in op.quantisers:
            top = ONNXRUNTIME.grid(8, signed=spec.format.signed).top
            allowed += INPUT_LIMIT / top
    assert np.abs(found - wanted).max() <= allowed * 1.001


# ---- values that are moved: codes stay on their grid


MOVED: dict[str, Callable[[OpBuilder], int]] = {
    "even": lambda op: op.half(0, "even"),
    "odd": lambda op: op.half(0, "odd"),
    "odd of even": lambda op: op.half(op.half(0, "even"), "odd"),
    "max_pool": lambda op: op.max_pool(0, kernel=3, stride=2),
    "max_pool, stride 1": lambda op: op.max_pool(0, kernel=5, stride=1),
}


def moved_by_numpy(name: str, values: np.ndarray) -> np.ndarray:
    """Written again without libraries: windows are cut at the border, channels are listed."""
    match name:
        case "even":
            return values[:, [0, 2, 4, 6]]
        case "odd":
            return values[:, [1, 3, 5, 7]]
        case "odd of even":
            return values[:, [2, 6]]
    kernel, stride = (5, 1) if "stride 1" in name else (3, 2)
    side, reach = values.shape[-1], kernel // 2
    starts = range(0, side, stride)
    found = [
        values[:, :, max(0, i - reach) : i + reach + 1, max(0, j - reach) : j + reach + 1].max(
            (2, 3)
        )
        for i in starts
        for j in starts
    ]
    return np.stack(found, -1).reshape(*values.shape[:2], len(starts), len(starts))


@pytest.mark.parametrize("side", [9, 10])
@pytest.mark.parametrize("name", MOVED)
@every_format
def test_what_is_moved_keeps_its_values_to_the_last_bit(name: str, kind: str, side: int) -> None:
    """Negative values next to the border too: what pads a max pool is below them."""
    for precision in (FP32, W8A8):
        builder = OpBuilder(precision, tensor(kind, side=side))
        MOVED[name](builder)
        op = builder.build()
        quantised = precision.is_integer and not op.inputs[0].format.is_quantised
        parameters = OpParameters({}, {0: INPUT_LIMIT})
        model = emit([op], [parameters])
        onnx.checker.check_model(model, full_check=True)
        assert expected_operators([op]) == {
            k: 1 for k, there in (
                ("QuantizeLinear", quantised),
                ("DequantizeLinear", op.inputs[0].format.is_quantised and precision == FP32),
            ) if there
        }  # fmt: skip
        OrtProfiler().check(model)
        feed = images(op.inputs[0])
        given = feed.graph
        if quantised:
            grid = ONNXRUNTIME.grid(8, signed=op.inputs[0].format.signed)
            step = np.float32(INPUT_LIMIT / grid.top)
            given = np.clip(np.rint(feed.values / step), grid.low, grid.high) - grid.low
            given = given.astype(np.uint8)
        elif precision == FP32:
            given = feed.values
        found = run(model, feed.graph)
        assert found.dtype == given.dtype
        np.testing.assert_array_equal(found, moved_by_numpy(name, given))


@pytest.mark.parametrize("kinds", list(itertools.product(("a8", "a8+"), repeat=2)), ids="/".join)
def test_an_op_of_two_inputs_joins_them_on_one_grid(kinds: tuple[str, str]) -> None:
    """Each half within half a step of the output; channels keep their order."""
    builder = OpBuilder(W8A8, tensor(kinds[0], channels=4), tensor(kinds[1], channels=6))
    builder.concat(0, 1)
    op = builder.build()
    limits = {0: INPUT_LIMIT, 1: 0.7 * INPUT_LIMIT, 2: 1.1 * INPUT_LIMIT}
    model = emit([op], [OpParameters({}, limits)])
    OrtProfiler().check(model)
    feeds = [images(spec, seed=seed) for seed, spec in enumerate(op.inputs)]
    with OrtProfiler().prepare(model) as session:
        codes = session.run(*(feed.graph for feed in feeds))
    signed = op.quantisers[2].signed
    assert signed == ("a8" in kinds)
    grid = ONNXRUNTIME.grid(8, signed=signed)
    step = limits[2] / grid.top
    wanted = np.concatenate([feeds[0].values, 0.7 * feeds[1].values], axis=1)
    found = (codes.astype(np.float64) + grid.low) * step
    assert np.abs(found - np.clip(wanted, grid.low * step, grid.high * step)).max() <= 0.5001 * step


# ---- residual blocks at a change of format: what was added changes no value

ADDED = {"a8": (FP32, "AveragePool"), "a8+": (FP32, "AveragePool"), "fp32": (W8A8, "Conv")}
at_a_change = pytest.mark.parametrize("kind", [*ADDED, "fp32+"])


def changing(kind: str, name: str = "residual") -> tuple[OpSpec, str]:
    """A residual block that converts its input, and the operator that is there for its layout."""
    precision, added = ADDED[kind.replace("fp32+", "fp32")]
    return BLOCKS[name](tensor(kind), precision, "relu"), added


def without(model: onnx.ModelProto, added: str) -> onnx.ModelProto:
    """The model as it would be without what stands between a converted input and its readers."""
    plain = onnx.ModelProto.FromString(model.SerializeToString())
    given, kept = ".in0.codes", ".in0.kept"
    if added == "AveragePool":
        (pool,) = [node for node in plain.graph.node if node.op_type == "AveragePool"]
        given, kept = pool.input[0], pool.output[0]
    for node in plain.graph.node:
        node.input[:] = [
            name.replace(kept, given) if name.endswith(kept) else name for name in node.input
        ]
    assert plain != model
    return plain


@at_a_change
@pytest.mark.parametrize("name", ["residual", "squeeze", "expansion 1 with residual"])
def test_a_residual_block_at_a_change_of_format_computes_what_it_would_without_the_added_layer(
    trained: Trained, name: str, kind: str
) -> None:
    """To the last bit; where both are optimised floats are summed in another order."""
    op, added = changing(kind, name)
    model, _, feed, _ = both(trained, [op])
    plain = without(model, added)
    np.testing.assert_array_equal(
        run(model, feed.graph, SIMULATION), run(plain, feed.graph, SIMULATION)
    )
    found, wanted = run(model, feed.graph), run(plain, feed.graph)
    if op.precision.is_integer:
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@at_a_change
def test_what_a_residual_block_adds_is_the_modules_converted_input_to_the_last_bit(
    kind: str,
) -> None:
    """Its convolutions have weights of zero, so that nothing else is left. Codes of the output are
    those of the input, which has the same range."""
    op, added = changing(kind)
    network = Network([op], ONNXRUNTIME).eval()
    (module,) = network.op_modules
    with torch.no_grad():
        for layer in module.weighted_layers.values():
            layer.weight.zero_()
    for quantiser in module.activation_quantisers.values():
        quantiser.limit = INPUT_LIMIT
    (parameters,) = network.parameters_for_graph()
    parameters.limits[0] = INPUT_LIMIT
    feed = images(op.inputs[0])
    with torch.no_grad():
        wanted = network(torch.from_numpy(feed.values)).numpy()
    model = emit([op], [parameters])
    assert sum(node.op_type == added for node in model.graph.node) == 1 + 3 * (added == "Conv")
    for level in (None, SIMULATION):
        found = run(model, feed.graph, level)
        if op.precision.is_integer:
            found, expected = steps(op, parameters, found, wanted)
            np.testing.assert_array_equal(found, np.rint(expected))
        else:
            np.testing.assert_array_equal(found, wanted)
    assert len(np.unique(wanted)) > 100


@every_precision
def test_a_layer_is_added_only_where_a_block_that_adds_its_input_converts_it(
    precision: Precision,
) -> None:
    blocks = [*BLOCKS.values(), RELU_BLOCKS["basic"], RELU_BLOCKS["basic, stride 2"]]
    for block, kind in itertools.product(blocks, FORMATS):
        op = block(tensor(kind), precision, "relu")
        nodes = random_model([op]).graph.node
        written = Counter(node.op_type for node in nodes)
        convolutions = sum(layer.kind == "conv" for layer in op.layers)
        changes = op.adds(0) and op.inputs[0].format.is_quantised != precision.is_integer
        assert written["AveragePool"] == (changes and not precision.is_integer)
        assert written["Conv"] - convolutions == (changes and precision.is_integer)


# ---- fewer than eight bits


@pytest.mark.parametrize("kind", ["fp32", "a8+", "a4"])
@every_low
@every_block
def test_every_low_bit_block_is_valid_onnx_and_runs_in_its_declared_kernels(
    block: Block, precision: Precision, kind: str
) -> None:
    op = block(tensor(kind), precision, "relu")
    model = random_model([op])
    onnx.checker.check_model(model, full_check=True)
    OrtProfiler().check(model)
    found = optimised_operators(model)
    left = {"Transpose", "Flatten", "QGemm", *expected_operators([op])}
    assert set(found) <= left, "nothing runs in float, and nothing is unpacked at run time"


@pytest.mark.slow
@pytest.mark.parametrize("name", [*map(str, LOW), "w7a3", "pact-w1a2", "pact-w2a4", "pact-w7a8"])
def test_every_low_bit_block_with_any_input_and_activation_runs_as_declared(name: str) -> None:
    kinds = (*FORMATS, "a4", "a4+", "a2+")
    functions = ("relu", "sigmoid", "hard_sigmoid", "hard_swish")
    for block, kind, function in itertools.product(BLOCKS.values(), kinds, functions):
        OrtProfiler().check(random_model([block(tensor(kind), Precision(name), function)]))


@pytest.mark.parametrize(
    ("op", "clips"),
    [
        (BLOCKS["squeeze"](tensor("fp32"), Precision("w8a4"), "relu"), 10),
        (BLOCKS["squeeze"](tensor("a4"), Precision("w4a4"), "relu"), 9),
        (BLOCKS["squeeze"](tensor("fp32"), Precision("w4a8"), "relu"), 0),
        (BLOCKS["classifier"](tensor("a8+"), Precision("w2a2"), "relu"), 2),
        (BLOCKS["classifier"](tensor("a2+"), W8A8, "relu"), 0),
    ],
)
def test_the_clips_of_an_op_are_those_counted_by_hand(op: OpSpec, clips: int) -> None:
    """Of its input where that is float, expand, depthwise, pool, squeeze, excite, gate, scaled,
    project and sum; of the head's convolution and pool."""
    assert expected_operators([op])["Clip"] == clips
    assert optimised_operators(random_model([op]))["Clip"] == clips


def test_an_activation_that_is_bounded_at_both_ends_is_no_clip_of_codes() -> None:
    """Relu6 after a sum is not fused into a convolution; it is not counted as a clip of codes."""
    builder = OpBuilder(FP32, tensor())
    builder.activation(builder.add(builder.conv(0, CHANNELS, role="conv"), 0), "relu6")
    model = random_model([builder.build()])
    assert [node.op_type for node in model.graph.node].count("Clip") == 1
    assert optimised_operators(model)["Clip"] == 0
    OrtProfiler().check(model)


def test_a_missing_clip_is_found() -> None:
    model = random_model([BLOCKS["conv"](tensor("a8"), Precision("w8a4"), "relu")])
    (clip,) = [node for node in model.graph.node if node.op_type == "Clip"]
    model.graph.node.remove(clip)
    model.graph.node[-1].output[:] = clip.output
    with pytest.raises(WrongKernels, match="Clip 0 times, not 1"):
        OrtProfiler().check(model)


@pytest.mark.parametrize("before", [FP32, Precision("w8a4")], ids=str)
@pytest.mark.parametrize("precision", [W8A8, *LOW], ids=str)
@pytest.mark.parametrize("name", BLOCKS)
def test_an_integer_graph_is_pytorch_to_the_last_code_once_biases_are_rounded(
    trained: Trained, name: str, precision: Precision, before: Precision
) -> None:
    """What is left are values within a float's precision of a tie: at most one code in a thousand,
    by one step. No code is beyond its bits."""
    stem = BLOCKS["conv"](tensor(), before, "relu")
    op = BLOCKS[name](stem.output, precision, "relu")
    feed = images(stem.inputs[0])
    network = trained([stem, op], feed.values)
    network.round_biases()
    parameters = network.parameters_for_graph()
    model = emit([stem, op], parameters)
    with torch.no_grad():
        reference = network(torch.from_numpy(feed.values)).numpy()
    codes = run(model, feed.graph)
    if codes.dtype == np.uint8:
        bits = precision.activation_bits
        assert codes.max() < 2**bits
        assert len(np.unique(codes)) > 2**bits / 4
    wanted, *found = steps(op, parameters[1], reference, codes, run(model, feed.graph, SIMULATION))
    for away in (np.abs(each - wanted) for each in found):
        assert away.max() < 1.01
        assert (away > 0.01).mean() <= 0.001


def unpacked(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with plain signed bytes where packed codes were, as ONNX Runtime unpacks them."""
    plain = onnx.ModelProto.FromString(model.SerializeToString())
    graph = plain.graph
    parts = [node for node in graph.node if node.op_type in ("Cast", "Gather", "Reshape")]
    codes = [node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"]
    wanted = [node.output[0] for node in parts if node.output[0] in codes]
    values = [helper.make_tensor_value_info(name, TensorProto.INT8, None) for name in wanted]
    bare = helper.make_graph(parts, "codes", [], values, graph.initializer)
    unpacking = helper.make_model(
        bare, opset_imports=model.opset_import, ir_version=model.ir_version
    )
    options = session_options(1)
    options.graph_optimization_level = SIMULATION
    session = ort.InferenceSession(unpacking.SerializeToString(), options)
    for node in parts:
        graph.node.remove(node)
    for name, found in zip(wanted, session.run(wanted, {}), strict=True):
        graph.initializer.append(numpy_helper.from_array(found, name))
    read = {name for node in graph.node for name in node.input}
    for constant in [item for item in graph.initializer if item.name not in read]:
        graph.initializer.remove(constant)
    return plain


@pytest.mark.parametrize("name", ["w4a8", "w3a8", "w2a8", "w2a4", "pact-w1a2", "pact-w2a4"])
def test_packed_weights_are_unpacked_when_the_file_is_loaded(name: str) -> None:
    """The same operators, the same output to the last bit, and the codes that were written; in a
    file that is smaller by what packing saves."""
    op = inverted_residual(
        tensor("fp32", 32, 8), 32, kernel=3, expansion=3, squeeze=4, precision=Precision(name)
    )
    head = classifier(op.output, 64, 10, precision=Precision(name))
    parameters = [random_parameters(o, np.random.default_rng(3)) for o in (op, head)]
    model = emit([op, head], parameters)
    plain = unpacked(model)
    codes = [w.codes for numbers in parameters for w in numbers.weights.values()]
    bits = 2 if parameters[0].weights[0].top == 1 else 4
    packed_in = sum(node.op_type == "Gather" for node in model.graph.node)
    assert packed_in >= 3
    saved = len(plain.SerializeToString()) - len(model.SerializeToString())
    assert saved > 0.6 * sum(w.size for w in codes) * (1 - bits / 8)
    assert optimised_operators(model) == optimised_operators(plain)
    OrtProfiler().check(plain)
    feed = images(op.inputs[0]).graph
    np.testing.assert_array_equal(run(model, feed), run(plain, feed))
    np.testing.assert_array_equal(run(model, feed, SIMULATION), run(plain, feed, SIMULATION))
    written = {item.name: item for item in plain.graph.initializer}
    for number, (spec, numbers) in enumerate(zip((op, head), parameters, strict=True)):
        for index, weights in numbers.weights.items():
            label = f"op{number:03d}.{index}.{spec.layers[index].role}.weight.codes"
            np.testing.assert_array_equal(
                numpy_helper.to_array(written[label]), weights.kernel_codes
            )


# ---- whole networks


def test_random_networks_of_many_precisions_run_in_their_declared_kernels() -> None:
    """30 random architectures with any of nine precisions at any place; conversions and clips
    counted by hand."""
    names = ("fp32", "w8a8", "pact-w1a2", *map(str, LOW))
    space = mobile(
        "many", (Stage(1, 1, (16,)), Stage(2, 2, (32,), squeeze=4), Stage(2, 2, (48, 64))),
        classes=10, size=32, precisions=names, stem_precisions=names,
    )  # fmt: skip
    sampler, rng = UniformSampler(space), np.random.default_rng(7)
    for seed in range(30):
        ops = list(space.lower(sampler.sample(rng)))
        model = random_model(ops, seed)
        OrtProfiler().check(model)
        found = optimised_operators(model)
        pairs = list(itertools.pairwise([False, *(op.precision.is_integer for op in ops)]))
        assert found["QuantizeLinear"] == pairs.count((False, True))
        assert found["DequantizeLinear"] == pairs.count((True, False))
        low = [op for op in ops if op.precision.is_integer and op.precision.activation_bits < 8]
        assert found["Clip"] == sum(
            len(op.layers)
            - sum(layer.function == "relu" for layer in op.layers)
            + (not op.inputs[0].format.is_quantised)
            - op.logits
            for op in low
        )
        counted = {*WATCHED, "Transpose", "Flatten", "ReorderInput", "ReorderOutput"}
        floating = {"Add", "Mul", "AveragePool", "GlobalAveragePool", "Max"}
        assert set(found) <= counted | floating, "and nothing unpacks weights"


BOTH = ("fp32", "w8a8")


@pytest.mark.parametrize(
    "space",
    [
        mobile_tiny(classes=10),
        shufflenet_tiny(classes=10),
        resnet_tiny(classes=10, precisions=BOTH),
    ],
    ids=lambda space: space.name,
)
def test_random_mixed_networks_run_in_their_declared_kernels(space: SearchSpace) -> None:
    """40 random architectures. Conversions counted by hand: one wherever the format changes."""
    sampler, rng = UniformSampler(space), np.random.default_rng(7)
    mixed = 0
    for seed in range(40):
        ops = list(space.lower(sampler.sample(rng)))
        model = random_model(ops, seed)
        OrtProfiler().check(model)
        summed = sum((expected_operators([op]) for op in ops), Counter())
        assert expected_operators(ops) == summed
        found = optimised_operators(model)
        assert {kind: found[kind] for kind in WATCHED} == {kind: summed[kind] for kind in WATCHED}
        pairs = list(itertools.pairwise(op.precision.is_integer for op in ops))
        assert found["QuantizeLinear"] == pairs.count((False, True))
        assert found["DequantizeLinear"] == pairs.count((True, False))
        mixed += found["QuantizeLinear"] > 0 and found["DequantizeLinear"] > 0
    assert mixed >= 10, "the sample must hold mixed networks"


@pytest.mark.parametrize("squeeze", [0, 4])
def test_a_float_residual_between_integer_blocks_adds_no_conversion(squeeze: int) -> None:
    """The note on Max of one input in profilers/graphs.py: ONNX Runtime 1.31 puts two conversions
    more around a float residual block whose input is quantised."""
    ops, spec = [], tensor(channels=16, side=16)
    for precision in (FP32, W8A8, FP32, W8A8, FP32, W8A8):
        ops.append(
            inverted_residual(spec, 16, kernel=3, expansion=3, precision=precision, squeeze=squeeze)
        )
        spec = ops[-1].output
    found = optimised_operators(random_model(ops))
    assert found["QuantizeLinear"] == 3
    assert found["DequantizeLinear"] == 2
    OrtProfiler().check(random_model(ops))


@pytest.mark.parametrize("function", ["", "relu", "relu6", "hard_swish"])
@pytest.mark.parametrize("kernel", [1, 3])
def test_a_float_convolution_between_integer_blocks_stays_float(
    trained: Trained, kernel: int, function: str
) -> None:
    """The same note: ONNX Runtime would quantise its weights, so that the output would be off."""
    before = BLOCKS["no residual"](tensor(), W8A8, "relu")
    builder = OpBuilder(FP32, before.output)
    value = builder.conv(0, 16, kernel=kernel, role="conv")
    if function:
        builder.activation(value, function)
    floating = builder.build()
    after = BLOCKS["conv"](floating.output, W8A8, "relu")
    model, parameters, feed, reference = both(trained, [before, floating, after])
    OrtProfiler().check(model)
    assert optimised_operators(model)["Conv"] == 1
    wanted, found = steps(after, parameters[-1], reference, run(model, feed.graph))
    away = np.abs(found - wanted)
    assert away.max() < 2.5
    assert (away > 0.5).mean() <= 0.03


# ---- names


def test_an_op_is_written_alike_wherever_it_stands() -> None:
    """But for its number and that of the op before it; so it takes as many bytes."""
    for precision, function in itertools.product((FP32, W8A8, *LOW), ("relu", "hard_swish")):
        stem = conv_norm_activation(
            tensor(), CHANNELS, kernel=3, precision=W8A8, activation="hard_swish"
        )
        op = inverted_residual(
            stem.output, CHANNELS, kernel=3, expansion=3, squeeze=4,
            precision=precision, activation=function,
        )  # fmt: skip
        back = conv_norm_activation(
            op.output, CHANNELS, kernel=1, precision=W8A8, activation="hard_swish"
        )
        assert back.output == stem.output
        ops = [stem, op, back] * 5
        model = emit(ops, [random_parameters(o, np.random.default_rng(0)) for o in ops])
        written: dict[int, list[bytes]] = {}
        for node in model.graph.node:
            number = int(node.name[2:5])
            text = node.SerializeToString().replace(f"op{number:03d}".encode(), b"mine!")
            text = text.replace(f"op{number - 1:03d}".encode(), b"given")
            written.setdefault(number, []).append(text)
        assert len(written) == 15
        for number in range(3, 14):  # the first reads the input, the last is renamed
            assert written[number] == written[number % 3 or 3]


def test_every_name_is_there_once() -> None:
    space = mobile_tiny(classes=10)
    sampler, rng = UniformSampler(space), np.random.default_rng(11)
    for seed in range(10):
        graph = random_model(list(space.lower(sampler.sample(rng))), seed).graph
        values = [name for node in graph.node for name in node.output]
        values += [item.name for item in (*graph.initializer, *graph.input)]
        for names in (values, [node.name for node in graph.node]):
            assert all(names)
            assert len(names) == len(set(names))


# ---- a wrong declaration is found


def declare(model: onnx.ModelProto, ops: list[OpSpec]) -> onnx.ModelProto:
    """The model, with the metadata of other ops."""
    other = random_model(ops)
    wrong = onnx.ModelProto.FromString(model.SerializeToString())
    (mine,) = [item for item in wrong.metadata_props if item.key == OPS_METADATA]
    mine.value = next(i.value for i in other.metadata_props if i.key == OPS_METADATA)
    return wrong


@any_block
def test_a_graph_that_is_not_in_the_declared_precision_is_found(block: Block) -> None:
    floating, integer = (block(tensor(), p, "relu") for p in (FP32, W8A8))
    for truth, claim in ((floating, integer), (integer, floating)):
        with pytest.raises(WrongKernels, match=r"Conv|Gemm"):
            OrtProfiler().check(declare(random_model([truth]), [claim]))


@every_precision
def test_a_float_convolution_too_many_is_found(precision: Precision) -> None:
    model = random_model([BLOCKS["residual"](tensor(), precision, "relu")])
    eye = np.eye(CHANNELS, dtype=np.float32)[:, :, None, None]
    model.graph.initializer.append(numpy_helper.from_array(eye * 2, "extra.weight"))
    for node in model.graph.node:
        node.input[:] = ["extra" if name == "input" else name for name in node.input]
    model.graph.node.insert(0, helper.make_node("Conv", ["input", "extra.weight"], ["extra"]))
    onnx.checker.check_model(model, full_check=True)
    with pytest.raises(WrongKernels, match=r"Conv \d times, not"):
        OrtProfiler().check(model)


def test_a_bias_off_the_accumulators_grid_is_found() -> None:
    """ONNX Runtime then silently keeps the convolution in float."""
    model = random_model([BLOCKS["conv"](tensor("a8"), W8A8, "relu")])
    (scale,) = [i for i in model.graph.initializer if i.name.endswith("bias.scale")]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
    with pytest.raises(WrongKernels, match="QLinearConv 0 times, not 1"):
        OrtProfiler().check(model)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("conv", "no residual"), "DequantizeLinear 3 times, not 0"),
        (("residual", "residual"), "QuantizeLinear 1 times, not 2"),
    ],
    ids="/".join,
)
def test_a_chain_whose_formats_do_not_meet_is_found(names: tuple[str, str], told: str) -> None:
    """The second op says that its input is float; the first hands on codes. ONNX Runtime then runs
    even a convolution in float, or leaves a conversion out."""
    first = BLOCKS[names[0]](tensor(), W8A8, "relu")
    second = BLOCKS[names[1]](tensor("fp32", first.output.channels), W8A8, "relu")
    with pytest.raises(WrongKernels, match=told):
        OrtProfiler().check(random_model([first, second]))


def test_the_message_names_the_operators_and_the_op() -> None:
    op = BLOCKS["conv"](tensor("a8"), W8A8, "relu")
    wrong = declare(random_model([BLOCKS["conv"](tensor("a8"), FP32, "relu")]), [op])
    with pytest.raises(WrongKernels) as caught:
        OrtProfiler().check(wrong)
    assert op.key in str(caught.value)
    assert "DequantizeLinear 1 times, not 0" in str(caught.value)


# ---- refusals


@every_block
def test_relu6_has_no_integer_form(block: Block) -> None:
    op = block(tensor(), W8A8, "relu6")
    with pytest.raises(InvalidInput, match="relu6") as caught:
        random_model([op])
    assert "relu" in caught.value.accepted
    assert "relu6" not in caught.value.accepted
    assert caught.value.next_step


@pytest.mark.parametrize("name", ["fp16", "bf16", "tf32", "fp8", "pact-w8a8"])
def test_a_precision_without_a_kernel_is_refused_with_its_op(name: str) -> None:
    """DoReFa's weights of eight bits need codes up to 255, which are no signed bytes."""
    before = BLOCKS["conv"](tensor(), W8A8, "relu")
    op = BLOCKS["conv"](before.output, Precision(name), "relu")
    for call in (emit, kernel_biases):
        with pytest.raises(InvalidInput, match=name) as caught:
            call([before, op], [OpParameters({})] * 2)
        assert caught.value.what.endswith(f"Op 1 has it: {op.key}.")
        assert caught.value.accepted == "fp32, w<2-8>a<2-8>, pact-w<1-7>a<2-8>"
        assert caught.value.next_step


# ---- what a model says of itself


def test_a_model_tells_the_ops_that_it_was_emitted_from() -> None:
    spec, ops = tensor(), []
    for block, precision, function in itertools.product(
        list(BLOCKS.values())[:-1], (FP32, W8A8), ("relu", "hard_swish")
    ):
        ops.append(block(Tensor(8, 32, 32, spec.format), precision, function))
        spec = ops[-1].output
    ops.append(BLOCKS["classifier"](spec, W8A8, "relu"))
    for op in ops:
        (again,) = read_ops(random_model([op]))
        assert again.key == op.key
        assert again == op, "roles are kept too"
    chain = [BLOCKS["residual"](tensor(), FP32, "relu")]
    chain.append(BLOCKS["classifier"](chain[0].output, W8A8, "relu"))
    assert read_ops(random_model(chain)) == chain


def test_a_foreign_model_is_refused() -> None:
    value = helper.make_tensor_value_info("input", TensorProto.FLOAT, [1])
    output = helper.make_tensor_value_info("output", TensorProto.FLOAT, [1])
    node = helper.make_node("Relu", ["input"], ["output"])
    model = helper.make_model(helper.make_graph([node], "foreign", [value], [output]))
    with pytest.raises(InvalidInput, match=OPS_METADATA):
        read_ops(model)
    with pytest.raises(InvalidInput, match=OPS_METADATA):
        OrtProfiler().check(model)


@every_precision
@any_block
def test_random_parameters_are_those_of_their_generator(block: Block, precision: Precision) -> None:
    op = block(tensor("a8"), precision, "relu")
    model, same, other = (
        emit([op], [random_parameters(op, np.random.default_rng(seed))]) for seed in (3, 3, 4)
    )
    assert model.SerializeToString() == same.SerializeToString()
    assert model.SerializeToString() != other.SerializeToString()
