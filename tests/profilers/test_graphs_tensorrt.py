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
from profilers.graphs import INPUT, OpParameters, emit, random_parameters, runs_tf32
from profilers.modules import Network
from profilers.ort_session import session_options
from profilers.sizes import BASE_BYTES, file_bytes
from quant.errors import InvalidInput
from quant.integer import FloatWeights, IntegerWeights
from quant.precision import TENSORRT, Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")
PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "w8a8")
HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
FORMATS = ("fp32", "fp16", "bf16", "a8", "a8+")
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
    """What the graph computes as it is written: no optimisation."""
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {INPUT: feed})[0]


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
        wanted = {"a8": TensorProto.INT8, "a8+": TensorProto.INT8} | HALVES
        assert found[INPUT] == wanted.get(kind, TensorProto.FLOAT)
        held = "fp32" if op.logits else str(op.output.format)
        assert found["output"] == wanted.get(held, wanted.get(held[:-1], TensorProto.FLOAT))
        inside = HALVES.get(name, TensorProto.FLOAT)
        for node in model.graph.node:
            if node.op_type in ("Conv", "Gemm", "Add", "Mul", "GlobalAveragePool", "Relu"):
                assert found[node.output[0]] == inside
        as_fp16 = retyped(model, TensorProto.BFLOAT16, TensorProto.FLOAT16)
        feed = np.zeros((2, CHANNELS, SIDE, SIDE), helper.tensor_dtype_to_np_dtype(
            TensorProto.FLOAT16 if kind == "bf16" else found[INPUT]))  # fmt: skip
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
        assert +written == +Counter(wanted)


@every_half
@pytest.mark.parametrize("given", ["fp32", "fp16", "bf16", "a8"])
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


@pytest.mark.parametrize("name", ["fp8", "pact-w4a4"])
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
    for name, kinds in itertools.product(("fp16", "w8a8"), itertools.product(FORMATS, repeat=2)):
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
