"""Engines by the real TensorRT for RTX, which builds for cards that are not here.

What is held against what: the kernels that a builder lists against the nodes of the graph that it
was given; their number against the layers'; plans against those of another process. Kernels and
counts are those of the release that the extra `gpu-build` pins.
"""

import copy
import hashlib
import json
import subprocess
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.blocks import basic_block, inverted_residual, shuffle_unit
from hwnas.spaces.registry import SPACES, load_space
from latency_tables.ops import OpSpec, Tensor
from profilers import trt_build
from profilers.cuda import Card
from profilers.graphs import OPS_METADATA, emit, random_parameters
from profilers.trt_build import (
    RTX,
    Engine,
    Kernel,
    build,
    capabilities,
    inspected,
    kernels_of,
    loaded,
    logger,
    named_targets,
    package,
    refusal,
    version,
    wrong_kernels,
)
from quant.errors import HwnasError, InvalidInput, MissingDependency
from quant.precision import TENSORRT, Format, Precision

rtx = pytest.importorskip(
    "tensorrt_rtx",
    reason="pip install 'hwnas[gpu-build]': TensorRT for RTX builds without a GPU",
    exc_type=ImportError,
)
if package().__name__ != RTX:
    pytest.skip("the full TensorRT is used, which builds for its own card", allow_module_level=True)

FLOATS = ("fp32", "tf32", "fp16", "bf16")
INTEGERS = ("w8a8", "w4a4")
PRECISIONS = (*FLOATS, *INTEGERS)
CARDS = ("sm80", "sm89")
HERE = Path(__file__).parents[2]

Block = Callable[[Tensor, Precision], OpSpec]
BLOCKS: dict[str, Block] = {
    "inverted residual": lambda t, p: inverted_residual(
        t, t.channels, kernel=3, expansion=3, precision=p
    ),
    "squeeze": lambda t, p: inverted_residual(
        t, t.channels, kernel=3, expansion=4, squeeze=4, precision=p
    ),
    "basic": lambda t, p: basic_block(t, t.channels, inner=t.channels, precision=p),
    "shuffle": lambda t, p: shuffle_unit(t, t.channels, kernel=3, middle=4, precision=p),
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=list(BLOCKS))
every_precision = pytest.mark.parametrize("name", PRECISIONS)


def tensor(kind: str = "fp32") -> Tensor:
    return Tensor(8, 10, 10, Format.parse(kind))


def chain(block: Block, name: str, length: int = 1) -> list[OpSpec]:
    spec, ops = tensor(), []
    for _ in range(length):
        ops.append(block(spec, Precision(name)))
        spec = ops[-1].output
    return ops


