"""The training loop: against arithmetic by hand, and against itself after every kind of stop."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hwnas.training
from hwnas.batches import step_batch
from hwnas.data import Images
from hwnas.recipes import SupernetRecipe, TrainingRecipe
from hwnas.training import (
    CHECKPOINT_S,
    CHECKPOINT_STEPS,
    Checkpoint,
    Teacher,
    loss,
    optimiser_of,
    restore,
    set_rate,
    train_steps,
)
from quant.errors import InvalidInput
from quant.precision import Grid
from quant.ranges import LearnedRange

TRAINING = TrainingRecipe(steps=8, batch=4, learning_rate=0.01, weight_decay=0.5)


# ---- the optimiser


class Mixed(nn.Module):
    """One of each kind of parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.linear = nn.Linear(4, 5)
        self.limit = nn.Parameter(torch.tensor(2.0))


def test_the_optimiser_holds_every_parameter_once() -> None:
    torch.manual_seed(0)
    module = Mixed()
    groups = optimiser_of(module, TRAINING).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())


def test_decay_shrinks_weights_alone() -> None:
    """With gradients of zero only decoupled weight decay is left: w (1 - rate * decay)."""
    torch.manual_seed(0)
    module = Mixed()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = optimiser_of(module, TRAINING)
    set_rate(optimiser, TRAINING, 4)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    rate = 0.01 * (1 - 4 / 8)
    for name, parameter in module.named_parameters():
        shrunk = name in ("conv.weight", "linear.weight")
        factor = 1 - rate * 0.5 if shrunk else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_pacts_clipping_values_have_a_decay_of_their_own() -> None:
    grid = Grid(0, 15, 15)
    module = nn.ModuleList(
        [nn.Linear(2, 2), LearnedRange(grid, pact=True, start=2.0), LearnedRange(grid, start=2.0)]
    )
    recipe = TRAINING.model_copy(update={"clipping_decay": 0.25})
    optimiser = optimiser_of(module, recipe)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    assert float(module[1].limit) == pytest.approx(2 * (1 - 0.01 * 0.25))
    assert float(module[2].limit) == 2.0
    held = [id(p) for group in optimiser.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())
    assert len(optimiser_of(Mixed(), recipe).param_groups) == 2


def test_the_rate_falls_on_a_line_from_the_full_rate_to_one_step_above_zero() -> None:
    optimiser = optimiser_of(nn.Linear(2, 2), TRAINING)
    rates = []
    for step in range(TRAINING.steps):
        set_rate(optimiser, TRAINING, step)
        assert len({group["lr"] for group in optimiser.param_groups}) == 1
        rates.append(optimiser.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, np.linspace(0.01, 0.01 / 8, 8))


def test_a_quantised_rate_is_a_second_decay_after_the_float_steps() -> None:
    recipe = SupernetRecipe(
        steps=10, batch=4, learning_rate=0.2, float_share=0.6, quantised_rate=0.1
    )
    optimiser, rates = optimiser_of(nn.Linear(2, 2), recipe), []
    for step in range(10):
        set_rate(optimiser, recipe, step)
        rates.append(optimiser.param_groups[0]["lr"])
    np.testing.assert_allclose(rates[:6], np.linspace(0.2, 0.2 / 6, 6))
    np.testing.assert_allclose(rates[6:], np.linspace(0.02, 0.02 / 4, 4))
    plain = recipe.model_copy(update={"quantised_rate": None})
    np.testing.assert_allclose([plain.rate(step) for step in range(10)], np.linspace(0.2, 0.02, 10))


def test_the_loss_is_the_smoothed_cross_entropy_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    log_shares = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    for smoothing in (0.0, 0.1, 0.4):
        target = np.full((6, 5), smoothing / 5)
        target[np.arange(6), classes] += 1 - smoothing
        recipe = TRAINING.model_copy(update={"label_smoothing": smoothing})
        found = loss(torch.from_numpy(logits), torch.from_numpy(classes), recipe)
        assert float(found) == pytest.approx(-(target * log_shares).sum(1).mean())


# ---- a teacher


