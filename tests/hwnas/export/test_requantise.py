"""A network on another runtime's grid: the same ranges, other codes, a score of its own."""

from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch

from hwnas.batches import in_order
from hwnas.data import Splits, digits
from hwnas.export.requantise import requantised, rescored
from hwnas.recipes import TrainingRecipe
from hwnas.retrain import accuracy, retrain
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.ops import OpSpec, Tensor
from profilers.graph_module import GraphModule
from profilers.graphs import INPUT, emit
from profilers.modules import Network
from profilers.ort_session import session_options
from quant.errors import InvalidInput
from quant.layers import ActivationQuantiser
from quant.precision import ONNXRUNTIME, TENSORRT, TORCH, Precision

COARSE = replace(ONNXRUNTIME, kernels={"fp32": "fp32", "w8a3": "int8"})


def chain(name: str) -> list[OpSpec]:
    precision = Precision(name)
    stem = conv_norm_activation(
        Tensor(1, 32, 32), 8, kernel=3, stride=2, precision=Precision("fp32")
    )
    first = inverted_residual(
        stem.output, 16, kernel=3, expansion=3, stride=2, precision=precision, squeeze=4
    )
    second = inverted_residual(first.output, 16, kernel=3, expansion=3, precision=precision)
    return [stem, first, second, classifier(second.output, 32, 10, precision=precision)]


@pytest.fixture(scope="module")
def data() -> Splits:
    return digits()


@pytest.fixture(scope="module")
def networks(data: Splits) -> dict[str, Network]:
    """One trained for seconds in the shipped precision; and its weights in one so coarse that the
    grid is seen.
    """
    torch.manual_seed(0)
    network = Network(chain("w8a8"), ONNXRUNTIME)
    batch = next(x for x, _ in in_order(data.train.first(64), 64))

    def cover(quantiser: ActivationQuantiser, values: tuple[torch.Tensor]) -> None:
        quantiser.limit = float(values[0].abs().max())

    quantisers = [m for m in network.modules() if isinstance(m, ActivationQuantiser)]
    hooks = [m.register_forward_pre_hook(cover) for m in quantisers]
    with torch.no_grad():
        network(batch)
    for hook in hooks:
        hook.remove()
    recipe = TrainingRecipe(steps=50, batch=24, learning_rate=0.04)
    retrain(network, data, recipe, seed=0, progress=lambda *_: None, recalibration_images=256)
    coarse = Network(chain("w8a3"), COARSE)
    coarse.load_state_dict(network.state_dict())
    return {"w8a8": network, "w8a3": coarse.eval()}


def logits(network: Network, data: Splits) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([network(x) for x, _ in in_order(data.search_val, 100)])


@pytest.mark.parametrize("name", ["w8a8", "w8a3"])
def test_the_same_runtime_changes_nothing(
    networks: dict[str, Network], data: Splits, name: str
) -> None:
    network = networks[name]
    other = requantised(network, network.runtime)
    assert other is not network
    assert torch.equal(logits(other, data), logits(network, data))
    again = rescored(network, network.runtime, data)
    assert again.search_val == again.trained_search_val == accuracy(network, data)


def test_weights_and_ranges_are_carried_over_and_codes_are_the_runtimes(
    networks: dict[str, Network],
) -> None:
    network = networks["w8a8"]
    other = requantised(network, TENSORRT)
    state = network.state_dict()
    assert other.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in other.state_dict().items())
    ramp = torch.linspace(-20, 20, 20001)
    for mine, theirs in zip(network.op_modules, other.op_modules, strict=True):
        for index, quantiser in theirs.activation_quantisers.items():
            told = theirs.op.quantisers[index]
            assert quantiser.limit == mine.activation_quantisers[index].limit
            assert quantiser.grid == TENSORRT.grid(told.bits, signed=told.signed)
            ends = (quantiser(ramp).min().item(), quantiser(ramp).max().item())
            step = quantiser.limit / quantiser.grid.top
            assert ends == pytest.approx((quantiser.grid.low * step, quantiser.grid.high * step))


@pytest.mark.parametrize("name", ["w8a8", "w8a3"])
def test_the_score_is_that_of_the_new_grid(
    networks: dict[str, Network], data: Splits, name: str
) -> None:
    """The emitted file of the other runtime, in a float simulation, counts image by image; at three
    bits an unsigned tensor has 3 steps there, not 7, and the trained accuracy would be a lie."""
    network = networks[name]
    tensorrt = replace(TENSORRT, kernels={"fp32": "fp32", name: "int8"})
    found = rescored(network, tensorrt, data)
    assert found.trained_search_val == accuracy(network, data)
    options = session_options(1)
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    other = found.network
    model = emit(other.ops, other.parameters_for_graph(), tensorrt)
    session = ort.InferenceSession(model.SerializeToString(), options)
    answers = np.concatenate(
        [session.run(None, {INPUT: x.numpy()})[0] for x, _ in in_order(data.search_val, 100)]
    ).argmax(1)
    right = (answers == data.search_val.y).mean()
    assert found.search_val == pytest.approx(right, abs=1.5 / len(answers))
    if name == "w8a3":
        assert found.search_val < found.trained_search_val - 0.1
    else:
        assert found.trained_search_val > 0.5
        assert found.search_val == pytest.approx(found.trained_search_val, abs=0.03)
        assert not torch.equal(logits(other, data), logits(network, data))


def test_a_network_trained_for_fp8_keeps_its_score_and_its_file_answers_so(data: Splits) -> None:
    """In TensorRT's graph, run as it is written; a tie may turn an answer."""
    torch.manual_seed(0)
    network = Network(chain("fp8"), TENSORRT)
    recipe = TrainingRecipe(steps=40, batch=24, learning_rate=0.04)
    retrain(network, data, recipe, seed=0, progress=lambda *_: None, recalibration_images=256)
    found = rescored(network, TENSORRT, data)
    assert found.search_val == found.trained_search_val > 0.5
    assert torch.equal(logits(found.network, data), logits(network, data))
    file = GraphModule(emit(network.ops, found.network.parameters_for_graph(), TENSORRT))
    with torch.no_grad():
        answers = torch.cat([file(x) for x, _ in in_order(data.search_val, 100)]).argmax(1)
    right = (answers.numpy() == data.search_val.y).mean()
    assert found.search_val == pytest.approx(right, abs=1.5 / len(answers))
    for runtime in (ONNXRUNTIME, TORCH):
        with pytest.raises(InvalidInput, match="no kernel for fp8"):
            requantised(network, runtime)


def test_a_runtime_without_the_kernels_is_refused(networks: dict[str, Network]) -> None:
    with pytest.raises(InvalidInput, match="w8a3"):
        requantised(networks["w8a3"], TORCH)
