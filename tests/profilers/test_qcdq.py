"""Our files against Brevitas's own export of the same network: another exporter, another folding.

Brevitas writes quantise, clip and dequantise nodes, batch norms unfolded and biases in float, from
its own layers; so nothing of `quant.integer` or `profilers.graphs` takes part in it.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import numpy_helper

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.mobile import Stage, mobile
from latency_tables.ops import OpSpec
from profilers.graphs import INPUT, emit
from profilers.modules import Network
from profilers.ort_session import session_options
from quant.layers import write_qcdq
from quant.precision import ONNXRUNTIME, TENSORRT, Runtime

pytest.importorskip("onnxoptimizer", reason="Brevitas's export needs it")

Trained = Callable[..., Network]
_RNG = np.random.default_rng(0)
IMAGES = (_RNG.random((64, 3, 1, 1)) ** 2 * _RNG.random((64, 3, 16, 16))).astype(np.float32)
"""Of many colours, which a random network tells apart."""


def random_ops(name: str, seed: int) -> list[OpSpec]:
    space = mobile(
        "small",
        (Stage(1, 1, (8, 12), squeeze=4), Stage(2, 2, (12, 16))),
        classes=10,
        size=16,
        stem_channels=8,
        head_channels=32,
        kernels=(3, 5),
        expansions=(1, 3),
        precisions=(name,),
        skip=False,
    )
    return list(space.lower(UniformSampler(space).sample(np.random.default_rng(seed))))


def run(model: bytes, *, optimised: bool) -> np.ndarray:
    options = session_options(1)
    if not optimised:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model, options).run(None, {INPUT: IMAGES})[0]


@pytest.fixture
def network(trained: Trained, runtime: Runtime, name: str, seed: int) -> Network:
    """A random network whose answers differ: its last bias takes the mean of the logits away."""
    network = trained(random_ops(name, seed), IMAGES, seed=seed, runtime=runtime, settled=True)
    *_, last = network.op_modules[-1].weighted_layers.values()
    assert last.bias is not None
    with torch.no_grad():
        last.bias.sub_(network(torch.from_numpy(IMAGES)).mean(0))
    return network


def theirs(network: Network, path: Path) -> bytes:
    write_qcdq(network, torch.from_numpy(IMAGES[:2]), path)
    return path.read_bytes()


def round_biases(network: Network, model: onnx.ModelProto) -> None:
    """Move every bias of the network to the integer that its file holds."""
    held = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    for number, module in enumerate(network.op_modules):
        folded = module.parameters_for_graph().weights
        for index, layer in module.weighted_layers.items():
            label = f"op{number:03d}.{index}.{module.op.layers[index].role}.bias"
            if f"{label}.codes" not in held:
                continue
            rounded = held[f"{label}.codes"] * held[f"{label}.scale"].astype(np.float64)
            shift = torch.from_numpy((rounded - folded[index].bias).astype(np.float32))
            norm = module.norms[str(index)] if module.op.layers[index].norm else layer
            with torch.no_grad():
                norm.bias.add_(shift)


@pytest.mark.parametrize(
    ("runtime", "name", "seed"),
    [
        (ONNXRUNTIME, "w8a8", 0),
        (ONNXRUNTIME, "w4a8", 1),
        (TENSORRT, "w8a8", 1),
        (TENSORRT, "w4a8", 0),
    ],
    ids=["onnxruntime w8a8", "onnxruntime w4a8", "tensorrt w8a8", "tensorrt w4a8"],
)
def test_our_file_answers_as_brevitas_own(
    network: Network, runtime: Runtime, name: str, tmp_path: Path
) -> None:
    """A step is a 255th of the logits' range. TensorRT's file has float biases as Brevitas's has:
    every class is the same, and logits to a tenth of a step. ONNX Runtime's rounds biases to the
    accumulator's grid. Against a network whose biases lie on it, logits are to a tenth of a step
    too but where a code near a tie moves, in either file: under 15 % of them, none by 4 steps, and
    the class of at most 3 images in 64. Against one whose biases do not, such codes move all
    through a network that was never trained: 5 steps at eight bits, 10 at four, whose grid is
    coarser, and the class of one image in ten.
    """
    runtime = replace(runtime, kernels={name: "int8", "fp32": "fp32"})
    before = theirs(network, tmp_path / "before.onnx")
    model = emit(network.ops, network.parameters_for_graph(), runtime)
    round_biases(network, model)
    after = theirs(network, tmp_path / "after.onnx")
    assert (before == after) == (runtime.name == TENSORRT.name)
    with torch.no_grad():
        reference = network(torch.from_numpy(IMAGES)).numpy()
    step = np.ptp(reference) / 255
    assert len(set(reference.argmax(1))) >= 4
    for optimised in (False, True) if runtime.name == ONNXRUNTIME.name else (False,):
        wanted, found, unrounded = (
            run(file, optimised=optimised) for file in (after, model.SerializeToString(), before)
        )
        away = np.abs(found - wanted) / step
        same = (found.argmax(1) == wanted.argmax(1)).mean()
        if runtime.name == TENSORRT.name:
            assert (same, round(away.max(), 1)) == (1, 0)
            continue
        assert same >= 0.95
        assert away.max() < 4
        assert (away > 0.1).mean() < 0.15
        assert np.abs(found - unrounded).max() < (5 if name == "w8a8" else 10) * step
        assert (found.argmax(1) == unrounded.argmax(1)).mean() >= 0.9
