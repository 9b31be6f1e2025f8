"""What tests of several folders share: a Python that has NumPy and ONNX Runtime alone, a GPU."""

import importlib.util
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from hwnas.placement import Placement, cuda_fault, placement
from profilers.cuda import card
from quant.errors import MissingDependency


@pytest.fixture(scope="session")
def bare_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of a virtual environment with links to the two packages and their libraries;
    proved to have nothing else of ours. Start it without PYTHONPATH.
    """
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in ("numpy", "onnxruntime"):
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.origin is not None
        package = Path(spec.origin).parent
        for found in (package, package.with_name(f"{name}.libs")):
            if found.exists():
                (site / found.name).symlink_to(found)
    python = folder / "bin" / "python"
    absent = ["torch", "onnx", "hwnas", "profilers", "latency_tables", "quant", "scipy", "brevitas"]
    script = (
        "import importlib.util, numpy, onnxruntime\n"
        f"assert not [n for n in {absent} if importlib.util.find_spec(n)]"
    )
    subprocess.run([str(python), "-c", script], check=True, env={}, cwd=folder)
    return python


def pytest_configure(config: pytest.Config) -> None:
    """Tests that need no GPU see none, nor do their processes: weights are trained on the CPU."""
    asked = str(config.option.markexpr)
    if "gpu" not in asked or "not gpu" in asked:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.fixture
def no_card() -> None:
    """Skips where there is an NVIDIA GPU: for what is told where there is none."""
    with suppress(MissingDependency):
        card()
        pytest.skip("what is told where there is no NVIDIA driver")


@pytest.fixture(scope="session")
def cuda() -> Placement:
    """The card that PyTorch computes on; skips where there is none."""
    if fault := cuda_fault():
        pytest.skip(f"PyTorch cannot compute on CUDA here: {fault}")
    return placement("cuda")