def model_of(ops: Sequence[OpSpec], seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    return emit(ops, [random_parameters(op, rng) for op in ops], TENSORRT)


def built(ops: Sequence[OpSpec], targets: Sequence[str] = CARDS[1:], **options: Any) -> Engine:
    return build(model_of(ops), targets=targets, **options)


def random_networks(name: str, count: int = 3) -> Iterator[list[OpSpec]]:
    space = load_space("mobile-tiny", classes=10, image_channels=1, size=32, precisions=(name,))
    sampler, rng = UniformSampler(space), np.random.default_rng(0)
    for _ in range(count):
        yield list(space.lower(sampler.sample(rng)))


def weighted_nodes(model: onnx.ModelProto) -> list[str]:
    """The names of the nodes that multiply with weights."""
    return [node.name for node in model.graph.node if node.op_type in ("Conv", "Gemm")]


def weighted_layers(ops: Sequence[OpSpec], *, integer: bool = False) -> int:
    chosen = [op for op in ops if op.precision.is_integer or not integer]
    return sum(layer.has_weights for op in chosen for layer in op.layers)


def running(kernels: Sequence[Kernel], node: str) -> list[Kernel]:
    """The kernels that multiply for a node: generated ones (`kgen`) do what is around it."""
    return [kernel for kernel in kernels if node in kernel.nodes and kernel.kind != "kgen"]


# ---- every op


HANDED_ON = {"fp16": "fp16", "bf16": "bf16", "fp8": "fp8", "w4a4": "a4"}
"""What ops of a precision hand on, where w8a8 takes it otherwise than fp32 and its own."""


def ops_of(preset: str, name: str) -> dict[str, OpSpec]:
    """A preset's ops in a precision that is mixed with w8a8 (w8a8 with fp32), by key, for images of
    32 px; and what is in w8a8 after them."""
    other = "fp32" if name == "w8a8" else "w8a8"
    space = load_space(preset, classes=10, image_channels=3, size=32, precisions=(name, other))
    return {
        op.key: op
        for op in space.lattice.ops
        if op.precision.name == name or op.inputs[0].format.type == HANDED_ON.get(name)
    }


def structure(op: OpSpec) -> tuple[Hashable, ...]:
    """An op but for its widths and sides: what differs in nodes, types, windows or strides."""
    layers = tuple(replace(x, channels=0, groups=min(x.groups, 2)) for x in op.layers)
    return op.precision, tuple(str(t.format) for t in op.inputs), layers, op.logits


def structures(ops: Mapping[str, OpSpec]) -> list[OpSpec]:
    """The smallest op of each structure."""
    found: dict[Hashable, OpSpec] = {}
    for op in sorted(ops.values(), key=lambda op: op.macs):
        found.setdefault(structure(op), op)
    return list(found.values())


def check_kernels(op: OpSpec, model: onnx.ModelProto, engine: Engine) -> None:
    """Every layer with weights is multiplied in one kernel, in the type of the op's precision. A
    linear layer of floats may be generated code."""
    nodes = weighted_nodes(model)
    assert len(nodes) == weighted_layers([op])
    wanted = {"fp16": "Half", "bf16": "BFloat16"}.get(op.precision.name, "Float")
    for node in nodes:
        kernels = running(engine.kernels, node)
        assert len(kernels) == 1 or (node.endswith(".Gemm") and not op.precision.is_integer), (
            f"{op.key}: {node} is run by {kernels}"
        )
        for kernel in kernels:
            first = "Int8" if op.precision.is_integer else wanted
            assert kernel.inputs[0] == first, f"{op.key}: {kernel}"
    assert wrong_kernels([op], engine.kernels) == ""
    if not (op.precision.is_integer or op.inputs[0].format.is_quantised):
        assert not any("Int8" in (*k.inputs, *k.outputs) for k in engine.kernels)


CHAINS = dict.fromkeys(FLOATS, 34) | dict.fromkeys(INTEGERS, 30)
"""So many chains of layers the presets have; the stems are always floats."""


@every_precision
def test_every_structure_of_every_space_is_built_in_its_own_kernels(name: str) -> None:
    """After its own precision and after codes, signed or not; both cards in one engine."""
    ops = {key: op for preset in SPACES for key, op in ops_of(preset, name).items()}
    chosen = structures(ops)
    assert len({structure(op)[2] for op in chosen if op.precision.name == name}) == CHAINS[name]
    given = {str(op.inputs[0].format) for op in chosen if op.precision.name == name}
    own = str(Precision(name).format(signed=False))
    assert given >= {"a8", "a8+", own}
    assert given & {"fp32", "fp32+"}, "of images, or of a stem"
    for op in chosen:
        model = model_of([op])
        check_kernels(op, model, build(model, targets=CARDS))


def test_every_structure_of_every_space_is_built_in_fp8_where_a_card_has_it() -> None:
    """What is dense and of up to 5 x 5 pixels multiplies fp8, as `wrong_kernels` asks."""
    ops = {key: op for preset in SPACES for key, op in ops_of(preset, "fp8").items()}
    seen = 0
    for op in structures(ops):
        engine = built([op], ("sm89", "sm120"))
        assert wrong_kernels([op], engine.kernels) == ""
        held = {kind for kernel in engine.kernels for kind in kernel.inputs}
        seen += "FP8" in held
        assert "FP8" in held or op.precision.name != "fp8" or not weighted_layers([op])
    assert seen > 30


@pytest.mark.slow
@every_precision
@pytest.mark.parametrize("preset", SPACES)
def test_every_op_of_every_space_is_built_in_its_own_kernels(preset: str, name: str) -> None:
    ops = ops_of(preset, name)
    assert len(ops) > len(structures(ops))
    for op in ops.values():
        model = model_of([op])
        check_kernels(op, model, build(model, targets=CARDS))


@every_precision
def test_an_engine_for_two_cards_has_the_kernels_of_each(name: str) -> None:
    (ops,) = random_networks(name, 1)
    engines = [built(ops, targets) for targets in ((CARDS[0],), (CARDS[1],), CARDS)]
    assert len({engine.plan for engine in engines}) == 3, "each tells what it is for"
    assert len({engine.kernels for engine in engines}) == 1
    assert engines[0].kernels


def test_all_cards_of_an_engine_count() -> None:
    """sm75 has no bf16, and is not left out of an engine without a word."""
    ops = chain(BLOCKS["basic"], "bf16")
    for targets in (("sm75",), ("sm75", "sm80"), ("sm80", "sm75")):
        with pytest.raises(InvalidInput, match=r"datatypes: b16\. Accepted") as caught:
            built(ops, targets)
        assert "sm80 or newer for bf16" in caught.value.accepted
    assert built(ops, ("sm80",)).plan


# ---- integers


@every_block
def test_a_float_engine_is_told_from_an_integer_one(block: Block) -> None:
    """The control: kernels of fp32, declared as integers, are found out at the first of them."""
    declared, other = chain(block, "w8a8"), chain(block, "fp32")
    kernels = built(other).kernels
    assert wrong_kernels(other, kernels) == ""
    model = model_of(declared)
    assert wrong_kernels(declared, kernels) == f"{weighted_nodes(model)[0]} takes Float"
    right = build(model, targets=CARDS).kernels
    for node in weighted_nodes(model):
        worse = [
            replace(kernel, inputs=("Float",)) if kernel in running(right, node) else kernel
            for kernel in right
        ]
        assert wrong_kernels(declared, worse) == f"{node} takes Float"


def test_an_engine_that_does_not_tell_its_kernels_is_not_blamed() -> None:
    assert wrong_kernels(chain(BLOCKS["basic"], "w8a8"), ()) == ""


def test_a_float_layer_between_integer_ones_stays_float() -> None:
    ops = chain(BLOCKS["basic"], "w8a8")
    ops.append(BLOCKS["basic"](ops[-1].output, Precision("fp16")))
    ops.append(BLOCKS["basic"](ops[-1].output, Precision("w8a8")))
    model = model_of(ops)
    kernels = build(model, targets=CARDS).kernels
    found = [{k.inputs[0] for k in running(kernels, node)} for node in weighted_nodes(model)]
    assert found == [{"Int8"}, {"Int8"}, {"Half"}, {"Half"}, {"Int8"}, {"Int8"}]


# ---- fused kernels


@pytest.mark.parametrize("name", FLOATS)
def test_a_float_convolution_takes_its_relu_and_its_sum_along(name: str) -> None:
    (op,) = chain(BLOCKS["inverted residual"], name)
    kernels = built([op]).kernels
    expand, middle, project = (
        running(kernels, node)[0].nodes for node in weighted_nodes(model_of([op]))
    )
    assert expand == ("op000.0.expand.Conv", "op000.1.relu.Relu")
    assert middle[1:] == ("op000.3.relu.Relu",)
    assert project == ("op000.4.project.Conv", "op000.5.add.Add")


def test_an_integer_convolution_of_this_package_hands_on_floats() -> None:
    """Another kernel makes codes of them, with bias, relu and sum: so int8 has more kernels."""
    (op,) = chain(BLOCKS["inverted residual"], "w8a8")
    kernels = built([op]).kernels
    for node in weighted_nodes(model_of([op])):
        (kernel,) = running(kernels, node)
        assert kernel.outputs == ("Float",)
        assert not any(name.endswith((".Relu", ".Add")) for name in kernel.nodes)
    made = [kernel for kernel in kernels if kernel.outputs == ("Int8",)]
    assert len(made) == weighted_layers([op]) + 1, "those of the input, and after each"


KERNELS_PER_BLOCK = {
    "inverted residual": {"float": 3, "integer": 6},
    "squeeze": {"float": 7, "integer": 11},
    "basic": {"float": 2, "integer": 4},
    "shuffle": {"fp16": 3, "float": 4, "integer": 6},
}
"""How many kernels one more equal block adds."""


@every_precision
@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_more_is_as_many_kernels_more(block: str, name: str) -> None:
    counts = {k: len(built(chain(BLOCKS[block], name, k)).kernels) for k in (2, 4, 8)}
    per_block = KERNELS_PER_BLOCK[block]
    added = per_block.get(name, per_block["integer" if name in INTEGERS else "float"])
    assert counts[4] - counts[2] == 2 * added
    assert counts[8] - counts[4] == 4 * added


@every_precision
def test_a_whole_network_has_a_kernel_a_layer_and_an_integer_layer_two(name: str) -> None:
    """And three more: for the input, the average and the classifier's last step; the classifier in
    integers has one less."""
    for ops in random_networks(name):
        engine = built(ops)
        integer = weighted_layers(ops, integer=True)
        more = integer + 2 if name in INTEGERS else 3
        assert len(engine.kernels) == weighted_layers(ops) + more
        multiplied = [k for k in engine.kernels if k.kind != "kgen" and k.inputs[0] == "Int8"]
        assert len(multiplied) == integer
        assert wrong_kernels(ops, engine.kernels) == ""


# ---- batches, and building again


@every_precision
def test_one_engine_takes_several_batches(name: str) -> None:
    """It multiplies in the same kernels as that of one batch."""
    ops = chain(BLOCKS["squeeze"], name)
    several, *ones = (
        built(ops, **options) for options in ({"batches": (1, 8, 64)}, {"batch": 1}, {"batch": 8})
    )
    assert len({several.plan, *(one.plan for one in ones)}) == 3, "batches are part of an engine"
    for node in weighted_nodes(model_of(ops)):
        (kernel,) = running(several.kernels, node)
        for one in ones:
            assert [kernel.inputs] == [other.inputs for other in running(one.kernels, node)]
    assert wrong_kernels(ops, several.kernels) == ""
    assert built(ops, batches=(8, 8, 8)) == ones[1]


def test_batches_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(HwnasError, match=RTX):
        built(chain(BLOCKS["basic"], "fp32"), batches=(8, 1, 64))


HASH = """
import hashlib
import numpy as np
from hwnas.spaces.blocks import inverted_residual
from latency_tables.ops import Tensor
from profilers.graphs import emit, random_parameters
from profilers.trt_build import build
from quant.precision import TENSORRT, Precision

for name in ("fp16", "w8a8"):
    op = inverted_residual(Tensor(8, 10, 10), 8, kernel=3, expansion=3, precision=Precision(name))
    model = emit([op], [random_parameters(op, np.random.default_rng(0))], TENSORRT)
    print(hashlib.sha256(build(model, targets=("sm80", "sm89")).plan).hexdigest())
"""


def test_an_engine_built_again_is_the_same_to_the_byte() -> None:
    """Here, with other engines between, and in a fresh process: for one batch. (Of a range of
    batches a few bytes may differ.)"""
    for name in ("fp16", "w8a8"):
        built(chain(BLOCKS["squeeze"], name))
    here = []
    for name in ("fp16", "w8a8"):
        ops = chain(BLOCKS["inverted residual"], name)
        first, again = built(ops, CARDS), built(ops, CARDS)
        assert first == again
        here.append(hashlib.sha256(first.plan).hexdigest())
    done = subprocess.run(
        [sys.executable, "-c", HASH],
        env={"PYTHONPATH": str(HERE), "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == here


def test_a_cache_of_timings_is_not_kept_where_nothing_is_timed(tmp_path: Path) -> None:
    ops, cache = chain(BLOCKS["basic"], "fp16"), tmp_path / "timings"
    assert built(ops, cache=cache) == built(ops)
    assert not cache.exists()


# ---- tf32


@every_block
def test_tf32_is_the_fp32_graph_and_another_engine(block: Block) -> None:
    """The kernels' list tells no difference. The plan does, and the flag alone makes it: what else
    is told of the graph's ops makes none."""
    fp32, tf32 = (model_of(chain(block, name)) for name in ("fp32", "tf32"))
    assert fp32.graph == tf32.graph
    first, second = (build(model, targets=CARDS) for model in (fp32, tf32))
    assert first.kernels == second.kernels
    assert first.plan != second.plan
    noted = copy.deepcopy(fp32)
    noted.metadata_props.add(key="note", value="no matter")
    assert build(noted, targets=CARDS) == first


def test_no_engine_has_both_fp32_and_tf32() -> None:
    ops = [*chain(BLOCKS["basic"], "fp32"), *chain(BLOCKS["basic"], "tf32")]
    model = model_of(chain(BLOCKS["basic"], "fp32", 2))
    helper.set_model_props(model, {OPS_METADATA: json.dumps([op.to_json() for op in ops])})
    with pytest.raises(InvalidInput, match="both fp32 and tf32"):
        build(model, targets=CARDS)


# ---- the list of kernels

LINE = (
    "Name: op000.0.conv.Conv_myl0_1, LayerType: correlation, Inputs: [ { Name: a, Dimensions: "
    "[1,8,10,10], Format/Datatype: Int8 }, { Name: b, Datatype: Float }], Constants: [ { Name: w, "
    "Datatype: Int4 }], Outputs: [ { Name: c, Datatype: Half }], TacticName: x, StreamId: 0, "
    "Metadata: [ONNX Layer: op000.0.conv.Conv]\x1f[ONNX Layer: op000.1.relu.Relu]"
)


def test_a_kernel_is_read_from_its_line() -> None:
    """A constant's type is none of its inputs', other lines are no kernels, and what divides the
    nodes ends no line."""
    nodes = ("op000.0.conv.Conv", "op000.1.relu.Relu")
    kernel = Kernel("op000.0.conv.Conv_myl0_1", "correlation", ("Int8", "Float"), ("Half",), nodes)
    for mark in ("\x1e", "\x1f"):
        log = f"Layers:\n{LINE}\nName: nothing".replace("\x1f", mark)
        assert kernels_of(log) == (kernel,)


def test_an_inspector_tells_the_same_kernels() -> None:
    """In either name of the field of types; without details it tells none."""
    kernels = built(chain(BLOCKS["squeeze"], "w8a8")).kernels
    for field in ("Datatype", "Format/Datatype"):
        layers = [
            {
                "Name": kernel.name,
                "LayerType": kernel.kind,
                "Inputs": [{"Name": "x", field: kind} for kind in kernel.inputs],
                "Outputs": [{"Name": "y", field: kind} for kind in kernel.outputs],
                "Metadata": "\x1e".join(f"[ONNX Layer: {node}]" for node in kernel.nodes),
            }
            for kernel in kernels
        ]
        assert inspected(json.dumps({"Layers": layers})) == kernels
    assert inspected(json.dumps({"Layers": [kernel.name for kernel in kernels]})) == ()


# ---- refusals: one sentence, and what to do


def refused(model: onnx.ModelProto, kind: type[HwnasError] = InvalidInput) -> HwnasError:
    """How a graph is refused, in one line."""
    with pytest.raises(HwnasError) as caught:
        build(model, targets=CARDS)
    assert type(caught.value) is kind
    assert "\n" not in caught.value.what
    return caught.value


def foreign(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    """A graph from `input` to `output`, of the constants that files of others hold."""
    constants: dict[str, Any] = {
        "scale": np.float32(0.1), "zero": np.int8(0), "middle": np.uint8(128),
        "codes": np.ones((8, 8, 1, 1), np.int8), "bias": np.ones(8, np.int32),
    }  # fmt: skip
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8, 10, 10])
        for name in ("input", "output")
    ]
    used = {name for node in nodes for name in node.input}
    held = [
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in constants.items()
        if name in used
    ]
    graph = helper.make_graph(nodes, "foreign", ends[:1], ends[1:], held)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)], ir_version=10)
    ops = [op.to_json() for op in chain(BLOCKS["basic"], "fp32")]
    helper.set_model_props(model, {OPS_METADATA: json.dumps(ops)})
    return model


