"""Training on a device apart. Without one: that no step waits for it, and what bf16 leaves alone.
With one: the CPU's own results as the oracle.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hwnas.batches import PlacedImages, TrainingBatches, step_batch
from hwnas.costs.samplers import UniformSampler
from hwnas.data import Images, Splits
from hwnas.placement import HOST, Placement
from hwnas.recipes import RetrainRecipe, SupernetRecipe, TrainingRecipe
from hwnas.retrain import accuracy, in_float, recalibrate, retrain, teacher_of
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from hwnas.spaces.resnet import Stage as ResnetStage
from hwnas.spaces.resnet import resnet
from hwnas.spaces.shufflenet import Stage as ShuffleStage
from hwnas.spaces.shufflenet import shufflenet
from hwnas.supernet.evaluator import Evaluator
from hwnas.supernet.network import Supernet
from hwnas.supernet.trainer import train_supernet
from hwnas.training import Checkpoint, Teacher, Training, loss, train_steps
from profilers.modules import Network
from quant.kernels import SWITCH
from quant.layers import ActivationQuantiser, PactQuantiser

PRECISIONS = ("fp32", "fp16", "bf16", "fp8", "w8a8", "w4a4", "pact-w2a2")
RECIPE = TrainingRecipe(steps=6, batch=8, learning_rate=0.02, flip=True, clip_norm=0.5)
SPACES = {
    "mobile": mobile(
        "mobile", (Stage(1, 1, (6, 8), squeeze=4), Stage(2, 2, (8, 12), activation="hard_swish")),
        classes=3, size=8, image_channels=1, stem_channels=8, stem_stride=1, head_channels=16,
        kernels=(3, 5), expansions=(1, 2), precisions=PRECISIONS, stem_precisions=PRECISIONS,
    ),
    "shuffle": shufflenet(
        "shuffle", (ShuffleStage(2, 16), ShuffleStage(1, 24, 1)), classes=3, size=8,
        image_channels=1, stem_channels=8, stem_stride=1, head_channels=16,
        multipliers=(0.5, 1.0), precisions=("fp32", "w8a8"), stem_precisions=("fp32", "w8a8"),
    ),
    "resnet": resnet(
        "resnet", (ResnetStage(2, 8, 1), ResnetStage(1, 16)), classes=3, size=8, image_channels=1,
        stem_channels=8, multipliers=(0.5, 1.0), multiple=4, precisions=("fp32", "w8a8", "w2a4"),
    ),
}  # fmt: skip


def quiet(_label: str, _done: int, _total: int) -> None:
    """Progress to nobody."""


def stripes() -> Splits:
    """Images that one can tell apart: class c has a bright band in its own third."""
    rng = np.random.default_rng(0)

    def split(count: int) -> Images:
        y = np.arange(count) % 3
        x = rng.integers(0, 60, (count, 8, 8, 1))
        for image, kind in zip(x, y, strict=True):
            image[3 * kind : 3 * kind + 2] += 150
        return Images(x.astype(np.uint8), y.astype(np.int64))

    return Splits("stripes", split(96), split(48), split(48))


class Made(NamedTuple):
    """A supernet with its ranges set, paths of it, and the same paths as networks of their own."""

    supernet: Supernet
    paths: list[Architecture]
    networks: list[Network]


def made(space: SearchSpace, where: Placement = HOST, paths: int = 12) -> Made:
    torch.manual_seed(0)
    supernet = Supernet(space)
    where.move(supernet)
    batch, _ = TrainingBatches(PlacedImages(stripes().train, where), 32, seed=1).at(0)
    supernet.initialise_ranges(batch)
    rng = np.random.default_rng(2)
    chosen = [UniformSampler(space).sample(rng) for _ in range(paths)]
    alone = [supernet.extract(path, supernet.recalibrate(path, [batch])) for path in chosen]
    return Made(supernet, chosen, alone)


# ---- nothing waits: on a device without values, whatever would read one raises


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device apart that holds no values. It knows no autocast and no fused optimiser."""

    def send(self: Placement, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.array(array)).to(self.device)

    monkeypatch.setenv(SWITCH, "0")
    monkeypatch.setattr(Placement, "put", send)
    monkeypatch.setattr(Placement, "send", send)
    monkeypatch.setattr(Placement, "holds", lambda *_: True)
    monkeypatch.setattr(Placement, "training", lambda _: nullcontext())
    monkeypatch.setattr(Placement, "optimiser_options", {"foreach": True})


