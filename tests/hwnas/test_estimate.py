"""What is left of a search: counted down to zero, and timed by a clock that the test turns."""

import hashlib
import json
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

import hwnas.estimate
import hwnas.training
from hwnas.costs.limits import Limit
from hwnas.estimate import Estimate, estimate
from hwnas.history import History
from hwnas.job import Job, Request
from hwnas.loop import limits_name, read_finalists, search
from hwnas.scoring import train
from hwnas.ship import retrain_finalists
from hwnas.store import Run, open_run
from hwnas.supernet.network import Supernet
from latency_tables.boundaries import chain_key, probes, with_heads
from latency_tables.model import LatencyModel, Quality
from latency_tables.ops import OpSpec
from latency_tables.table import LatencyTable, Row
from profilers.build import Progress, quiet
from profilers.simulated import op_us
from quant.errors import InvalidInput

SPACE = str(Path(__file__).parents[2] / "examples" / "own_space.py") + ":space"
MODEL = LatencyModel({"fp32": 0.83, "w8a8": 1.07}, 1.5, 12.7, 1.073, 0.99, Quality(*[0] * 8))
STEP_S = 0.25


class Stop:
    """A progress that interrupts at the nth call of a stage."""

    def __init__(self, stage: str, at: int) -> None:
        self.stage, self.left = stage, at

    def __call__(self, label: str, _done: int, _total: int) -> None:
        if label.startswith(self.stage):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def row_of(*ops: OpSpec) -> Row:
    """What the device takes for a chain of ops, less its call."""
    us = sum(map(op_us, ops))
    texts = json.dumps([op.to_json() for op in ops])
    return Row(chain_key(ops), texts, ops[-1].precision.name, *[us] * 5, 0.0, 50, True)


def job_in(folder: Path, progress: Progress = quiet, **fields: Any) -> Job:
    """With a table of every row, so that nothing is measured."""
    request = {"space": SPACE, "device": "simulated", "recipe": "smoke", **fields}
    job = Job(Request(tables=folder / "tables", run=folder / "run", **request), progress)
    if not job.table_path.exists():
        ops = job.space.lattice.ops
        rows = {op.key: row_of(op) for op in ops}
        chains = {chain_key(chain): row_of(*chain) for chain in with_heads(probes(ops).values())}
        host, protocol = job.profiler.host(), job.recipe.protocol.to_dict()
        table = LatencyTable(host, protocol, rows, {job.model_name: MODEL}, chains)
        table.save(job.table_path)
    return job


def run_of(job: Job) -> Run:
    return open_run(job.config(), job.request.run)


def half_way(job: Job) -> list[Limit]:
    found = job.latency_range()
    return [job.latency_limit((found.smallest + found.largest) / 2)]


def left(job: Job, limits: Sequence[Limit]) -> tuple[int, int, int]:
    found = estimate(job, run_of(job), limits)
    return found.steps, found.scored, found.retrained


@pytest.fixture
def _steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every training step takes the same time."""
    monkeypatch.setattr(hwnas.estimate, "_step_s", lambda *_: STEP_S)


# ---- counted down


def test_what_is_left_goes_down_to_zero_as_the_work_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in each stage: what was done before the stop is not left any more."""
    monkeypatch.setattr(hwnas.training, "CHECKPOINT_S", 0)
    job = job_in(tmp_path)
    run, limits = run_of(job), half_way(job)
    result = run.result(limits_name(limits))
    seen = [left(job, limits)]

    def stopped(stage: str, at: int, work: Callable[[Job], object]) -> None:
        with pytest.raises(KeyboardInterrupt):
            work(job_in(tmp_path, Stop(stage, at)))
        seen.append(left(job, limits))

    def searched(job: Job) -> object:
        return search(job, run, limits)

    def retrained(job: Job) -> object:
        return retrain_finalists(job, run, result)

    stopped("training", 4, lambda job: train(job, run))
    train(job, run)
    seen.append(left(job, limits))
    stopped("scoring architectures (spos)", 4, searched)
    stopped("scoring architectures (spos)", 11, searched)
    search(job, run, limits)
    seen.append(left(job, limits))
    stopped("retraining finalist 2", 1, retrained)
    retrain_finalists(job, run, result)
    seen.append(left(job, limits))
    assert seen == [
        (10, 24, 2), (6, 24, 2), (0, 24, 2), (0, 20, 2), (0, 13, 2), (0, 0, 2), (0, 0, 1),
        (0, 0, 0),
    ]  # fmt: skip
    assert estimate(job, run, limits) == Estimate(0, 0, 0, 0.0, 0.0)


