"""Emitted graphs in PyTorch, against ONNX Runtime without optimisation: it runs the same nodes."""

import gc
import itertools
import logging
import runpy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.blocks import (
    basic_block,
    pooled_classifier,
    pooled_stem,
    shuffle_unit,
    xception_unit,
)
from hwnas.spaces.registry import load_space
from latency_tables.ops import OpSpec, Tensor
from profilers.graph_module import _FORMS, GraphModule
from profilers.graphs import OPS_METADATA
from profilers.torch_cuda import inputs_of, load_program, save_program
from quant.errors import InvalidInput
from quant.precision import Precision

GRAPHS = runpy.run_path(str(Path(__file__).with_name("test_graphs_tensorrt.py")))
"""The blocks of the emitter's own tests, and how those run a graph as it is written."""

Array = np.ndarray[Any, np.dtype[Any]]
Block = Callable[[Tensor, Precision, str], OpSpec]
run: Callable[[onnx.ModelProto, Array], Array] = GRAPHS["run"]
retyped: Callable[[onnx.ModelProto, int, int], onnx.ModelProto] = GRAPHS["retyped"]
model_of: Callable[..., onnx.ModelProto] = GRAPHS["random_model"]
tensor: Callable[..., Tensor] = GRAPHS["tensor"]
images: Callable[..., Array] = GRAPHS["images"]
FUNCTIONS: tuple[str, ...] = GRAPHS["FUNCTIONS"]
BLOCKS: dict[str, Block] = {
    **GRAPHS["BLOCKS"],
    "pooled stem": lambda t, p, _: pooled_stem(t, 12, precision=p),
    "pooled head": lambda t, p, _: pooled_classifier(t, 10, precision=p),
    "basic": lambda t, p, _: basic_block(t, t.channels, inner=6, precision=p),
    "shuffle": lambda t, p, _: shuffle_unit(t, t.channels, kernel=3, middle=4, precision=p),
    "shuffle stride 2": lambda t, p, _: shuffle_unit(
        t, 20, kernel=5, middle=4, stride=2, precision=p
    ),
    "xception": lambda t, p, _: xception_unit(t, t.channels, middle=6, precision=p),
}
every_block = pytest.mark.parametrize("block", BLOCKS.values(), ids=list(BLOCKS))
FLOAT, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
HOST = torch.device("cpu")


def computed(model: onnx.ModelProto, *inputs: Array) -> torch.Tensor:
    """What the module computes from inputs in the types of its graph."""
    module = GraphModule(model)
    given = [torch.from_numpy(x).to(k) for x, k in zip(inputs, module.input_types, strict=True)]
    with torch.no_grad():
        output: torch.Tensor = module(*given)
    return output


def codes(seed: int = 1) -> Array:
    """Random codes as an int8 input."""
    return np.random.default_rng(seed).integers(-128, 128, images().shape, np.int8)


def away(found: Array, wanted: Array) -> float:
    """The largest difference, as a share of the range that is wanted."""
    return float(
        np.abs(found.astype(np.float64) - wanted).max() / np.ptp(wanted.astype(np.float64))
    )


# ---- block by block


@pytest.mark.parametrize("function", FUNCTIONS)
@every_block
def test_a_float_graph_computes_what_onnxruntime_computes(block: Block, function: str) -> None:
    """All but the order of sums."""
    for kind, values in (("fp32", images()), ("a8", codes())):
        model = model_of([block(tensor(kind), Precision("fp32"), function)])
        found, wanted = computed(model, values), run(model, values)
        assert found.dtype == torch.float32
        assert away(found.numpy(), wanted) < 1e-6


@pytest.mark.parametrize("function", ["relu", "hard_swish"])
@every_block
def test_an_fp16_graph_is_as_near_as_its_roundings(block: Block, function: str) -> None:
    """Both round every value to 11 bits, from sums of another order: a few units in the last place,
    a few layers deep."""
    model = model_of([block(tensor(), Precision("fp16"), function)])
    found, wanted = computed(model, images()), run(model, images())
    assert found.numpy().dtype == wanted.dtype
    assert away(found.numpy(), wanted) < 2**-8
    exact = run(retyped(model, FP16, FLOAT), images())
    assert found.dtype == torch.float32 or away(found.numpy(), exact) > 1e-6, "it is in fp16"


