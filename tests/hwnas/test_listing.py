"""What is there: devices, spaces, tables, runs. What is damaged is listed so, or left out."""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import hwnas.listing
from hwnas import listing
from hwnas.recipes import recipe
from hwnas.spaces.blocks import conv_norm_activation
from hwnas.spaces.registry import load_space
from hwnas.store import Run, RunConfig, open_run
from latency_tables.host import Host
from latency_tables.model import LatencyModel, Quality
from latency_tables.ops import COUNTS, OpSpec, Tensor, peak_activation_bytes
from latency_tables.table import LatencyTable, Row
from profilers.base import Profiler
from profilers.build import build_rows
from profilers.devices import DEVICES, open_profiler
from profilers.measure import Protocol
from profilers.simulated import SimulatedProfiler
from quant.errors import InvalidInput, TableError
from quant.precision import Precision

ROOT = Path(__file__).parents[2]
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"


def json_of(content: Any) -> Any:
    """As it is told with --json; what is no plain data cannot be written."""
    return json.loads(json.dumps(content, allow_nan=False))


# ---- devices


def test_every_device_is_listed_with_what_it_is_or_why_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def opened(name: str, **condition: Any) -> Profiler:
        if name == "gpu":
            raise InvalidInput("There is no driver.", next_step="install one")
        return open_profiler(name, **condition)

    monkeypatch.setattr(hwnas.listing, "open_profiler", opened)
    found = {item["device"]: item for item in json_of(listing.devices())}
    assert tuple(found) == DEVICES
    assert found["gpu"] == {
        "device": "gpu", "usable": False, "about": "There is no driver. Next: install one.",
    }  # fmt: skip
    host = open_profiler("simulated").host()
    assert found["simulated"]["usable"]
    assert host.cpu in found["simulated"]["about"]
    cpu = found["cpu"]
    assert cpu["usable"]
    assert cpu["flags"] == open_profiler("cpu").host().flags
    assert f"{len(os.sched_getaffinity(0))} usable cores" in cpu["about"]


def test_a_device_with_memory_of_its_own_says_whose_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    class Apart(SimulatedProfiler):
        memory_layer = "PyCUDA 2026.1"

    monkeypatch.setattr(hwnas.listing, "open_profiler", lambda _name: Apart())
    for item in listing.devices():
        assert item["about"].endswith(", memory by PyCUDA 2026.1")
    monkeypatch.setattr(hwnas.listing, "open_profiler", lambda _name: SimulatedProfiler())
    assert not any("memory" in item["about"] for item in listing.devices())


# ---- spaces


def test_a_space_is_told_with_what_every_network_counts() -> None:
    """Against every network of the small example, one by one."""
    (found,) = json_of(listing.spaces(SPACE))
    space = load_space(SPACE, classes=10, image_channels=3, size=224)
    networks = [space.lower(architecture) for architecture in space.enumerate()]
    assert found["space"] == SPACE
    assert (found["image_size"], found["positions"]) == (224, 4)
    assert found["architectures"] == len(networks)
    assert found["rows"] == len({op.key for ops in networks for op in ops})
    assert found["genes"]["conv1.kernel"] == ["3", "5"]
    assert sum(map(len, found["genes"].values())) == sum(len(g.choices) for g in space.genes)
    for cost in ("params", "macs", "bitops", "activation_mb"):
        values = [counted(cost, ops) for ops in networks]
        assert found["smallest"][cost] == pytest.approx(min(values), rel=1e-12)
        assert found["largest"][cost] == pytest.approx(max(values), rel=1e-12)
    assert set(found["smallest"]) == {"params", "macs", "bitops", "activation_mb"}


def counted(cost: str, ops: tuple[OpSpec, ...]) -> float:
    if cost == "activation_mb":
        return peak_activation_bytes(ops) / 1e6
    return sum(COUNTS[cost](op) for op in ops)


