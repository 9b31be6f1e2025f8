"""The whole path, on the simulated device and on a small space of this file's own."""

import dataclasses
import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import hwnas.run
from hwnas.costs.feasible import FeasibleSet
from hwnas.data import as_input, digits
from hwnas.run import Job, Request
from hwnas.spaces.base import Architecture
from hwnas.store import Run
from hwnas.supernet.evaluator import Evaluation, Evaluator
from latency_tables.table import LatencyTable
from profilers import simulated
from profilers.build import Progress, quiet
from profilers.measure import Measurement, summarise
from quant.errors import InvalidInput, Unreachable, Unstable

SPACE = str(Path(__file__).parents[2] / "examples" / "own_space.py") + ":space"


def job_in(folder: Path, progress: Progress = quiet, **fields: Any) -> Job:
    request = Request(
        **{"space": SPACE, "device": "simulated", "recipe": "smoke", **fields},
        tables=folder / "tables",
        run=folder / "run",
    )
    return Job(request, progress)


def middle(job: Job) -> float:
    found = job.latency_range()
    return (found.smallest + found.largest) / 2


def certified(folder: Path, progress: Progress = quiet) -> tuple[Job, Run, dict[str, Any]]:
    job = job_in(folder, progress)
    run = hwnas.run.open_run(job)
    limit = job.latency_limit(middle(job))
    return job, run, hwnas.run.search_to_certificate(job, run, [limit])