@pytest.mark.parametrize(("weight", "temperature"), [(0.0, 1.0), (0.3, 1.0), (0.7, 4.0), (1.0, 2)])
def test_a_teachers_loss_is_hintons_by_hand(weight: float, temperature: float) -> None:
    rng = np.random.default_rng(0)
    mine, theirs = rng.normal(size=(2, 6, 5))
    q, p = (np.exp(x / temperature) / np.exp(x / temperature).sum(1, keepdims=True)
            for x in (mine, theirs))  # fmt: skip
    soft = temperature**2 * (p * np.log(p / q)).sum(1).mean()
    teacher = Teacher(lambda _: torch.from_numpy(theirs), weight, temperature)
    found = teacher.loss(torch.from_numpy(mine), torch.zeros(1), torch.tensor(1.7))
    assert float(found) == pytest.approx((1 - weight) * 1.7 + weight * soft)


def test_the_gradient_of_the_soft_part_keeps_its_share_as_the_temperature_grows() -> None:
    """Hinton et al. 2015, equation 4: (logits - teacher's) / N for zero-mean logits, times T^2."""
    torch.manual_seed(0)
    mine, theirs = (x - x.mean(1, keepdim=True) for x in torch.randn(2, 6, 5, dtype=torch.double))
    mine = mine.requires_grad_()
    Teacher(lambda _: theirs, 1.0, 1000.0).loss(mine, torch.zeros(1), torch.tensor(0.0)).backward()
    assert mine.grad is not None
    torch.testing.assert_close(mine.grad, (mine - theirs).detach() / 5 / 6, rtol=1e-2, atol=1e-5)


# ---- the loop


def images(side: int = 5) -> Images:
    rng = np.random.default_rng(0)
    y = np.arange(24) % 3
    x = rng.integers(0, 80, (24, side, side, 1)) + 80 * y[:, None, None, None]
    return Images(x.astype(np.uint8), y.astype(np.int64))


