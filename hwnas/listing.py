"""What is there: devices, spaces, tables, runs. Each as plain data, for people and for JSON."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pandas as pd

from hwnas.costs.feasible import reachable
from hwnas.costs.limits import COUNTED, counted_cost
from hwnas.spaces.registry import SPACES, image_size, load_space
from hwnas.store import Run, list_runs
from latency_tables.difference import difference as compared
from latency_tables.files import read_object, write_atomically
from latency_tables.reference import shipped
from latency_tables.slopes import Way
from latency_tables.table import LatencyTable
from profilers.build import table_lock
from profilers.devices import DEVICES, open_profiler
from profilers.host import usable_cores
from quant.errors import InvalidInput


def devices() -> list[dict[str, Any]]:
    """Every device, whether it can be measured here, and what it is or why not."""
    found: list[dict[str, Any]] = []
    for name in DEVICES:
        try:
            profiler = open_profiler(name)
            host = profiler.host()
        except InvalidInput as error:
            found.append({"device": name, "usable": False, "about": str(error)})
        else:
            cores = f", {usable_cores()} usable cores" if name == "cpu" else ""
            layer = f", memory by {profiler.memory_layer}" if profiler.memory_layer else ""
            about = f"{host.cpu}{cores}, {host.runtime} {host.runtime_version}{layer}"
            found.append({"device": name, "usable": True, "about": about, "flags": host.flags})
    return found


def spaces(name: str | None = None, *, classes: int = 10) -> list[dict[str, Any]]:
    """The presets, or one space by name or path, with what their networks count."""
    found: list[dict[str, Any]] = []
    for known in [name] if name else SPACES:
        size = image_size(known)
        space = load_space(known, classes=classes, image_channels=3, size=size)
        ranges = {cost: reachable(space, counted_cost(space, cost)) for cost in COUNTED}
        found.append(
            {
                "space": known,
                "image_size": size,
                "positions": len(space.positions),
                "genes": {gene.name: list(gene.choices) for gene in space.genes},
                "rows": len(space.lattice.ops),
                "architectures": float(space.count),
                "smallest": {cost: r.smallest for cost, r in ranges.items()},
                "largest": {cost: r.largest for cost, r in ranges.items()},
            }
        )
    return found


def tables(folder: Path) -> list[dict[str, Any]]:
    """Every table of a folder, with its host and the quality of its latency models."""
    return _tables(sorted(folder.glob("*.parquet")))


def shipped_tables() -> list[dict[str, Any]]:
    """The tables that come with the package, told alike."""
    return _tables(shipped())


def _tables(paths: Sequence[Path]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for path in paths:
        try:
            table = LatencyTable.load(path)
        except InvalidInput as error:
            found.append({"table": str(path), "error": str(error)})
            continue
        host = table.host
        models = {
            name: {"mean_error": m.quality.mean_error, "tau": m.quality.tau}
            for name, m in table.models.items()
        }
        found.append(
            {
                "table": str(path),
                "device": host.device,
                "cpu": host.cpu,
                "runtime": f"{host.runtime} {host.runtime_version}",
                "threads": host.threads,
                "batch": host.batch,
                "rows": len(table.rows),
                "unstable_rows": sum(not row.stable for row in table.rows.values()),
                "models": models,
            }
        )
    return found


def table(path: Path) -> dict[str, Any]:
    """Everything in a table: host, protocol, latency models, rows; where it has slopes, how many
    rows cost inside a network what those tell, and how many what else does.
    """
    found = LatencyTable.load(path)
    told = {"inside": _inside(found)} if found.repeats else {}
    return {
        "table": str(path),
        "host": asdict(found.host),
        "protocol": found.protocol,
        "models": {name: model.to_dict() for name, model in found.models.items()},
        "reports": found.reports,
        "pace_us": found.pace_us,
        **told,
        "rows": [asdict(row) for row in found.rows.values()],
        "chains": [asdict(row) for row in found.chains.values()],
    }


def _inside(found: LatencyTable) -> dict[str, Any]:
    """How many rows each way prices, and the median error of the slopes as a fraction of them."""
    costs = found.inside([row.chain[0] for row in found.rows.values()])
    ways = Counter(cost.way for cost in costs)
    errors = [cost.error_us / cost.us for cost in costs if cost.way == "slope"]
    counts = {way: ways[way] for way in get_args(Way)}
    return counts | {"slope_error": float(np.median(errors)) if errors else None}


def difference(first: Path, second: Path) -> dict[str, Any]:
    """Where the second table differs from the first."""
    return asdict(compared(LatencyTable.load(first), LatencyTable.load(second)))


def merge(first: Path, second: Path, into: Path) -> int:
    """Write both tables' rows as one table; the number of its rows.

    Raises TableError where their conditions differ, InvalidInput where `into` is there and is
    neither of them.
    """
    if into.exists() and into.resolve() not in (first.resolve(), second.resolve()):
        raise InvalidInput(f"{into} is there already.", accepted="a new file, or one of the two")
    merged = LatencyTable.load(first).merge(LatencyTable.load(second))
    with table_lock(into):
        merged.save(into)
    return len(merged.rows)


def export_csv(path: Path, csv: Path) -> int:
    """Write a table's rows, then its chains, as CSV; how many lines there are under the head.

    Raises InvalidInput where `csv` is the table itself.
    """
    found = LatencyTable.load(path)
    if csv.resolve() == path.resolve():
        raise InvalidInput(f"--csv {csv} is the table itself.", accepted="another file")
    rows = [asdict(row) for row in (*found.rows.values(), *found.chains.values())]
    frame = pd.DataFrame(rows)
    write_atomically(csv, lambda temporary: frame.to_csv(temporary, index=False))
    return len(frame)


def runs(root: Path) -> list[dict[str, Any]]:
    """Every run under a folder, newest first, with its results."""
    return [_run(run) for run in list_runs(root)]


def _run(run: Run) -> dict[str, Any]:
    config = run.config
    return {
        "run": str(run.path),
        "space": config.space,
        "data": config.data,
        "device": config.device,
        "threads": config.threads,
        "batch": config.batch,
        "method": config.method,
        "recipe": config.recipe.get("name"),
        "seed": config.seed,
        "trained": run.supernet.exists(),
        "results": [_result(path) for path in sorted((run.path / "results").glob("*"))],
    }


def _result(path: Path) -> dict[str, Any]:
    certificate, finalists = _json(path / "certificate.json"), _json(path / "finalists.json")
    return {
        "result": path.name,
        "limits": _object((certificate or finalists).get("limits")),
        "measured_ms": _object(certificate.get("measured")).get("median_ms"),
        "test": _object(certificate.get("accuracy")).get("test"),
        "model": str(path / _object(certificate.get("engine")).get("file", "model.onnx"))
        if certificate
        else None,
    }


def _json(path: Path) -> dict[str, Any]:
    """A file's object; empty where it is not there or not whole: listing refuses nothing."""
    try:
        return read_object(path)
    except (OSError, ValueError):
        return {}


def _object(content: Any) -> dict[str, Any]:
    return content if isinstance(content, dict) else {}