@pytest.fixture(scope="module", autouse=True)
def _two_threads() -> Iterator[None]:
    """Results are compared to the last bit, which holds for equal numbers of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Job, Run, dict[str, Any]]:
    return certified(tmp_path_factory.mktemp("finished"))


def test_the_summary_holds_what_a_caller_needs(finished: tuple[Job, Run, dict[str, Any]]) -> None:
    job, _, summary = finished
    (limit,) = summary["limits"].values()
    assert limit["binding"] is True
    assert summary["status"] == "ok"
    assert summary["exit_code"] == 0
    assert summary["predicted"]["latency_ms"] <= summary["predicted"]["upper_latency_ms"]
    assert summary["predicted"]["upper_latency_ms"] <= limit["value"]
    assert summary["measured"]["median_ms"] <= limit["value"]
    assert set(summary["accuracy"]) >= {"search_val", "test"}
    assert summary["evaluated"] == job.recipe.evaluations
    assert summary["rejected"] >= 0
    assert summary["feasible_min"]["latency_ms"] < limit["value"]
    assert limit["value"] < summary["feasible_max"]["latency_ms"]
    assert summary["method"]["name"] == "spos"
    assert summary["method"]["evidence"]
    assert Path(summary["model"]).is_file()
    assert Path(summary["certificate"]).is_file()
    assert Path(summary["report"]).read_text().startswith("<!doctype html>")


def test_plain_onnxruntime_gives_the_certificates_accuracy(
    finished: tuple[Job, Run, dict[str, Any]],
) -> None:
    _, _, summary = finished
    session = onnxruntime.InferenceSession(summary["model"], providers=["CPUExecutionProvider"])
    with digits().final() as images:
        logits = session.run(None, {"input": as_input(images.x)})[0]
        assert (logits.argmax(1) == images.y).mean() == summary["accuracy"]["test"]


def test_the_certificate_names_what_it_certifies(
    finished: tuple[Job, Run, dict[str, Any]],
) -> None:
    job, run, summary = finished
    content = json.loads(Path(summary["certificate"]).read_text())
    shipped = Path(summary["model"])
    assert content["hashes"]["model"] == hwnas.run.certificates.sha256(shipped)
    assert content["hashes"]["table"] == hwnas.run.certificates.sha256(run.table)
    assert content["host"]["device"] == "simulated"
    assert content["counts"]["size_bytes"] == shipped.stat().st_size
    ops = job.space.lower(job.space.parse(content["architecture"]))
    assert content["counts"]["macs"] == sum(op.macs for op in ops)


def test_no_row_of_the_history_is_over_its_limit(
    finished: tuple[Job, Run, dict[str, Any]],
) -> None:
    _, run, _ = finished
    with sqlite3.connect(run.history) as db:
        (proposals,) = db.execute("SELECT COUNT(*) FROM proposals").fetchone()
        bounds = db.execute("SELECT upper, limit_value FROM bounds").fetchall()
    assert len(bounds) == proposals > 0
    assert all(upper <= limit for upper, limit in bounds)


def test_an_infeasible_architecture_is_never_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(tmp_path)
    limit = job.latency_limit(middle(job))
    feasible = FeasibleSet(job.space, [limit])
    scored: list[Architecture] = []
    score = Evaluator.__call__

    def spy(self: Evaluator, architecture: Architecture) -> Evaluation:
        assert feasible.contains([architecture])[0], "an infeasible architecture was scored"
        scored.append(architecture)
        return score(self, architecture)

    monkeypatch.setattr(Evaluator, "__call__", spy)
    hwnas.run.search(job, hwnas.run.open_run(job), [limit])
    assert len(scored) == len(set(scored)) >= job.recipe.evaluations


def test_an_unreachable_limit_is_answered_before_any_training(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    smallest = job.latency_range().smallest
    run = hwnas.run.open_run(job)
    start = time.monotonic()
    with pytest.raises(Unreachable, match=f"{smallest:.6g}"):
        hwnas.run.search(job, run, [job.latency_limit(smallest * 0.99)])
    assert time.monotonic() - start < 10
    assert not run.supernet.exists()


def test_a_limit_just_above_the_smallest_reachable_succeeds(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    limit = job.latency_limit(job.latency_range().smallest * 1.02)
    summary = hwnas.run.search_to_certificate(job, hwnas.run.open_run(job), [limit])
    assert summary["measured"]["median_ms"] <= limit.value


def test_a_second_limit_uses_the_same_supernet(finished: tuple[Job, Run, dict[str, Any]]) -> None:
    job, run, _ = finished
    before = run.supernet.stat().st_mtime_ns
    limit = job.latency_limit(job.latency_range().smallest * 1.3)
    summary = hwnas.run.search_to_certificate(job, run, [limit])
    assert run.supernet.stat().st_mtime_ns == before
    assert summary["measured"]["median_ms"] <= limit.value
    assert run.best() == Path(summary["model"]).parent


def test_verify_measures_the_shipped_file_again(
    finished: tuple[Job, Run, dict[str, Any]], tmp_path: Path
) -> None:
    job, _, summary = finished
    result = Path(summary["model"]).parent
    again = hwnas.run.remeasure(job, result)
    assert again["accuracy"]["test"] == summary["accuracy"]["test"]
    for name in ("certificate.json", "model.onnx"):
        (tmp_path / name).write_bytes((result / name).read_bytes())
    with (tmp_path / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(InvalidInput, match="not the file that its certificate describes"):
        hwnas.run.remeasure(job, tmp_path)


class Stop:
    """A progress that interrupts at the nth call of a stage."""

    def __init__(self, stage: str, at: int) -> None:
        self.stage, self.left = stage, at

    def __call__(self, label: str, done: int, total: int) -> None:
        if label.startswith(self.stage):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ("timing ops", 40),
        ("timing whole", 2),
        ("training the supernet", 10),
        ("scoring architectures (spos)", 8),
        ("scoring architectures (random)", 3),
        ("retraining", 7),
    ],
)
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    tmp_path: Path, finished: tuple[Job, Run, dict[str, Any]], stage: str, at: int
) -> None:
    _, undisturbed, _ = finished
    with pytest.raises(KeyboardInterrupt):
        certified(tmp_path, Stop(stage, at))
    job, _, summary = certified(tmp_path)
    name = hwnas.run.limits_name([job.latency_limit(middle(job))])
    other = json.loads((undisturbed.result(name) / "certificate.json").read_text())
    assert summary["architecture"] == other["architecture"]
    assert summary["accuracy"] == other["accuracy"]
    model = np.frombuffer(Path(summary["model"]).read_bytes(), np.uint8)
    assert hwnas.run.certificates.sha256(Path(summary["model"])) == other["hashes"]["model"]
    assert model.size == other["counts"]["size_bytes"]


def test_the_same_seed_gives_the_same_model_under_another_hash_seed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "hwnas", "search", "--space", SPACE, "--device", "simulated"]
    command += ["--recipe", "smoke", "--limit-fraction", "0.5", "--json", "--run", "run"]

    def search(hash_seed: str) -> dict[str, Any]:
        folder = tmp_path / hash_seed
        folder.mkdir()
        answer = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            capture_output=True,
            text=True,
            check=True,
        )
        summary: dict[str, Any] = json.loads(answer.stdout)
        summary["hash"] = hwnas.run.certificates.sha256(folder / summary["model"])
        return summary

    first, second = search("1"), search("2")
    assert first["architecture"] == second["architecture"]
    assert first["hash"] == second["hash"]


def test_a_table_measured_anew_is_searched_anew(tmp_path: Path) -> None:
    job, run, summary = certified(tmp_path)
    result = Path(summary["model"]).parent
    path = job.table_path
    slower = LatencyTable.load(path)
    for key, row in slower.rows.items():
        fields = {"median_us": row.median_us * 1.5, "p95_us": row.p95_us * 1.5}
        slower.rows[key] = dataclasses.replace(row, **fields)
    slower.save(path)
    again = job_in(tmp_path)
    limit = again.latency_limit(summary["limits"]["latency_ms"]["value"])
    assert again.table_id != job.table_id
    finalists = hwnas.run.search(again, run, [limit])
    assert all(finalist.upper_latency_ms <= limit.value for finalist in finalists)
    assert [path.name for path in result.iterdir()] == ["finalists.json"]


def test_an_unstable_measurement_is_taken_again(
    finished: tuple[Job, Run, dict[str, Any]],
) -> None:
    job, run, summary = finished
    file = Path(summary["certificate"])
    content = json.loads(file.read_text())
    content["measured"]["stable"] = False
    file.write_text(json.dumps(content))
    limit = job.latency_limit(summary["limits"]["latency_ms"]["value"])
    again = hwnas.run.search_to_certificate(job, run, [limit])
    assert again["measured"]["stable"] is True
    assert json.loads(file.read_text())["measured"]["stable"] is True


def test_finalists_that_all_measure_over_the_limit_are_not_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(tmp_path)
    run = hwnas.run.open_run(job)
    limit = job.latency_limit(middle(job))
    hwnas.run.search(job, run, [limit])
    monkeypatch.setattr(simulated, "CALL_US", 10_000.0)
    monkeypatch.setattr("hwnas.ship.measure", measured_here)
    with pytest.raises(Unstable, match="measure over"):
        hwnas.run.verify(job, run, [limit])
    assert not (run.best() / "model.onnx").exists()


def measured_here(job: Job, paths: Sequence[Path]) -> list[Measurement]:
    """The same measurement without fresh processes, so that this process's device counts."""
    found = []
    for path in paths:
        with job.profiler.prepare(onnx.load(path)) as session:
            found.append(summarise([session.block(job.recipe.protocol)], job.recipe.protocol))
    return found
