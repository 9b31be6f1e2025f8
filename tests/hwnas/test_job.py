"""A request made concrete: its limits and costs, its identity, and the table that it needs."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hwnas.calibration
import hwnas.job
from hwnas.costs.feasible import reachable
from hwnas.costs.population import genes_of
from hwnas.costs.samplers import UniformSampler
from hwnas.job import LATENCY, LIMITS, Job, Request, join, plan, request_fields, request_of
from hwnas.loop import limits_name
from hwnas.recipes import RECIPES, recipe
from hwnas.spaces.base import Architecture
from hwnas.store import RUN_TABLE, Run, RunConfig, open_run
from latency_tables.boundaries import chain_key, probes, with_heads
from latency_tables.model import LatencyModel, Quality
from latency_tables.ops import COUNTS, OpSpec, Tensor, peak_activation_bytes
from latency_tables.slopes import hosted
from latency_tables.table import LatencyTable, Row
from profilers.build import table_lock
from profilers.graphs import emit, random_parameters
from profilers.measure import Measurement
from profilers.simulated import CALL_US, SimulatedProfiler, op_us
from quant.errors import InvalidInput, TableError, Unreachable

SPACE = str(Path(__file__).parents[2] / "examples" / "own_space.py") + ":space"
MODEL = LatencyModel({"fp32": 0.83, "w8a8": 1.07}, 1.5, 12.7, 1.073, 0.99, Quality(*[0] * 8))


def job_in(folder: Path, **fields: Any) -> Job:
    request = {"space": SPACE, "device": "simulated", "recipe": "smoke", **fields}
    return Job(Request(tables=folder / "tables", **request))


def row_of(*ops: OpSpec) -> Row:
    """What the device takes for a chain of ops: its call, and each op."""
    us = CALL_US + sum(map(op_us, ops))
    texts = json.dumps([op.to_json() for op in ops])
    return Row(chain_key(ops), texts, ops[-1].precision.name, *[us] * 5, 0.0, 50, True)


def table_of(job: Job, model: LatencyModel = MODEL) -> LatencyTable:
    """A table of the job's condition with all that it takes to price its space."""
    ops = job.space.lattice.ops
    rows = {op.key: row_of(op) for op in ops}
    chains = {chain_key(chain): row_of(*chain) for chain in with_heads(probes(ops).values())}
    host, protocol = job.profiler.host(), job.recipe.protocol.to_dict()
    return LatencyTable(host, protocol, rows, {job.model_name: model}, chains)


def some(job: Job, count: int, seed: int = 0) -> list[Architecture]:
    sampler, rng = UniformSampler(job.space), np.random.default_rng(seed)
    return [sampler.sample(rng) for _ in range(count)]


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """With a table in its folder, so that nothing is measured."""
    made = job_in(tmp_path)
    table_of(made).save(made.table_path)
    return made


@pytest.fixture
def unmeasured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    """Without a table, and measuring nothing."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was measured")

    monkeypatch.setattr(hwnas.job, "build_rows", refuse)
    monkeypatch.setattr(hwnas.job, "measure_models", refuse)
    monkeypatch.setattr(hwnas.calibration, "measure_models", refuse)
    return job_in(tmp_path)


def test_a_precision_that_the_device_lacks_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though the smallest and the largest network, which are timed to tell how long it takes, lack
    it themselves: the first of equal networks by MACs has the first precision."""
    job = job_in(tmp_path, space="mobile-tiny", data="none:10", precisions=["fp32", "fp8"])
    found = reachable(job.space, job.cost("macs"))
    for architecture in (found.cheapest, found.dearest):
        assert {op.precision.name for op in job.space.lower(architecture)} == {"fp32"}
    monkeypatch.setattr(job.profiler, "prepare", lambda _: pytest.fail("something was timed"))
    for stage in (plan, hwnas.job.profile):
        with pytest.raises(InvalidInput, match="no kernel for fp8"):
            stage(job)


# ---- limits


def middle(job: Job, name: str) -> float:
    found = reachable(job.space, job.cost(name))
    return (found.smallest + found.largest) / 2