def test_what_has_its_score_already_is_not_left(tmp_path: Path) -> None:
    """Stopped inside the second strategy's second generation; counted in the history by hand."""
    job = job_in(tmp_path)
    run, limits = run_of(job), half_way(job)
    with pytest.raises(KeyboardInterrupt):
        search(job_in(tmp_path, Stop("scoring architectures (random)", 7)), run, limits)
    with closing(sqlite3.connect(run.history)) as db:
        genes = [row[0] for row in db.execute("SELECT genes FROM proposals")]
        scored = {row[0] for row in db.execute("SELECT genes FROM scores")}
    unscored = [text for text in genes if text not in scored]
    assert len(genes) == 12 + 12
    assert 1 <= len(unscored) <= 5
    assert left(job, limits) == (0, len(unscored), 2)
    with closing(History(run.history)) as history:
        history.add_score(tuple(json.loads(unscored[0])), 0.5, 1.0)
    assert left(job, limits) == (0, len(unscored) - 1, 2)


def test_a_certificate_ends_it_whatever_else_is_there(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run, limits = run_of(job), half_way(job)
    search(job, run, limits)
    result = run.result(limits_name(limits))
    assert left(job, limits) == (0, 0, 2)
    (result / "certificate.json").write_text("{}")
    assert left(job, limits) == (0, 0, 0)


def test_only_finalists_that_there_are_can_be_retrained(tmp_path: Path) -> None:
    """Just above the smallest bound there is one network, and the recipe asks for two."""
    job = job_in(tmp_path)
    run = run_of(job)
    limits = [job.latency_limit(job.latency_range().smallest * 1.000001)]
    search(job, run, limits)
    result = run.result(limits_name(limits))
    assert len(read_finalists(result)) == 1
    assert left(job, limits) == (0, 0, 1)
    retrain_finalists(job, run, result)
    assert left(job, limits) == (0, 0, 0)


def test_other_limits_need_their_own_search_and_no_training(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run, limits = run_of(job), half_way(job)
    search(job, run, limits)
    other = [job.latency_limit(limits[0].value * 1.1)]
    assert left(job, other) == (0, 24, 2)
    assert left(job, limits) == (0, 0, 2)


def test_a_table_measured_anew_needs_its_own_search(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run, limits = run_of(job), half_way(job)
    search(job, run, limits)
    table = LatencyTable.load(job.table_path)
    table.models[job.model_name] = LatencyModel(**{**MODEL.__dict__, "offset_us": 13.0})
    table.save(job.table_path)
    again = job_in(tmp_path)
    assert left(again, [again.latency_limit(limits[0].value)]) == (0, 24, 2)


def test_without_limits_there_is_training_alone(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    assert left(job, []) == (10, 0, 0)
    train(job, run_of(job))
    assert left(job, []) == (0, 0, 0)
    assert not run_of(job).history.exists()


def test_a_damaged_checkpoint_is_refused_as_in_training(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    run_of(job).supernet.write_bytes(b"not weights")
    with pytest.raises(InvalidInput, match="is not a whole checkpoint"):
        left(job, [])


def test_asking_changes_nothing_in_the_run(tmp_path: Path) -> None:
    """Trained after an estimate, the weights are those of a run that nobody asked about."""
    hashes = []
    for asked in (True, False):
        job = job_in(tmp_path / str(asked))
        if asked:
            estimate(job, run_of(job), half_way(job))
            assert not run_of(job).supernet.exists()
        supernet = train(job, run_of(job))
        digest = hashlib.sha256()
        for value in supernet.state_dict().values():
            digest.update(value.numpy().tobytes())
        hashes.append(digest.hexdigest())
    assert hashes[0] == hashes[1]


# ---- timed


def minutes(job: Job, limits: Sequence[Limit]) -> float:
    found = estimate(job, run_of(job), limits)
    assert found.step_ms == 1000 * STEP_S
    return found.minutes


@pytest.mark.usefixtures("_steady")
def test_the_minutes_are_those_of_the_formula_by_hand(tmp_path: Path) -> None:
    """10 steps of 16; 24 x (64 + 100) images at a third of a step; 2 x 5 steps of 16."""
    job = job_in(tmp_path)
    expected_s = STEP_S * (10 + 24 * (64 + 100) / 16 / 3 + 2 * 5)
    assert minutes(job, half_way(job)) == pytest.approx(expected_s / 60)
    assert minutes(job, []) == pytest.approx(STEP_S * 10 / 60)


@pytest.mark.usefixtures("_steady")
@pytest.mark.parametrize(
    ("change", "more_steps"),
    [
        ({"supernet": {"steps": 110}}, 100.0),
        ({"supernet": {"steps": 10010}}, 10000.0),
        ({"retrain": {"steps": 50}}, 2 * 45.0),
        ({"retrain": {"batch": 32}}, 2 * 5.0),
        ({"finalists": 4}, 2 * 5.0),
        ({"evaluations": 24}, 24 * (64 + 100) / 16 / 3),
        ({"validation_images": 132}, 24 * 32 / 16 / 3),
        ({"recalibration_images": 96}, 24 * 32 / 16 / 3),
        # digits have 400 images in SEARCH-VAL, however many are asked for
        ({"validation_images": 5000}, 24 * 300 / 16 / 3),
    ],
)
def test_the_minutes_grow_with_the_work(
    change: dict[str, Any], more_steps: float, tmp_path: Path
) -> None:
    plain = job_in(tmp_path / "plain")
    more = job_in(tmp_path / "more", recipe={"name": "smoke", **change})
    difference = minutes(more, half_way(more)) - minutes(plain, half_way(plain))
    assert difference == pytest.approx(STEP_S * more_steps / 60)


@pytest.mark.parametrize(
    ("step_s", "steps"), [(0.01, 5), (0.3, 5), (0.6, 4), (1.5, 2), (2.5, 1), (100.0, 1)]
)
def test_a_step_is_timed_a_few_times_after_a_warm_up(
    step_s: float, steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock that runs on by a step's time at each forward pass: five steps or two seconds."""
    clock, passes = [50.0], []
    forward = Supernet.forward

    def counted(self: Supernet, batch: Tensor, *arguments: Any) -> Tensor:
        passes.append(len(batch))
        clock[0] += 9.0 if len(passes) == 1 else step_s  # the first one is slow, and not counted
        return forward(self, batch, *arguments)

    monkeypatch.setattr(Supernet, "forward", counted)
    monkeypatch.setattr(hwnas.estimate, "now_s", lambda: clock[0])
    job = job_in(tmp_path)
    found = estimate(job, run_of(job), [])
    assert passes == [16] * (1 + steps)
    assert found.step_ms == pytest.approx(1000 * step_s)
    assert found.minutes == pytest.approx(10 * step_s / 60)


def test_nothing_is_timed_where_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = job_in(tmp_path)
    train(job, run_of(job))
    monkeypatch.setattr(hwnas.estimate, "_step_s", None)
    assert estimate(job, run_of(job), []) == Estimate(0, 0, 0, 0.0, 0.0)


def test_a_real_step_takes_some_time_and_ranges_need_no_more_than_two_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches = []
    initialise = Supernet.initialise_ranges

    def spy(self: Supernet, images: Tensor) -> None:
        batches.append(len(images))
        initialise(self, images)

    monkeypatch.setattr(Supernet, "initialise_ranges", spy)
    job = job_in(tmp_path)
    found = estimate(job, run_of(job), half_way(job))
    assert batches == [2]
    assert 0.05 < found.step_ms < 60_000
    assert np.isfinite(found.minutes)