GRID = ["scale", "zero"]
FOREIGN = {
    "QLinearConv": (
        [
            helper.make_node("QuantizeLinear", ["input", *GRID], ["q"]),
            helper.make_node(
                "QLinearConv", ["q", *GRID, "codes", *GRID, *GRID, "bias"], ["y"], "theirs"
            ),
            helper.make_node("DequantizeLinear", ["y", *GRID], ["output"]),
        ],
        "at QLinearConv theirs: UNSUPPORTED_NODE",
    ),
    "uint8": (
        [
            helper.make_node("QuantizeLinear", ["input", "scale", "middle"], ["q"], "theirs"),
            helper.make_node("DequantizeLinear", ["q", "scale", "middle"], ["output"]),
        ],
        "at QuantizeLinear theirs: INVALID_NODE, .*Non-zero zero point is not supported",
    ),
    "INT32 bias": (
        [
            helper.make_node("DequantizeLinear", ["codes", *GRID], ["weight"]),
            helper.make_node("DequantizeLinear", ["bias", "scale"], ["added"], "theirs"),
            helper.make_node("Conv", ["input", "weight", "added"], ["output"], kernel_shape=[1, 1]),
        ],
        "at DequantizeLinear theirs: INVALID_NODE, .*Int32 but must have type FP8",
    ),
    "unknown": (
        [helper.make_node("Nonsense", ["input"], ["output"], "theirs")],
        "at Nonsense theirs: INVALID_NODE, .*Plugin not found",
    ),
}