def test_limits_in_any_order_are_the_same_and_have_one_name(job: Job) -> None:
    values = {name: 2 * middle(job, name) for name in LIMITS}
    names = set()
    for seed in range(10):
        order = np.random.default_rng(seed).permutation(list(values)).tolist()
        limits = job.limits({name: values[name] for name in order})
        assert [limit.cost.name for limit in limits] == [
            *(name for name in LIMITS if name != LATENCY), LATENCY,
        ]  # fmt: skip
        assert {limit.cost.name: limit.value for limit in limits} == values
        names.add(limits_name(limits))
    assert len(names) == 1
    (name,) = names
    assert name.split(",") == sorted(f"{name}={value!r}" for name, value in values.items())


def test_a_whole_number_and_its_float_are_one_limit(job: Job) -> None:
    names = {
        limits_name(job.limits({"params": value})) for value in (50000, 50000.0, np.float64(5e4))
    }
    assert names == {"params=50000.0"}
    assert limits_name(job.limits({"params": 50001})) == "params=50001.0"
    assert job.limits({}) == []


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, math.inf, -math.inf])
def test_a_limit_that_is_no_positive_number_is_refused_by_its_flag(
    name: str, value: float, unmeasured: Job
) -> None:
    with pytest.raises(InvalidInput) as caught:
        unmeasured.limits({"macs": 1e12, name: value})
    assert caught.value.what == f"{LIMITS[name]} is {value}."
    assert caught.value.accepted == "a positive number"


@pytest.mark.parametrize("name", ["latency", "", "weight_bytes", "--max-params", "PARAMS"])
def test_an_unknown_limit_is_refused_with_those_that_are_known(name: str, unmeasured: Job) -> None:
    with pytest.raises(InvalidInput) as caught:
        unmeasured.limits({name: 5.0})
    assert caught.value.what == f"{name!r} is not a limit."
    assert caught.value.accepted == ", ".join(LIMITS)


def test_limits_that_need_no_table_are_decided_without_one(unmeasured: Job) -> None:
    """Also where a latency limit stands beside them."""
    counted = [name for name in LIMITS if name != LATENCY]
    for name in counted:
        smallest = reachable(unmeasured.space, unmeasured.cost(name)).smallest
        with pytest.raises(Unreachable, match=re.escape(f"{smallest:.6g}")) as caught:
            unmeasured.limits({LATENCY: 1.0, name: smallest * 0.99})
        assert caught.value.exit_code == 3
        assert unmeasured.limits({name: smallest * 1.01})[0].cost.name == name
    values = {name: reachable(unmeasured.space, unmeasured.cost(name)).largest for name in counted}
    assert len(unmeasured.limits(values)) == 5
    assert not unmeasured.table_path.exists()
    with pytest.raises(AssertionError, match="something was measured"):
        unmeasured.limits({LATENCY: 1.0})


