"""Training one network: it learns, its norms are the data's, its files come back exactly."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hwnas.retrain
import hwnas.training
from hwnas.batches import in_order
from hwnas.data import Images, Splits, digits
from hwnas.recipes import RetrainRecipe, TrainingRecipe
from hwnas.retrain import (
    accuracy,
    in_float,
    load_weights,
    recalibrate,
    retrain,
    save_weights,
    teacher_of,
)
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from hwnas.supernet.network import Supernet
from hwnas.training import Teacher
from profilers.modules import Network
from quant.errors import InvalidInput
from quant.layers import Fp8Cast

RECIPE = TrainingRecipe(steps=80, batch=32, learning_rate=0.04)
PRECISIONS = ("fp32", "w8a8")


def space_of(precision: str, classes: int = 10, size: int = 32) -> SearchSpace:
    return mobile(
        "small",
        (Stage(1, 2, (16,), squeeze=4), Stage(2, 2, (16,))),
        classes=classes,
        size=size,
        image_channels=1,
        stem_channels=8,
        head_channels=32,
        kernels=(3,),
        expansions=(3,),
        precisions=(precision,),
        stem_precisions=(precision,),
        skip=False,
    )


def extracted(precision: str, data: Splits, seed: int = 0) -> Network:
    """An untrained network as a search hands it on: cut out of a supernet."""
    torch.manual_seed(seed)
    space = space_of(precision, data.classes, data.size)
    supernet = Supernet(space)
    batches = [x for x, _ in in_order(data.train.first(64), 32)]
    supernet.initialise_ranges(batches[0])
    (architecture,) = space.enumerate()
    return supernet.extract(architecture, supernet.recalibrate(architecture, batches))


def quiet(label: str, done: int, steps: int) -> None:
    """Progress to nobody."""


def mean_loss(network: Network, images: Images) -> float:
    with torch.no_grad():
        losses = [
            float(nn.functional.cross_entropy(network(x), y, reduction="sum"))
            for x, y in in_order(images, 100)
        ]
    return sum(losses) / len(images)


@pytest.fixture(scope="module")
def data() -> Splits:
    return digits()


@dataclass
class Training:
    """A network that was trained on digits, and how (loss, accuracy) were before and after."""

    network: Network
    before: tuple[float, float]
    after: tuple[float, float]
    told: list[tuple[int, int]]


@pytest.fixture(scope="module", params=PRECISIONS)
def training(
    request: pytest.FixtureRequest, data: Splits, tmp_path_factory: pytest.TempPathFactory
) -> Training:
    network = extracted(request.param, data)
    before = mean_loss(network, data.search_val), accuracy(network, data)
    told: list[tuple[int, int]] = []
    retrain(
        network, data, RECIPE, seed=0, checkpoint=tmp_path_factory.mktemp("training") / "t.pt",
        progress=lambda _, done, steps: told.append((done, steps)),
    )  # fmt: skip
    after = mean_loss(network, data.search_val), accuracy(network, data)
    return Training(network, before, after, told)


@pytest.fixture
def trained(training: Training) -> Network:
    return training.network


def tiny() -> Splits:
    rng = np.random.default_rng(0)

    def split(count: int) -> Images:
        y = np.arange(count) % 3
        x = rng.integers(0, 60, (count, 16, 16, 1)) + 60 * y[:, None, None, None]
        return Images(x.astype(np.uint8), y.astype(np.int64))

    return Splits("tiny", split(48), split(24), split(24))


# ---- it learns


def test_some_tens_of_steps_on_digits_lower_the_loss_and_raise_the_accuracy(
    training: Training,
) -> None:
    assert training.before[1] < 0.3  # chance is a tenth
    assert training.after[0] < 0.7 * training.before[0]
    assert training.after[1] > 0.7
    assert training.told == [(step, 80) for step in range(1, 81)]
    assert not training.network.training


def test_retraining_depends_on_its_seed_alone(tmp_path: Path) -> None:
    data = tiny()
    recipe = TrainingRecipe(steps=4, batch=8, learning_rate=0.01)
    for precision in PRECISIONS:
        states = []
        for seed, noise in ((0, 1), (0, 2), (1, 1)):
            network = extracted(precision, data)
            torch.manual_seed(noise)
            checkpoint = tmp_path / f"{precision} {seed} {noise}.pt"
            retrain(network, data, recipe, seed=seed, checkpoint=checkpoint, progress=quiet)
            states.append(network.state_dict())
        first, again, other = states
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)


def test_an_extracted_network_starts_where_the_shared_weights_were(tmp_path: Path) -> None:
    """No step at all: what retraining starts from is the supernet's own answer."""
    data = tiny()
    space = space_of("w8a8", data.classes, data.size)
    torch.manual_seed(0)
    supernet = Supernet(space)
    x = torch.cat([x for x, _ in in_order(data.train, 16)])
    supernet.initialise_ranges(x)
    (architecture,) = space.enumerate()
    statistics = supernet.recalibrate(architecture, [x])
    network = supernet.extract(architecture, statistics)
    with torch.no_grad():
        assert torch.equal(network(x), supernet(x, architecture, statistics))
        shared = supernet(x, architecture, statistics)
    recipe = TrainingRecipe(steps=3, batch=8, learning_rate=0.01)
    retrain(network, data, recipe, seed=0, checkpoint=tmp_path / "t.pt", progress=quiet)
    with torch.no_grad():
        assert not torch.equal(network(x), shared)
        assert torch.equal(supernet(x, architecture, statistics), shared)


