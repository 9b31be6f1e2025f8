"""Latency limits on several devices, and at a percentile of the calls: how they are asked for,
which networks meet them, what ships and what is told of it.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

import hwnas.job
from hwnas.conditions import LATENCY, Condition, condition
from hwnas.costs.feasible import FeasibleSet, reachable
from hwnas.data import as_input, digits
from hwnas.history import History
from hwnas.job import LIMITS, Job, Request, flag_of
from hwnas.loop import searches, settled
from hwnas.opening import latency_limits
from hwnas.report.page import limit_text
from hwnas.spaces.base import Architecture
from latency_tables.host import Host
from latency_tables.ops import OpSpec
from latency_tables.percentiles import PERCENTILES
from profilers import devices
from profilers.base import Profiler
from profilers.graphs import read_ops
from profilers.measure import Measurement, Protocol, Samples
from profilers.simulated import CALL_US, SimulatedProfiler, SimulatedSession, op_us
from quant.errors import InvalidInput
from quant.precision import TENSORRT, Runtime

ROOT = Path(__file__).parents[2]
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SMALL = ("--space", SPACE, "--recipe", "smoke")
SCHEMA = json.loads((ROOT / "docs" / "output.schema.json").read_text())
TAIL = 1.5
"""How many times the usual one the slowest calls take."""
Commands = Callable[..., Any]


def twin_us(op: OpSpec) -> float:
    """On the other device integers are slow, and everything else is quicker."""
    return op_us(op) * (2.5 if op.precision.is_integer else 0.7)


class TailedSession(SimulatedSession):
    """Two of sixteen calls take longer."""

    def _block(self, protocol: Protocol) -> Samples:
        block = super()._block(protocol).copy()
        block[-len(block) // 8 :, 0] *= TAIL
        return block


class TwinSession(TailedSession):
    def __init__(self, model: onnx.ModelProto, batch: int) -> None:
        super().__init__(model, batch)
        self._latency_us = 3 * CALL_US + sum(map(twin_us, read_ops(model)))


class Tailed(SimulatedProfiler):
    session: type[SimulatedSession] = TailedSession

    def prepare(self, model: onnx.ModelProto | Path) -> SimulatedSession:
        return self.session(onnx.load(model) if isinstance(model, Path) else model, self.batch)


class Twin(Tailed):
    session = TwinSession

    def host(self) -> Host:
        return Host("twin", "simulated", "1", "another stated cost model", "")


class Foreign(Twin):
    """A device that runs nothing of the space."""

    runtime = Runtime("foreign", {}, unsigned_activations=False)


class Board(Tailed):
    """A device whose files are others: TensorRT's flavour, on its grid."""

    runtime = TENSORRT

    def host(self) -> Host:
        return Host("board", "simulated", "1", "a third stated cost model", "")


def opened(device: str, *, threads: int = 1, batch: int = 1, portable: bool = False) -> Profiler:
    kinds = {"simulated": Tailed, "twin": Twin, "foreign": Foreign, "board": Board}
    if device in kinds:
        return kinds[device](threads=threads, batch=batch, portable=portable)
    return devices.open_profiler(device, threads=threads, batch=batch, portable=portable)


