"""The wheel: four top-level names, and a refusal beside a stranger of the same name."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {"hwnas", "latency_tables", "profilers", "quant"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (*PACKAGES, "pyproject.toml", "README.md", "LICENSE"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(source)], check=True)
    subprocess.run(
        f"{sys.executable} -m pip wheel --quiet --no-deps --no-build-isolation "
        f"--wheel-dir {folder} {source}".split(),
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def test_the_wheel_has_exactly_four_top_level_names(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == PACKAGES


def test_the_wheel_is_typed_and_holds_every_module(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        assert f"{package}/py.typed" in inside
        sources = (ROOT / package).rglob("*.py")
        assert {path.relative_to(ROOT).as_posix() for path in sources} <= inside


@pytest.mark.parametrize("stranger", sorted(PACKAGES - {"hwnas"}))
def test_a_foreign_package_of_the_same_name_is_refused(
    wheel: Path, stranger: str, tmp_path: Path
) -> None:
    site, foreign = tmp_path / "site", tmp_path / "foreign"
    zipfile.ZipFile(wheel).extractall(site)
    foreign.mkdir()
    (foreign / f"{stranger}.py").write_text("answer = 42\n")
    code = f"import sys; sys.path[:0] = [{str(foreign)!r}, {str(site)!r}]; import hwnas"
    answer = subprocess.run(
        [sys.executable, "-I", "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    last = answer.stderr.strip().splitlines()[-1]
    assert answer.returncode != 0
    assert last.startswith("ImportError: hwnas needs its own package")
    assert stranger in last
    assert "virtual environment" in last


def test_the_reference_tables_of_every_preset_load_from_the_wheel(
    wheel: Path, tmp_path: Path
) -> None:
    """In a process that sees the wheel's code and files alone, beside the installed libraries."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    code = f"""
import json, sys
sys.path.insert(0, {str(tmp_path)!r})
from latency_tables.reference import shipped
from latency_tables.table import LatencyTable
from hwnas.spaces.registry import load_space
tables = [LatencyTable.load(path) for path in shipped()]
priced = {{}}
for name, shape in (("mobile", (1000, 3, 224)), ("mobile-tiny", (10, 1, 32))):
    classes, channels, size = shape
    space = load_space(name, classes=classes, image_channels=channels, size=size)
    for table in tables:
        wanted = f"{{name}} {{space.fingerprint}}"
        model = [m for key, m in table.models.items() if key.startswith(wanted)]
        if model and not table.missing(space.lattice.ops):
            priced[name] = [model[0].quality.networks, table.host.cpu, table.protocol["rounds"]]
print(json.dumps([[str(path) for path in shipped()], priced]))
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    paths, priced = json.loads(answer.stdout)
    assert paths
    assert all(path.startswith(str(tmp_path)) for path in paths)
    assert all((Path(path).parent / "README.md").is_file() for path in paths)
    assert set(priced) == {"mobile", "mobile-tiny"}
    assert all(networks > 0 and cpu and rounds > 0 for networks, cpu, rounds in priced.values())
