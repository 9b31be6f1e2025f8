"""The whole path, on the simulated device and on a small space of this file's own."""

import contextlib
import dataclasses
import json
import sqlite3
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import pytest

import hwnas.run
from hwnas import loop
from hwnas.costs.feasible import FeasibleSet
from hwnas.data import as_input, digits
from hwnas.export.onnx_file import Agreement
from hwnas.history import History
from hwnas.run import Job, Request, number
from hwnas.spaces.base import Architecture
from hwnas.store import Run
from hwnas.supernet.evaluator import Evaluation, Evaluator
from latency_tables.table import LatencyTable
from profilers import simulated
from profilers.build import Progress, quiet
from profilers.measure import Measurement
from quant.errors import HwnasError, InvalidInput, Unreachable, Unstable

SPACE = str(Path(__file__).parents[2] / "examples" / "own_space.py") + ":space"

Measured = Callable[..., list[Measurement]]
Prepare = Callable[[Path], Path]


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


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, profiled: Prepare
) -> tuple[Job, Run, dict[str, Any]]:
    return certified(profiled(tmp_path_factory.mktemp("finished")))


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
    assert content["trained_on"] == ["cpu"]
    assert content["counts"]["size_bytes"] == shipped.stat().st_size
    ops = job.space.lower(job.space.parse(content["architecture"]))
    assert content["counts"]["macs"] == sum(op.macs for op in ops)
    assert content["counts"]["bitops"] == summary["bitops"] == sum(op.bitops for op in ops)
    blocks = sum(op.bitops for op in ops[1:])  # its stem is always in fp32
    assert content["counts"]["bitops_searched"] == summary["bitops_searched"] == blocks
    told = dict(hwnas.run.result_rows(summary))["BitOPs"]
    assert (
        told == f"{number(summary['bitops'])} in all layers, {number(blocks)} where the "
        "precision is searched"
    )
    assert told in Path(summary["report"]).read_text()


@pytest.mark.parametrize("bins", [0, 3])
def test_the_log_tells_how_often_binned_training_draws_each_value(
    bins: int, tmp_path: Path
) -> None:
    recipe = {"name": "smoke", "supernet": {"steps": 1, "cost_bins": bins}}
    job = job_in(tmp_path, recipe=recipe)
    run = hwnas.run.open_run(job)
    hwnas.run.train(job, run)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    told = [line["marginals"] for line in lines if line["event"] == "paths"]
    assert len(told) == (bins > 0)
    for marginals in told:
        assert marginals.keys() == {gene.name for gene in job.space.genes}
        for gene in job.space.genes:
            assert list(marginals[gene.name]) == list(gene.choices)
            assert sum(marginals[gene.name].values()) == pytest.approx(1)
        assert 0.3 < marginals["head.precision"]["fp32"] < 0.7, "no precision changes the MACs"


def test_no_row_of_the_history_is_over_its_limit(
    finished: tuple[Job, Run, dict[str, Any]],
) -> None:
    _, run, _ = finished
    with sqlite3.connect(run.history) as db:
        (proposals,) = db.execute("SELECT COUNT(*) FROM proposals").fetchone()
        bounds = db.execute("SELECT upper, limit_value FROM bounds").fetchall()
    assert len(bounds) == proposals > 0
    assert all(upper <= limit for upper, limit in bounds)