def test_the_presets_are_listed_at_the_size_that_they_are_meant_for() -> None:
    found = {item["space"]: item for item in json_of(listing.spaces())}
    assert {name: item["image_size"] for name, item in found.items()} == {
        "mobile-tiny": 32, "shufflenet-tiny": 32, "resnet-tiny": 32,
        "mobile": 224, "shufflenet": 224, "resnet18": 224, "resnet34": 224,
    }  # fmt: skip
    for name, item in found.items():
        space = load_space(name, classes=10, image_channels=3, size=item["image_size"])
        assert item["rows"] == len(space.lattice.ops)
        assert item["architectures"] == float(space.count)
        for cost, smallest in item["smallest"].items():
            assert smallest <= item["largest"][cost]
            stem_peaks = cost == "activation_mb" and name in ("resnet18", "resnet34")
            assert (smallest < item["largest"][cost]) != stem_peaks


def test_the_number_of_classes_counts() -> None:
    few, many = (listing.spaces(SPACE, classes=classes)[0] for classes in (2, 1000))
    assert many["largest"]["params"] - few["largest"]["params"] == 998 * (64 + 1)


def test_an_unknown_space_is_refused() -> None:
    with pytest.raises(InvalidInput, match="--space is 'huge'"):
        listing.spaces("huge")


# ---- tables

MODEL = LatencyModel(
    {"fp32": 0.8}, 1.5, 12.7, 1.073, 0.99, Quality(40, 0.02, 0.09, 0.9, 1.0, 0.95, 0.99, 0.98)
)
HOST = Host("cpu", "onnxruntime", "1.23", "a processor", "avx2", threads=2, batch=4)


def table_of(count: int, unstable: int = 0) -> LatencyTable:
    rows = [
        Row(f"op {n}", "[0]", "fp32", 5.0 + n, 5.0, 6.0 + n, 4.0, 6.0, 0.01, 50, n >= unstable)
        for n in range(count)
    ]
    return LatencyTable(HOST, {"rounds": 5}, {row.key: row for row in rows}, {"a space": MODEL})


def test_a_table_is_told_with_its_condition_and_its_quality(tmp_path: Path) -> None:
    table_of(7, unstable=3).save(tmp_path / "cpu.parquet")
    assert json_of(listing.tables(tmp_path)) == [
        {
            "table": str(tmp_path / "cpu.parquet"),
            "device": "cpu",
            "cpu": "a processor",
            "runtime": "onnxruntime 1.23",
            "threads": 2,
            "batch": 4,
            "rows": 7,
            "unstable_rows": 3,
            "models": {"a space": {"mean_error": 0.02, "tau": 0.95}},
        }
    ]