@pytest.fixture(scope="module", autouse=True)
def in_this_process(timed_here: Callable[..., Any]) -> Iterator[None]:
    """Two devices that differ, each timed without fresh processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwnas.job.open_profiler", opened)
        patch.setattr("hwnas.job.protocol_of", lambda _device: Protocol())
        patch.setattr("hwnas.job.measure_models", timed_here)
        patch.setattr("hwnas.calibration.measure_models", timed_here)
        yield


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, hwnas_in: Commands, in_this_process: None
) -> Path:
    """A folder with tables of both devices and a run whose supernet is trained."""
    folder = tmp_path_factory.mktemp("conditions")
    for device in ("simulated", "twin"):
        assert hwnas_in(folder, "profile", *SMALL, "--device", device).code == 0
    answer = hwnas_in(folder, "train", *SMALL, "--device", "simulated", "--run", "run")
    assert answer.code == 0, answer.told
    return folder


@pytest.fixture
def job(folder: Path) -> Job:
    """With the tables as they are now: searches tell them what they measure."""
    return Job(Request(SPACE, device="simulated", recipe="smoke", tables=folder / "tables"))


def search(hwnas_in: Commands, folder: Path, *flags: str) -> Any:
    return hwnas_in(folder, "search", *SMALL, *flags, "--run", "run", "--json")


def assert_valid(name: str, content: Any) -> None:
    part = {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(part).validate(content)


def middle(job: Job, name: str, share: float = 0.5) -> float:
    """A limit between the smallest and the largest reachable."""
    found = job.under(name).latency_range()
    return found.smallest + share * (found.largest - found.smallest)


# ---- a device of another runtime


def test_a_device_that_takes_another_file_gets_one_of_its_own(
    folder: Path, job: Job, hwnas_in: Commands
) -> None:
    """The same network on the other grid: measured there, and what it scores is what plain ONNX
    Runtime makes of the file."""
    names = {"simulated": "latency_ms", "board": "latency_ms@board"}
    values = {device: float(f"{middle(job, name, 0.9):.4g}") for device, name in names.items()}
    flags = [text for d, x in values.items() for text in ("--latency-ms", f"{d}={x!r}")]
    few = 2 * reachable(job.space, job.cost("bitops")).smallest  # so few that integers are needed
    answer = search(hwnas_in, folder, *flags, "--max-bitops", f"{few:.0f}")
    assert answer.code == 0, answer.told
    told = answer.content
    assert_valid("search", told)
    own, other = folder / told["model"], folder / told["files"]["board"]["model"]
    assert (own.name, other.name) == ("model.onnx", "model.board.onnx")
    assert list(told["files"]) == ["board"]
    graphs = [onnx.load(path) for path in (own, other)]
    assert read_ops(graphs[0]) == read_ops(graphs[1])
    assert any(op.precision.is_integer for op in read_ops(graphs[0])), "else nothing is shown"
    for graph, kind in zip(graphs, (TensorProto.UINT8, TensorProto.INT8), strict=True):
        zeros = {i.data_type for i in graph.graph.initializer if i.name.endswith("codes.zero")}
        assert zeros == {kind}
    seen = told["measured_under"]["latency_ms@board"]["latency_ms"]
    assert seen == pytest.approx(measured_ms(other, "board"), rel=1e-3)
    certificate = json.loads((folder / told["certificate"]).read_text())
    facts = certificate["files"]["board"]
    assert facts["accuracy"] == told["files"]["board"]["accuracy"]
    assert facts["host"]["device"] == "board"
    assert facts["hashes"]["file"] == hashlib.sha256(other.read_bytes()).hexdigest()
    session = onnxruntime.InferenceSession(other, providers=["CPUExecutionProvider"])
    with digits().final() as images:
        answers = session.run(None, {"input": as_input(images.x)})[0].argmax(1)
        assert float((answers == images.y).mean()) == pytest.approx(
            facts["accuracy"]["test"], abs=0.005
        )
    again = hwnas_in(folder, "verify", "--run", told["run"], "--tables", "tables", "--json")
    assert again.content["holds"] == dict.fromkeys((*names.values(), "bitops"), True)
    content = other.read_bytes()
    other.write_bytes(content[:-1])
    damaged = hwnas_in(folder, "verify", "--run", told["run"], "--tables", "tables", "--json")
    other.write_bytes(content)
    assert damaged.code == 2
    assert "is not the file that its certificate" in damaged.told


# ---- names


@given(device=st.from_regex(r"\w{0,12}", fullmatch=True), percentile=st.sampled_from((50, 90, 95)))
def test_a_condition_reads_back_from_its_name(device: str, percentile: int) -> None:
    asked = Condition(device, percentile)
    assert condition(asked.name) == asked


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("latency_ms", Condition("", 50)),
        ("latency_p95_ms", Condition("", 95)),
        ("latency_ms@gpu", Condition("gpu", 50)),
        ("latency_p90_ms@my_board", Condition("my_board", 90)),
        *((name, None) for name in LIMITS if name != LATENCY),
        ("latency", None),
        ("latency_ms@", None),
        ("latency_p_ms", None),
        ("latency_p95_us", None),
        ("latency_ms@a b", None),
        ("my_latency_ms", None),
        ("latency_ms@gpu ", None),
        ("latency_p99_ms", None),
        ("latency_p50_ms", None),
        ("latency_p095_ms", None),
        ("latency_p0_ms@gpu", None),
    ],
)
def test_names_of_costs(name: str, told: Condition | None) -> None:
    assert condition(name) == told
    assert told is None or told.name == name


def test_a_condition_is_told_to_people_with_its_percentile_and_device() -> None:
    assert limit_text("latency_ms", 0.5) == "0.5 ms"
    assert limit_text("latency_p90_ms", 0.5) == "0.5 ms (p90)"
    assert limit_text("latency_ms@twin", 0.5) == "0.5 ms (twin)"
    assert flag_of("latency_ms@twin") == "--latency-ms twin="
    assert flag_of("latency_p95_ms") == "--latency-ms"


@pytest.mark.parametrize(
    ("asked", "percentile", "device", "limits", "of"),
    [
        (["3"], None, None, {"latency_ms": 3.0}, None),
        (["3"], 50, "cpu", {"latency_ms": 3.0}, "cpu"),
        (["3"], 95, None, {"latency_p95_ms": 3.0}, None),
        (["cpu=3"], None, None, {"latency_ms": 3.0}, "cpu"),
        (["cpu=3"], None, "cpu", {"latency_ms": 3.0}, "cpu"),
        (["cpu=3", "gpu=0.4"], None, None, {"latency_ms": 3.0, "latency_ms@gpu": 0.4}, "cpu"),
        (["cpu=3", "gpu=0.4"], 90, "gpu",
         {"latency_p90_ms@cpu": 3.0, "latency_p90_ms": 0.4}, "gpu"),
        (["2", "gpu=0.4"], None, None, {"latency_ms": 2.0, "latency_ms@gpu": 0.4}, None),
        (["gpu=1e-1"], None, "cpu", {"latency_ms@gpu": 0.1}, "cpu"),
        (None, None, "cpu", {}, "cpu"),
    ],
)  # fmt: skip
def test_flags_as_limits(
    asked: list[str] | None,
    percentile: int | None,
    device: str | None,
    limits: dict[str, float],
    of: str | None,
) -> None:
    assert latency_limits(asked, percentile, device) == (limits, of)


# ---- which networks meet them


def by_hand(job: Job, name: str) -> dict[tuple[int, ...], float]:
    """The bound of every network of the space in ms, from rows and model one by one."""
    asked = condition(name)
    assert asked is not None
    other = job.under(name)
    table, model = other.table, other.table.models[other.model_name]
    usual, upper = (1.0, model.upper_ratio)
    if asked.percentile != 50:
        usual, upper = model.tails[str(asked.percentile)]
        assert usual <= upper * (1 + 1e-12)
    every = job.space.lattice.ops
    inside = dict(zip(every, table.in_network_us(every), strict=True))
    found = {}
    for architecture, ops in networks(job):
        each = [
            max(0.01, model.scales[op.precision.name] * inside[op] + model.per_op_us) for op in ops
        ]
        found[architecture.genes] = upper * (model.offset_us + sum(each)) / 1000
    return found


@cache
def networks(job: Job) -> list[tuple[Architecture, tuple[OpSpec, ...]]]:
    """Every network of the space."""
    return [(a, tuple(job.space.lower(a))) for a in job.space.enumerate()]


@pytest.mark.parametrize(
    "names",
    [
        ("latency_ms", "latency_ms@twin"),
        ("latency_p95_ms", "latency_p95_ms@twin"),
        ("latency_ms", "latency_p90_ms@twin", "params"),
        ("latency_ms", "latency_p95_ms"),
    ],
    ids=",".join,
)
def test_the_feasible_set_is_that_of_brute_force_over_every_bound(
    names: tuple[str, ...], job: Job
) -> None:
    bounds = {name: by_hand(job, name) for name in names if condition(name)}
    values = {name: middle(job, name, 0.45) for name in bounds}
    if "params" in names:
        values["params"] = 20_000
        bounds["params"] = {a.genes: sum(op.parameters for op in ops) for a, ops in networks(job)}
    feasible = FeasibleSet(job.space, job.limits(values))
    everything = [architecture for architecture, _ in networks(job)]
    expected = [all(bounds[n][a.genes] <= values[n] for n in names) for a in everything]
    assert 0 < sum(expected) < len(everything)
    assert feasible.contains(everything).tolist() == expected
    for name in names:
        alone = sum(bounds[name][a.genes] <= values[name] for a in everything)
        assert alone >= sum(expected)
    told = feasible.bounds(everything)
    for name in names:
        assert told[name] == pytest.approx([bounds[name][a.genes] for a in everything])
    rng = np.random.default_rng(0)
    inside = {a.genes for a, fits in zip(everything, expected, strict=True) if fits}
    for _ in range(30):
        sample = feasible.sample(rng)
        assert sample is not None
        assert sample.genes in inside


def test_the_devices_do_not_agree_which_networks_are_quick(job: Job) -> None:
    """Or the limits above would be one."""
    here, there = by_hand(job, "latency_ms"), by_hand(job, "latency_ms@twin")
    assert np.corrcoef(list(here.values()), list(there.values()))[0, 1] < 0.9


def test_a_percentile_lies_above_the_median_by_what_the_calls_do(job: Job) -> None:
    model = job.model
    assert set(model.tails) == {str(percentile) for percentile in PERCENTILES}
    assert model.tails["95"] == pytest.approx((TAIL, TAIL), rel=1e-3)
    at = model.at(95)
    assert at.predict_ms(1000.0) == pytest.approx(TAIL * model.predict_ms(1000.0), rel=1e-3)
    assert at.upper_ms(at.budget_us(0.2)) <= 0.2
    assert at.upper_ms(np.nextafter(at.budget_us(0.2), np.inf)) > 0.2


# ---- what ships


def measured_ms(path: Path, device: str) -> float:
    """The median of a file on a device, by its stated costs."""
    ops = read_ops(onnx.load(path))
    if device == "twin":
        return (3 * CALL_US + sum(map(twin_us, ops))) / 1000
    return (CALL_US + sum(map(op_us, ops))) / 1000


@pytest.mark.parametrize("percentile", [50, 95])
def test_every_shipped_file_meets_the_limits_of_both_devices(
    percentile: int, folder: Path, job: Job, hwnas_in: Commands
) -> None:
    tail = "" if percentile == 50 else f"_p{percentile}"
    names = {"simulated": f"latency{tail}_ms", "twin": f"latency{tail}_ms@twin"}
    values = {device: float(f"{middle(job, name):.4g}") for device, name in names.items()}
    flags = [text for d, x in values.items() for text in ("--latency-ms", f"{d}={x!r}")]
    flags += ["--percentile", str(percentile)]
    answer = search(hwnas_in, folder, *flags)
    assert answer.code == 0, answer.told
    told = answer.content
    assert set(told["limits"]) == set(told["feasible_min"]) == set(names.values())
    slower = 1.0 if percentile == 50 else TAIL
    file = folder / told["model"]
    for device, name in names.items():
        limit = told["limits"][name]
        assert limit["value"] == values[device]
        assert limit["binding"]
        assert told["feasible_min"][name] <= limit["upper"] <= values[device]
        seen = told["measured"] if name == LATENCY else told["measured_under"][name]
        assert seen["latency_ms"] == pytest.approx(slower * measured_ms(file, device), rel=1e-3)
        assert seen["latency_ms"] <= values[device]
        assert seen["median_ms"] * slower == pytest.approx(seen["latency_ms"], rel=1e-3)
    others = {name for name in names.values() if name != LATENCY}
    assert set(told["measured_under"]) == others
    assert told["measured"]["latency_ms"] == told["measured"]["median_ms"]
    assert Path(told["model"]).parent.name == ",".join(
        sorted(f"{name}={values[device]!r}" for device, name in names.items())
    )
    certificate = json.loads((folder / told["certificate"]).read_text())
    assert certificate["measured_under"] == told["measured_under"]
    assert certificate["holds"] == dict.fromkeys(names.values(), True)
    for finalist in file.parent.glob("finalist-*.onnx"):
        for device in names:
            assert slower * measured_ms(finalist, device) <= values[device] * (1 + 1e-3)

    before = (file.read_bytes(), (folder / told["certificate"]).read_bytes())
    assert_valid("search", told)

    again = search(hwnas_in, folder, *flags)
    assert again.content == told, "the same flags answer the same"
    assert (file.read_bytes(), (folder / told["certificate"]).read_bytes()) == before
    assert "retraining" not in again.told

    verified = hwnas_in(folder, "verify", "--run", "run", "--json")
    assert verified.code == 0, verified.told
    assert verified.content["holds"] == certificate["holds"]
    assert verified.content["measured_under"] == told["measured_under"]
    assert_valid("verify", verified.content)
    report = (folder / told["report"]).read_text()
    assert f"{'p95, ' * (percentile == 95)}twin), bound " in report
    printed = hwnas_in(folder, "verify", "--run", "run")
    assert f"{values['twin']:.4g} ms ({'p95, ' * (percentile == 95)}twin): holds" in printed.out
    assert printed.out.count("measured ") == 1 + len(others)


def test_the_proposals_of_a_search_never_break_a_bound(
    folder: Path, job: Job, hwnas_in: Commands
) -> None:
    values = {name: float(f"{middle(job, name, 0.4):.4g}") for name in ("latency_ms@twin",)}
    flags = ("--device", "simulated", "--latency-ms", f"twin={values['latency_ms@twin']!r}")
    answer = search(hwnas_in, folder, *flags)
    assert answer.code == 0, answer.told
    bounds = by_hand(job, "latency_ms@twin")
    limits = settled(job, (folder / answer.content["model"]).parent, job.limits(values))
    with closing(History(folder / "run" / "search.sqlite")) as history:
        for name in searches(job, limits).values():
            proposed = [genes for each in history.generations(name) for genes in each]
            assert proposed
            assert all(bounds[tuple(genes)] <= values["latency_ms@twin"] for genes in proposed)


def test_a_table_of_the_other_device_that_changed_is_another_question(
    folder: Path, job: Job, hwnas_in: Commands
) -> None:
    value = float(f"{middle(job, 'latency_ms@twin', 0.6):.4g}")
    flags = ("--device", "simulated", "--latency-ms", f"twin={value!r}")
    assert search(hwnas_in, folder, *flags).code == 0
    file = folder / "run" / "results" / f"latency_ms@twin={value!r}" / "finalists.json"
    content = json.loads(file.read_text())
    twin = Job(Request(SPACE, device="twin", recipe="smoke", tables=folder / "tables"))
    assert content["tables"] == {"latency_ms@twin": twin.table_id}
    assert content["table"] == job.table_id


def test_a_median_and_a_percentile_are_other_questions(
    folder: Path, job: Job, hwnas_in: Commands
) -> None:
    value = middle(job, "latency_p95_ms")
    asked = ("--device", "simulated", "--latency-ms", f"{value:.4g}")
    told = [
        search(hwnas_in, folder, *asked, *more).content
        for more in ((), ("--percentile", "90"), ("--percentile", "95"))
    ]
    assert [next(iter(each["limits"])) for each in told] == [
        "latency_ms", "latency_p90_ms", "latency_p95_ms"
    ]  # fmt: skip
    assert len({each["model"] for each in told}) == 3
    low = [next(iter(each["feasible_min"].values())) for each in told]
    assert low == sorted(low), "the higher the percentile, the larger the bounds"
    assert low[2] > 1.4 * low[0]


@pytest.mark.parametrize("device", ["", "twin"])
def test_a_limit_holds_of_its_own_percentile_and_device_alone(
    device: str, folder: Path, job: Job, hwnas_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where calls are slow that the median does not see, nothing ships."""
    asked = Condition(device, 95)
    value = float(f"{middle(job, asked.name, 0.55):.4g}")
    flags = ("--device", "simulated", "--latency-ms", f"{device or 'simulated'}={value!r}")
    measure = hwnas.job.measure

    def slow_calls(there: Job, paths: Sequence[Path]) -> list[Measurement]:
        found = measure(there, paths)
        if there.percentile == 50:
            return [replace(m, p95_us=1e6 * value) for m in found]
        assert there.request.device == (device or "simulated")
        return [replace(m, latency_us=1000 * value * 1.001) for m in found]

    with monkeypatch.context() as patch:
        patch.setattr("hwnas.ship.measure", slow_calls)
        answer = search(hwnas_in, folder, *flags, "--percentile", "95")
        assert answer.code == 4
        assert f"measure over {asked.name}=" in answer.content["error"]["what"]
        assert search(hwnas_in, folder, *flags).code == 0, "their medians are under it"
    again = search(hwnas_in, folder, *flags, "--percentile", "95")
    assert again.code == 0
    monkeypatch.setattr("hwnas.ship.measure", slow_calls)
    verified = hwnas_in(folder, "verify", "--run", "run", "--json")
    assert (verified.code, verified.content["status"]) == (4, "failed")
    assert verified.content["holds"] == {asked.name: False}