@pytest.mark.parametrize(("nodes", "words"), FOREIGN.values(), ids=list(FOREIGN))
def test_a_graph_that_is_not_read_is_refused_by_its_node(
    nodes: list[onnx.NodeProto], words: str
) -> None:
    error = refused(foreign(*nodes))
    with pytest.raises(InvalidInput, match=rf"{version()} does not read the graph {words}"):
        raise error
    assert "other precisions" in error.next_step


def damaged(kind: str) -> onnx.ModelProto:
    model = model_of(chain(BLOCKS["basic"], "fp32"))
    if kind == "cut":
        first = model.graph.initializer[0]
        first.raw_data = first.raw_data[:7]
    elif kind == "torn":
        model.graph.node[0].input[0] = "nowhere"
    else:
        del model.graph.node[:]
    return model


@pytest.mark.parametrize("kind", ["cut", "torn", "empty"])
def test_a_damaged_graph_is_refused(kind: str) -> None:
    assert "does not read the graph" in refused(damaged(kind)).what
    assert built(chain(BLOCKS["basic"], "fp32")).kernels, "the next one is built as ever"


def test_a_graph_of_others_is_refused() -> None:
    model = model_of(chain(BLOCKS["basic"], "fp32"))
    del model.metadata_props[:]
    assert "hwnas.ops" in refused(model).what