def test_a_damaged_table_is_listed_beside_the_whole_ones(tmp_path: Path) -> None:
    table_of(3).save(tmp_path / "a.parquet")
    table_of(4).save(tmp_path / "z.parquet")
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:300])
    (tmp_path / "empty.parquet").write_bytes(b"")
    (tmp_path / "folder.parquet").mkdir()
    pq.write_table(pa.table({"x": [1, 2]}), tmp_path / "foreign.parquet")
    (tmp_path / "journal.journal").write_text("no table")
    found = json_of(listing.tables(tmp_path))
    assert [Path(item["table"]).name for item in found] == [
        "a.parquet", "cut.parquet", "empty.parquet", "folder.parquet", "foreign.parquet",
        "z.parquet",
    ]  # fmt: skip
    assert [item["rows"] for item in found if "rows" in item] == [3, 4]
    for item in found:
        if "rows" not in item:
            assert set(item) == {"table", "error"}
            assert item["table"] in item["error"]
            assert "is not a latency table" in item["error"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda meta: meta.update(format_version=99),
        lambda meta: meta.update(models=[1]),
        lambda meta: meta.update(models={"a space": {}}),
        lambda meta: meta.update(models={"a space": 5}),
        lambda meta: meta.update(host={"device": "cpu"}),
        lambda meta: meta.pop("host"),
        lambda meta: meta.pop("models"),
    ],
)
def test_a_table_with_damaged_metadata_is_listed_with_why(damage: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table_of(3).save(path)
    data = pq.read_table(path)
    meta = json.loads(data.schema.metadata[b"hwnas"])
    damage(meta)
    pq.write_table(data.replace_schema_metadata({b"hwnas": json.dumps(meta)}), path)
    (found,) = json_of(listing.tables(tmp_path))
    assert set(found) == {"table", "error"}
    assert found["error"].startswith(str(path))


def test_no_folder_has_no_tables(tmp_path: Path) -> None:
    assert listing.tables(tmp_path / "absent") == []


def test_everything_in_a_table_is_told(tmp_path: Path) -> None:
    path, table = tmp_path / "cpu.parquet", table_of(3, unstable=1)
    table.save(path)
    found = json_of(listing.table(path))
    assert found == {
        "table": str(path),
        "host": asdict(HOST),
        "protocol": {"rounds": 5},
        "models": {"a space": json_of(MODEL.to_dict())},
        "reports": {},
        "pace_us": table.pace_us,
        "rows": [asdict(row) for row in table.rows.values()],
        "chains": [asdict(row) for row in table.chains.values()],
    }
    with pytest.raises(TableError, match="There is no table"):
        listing.table(tmp_path / "absent.parquet")


class Repeating(SimulatedProfiler):
    """The simulated device as one that repeats ops."""

    repeats = (2, 4, 8)


def test_a_table_with_slopes_tells_how_many_rows_each_way_prices(
    tmp_path: Path, hwnas_in: Callable[..., Any]
) -> None:
    """On the page and as JSON; a table without them has no such line (above)."""
    stem, *rest = [
        conv_norm_activation(
            tensor, channels, kernel=kernel, precision=Precision("fp32"), activation="hard_swish"
        )
        for tensor, channels, kernel in [
            (Tensor(3, 9, 9), 8, 3),
            *((Tensor(8, 9, 9), channels, kernel) for channels in (8, 12) for kernel in (1, 3, 5)),
            (Tensor(12, 9, 9), 12, 3),
        ]
    ]
    path, protocol = tmp_path / "simulated.parquet", Protocol(rounds=1, max_rounds=1, min_runs=1)
    table = build_rows(Repeating(), [stem, *rest], path, protocol)
    found = json_of(listing.table(path))
    assert found["protocol"]["repeats"] == [2, 4, 8]
    slope_error = found["inside"].pop("slope_error")
    assert found["inside"] == {"slope": 4, "host": 3, "boundary": 0, "alone": 1}
    assert 0 <= slope_error < 1e-3
    shown = hwnas_in(tmp_path, "tables", "show", path.name, "--json").content
    assert shown["inside"] == found["inside"] | {"slope_error": slope_error}
    schema = json.loads((ROOT / "docs" / "output.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(shown)
    line = f"4 by slopes (standard error {slope_error:.1%} in the middle), 3 behind a host, 1 as"
    assert line in " ".join(hwnas_in(tmp_path, "tables", "show", path.name).out.split())
    for key in [key for key, row in table.chains.items() if len({op.key for op in row.chain}) == 1]:
        del table.chains[key]
    table.save(path)
    found = json_of(listing.table(path))
    assert found["inside"] == {
        "slope": 0, "host": 4, "boundary": 3, "alone": 1, "slope_error": None,
    }  # fmt: skip
    told = " ".join(hwnas_in(tmp_path, "tables", "show", path.name).out.split())
    assert "4 behind a host, 3 by their boundary, 1 as they do alone" in told
    assert "by slopes" not in told


# ---- runs

CONFIG = RunConfig(
    space="mobile-tiny",
    space_fingerprint="00ff",
    data="folder:photos",
    data_fingerprint="11ee",
    image_size=32,
    device="cpu",
    threads=2,
    batch=4,
    method="spos",
    recipe=recipe({"name": "quick", "finalists": 1}).model_dump(),
    seed=3,
)
CERTIFICATE = {
    "limits": {"latency_ms": 0.2},
    "measured": {"median_ms": 0.18, "stable": True},
    "accuracy": {"test": 0.97, "search_val": 0.98},
}


def run_in(root: Path, name: str = "r", **changes: Any) -> Run:
    return open_run(CONFIG.model_copy(update=changes), root / name)


def result_in(run: Run, name: str, **files: Any) -> Path:
    """A result with files of JSON, or of bytes as they are."""
    folder = run.result(name)
    folder.mkdir(parents=True)
    for stem, content in files.items():
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / f"{stem}.json").write_bytes(raw)
    return folder


def test_a_run_is_told_with_what_it_is_of_and_its_results(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    plain = {
        "run": str(run.path),
        "space": "mobile-tiny",
        "data": "folder:photos",
        "device": "cpu",
        "threads": 2,
        "batch": 4,
        "method": "spos",
        "recipe": "quick",
        "seed": 3,
        "trained": False,
        "results": [],
    }
    assert json_of(listing.runs(tmp_path)) == [plain]
    run.supernet.write_bytes(b"weights")
    done = result_in(run, "latency_ms=0.2", certificate=CERTIFICATE,
                     finalists={"limits": {"latency_ms": 0.2}, "finalists": []})  # fmt: skip
    result_in(run, "params=5.0", finalists={"limits": {"params": 5.0}, "finalists": []})
    result_in(run, "started")
    assert json_of(listing.runs(tmp_path)) == [
        {
            **plain,
            "trained": True,
            "results": [
                {
                    "result": "latency_ms=0.2",
                    "limits": {"latency_ms": 0.2},
                    "measured_ms": 0.18,
                    "test": 0.97,
                    "model": str(done / "model.onnx"),
                },
                {
                    "result": "params=5.0",
                    "limits": {"params": 5.0},
                    "measured_ms": None,
                    "test": None,
                    "model": None,
                },
                {"result": "started", "limits": {}, "measured_ms": None, "test": None,
                 "model": None},
            ],
        }
    ]  # fmt: skip


def test_runs_are_listed_newest_first_without_the_damaged_ones(tmp_path: Path) -> None:
    for number, seconds in enumerate((30, 10, 20)):
        run = run_in(tmp_path, f"r{number}", seed=number)
        os.utime(run.path / "config.yaml", (1_700_000_000 - seconds,) * 2)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.yaml").write_text("seed: [")
    (tmp_path / "empty").mkdir()
    assert [item["seed"] for item in listing.runs(tmp_path)] == [1, 2, 0]
    assert listing.runs(tmp_path / "absent") == []


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"\xff\xfe", b"null", b"[1, 2]", b'"text"', b"5", b"{}",
        b'{"measured": null}', b'{"measured": 5, "accuracy": [1]}', b'{"limits": null}',
        b'{"limits": "none", "accuracy": {"test": null}}',
    ],
)  # fmt: skip
@pytest.mark.parametrize("stem", ["certificate", "finalists"])
def test_a_result_with_a_damaged_file_is_listed_without_what_it_held(
    stem: str, content: bytes, tmp_path: Path
) -> None:
    run = run_in(tmp_path)
    files = {"certificate": CERTIFICATE, "finalists": {"limits": {"latency_ms": 0.2}}}
    result_in(run, "damaged", **{**files, stem: content})
    result_in(run, "whole", **files)
    (found,) = json_of(listing.runs(tmp_path))
    damaged, whole = found["results"]
    assert whole["measured_ms"] == 0.18
    if stem == "certificate":
        assert (damaged["measured_ms"], damaged["test"]) == (None, None)
        assert isinstance(damaged["limits"], dict)
    else:
        assert damaged == {**whole, "result": "damaged",
                           "model": str(run.result("damaged") / "model.onnx")}  # fmt: skip


def test_a_file_in_the_way_of_a_result_is_listed_as_one_without_anything(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    (run.path / "results").mkdir()
    (run.path / "results" / "notes.txt").write_text("mine")
    (found,) = json_of(listing.runs(tmp_path))
    assert found["results"] == [
        {"result": "notes.txt", "limits": {}, "measured_ms": None, "test": None, "model": None}
    ]


def test_a_run_whose_recipe_has_no_name_is_listed(tmp_path: Path) -> None:
    run = run_in(tmp_path)
    content = {**CONFIG.model_dump(), "recipe": {"supernet": {"steps": 3}}}
    (run.path / "config.yaml").write_text(yaml.safe_dump(content))
    (found,) = json_of(listing.runs(tmp_path))
    assert found["recipe"] is None