def test_limits_that_each_can_be_met_but_not_together_are_refused_without_a_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two convolutions: one has few MACs, the other few parameters."""
    path = tmp_path / "apart.py"
    path.write_text(
        "from hwnas import Choice, Position, SearchSpace, State\n"
        "from hwnas.spaces.blocks import classifier, conv_norm_activation\n"
        "from latency_tables.ops import Tensor\n"
        "from quant.precision import Precision\n"
        "def space(*, classes, image_channels, size):\n"
        "    def conv(state, v):\n"
        "        stride = 4 if v['width'] == 64 else 1\n"
        "        op = conv_norm_activation(state.tensor, v['width'], kernel=3, stride=stride,\n"
        "                                  precision=Precision('fp32'))\n"
        "        return Choice(op, State(op.output))\n"
        "    def head(state, v):\n"
        "        op = classifier(state.tensor, 16, classes, precision=Precision('fp32'))\n"
        "        return Choice(op, State(op.output))\n"
        "    return SearchSpace('apart', Tensor(image_channels, size, size),\n"
        "        (Position('conv', {'width': [16, 64]}, conv),\n"
        "         Position('head', {'k': [1]}, head)))\n"
    )
    job = job_in(tmp_path, space=f"{path}:space")
    macs, params = (reachable(job.space, job.cost(name)) for name in ("macs", "params"))
    assert macs.cheapest != params.cheapest
    job.limits({"macs": macs.smallest})
    job.limits({"params": params.smallest})
    with pytest.raises(Unreachable) as caught:
        job.limits({"macs": macs.smallest, "params": params.smallest, LATENCY: 1.0})
    assert "together" in caught.value.what
    assert set(caught.value.together) == {"macs", "params"}
    assert not job.table_path.exists()


def test_the_latency_limit_is_one_of_them(job: Job) -> None:
    value = middle(job, LATENCY)
    limit = job.latency_limit(value)
    assert (limit.cost.name, limit.value) == (LATENCY, value)
    assert limit.cost is job.latency is job.cost(LATENCY)
    found = job.latency_range()
    assert found.smallest < value < found.largest
    with pytest.raises(InvalidInput, match="--latency-ms is -1"):
        job.latency_limit(-1)


# ---- costs


def test_each_counted_cost_is_counted_from_the_ops(job: Job) -> None:
    architectures = some(job, 30)
    genes = genes_of(architectures)
    for name in ("params", "macs", "bitops", "activation_mb"):
        cost = job.cost(name)
        raw = cost.totals(job.space, genes).tolist()
        for architecture, value in zip(architectures, raw, strict=True):
            ops = job.space.lower(architecture)
            if name == "activation_mb":
                expected = peak_activation_bytes(ops) / 1e6
            else:
                expected = sum(COUNTS[name](op) for op in ops)
            assert cost.upper(value) == pytest.approx(expected, rel=1e-12)
        assert job.cost(name) is cost


def test_an_unknown_cost_is_refused(job: Job) -> None:
    with pytest.raises(InvalidInput, match="'flops' is not a counted cost"):
        job.cost("flops")


def file_size(job: Job, architecture: Architecture, seed: int) -> int:
    ops, rng = job.space.lower(architecture), np.random.default_rng(seed)
    model = emit(ops, [random_parameters(op, rng) for op in ops], job.profiler.runtime)
    return len(model.SerializeToString())


@pytest.mark.parametrize(
    ("fields", "networks"),
    [({}, 40), ({"space": "mobile-tiny"}, 12), ({"space": "mobile", "image_size": 224}, 3)],
)
def test_the_size_of_a_file_is_bounded_closely(
    fields: dict[str, Any], networks: int, tmp_path: Path
) -> None:
    """From above, within 0.5 % and 200 bytes, in bytes as `stat` counts them."""
    job = job_in(tmp_path, **fields)
    architectures = some(job, networks)
    cost = job.cost("size_mb")
    bounds = [1e6 * cost.upper(raw) for raw in cost.totals(job.space, genes_of(architectures))]
    real = [file_size(job, a, seed) for seed, a in enumerate(architectures)]
    for bound, size in zip(bounds, real, strict=True):
        assert size <= bound <= 1.005 * size + 200
    assert len(set(real)) > networks / 2


def test_no_file_is_larger_than_a_size_limit(tmp_path: Path) -> None:
    """The smallest network fits a limit of exactly its bound, and no larger one does."""
    job = job_in(tmp_path)
    found = reachable(job.space, job.cost("size_mb"))
    (limit,) = job.limits({"size_mb": found.smallest})
    everything = list(job.space.enumerate())
    sums = limit.cost.totals(job.space, genes_of(everything))
    inside = [a for a, raw in zip(everything, sums, strict=True) if raw <= limit.budget]
    assert found.cheapest in inside
    assert len(inside) < len(everything) / 10
    for architecture in inside:
        assert file_size(job, architecture, 0) <= 1e6 * found.smallest


# ---- identity


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ("digits", "quick"),
        ("folder:photos", "standard"),
        ("digits.npz", "standard"),
        ("torchvision:CIFAR10", "standard"),
        ("fashion-mnist:somewhere", "standard"),
    ],
)
def test_without_a_recipe_it_is_quick_for_digits_and_standard_for_all_else(
    data: str, name: str
) -> None:
    assert Job(Request(data=data)).recipe == RECIPES[name]
    assert Job(Request(data=data, recipe="smoke")).recipe == RECIPES["smoke"]
    changed = {"name": "thorough", "finalists": 1}
    assert Job(Request(data=data, recipe=changed)).recipe == recipe(changed)


def test_images_keep_their_size_unless_another_is_asked_for(tmp_path: Path) -> None:
    plain, asked = job_in(tmp_path, space="mobile"), job_in(tmp_path, image_size=16)
    assert plain.splits.size == 32  # digits are arrays; pictures would be brought to 224
    assert asked.splits.size == 16
    assert asked.space.input.height == 16
    configs = [job.config() for job in (job_in(tmp_path), asked, job_in(tmp_path, image_size=32))]
    assert [config.image_size for config in configs] == [32, 16, 32]
    assert configs[0] == configs[2]
    assert configs[0].data_fingerprint != configs[1].data_fingerprint
    assert configs[0].space_fingerprint != configs[1].space_fingerprint


def test_the_identity_of_a_run_is_all_that_was_asked(tmp_path: Path) -> None:
    changed = {"name": "smoke", "supernet": {"steps": 11}}
    job = job_in(tmp_path, recipe=changed, seed=5, threads=2, batch=4)
    config = job.config()
    assert config == RunConfig(
        space=SPACE,
        space_fingerprint=job.space.fingerprint,
        data="digits",
        data_fingerprint=job.splits.fingerprint,
        image_size=32,
        device="simulated",
        threads=2,
        batch=4,
        method="spos",
        recipe=recipe(changed).model_dump(),
        seed=5,
    )
    json.dumps(config.model_dump())


@pytest.mark.parametrize("asked", [False, True])
def test_portable_files_are_part_of_a_runs_identity_and_not_of_its_table(
    asked: bool, tmp_path: Path
) -> None:
    job = job_in(tmp_path, portable=asked)
    assert job.profiler.runtime.is_portable == job.config().portable == asked
    made = open_run(job.config(), tmp_path / "run")
    assert Job(request_of(made, tmp_path)).profiler.runtime == job.profiler.runtime
    assert job.table_path == job_in(tmp_path, portable=not asked).table_path
    with pytest.raises(InvalidInput, match="portable"):
        open_run(job_in(tmp_path, portable=not asked).config(), made.path)


def test_where_the_cpu_needs_portable_files_a_run_is_of_them_unasked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("profilers.ort.saturates", lambda *_: True)
    job = job_in(tmp_path, device="cpu")
    assert job.config().portable
    assert Job(request_of(open_run(job.config(), tmp_path / "run"), tmp_path)).config().portable


@pytest.fixture
def run(tmp_path: Path) -> Run:
    fields = {"recipe": {"name": "smoke", "supernet": {"steps": 11}}, "seed": 5}
    return open_run(job_in(tmp_path, **fields).config(), tmp_path / "run")


def test_the_request_of_a_run_makes_the_same_run(run: Run, tmp_path: Path) -> None:
    request = request_of(run, tmp_path / "elsewhere")
    assert (request.run, request.tables) == (run.path, tmp_path / "elsewhere")
    again = Job(request)
    assert again.config() == run.config
    assert again.recipe == recipe({"name": "smoke", "supernet": {"steps": 11}})
    assert open_run(again.config(), run.path).path == run.path


def test_fields_that_agree_with_the_run_are_taken(run: Run) -> None:
    known = request_fields(run, {})
    assert set(known) == {
        "space", "precisions", "data", "image_size", "device", "threads", "batch", "portable",
        "method", "recipe", "seed",
    }  # fmt: skip
    assert request_fields(run, known) == known
    for name, value in known.items():
        assert request_fields(run, {name: value}) == known
    assert request_fields(run, {"recipe": {"name": "smoke", "supernet": {"steps": 11}}}) == known
    assert request_fields(run, {"recipe": {"name": "smoke", "supernet": {"steps": 11.0}}}) == known


@pytest.mark.parametrize(
    ("name", "value", "flag", "is_now"),
    [
        ("space", "mobile", "--space", SPACE),
        ("data", "folder:photos", "--data", "digits"),
        ("image_size", 64, "--image-size", 32),
        ("device", "cpu", "--device", "simulated"),
        ("threads", 2, "--threads", 1),
        ("batch", 8, "--batch", 1),
        ("portable", True, "--portable", False),
        ("method", "fairnas", "--method", "spos"),
        ("seed", 6, "--seed", 5),
        ("recipe", "quick", "--recipe", "smoke"),
        ("recipe", {"name": "quick", "supernet": {"steps": 11}}, "--recipe", "smoke"),
    ],
)
def test_a_field_that_contradicts_the_run_is_refused_by_its_flag(
    name: str, value: Any, flag: str, is_now: Any, run: Run
) -> None:
    with pytest.raises(InvalidInput) as caught:
        request_fields(run, {"space": SPACE, name: value})
    told = value["name"] if isinstance(value, dict) else value
    assert caught.value.what == (f"{flag} {told} contradicts {run.path}, whose {name} is {is_now}.")
    assert caught.value.next_step == f"drop {flag}, or name another --run"


@pytest.mark.parametrize(
    "value",
    [
        "smoke",
        {"name": "smoke"},
        {"name": "smoke", "supernet": {"steps": 12}},
        {"name": "smoke", "supernet": {"steps": 11, "flip": True}},
        {"name": "smoke", "supernet": {"steps": 11}, "protocol": {"rounds": 3}},
    ],
)
def test_a_recipe_of_the_same_name_with_other_fields_is_refused(value: Any, run: Run) -> None:
    with pytest.raises(InvalidInput) as caught:
        request_fields(run, {"recipe": value})
    assert caught.value.what == (
        f"--recipe smoke contradicts {run.path}, whose recipe differs from the plain smoke in a "
        "field."
    )


def test_a_recipe_that_is_none_is_refused_before_it_is_compared(run: Run) -> None:
    for value, words in (
        ("fast", "--recipe is 'fast'"),
        ({"name": "smoke", "supernet": {"steps": 0}}, r"recipe\.supernet\.steps: "),
    ):
        with pytest.raises(InvalidInput, match=words):
            request_fields(run, {"recipe": value})


# ---- data without images


def test_a_space_of_classes_alone_is_priced_but_not_trained(tmp_path: Path) -> None:
    job = job_in(tmp_path, data="none:7", image_size=32)
    assert (job.splits.classes, job.splits.channels) == (7, 3)
    assert job.space.input == Tensor(3, 32, 32)
    assert job.space.lattice.ops[-1].output.channels == 7
    table_of(job).save(job.table_path)
    assert job.latency_range().smallest > 0
    with pytest.raises(InvalidInput) as caught:
        job.check_images()
    assert caught.value.what == "--data none:7 has no images to train on."
    assert "digits" in caught.value.accepted
    assert "none" not in caught.value.accepted
    job_in(tmp_path).check_images()


# ---- the table


def test_a_table_that_has_all_is_used_as_it_is(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwnas.job, "build_rows", None)
    before = job.table_path.read_bytes()
    table = table_of(job)
    rows = len(table.rows) + len(table.chains)
    assert plan(job) == hwnas.job.Plan(rows, 0, 0, 0.0, (0.0, 0.0))
    assert set(job.table.rows) == {op.key for op in job.space.lattice.ops}
    assert job.model == MODEL
    assert job.table_path.read_bytes() == before


def test_the_runs_own_copy_stands_in_where_the_folder_has_none(unmeasured: Job) -> None:
    run = unmeasured.request.tables.parent / "run"
    job = job_in(unmeasured.request.tables.parent, run=run)
    slower = LatencyModel({"fp32": 2.0, "w8a8": 2.0}, 0.0, 1.0, 1.2, 0.95, Quality(*[0] * 8))
    table_of(job, slower).save(run / RUN_TABLE)
    assert plan(job).missing == plan(job).networks == 0
    assert job.model == slower
    assert not job.table_path.exists()
    # the folder's own comes first, once it has all
    again = job_in(unmeasured.request.tables.parent, run=run)
    table_of(again, MODEL).save(again.table_path)
    assert again.model == MODEL


@pytest.mark.parametrize("lacking", ["a row", "the model"])
def test_a_folder_whose_table_lacks_something_does_not_hide_the_runs_copy(
    lacking: str, unmeasured: Job
) -> None:
    folder = unmeasured.request.tables.parent
    job = job_in(folder, run=folder / "run")
    whole, part = table_of(job), table_of(job)
    if lacking == "a row":
        del part.rows[job.space.lattice.ops[0].key]
    else:
        part.models.clear()
    part.save(job.table_path)
    whole.save(folder / "run" / RUN_TABLE)
    assert job.model == MODEL
    assert LatencyTable.load(job.table_path).rows == part.rows


def test_a_copy_that_lacks_something_is_measured_anew(unmeasured: Job) -> None:
    folder = unmeasured.request.tables.parent
    job = job_in(folder, run=folder / "run")
    part = table_of(job)
    del part.rows[job.space.lattice.ops[0].key]
    part.save(folder / "run" / RUN_TABLE)
    with pytest.raises(AssertionError, match="something was measured"):
        _ = job.table


def test_a_table_of_another_condition_is_refused(job: Job, tmp_path: Path) -> None:
    other = table_of(job)
    other.host = replace(other.host, cpu="another processor")
    other.save(job.table_path)
    for read in (lambda: plan(job), lambda: job.table):
        with pytest.raises(TableError, match="measured on another host"):
            read()
    table_of(job).save(job.table_path)
    changed = job_in(tmp_path, recipe={"name": "smoke", "protocol": {"rounds": 3}})
    with pytest.raises(TableError, match="by another protocol"):
        _ = changed.table


def test_a_damaged_table_is_refused(job: Job) -> None:
    job.table_path.write_bytes(job.table_path.read_bytes()[:200])
    with pytest.raises(TableError, match="is not a latency table"):
        _ = job.table


HOLD = """
import sys
from pathlib import Path
from profilers.build import table_lock
with table_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def measuring_elsewhere(table: Path) -> Iterator[int]:
    """Another process that holds the table; gives its id."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(table)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process.pid
        finally:
            process.kill()


def test_a_table_that_another_process_measures_is_refused_with_its_number(
    unmeasured: Job,
) -> None:
    with measuring_elsewhere(unmeasured.table_path) as holder:
        with pytest.raises(InvalidInput) as caught:
            _ = unmeasured.table
        assert caught.value.what == f"{unmeasured.table_path} is in use by process {holder}."
        assert "wait" in caught.value.next_step
        # one that has all needs no measuring, so that it is not waited for
        table_of(unmeasured).save(unmeasured.table_path)
        assert unmeasured.model == MODEL


def test_a_process_that_was_killed_while_measuring_holds_nothing(unmeasured: Job) -> None:
    with measuring_elsewhere(unmeasured.table_path):
        pass
    with pytest.raises(AssertionError, match="something was measured"):
        _ = unmeasured.table


def test_the_table_is_held_while_it_is_measured_and_released_by_an_error(
    unmeasured: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measuring(*_: Any, **__: Any) -> None:
        mine = pytest.raises(InvalidInput, match=f"in use by process {os.getpid()}")
        with mine, table_lock(unmeasured.table_path):
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(hwnas.job, "build_rows", measuring)
    with pytest.raises(KeyboardInterrupt):
        _ = unmeasured.table
    with table_lock(unmeasured.table_path):
        pass


def test_the_plan_tells_what_is_missing_and_what_two_networks_take(unmeasured: Job) -> None:
    """The two are the smallest and the largest by MACs; the simulated device has no noise."""
    found = plan(unmeasured)
    ops = unmeasured.space.lattice.ops
    chains = with_heads(probes(ops).values())
    assert len(chains) > 5
    missing = len(ops) + len(chains)
    assert (found.rows, found.missing, found.networks) == (missing, missing, 39)
    ends = reachable(unmeasured.space, unmeasured.cost("macs"))
    expected = tuple(
        (CALL_US + sum(map(op_us, unmeasured.space.lower(a)))) / 1000
        for a in (ends.cheapest, ends.dearest)
    )
    assert found.probe_ms == pytest.approx(expected)
    assert found.probe_ms[0] < found.probe_ms[1]
    assert found.minutes > 0
    part = table_of(unmeasured)
    for op in ops[:20]:
        del part.rows[op.key]
    part.save(unmeasured.table_path)
    rows_left = plan(unmeasured)
    assert (rows_left.missing, rows_left.networks) == (20, 0)
    part = table_of(unmeasured)
    part.models.clear()
    part.save(unmeasured.table_path)
    networks_left = plan(unmeasured)
    assert (networks_left.missing, networks_left.networks) == (0, 39)
    assert 0 < rows_left.minutes < found.minutes
    assert 0 < networks_left.minutes < found.minutes


def test_the_plan_of_a_device_that_repeats_ops_counts_what_is_then_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timed_here: Callable[..., Any]
) -> None:
    """And what that measures predicts whole networks to the digits of the journal."""
    monkeypatch.setattr("hwnas.calibration.measure_models", timed_here)
    plain = plan(job_in(tmp_path))
    monkeypatch.setattr(SimulatedProfiler, "repeats", (2, 4, 8))
    job = job_in(tmp_path)
    found = plan(job)
    assert found.rows == found.missing > plain.missing
    assert found.minutes > plain.minutes
    table = job.table
    assert table.protocol == job.recipe.protocol.to_dict() | {"repeats": [2, 4, 8]}
    assert len(table.rows) + len(table.chains) == found.missing
    assert plan(job) == replace(found, missing=0, networks=0, minutes=0.0, probe_ms=(0.0, 0.0))
    assert job.model.quality.worst_error < 1e-3
    cost = job.latency
    for architecture in some(job, 10):
        true_us = CALL_US + sum(map(op_us, job.space.lower(architecture)))
        (additive_us,) = cost.totals(job.space, genes_of([architecture])).tolist()
        assert job.model.predict_ms(additive_us) == pytest.approx(true_us / 1000, rel=1e-3)


def test_a_plan_counts_the_copies_of_ops_that_follow_themselves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a preset, beside the chains behind hosts and across boundaries, which share some."""
    job = job_in(tmp_path, space="mobile-tiny", data="none:10")
    plain, ops = plan(job), job.space.lattice.ops
    monkeypatch.setattr(SimulatedProfiler, "repeats", (2, 4, 8))
    found = plan(job_in(tmp_path, space="mobile-tiny", data="none:10"))
    again = {op.key for op in ops if op.output == op.inputs[0]}
    assert len(again) > 10
    probed, behind = list(probes(ops).values()), hosted(ops)
    chains = set(map(chain_key, with_heads([*probed, *behind])))
    assert plain.missing == len(ops) + len(with_heads(probed))
    assert found.missing == len(ops) + len(chains) + 3 * len(again)
    assert len(chains) < len(with_heads(probed)) + len(with_heads(behind))