@pytest.mark.parametrize("targets", [("sm33",), ("sm89", "90"), ("",), ("SM",), ("current",)])
def test_an_unknown_card_is_answered_with_those_accepted(targets: tuple[str, ...]) -> None:
    with pytest.raises(InvalidInput, match=f"builds no engine for '{targets[-1]}'") as caught:
        built(chain(BLOCKS["basic"], "fp16"), targets)
    assert caught.value.accepted == ", ".join(capabilities())
    assert set(CARDS) <= set(capabilities())


def test_a_card_may_be_named_in_capitals_and_twice() -> None:
    ops = chain(BLOCKS["basic"], "fp16")
    assert built(ops, ("SM89", "sm89")) == built(ops, ("sm89",))
    assert named_targets(("SM89", "sm80", "sm89")) == ["sm89", "sm80"]


def test_kernels_that_a_card_lacks_are_told() -> None:
    """sm75 runs fp16; a linear layer in fp32 is what stops the rest there."""
    for name in ("fp32", "w8a8"):
        (ops,) = random_networks(name, 1)
        with pytest.raises(InvalidInput, match=r"on the target: .*FP32 GEMM is not supported\. "):
            built(ops, ("sm75",))
    (ops,) = random_networks("fp16", 1)
    assert built(ops, ("sm75",)).kernels


