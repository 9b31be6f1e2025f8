"""Tensors on disk: written atomically, read without pickled code."""

import copy
import io
from pathlib import Path
from typing import Any

import torch

from latency_tables.files import write_bytes
from quant.errors import InvalidInput


def save_state(state: dict[str, Any], path: Path) -> None:
    """Write a state, from copies on the host: any device can go on from it.

    Raises InvalidInput where the disk refuses, with the old file kept.
    """
    buffer = io.BytesIO()
    torch.save(_on_host(state), buffer)
    write_bytes(path, buffer.getbuffer())


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote; raises InvalidInput where the file is not whole."""
    try:
        state = torch.load(path, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
        return state
    except Exception as error:  # torch raises many kinds for a damaged file
        raise damaged(path, error) from error


def _on_host(state: Any) -> Any:
    """The same state, every tensor in it on the host."""
    match state:
        case torch.Tensor():
            return state.cpu()
        case dict():
            mine = copy.copy(state)  # with what PyTorch notes beside the weights
            mine.update((name, _on_host(value)) for name, value in state.items())
            return mine
        case list() | tuple():
            return type(state)(map(_on_host, state))
        case _:
            return state


def damaged(path: Path, error: Exception) -> InvalidInput:
    """The error for a file of weights that cannot be used."""
    return InvalidInput(
        f"{path} is not a whole checkpoint ({type(error).__name__}).",
        next_step="remove it; what it held is then trained again",
    )