@pytest.mark.usefixtures("quick")
def test_an_infeasible_architecture_is_never_scored(
    tmp_path: Path, profiled: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(profiled(tmp_path))
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


@pytest.mark.usefixtures("quick")
def test_an_unreachable_limit_is_answered_before_any_training(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    smallest = job.latency_range().smallest
    run = hwnas.run.open_run(job)
    start = time.monotonic()
    with pytest.raises(Unreachable, match=f"{smallest:.6g}"):
        hwnas.run.search(job, run, [job.latency_limit(smallest * 0.99)])
    assert time.monotonic() - start < 10
    assert not run.supernet.exists()


@pytest.mark.usefixtures("quick")
def test_a_limit_just_above_the_smallest_reachable_succeeds(
    tmp_path: Path, profiled: Prepare
) -> None:
    job = job_in(profiled(tmp_path))
    limit = job.latency_limit(job.latency_range().smallest * 1.02)
    summary = hwnas.run.search_to_certificate(job, hwnas.run.open_run(job), [limit])
    assert summary["measured"]["median_ms"] <= limit.value


@pytest.mark.usefixtures("quick")
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
    """A progress that raises at the nth call of a stage."""

    def __init__(self, stage: str, at: int, error: BaseException) -> None:
        self.stage, self.left, self.error = stage, at, error

    def __call__(self, label: str, done: int, total: int) -> None:
        if label.startswith(self.stage):
            self.left -= 1
            if self.left == 0:
                raise self.error


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("stage", "at", "error"),
    [
        ("timing ops", 40, KeyboardInterrupt()),
        ("scoring architectures (random)", 3, ValueError("the caller's own")),
        ("retraining", 7, MemoryError()),
    ],
)
def test_a_run_that_its_caller_stopped_ends_as_an_undisturbed_one(
    tmp_path: Path,
    profiled: Prepare,
    finished: tuple[Job, Run, dict[str, Any]],
    stage: str,
    at: int,
    error: BaseException,
) -> None:
    """Through the library; processes that are really killed are in test_stopping.py."""
    if stage != "timing ops":
        profiled(tmp_path)
    with pytest.raises(type(error)) as caught:
        certified(tmp_path, Stop(stage, at, error))
    assert caught.value is error
    assert_same(certified(tmp_path)[2], finished)


def assert_same(summary: dict[str, Any], finished: tuple[Job, Run, dict[str, Any]]) -> None:
    """The same network with the same weights, by another way."""
    _, _, other = finished
    for name in ("architecture", "accuracy", "measured", "search_val_shared_weights", "rejected"):
        assert summary[name] == other[name], name
    assert Path(summary["model"]).read_bytes() == Path(other["model"]).read_bytes()


@pytest.mark.usefixtures("quick")
def test_the_stages_one_by_one_end_as_the_whole_path(
    tmp_path: Path, profiled: Prepare, finished: tuple[Job, Run, dict[str, Any]]
) -> None:
    job = job_in(profiled(tmp_path))
    run = hwnas.run.open_run(job)
    hwnas.run.train(job, run)
    limits = [job.latency_limit(middle(job))]
    finalists = hwnas.run.search(job, run, limits)
    result = run.best()
    assert not (result / "finalist-0.pt").exists()
    networks = hwnas.run.retrain_finalists(job, run, result)
    assert len(networks) == len(finalists) == job.recipe.finalists
    assert not (result / "finalist-0.onnx").exists()
    candidates = hwnas.run.export(job, run, result)
    assert [candidate.own.path.name for candidate in candidates] == [
        "finalist-0.onnx",
        "finalist-1.onnx",
    ]
    assert not (result / "certificate.json").exists()
    hwnas.run.verify(job, run, limits)
    assert_same(hwnas.run.search_to_certificate(job, run, limits), finished)


def test_a_finished_stage_does_nothing_again(
    finished: tuple[Job, Run, dict[str, Any]], tmp_path: Path
) -> None:
    job, run, summary = finished
    told: list[str] = []
    again = Job(job.request, lambda label, _done, _total: told.append(label))
    limits = [again.latency_limit(middle(job))]
    result = Path(summary["model"]).parent
    before = {path: path.stat().st_mtime_ns for path in result.iterdir()}
    hwnas.run.train(again, run)
    hwnas.run.search(again, run, limits)
    hwnas.run.retrain_finalists(again, run, result)
    assert hwnas.run.search_to_certificate(again, run, limits) == summary
    assert told == []
    assert {path: path.stat().st_mtime_ns for path in result.iterdir()} == before


@pytest.mark.usefixtures("quick")
def test_the_order_of_limits_makes_no_difference(tmp_path: Path, profiled: Prepare) -> None:
    job = job_in(profiled(tmp_path))
    values = {"params": 40_000.0, "macs": 1e6, "latency_ms": middle(job)}
    limits = job.limits(values)
    backwards = list(reversed(job.limits(dict(reversed(values.items())))))
    assert [limit.cost.name for limit in limits] != [limit.cost.name for limit in backwards]
    assert hwnas.run.limits_name(limits) == hwnas.run.limits_name(backwards)
    run = hwnas.run.open_run(job)
    assert hwnas.run.search(job, run, limits) == hwnas.run.search(job, run, backwards)
    assert len(list((run.path / "results").iterdir())) == 1
    other = hwnas.run.limits_name(job.limits({**values, "params": 40_000.000001}))
    assert other != hwnas.run.limits_name(limits), "another limit is another result"


@pytest.mark.usefixtures("quick")
def test_proposals_are_kept_before_the_first_of_them_is_scored(
    tmp_path: Path, profiled: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(profiled(tmp_path))
    run = hwnas.run.open_run(job)
    limits = [job.latency_limit(middle(job))]

    def broken(self: Evaluator, architecture: Architecture) -> Evaluation:
        raise ZeroDivisionError

    monkeypatch.setattr(Evaluator, "__call__", broken)
    with pytest.raises(ZeroDivisionError):
        hwnas.run.search(job, run, limits)
    (name,) = {x for x in loop.searches(job, limits).values() if x.startswith("spos")}
    with contextlib.closing(History(run.history)) as history:
        (first,) = history.generations(name)
        assert len(first) == job.recipe.population
        assert all(history.score(genes) is None for genes in first)
    assert not run.result(hwnas.run.limits_name(limits)).exists()


def test_the_same_seed_gives_the_same_model_under_another_hash_seed(
    searched: tuple[Path, Any], searched_by_process: tuple[Path, Any]
) -> None:
    """Once in this process and once in one of its own, from the table to the file."""
    folder, answer = searched
    one = folder / answer.content["model"]
    (other,) = searched_by_process[0].glob("run/results/*/model.onnx")
    architectures = [json.loads(x.with_name("architecture.json").read_text()) for x in (one, other)]
    assert architectures[0] == architectures[1]
    assert one.read_bytes() == other.read_bytes()


@pytest.mark.usefixtures("quick")
def test_a_table_measured_anew_is_searched_anew(tmp_path: Path, profiled: Prepare) -> None:
    job, run, summary = certified(profiled(tmp_path))
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


@pytest.mark.usefixtures("quick")
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


def slower(measured_here: Measured, ratio: float) -> Measured:
    """A machine that takes so many times as long as its table predicts."""

    def measure(job: Job, paths: Sequence[Path]) -> list[Measurement]:
        return [
            dataclasses.replace(m, latency_us=ratio * m.latency_us, median_us=ratio * m.median_us)
            for m in measured_here(job, paths)
        ]

    return measure


@pytest.mark.usefixtures("quick")
def test_once_all_finalists_measure_over_the_limit_the_next_search_looks_below(
    tmp_path: Path, profiled: Prepare, monkeypatch: pytest.MonkeyPatch, measured_here: Measured
) -> None:
    job = job_in(profiled(tmp_path))
    run = hwnas.run.open_run(job)
    value = middle(job)
    first = hwnas.run.search(job, run, [job.latency_limit(value)])
    ratio = 1.02 * value / min(finalist.latency_ms for finalist in first)
    monkeypatch.setattr("hwnas.ship.measure", slower(measured_here, ratio))
    with pytest.raises(Unstable, match="measure over") as caught:
        hwnas.run.search_to_certificate(job, run, [job.latency_limit(value)])
    assert "a bound that these measurements raised" in caught.value.next_step
    again = job_in(tmp_path)
    summary = hwnas.run.search_to_certificate(again, run, [again.latency_limit(value)])
    assert summary["exit_code"] == 0
    assert summary["measured"]["latency_ms"] <= value
    assert max(f.latency_ms for f in loop.read_finalists(run.best())) < value / ratio * 1.001


@pytest.mark.usefixtures("quick")
def test_an_answer_stays_as_it_is_when_its_measurements_raise_the_bound(
    tmp_path: Path, profiled: Prepare, monkeypatch: pytest.MonkeyPatch, measured_here: Measured
) -> None:
    """One finalist is over its bound and over the limit; the other ships."""
    job = job_in(profiled(tmp_path))
    run = hwnas.run.open_run(job)
    value = middle(job)

    def first_is_slow(job: Job, paths: Sequence[Path]) -> list[Measurement]:
        return [
            *slower(measured_here, 1.3)(job, paths[:1]),
            *measured_here(job, paths[1:]),
        ]

    with monkeypatch.context() as patch:
        patch.setattr("hwnas.ship.measure", first_is_slow)
        summary = hwnas.run.search_to_certificate(job, run, [job.latency_limit(value)])
    later = job_in(tmp_path)
    assert later.model.upper_ratio > job.model.upper_ratio
    assert hwnas.run.estimate(later, run, [later.latency_limit(value)]).minutes == 0
    monkeypatch.setattr("hwnas.loop.run_strategy", None)
    monkeypatch.setattr("hwnas.ship.measure", None)
    again = hwnas.run.search_to_certificate(later, run, [later.latency_limit(value)])
    assert again == summary


def test_finalists_that_all_measure_over_the_limit_are_not_shipped(
    tmp_path: Path, profiled: Prepare, monkeypatch: pytest.MonkeyPatch, measured_here: Measured
) -> None:
    job = job_in(profiled(tmp_path))
    run = hwnas.run.open_run(job)
    limit = job.latency_limit(middle(job))
    hwnas.run.search(job, run, [limit])
    monkeypatch.setattr(simulated, "CALL_US", 10_000.0)
    monkeypatch.setattr("hwnas.ship.measure", measured_here)
    with pytest.raises(Unstable, match="measure over"):
        hwnas.run.verify(job, run, [limit])
    assert not (run.best() / "model.onnx").exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("over", [0, 1])
def test_a_finalist_that_measures_over_the_limit_is_not_the_one_that_ships(
    over: int,
    finished: tuple[Job, Run, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    measured_here: Measured,
) -> None:
    job, run, summary = finished
    limit = job.latency_limit(summary["limits"]["latency_ms"]["value"])
    result = Path(summary["model"]).parent

    def one_is_slow(job: Job, paths: Sequence[Path]) -> list[Measurement]:
        found = measured_here(job, paths)
        slow = 2000 * limit.value
        found[over] = dataclasses.replace(found[over], latency_us=slow, median_us=slow, p95_us=slow)
        return found

    with monkeypatch.context() as patch:
        patch.setattr("hwnas.ship.measure", one_is_slow)
        content = hwnas.run.verify(job, run, [limit])
    shipped = result / f"finalist-{1 - over}"
    assert (result / "model.onnx").read_bytes() == shipped.with_suffix(".onnx").read_bytes()
    assert (result / "weights.pt").read_bytes() == shipped.with_suffix(".pt").read_bytes()
    finalist = loop.read_finalists(result)[1 - over]
    assert content["architecture"] == job.space.describe(Architecture(finalist.genes))
    hwnas.run.verify(job, run, [limit])


def test_a_file_that_does_not_answer_as_its_network_is_not_shipped(
    finished: tuple[Job, Run, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, run, summary = finished
    strict = Job(
        dataclasses.replace(job.request, recipe={"name": "smoke", "least_agreement": 0.97})
    )
    agreed = Agreement(images=400, same_class=0.96, largest_difference=1.0, logit_range=2.0)
    monkeypatch.setattr("hwnas.files.agreement", lambda *_: agreed)
    before = Path(summary["certificate"]).read_bytes()
    with pytest.raises(HwnasError, match=r"finalist-0\.onnx answers as .* on 96\.0% of the images"):
        hwnas.run.export(strict, run, Path(summary["model"]).parent)
    assert Path(summary["certificate"]).read_bytes() == before


def test_a_certificate_of_another_host_is_refused(
    finished: tuple[Job, Run, dict[str, Any]], tmp_path: Path
) -> None:
    job, _, summary = finished
    content = json.loads(Path(summary["certificate"]).read_text())
    content["host"]["cpu"] = "another processor"
    (tmp_path / "certificate.json").write_text(json.dumps(content))
    (tmp_path / "model.onnx").write_bytes(Path(summary["model"]).read_bytes())
    with pytest.raises(InvalidInput, match=r"another host \(cpu: "):
        hwnas.run.remeasure(job, tmp_path)


# ---- a teacher


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("teacher", ["float", "largest"])
def test_retraining_with_a_teacher_goes_on_to_the_same_weights(
    teacher: str, tmp_path: Path, profiled: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while the teacher is trained, then while its pupil is; without it they differ."""
    monkeypatch.setattr("hwnas.training.CHECKPOINT_S", 0.0)
    weights = {}
    for name, kind in (("whole", teacher), ("parts", teacher), ("alone", "none")):
        recipe = {"name": "smoke", "finalists": 1, "evaluations": 6, "retrain": {"teacher": kind}}
        folder = profiled(tmp_path / name)
        job = job_in(folder, recipe=recipe)
        run = hwnas.run.open_run(job)
        hwnas.run.search(job, run, [job.latency_limit(middle(job))])
        result = run.best()
        stages = ["training the teacher"] * (kind == "float") + ["retraining"]
        for stage in stages if name == "parts" else []:
            job.progress = Stop(stage, 3, MemoryError())
            with pytest.raises(MemoryError):
                hwnas.run.retrain_finalists(job, run, result)
        job.progress = quiet
        (network,) = hwnas.run.retrain_finalists(job, run, result)
        weights[name] = network.state_dict()
        left = {path.name for path in result.glob("finalist-0*")}
        assert left == {"finalist-0.pt"} | ({"finalist-0.teacher.pt"} if kind == "float" else set())
    whole = weights["whole"]
    assert all(bool((value == weights["parts"][n]).all()) for n, value in whole.items())
    assert any(bool((value != weights["alone"][n]).any()) for n, value in whole.items())


# ---- bits


BITS = """
from hwnas.spaces.mobile import Stage, mobile

def space(*, classes, image_channels, size):
    stages = (Stage(1, 2, (8,)), Stage(1, 2, (16, 24)))
    return mobile("bits", stages, classes=classes, size=size, image_channels=image_channels,
                  stem_channels=8, head_channels=32, kernels=(3,), expansions=(3,),
                  precisions=PRECISIONS, skip=False)
"""


def test_a_search_over_bits_ships_a_file_and_says_what_they_bought(tmp_path: Path) -> None:
    """Rows, factors and predictions are those of the precisions that are executed; each w4a8 or
    w2a8 that ships is told to buy no time."""
    (tmp_path / "space.py").write_text(BITS.replace("PRECISIONS", '("w8a8", "w4a8", "w2a8")'))
    job = job_in(tmp_path, space=f"{tmp_path / 'space.py'}:space")
    run = hwnas.run.open_run(job)
    summary = hwnas.run.search_to_certificate(job, run, [job.latency_limit(1.0)])
    assert set(job.model.scales) == {"fp32", "w8a8"}
    assert {row.precision for row in job.table.rows.values()} == {"fp32", "w8a8"}
    chosen = {name for key, name in summary["architecture"].items() if "precision" in key}
    told = {sentence.split()[0] for sentence in summary["notes"]}
    assert told == chosen - {"w8a8"}
    assert told, "the seed finds a network with low-bit weights"
    page = Path(summary["report"]).read_text()
    rows = dict(hwnas.run.result_rows(summary))
    for sentence in summary["notes"]:
        assert "in the kernels of w8a8" in sentence
        assert sentence in page
    assert rows["note"] == summary["notes"][-1]
    content = json.loads(Path(summary["certificate"]).read_text())
    assert content["agreement"]["same_class"] >= 0.999
    assert content["agreement"]["largest_difference"] < 0.01 * content["agreement"]["logit_range"]