class Small(nn.Module):
    """Parameters, the buffers of a norm, and a branch that only every other step takes."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv = nn.Conv2d(1, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.even, self.odd = nn.Linear(36, 3), nn.Linear(36, 3)

    def answer(self, step: int, batch: Tensor) -> Tensor:
        hidden = self.norm(self.conv(batch)).relu().flatten(1)
        result: Tensor = (self.odd if step % 2 else self.even)(hidden)
        return result


def quiet(_label: str, _done: int, _total: int) -> None:
    """Progress to nobody."""


def run(
    path: Path,
    module: Small | None = None,
    *,
    steps: int = 7,
    every: int = 2,
    identity: str = "small",
    progress: Callable[[str, int, int], None] = quiet,
    logits: Callable[[int, Tensor], Tensor] | None = None,
    seed: int = 0,
    **changes: Any,
) -> Small:
    module = module or Small()
    recipe = TrainingRecipe(steps=steps, batch=6, learning_rate=0.05, **changes)
    checkpoint = Checkpoint(path, identity, every)
    train_steps(
        module, images(), recipe, logits or module.answer, checkpoint,
        seed=seed, progress=progress, label="training",
    )  # fmt: skip
    return module


def same(left: nn.Module, right: nn.Module) -> bool:
    mine, theirs = left.state_dict(), right.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def adamw_by_hand(module: nn.Linear, recipe: TrainingRecipe, seed: int) -> list[np.ndarray]:
    """Softmax regression in NumPy: gradient, clipping, AdamW (Loshchilov & Hutter 2019, alg. 2)."""
    values = [module.weight.detach().double().numpy(), module.bias.detach().double().numpy()]
    first, second = ([np.zeros_like(v) for v in values] for _ in range(2))
    for step in range(recipe.steps):
        x, y = step_batch(images(), recipe.batch, seed=seed, step=step)
        flat, classes = x.flatten(1).double().numpy(), y.numpy()
        logits = flat @ values[0].T + values[1]
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        target = np.full_like(shares, recipe.label_smoothing / 3)
        target[np.arange(len(y)), classes] += 1 - recipe.label_smoothing
        delta = (shares - target) / len(y)
        gradients = [delta.T @ flat, delta.sum(0)]
        norm = np.sqrt(sum((g**2).sum() for g in gradients))
        scale = min(1.0, recipe.clip_norm / (norm + 1e-6))
        rate = recipe.learning_rate * (1 - step / recipe.steps)
        for i, decay in enumerate((recipe.weight_decay, 0.0)):
            g = gradients[i] * scale
            values[i] = values[i] * (1 - rate * decay)
            first[i] = 0.9 * first[i] + 0.1 * g
            second[i] = 0.999 * second[i] + 0.001 * g**2
            corrected = first[i] / (1 - 0.9 ** (step + 1))
            spread = np.sqrt(second[i] / (1 - 0.999 ** (step + 1))) + 1e-8
            values[i] = values[i] - rate * corrected / spread
    return values


@pytest.mark.parametrize("clip_norm", [0.05, 5.0])
def test_the_loop_is_adamw_by_hand(clip_norm: float, tmp_path: Path) -> None:
    """The small clip is reached at every step, the large one at none."""
    torch.manual_seed(3)
    module = nn.Linear(25, 3)
    recipe = TrainingRecipe(
        steps=9, batch=6, learning_rate=0.02, weight_decay=0.3, clip_norm=clip_norm
    )
    expected = adamw_by_hand(module, recipe, seed=4)
    train_steps(
        module, images(), recipe, lambda _, batch: module(batch.flatten(1)),
        Checkpoint(tmp_path / "s.pt", "linear"), seed=4, progress=quiet, label="training",
    )  # fmt: skip
    for found, value in zip(module.parameters(), expected, strict=True):
        np.testing.assert_allclose(found.detach().numpy(), value, rtol=1e-4, atol=1e-5)


def test_each_step_gets_its_own_batch_in_training_mode_and_progress_is_told(tmp_path: Path) -> None:
    for flip in (False, True):
        module, told, seen = Small(), [], []

        def logits(
            step: int, batch: Tensor, module: Small = module, seen: list[Any] = seen
        ) -> Tensor:
            seen.append((step, batch, module.training))
            return module.answer(step, batch)

        def progress(label: str, done: int, total: int, told: list[Any] = told) -> None:
            told.append((label, done, total))

        run(tmp_path / f"{flip}.pt", module, logits=logits, progress=progress, flip=flip, seed=5)
        assert told == [("training", done, 7) for done in range(1, 8)]
        for number, (step, batch, training) in enumerate(seen):
            expected, _ = step_batch(images(), 6, seed=5, step=number, flip=flip)
            assert step == number
            assert training
            assert torch.equal(batch, expected)
        assert not module.training


# ---- going on


class Stop:
    """A progress, or logits, that interrupts at a step."""

    def __init__(self, at: int, module: Small) -> None:
        self.at, self.module = at, module

    def progress(self, _label: str, done: int, _total: int) -> None:
        if done == self.at:
            raise KeyboardInterrupt

    def logits(self, step: int, batch: Tensor) -> Tensor:
        if step == self.at:
            raise KeyboardInterrupt
        return self.module.answer(step, batch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Trained without a stop."""
    return run(tmp_path_factory.mktemp("whole") / "s.pt", every=100)


@pytest.mark.parametrize("every", [1, 2, 3, 100])
@pytest.mark.parametrize("stop", [0, 1, 2, 3, 5, 6, 7])
@pytest.mark.parametrize("where", ["between steps", "inside a step"])
def test_training_that_was_stopped_ends_bit_identical(
    where: str, stop: int, every: int, whole: Small, tmp_path: Path
) -> None:
    """Resumed from other starting weights where there is a checkpoint to go on from."""
    path = tmp_path / "s.pt"
    module = Small()
    stopping = Stop(stop, module)
    ways: dict[str, Any] = {"progress": stopping.progress}
    if where == "inside a step":
        ways = {"logits": stopping.logits}
    happens = stop > 0 if where == "between steps" else stop < 7
    if not happens:
        run(path, module, every=every, **ways)
        assert same(module, whole)
        return
    with pytest.raises(KeyboardInterrupt):
        run(path, module, every=every, **ways)
    assert path.exists() == (stop >= every or stop == 7)
    assert restore(Small(), Checkpoint(path, "small")) == (7 if stop == 7 else stop - stop % every)
    resumed = run(path, Small(9 if path.exists() else 0), every=every)
    assert same(resumed, whole)


