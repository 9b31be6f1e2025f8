"""Why the costs of ops add up: operators of rows, less those of boundaries, are those of networks.

ONNX Runtime's optimised graphs are the oracle. A node counts with its domain, its operator and how
many inputs it has, which tells a convolution that adds from one that does not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from hwnas.spaces.registry import load_space
from hwnas.spaces.resnet import Stage as ResnetStage
from hwnas.spaces.resnet import resnet, resnet_tiny
from hwnas.spaces.shufflenet import Stage as ShuffleStage
from hwnas.spaces.shufflenet import shufflenet, shufflenet_224, shufflenet_tiny
from latency_tables.boundaries import chain_key, probes
from latency_tables.ops import OpSpec
from profilers.graphs import emit, random_parameters
from profilers.ort_session import session_options

REORDERS = ("ReorderInput", "ReorderOutput")
EXAMPLES = Path(__file__).parents[2] / "examples"
Operators = Counter[tuple[str, str, int]]
Executed = Callable[[Sequence[OpSpec]], Operators]


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Executed:
    """The nodes that ONNX Runtime executes for a chain of ops; each chain is opened once."""
    file = tmp_path_factory.mktemp("graphs") / "optimised.onnx"
    known: dict[str, Operators] = {}

    def count(ops: Sequence[OpSpec]) -> Operators:
        key = chain_key(ops)
        if key not in known:
            rng = np.random.default_rng(0)
            model = emit(ops, [random_parameters(op, rng) for op in ops])
            options = session_options(1)
            options.optimized_model_filepath = str(file)
            ort.InferenceSession(
                model.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
            nodes = onnx.load(file).graph.node
            constants = {name for node in nodes if not node.input for name in node.output}
            known[key] = Counter(
                (node.domain, node.op_type, sum(map(bool, node.input)))
                for node in nodes
                if node.output[0] not in constants
            )
        return known[key]

    return count


def less(more: Operators, fewer: Operators) -> Operators:
    """The difference, which may be negative, without zeros."""
    found = Counter(more)
    found.subtract(fewer)
    return Counter({kind: count for kind, count in found.items() if count})


def assert_operators_add_up(
    space: SearchSpace, networks: int, executed: Executed, *, saving_is_sure: bool = True
) -> None:
    chains = probes(space.lattice.ops)
    sampler, rng = UniformSampler(space), np.random.default_rng(3)
    saved = 0
    for _ in range(networks):
        ops = space.lower(sampler.sample(rng))
        summed: Operators = Counter()
        for place, op in enumerate(ops):
            summed.update(executed([op]))
            if place:
                *head, last = chains[op.boundary]
                saving = Counter(executed(head))
                saving.update(executed([last]))
                saving = less(saving, executed([*head, last]))
                summed = less(summed, saving)
                saved += saving.total() > 0
        assert less(summed, executed(ops)) == {}, [op.key for op in ops]
    assert saved >= networks or not saving_is_sure, "boundaries save something"


@pytest.mark.parametrize("channels", [1, 3])
def test_operators_of_the_preset_for_small_images_add_up(channels: int, executed: Executed) -> None:
    space = load_space("mobile-tiny", classes=10, image_channels=channels, size=32)
    assert_operators_add_up(space, 20, executed)


@pytest.mark.parametrize("networks", [3, pytest.param(40, marks=pytest.mark.slow)])
def test_operators_of_the_preset_for_photos_add_up(networks: int, executed: Executed) -> None:
    space = load_space("mobile", classes=10, image_channels=3, size=224)
    assert_operators_add_up(space, networks, executed)


BOTH = ("fp32", "w8a8")
OTHER_SPACES = {
    "shufflenet-tiny": (shufflenet_tiny(classes=10), 12),
    "shufflenet": (shufflenet_224(classes=10), 2),
    "blocks without a stride": (
        shufflenet(
            "flat", (ShuffleStage(2, 32, 1), ShuffleStage(1, 64), ShuffleStage(1, 64, 1)),
            classes=10, size=32, stem_channels=32, stem_precisions=BOTH,
        ),
        8,
    ),
    "resnet-tiny": (resnet_tiny(classes=10, precisions=BOTH), 12),
    "resnet18, all of it": (
        resnet(
            "resnet", (ResnetStage(2, 64, 1), ResnetStage(2, 128), ResnetStage(1, 256)),
            classes=10, size=64, precisions=BOTH, stem_precisions=BOTH, head_precisions=BOTH,
        ),
        8,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("space", "networks"), OTHER_SPACES.values(), ids=list(OTHER_SPACES))
def test_operators_of_the_other_spaces_add_up(
    space: SearchSpace, networks: int, executed: Executed
) -> None:
    """What a shuffle unit reads and hands on is laid out channel by channel, so nothing is saved
    between two of them."""
    shuffles = any(layer.kind == "half" for op in space.lattice.ops for layer in op.layers)
    assert_operators_add_up(space, networks, executed, saving_is_sure=not shuffles)


@pytest.mark.slow
@pytest.mark.parametrize(("space", "networks"), OTHER_SPACES.values(), ids=list(OTHER_SPACES))
def test_operators_of_many_networks_of_the_other_spaces_add_up(
    space: SearchSpace, networks: int, executed: Executed
) -> None:
    assert_operators_add_up(space, 40, executed, saving_is_sure=False)


def test_operators_of_a_space_of_ones_own_add_up(executed: Executed) -> None:
    path = f"{EXAMPLES / 'own_space.py'}:space"
    space = load_space(path, classes=10, image_channels=1, size=32)
    assert_operators_add_up(space, 20, executed)


def test_operators_of_low_bit_weights_add_up_from_the_rows_of_eight_bits(
    executed: Executed,
) -> None:
    """What is unpacked when a file is loaded is no operator, in rows or in networks."""
    stages = (Stage(1, 1, (16, 32)), Stage(2, 2, (32, 48)))
    space = mobile(
        "low", stages, classes=10, size=32, kernels=(3,),
        precisions=("fp32", "w8a8", "w4a8", "w2a8", "pact-w1a8"),
    )  # fmt: skip
    assert_operators_add_up(space, 20, executed)
    chains = probes(space.lattice.ops).values()
    assert {op.precision.name for chain in chains for op in chain} == {"fp32", "w8a8"}


def test_rows_alone_do_not_add_up(executed: Executed) -> None:
    """So that what is subtracted above is known to matter: layouts are changed once, not twice."""
    space = load_space("mobile-tiny", classes=10, image_channels=1, size=32)
    ops = space.lower(space.architecture([0] * len(space.genes)))
    summed: Operators = sum((executed([op]) for op in ops), Counter())
    extra = less(summed, executed(ops))
    assert all(extra["com.microsoft.nchwc", name, 1] > 0 for name in REORDERS)
