"""Refuse to run when a foreign package shadows one of our four top-level names.

`quant`, `latency_tables`, `profilers` and `hwnas` are plain top-level packages, and such names are
common. Another package of the same name earlier on `sys.path` would otherwise fail far from the
cause, with an attribute that does not exist.
"""

import importlib.util
from pathlib import Path

NAMES = ("quant", "latency_tables", "profilers", "hwnas")


def refuse_strangers(init_file: str) -> None:
    """Raise ImportError unless all four packages lie beside the one whose `__init__` is given."""
    home = Path(init_file).resolve().parent.parent
    for name in NAMES:
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve() if spec and spec.origin else None
        if origin != home / name / "__init__.py":
            raise ImportError(
                f"hwnas needs its own package '{name}' beside {home}, but Python finds "
                f"{origin or 'none'}; install hwnas in a virtual environment of its own."
            )