# ---- a teacher


def with_teacher(
    precision: str, recipe: RetrainRecipe, teacher: Teacher | None, data: Splits | None = None
) -> Network:
    data = data or tiny()
    network = extracted(precision, data)
    retrain(network, data, recipe, seed=0, progress=quiet, teacher=teacher)
    return network


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_teacher_without_weight_changes_no_bit(precision: str) -> None:
    recipe = RetrainRecipe(steps=4, batch=8, learning_rate=0.01, teacher_weight=0.0)
    teacher = teacher_of(extracted("fp32", tiny(), seed=5), recipe)
    alone, silent = (with_teacher(precision, recipe, each) for each in (None, teacher))
    heard = with_teacher(precision, recipe, replace(teacher, weight=0.3))
    mine, theirs, other = (network.state_dict() for network in (alone, silent, heard))
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert any(not torch.equal(value, other[name]) for name, value in mine.items())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_teacher_that_knows_other_answers_pulls_the_network_to_them(precision: str) -> None:
    """It calls every class by the next one's name; who hears it alone never sees a label."""
    data = tiny()
    brightness = torch.tensor([0.12, 0.35, 0.58])  # the mean of each class's pixels

    def next_class(batch: Tensor) -> Tensor:
        kind = (batch.mean((1, 2, 3))[:, None] - brightness).abs().argmin(1)
        return 10.0 * nn.functional.one_hot((kind + 1) % 3, 3)

    for x, y in in_order(data.search_val, 24):
        assert torch.equal(next_class(x).argmax(1), (y + 1) % 3)
    shares = {}
    for weight in (0.0, 1.0):
        recipe = RetrainRecipe(steps=40, batch=16, learning_rate=0.02)
        network = with_teacher(precision, recipe, Teacher(next_class, weight, 4.0), data)
        with torch.no_grad():
            answers = torch.cat([network(x).argmax(1) for x, _ in in_order(data.search_val, 24)])
        classes = torch.from_numpy(data.search_val.y)
        shares[weight] = [float((answers == (classes + off) % 3).double().mean()) for off in (0, 1)]
    assert shares[0.0][0] > 0.9
    assert shares[1.0][1] > 0.9


def test_a_teacher_answers_in_inference_mode_and_learns_nothing() -> None:
    data = tiny()
    network = extracted("w8a8", data, seed=5).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    recipe = RetrainRecipe(steps=3, batch=8, learning_rate=0.05)
    teacher = teacher_of(network, recipe)
    with_teacher("w8a8", recipe, teacher)
    assert not network.training
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(p.grad is None for p in network.parameters())


def test_in_float_is_the_network_of_the_float_space_with_the_same_weights() -> None:
    data = tiny()
    quantised, expected = extracted("w8a8", data), extracted("fp32", data)
    twin = in_float(quantised, data)
    recalibrate(expected, data)
    assert {op.precision.name for op in twin.ops} == {"fp32"}
    assert [op.key for op in twin.ops] == [op.key for op in expected.ops]
    mine, theirs = twin.state_dict(), expected.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert not twin.training