class Stop:
    """A progress that interrupts at the nth call of a stage."""

    def __init__(self, stage: str = "", at: int = 0) -> None:
        self.stage, self.left, self.told = stage, at, list[tuple[str, int, int]]()

    def __call__(self, label: str, done: int, total: int) -> None:
        self.told.append((label, done, total))
        if self.stage and label.startswith(self.stage):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt


def test_networks_that_were_timed_before_an_interruption_are_not_timed_again(
    tmp_path: Path,
) -> None:
    """For real, in fresh processes. The journal goes when the table has everything."""
    job = job_in(tmp_path, recipe={"name": "smoke", "processes": 1})
    tables = job.request.tables
    job.progress = Stop("timing whole", 15)
    with pytest.raises(KeyboardInterrupt):
        _ = job.table
    (journal,) = [path for path in tables.glob("*.journal") if job.space.fingerprint in path.name]
    assert len(journal.read_text().splitlines()) == 1 + 15
    assert not LatencyTable.load(job.table_path).models
    assert plan(job).missing == 0
    assert plan(job).networks == 39

    again = job_in(tmp_path, recipe={"name": "smoke", "processes": 1})
    again.progress = Stop()
    table = again.table
    timed = [done for label, done, _ in again.progress.told if label.startswith("timing whole")]
    assert timed == [15, *range(16, 40)]
    assert not [label for label, *_ in again.progress.told if label.startswith("timing ops")]
    assert not list(tables.glob("*.journal"))
    # the device has no noise and its cost is a sum: the calibration finds it again
    for architecture in some(again, 10):
        ops = again.space.lower(architecture)
        inside = [(op.precision.name, op_us(op)) for op in ops]
        inside[0] = (inside[0][0], inside[0][1] + CALL_US)
        additive = sum(again.model.op_cost_us(name, us) for name, us in inside)
        expected = (CALL_US + sum(map(op_us, ops))) / 1000
        assert again.model.predict_ms(additive) == pytest.approx(expected, rel=1e-4)
    assert table.rows.keys() == {op.key for op in again.space.lattice.ops}
    assert again.model.quality.networks == 8