SAID = {
    "CHECK(dtype == myelinTypeFloat || dtype == myelinTypeHalf)": (InvalidInput, "1.7 or later"),
    "op000 cannot be quantized by input": (InvalidInput, "1.7 or later"),
    "(cudaError 35: CUDA driver version is insufficient)": (MissingDependency, "NVIDIA GPU"),
    "no CUDA-capable device is detected": (MissingDependency, "NVIDIA GPU"),
    "(cudaError 350: of another kind)": (HwnasError, ""),
    "Myelin (Cannot compile for target(s) sm75, because of b16. In compileGraph (cudaError 35)": (
        InvalidInput,
        "sm80 or newer",
    ),
    "no tactic was found": (HwnasError, ""),
    "": (HwnasError, ""),
}


@pytest.mark.parametrize(("said", "wanted"), SAID.items())
def test_what_the_builder_says_decides_what_the_user_is_told(
    said: str, wanted: tuple[type[HwnasError], str]
) -> None:
    log = logger()
    log.lines[:] = [(3, "out of memory, in another's words"), (1, said)]
    error = refusal("builds no engine")
    kind, accepted = wanted
    assert type(error) is kind
    assert accepted in error.accepted
    assert error.next_step
    assert error.what.startswith(version())
    if kind is HwnasError:
        assert (said or "it gives no reason") in error.what


