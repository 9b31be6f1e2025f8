"""TensorRT's flavour: types alone tell precision, and the numbers are PyTorch's on its grid.

Oracles that need no GPU: the stand-alone PyTorch module on TensorRT's grid, ONNX Runtime without
optimisation (a float simulation of the integer graph), the fp32 graph of rounded weights, the ONNX
checker, and ONNX Runtime's own check of types.
"""

import itertools
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from hwnas.spaces.mobile import Stage, mobile
from latency_tables.ops import OpBuilder, OpSpec, Tensor
from profilers.base import Session
from profilers.cuda import Card
from profilers.graph_module import GraphModule
from profilers.graphs import (
    INPUT,
    OpParameters,
    check_kernels,
    emit,
    random_parameters,
    runs_tf32,
)
from profilers.measure import Protocol
from profilers.modules import Network
from profilers.ort_session import session_options
from profilers.sizes import BASE_BYTES, file_bytes
from profilers.trt import check_output, runtime_on
from profilers.trt_build import build, wrong_kernels
from quant.errors import HwnasError, InvalidInput
from quant.fakequant import round_weight
from quant.integer import E4M3, FloatWeights, IntegerWeights
from quant.precision import TENSORRT, Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
FP8 = Precision("fp8")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "fp8", "w8a8")
HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
CODES = {
    "a8": TensorProto.INT8, "a8+": TensorProto.INT8,
    "fp8": TensorProto.FLOAT8E4M3FN, "fp8+": TensorProto.FLOAT8E4M3FN,
}  # fmt: skip
FORMATS = ("fp32", "fp16", "bf16", *CODES)
FUNCTIONS = ("relu", "relu6", "sigmoid", "hard_sigmoid", "hard_swish")
CHANNELS, SIDE = 8, 10
INPUT_LIMIT = 3.0

Block = Callable[[Tensor, Precision, str], OpSpec]
Trained = Callable[..., Network]

BLOCKS: dict[str, Block] = {
    "conv": lambda t, p, a: conv_norm_activation(
        t, 12, kernel=5, stride=2, precision=p, activation=a
    ),
    "residual": lambda t, p, a: inverted_residual(
        t, t.channels, kernel=3, expansion=3, precision=p, activation=a
    ),
    "stride 2": lambda t, p, a: inverted_residual(
        t, 16, kernel=7, expansion=6, stride=2, precision=p, activation=a
    ),
    "squeeze": lambda t, p, a: inverted_residual(
        t, t.channels, kernel=3, expansion=4, squeeze=4, precision=p, activation=a
    ),
    "classifier": lambda t, p, a: classifier(t, 32, 10, precision=p, activation=a),
}

every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=list(BLOCKS))
every_format = pytest.mark.parametrize("kind", FORMATS)
every_half = pytest.mark.parametrize("name", HALVES)


def tensor(kind: str = "fp32") -> Tensor:
    return Tensor(CHANNELS, SIDE, SIDE, Format.parse(kind))


def images(seed: int = 1, batch: int = 3) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, CHANNELS, SIDE, SIDE)).astype(np.float32)


def random_model(ops: list[OpSpec], seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    return emit(ops, [random_parameters(op, rng) for op in ops], TENSORRT)


def run(model: onnx.ModelProto, feed: np.ndarray) -> np.ndarray:
    """What the graph computes as it is written: no optimisation. Codes of fp8 come and go as
    floats."""
    model = with_floats_at_its_ends(model)
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {INPUT: feed})[0]


