"""Shipped files against the PyTorch networks that they were written from."""

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hwnas.batches import in_order
from hwnas.data import Images, Splits, as_input, digits
from hwnas.export.onnx_file import accuracy, agreement, write_onnx
from hwnas.recipes import TrainingRecipe
from hwnas.retrain import accuracy as torch_accuracy
from hwnas.retrain import retrain
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from hwnas.spaces.resnet import Stage as Stages
from hwnas.spaces.resnet import resnet
from hwnas.spaces.shufflenet import shufflenet_tiny
from hwnas.supernet.network import Supernet
from profilers.base import Array, Session, WrongKernels
from profilers.graphs import read_ops
from profilers.measure import Protocol, Samples
from profilers.modules import Network
from profilers.ort import OrtProfiler


def space_of(precisions: tuple[str, ...]) -> SearchSpace:
    return mobile(
        "small",
        (Stage(1, 2, (16,), squeeze=4), Stage(2, 2, (16,))),
        classes=10,
        size=32,
        image_channels=1,
        stem_channels=8,
        head_channels=32,
        kernels=(3,),
        expansions=(3,),
        precisions=precisions,
        skip=False,
    )


SPACE = space_of(("fp32", "w8a8"))
OTHER_SPACES = [
    shufflenet_tiny(classes=10),
    resnet(
        "resnet", (Stages(1, 16, 1), Stages(2, 32)), classes=10, size=32, image_channels=1,
        stem_channels=16, multipliers=(1.0,), precisions=("fp32", "w8a8"),
        stem_precisions=("w8a8",),
    ),
]  # fmt: skip


def architecture_of(precisions: dict[str, str]) -> Architecture:
    return SPACE.parse({f"{name}.precision": p for name, p in precisions.items()})


def trained_network(
    data: Splits, space: SearchSpace, architecture: Architecture, steps: int
) -> Network:
    torch.manual_seed(0)
    supernet = Supernet(space)
    batches = [x for x, _ in in_order(data.train.first(128), 64)]
    supernet.initialise_ranges(batches[0])
    network = supernet.extract(architecture, supernet.recalibrate(architecture, batches))
    recipe = TrainingRecipe(steps=steps, batch=32, learning_rate=0.04)
    retrain(network, data, recipe, seed=0, progress=lambda *_: None)
    network.round_biases()
    return network


PLACES = ("block0", "block1", "block2", "head")
FLOAT = dict.fromkeys(PLACES, "fp32")
INTEGER = dict.fromkeys(PLACES, "w8a8")
MIXED = {**INTEGER, "block1": "fp32"}


@pytest.fixture(scope="module")
def data() -> Splits:
    return digits()


@pytest.fixture(scope="module")
def networks(data: Splits) -> dict[str, Network]:
    return {
        "float": trained_network(data, SPACE, architecture_of(FLOAT), 20),
        "integer": trained_network(data, SPACE, architecture_of(INTEGER), 80),
        "mixed": trained_network(data, SPACE, architecture_of(MIXED), 80),
    }


@pytest.fixture(scope="module")
def profiler() -> OrtProfiler:
    return OrtProfiler(threads=1)


class Answers(Session):
    """A session that answers from a list."""

    def __init__(self, logits: Array) -> None:
        super().__init__()
        self.logits = logits
        self.asked = 0
        self.calls: list[int] = []

    def _run(self, *inputs: Array) -> Array:
        count = len(inputs[0])
        self.calls.append(count)
        self.asked += count
        return self.logits[self.asked - count : self.asked]

    def _block(self, protocol: Protocol) -> Samples:
        raise NotImplementedError


def test_a_float_file_gives_the_networks_logits(
    networks: dict[str, Network], data: Splits, profiler: OrtProfiler, tmp_path: Path
) -> None:
    network = networks["float"]
    model = write_onnx(network, profiler, tmp_path / "model.onnx")
    with profiler.prepare(model) as session:
        found = agreement(network, session, data.search_val)
    assert found.images == 400
    assert found.largest_difference < 1e-3
    assert found.same_class == 1.0
    assert found.logit_range > 1