# ---- what is refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--percentile 95", "--percentile needs --latency-ms"),
        ("--percentile 95 --max-params 40000", "--percentile needs --latency-ms"),
        ("--percentile 95 --limit-fraction 0.5", "--percentile needs --latency-ms"),
        ("--latency-ms 1 --percentile 99", "--percentile is 99"),
        ("--latency-ms 1 --percentile 0", "--percentile is 0"),
        ("--latency-ms 1 --percentile -5", "--percentile is -5"),
        ("--latency-ms 1 --percentile most", "--percentile"),
        ("--latency-ms abc", "--latency-ms is 'abc'"),
        ("--latency-ms twin=abc", "--latency-ms is 'abc'"),
        ("--latency-ms twin=", "--latency-ms is ''"),
        ("--latency-ms nan", "--latency-ms is nan"),
        ("--latency-ms twin=-1", "--latency-ms is -1.0"),
        ("--device simulated --latency-ms twin=0", "--latency-ms twin= is 0.0"),
        ("--latency-ms 1 --latency-ms 2", "limits the device twice"),
        ("--latency-ms twin=1 --latency-ms twin=2", "limits twin twice"),
        ("--device twin --latency-ms twin=1 --latency-ms 2", "limits the device twice"),
        ("--device simulated --latency-ms toaster=1", "'toaster' is not a device"),
        ("--latency-ms simulated=1 --latency-ms toaster=1", "'toaster' is not a device"),
        ("--latency-ms toaster=1", "'toaster' is not a device"),
        ("--latency-ms simulated=1 --latency-ms gpu=1", "No NVIDIA driver is on this machine"),
        ("--latency-ms simulated=1 --latency-ms foreign=1", "foreign has no kernel for"),
        ("--latency-ms simulated=1 --latency-ms my-board=1", "my-board"),
        ("--latency-ms simulated=1 --limit-fraction 0.5", "needs one latency limit"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_before_anything_is_measured(
    flags: str, words: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(tmp_path, "search", *SMALL, *flags.split(), "--json")
    assert answer.code == answer.content["exit_code"] == 2, answer.told
    assert words in answer.content["error"]["what"]
    (line,) = answer.told.splitlines()
    assert line.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flags", ["", "--percentile 95"])
def test_limits_that_no_network_meets_on_the_other_device_name_it(
    flags: str, folder: Path, job: Job, hwnas_in: Commands
) -> None:
    asked = ("--latency-ms", "simulated=1", "--latency-ms", "twin=0.001", *flags.split())
    answer = search(hwnas_in, folder, *asked)
    name = "latency_p95_ms@twin" if flags else "latency_ms@twin"
    assert answer.code == 3
    assert_valid("failure", answer.content)
    assert name in answer.content["error"]["what"]
    found = job.under(name).latency_range()
    assert answer.content["feasible_min"][name] == pytest.approx(found.smallest)
    assert answer.content["feasible_max"][name] == pytest.approx(found.largest)


def test_limits_of_a_file_may_name_devices_and_a_flag_replaces_all_of_them(
    folder: Path, job: Job, hwnas_in: Commands
) -> None:
    (folder / "run.yaml").write_text(
        "device: simulated\nlimits: {latency_ms@twin: 0.001, params: 40000}\n"
    )
    assert search(hwnas_in, folder, "--config", "run.yaml").code == 3
    limit = f"{middle(job, LATENCY):.4g}"
    answer = search(hwnas_in, folder, "--config", "run.yaml", "--latency-ms", limit)
    assert answer.code == 0, answer.told
    assert set(answer.content["limits"]) == {"latency_ms", "params"}


def test_a_device_of_another_runtime_is_refused_by_the_job() -> None:
    with pytest.raises(InvalidInput, match="foreign has no kernel for"):
        Job(Request(SPACE, device="simulated", recipe="smoke")).under("latency_ms@foreign")