@pytest.mark.usefixtures("no_card")
def test_an_engine_for_this_machines_card_needs_a_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a card that the package does not name, its builder is asked for the one that is here, and
    finds none (cudaError 35)."""
    ops = chain(BLOCKS["basic"], "fp16")
    with pytest.raises(MissingDependency, match="No NVIDIA driver is on this machine") as here:
        built(ops, ())
    monkeypatch.setattr(trt_build, "card", lambda: Card("NVIDIA H100", (9, 0), "580", 0))
    with pytest.raises(MissingDependency, match=f"{version()} finds no NVIDIA driver") as asked:
        built(ops, ())
    assert "cudaError 35" in " ".join(logger().texts(least=1))
    for caught in (here, asked):
        assert "--compute-capability sm89" in caught.value.next_step
        assert caught.value.exit_code == 2


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("whole", [True, False])
def test_an_engine_is_not_loaded_without_a_driver(whole: bool) -> None:
    plan = built(chain(BLOCKS["basic"], "fp16")).plan if whole else b"no plan"
    with pytest.raises(MissingDependency, match="No NVIDIA driver is on this machine"):
        loaded(plan)


# ---- packages


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Put modules, or None for what cannot be imported, in the place of both packages."""

    def put(**modules: ModuleType | None) -> None:
        for name, module in {"tensorrt": None, RTX: None, **modules}.items():
            monkeypatch.setitem(sys.modules, name, module)
        package.cache_clear()

    yield put
    monkeypatch.undo()
    package.cache_clear()
    assert package() is rtx


def release(name: str, number: str, **names: object) -> ModuleType:
    """A package of a name and a version, with RTX's names and others."""
    module = ModuleType(name)
    vars(module).update({key: x for key, x in vars(rtx).items() if not key.startswith("__")})
    vars(module).update(names, __version__=number)
    return module


def test_no_package_is_answered_with_what_works(packages: Callable[..., None]) -> None:
    packages()
    with pytest.raises(
        MissingDependency, match=r"not installed \(tensorrt: .*; tensorrt_rtx: "
    ) as e:
        built(chain(BLOCKS["basic"], "fp16"))
    assert e.value.accepted == "tensorrt 10.13 or later, tensorrt_rtx 1.4 or later"
    assert "--device cpu" in e.value.next_step


def test_an_old_package_is_as_good_as_none(packages: Callable[..., None]) -> None:
    old = release("tensorrt", "8.6.1")
    packages(tensorrt=old)
    with pytest.raises(MissingDependency, match=r"tensorrt: 8\.6\.1 is too old"):
        version()
    packages(tensorrt=old, tensorrt_rtx=rtx)
    assert version() == f"tensorrt_rtx {rtx.__version__}"
    packages(tensorrt=release("tensorrt", "10.9.0.34"), tensorrt_rtx=release(RTX, "1.0.0.20"))
    with pytest.raises(MissingDependency, match=r"10\.9\.0\.34 is too old; .*1\.0\.0\.20 is too"):
        package()
    for number in ("10.13.0.35", "10.14.1.48.post1", "11.4.0.106"):
        packages(tensorrt=release("tensorrt", number), tensorrt_rtx=rtx)
        assert version() == f"tensorrt {number}"


@pytest.mark.parametrize("target", ["sm89", "current"])
def test_the_full_package_builds_for_no_other_card(
    packages: Callable[..., None], target: str
) -> None:
    full = release("tensorrt", "11.4.0.106")
    del full.ComputeCapability
    packages(tensorrt=full)
    assert capabilities() == []
    with pytest.raises(
        InvalidInput, match=f"tensorrt 11.4.0.106 builds no engine for '{target}'"
    ) as caught:
        built(chain(BLOCKS["basic"], "fp16"), (target,))
    assert caught.value.accepted == "this machine's own card"
    assert "hwnas[gpu-build]" in caught.value.next_step


def test_a_full_package_without_a_driver_starts_no_builder(packages: Callable[..., None]) -> None:
    """There the constructor raises TypeError, and the log has the reason."""

    def builder(log: Any) -> None:
        log.log(1, "CUDA initialization failure with error: 35. Please check your installation")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    packages(tensorrt=release("tensorrt", "11.4.0.106", Builder=builder))
    with pytest.raises(MissingDependency, match=r"tensorrt 11\.4\.0\.106 finds no NVIDIA driver"):
        built(chain(BLOCKS["basic"], "fp16"), ())
