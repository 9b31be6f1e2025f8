"""Training shared weights: what a step touches, exact resuming, files that are not ours."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from hwnas.batches import step_batch
from hwnas.costs.samplers import Opening, UniformSampler
from hwnas.data import Images, Splits
from hwnas.recipes import SupernetRecipe
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.floats import space_in_float
from hwnas.spaces.mobile import Stage, mobile
from hwnas.supernet.evaluator import Evaluator
from hwnas.supernet.network import Supernet
from hwnas.supernet.trainer import in_float, load_supernet, train_supernet
from hwnas.training import loss, optimiser_of
from quant.errors import InvalidInput


def small_space(name: str = "small", kernels: tuple[int, ...] = (3, 5)) -> SearchSpace:
    return mobile(
        name,
        (Stage(1, 1, (6, 8), squeeze=4), Stage(2, 2, (8, 12))),
        classes=3,
        size=8,
        image_channels=1,
        stem_channels=8,
        stem_stride=1,
        head_channels=16,
        kernels=kernels,
        expansions=(2,),
    )


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


def fresh(space: SearchSpace, seed: int = 0) -> Supernet:
    torch.manual_seed(seed)
    return Supernet(space)


def snapshot(supernet: Supernet) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in supernet.named_parameters()}


def used_by(space: SearchSpace, architecture: Architecture) -> set[str]:
    """The parameters of a path, from the ops alone (not from the supernet's own naming code)."""
    names = set()
    for placed in space.walk(architecture):
        where = f"{placed.position}/{placed.group}"
        for layer in placed.op.layers:
            if layer.has_weights:
                kinds = ("weight", "bias", "gamma") if layer.norm else ("weight", "bias")
                names |= {f"layers.{where}/{layer.role}.{kind}" for kind in kinds}
        for index, quantiser in placed.op.quantisers.items():
            sign = "signed" if quantiser.signed else "unsigned"
            names.add(f"ranges.{where}/value{index}/{quantiser.bits} bits {sign}.limit")
    return names


class Scripted:
    """Uniform paths, but for the last step."""

    def __init__(self, space: SearchSpace, last: Architecture, from_progress: float) -> None:
        self.uniform = UniformSampler(space)
        self.last = last
        self.from_progress = from_progress

    def sample(self, rng: np.random.Generator, progress: float) -> Architecture:
        return self.last if progress >= self.from_progress else self.uniform.sample(rng, progress)


def quiet(label: str, done: int, steps: int) -> None:
    """Progress to nobody."""


def stopped_after(step: int) -> Callable[[str, int, int], None]:
    def progress(label: str, done: int, steps: int) -> None:
        if done == step:
            raise KeyboardInterrupt

    return progress


# ---- what a step touches


@pytest.mark.parametrize(
    "last",
    [
        {"block0.block": "k5e2", "block0.precision": "w8a8", "block0.width": "8"},
        {"block0.block": "k3e2", "block0.width": "6", "head.precision": "w8a8"},
        {"block0.block": "skip", "block2.block": "skip"},
    ],
)
def test_a_step_changes_what_its_path_uses_and_nothing_else(
    last: dict[str, str], tmp_path: Path
) -> None:
    """The steps before it leave momentum on nearly everything, so a zero gradient would show."""
    space = small_space()
    default = {gene.name: gene.choices[0] for gene in space.genes}
    architecture = space.parse({**default, **last})
    supernet = fresh(space)
    recipe = SupernetRecipe(steps=10, batch=8, learning_rate=0.02, weight_decay=0.1)
    before: dict[str, Tensor] = {}

    def progress(label: str, done: int, steps: int) -> None:
        if done == steps - 1:
            before.update(snapshot(supernet))

    sampler = Scripted(space, architecture, 0.9)
    train_supernet(
        supernet, stripes(), sampler, recipe, seed=0, checkpoint=tmp_path / "s.pt",
        progress=progress,
    )  # fmt: skip
    used = used_by(space, architecture)
    assert used < before.keys()
    for name, value in supernet.named_parameters():
        if name in used:
            assert not torch.equal(value, before[name]), f"{name} was on the path"
        else:
            assert torch.equal(value, before[name]), f"{name} was not on the path"


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_of_zero_would_move_what_is_not_on_the_path(set_to_none: bool) -> None:
    """The negative control: with zeros in place of no gradients the test above fails."""
    space = small_space()
    supernet = fresh(space)
    batch, classes = step_batch(stripes().train, 8, seed=0, step=0)
    supernet.initialise_ranges(batch)
    recipe = SupernetRecipe(steps=4, batch=8, learning_rate=0.02)
    optimiser = optimiser_of(supernet, recipe)
    genes = {gene.name: gene.choices[0] for gene in space.genes}
    first = space.parse({**genes, "block0.block": "k5e2", "block0.precision": "w8a8"})
    second = space.parse({**genes, "block0.block": "k3e2"})
    for architecture in (first, second):
        before = snapshot(supernet)
        optimiser.zero_grad(set_to_none=set_to_none)
        loss(supernet(batch, architecture), classes, recipe).backward()
        optimiser.step()
    moved = {n for n, p in supernet.named_parameters() if not torch.equal(p, before[n])}
    left_alone = used_by(space, first) - used_by(space, second)
    assert {name.partition("/")[0] for name in left_alone} == {"layers.block0", "ranges.block0"}
    assert bool(moved & left_alone) != set_to_none


def test_a_path_gets_the_same_gradient_as_its_extracted_network_in_float() -> None:
    space = small_space()
    supernet = fresh(space)
    batch, classes = step_batch(stripes().train, 16, seed=0, step=0)
    supernet.initialise_ranges(batch)
    genes = {gene.name: gene.choices[0] for gene in space.genes}
    architecture = space.parse({**genes, "block0.width": "6"})
    recipe = SupernetRecipe(steps=1, batch=16, learning_rate=0.1)
    loss(supernet(batch, architecture), classes, recipe).backward()
    network = supernet.extract(architecture, supernet.recalibrate(architecture, [batch]))
    network.train()
    loss(network(batch), classes, recipe).backward()
    mine = [p.grad for p in supernet.parameters() if p.grad is not None]
    theirs = [p.grad for p in network.parameters()]
    assert sum(float((g**2).sum()) for g in mine) == pytest.approx(
        sum(float((g**2).sum()) for g in theirs if g is not None), rel=1e-4
    )


def test_training_makes_the_shared_weights_better(tmp_path: Path) -> None:
    space, splits = small_space(), stripes()
    accuracies = []
    for steps in (1, 60):
        supernet = fresh(space)
        recipe = SupernetRecipe(steps=steps, batch=16, learning_rate=0.02)
        checkpoint = tmp_path / f"{steps}.pt"
        train_supernet(
            supernet, splits, UniformSampler(space), recipe, seed=0, checkpoint=checkpoint,
            progress=quiet,
        )  # fmt: skip
        score = Evaluator(supernet, splits, recalibration_images=96, validation_images=48, batch=48)
        rng = np.random.default_rng(1)
        some = [UniformSampler(space).sample(rng) for _ in range(8)]
        accuracies.append(np.mean([score(a).accuracy for a in some]))
    assert accuracies[0] < 0.75
    assert accuracies[1] > 0.9


# ---- float, then quantised


def float_and_quantised() -> tuple[SearchSpace, SearchSpace]:
    """A space without a float precision, and the same with no other."""
    return tuple(
        mobile(
            "small", (Stage(1, 1, (6, 8), squeeze=4), Stage(2, 2, (8, 12))), classes=3, size=8,
            image_channels=1, stem_channels=8, head_channels=16, kernels=(3, 5), expansions=(2,),
            precisions=precisions, stem_precisions=precisions[:1],
        )
        for precisions in (("fp32",), ("w4a4", "w8a8"))
    )  # type: ignore[return-value]  # fmt: skip


def test_a_supernet_in_float_is_that_of_the_float_space_with_the_same_weights() -> None:
    plain, quantised = float_and_quantised()
    assert space_in_float(quantised).count == plain.count
    expected, supernet = fresh(plain), fresh(quantised)
    supernet.layers.load_state_dict(expected.layers.state_dict())
    twin = in_float(supernet)
    batch, _ = step_batch(stripes().train, 8, seed=0, step=0)
    rng, sampler = np.random.default_rng(0), UniformSampler(quantised)
    supernet.initialise_ranges(batch)
    for _ in range(10):
        path = sampler.sample(rng)
        told = {k: v for k, v in quantised.describe(path).items() if "precision" not in k}
        logits = twin(batch, twin.space.architecture(path.genes))
        assert torch.equal(logits, expected(batch, plain.parse(told)))
        assert not torch.equal(logits, supernet(batch, path))


def test_a_supernet_in_float_trains_the_very_weights() -> None:
    _, quantised = float_and_quantised()
    supernet = fresh(quantised)
    batch, _ = step_batch(stripes().train, 8, seed=0, step=0)
    path = quantised.architecture([0] * len(quantised.genes))
    in_float(supernet)(batch, path).sum().backward()
    moved = {name for name, p in supernet.named_parameters() if p.grad is not None}
    assert moved == {name for name in used_by(quantised, path) if name.startswith("layers.")}


def test_ranges_are_set_by_the_first_quantised_step(tmp_path: Path) -> None:
    """From its batch and the weights that the float steps left, on a supernet trained so far."""
    _, space = float_and_quantised()
    recipe = SupernetRecipe(steps=10, batch=8, learning_rate=0.02, float_share=0.5)
    supernet = fresh(space)
    known: dict[int, dict[str, Tensor]] = {}

    def progress(label: str, done: int, steps: int) -> None:
        known[done] = snapshot(supernet)

    train_supernet(
        supernet, stripes(), UniformSampler(space), recipe, seed=0, checkpoint=tmp_path / "s.pt",
        progress=progress,
    )  # fmt: skip
    limits = [name for name in known[1] if name.startswith("ranges.")]
    weights = known[1].keys() - limits
    assert any(not torch.equal(known[5][name], known[1][name]) for name in weights)
    for done in range(1, 6):
        assert all(torch.isnan(known[done][name]) for name in limits)
    expected = fresh(space)
    expected.load_state_dict(known[5])
    expected.initialise_ranges(step_batch(stripes().train, 8, seed=0, step=5)[0])
    same = [torch.equal(dict(expected.named_parameters())[n], known[6][n]) for n in limits]
    assert sum(same) > len(limits) / 2, "the step itself moved those of its path"
    assert not any(torch.isnan(known[6][name]) for name in limits)


def test_without_a_float_share_every_step_is_quantised(tmp_path: Path) -> None:
    _, space = float_and_quantised()
    recipe = SupernetRecipe(steps=1, batch=8, learning_rate=0.02, float_share=0.0)
    supernet = fresh(space)
    train_supernet(
        supernet, stripes(), UniformSampler(space), recipe, seed=0, checkpoint=tmp_path / "s.pt",
        progress=quiet,
    )  # fmt: skip
    assert not any(torch.isnan(p).any() for p in supernet.parameters())


# ---- resuming


def trained(
    space: SearchSpace,
    checkpoint: Path,
    *,
    stop: int | None = None,
    every: int = 1,
    seed: int = 0,
    start_seed: int = 0,
) -> Supernet:
    supernet = fresh(space, start_seed)
    recipe = SupernetRecipe(steps=6, batch=8, learning_rate=0.02)
    train_supernet(
        supernet, stripes(), UniformSampler(space, {"width": Opening(-1, 0.3, 0.6)}), recipe,
        seed=seed, checkpoint=checkpoint, checkpoint_every=every,
        progress=quiet if stop is None else stopped_after(stop),
    )  # fmt: skip
    return supernet


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """The weights after training without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    expected = snapshot(trained(small_space(), folder / "whole.pt"))
    other = trained(small_space(), folder / "other.pt", seed=1)  # the comparison can fail
    assert any(not torch.equal(v, expected[n]) for n, v in other.named_parameters())
    return expected


@pytest.mark.parametrize(("stop", "every"), [(1, 1), (2, 1), (3, 1), (5, 3), (1, 2), (6, 4)])
def test_interrupted_training_goes_on_to_bit_identical_weights(
    stop: int, every: int, whole: dict[str, Tensor], tmp_path: Path
) -> None:
    """Resumed in another supernet; from other starting weights where a checkpoint was written.

    Stopped after the last step there is a checkpoint too, whatever `every` says.
    """
    space = small_space()
    with pytest.raises(KeyboardInterrupt):
        trained(space, tmp_path / "parts.pt", stop=stop, every=every)
    saved = load_supernet(fresh(space), tmp_path / "parts.pt")
    assert saved == (6 if stop == 6 else stop // every * every)
    resumed = trained(space, tmp_path / "parts.pt", start_seed=7 if saved else 0)
    for name, value in resumed.named_parameters():
        assert torch.equal(value, whole[name]), name


def test_finished_training_is_not_repeated(tmp_path: Path) -> None:
    space = small_space()
    first = trained(space, tmp_path / "s.pt")
    again = trained(space, tmp_path / "s.pt", stop=1, start_seed=5)  # would raise at step 1
    assert all(torch.equal(v, snapshot(first)[n]) for n, v in again.named_parameters())


def test_progress_is_told_once_a_step_and_the_checkpoint_is_the_only_file(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    space = small_space()
    recipe = SupernetRecipe(steps=5, batch=8, learning_rate=0.02)
    train_supernet(
        fresh(space), stripes(), UniformSampler(space), recipe, seed=0,
        checkpoint=tmp_path / "s.pt", checkpoint_every=2,
        progress=lambda _, done, steps: told.append((done, steps)),
    )  # fmt: skip
    assert told == [(step, 5) for step in range(1, 6)]
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


def test_loading_gives_the_trained_weights_and_the_steps_they_took(tmp_path: Path) -> None:
    space = small_space()
    assert load_supernet(fresh(space), tmp_path / "s.pt") == 0
    supernet = trained(space, tmp_path / "s.pt")
    other = fresh(space, 3)
    assert load_supernet(other, tmp_path / "s.pt") == 6
    assert all(torch.equal(v, snapshot(supernet)[n]) for n, v in other.named_parameters())
    assert not other.training


# ---- files that are not ours


def assert_refused(space: SearchSpace, checkpoint: Path, words: str) -> None:
    """Both readers refuse it with one sentence that names the file, and leave it as it is."""
    content = checkpoint.read_bytes()
    readers: list[Callable[[], object]] = [
        lambda: load_supernet(fresh(space), checkpoint),
        lambda: trained(space, checkpoint),
    ]
    for read in readers:
        with pytest.raises(InvalidInput, match=words) as caught:
            read()
        assert str(checkpoint) in caught.value.what
        assert caught.value.what.endswith(".")
        assert "\n" not in str(caught.value)
        assert caught.value.next_step
    assert checkpoint.read_bytes() == content


def test_a_checkpoint_of_another_space_is_refused(tmp_path: Path) -> None:
    trained(small_space(kernels=(3, 7)), tmp_path / "s.pt")
    assert_refused(small_space(), tmp_path / "s.pt", "holds the weights of something else")


def test_a_checkpoint_of_a_space_of_another_name_is_refused(tmp_path: Path) -> None:
    """Every tensor would fit: what tells them apart is the identity alone."""
    trained(small_space("other"), tmp_path / "s.pt")
    assert_refused(small_space(), tmp_path / "s.pt", "the space other")


def test_a_checkpoint_that_does_not_say_what_it_is_of_is_refused(tmp_path: Path) -> None:
    space, path = small_space(), tmp_path / "s.pt"
    trained(space, path)
    state = torch.load(path, weights_only=True)
    del state["identity"]
    torch.save(state, path)
    assert_refused(space, path, "not a whole checkpoint")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_a_truncated_checkpoint_is_refused(share: float, tmp_path: Path) -> None:
    space, path = small_space(), tmp_path / "s.pt"
    trained(space, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    assert_refused(space, path, "not a whole checkpoint")


@pytest.mark.parametrize(
    "content", [{"some": torch.zeros(2)}, [1, 2], torch.zeros(3)], ids=["dict", "list", "tensor"]
)
def test_a_foreign_torch_file_is_refused(content: object, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "s.pt")
    assert_refused(small_space(), tmp_path / "s.pt", "not a whole checkpoint")


def test_a_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.pt").write_text("supernet\n")
    assert_refused(small_space(), tmp_path / "s.pt", "not a whole checkpoint")


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    space = small_space()
    trained(space, tmp_path / "whole.pt")
    assert torch.load(tmp_path / "whole.pt", weights_only=True)["identity"] == _identity(space)
    torch.save({"identity": _identity(space), "step": 3}, tmp_path / "s.pt")
    assert_refused(space, tmp_path / "s.pt", "not a whole checkpoint")


def _identity(space: SearchSpace) -> str:
    return f"the space {space.name} {space.fingerprint}"


class Payload:
    """What a pickle could run on loading."""

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (Path("pwned"),)


def test_a_checkpoint_that_would_run_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    space = small_space()
    torch.save({"identity": _identity(space), "step": Payload()}, tmp_path / "s.pt")
    assert_refused(space, tmp_path / "s.pt", "not a whole checkpoint")
    assert not (tmp_path / "pwned").exists()