@pytest.mark.parametrize("function", ["relu", "hard_swish"])
@every_block
def test_a_bf16_graph_is_near_the_same_graph_in_floats(block: Block, function: str) -> None:
    """ONNX Runtime has no bf16, so it is put to it in fp32, with weights of 8 bits; PyTorch rounds
    every value to 8 bits too. In fp32 both are the same."""
    model = model_of([block(tensor(), Precision("bf16"), function)])
    floats = retyped(model, BF16, FLOAT)
    wanted = run(floats, images())
    assert away(computed(floats, images()).numpy(), wanted) < 1e-6
    found = computed(model, images())
    assert 1e-5 < away(found.float().numpy(), wanted) < 2**-5
    logits = model.graph.output[0].type.tensor_type.elem_type == FLOAT
    assert found.dtype == (torch.float32 if logits else torch.bfloat16)


@pytest.mark.parametrize("kind", ["fp32", "a8", "a8+"])
@pytest.mark.parametrize("name", ["w8a8", "w4a4", "w3a2"])
@every_block
def test_an_integer_graph_gives_the_same_codes_but_for_ties(
    block: Block, name: str, kind: str
) -> None:
    """Where a value lies within a rounding error of a tie, its code may be the neighbour, and a
    further layer may carry that on: under 0.5 % of the codes, none by more than one. A gate's code
    moves a whole channel of the three images, of 24 in all."""
    op = block(tensor(kind), Precision(name), "relu")
    model = model_of([op])
    values = images() if kind == "fp32" else codes()
    found, wanted = computed(model, values).numpy(), run(model, values)
    assert found.dtype == wanted.dtype
    if op.logits:
        assert away(found, wanted) < 2 / 255
        return
    steps = np.abs(found.astype(int) - wanted)
    assert wanted.any()
    assert steps.max() <= 1
    gated = any(layer.kind == "mul" for layer in op.layers)
    assert (steps > 0).mean() <= (1 / 24 if gated else 0.005)


def test_the_blocks_have_every_operator_that_the_module_knows() -> None:
    models = [
        model_of([block(tensor(kind), Precision(name), function)])
        for block in BLOCKS.values()
        for name, kind, function in itertools.product(
            ("fp32", "bf16", "w4a4"), ("fp32", "a8"), FUNCTIONS
        )
    ]
    assert {node.op_type for model in models for node in model.graph.node} == set(_FORMS)


# ---- whole networks


@pytest.mark.parametrize("preset", ["mobile-tiny", "shufflenet-tiny", "resnet-tiny"])
def test_random_networks_of_mixed_precisions_compute_what_onnxruntime_computes(
    preset: str,
) -> None:
    """fp32 and w8a8 by turns: a tie that falls to the other side changes logits by steps."""
    space = load_space(
        preset, classes=10, image_channels=1, size=32, precisions=("fp32", "fp16", "w8a8", "w4a8")
    )
    sampler, rng = UniformSampler(space), np.random.default_rng(5)
    bright = np.array([0.05, 0.3, 1, 3], np.float32).reshape(-1, 1, 1, 1)
    values = bright * rng.random((4, 1, 32, 32), np.float32)
    for seed in range(4):
        model = model_of(list(space.lower(sampler.sample(rng))), seed)
        found, wanted = computed(model, values).numpy(), run(model, values)
        assert found.dtype == wanted.dtype == np.float32
        assert away(found, wanted) < 0.05 < 0.1 < away(found[::-1], wanted)


def test_two_inputs_are_taken_in_the_graphs_order() -> None:
    """x + 2y is not y + 2x."""
    ends = [
        helper.make_tensor_value_info(name, FLOAT, ["batch", 2, 3, 3])
        for name in ("input", "input1", "output")
    ]
    nodes = [
        helper.make_node("Add", ["input1", "input1"], ["twice"], "first"),
        helper.make_node("Add", ["input", "twice"], ["output"], "second"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:2], ends[2:]))
    x, y = (np.random.default_rng(s).random((4, 2, 3, 3), np.float32) for s in (0, 1))
    np.testing.assert_allclose(computed(model, x, y).numpy(), x + 2 * y, rtol=1e-6)
    with pytest.raises(ValueError, match="argument 2"):
        GraphModule(model)(torch.from_numpy(x))


# ---- memory


