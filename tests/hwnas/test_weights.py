"""Tensors on disk: what is written comes back, from whatever device, with PyTorch's own notes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hwnas.placement import Placement
from hwnas.weights import load_state, save_state


class Carried(torch.Tensor):
    """A tensor that remembers whether a host copy was made of it."""

    def cpu(self, *_: Any, **__: Any) -> torch.Tensor:
        return torch.full((2,), 7.0)


def test_every_tensor_of_a_nested_state_is_written_from_its_host_copy(tmp_path: Path) -> None:
    """`Carried` stands for a tensor of a device; what holds tensors keeps its kind."""
    carried = torch.zeros(2).as_subclass(Carried)
    state = {"a": carried, "b": {"c": [carried, 1, "text"], "d": (carried, None)}, "e": 2.5}
    save_state(state, tmp_path / "s.pt")
    found = load_state(tmp_path / "s.pt")
    copy = torch.full((2,), 7.0)
    inner = found["b"]
    for tensor in (found["a"], inner["c"][0], inner["d"][0]):
        assert type(tensor) is torch.Tensor
        assert torch.equal(tensor, copy)
    assert inner["c"][1:] == [1, "text"]
    assert inner["d"][1] is None
    assert found["e"] == 2.5
    assert torch.equal(state["a"], torch.zeros(2)), "the state itself stays as it was"


def test_what_pytorch_notes_beside_weights_is_kept(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    save_state(module.state_dict(), tmp_path / "s.pt")
    found: Any = load_state(tmp_path / "s.pt")
    assert found._metadata == module.state_dict()._metadata
    assert all(torch.equal(found[name], value) for name, value in module.state_dict().items())


@pytest.mark.gpu
def test_what_a_card_held_is_read_without_one(cuda: Placement, tmp_path: Path) -> None:
    module = nn.Linear(3, 2)
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    cuda.move(module)
    save_state(module.state_dict(), tmp_path / "s.pt")
    found = load_state(tmp_path / "s.pt")
    assert all(value.device.type == "cpu" for value in found.values())
    assert all(torch.equal(found[name], value) for name, value in expected.items())