def with_floats_at_its_ends(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph with its fp8 inputs and outputs cast from and to floats, as NumPy has them."""
    other = onnx.ModelProto.FromString(model.SerializeToString())
    graph, fp8 = other.graph, TensorProto.FLOAT8E4M3FN
    for info in (*graph.input, *graph.output):
        if info.type.tensor_type.elem_type != fp8:
            continue
        info.type.tensor_type.elem_type = TensorProto.FLOAT
        inside, comes_in = f"{info.name}.fp8", info.name != "output"
        for node in graph.node:
            node.input[:] = [inside if name == info.name else name for name in node.input]
            node.output[:] = [inside if name == info.name else name for name in node.output]
        ends = [info.name, inside] if comes_in else [inside, info.name]
        kind = fp8 if comes_in else TensorProto.FLOAT
        cast = helper.make_node("Cast", ends[:1], ends[1:], inside, to=kind)
        graph.node.insert(0 if comes_in else len(graph.node), cast)
    return other


def retyped(model: onnx.ModelProto, given: int, kind: int) -> onnx.ModelProto:
    """The same graph with one float type in the place of another."""
    other = onnx.ModelProto.FromString(model.SerializeToString())
    for item in other.graph.initializer:
        if item.data_type == given:
            value = numpy_helper.to_array(item).astype(helper.tensor_dtype_to_np_dtype(kind))
            item.CopyFrom(numpy_helper.from_array(value, item.name))
    for node in other.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == given:
                attribute.i = kind
    for info in (*other.graph.input, *other.graph.output):
        if info.type.tensor_type.elem_type == given:
            info.type.tensor_type.elem_type = kind
    return other


def types(model: onnx.ModelProto) -> dict[str, int]:
    """The type of every tensor, as ONNX infers it."""
    graph = onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True).graph
    found = {i.name: i.type.tensor_type.elem_type
             for i in (*graph.value_info, *graph.input, *graph.output)}  # fmt: skip
    return found | {item.name: item.data_type for item in graph.initializer}


def rounded(op: OpSpec, parameters: OpParameters) -> OpParameters:
    """The parameters of an op as its float type holds them."""
    kind = helper.tensor_dtype_to_np_dtype(HALVES[op.precision.name])

    def once(value: np.ndarray) -> np.ndarray:
        return value.astype(kind).astype(np.float32)

    weights = {}
    for index, held in parameters.weights.items():
        assert isinstance(held, FloatWeights)
        weights[index] = FloatWeights(once(held.weight), once(held.bias))
    return OpParameters(weights, parameters.limits)


def away_in_steps(op: OpSpec, parameters: OpParameters, *outputs: np.ndarray) -> np.ndarray:
    """How far two outputs are apart, in the steps of the first's grid; those of logits are a 255th
    of their range."""
    wanted, found = (output.astype(np.float64) for output in outputs)
    if op.logits:
        return np.abs(wanted - found) / (np.ptp(wanted) / 255)
    last = len(op.values) - 1
    grid = TENSORRT.grid(op.quantisers[last].bits, signed=op.quantisers[last].signed)
    step = parameters.limits[last] / grid.top
    return np.abs(wanted / step - (found if outputs[1].dtype == np.int8 else found / step))


# ---- every block in every precision


@every_format
@pytest.mark.parametrize("name", PRECISIONS)
@every_block
def test_every_block_is_valid_onnx_in_the_types_that_its_formats_name(
    block: Block, name: str, kind: str
) -> None:
    """ONNX's checker infers every shape and type. ONNX Runtime refuses a mixture of types too: it
    has no bf16 kernels, so bf16 is put to it as fp16."""
    for function in FUNCTIONS if kind == "a8" else FUNCTIONS[:1]:
        op = block(tensor(kind), Precision(name), function)
        model = random_model([op])
        onnx.checker.check_model(model, full_check=True)
        found = types(model)
        wanted = CODES | HALVES
        assert found[INPUT] == wanted.get(kind, TensorProto.FLOAT)
        held = "fp32" if op.logits else str(op.output.format)
        assert found["output"] == wanted.get(held, wanted.get(held[:-1], TensorProto.FLOAT))
        inside = HALVES.get(name, TensorProto.FLOAT)
        for node in model.graph.node:
            if node.op_type in ("Conv", "Gemm", "Add", "Mul", "GlobalAveragePool", "Relu"):
                assert found[node.output[0]] == inside
        as_fp16 = retyped(model, TensorProto.BFLOAT16, TensorProto.FLOAT16)
        given = {"bf16": "fp16", "fp8": "fp32", "fp8+": "fp32"}.get(kind, kind)
        feed = np.zeros((2, CHANNELS, SIDE, SIDE), helper.tensor_dtype_to_np_dtype(
            wanted.get(given, TensorProto.FLOAT)))  # fmt: skip
        assert len(run(as_fp16, feed)) == 2


@every_block
def test_codes_are_signed_around_zero_and_biases_stay_float(block: Block) -> None:
    model = random_model([block(tensor(), W8A8, "hard_swish")])
    held = {item.name: item for item in model.graph.initializer}
    conversions = [n for n in model.graph.node if "uantizeLinear" in n.op_type]
    for node in conversions:
        zero = held[node.input[2]]
        assert zero.data_type == TensorProto.INT8
        assert not numpy_helper.to_array(zero).any()
        assert held[node.input[1]].data_type == TensorProto.FLOAT
    made = {name: node for node in model.graph.node for name in node.output}
    for node in model.graph.node:
        if node.op_type in ("Conv", "Gemm"):
            assert made[node.input[0]].op_type == made[node.input[1]].op_type == "DequantizeLinear"
            codes = numpy_helper.to_array(held[made[node.input[1]].input[0]])
            assert codes.dtype == np.int8
            assert held[made[node.input[1]].input[1]].dims == [len(codes)]
            assert held[node.input[2]].data_type == TensorProto.FLOAT
    assert not {i.data_type for i in held.values()} - {TensorProto.INT8, TensorProto.FLOAT}


@pytest.mark.parametrize("name", PRECISIONS)
@every_block
def test_nothing_is_there_for_another_runtimes_habits(block: Block, name: str) -> None:
    """An operator for each layer, conversions, and the flattening before a linear layer."""
    for kind, function in itertools.product(FORMATS, ("relu", "relu6")):
        op = block(tensor(kind), Precision(name), function)
        layers = Counter(layer.kind for layer in op.layers)
        written = Counter(node.op_type for node in random_model([op]).graph.node)
        written -= Counter({n: written[n] for n in ("QuantizeLinear", "DequantizeLinear", "Cast")})
        functions = Counter(x.function for x in op.layers if x.kind == "activation")
        wanted = {
            "Conv": layers["conv"], "Gemm": layers["linear"], "Flatten": layers["linear"],
            "GlobalAveragePool": layers["pool"], "Add": layers["add"], "Mul": layers["mul"],
            "Relu": functions["relu"], "Clip": functions["relu6"],
            "Sigmoid": functions["sigmoid"],
        }  # fmt: skip
        if name == "fp8":  # whose norms are apart
            norms = sum(layer.norm for layer in op.layers)
            wanted |= {kind: wanted[kind] + norms for kind in ("Mul", "Add")}
        assert +written == +Counter(wanted)


@every_half
@pytest.mark.parametrize("given", ["fp32", "fp16", "bf16", "a8", "fp8"])
def test_a_cast_stands_exactly_where_the_type_changes(name: str, given: str) -> None:
    op = BLOCKS["residual"](tensor(given), Precision(name), "relu")
    casts = [node for node in random_model([op]).graph.node if node.op_type == "Cast"]
    assert len(casts) == (given != name)
    integer = BLOCKS["residual"](tensor(name), W8A8, "relu")
    (cast,) = [node for node in random_model([integer]).graph.node if node.op_type == "Cast"]
    assert cast.attribute[0].i == TensorProto.FLOAT
    head = BLOCKS["classifier"](tensor(name), Precision(name), "relu")
    (cast,) = [node for node in random_model([head]).graph.node if node.op_type == "Cast"]
    assert cast.output == ["output"]


def test_hard_swish_is_a_gate_and_a_product_where_the_parser_takes_no_other() -> None:
    """Seen in TensorRT for RTX 1.7: `Only FLOAT, HALF or INT8 input is supported for the HardSwish
    operator`. Every other operator parses in bf16."""
    for name in PRECISIONS:
        op = BLOCKS["conv"](tensor(), Precision(name), "hard_swish")
        kinds = [node.op_type for node in random_model([op]).graph.node]
        assert ("HardSwish" in kinds) == (name != "bf16") != ("HardSigmoid" in kinds)


@pytest.mark.parametrize("name", ["pact-w4a4"])
def test_a_precision_without_a_kernel_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match=name):
        random_model([BLOCKS["conv"](tensor(), Precision(name), "relu")])


# ---- numbers


@pytest.mark.parametrize("name", ["fp32", "tf32"])
@pytest.mark.parametrize("function", FUNCTIONS)
@every_block
def test_a_float_graph_computes_what_pytorch_computes(
    trained: Trained, block: Block, function: str, name: str
) -> None:
    network = trained([block(tensor(), Precision(name), function)], images(), runtime=TENSORRT)
    model = emit(network.ops, network.parameters_for_graph(), TENSORRT)
    with torch.no_grad():
        wanted = network(torch.from_numpy(images())).numpy()
    np.testing.assert_allclose(run(model, images()), wanted, rtol=1e-4, atol=1e-4)


@every_half
@pytest.mark.parametrize("function", FUNCTIONS)
@every_block
def test_a_half_graph_is_the_fp32_graph_of_the_weights_that_it_can_hold(
    trained: Trained, block: Block, function: str, name: str
) -> None:
    """To the last bit, once its tensors are given room again."""
    op = block(tensor(), Precision(name), function)
    (parameters,) = trained([op], images()).parameters_for_graph()
    found = retyped(emit([op], [parameters], TENSORRT), HALVES[name], TensorProto.FLOAT)
    wanted = emit([replace(op, precision=FP32)], [rounded(op, parameters)], TENSORRT)
    np.testing.assert_array_equal(run(found, images()), run(wanted, images()))


@every_block
def test_an_fp16_graph_is_near_the_fp32_one(trained: Trained, block: Block) -> None:
    """ONNX Runtime computes in fp32 and rounds every value to fp16: 11 bits, a few layers deep."""
    op = block(tensor(), Precision("fp16"), "hard_swish")
    network = trained([op], images())
    model = emit([op], network.parameters_for_graph(), TENSORRT)
    found = run(model, images()).astype(np.float32)
    wanted = run(emit([replace(op, precision=FP32)], network.parameters_for_graph()), images())
    assert 0 < np.abs(found - wanted).max() < 2**-8 * np.ptp(wanted)


@pytest.mark.parametrize("kind", ["fp32", "a8", "a8+"])
@pytest.mark.parametrize("function", ["relu", "sigmoid", "hard_swish"])
@every_block
def test_an_integer_graph_is_within_a_step_of_pytorch_on_its_grid(
    trained: Trained, block: Block, function: str, kind: str
) -> None:
    """Nothing but the order of sums differs, so only values near a tie take the neighbouring code
    (under 0.5 % of the values, and none goes further)."""
    op = block(tensor(kind), W8A8, function)
    values = images()
    values = values if op.inputs[0].format.signed else np.abs(values)
    feed = values
    if op.inputs[0].format.is_quantised:
        grid = TENSORRT.grid(8, signed=op.inputs[0].format.signed)
        step = np.float32(INPUT_LIMIT) / np.float32(grid.top)
        feed = np.clip(np.rint(values / step), grid.low, grid.high).astype(np.int8)
        values = feed * step
    network = trained([op], values, runtime=TENSORRT)
    (parameters,) = network.parameters_for_graph()
    parameters.limits.setdefault(0, INPUT_LIMIT)
    with torch.no_grad():
        wanted = network(torch.from_numpy(values)).numpy()
    away = away_in_steps(op, parameters, wanted, run(emit([op], [parameters], TENSORRT), feed))
    assert away.max() < 1.5
    assert (away > 0.5).mean() <= 0.005


@pytest.mark.parametrize("name", ["w4a8", "w8a4", "w3a2"])
@every_block
def test_fewer_bits_are_clipped_to_their_grid(trained: Trained, block: Block, name: str) -> None:
    """In int8 kernels, where a table names them; a step is coarse, so ties are far fewer."""
    runtime = replace(TENSORRT, kernels={name: "int8"})
    op = block(tensor(), Precision(name), "relu")
    network = trained([op], images(), runtime=runtime)
    (parameters,) = network.parameters_for_graph()
    model = emit([op], [parameters], runtime)
    onnx.checker.check_model(model, full_check=True)
    written = Counter(node.op_type for node in model.graph.node)
    assert written["Clip"] == (len(op.quantisers) if name != "w4a8" else 0)
    with torch.no_grad():
        wanted = network(torch.from_numpy(images())).numpy()
    away = away_in_steps(op, parameters, wanted, run(model, images()))
    assert away.max() < 1.5
    assert (away > 0.5).mean() <= 0.005


# ---- fp8


def codes_of(values: np.ndarray, limit: float) -> np.ndarray:
    """The place of each value among the codes of its range, in their order, which neighbours differ
    by one in."""
    scale = np.float32(limit) / np.float32(448)
    bits = (values / scale).astype(E4M3).view(np.int8).astype(int)
    return np.where(bits < 0, -(bits & 127), bits)


def fp8_case(trained: Trained, block: Block, function: str, kind: str) -> tuple[Network, OpSpec]:
    op = block(tensor(kind), FP8, function)
    return trained([op], fp8_images(op), runtime=TENSORRT), op


def fp8_images(op: OpSpec) -> np.ndarray:
    """Images on the grid of an op's input, which ends at `INPUT_LIMIT`."""
    values = images() if op.inputs[0].format.signed else np.abs(images())
    if op.inputs[0].format.has_scale:
        scale = np.float32(INPUT_LIMIT) / np.float32(448)
        return (values / scale).clip(-448, 448).astype(E4M3).astype(np.float32) * scale
    return values


every_fp8_case = [
    pytest.mark.parametrize("kind", ["fp32", "fp8", "fp8+"]),
    pytest.mark.parametrize("function", ["relu", "sigmoid", "hard_swish"]),
    every_block,
]


def with_every_fp8_case(test: Callable[..., None]) -> Callable[..., None]:
    for mark in every_fp8_case:
        test = mark(test)
    return test


@with_every_fp8_case
def test_an_fp8_graph_is_the_folded_network_to_the_last_bit(
    trained: Trained, block: Block, function: str, kind: str
) -> None:
    network, op = fp8_case(trained, block, function, kind)
    (parameters,) = network.parameters_for_graph()
    parameters.limits.setdefault(0, INPUT_LIMIT)
    values = torch.from_numpy(fp8_images(op))
    feed, scale = values, np.float32(INPUT_LIMIT) / np.float32(448)
    if kind != "fp32":
        feed = (values / scale).to(torch.float8_e4m3fn)
        assert torch.equal(feed.float() * scale, values)
    with torch.no_grad():
        wanted = network.folded()(values)
        found = GraphModule(emit([op], [parameters], TENSORRT))(feed)
    if op.logits:
        assert torch.equal(found, wanted)
        return
    assert found.dtype == torch.float8_e4m3fn
    limit = np.float32(parameters.limits[_grid(op)]) / np.float32(448)
    assert torch.equal(found.float() * limit, wanted)
    assert len(found.float().unique()) > 20


def _grid(op: OpSpec) -> int:
    """The value whose scale an op's output has."""
    return max(op.scaled)


@with_every_fp8_case
def test_an_fp8_graph_is_within_a_code_of_pytorch_with_its_norms(
    trained: Trained, block: Block, function: str, kind: str
) -> None:
    """By ONNX Runtime. Norms and sums are rounded otherwise, so values near a tie take the next
    code: under 0.5 % of the values, and none goes further."""
    network, op = fp8_case(trained, block, function, kind)
    (parameters,) = network.parameters_for_graph()
    parameters.limits.setdefault(0, INPUT_LIMIT)
    values = fp8_images(op)
    feed = values / (np.float32(INPUT_LIMIT) / np.float32(448)) if kind != "fp32" else values
    with torch.no_grad():
        wanted = network(torch.from_numpy(values)).numpy()
    found = run(emit([op], [parameters], TENSORRT), feed)
    if op.logits:
        assert np.abs(found - wanted).max() < 0.02 * np.ptp(wanted)
        return
    limit = parameters.limits[_grid(op)]
    found = found * (np.float32(limit) / np.float32(448))
    away = np.abs(codes_of(found, limit) - codes_of(wanted, limit))
    assert away.max() <= 1
    assert away.mean() <= 0.005


@every_block
def test_what_fp8_kernels_read_has_one_scale_a_tensor(trained: Trained, block: Block) -> None:
    network, op = fp8_case(trained, block, "relu", "fp32")
    (parameters,) = network.parameters_for_graph()
    graph = emit([op], [parameters], TENSORRT).graph
    held = {item.name: item for item in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    conversions = [node for node in graph.node if "uantizeLinear" in node.op_type]
    for node in conversions:
        assert held[node.input[1]].data_type == TensorProto.FLOAT
        assert held[node.input[2]].data_type == TensorProto.FLOAT8E4M3FN
        assert [*held[node.input[1]].dims, *held[node.input[2]].dims] == []
    modules = network.op_modules[0].weighted_layers
    assert modules
    for index, module in modules.items():
        layer = op.layers[index]
        kind = "Gemm" if layer.kind == "linear" else "Conv"
        name = f"op000.{index}.{layer.role}"
        (node,) = [node for node in graph.node if node.name == f"{name}.{kind}"]
        assert {made[source].op_type for source in node.input[:2]} == {"DequantizeLinear"}
        codes, scale = (numpy_helper.to_array(held[x]) for x in made[node.input[1]].input[:2])
        trained_as = round_weight(module.weight.detach(), FP8).numpy()
        np.testing.assert_array_equal(codes.astype(np.float32) * scale, trained_as)
        assert len(node.input) == (2 if layer.norm else 3)


def test_a_network_without_fp8_ranges_is_not_written() -> None:
    network = Network([BLOCKS["residual"](tensor(), FP8, "relu")], TENSORRT)
    with pytest.raises(InvalidInput, match="no range") as caught:
        emit(network.ops, network.parameters_for_graph(), TENSORRT)
    assert caught.value.next_step == "hwnas retrain"


def test_values_beyond_a_range_saturate(trained: Trained) -> None:
    op = BLOCKS["conv"](tensor(), FP8, "relu")
    network = trained([op], images(), runtime=TENSORRT)
    (cast, *_) = network.op_modules[0].fp8_casts.values()
    (parameters,) = network.parameters_for_graph()
    model = emit([op], [parameters], TENSORRT)
    ends = [1e6, 5.0 * cast.limit, cast.limit]
    found = [run(model, np.full((1, CHANNELS, SIDE, SIDE), x, np.float32)) for x in ends]
    assert np.array_equal(found[0], found[2])
    assert np.array_equal(found[1], found[2])
    assert not np.array_equal(found[2], run(model, np.zeros_like(images()[:1])))


def test_a_chain_of_fp8_and_others_hands_on_values(trained: Trained) -> None:
    """GraphModule runs every type; next to fp8, a tie in a type of more bits changes little."""
    spec, ops = tensor(), []
    for name in ("fp8", "w8a8", "fp8", "fp16", "fp8", "fp8", "bf16", "fp8", "fp32", "fp8"):
        ops.append(BLOCKS["residual"](spec, Precision(name), "relu"))
        spec = ops[-1].output
    ops.append(BLOCKS["classifier"](spec, FP8, "relu"))
    network = trained(ops, images(), runtime=TENSORRT)
    model = emit(ops, network.parameters_for_graph(), TENSORRT)
    onnx.checker.check_model(model, full_check=True)
    with torch.no_grad():
        wanted = network(torch.from_numpy(images())).numpy()
        found = GraphModule(model)(torch.from_numpy(images())).numpy()
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 0.1 * np.ptp(wanted)


# ---- fp8: real engines


def fp8_network() -> list[OpSpec]:
    """Every block in fp8, after every precision and before it."""
    spec, ops = tensor(), []
    for block in ("conv", "residual", "stride 2", "squeeze"):
        for name in ("fp8", "fp8", "w8a8", "fp8", "fp16", "fp8", "bf16", "fp8", "fp32"):
            if block in ("conv", "stride 2") and name != "fp8":
                continue
            ops.append(BLOCKS[block](spec, Precision(name), "hard_swish"))
            spec = ops[-1].output
    return [*ops, BLOCKS["classifier"](spec, FP8, "relu")]


@pytest.mark.parametrize("target", ["sm89", "sm120"])
def test_every_layer_of_an_fp8_op_takes_fp8_in_an_engine(target: str) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    ops = fp8_network()
    kernels = build(random_model(ops), targets=[target]).kernels
    assert wrong_kernels(ops, kernels) == ""
    written = [
        f"op{number:03d}.{index}.{layer.role}."
        for number, op in enumerate(ops)
        for index, layer in enumerate(op.layers)
        if layer.has_weights and op.precision == FP8 and layer.kernel <= 5
    ]
    taking = [k for k in kernels if k.name.startswith(tuple(written))]
    assert len(taking) == len(written)
    assert all("FP8" in kernel.inputs for kernel in taking)
    floats = [replace(k, inputs=("Float",)) if k in taking[-1:] else k for k in kernels]
    assert wrong_kernels(ops, floats).endswith("takes Float")


@pytest.mark.parametrize("kind", ["fp32", "fp16", "a8", "fp8", "fp8+"])
@every_block
def test_an_fp8_row_is_built_from_every_format(block: Block, kind: str) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    op = block(tensor(kind), FP8, "relu")
    kernels = build(random_model([op]), targets=["sm89"]).kernels
    assert wrong_kernels([op], kernels) == ""
    assert any("FP8" in kernel.inputs for kernel in kernels)


def test_a_window_over_5_x_5_runs_on_the_floats_of_its_codes() -> None:
    """Seen in TensorRT for RTX 1.7; were it otherwise, the check could be as strict there."""
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    for size, taken in ((5, "FP8"), (7, "Float")):
        op = conv_norm_activation(tensor(), 16, kernel=size, precision=FP8)
        kernels = build(random_model([op]), targets=["sm89"]).kernels
        (mine,) = [kernel for kernel in kernels if kernel.name.startswith("op000.0.")]
        assert set(mine.inputs) == {taken}
        assert wrong_kernels([op], kernels) == ""


@pytest.mark.parametrize("target", ["sm75", "sm80", "sm86"])
def test_a_target_without_fp8_is_refused_in_one_sentence(target: str) -> None:
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    model = random_model([BLOCKS["conv"](tensor(), FP8, "relu")])
    with pytest.raises(InvalidInput, match=f"{target}.*fp8_e4m3") as caught:
        build(model, targets=[target])
    assert "sm89 or newer for fp8" in caught.value.accepted
    assert "\n" not in str(caught.value)


# ---- fp8: on a card


@pytest.mark.parametrize(
    ("capability", "has_it"),
    [((7, 5), False), ((8, 0), False), ((8, 6), False), ((8, 9), True), ((9, 0), True),
     ((12, 0), True)],
)  # fmt: skip
def test_a_card_has_fp8_from_ada_on(capability: tuple[int, int], has_it: bool) -> None:
    runtime = runtime_on(Card("a card", capability, "0", 0))
    ops = [BLOCKS["conv"](tensor(), Precision(name), "relu") for name in ("fp16", "fp8")]
    check_kernels(ops[:1], runtime)
    assert (runtime == TENSORRT) == has_it
    if has_it:
        check_kernels(ops, runtime)
        return
    with pytest.raises(InvalidInput, match=r"no kernel for fp8\. Op 1 has it"):
        check_kernels(ops, runtime)


class Answers(Session):
    """A session that answers as a module does, or, `wrong`, as that of other codes."""

    def __init__(self, model: onnx.ModelProto, *, wrong: bool = False) -> None:
        super().__init__()
        self.module, self.wrong = GraphModule(model), wrong

    def _run(self, *inputs: np.ndarray) -> np.ndarray:
        assert [each.dtype for each in inputs] == [E4M3]
        (codes,) = (torch.from_numpy(each.astype(np.float32)) for each in inputs)
        assert float(codes.abs().max()) > 400
        given = (codes.flip(3) if self.wrong else codes).to(torch.float8_e4m3fn)
        with torch.no_grad():
            return self.module(given).float().numpy()

    def _block(self, protocol: Protocol) -> np.ndarray:
        raise NotImplementedError


def test_an_engines_output_is_held_against_pytorchs_on_codes_of_fp8() -> None:
    pytest.importorskip("tensorrt_rtx", reason="the error names the package")
    model = random_model([BLOCKS["conv"](tensor("fp8"), FP8, "relu")])
    check_output(Answers(model), model, 3)
    with pytest.raises(HwnasError, match="something else than PyTorch"):
        check_output(Answers(model, wrong=True), model, 3)


# ---- chains


def test_a_chain_of_every_precision_hands_on_values(trained: Trained) -> None:
    """fp16 holds 11 bits, so a value near a tie takes the neighbouring code in the next integer op;
    compared as the share of the logits' range. bf16 (8 bits) is given room, but for its weights."""
    spec, ops = tensor(), []
    for name in ("fp16", "w8a8", "bf16", "fp32", "w8a8", "fp32", "fp16", "bf16", "w8a8", "w8a8"):
        ops.append(BLOCKS["residual"](spec, Precision(name), "relu"))
        spec = ops[-1].output
    ops.append(BLOCKS["classifier"](spec, Precision("fp16"), "relu"))
    network = trained(ops, images(), runtime=TENSORRT)
    model = emit(ops, network.parameters_for_graph(), TENSORRT)
    onnx.checker.check_model(model, full_check=True)
    found = run(retyped(model, TensorProto.BFLOAT16, TensorProto.FLOAT), images())
    with torch.no_grad():
        wanted = network(torch.from_numpy(images())).numpy()
    assert found.dtype == np.float32
    assert np.abs(found - wanted).max() < 0.05 * np.ptp(wanted)


def test_an_op_of_two_inputs_of_any_type_adds_them() -> None:
    pairs = itertools.product(FORMATS, repeat=2)
    for name, kinds in itertools.product(("fp16", "fp8", "w8a8"), pairs):
        builder = OpBuilder(Precision(name), *map(tensor, kinds))
        builder.add(0, 1)
        onnx.checker.check_model(random_model([builder.build()]), full_check=True)


# ---- whole networks, and their bytes


def test_what_fp32_runs_as_is_one_thing_in_a_network() -> None:
    """Runtimes of GPUs are told it of a whole network."""
    both = [BLOCKS["conv"](tensor(), Precision(name), "relu") for name in ("fp32", "tf32")]
    for chain in (both, both[::-1]):
        with pytest.raises(InvalidInput, match="both fp32 and tf32"):
            random_model(chain)
    assert [runs_tf32([op]) for op in both] == [False, True]
    assert not runs_tf32([BLOCKS["conv"](tensor(), W8A8, "relu")])


@pytest.mark.parametrize("left_out", ["fp32", "tf32"])
def test_random_networks_of_all_precisions_are_valid_and_as_large_as_their_ops(
    left_out: str,
) -> None:
    precisions = tuple(name for name in PRECISIONS if name != left_out)
    space = mobile(
        "all",
        (Stage(1, 1, (8, 16), squeeze=4), Stage(2, 2, (16, 24), activation="hard_swish")),
        classes=5,
        size=16,
        kernels=(3,),
        expansions=(3,),
        precisions=precisions,
        stem_precisions=precisions,
    )
    sampler, rng = UniformSampler(space), np.random.default_rng(3)
    for seed in range(25):
        ops = list(space.lower(sampler.sample(rng)))
        model = random_model(ops, seed)
        onnx.checker.check_model(model, full_check=True)
        names = [name for node in model.graph.node for name in (*node.output, node.name)]
        assert len(names) == len(set(names))
        most = BASE_BYTES + sum(file_bytes(op, TENSORRT) for op in ops)
        assert most - 40 <= model.ByteSize() <= most


def test_the_codes_that_are_written_are_those_of_the_module(trained: Trained) -> None:
    op = BLOCKS["residual"](tensor(), W8A8, "relu")
    network = trained([op], images(), runtime=TENSORRT)
    (parameters,) = network.parameters_for_graph()
    graph = emit([op], [parameters], TENSORRT).graph
    held = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    for index, weights in parameters.weights.items():
        assert isinstance(weights, IntegerWeights)
        label = f"op000.{index}.{op.layers[index].role}"
        np.testing.assert_array_equal(held[f"{label}.weight.codes"], weights.codes)
        np.testing.assert_array_equal(held[f"{label}.weight.scale"], weights.scale)
        np.testing.assert_array_equal(held[f"{label}.bias"], weights.bias)