@pytest.mark.parametrize("stop", [1, 3])
def test_training_with_a_teacher_goes_on_to_the_same_weights(stop: int, tmp_path: Path) -> None:
    data, recipe = tiny(), RetrainRecipe(steps=5, batch=8, learning_rate=0.02)

    def run(path: Path, progress: Callable[[str, int, int], None]) -> Network:
        network = extracted("w8a8", data)
        teacher = teacher_of(in_float(network, data), recipe)
        retrain(network, data, recipe, seed=0, progress=progress, checkpoint=path, teacher=teacher)
        return network

    def stopping(label: str, done: int, steps: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    whole = run(tmp_path / "whole.pt", quiet).state_dict()
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(hwnas.training, "CHECKPOINT_S", 0.0)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts.pt", stopping)
        resumed = run(tmp_path / "parts.pt", quiet).state_dict()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


# ---- it goes on where it stopped


def retrained(
    precision: str,
    path: Path | None,
    *,
    start_seed: int = 0,
    stop: int | None = None,
    told: list[tuple[str, int, int]] | None = None,
) -> Network:
    """Six steps in checkpoints of every second; interrupted after `stop` of them."""

    def progress(label: str, done: int, steps: int) -> None:
        if told is not None:
            told.append((label, done, steps))
        if done == stop:
            raise KeyboardInterrupt

    network = extracted(precision, tiny(), start_seed)
    recipe = TrainingRecipe(steps=6, batch=8, learning_rate=0.02)
    retrain(
        network, tiny(), recipe, seed=0, checkpoint=path, progress=progress,
        label="retraining finalist 1",
    )  # fmt: skip
    return network


def assert_same(network: Network, other: Network) -> None:
    """To the last bit: parameters, running statistics, and what is written as a graph."""
    mine, theirs = network.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert torch.equal(value, theirs[name]), name
    x, _ = next(in_order(tiny().search_val, 8))
    with torch.no_grad():
        assert torch.equal(network(x), other(x))


@pytest.fixture
def _every_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        hwnas.retrain, "Checkpoint", partial(hwnas.training.Checkpoint, every_steps=2)
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Network]:
    """Retrained without a stop, once for each precision."""
    made: dict[str, Network] = {}

    def build(precision: str) -> Network:
        if precision not in made:
            made[precision] = retrained(precision, tmp_path_factory.mktemp("whole") / "t.pt")
        return made[precision]

    return build


@pytest.mark.usefixtures("_every_second")
@pytest.mark.parametrize(
    ("precision", "stop"), [("fp32", 3), *(("w8a8", stop) for stop in (1, 2, 3, 6))]
)
def test_retraining_that_was_stopped_ends_bit_identical(
    precision: str, stop: int, whole: Callable[[str], Network], tmp_path: Path
) -> None:
    """Resumed in a network of other weights where there is a checkpoint to go on from."""
    path = tmp_path / "t.pt"
    with pytest.raises(KeyboardInterrupt):
        retrained(precision, path, stop=stop)
    assert path.exists() == (stop >= 2)
    told: list[tuple[str, int, int]] = []
    resumed = retrained(precision, path, start_seed=5 if path.exists() else 0, told=told)
    assert_same(resumed, whole(precision))
    assert not resumed.training
    first = stop - stop % 2 + 1
    assert told == [("retraining finalist 1", done, 6) for done in range(first, 7)]