def to_nowhere(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    module.to("meta")
    assert all(p.device.type == "meta" for p in module.parameters())


def steps_of(
    module: nn.Module, logits: Callable[[int, Tensor], Tensor], teacher: Teacher | None = None
) -> None:
    train_steps(
        module, stripes().train, RECIPE, logits, None, seed=0, progress=quiet, label="training",
        teacher=teacher,
    )  # fmt: skip


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("name", list(SPACES))
def test_no_step_of_a_supernet_or_a_network_waits_for_its_device(name: str) -> None:
    supernet, paths, networks = made(SPACES[name])
    seen = {op.precision.name for path in paths for op in supernet.space.lower(path)}
    assert len(seen) > 1
    to_nowhere(supernet)
    for start in range(0, len(paths), RECIPE.steps):
        steps_of(supernet, lambda step, x, start=start: supernet(x, paths[start + step]))
    for network in networks[:4]:
        to_nowhere(network)
        steps_of(network, lambda _, x, network=network: network(x))


@pytest.mark.usefixtures("nowhere")
def test_no_step_with_a_teacher_waits_after_its_norms_were_recalibrated() -> None:
    network = made(SPACES["mobile"], paths=1).networks[0]
    teacher = in_float(network, stripes(), recalibration_images=32)
    for module in (network, teacher):
        to_nowhere(module)
    steps_of(teacher, lambda _, x: teacher(x))
    recipe = RetrainRecipe(steps=6, batch=8, learning_rate=0.02, teacher="float")
    steps_of(network, lambda _, x: network(x), teacher_of(teacher, recipe))


WAITS: dict[str, Callable[[Tensor], Tensor]] = {
    "item": lambda x: x * x.sum().item(),
    "bool": lambda x: x if x.sum() > 0 else -x,
    "copy": lambda x: x * x.cpu().sum().to(x.device),
    "mask": lambda x: x * x[x > 0].sum(),
    "list": lambda x: x * sum(x[0].tolist()),
}


@pytest.mark.usefixtures("nowhere")
@pytest.mark.parametrize("wait", list(WAITS))
def test_a_step_that_waits_is_found(wait: str) -> None:
    """The negative control: what waits on a real device raises on one without values."""
    supernet, paths, _ = made(SPACES["mobile"], paths=1)
    to_nowhere(supernet)
    with pytest.raises((RuntimeError, NotImplementedError)):
        steps_of(supernet, lambda _, x: WAITS[wait](supernet(x, paths[0])))


def test_an_evaluation_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a value on the host is counted: three batches, one read of each figure."""
    supernet, paths, _ = made(SPACES["mobile"], paths=1)
    score = Evaluator(supernet, stripes(), recalibration_images=32, validation_images=48, batch=16)
    waits: list[str] = []
    for name in ("item", "tolist", "__int__", "__float__", "__bool__", "cpu"):
        true = getattr(Tensor, name)

        def counted(self: Tensor, *rest: Any, name: str = name, true: Any = true) -> Any:
            waits.append(name)
            return true(self, *rest)

        monkeypatch.setattr(Tensor, name, counted)
    found = score(paths[0])
    assert waits == ["tolist", "tolist"]
    assert 0 <= found.accuracy <= 1
    assert found.loss > 0


# ---- bf16, on a CPU


@contextmanager
def in_bf16(_: Placement) -> Iterator[None]:
    with torch.autocast("cpu", torch.bfloat16):
        yield


def gradients(module: nn.Module, answer: Callable[[], Tensor], classes: Tensor) -> Tensor:
    module.zero_grad(set_to_none=True)
    loss(answer(), classes, RECIPE).backward()
    held = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
    return torch.cat(held)


@pytest.mark.parametrize("name", list(SPACES))
def test_gradients_in_bf16_are_finite_and_near_those_in_fp32(name: str) -> None:
    """Of supernet and network alike: the two point the same way, as far as codes of two bits let
    them; of float networks, nearly to the end.
    """
    supernet, paths, networks = made(SPACES[name])
    batch, classes = step_batch(stripes().train, 32, seed=0, step=0)
    for path, network in zip(paths, networks, strict=True):
        network.train()
        precisions = {op.precision.name for op in supernet.space.lower(path)}
        least = 0.99 if precisions <= {"fp32", "fp16", "bf16"} else 0.8
        for module, answer in (
            (supernet, lambda path=path: supernet(batch, path)),
            (network, lambda network=network: network(batch)),
        ):
            exact = gradients(module, answer, classes)
            with torch.autocast("cpu", torch.bfloat16):
                answers = answer()
                assert answers.dtype == torch.bfloat16
                near = gradients(module, lambda answers=answers: answers, classes)
            assert near.isfinite().all()
            assert not torch.equal(near, exact), "bf16 took part"
            assert torch.cosine_similarity(near, exact, 0) > least, precisions


def test_every_quantiser_of_a_step_in_bf16_gives_the_codes_of_fp32() -> None:
    """What it gets in bf16, put through the same quantiser in fp32 and handed on in bf16, is the
    same: so codes are. Up to seven bits they can be read back from it, too.
    """
    _, _, networks = made(SPACES["mobile"])
    batch, _ = step_batch(stripes().train, 32, seed=0, step=0)
    checked = 0

    def check(module: Any, inputs: tuple[Tensor], options: dict[str, Any], found: Tensor) -> None:
        nonlocal checked
        if inputs[0].dtype != torch.bfloat16:
            return
        checked += 1
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            exact = type(module).forward(module, inputs[0].float(), **options)
        assert torch.equal(found, exact.bfloat16())
        if module.grid.high <= 127:
            scale = module.limit / module.grid.top
            assert torch.equal((found.float() / scale).round(), (exact / scale).round())

    for network in networks:
        for module in network.modules():
            if isinstance(module, ActivationQuantiser | PactQuantiser):
                module.register_forward_hook(check, with_kwargs=True)
        network.train()
        with torch.autocast("cpu", torch.bfloat16):
            network(batch)
    assert checked > 20


def test_ranges_statistics_and_scores_do_not_hang_on_autocast() -> None:
    """Taken inside of a step in bf16 they are those of fp32, to the last bit."""
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            supernet, paths, networks = made(SPACES["mobile"], paths=3)
            score = Evaluator(supernet, stripes(), recalibration_images=32, validation_images=48)
            for network in networks:
                recalibrate(network, stripes(), images=32)
            found.append(
                (
                    {name: range_.clone() for name, range_ in supernet.ranges.named_parameters()},
                    [score(path) for path in paths],
                    [n.state_dict() for n in networks],
                    [accuracy(network, stripes()) for network in networks],
                )
            )
    (ranges, scores, states, shares), (again, again_scores, again_states, again_shares) = found
    torch.testing.assert_close(again, ranges, rtol=0, atol=0, equal_nan=True)
    assert again_scores == scores
    torch.testing.assert_close(again_states, states, rtol=0, atol=0)
    assert again_shares == shares


def test_training_in_bf16_lowers_the_loss_and_scores_in_fp32(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Placement, "training", in_bf16)
    supernet, first, last = learned(HOST, tmp_path)
    assert last < 0.7 * first
    assert all(p.dtype == torch.float32 for p in supernet.parameters())


def learned(where: Placement, folder: Path) -> tuple[Supernet, float, float]:
    """A supernet trained for a while, and the mean loss of some paths before and after."""
    space, splits, losses = SPACES["shuffle"], stripes(), []
    for steps in (1, 60):
        torch.manual_seed(0)
        supernet = Supernet(space)
        where.move(supernet)
        recipe = SupernetRecipe(steps=steps, batch=16, learning_rate=0.02)
        train_supernet(
            supernet, splits, UniformSampler(space), recipe, seed=0,
            checkpoint=folder / f"{steps}.pt", progress=quiet,
        )  # fmt: skip
        score = Evaluator(supernet, splits, recalibration_images=96, validation_images=48)
        rng = np.random.default_rng(5)
        paths = [UniformSampler(space).sample(rng) for _ in range(5)]
        losses.append(float(np.mean([score(path).loss for path in paths])))
    return supernet, losses[0], losses[1]


# ---- checkpoints


def test_a_checkpoint_holds_host_copies_and_no_option_of_a_device(tmp_path: Path) -> None:
    """Of an optimiser that was fused on its device, a plain one goes on, and the other way round:
    to the weights of one that was never stopped, but for the rounding of fused arithmetic.
    """

    def network() -> nn.Linear:
        torch.manual_seed(0)
        return nn.Linear(64, 3)

    def trained(path: Path, options: list[bool | None], stops: list[int]) -> nn.Linear:
        recipe = TrainingRecipe(steps=8, batch=8, learning_rate=0.02)
        for fused, stop in zip(options, stops, strict=True):
            module = network()
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Placement, "optimiser_options", {"fused": fused})

                def stopped(_l: str, done: int, _t: int, stop: int = stop) -> None:
                    if done == stop:
                        raise KeyboardInterrupt

                try:
                    train_steps(
                        module, stripes().train, recipe,
                        lambda _, x, module=module: module(x.flatten(1)),
                        Checkpoint(path, "linear", 1), seed=3, progress=stopped, label="training",
                    )  # fmt: skip
                except KeyboardInterrupt:
                    continue
        return module

    whole = trained(tmp_path / "whole.pt", [None], [99])
    for number, options in enumerate(([True, None], [None, True], [None, None])):
        found = trained(tmp_path / f"{number}.pt", list(options), [4, 99])
        torch.testing.assert_close(found.weight, whole.weight, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.weight, whole.weight) or True in options
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert {t.device.type for t in state["weights"].values()} == {"cpu"}


# ---- a card


@pytest.fixture
def waiting_is_an_error(cuda: Placement) -> Iterator[None]:
    """What makes the host wait for the card raises, once the test says so."""
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.usefixtures("waiting_is_an_error")
@pytest.mark.parametrize("name", list(SPACES))
def test_no_step_on_a_card_waits_for_it(name: str, cuda: Placement) -> None:
    supernet, paths, networks = made(SPACES[name], cuda)
    images = PlacedImages(stripes().train, cuda)
    batches = TrainingBatches(images, RECIPE.batch, seed=0, flip=True)
    trained = [
        (Training(supernet, RECIPE), lambda step, x: supernet(x, paths[step])),
        (Training(networks[0].train(), RECIPE), lambda _, x: networks[0](x)),
    ]
    batches.at(0)  # puts the images there
    for step in range(6):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first one sets up
        for training, logits in trained:
            training.take(step % 6, logits, *batches.at(step))
    with pytest.raises(RuntimeError, match="synchron"):
        float(next(supernet.parameters()).sum())  # the control


@pytest.mark.gpu
@pytest.mark.parametrize("name", list(SPACES))
def test_on_a_card_an_extracted_network_equals_the_supernet_to_the_last_bit(
    name: str, cuda: Placement
) -> None:
    supernet, paths, _ = made(SPACES[name], cuda)
    placed = PlacedImages(stripes().search_val, cuda)
    batch, _ = placed.part(0, 16)
    for path in paths:
        statistics = supernet.recalibrate(path, [batch])
        network = supernet.extract(path, statistics)
        with cuda.scoring():
            shared, alone = supernet(batch, path, statistics), network(batch)
        assert shared.isfinite().all()
        assert torch.equal(shared, alone), supernet.space.describe(path)


@pytest.mark.gpu
def test_on_a_card_scores_are_those_of_a_cpu_but_for_rounding(
    cuda: Placement, tmp_path: Path
) -> None:
    """Of a trained supernet whose weights are carried over; one image in 48 may be a tie."""
    there, _, _ = learned(cuda, tmp_path)
    here = Supernet(there.space)
    here.load_state_dict(there.state_dict())
    scores = [
        Evaluator(supernet, stripes(), recalibration_images=96, validation_images=48)
        for supernet in (there, here)
    ]
    rng = np.random.default_rng(7)
    for _ in range(5):
        path = UniformSampler(there.space).sample(rng)
        mine, theirs = (score(path) for score in scores)
        assert abs(mine.accuracy - theirs.accuracy) <= 1 / 48
        assert mine.loss == pytest.approx(theirs.loss, rel=0.02)


@pytest.mark.gpu
def test_on_a_card_training_lowers_the_loss(cuda: Placement, tmp_path: Path) -> None:
    supernet, first, last = learned(cuda, tmp_path)
    assert last < 0.7 * first
    assert all(p.device.type == "cuda" for p in supernet.parameters())


@pytest.mark.gpu
def test_on_a_card_a_network_is_retrained_and_recalibrated(cuda: Placement) -> None:
    network = made(SPACES["resnet"], cuda, paths=1).networks[0]
    recipe = TrainingRecipe(steps=80, batch=16, learning_rate=0.02)
    retrain(network, stripes(), recipe, seed=0, progress=quiet)
    there = accuracy(network, stripes())
    assert there > 0.7
    HOST.move(network)
    recalibrate(network, stripes())
    assert abs(accuracy(network, stripes()) - there) <= 1 / 48


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["cpu cuda", "cuda cpu", "cuda cuda"])
def test_what_one_device_began_another_goes_on_with(
    order: str, cuda: Placement, tmp_path: Path
) -> None:
    """A float network without autocast, so that what differs is the order of sums: within 1e-3 of
    the largest weight after ten steps; never stopped on the CPU is the oracle.
    """
    space, recipe = SPACES["resnet"], TrainingRecipe(steps=10, batch=16, learning_rate=0.005)
    ops = space.lower(_in_float(space))

    def trained(path: Path, places: list[Placement], stops: list[int]) -> Network:
        for where, stop in zip(places, stops, strict=True):
            torch.manual_seed(0)
            network = Network(ops)
            where.move(network)

            def stopped(_l: str, done: int, _t: int, stop: int = stop) -> None:
                if done == stop:
                    raise KeyboardInterrupt

            try:
                train_steps(
                    network, stripes().train, recipe, lambda _, x, network=network: network(x),
                    Checkpoint(path, "network", 1), seed=0, progress=stopped, label="training",
                )  # fmt: skip
            except KeyboardInterrupt:
                continue
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Placement, "training", lambda _: nullcontext())
        patch.setattr(torch.backends.cudnn, "allow_tf32", False)
        whole = trained(tmp_path / "whole.pt", [HOST], [99])
        places = [cuda if name == "cuda" else HOST for name in order.split()]
        found = trained(tmp_path / "two.pt", places, [5, 99])
    for mine, theirs in zip(found.parameters(), whole.parameters(), strict=True):
        largest = float(theirs.detach().abs().max())
        torch.testing.assert_close(mine.cpu(), theirs, rtol=0, atol=1e-3 * largest + 1e-4)


def _in_float(space: SearchSpace) -> Architecture:
    """The path whose genes are all the first: fp32 throughout."""
    return space.architecture([0] * len(space.genes))