@pytest.mark.parametrize("kind", ["integer", "mixed"])
def test_an_integer_file_answers_as_the_trained_network(
    kind: str,
    networks: dict[str, Network],
    data: Splits,
    profiler: OrtProfiler,
    tmp_path: Path,
) -> None:
    """Its biases are those of the file, so that codes differ on ties alone."""
    network = networks[kind]
    model = write_onnx(network, profiler, tmp_path / "model.onnx")
    with profiler.prepare(model) as session:
        found = agreement(network, session, data.search_val)
        shipped = accuracy(session, data.search_val)
    assert torch_accuracy(network, data) > 0.7
    assert found.same_class >= 0.999
    assert found.largest_difference < 0.01 * found.logit_range
    assert shipped == pytest.approx(torch_accuracy(network, data), abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w8a8", "w4a8", "w2a8", "w8a4", "w4a4", "w2a4"])
def test_a_file_of_any_bits_answers_as_its_network_on_every_image_at_hand(
    name: str, data: Splits, profiler: OrtProfiler, tmp_path: Path
) -> None:
    """On 1300 images, of the classes at most one differs, and 97 % of the logits are the same. They
    would not be without the biases of the file: the accumulator's grid is coarse for few bits."""
    network = trained_network(data, dict.fromkeys(PLACES, name), 80)
    images = Images(
        np.concatenate([data.train.x, data.search_val.x]),
        np.concatenate([data.train.y, data.search_val.y]),
    )
    assert len(images) >= 1000
    with profiler.prepare(write_onnx(network, profiler, tmp_path / "model.onnx")) as session:
        found = agreement(network, session, images)
        logits = session.run(as_input(images.x))
    with torch.no_grad():
        reference = network(torch.from_numpy(as_input(images.x))).numpy()
    assert found.same_class >= 0.999
    assert found.largest_difference < 0.01 * found.logit_range
    identical = np.abs(logits - reference).max(1) < 1e-4 * found.logit_range
    assert identical.mean() > 0.97


@pytest.mark.parametrize("space", OTHER_SPACES, ids=lambda space: space.name)
def test_an_integer_file_of_another_space_answers_as_the_trained_network(
    space: SearchSpace, data: Splits, profiler: OrtProfiler, tmp_path: Path
) -> None:
    """Every other block in float, so that formats change at each of them."""
    genes = {gene.name: gene.choices[0] for gene in space.genes}
    changing = [gene.name for gene in space.genes if gene.name.endswith(".precision")]
    genes |= dict.fromkeys(changing[::2], "w8a8")
    network = trained_network(data, space, space.parse(genes), 60)
    assert {op.precision.name for op in network.ops} == {"fp32", "w8a8"}
    with profiler.prepare(write_onnx(network, profiler, tmp_path / "model.onnx")) as session:
        found = agreement(network, session, data.search_val)
    assert torch_accuracy(network, data) > 0.7
    assert found.same_class >= 0.97
    assert found.largest_difference < 0.25 * found.logit_range


def test_the_file_on_disk_is_the_checked_model_and_tells_its_ops(
    networks: dict[str, Network], data: Splits, profiler: OrtProfiler, tmp_path: Path
) -> None:
    for name, network in networks.items():
        path = tmp_path / name / "model.onnx"
        model = write_onnx(network, profiler, path)
        stored = onnx.load(path)
        assert stored == model
        assert tuple(read_ops(stored)) == network.ops
        assert [p.name for p in path.parent.iterdir()] == ["model.onnx"]
        x = as_input(data.search_val.x[:5])
        with profiler.prepare(stored) as one, profiler.prepare(model) as other:
            np.testing.assert_array_equal(one.run(x), other.run(x))
            np.testing.assert_allclose(  # the batch is symbolic
                np.concatenate([one.run(x[i : i + 1]) for i in range(5)]),
                one.run(x),
                rtol=1e-4,
                atol=1e-4,
            )


def test_writing_twice_gives_the_same_bytes(
    networks: dict[str, Network], profiler: OrtProfiler, tmp_path: Path
) -> None:
    for place in ("a", "b"):
        write_onnx(networks["integer"], profiler, tmp_path / place)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_integer_file_is_smaller_than_the_float_one(
    networks: dict[str, Network], profiler: OrtProfiler, tmp_path: Path
) -> None:
    models = {kind: write_onnx(networks[kind], profiler, tmp_path / kind) for kind in networks}

    def weight_bytes(model: onnx.ModelProto) -> int:
        return sum(len(item.raw_data) for item in model.graph.initializer)

    assert weight_bytes(models["integer"]) < 0.6 * weight_bytes(models["float"])


def test_nothing_is_written_where_the_check_fails(
    networks: dict[str, Network], tmp_path: Path
) -> None:
    class Strict(OrtProfiler):
        """A profiler whose runtime never does as it is told."""

        def check(self, model: onnx.ModelProto) -> None:
            raise WrongKernels("never")

    old = tmp_path / "model.onnx"
    old.write_bytes(b"what was there")
    with pytest.raises(WrongKernels):
        write_onnx(networks["float"], Strict(), old)
    assert old.read_bytes() == b"what was there"
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_agreement_is_counted_on_the_logits_of_both(
    networks: dict[str, Network], data: Splits
) -> None:
    """The session's logits are the network's with three answers swapped and one logit moved."""
    network = networks["float"]
    images = data.search_val.first(20)
    with torch.no_grad():
        reference = network(torch.from_numpy(as_input(images.x))).numpy()
    answers = reference.copy()
    for row in (2, 5, 11):
        best, second = np.argsort(reference[row])[::-1][:2]
        answers[row, [best, second]] = answers[row, [second, best]]
    answers[7, reference[7].argmin()] -= 50.0
    found = agreement(network, Answers(answers), images)
    assert found.images == 20
    assert found.same_class == 17 / 20
    assert found.largest_difference == pytest.approx(50.0, rel=1e-5)
    assert found.logit_range == pytest.approx(float(np.ptp(reference)))


@pytest.mark.parametrize("batch", [1, 7, 10, 500])
def test_accuracy_is_a_hand_count_in_batches(batch: int) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(23, 4)).astype(np.float32)
    classes = rng.integers(0, 4, 23)
    images = Images(np.zeros((23, 4, 4, 1), np.uint8), classes)
    answers = [max(range(4), key=list(row).__getitem__) for row in logits]
    expected = sum(answer == kind for answer, kind in zip(answers, classes, strict=True))
    session = Answers(logits)
    assert accuracy(session, images, batch=batch) == expected / 23
    assert sum(session.calls) == 23
    assert max(session.calls) <= batch


def test_accuracy_of_a_real_file_is_a_hand_count_image_by_image(
    networks: dict[str, Network], data: Splits, profiler: OrtProfiler, tmp_path: Path
) -> None:
    model = write_onnx(networks["integer"], profiler, tmp_path / "model.onnx")
    images = data.search_val.first(100)
    with profiler.prepare(model) as session:
        right = sum(
            int(session.run(as_input(images.x[i : i + 1])).argmax() == images.y[i])
            for i in range(100)
        )
        assert accuracy(session, images, batch=33) == right / 100