def test_a_space_with_too_few_networks_to_calibrate_on_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "few.py"
    path.write_text(
        "from hwnas.spaces.mobile import Stage, mobile\n"
        "def space(*, classes, image_channels, size):\n"
        "    return mobile('few', (Stage(1, 2, (16, 24)),), classes=classes, size=size,\n"
        "                  image_channels=image_channels, kernels=(3,), expansions=(3,),\n"
        "                  skip=False)\n"
    )
    job = job_in(tmp_path, space=f"{path}:space")
    assert job.space.count == 8
    with pytest.raises(InvalidInput) as caught:
        _ = job.table
    assert caught.value.what == "8 networks of few are too few to calibrate on."
    assert caught.value.accepted == "a space, and a recipe's calibration, of at least 10"


def test_the_table_is_another_one_once_any_row_or_the_model_changes(tmp_path: Path) -> None:
    """What finalists and histories are kept under."""
    found = {}
    for change in ("none", "the order", "a row", "the model"):
        job = job_in(tmp_path / change)
        table = table_of(job)
        key = job.space.lattice.ops[3].key
        if change == "a row":
            row = table.rows[key]
            table.rows[key] = replace(row, median_us=row.median_us * 1.001)
        if change == "the model":
            table = table_of(job, replace(MODEL, upper_ratio=1.0731))
        if change == "the order":
            table.rows = dict(reversed(table.rows.items()))
        table.save(job.table_path)
        found[change] = job.table_id
    assert found["none"] == found["the order"]
    assert len(set(found.values())) == 3


