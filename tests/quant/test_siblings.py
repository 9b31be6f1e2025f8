"""A foreign package under one of our four names is refused with one sentence that names it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import quant
from quant.siblings import NAMES

HOME = Path(quant.__file__).resolve().parent.parent


def _import(name: str, foreign: Path) -> subprocess.CompletedProcess[str]:
    """Import `name` in a fresh interpreter that looks into `foreign` before our own packages."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(foreign), str(HOME)])}
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import {name}"],
        env=environment,
        cwd=foreign,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def _sentence(result: subprocess.CompletedProcess[str]) -> str:
    kind, _, sentence = result.stderr.strip().splitlines()[-1].partition(": ")
    assert (result.returncode, kind) == (1, "ImportError"), result.stderr
    return sentence


@pytest.mark.parametrize("name", NAMES)
def test_our_packages_import_beside_unrelated_ones(name: str, tmp_path: Path) -> None:
    (tmp_path / "unrelated.py").write_text("x = 1\n")
    assert _import(name, tmp_path).returncode == 0


@pytest.mark.parametrize("stranger", ["quant", "latency_tables", "profilers"])
def test_hwnas_beside_a_foreign_module_names_it_in_one_sentence(
    stranger: str, tmp_path: Path
) -> None:
    (tmp_path / f"{stranger}.py").write_text("x = 1\n")
    sentence = _sentence(_import("hwnas", tmp_path))
    assert sentence.startswith(f"hwnas needs its own package '{stranger}'")
    assert sentence.endswith("install hwnas in a virtual environment of its own.")
    assert sentence.count("install hwnas") == 1


@pytest.mark.parametrize("name", ["hwnas", "profilers", "latency_tables"])
def test_a_foreign_package_with_an_init_is_refused_like_a_module(name: str, tmp_path: Path) -> None:
    (tmp_path / "quant").mkdir()
    (tmp_path / "quant" / "__init__.py").write_text("")
    assert _sentence(_import(name, tmp_path)).startswith("hwnas needs its own package 'quant'")


def test_even_quant_alone_refuses_a_foreign_hwnas_and_tells_where_it_lies(tmp_path: Path) -> None:
    stranger = tmp_path / "hwnas.py"
    stranger.write_text("x = 1\n")
    sentence = _sentence(_import("quant", tmp_path))
    assert sentence.startswith("hwnas needs its own package 'hwnas'")
    assert str(stranger.resolve()) in sentence
