"""The numbers behind a recipe, and the optimiser against hand-written steps."""

import numpy as np
import pytest
import torch
from torch import nn

from hwnas.recipes import RECIPES, TrainingRecipe, recipe
from quant.errors import InvalidInput

TRAINING = TrainingRecipe(steps=8, batch=4, learning_rate=0.01, weight_decay=0.5)


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
    groups = TRAINING.optimiser(module).param_groups
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in module.parameters())


def test_decay_shrinks_weights_alone() -> None:
    """With gradients of zero only decoupled weight decay is left: w (1 - rate * decay)."""
    torch.manual_seed(0)
    module = Mixed()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimiser = TRAINING.optimiser(module)
    TRAINING.set_rate(optimiser, 4)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimiser.step()
    rate = 0.01 * (1 - 4 / 8)
    for name, parameter in module.named_parameters():
        shrunk = name in ("conv.weight", "linear.weight")
        factor = 1 - rate * 0.5 if shrunk else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor, rtol=1e-6, atol=0)


def test_the_rate_falls_on_a_line_from_the_full_rate_to_one_step_above_zero() -> None:
    optimiser = TRAINING.optimiser(nn.Linear(2, 2))
    rates = []
    for step in range(TRAINING.steps):
        TRAINING.set_rate(optimiser, step)
        assert len({group["lr"] for group in optimiser.param_groups}) == 1
        rates.append(optimiser.param_groups[0]["lr"])
    np.testing.assert_allclose(rates, np.linspace(0.01, 0.01 / 8, 8))


def test_the_loss_is_the_smoothed_cross_entropy_by_hand() -> None:
    rng = np.random.default_rng(0)
    logits, classes = rng.normal(size=(6, 5)), rng.integers(0, 5, 6)
    log_shares = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    target = np.full((6, 5), 0.1 / 5)
    target[np.arange(6), classes] += 0.9
    found = TRAINING.loss(torch.from_numpy(logits), torch.from_numpy(classes))
    assert float(found) == pytest.approx(-(target * log_shares).sum(1).mean())


def test_every_recipe_is_found_by_its_name_and_makes_sense() -> None:
    assert set(RECIPES) == {"quick", "smoke"}
    for name, found in RECIPES.items():
        assert recipe(name) is found
        assert found.name == name
        assert found.evaluations >= found.population >= found.finalists >= 1
        assert found.evaluations % found.population == 0
        for training in (found.supernet, found.retrain):
            assert training.steps > 0
            assert 0 < training.learning_rate < 1
        calibration = found.calibration
        assert calibration.networks == calibration.fit + calibration.bound + calibration.test
        # the split-conformal bound of 95 % needs at least 19 networks
        assert calibration.bound >= 19


@pytest.mark.parametrize("name", ["", "Quick", "slow"])
def test_an_unknown_recipe_is_refused_with_the_names(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        recipe(name)
    assert caught.value.what == f"--recipe is {name!r}."
    assert caught.value.accepted == "quick, smoke"