def test_the_comparison_can_fail(whole: Small, tmp_path: Path) -> None:
    """Other starting weights, another seed, another recipe: each ends somewhere else."""
    assert not same(run(tmp_path / "1.pt", Small(9)), whole)
    assert not same(run(tmp_path / "2.pt", seed=1), whole)
    assert not same(run(tmp_path / "3.pt", flip=True), whole)
    state = torch.load(tmp_path / "2.pt", weights_only=True)
    assert state["step"] == 7


def test_without_a_checkpoint_it_ends_the_same_and_leaves_no_file(
    whole: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hwnas.training, "CHECKPOINT_S", 0)
    module = Small()
    recipe = TrainingRecipe(steps=7, batch=6, learning_rate=0.05)
    train_steps(
        module, images(), recipe, module.answer, None, seed=0, progress=quiet, label="training"
    )
    assert same(module, whole)
    assert not module.training
    assert not list(tmp_path.iterdir())


def test_momentum_is_part_of_what_goes_on(whole: Small, tmp_path: Path) -> None:
    """The negative control: weights alone, without the optimiser's state, end elsewhere."""
    path = tmp_path / "s.pt"
    with pytest.raises(KeyboardInterrupt):
        run(path, progress=Stop(4, Small()).progress)
    state = torch.load(path, weights_only=True)
    state["optimiser"]["state"] = {}
    torch.save(state, path)
    assert not same(run(path), whole)


def test_training_stopped_at_every_step_in_turn_ends_bit_identical(
    whole: Small, tmp_path: Path
) -> None:
    for stop in range(1, 8):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "s.pt", Small(stop if stop > 1 else 0), every=1,
                progress=Stop(stop, Small()).progress)  # fmt: skip
    assert same(run(tmp_path / "s.pt", Small(9), every=1), whole)


def test_finished_training_is_not_repeated(whole: Small, tmp_path: Path) -> None:
    run(tmp_path / "s.pt")
    before = (tmp_path / "s.pt").read_bytes()
    again = run(tmp_path / "s.pt", Small(9), progress=Stop(1, Small()).progress)
    assert same(again, whole)
    assert not again.training
    assert (tmp_path / "s.pt").read_bytes() == before


# ---- when a checkpoint is written


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps after which a checkpoint was written."""
    steps: list[int] = []
    save = hwnas.training.save_state

    def spy(state: dict[str, Any], path: Path) -> None:
        steps.append(state["step"])
        save(state, path)

    monkeypatch.setattr(hwnas.training, "save_state", spy)
    return steps


def test_a_loss_is_bounded_by_a_hundred_steps_and_twenty_seconds() -> None:
    """What the documents promise."""
    assert (CHECKPOINT_STEPS, CHECKPOINT_S) == (100, 20.0)
    assert Checkpoint(Path("s.pt"), "x").every_steps == CHECKPOINT_STEPS


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 2, 3, 4, 5, 6, 7]), (3, [3, 6, 7]), (7, [7]), (100, [7])]
)
def test_a_checkpoint_is_written_after_so_many_steps_and_at_the_end(
    every: int, expected: list[int], saves: list[int], tmp_path: Path
) -> None:
    run(tmp_path / "s.pt", every=every)
    assert saves == expected
    assert [path.name for path in tmp_path.iterdir()] == ["s.pt"]


@pytest.mark.parametrize(
    ("step_s", "expected"),
    [(1.0, [10]), (6.0, [4, 8, 10]), (20.0, [2, 4, 6, 8, 10]), (20.5, list(range(1, 11)))],
)
def test_a_checkpoint_is_written_after_so_many_seconds(
    step_s: float,
    expected: list[int],
    saves: list[int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The clock runs on by one step's time at each step."""
    clock = [1000.0]
    monkeypatch.setattr(hwnas.training, "now_s", lambda: clock[0])
    module = Small()

    def logits(step: int, batch: Tensor) -> Tensor:
        clock[0] += step_s
        return module.answer(step, batch)

    run(tmp_path / "s.pt", module, steps=10, every=100, logits=logits)
    assert saves == expected


