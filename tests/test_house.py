"""What the house asks of every source file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("hwnas", "latency_tables", "profilers", "quant")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def calls(path: Path) -> set[str]:
    return {
        ast.unparse(node.func)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    }


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_source_file_keeps_the_house_rules(path: Path) -> None:
    used = calls(path)
    assert "print" not in used
    assert "time.time" not in used
    if path.name != "measure.py":
        assert not {"time.perf_counter", "time.perf_counter_ns", "time.monotonic"} & used
    global_state = [name for name in used if name.startswith(("random.", "np.random."))]
    assert all(name.startswith("np.random.default_rng") for name in global_state)
    assert ast.get_docstring(ast.parse(path.read_text()))


def test_only_one_file_names_brevitas_classes() -> None:
    naming = {path for path in SOURCES if "brevitas" in calls_and_imports(path)}
    assert naming == {ROOT / "quant" / "layers.py"}


def calls_and_imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.partition(".")[0])
        elif isinstance(node, ast.Import):
            names.update(alias.name.partition(".")[0] for alias in node.names)
    return names


def test_only_the_emitter_writes_onnx_nodes() -> None:
    writing = {path for path in SOURCES if "helper.make_node" in calls(path)}
    assert writing == {ROOT / "profilers" / "graphs.py"}


def test_lazy_imports_stand_where_the_house_says() -> None:
    def hidden(path: Path) -> bool:
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        return any(
            isinstance(node, ast.Import | ast.ImportFrom)
            for function in functions
            for node in ast.walk(function)
        )

    assert {path for path in SOURCES if hidden(path)} <= {ROOT / "hwnas" / "__init__.py"}
    importing = {path for path in SOURCES if "importlib.import_module" in calls(path)}
    optional = {
        ROOT / "hwnas" / "data" / "vision.py",  # torchvision, which is an extra
        ROOT / "profilers" / "cuda.py",  # pycuda, which is one too
        ROOT / "profilers" / "trt_build.py",  # and tensorrt, of which there are two
        ROOT / "profilers" / "devices.py",  # GPUs' backends, with PyTorch behind them
    }
    assert importing == {ROOT / "hwnas" / "__init__.py", *optional}