@pytest.mark.usefixtures("_every_second")
def test_stopped_while_its_norms_are_set_it_ends_bit_identical(
    whole: Callable[[str], Network], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Training is over then; what has changed in the network is not in any file."""
    with monkeypatch.context() as context:
        context.setattr(
            hwnas.retrain, "in_order", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            retrained("w8a8", tmp_path / "t.pt")
    assert_same(retrained("w8a8", tmp_path / "t.pt", start_seed=5), whole("w8a8"))


def test_without_a_checkpoint_it_ends_the_same(whole: Callable[[str], Network]) -> None:
    for precision in PRECISIONS:
        assert_same(retrained(precision, None), whole(precision))


def test_two_retrainings_can_differ(whole: Callable[[str], Network], tmp_path: Path) -> None:
    """The comparison can fail: other weights to start from end elsewhere."""
    with pytest.raises(AssertionError):
        assert_same(retrained("w8a8", tmp_path / "t.pt", start_seed=5), whole("w8a8"))


def test_when_checkpoints_are_written_changes_nothing(
    whole: Callable[[str], Network], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hwnas.training, "CHECKPOINT_S", 0)
    assert_same(retrained("w8a8", tmp_path / "t.pt"), whole("w8a8"))


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    """Of the same shapes even: one that is not quantised."""
    path = tmp_path / "t.pt"
    retrained("fp32", path)
    before = path.read_bytes()
    with pytest.raises(InvalidInput) as caught:
        retrained("w8a8", path)
    assert caught.value.what.startswith(f"{path} holds the weights of something else (the network ")
    assert caught.value.accepted.startswith("a checkpoint of the network ")
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.pt"
    retrained("w8a8", path)
    whole = path.read_bytes()
    for share in (0.0, 0.5, 0.99):
        path.write_bytes(whole[: int(share * len(whole))])
        with pytest.raises(InvalidInput) as caught:
            retrained("w8a8", path)
        assert caught.value.what.startswith(f"{path} is not a whole checkpoint (")
        assert "remove it" in caught.value.next_step


# ---- norms


def norm_inputs(network: Network, batches: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What each norm sees when every norm uses its batch."""
    seen: dict[str, list[Tensor]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _module, given, name=name: seen.setdefault(name, []).append(given[0].detach())
        )
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    network.train()
    with torch.no_grad():
        for batch in batches:
            network(batch)
    for hook in hooks:
        hook.remove()
    network.eval()
    return seen


@pytest.mark.parametrize("precision", PRECISIONS)
def test_recalibrating_on_one_big_batch_gives_that_batchs_statistics(precision: str) -> None:
    data = tiny()
    network = extracted(precision, data)
    recalibrate(network, data, images=48, batch=48)
    (x, _), *rest = in_order(data.train, 48)
    assert not rest
    norms = dict(network.named_modules())
    running = {
        name: (module.running_mean.clone(), module.running_var.clone())
        for name, module in norms.items()
        if isinstance(module, nn.BatchNorm2d)
    }
    seen = norm_inputs(network, [x])
    assert seen.keys() == running.keys()
    for name, (value,) in seen.items():
        torch.testing.assert_close(running[name][0], value.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(running[name][1], value.var((0, 2, 3)), rtol=1e-4, atol=1e-5)


def test_recalibrating_on_several_batches_is_the_mean_of_their_statistics() -> None:
    data = tiny()
    network = extracted("w8a8", data)
    recalibrate(network, data, images=32, batch=8)
    running = {
        name: module.running_mean.clone()
        for name, module in network.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    batches = [x for x, _ in in_order(data.train.first(32), 8)]
    assert len(batches) == 4
    for name, values in norm_inputs(network, batches).items():
        mean = torch.stack([value.mean((0, 2, 3)) for value in values]).mean(0)
        torch.testing.assert_close(running[name], mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [*PRECISIONS, "fp8"])
def test_recalibrating_moves_no_parameter_and_does_not_depend_on_what_was_there(
    precision: str,
) -> None:
    data = tiny()
    left, right = extracted(precision, data), extracted(precision, data)
    parameters = [p.detach().clone() for p in left.parameters()]
    for module in right.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.fill_(7.0)
            module.running_var.fill_(9.0)
        elif isinstance(module, Fp8Cast):
            module.limit = 9.0
    recalibrate(left, data)
    recalibrate(right, data)
    assert all(torch.equal(p, q) for p, q in zip(left.parameters(), parameters, strict=True))
    state = right.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in left.state_dict().items())
    assert not left.training


def test_every_image_of_train_has_the_same_weight_in_the_recalibrated_mean(data: Splits) -> None:
    """900 images are seven batches of 128; the four left over would weigh as much as a batch."""
    network = extracted("fp32", data)
    recalibrate(network, data)
    stem = next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    found = stem.running_mean.clone()
    seen = norm_inputs(network, [torch.cat([x for x, _ in in_order(data.train.first(896), 128)])])
    expected = next(iter(seen.values()))[0].mean((0, 2, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


# ---- ranges of fp8


def test_fp8_ranges_are_the_largest_values_on_the_recalibration_images() -> None:
    """In inference mode, counted by hooks of the test's own; batch norms are set before."""
    data = tiny()
    network = extracted("fp8", data)
    casts = {n: m for n, m in network.named_modules() if isinstance(m, Fp8Cast)}
    assert {cast.limit for cast in casts.values()} == {None}
    seen: dict[str, list[float]] = {name: [] for name in casts}
    images: dict[str, int] = dict.fromkeys(casts, 0)

    def record(name: str, cast: Fp8Cast, given: tuple[Tensor]) -> None:
        if not cast.training:
            seen[name].append(float(given[0].abs().max()))
            images[name] += len(given[0])

    for name, cast in casts.items():
        cast.register_forward_pre_hook(partial(record, name))
    recalibrate(network, data, images=32, batch=8)
    assert set(images.values()) == {32}
    assert {name: cast.limit for name, cast in casts.items()} == {
        n: max(x) for n, x in seen.items()
    }


def test_fp8_ranges_of_one_batch_are_those_that_it_is_cast_by() -> None:
    """So the network answers that batch as it does without ranges, to the last bit."""
    data = tiny()
    network = extracted("fp8", data)
    recalibrate(network, data, images=48, batch=48)
    ((x, _),) = in_order(data.train.first(48), 48)
    with torch.no_grad():
        ranged = network(x)
        for module in network.modules():
            if isinstance(module, Fp8Cast):
                assert module.limit is not None
                module.limit = None
        assert torch.equal(network(x), ranged)


def test_retraining_in_fp8_sets_ranges_that_go_with_the_weights(tmp_path: Path) -> None:
    data = tiny()
    network, other = extracted("fp8", data), extracted("fp8", data)
    recipe = TrainingRecipe(steps=3, batch=8, learning_rate=0.01)
    retrain(network, data, recipe, seed=0, progress=quiet)
    limits = [each.limits for each in network.parameters_for_graph()]
    assert all(limits)
    save_weights(network, tmp_path / "weights.pt")
    load_weights(other, tmp_path / "weights.pt")
    assert [each.limits for each in other.parameters_for_graph()] == limits
    (x, _), *_ = in_order(data.train, 16)
    with torch.no_grad():
        assert torch.equal(network(x), other(x))


# ---- accuracy and files


def test_accuracy_is_a_hand_count_over_search_val(trained: Network, data: Splits) -> None:
    """One image at a time; sums in another order may turn one answer that is near a tie."""
    val = data.search_val.first(60)
    some = Splits("some", data.train, val, val)
    with torch.no_grad():
        answers = [int(trained(x).argmax()) for x, _ in in_order(val, 1)]
    right = sum(answer == kind for answer, kind in zip(answers, val.y.tolist(), strict=True))
    assert 30 < right < 60
    for batch in (256, 37):
        assert accuracy(trained, some, batch=batch) == pytest.approx(right / 60, abs=1.01 / 60)


def test_saved_weights_come_back_exactly(trained: Network, data: Splits, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "weights.pt"
    save_weights(trained, path)
    torch.manual_seed(123)
    other = Network(trained.ops)
    x, _ = next(in_order(data.search_val, 64))
    with torch.no_grad():
        assert not torch.equal(other.eval()(x), trained(x))
    load_weights(other, path)
    assert not other.training
    mine, theirs = trained.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    with torch.no_grad():
        assert torch.equal(other(x), trained(x))
    assert [p.name for p in path.parent.iterdir()] == ["weights.pt"]


def test_a_graph_of_restored_weights_is_that_of_the_trained_network(
    trained: Network, tmp_path: Path
) -> None:
    save_weights(trained, tmp_path / "weights.pt")
    other = Network(trained.ops)
    load_weights(other, tmp_path / "weights.pt")
    for mine, theirs in zip(
        trained.parameters_for_graph(), other.parameters_for_graph(), strict=True
    ):
        assert mine.limits == theirs.limits
        for index, weights in mine.weights.items():
            for left, right in zip(
                vars(weights).values(), vars(theirs.weights[index]).values(), strict=True
            ):
                np.testing.assert_array_equal(left, right)


@pytest.mark.parametrize("content", [b"", b"not weights", b"PK\x03\x04"])
def test_a_file_that_holds_no_weights_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="is not a whole checkpoint"):
        load_weights(extracted("fp32", tiny()), path)


def test_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    save_weights(extracted("fp32", tiny()), tmp_path / "weights.pt")
    with pytest.raises(InvalidInput, match="is not a whole checkpoint"):
        load_weights(Network(space_of("w8a8").lower(next(space_of("w8a8").enumerate()))),
                     tmp_path / "weights.pt")  # fmt: skip