def test_when_checkpoints_are_written_changes_nothing(
    whole: Small, saves: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(hwnas.training, "CHECKPOINT_S", 0)
    found = run(tmp_path / "s.pt", every=100)
    assert saves == [1, 2, 3, 4, 5, 6, 7]
    assert same(found, whole)


def test_a_full_disk_is_one_sentence_and_training_goes_on_from_the_checkpoint_before(
    whole: Small, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "s.pt"
    kept: list[bytes] = []
    flush = os.fsync

    def full(file: int) -> None:
        if path.exists():
            kept.append(path.read_bytes())
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(file)

    with monkeypatch.context() as context:
        context.setattr(os, "fsync", full)
        with pytest.raises(InvalidInput) as caught:
            run(path, every=2)
    assert caught.value.what == f"{path} cannot be written: No space left on device."
    assert path.read_bytes() == kept[0]
    assert restore(Small(), Checkpoint(path, "small")) == 2
    assert same(run(path, Small(9)), whole)
    assert [file.name for file in tmp_path.iterdir()] == ["s.pt"]


# ---- files that are not ours


def damage_step(state: dict[str, Any]) -> None:
    state["step"] = "three"


def damage_weights(state: dict[str, Any]) -> None:
    state["weights"]["conv.weight"] = torch.zeros(1)


def damage_optimiser(state: dict[str, Any]) -> None:
    state["optimiser"]["param_groups"].pop()


def no_optimiser(state: dict[str, Any]) -> None:
    state["optimiser"] = None


def weights_of_nothing(state: dict[str, Any]) -> None:
    state["weights"] = [1]


@pytest.mark.parametrize(
    "damage",
    [
        damage_step,
        damage_weights,
        damage_optimiser,
        no_optimiser,
        weights_of_nothing,
        *(lambda state, gone=name: state.pop(gone)
          for name in ("identity", "step", "weights", "optimiser")),
    ],
)  # fmt: skip
def test_a_checkpoint_that_lacks_something_is_refused(
    damage: Callable[[dict[str, Any]], None], tmp_path: Path
) -> None:
    path = tmp_path / "s.pt"
    run(path)
    state = torch.load(path, weights_only=True)
    damage(state)
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(InvalidInput) as caught:
        run(path, steps=9)
    assert caught.value.what.startswith(f"{path} is not a whole checkpoint (")
    assert "remove it" in caught.value.next_step
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_checkpoint_is_refused(share: float, tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    run(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(InvalidInput, match="is not a whole checkpoint"):
        run(path)


def test_a_checkpoint_of_something_else_is_refused_with_both_names(tmp_path: Path) -> None:
    path = tmp_path / "s.pt"
    run(path, identity="the space large 00ff")
    before = path.read_bytes()
    with pytest.raises(InvalidInput) as caught:
        run(path, identity="the space small 11ee")
    assert (
        caught.value.what == f"{path} holds the weights of something else (the space large 00ff)."
    )
    assert caught.value.accepted == "a checkpoint of the space small 11ee"
    assert "--run" in caught.value.next_step
    assert path.read_bytes() == before


def test_restoring_without_a_file_leaves_everything_and_says_no_steps(tmp_path: Path) -> None:
    module, untouched = Small(), Small()
    assert restore(module, Checkpoint(tmp_path / "s.pt", "small")) == 0
    assert same(module, untouched)


def test_restoring_reads_weights_alone_without_an_optimiser(whole: Small, tmp_path: Path) -> None:
    run(tmp_path / "s.pt")
    module = Small(9)
    assert restore(module, Checkpoint(tmp_path / "s.pt", "small")) == 7
    assert same(module, whole)