def test_a_value_is_gone_after_its_last_reader() -> None:
    """Alive while a node runs: what nodes before it made, and it or a later one reads."""
    op = BLOCKS["squeeze"](tensor(), Precision("w8a8"), "relu")
    chain = [op, BLOCKS["residual"](op.output, Precision("fp32"), "relu")]
    model = model_of(chain)
    module, made = GraphModule(model), dict[str, weakref.ref[torch.Tensor]]()
    alive: list[set[str]] = []

    def watched(node: Any) -> Any:
        def form(*arguments: Any) -> torch.Tensor:
            alive.append({name for name, held in made.items() if held() is not None})
            output: torch.Tensor = node.form(*arguments)
            made[node.output] = weakref.ref(output)
            return output

        return replace(node, form=form)

    module._nodes = [watched(node) for node in module._nodes]
    gc.disable()
    try:
        with torch.no_grad():
            module(torch.from_numpy(images()))
    finally:
        gc.enable()
    nodes = list(model.graph.node)
    for place, found in enumerate(alive):
        before = {name for node in nodes[:place] for name in node.output}
        assert found == before & {name for node in nodes[place:] for name in node.input}
    assert max(map(len, alive)) < len(nodes) / 4


def test_the_output_is_kept_though_a_node_reads_it() -> None:
    ends = [
        helper.make_tensor_value_info(name, FLOAT, ["batch", 2, 3, 3])
        for name in ("input", "output")
    ]
    nodes = [
        helper.make_node("Relu", ["input"], ["output"], "first"),
        helper.make_node("Relu", ["output"], ["more"], "second"),
    ]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:]))
    x = np.random.default_rng(0).standard_normal((1, 2, 3, 3)).astype(np.float32)
    np.testing.assert_array_equal(computed(model, x).numpy(), np.maximum(x, 0))


# ---- what is not ours


def test_a_foreign_node_is_refused_by_name() -> None:
    model = model_of([BLOCKS["conv"](tensor(), Precision("fp32"), "relu")])
    model.graph.node.append(helper.make_node("Softmax", ["output"], ["more"], "theirs"))
    with pytest.raises(InvalidInput, match=r"^Softmax \(theirs\) has no form in PyTorch") as caught:
        GraphModule(model)
    assert caught.value.exit_code == 2


# ---- exported programs


def program(ops: Sequence[OpSpec], path: Path) -> onnx.ModelProto:
    model = model_of(ops)
    save_program(model, path, batch=1)
    return model


@pytest.mark.parametrize("name", ["fp32", "fp16", "bf16"])
def test_an_exported_program_gives_the_same_bits_for_any_batch(name: str, tmp_path: Path) -> None:
    spec, ops = tensor(name), []
    for block in ("squeeze", "shuffle", "stride 2", "classifier"):
        ops.append(BLOCKS[block](spec, Precision(name), "hard_swish"))
        spec = ops[-1].output
    path = tmp_path / "model.pt2"
    module = GraphModule(program(ops, path))
    loaded, told = load_program(path, HOST)
    assert told == ops
    for batch in (1, 2, 3, 8):
        inputs = inputs_of(ops, batch)
        assert [x.dtype for x in inputs] == module.input_types
        with torch.no_grad():
            assert torch.equal(loaded(*inputs), module(*inputs))


def damaged(kind: str, path: Path, ops: Sequence[OpSpec]) -> None:
    whole = path.read_bytes()
    match kind:
        case "empty":
            path.write_bytes(b"")
        case "cut":
            path.write_bytes(whole[: len(whole) // 2])
        case "text":
            path.write_text("no program")
        case "weights":
            torch.save({"weight": torch.ones(3)}, path)
        case "without ops":
            module = GraphModule(model_of(ops))
            exported = torch.export.export(module, tuple(inputs_of(ops, 2)))
            torch.export.save(exported, path)
        case "other ops":
            loaded = torch.export.load(path)
            torch.export.save(loaded, path, extra_files={OPS_METADATA: '["{}"]'})


@pytest.mark.parametrize("kind", ["empty", "cut", "text", "weights", "without ops", "other ops"])
def test_a_damaged_program_is_refused_by_its_path(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops = [BLOCKS["conv"](tensor(), Precision("fp32"), "relu")]
    path = tmp_path / "model.pt2"
    program(ops, path)
    assert load_program(path, HOST)[1] == ops
    damaged(kind, path, ops)
    heard: list[logging.LogRecord] = []
    monkeypatch.setattr(logging.getLogger("torch.export"), "handle", heard.append)
    with pytest.raises(
        InvalidInput, match=r"model\.pt2 is not a whole program that hwnas exported"
    ):
        load_program(path, HOST)
    assert heard == [], "PyTorch would log a traceback"
    logging.getLogger("torch.export").warning("heard again")
    assert len(heard) == 1


def test_a_program_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="absent"):
        load_program(tmp_path / "absent.pt2", HOST)
