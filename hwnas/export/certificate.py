"""The proof that goes with a file: what was asked, predicted, measured, and on what."""

import hashlib
import json
from pathlib import Path
from typing import Any

import latency_tables
from latency_tables.files import read_object, write_text
from quant.errors import InvalidInput

_FIELDS = (
    "limits", "upper", "holds", "predicted", "measured", "accuracy", "architecture", "counts",
    "hashes", "host",
)  # fmt: skip
_SOURCES = ("quant", "latency_tables", "profilers", "hwnas")


def sha256(path: Path) -> str:
    """The hash of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def code_version() -> str:
    """A hash of the four packages' source: two certificates with the same one ran the same code."""
    home = Path(latency_tables.__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for package in _SOURCES:
        for path in sorted((home / package).rglob("*.py")):
            digest.update(f"{path.relative_to(home)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def write_certificate(path: Path, content: dict[str, Any]) -> None:
    """Write a certificate atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def read_certificate(path: Path) -> dict[str, Any]:
    """Read a certificate; raises InvalidInput where it is not a whole one."""
    try:
        content = read_object(path)
        if absent := [name for name in _FIELDS if not content.get(name)]:
            raise ValueError(f"it lacks {absent[0]!r}")
        return content
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{path} is not a certificate: {error}.",
            next_step="remove it; hwnas search or verify then measures and certifies again",
        ) from error
