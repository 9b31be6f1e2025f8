"""Hardware-aware neural architecture search under hard, measured limits."""

import importlib
from typing import Any

try:
    from quant.siblings import refuse_strangers
except ModuleNotFoundError as error:
    raise ImportError(
        "hwnas needs its own package 'quant', but another one shadows it "
        f"({error}); install hwnas in a virtual environment of its own."
    ) from error

refuse_strangers(__file__)

__version__ = "0.1.0"

_PUBLIC = {
    "Architecture": "hwnas.spaces.base",
    "Choice": "hwnas.spaces.base",
    "Job": "hwnas.job",
    "Position": "hwnas.spaces.base",
    "Request": "hwnas.job",
    "SearchSpace": "hwnas.spaces.base",
    "State": "hwnas.spaces.base",
    "mobile": "hwnas.spaces.mobile",
    "mobile_tiny": "hwnas.spaces.mobile",
    "search_to_certificate": "hwnas.run",
}

_ROOMS = ("bundle", "config", "engines", "listing", "predict", "quality", "run")

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    """Load a public name, or a room that the commands use, when it is first used."""
    if name in _ROOMS:
        return importlib.import_module(f"hwnas.{name}")
    if name not in _PUBLIC:
        raise AttributeError(f"module 'hwnas' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)