# ---- what searches measure


def measurement(latency_ms: float, *, stable: bool = True) -> Measurement:
    us = 1000 * latency_ms
    return Measurement(us, us, us, us, us, us, 0.0, 50, stable)


def predicted_ms(job: Job, architecture: Architecture) -> float:
    return job.latency.predict(job.latency.totals(job.space, genes_of([architecture])).item())


def test_what_searched_networks_measure_raises_the_bound_of_the_next_job(job: Job) -> None:
    slow, quick = some(job, 2)
    found = {slow: measurement(1.4 * predicted_ms(job, slow)),
             quick: measurement(0.9 * predicted_ms(job, quick))}  # fmt: skip
    assert join(job, found)
    again = Job(job.request)
    assert again.model.upper_ratio == pytest.approx(1.4)
    assert again.latency_range().largest == pytest.approx(
        job.latency_range().largest * 1.4 / MODEL.upper_ratio
    )
    assert again.table_id == job.table_id
    assert again.first_range() == job.first_range() == job.latency_range()
    assert not join(again, found), "the second time they raise nothing"


def test_what_cannot_join_is_left_out(job: Job) -> None:
    (slow,) = some(job, 1)
    found = {slow: measurement(2 * predicted_ms(job, slow))}
    before = job.table_path.read_bytes()
    assert not join(job, {slow: measurement(2 * predicted_ms(job, slow), stable=False)})
    assert not join(job, {})
    with table_lock(job.table_path):
        assert not join(job, found), "another process measures this table"
    assert job.table_path.read_bytes() == before
    _ = job.table
    table_of(job, replace(MODEL, offset_us=99.0)).save(job.table_path)
    before = job.table_path.read_bytes()
    assert not join(job, found), "the table was measured anew since"
    assert job.table_path.read_bytes() == before
    job.table_path.unlink()
    assert not join(job, found)
    assert not job.table_path.exists()
