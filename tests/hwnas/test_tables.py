"""`hwnas tables check, diff, merge, export`: every figure of a report recomputed by hand, what is
written read back by pandas, and what is refused.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml

from hwnas.calibration import calibration_networks, draw
from hwnas.job import Job, Request
from hwnas.quality import SEED, held_against, single_operators
from hwnas.quality import check as check_table
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.blocks import inverted_residual
from hwnas.spaces.mobile import mobile_tiny
from latency_tables.model import LatencyModel, MeasuredNetwork, Quality
from latency_tables.ops import OpSpec, Tensor
from latency_tables.table import LatencyTable
from profilers.build import measure_models
from profilers.graphs import emit, random_parameters
from profilers.measure import Protocol, Samples
from profilers.ort import OrtProfiler
from profilers.simulated import CALL_US, SimulatedProfiler, SimulatedSession, op_us
from quant.precision import ONNXRUNTIME, Precision

ROOT = Path(__file__).parents[2]
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SMALL = ("--space", SPACE, "--device", "simulated", "--recipe", "smoke")
TABLE = "tables/simulated-simulated-t1-b1.parquet"
NETWORKS = 9
Commands = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def in_this_process(timed_here: Callable[..., Any]) -> Iterator[None]:
    """Whole networks are timed without fresh processes: the simulated device answers the same."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwnas.calibration.measure_models", timed_here)
        patch.setattr("hwnas.quality.measure_models", timed_here)
        yield


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, hwnas_in: Commands, in_this_process: None
) -> Path:
    """A folder with a table of the small space; not to be written."""
    folder = tmp_path_factory.mktemp("made")
    assert hwnas_in(folder, "profile", *SMALL).code == 0
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def job(folder: Path) -> Job:
    return job_in(folder)


def job_in(folder: Path) -> Job:
    return Job(Request(SPACE, device="simulated", recipe="smoke", tables=folder / "tables"))


def check(hwnas_in: Commands, folder: Path, networks: int = NETWORKS) -> dict[str, Any]:
    flags = (*SMALL, "--networks", str(networks), "--json")
    answer = hwnas_in(folder, "tables", "check", *flags)
    assert answer.code == 0, answer.told
    content: dict[str, Any] = answer.content
    return content


def refused(answer: Any, *words: str) -> None:
    content = json.loads(answer.out)
    assert (answer.code, content["exit_code"]) == (2, 2), answer.told
    for word in words:
        assert word in content["error"]["what"]
    assert answer.told.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in answer.told


# ---- check, on a device without noise


def test_on_a_device_without_noise_a_table_is_exact_and_its_rivals_are_not(
    folder: Path, hwnas_in: Commands
) -> None:
    told = check(hwnas_in, folder)
    for name in ("quality", "observed"):
        assert told[name]["networks"] == NETWORKS
        assert told[name]["worst_error"] < 1e-4, name
        assert (told[name]["within_5"], told[name]["within_10"]) == (1.0, 1.0)
        assert told[name]["tau"] > 0.99
    assert told["floor"] == {"mean_error": 0.0, "worst_error": 0.0, "tau": 1.0}
    assert told["additivity"]["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert told["additivity"]["spread"] < 1e-4
    assert told["ranking"]["noise"] == 0.0 < told["ranking"]["step"]
    for rival in told["rivals"].values():
        assert rival["mean_error"] > 100 * told["quality"]["mean_error"]


def test_the_report_is_kept_in_the_table_and_shown(folder: Path, hwnas_in: Commands) -> None:
    before = LatencyTable.load(folder / TABLE)
    told = check(hwnas_in, folder)
    after = LatencyTable.load(folder / TABLE)
    assert replace(after, reports={}) == before
    (name,) = before.models
    report = {key: value for key, value in told.items() if key not in ("status", "exit_code")}
    assert {"table": TABLE, **after.reports[name]} == report
    shown = hwnas_in(folder, "tables", "show", TABLE)
    assert f"check of {name}" in shown.out
    assert f"on {NETWORKS} held-out networks" in shown.out
    assert hwnas_in(folder, "tables", "show", TABLE, "--json").content["reports"] == after.reports


def test_the_networks_are_none_of_those_calibrated_on_and_the_same_every_time(
    folder: Path, hwnas_in: Commands, job: Job
) -> None:
    known = calibration_networks(job.space, job.recipe.calibration)
    chosen = draw(job.space, NETWORKS, seed=SEED, but=set(known))
    assert len(set(chosen)) == NETWORKS
    assert not set(chosen) & set(known)
    first, second = (check(hwnas_in, folder) for _ in range(2))
    for told in (first, second):
        del told["made"]
    assert first == second


def test_a_check_goes_on_where_it_was_stopped(
    folder: Path, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Really in fresh processes; the journal is gone once the report is kept."""
    seen: list[int] = []

    def watched(stop: int) -> Job:
        def progress(label: str, done: int, _total: int) -> None:
            if label == "timing whole networks in fresh processes":
                seen.append(done)
                if done == stop:
                    raise KeyboardInterrupt

        return Job(job.request, progress)

    monkeypatch.setattr("hwnas.quality.measure_models", measure_models)
    with pytest.raises(KeyboardInterrupt):
        check_table(watched(stop=7), NETWORKS)
    assert len(list(job.table_path.parent.glob("*-check.journal"))) == 1
    assert seen == list(range(1, 8))
    seen.clear()
    check_table(watched(stop=-1), NETWORKS)
    assert seen == list(range(7, 4 * NETWORKS + 1))
    assert not list(job.table_path.parent.glob("*-check.journal"))


def test_without_json_a_line_a_rival_and_what_is_said_of_the_floor(
    folder: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(folder, "tables", "check", *SMALL, "--networks", "6")
    assert answer.code == 0
    for words in ("this table", "measured twice", "line on MACs", "sum of operators",
                  "ops add up to", "bound holds for", "one gene moves"):  # fmt: skip
        assert words in answer.out


# ---- check, by hand


def times_of(chosen: Sequence[Sequence[OpSpec]]) -> list[list[tuple[float, float]]]:
    """For each network, of each of four turns: the time of every call in us, and the pace."""
    rng = np.random.default_rng(5)
    found = []
    for ops in chosen:
        true = CALL_US + sum(map(op_us, ops))
        paces = rng.uniform(0.9, 1.3, 4)
        noise = rng.uniform(0.97, 1.06, 4)
        found.append([(true * p * n, p) for p, n in zip(paces, noise, strict=True)])
    return found


def tau_of(one: Sequence[float], other: Sequence[float]) -> float:
    """Kendall's tau-b, by counting pairs: networks of equal MACs are ties."""
    pairs = [(i, j) for i in range(len(one)) for j in range(i)]
    mine, theirs = ([np.sign(x[i] - x[j]) for i, j in pairs] for x in (one, other))
    agree = sum(a * b for a, b in zip(mine, theirs, strict=True))
    return float(agree / np.sqrt(sum(map(abs, mine)) * sum(map(abs, theirs))))


def spearman_of(one: Sequence[float], other: Sequence[float]) -> float:
    """Pearson's of the ranks."""
    ranks = [pd.Series(values).rank() for values in (one, other)]
    return float(np.corrcoef(*ranks)[0, 1])


def figures(predicted: Sequence[float], true: Sequence[float]) -> dict[str, float]:
    errors = [abs(p / t - 1) for p, t in zip(predicted, true, strict=True)]
    return {
        "mean_error": mean(errors),
        "worst_error": max(errors),
        "within_5": sum(error <= 0.05 for error in errors) / len(errors),
        "within_10": sum(error <= 0.10 for error in errors) / len(errors),
        "tau": tau_of(predicted, true),
        "spearman": spearman_of(predicted, true),
    }


def test_every_figure_of_a_report_is_what_its_name_says(
    folder: Path, hwnas_in: Commands, job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = calibration_networks(job.space, job.recipe.calibration)
    chosen = draw(job.space, NETWORKS, seed=SEED, but=set(known))
    chains = [job.space.lower(architecture) for architecture in chosen]
    times = times_of(chains)
    runs = job.recipe.protocol.min_runs

    def measured(
        _p: object, paths: Sequence[Path], *_: object, processes: int, journal: Path
    ) -> Any:
        assert journal.parent.resolve() == job.table_path.parent.resolve()
        assert processes == 2 * job.recipe.processes == 4
        assert len(paths) == len(times)
        return [[np.full((runs, 2), turn) for turn in each] for each in times]

    monkeypatch.setattr("hwnas.quality.measure_models", measured)
    told = check(hwnas_in, folder)

    table, model = job.table, job.model
    assert table.pace_us == 1.0
    inside = [table.in_network_us(ops) for ops in chains]
    predicted = [
        model.offset_us
        + sum(
            model.scales[op.precision.name] * us + model.per_op_us
            for op, us in zip(ops, each, strict=True)
        )
        for ops, each in zip(chains, inside, strict=True)
    ]
    paced = [[median(us / pace for us, pace in each[half::2]) for half in (0, 1)] for each in times]
    seen = [median(us for us, _ in each[::2]) for each in times]
    first, second = zip(*paced, strict=True)

    held = [s <= model.upper_ratio * p for s, p in zip(seen, predicted, strict=True)]
    bound = {"coverage": sum(held) / NETWORKS}
    close = {"rel": 1e-9, "abs": 1e-12}
    assert told["quality"] == pytest.approx(
        {"networks": NETWORKS, **figures(predicted, first), **bound}, **close
    )
    assert told["observed"] == pytest.approx(
        {"networks": NETWORKS, **figures(predicted, seen), **bound}, **close
    )
    floor = figures(first, second)
    assert told["floor"] == pytest.approx(
        {name: floor[name] for name in ("mean_error", "worst_error", "tau")}, **close
    )
    ratios = [sum(each) / us for each, us in zip(inside, first, strict=True)]
    assert told["additivity"]["ratio"] == pytest.approx(mean(ratios))
    assert told["additivity"]["spread"] == pytest.approx(float(np.std(ratios)))
    assert told["ranking"]["noise"] == told["floor"]["mean_error"]

    macs = [sum(op.macs for op in ops) for ops in chains]
    slope, offset = np.polyfit(macs, first, 1, w=1 / np.array(first))
    line = [offset + slope * count for count in macs]
    assert told["rivals"]["macs"] == pytest.approx(figures(line, first), rel=1e-6)
    single = [
        sum(CALL_US + op_us(unit) for op in ops for unit in single_operators(op)) for ops in chains
    ]
    assert told["rivals"]["single_operators"] == pytest.approx(figures(single, first), rel=1e-3)


def test_the_step_is_of_single_genes(folder: Path, hwnas_in: Commands, job: Job) -> None:
    told = check(hwnas_in, folder, 25)
    known = calibration_networks(job.space, job.recipe.calibration)
    steps = []
    for architecture in draw(job.space, 25, seed=SEED, but=set(known)):
        before = latency(job, architecture.genes)
        for place, gene in enumerate(job.space.genes):
            for value in range(len(gene.choices)):
                if value != architecture.genes[place]:
                    genes = list(architecture.genes)
                    genes[place] = value
                    steps.append(abs(latency(job, genes) / before - 1))
    low, high = np.percentile(steps, [15, 85])
    assert low < told["ranking"]["step"] < high


def latency(job: Job, genes: Sequence[int]) -> float:
    pair = np.array([job.space.architecture(genes).genes], np.int64)
    return float(job.latency.predict(float(job.latency.totals(job.space, pair)[0])))


@pytest.mark.filterwarnings("ignore:An input array is constant")
def test_a_rank_that_is_not_defined_is_null(folder: Path) -> None:
    alike = [MeasuredNetwork((("fp32", 10.0),), 10.0, 10.0)] * 5
    model = LatencyModel({"fp32": 1.0}, 0.0, 0.0, 1.0, 0.9, Quality(5, 0, 0, 1, 1, 1, 1, 1))
    found = held_against(model, alike, alike)
    assert np.isnan(found["floor"]["tau"])
    assert found["quality"]["mean_error"] == 0.0
    assert found["additivity"] == {"ratio": 1.0, "spread": 0.0}


# ---- single operators


@pytest.fixture(scope="module")
def ops() -> list[OpSpec]:
    """A sample of the ops of a preset, one of each boundary, and squeezed blocks."""
    found = {op.boundary: op for op in mobile_tiny(classes=10).lattice.ops}
    squeezed = [
        inverted_residual(
            Tensor(16, 8, 8), width, kernel=5, expansion=3, precision=Precision(name), squeeze=4
        )
        for name in ("fp32", "w8a8")
        for width in (16, 32)
    ]
    return [*found.values(), *squeezed]


def test_single_operators_take_an_op_apart_without_loss(ops: list[OpSpec]) -> None:
    assert any(len(single_operators(op)) > 6 for op in ops)
    for op in ops:
        units = single_operators(op)
        assert sum(len(unit.layers) for unit in units) == len(op.layers), op.key
        assert sum(unit.macs for unit in units) == op.macs
        assert sum(unit.parameters for unit in units) == op.parameters
        assert [layer.role for unit in units for layer in unit.layers] == [
            layer.role for layer in op.layers
        ]
        assert [unit.logits for unit in units] == [False] * (len(units) - 1) + [op.logits]
        assert units[-1].output == op.output
        assert {unit.precision for unit in units} == {op.precision}
        for unit in units:
            weighted = [layer for layer in unit.layers if layer.has_weights]
            assert len(unit.layers) == 1 or (len(unit.layers) == 2 and weighted), unit.key


def test_every_single_operator_is_a_graph_that_runs_in_its_declared_kernels(
    ops: list[OpSpec],
) -> None:
    units = {unit.key: unit for op in ops for unit in single_operators(op)}
    profiler, rng = OrtProfiler(), np.random.default_rng(0)
    for unit in units.values():
        model = emit([unit], [random_parameters(unit, rng)], ONNXRUNTIME)
        profiler.check(model)
        inputs = [
            np.zeros(
                (1, t.channels, t.height, t.width),
                np.uint8 if t.format.is_quantised else np.float32,
            )
            for t in unit.inputs
        ]
        with profiler.prepare(model) as session:
            assert session.run(*inputs).size == unit.output.elements, unit.key


# ---- diff, merge, export


def rows_of(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path).set_index("key")


def changed(path: Path, change: Callable[[LatencyTable], object], to: str) -> Path:
    table = LatencyTable.load(path)
    change(table)
    target = path.with_name(to)
    table.save(target)
    return target


def test_diff_tells_what_pandas_tells(folder: Path, hwnas_in: Commands) -> None:
    factors = np.random.default_rng(3).uniform(0.8, 1.3, 1000)

    def other(table: LatencyTable) -> None:
        gone = sorted(table.rows)[:3]
        for rows in (table.rows, table.chains):
            for place, key in enumerate(sorted(rows)):
                rows[key] = rows[key].scaled(factors[place])
        for key in gone:
            del table.rows[key]
        table.pace_us = 1.5

    second = changed(folder / TABLE, other, "other.parquet")
    told = hwnas_in(folder, "tables", "diff", TABLE, str(second), "--json").content
    a, b = rows_of(folder / TABLE), rows_of(second)
    ratio = (b["median_us"] / a["median_us"]).dropna()
    assert (told["only_first"], told["only_second"], told["common"]) == (3, 0, len(ratio))
    assert told["ratio"] == pytest.approx(ratio.median())
    assert told["pace_ratio"] == 1.5
    assert told["condition"] == ""
    furthest = np.log(ratio / ratio.median()).abs().nlargest(10)
    assert [row["key"] for row in told["changed"]] == list(furthest.index)
    for row in told["changed"]:
        assert row["first_us"] == a.loc[row["key"], "median_us"]
        assert row["second_us"] == b.loc[row["key"], "median_us"]
    printed = hwnas_in(folder, "tables", "diff", TABLE, str(second))
    assert printed.code == 0
    assert "the second's machine took 1.500 of the first's time" in printed.out


def test_halves_of_a_table_merge_to_the_whole(folder: Path, hwnas_in: Commands) -> None:
    whole = rows_of(folder / TABLE)

    def half(which: int) -> Callable[[LatencyTable], None]:
        def keep(table: LatencyTable) -> None:
            for rows in (table.rows, table.chains):
                for key in sorted(rows)[which::2]:
                    del rows[key]
            if which:
                table.models.clear()

        return keep

    one, other = (changed(folder / TABLE, half(n), f"half{n}.parquet") for n in (0, 1))
    flags = ("--into", "whole.parquet", "--json")
    told = hwnas_in(folder, "tables", "merge", str(one), str(other), *flags).content
    assert told["table"] == "whole.parquet"
    merged = rows_of(folder / "whole.parquet")
    pd.testing.assert_frame_equal(merged.sort_index(), whole.sort_index())
    table, known = (LatencyTable.load(folder / name) for name in ("whole.parquet", TABLE))
    assert told["rows"] == len(known.rows)
    assert (table.models, table.host, table.pace_us) == (known.models, known.host, known.pace_us)


def test_rows_of_both_are_the_seconds_told_at_the_firsts_pace(
    folder: Path, hwnas_in: Commands
) -> None:
    def slower(table: LatencyTable) -> None:
        table.pace_us = 4.0
        for rows in (table.rows, table.chains):
            for key in rows:
                rows[key] = rows[key].scaled(5.0)

    second = changed(folder / TABLE, slower, "other.parquet")
    answer = hwnas_in(folder, "tables", "merge", TABLE, str(second), "--into", "both.parquet")
    assert answer.code == 0
    whole, merged = rows_of(folder / TABLE), rows_of(folder / "both.parquet")
    times = ["median_us", "low_us", "high_us", "min_us", "p95_us"]
    pd.testing.assert_frame_equal(merged[times], whole[times] * 1.25)
    table, known = (LatencyTable.load(folder / name) for name in ("both.parquet", TABLE))
    (model,), (before,) = table.models.values(), known.models.values()
    for percentile in (50, 90, 95):
        told, known_ms = (m.at(percentile).upper_ms(us) for m, us in ((model, 1e3), (before, 4e3)))
        assert told == pytest.approx(known_ms), f"the same network has the same p{percentile}"


def test_merging_into_one_of_the_two_is_allowed(folder: Path, hwnas_in: Commands) -> None:
    shutil.copy(folder / TABLE, folder / "other.parquet")
    before = rows_of(folder / TABLE)
    answer = hwnas_in(folder, "tables", "merge", TABLE, "other.parquet", "--into", TABLE)
    assert answer.code == 0, answer.told
    pd.testing.assert_frame_equal(rows_of(folder / TABLE), before)


def test_csv_holds_every_row_and_chain_to_the_last_digit(folder: Path, hwnas_in: Commands) -> None:
    told = hwnas_in(folder, "tables", "export", TABLE, "--csv", "rows.csv", "--json").content
    csv = pd.read_csv(folder / "rows.csv", float_precision="round_trip")
    assert told == {"status": "ok", "exit_code": 0, "csv": "rows.csv", "rows": len(csv)}
    pd.testing.assert_frame_equal(csv, pd.read_parquet(folder / TABLE))
    assert [len(json.loads(text)) > 1 for text in csv["ops"]] == sorted(
        len(json.loads(text)) > 1 for text in csv["ops"]
    ), "ops alone come first"
    again = hwnas_in(folder, "tables", "export", TABLE, "--csv", "rows.csv", "--json").content
    assert again == told


# ---- what is refused


def test_merge_refuses_a_file_that_is_there_and_leaves_it(folder: Path, hwnas_in: Commands) -> None:
    (folder / "notes.parquet").write_text("mine")
    flags = ("--into", "notes.parquet", "--json")
    refused(hwnas_in(folder, "tables", "merge", TABLE, TABLE, *flags), "notes.parquet is there")
    assert (folder / "notes.parquet").read_text() == "mine"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: setattr(t, "host", replace(t.host, cpu="another")), "different hosts (cpu: "),
        (lambda t: setattr(t, "host", replace(t.host, threads=4)), "(threads: 1 against 4)"),
        (lambda t: t.protocol.update(rounds=6), "different protocols (rounds: 4 against 6)"),
        (lambda t: t.protocol.update(pace_ms=2.0), "(pace_ms: 1.0 against 2.0)"),
    ],
)
def test_tables_of_other_conditions_do_not_merge_and_the_field_is_named(
    change: Callable[[LatencyTable], object], words: str, folder: Path, hwnas_in: Commands
) -> None:
    other = changed(folder / TABLE, change, "other.parquet")
    command = ("tables", "merge", TABLE, str(other), "--into", "both.parquet", "--json")
    refused(hwnas_in(folder, *command), words)
    assert not (folder / "both.parquet").exists()
    told = hwnas_in(folder, "tables", "diff", TABLE, str(other), "--json").content
    assert told["condition"]
    assert told["condition"] in words or words.endswith("(cpu: ")


def test_export_does_not_write_over_the_table(folder: Path, hwnas_in: Commands) -> None:
    before = (folder / TABLE).read_bytes()
    command = ("tables", "export", TABLE, "--csv", f"tables/../{TABLE}", "--json")
    refused(hwnas_in(folder, *command), "is the table itself")
    assert (folder / TABLE).read_bytes() == before


def test_a_space_that_is_not_profiled_is_told_so(folder: Path, hwnas_in: Commands) -> None:
    other = ("--device", "simulated", "--recipe", "smoke", "--json")
    refused(hwnas_in(folder, "tables", "check", *other), TABLE, "does not hold all of mobile-tiny")
    (folder / TABLE).unlink()
    answer = hwnas_in(folder, "tables", "check", *SMALL, "--json")
    refused(answer, TABLE, "does not hold all of plain")
    assert "hwnas profile" in answer.content["error"]["next"]


@pytest.mark.parametrize("count", ["4", "0", "-3"])
def test_too_few_networks_say_nothing_of_ranks(
    count: str, folder: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(folder, "tables", "check", *SMALL, "--networks", count, "--json")
    refused(answer, f"--networks is {count}")
    assert LatencyTable.load(folder / TABLE).reports == {}


def test_a_space_of_which_no_network_is_left_is_told_so(tmp_path: Path, hwnas_in: Commands) -> None:
    text = (ROOT / "examples" / "own_space.py").read_text()
    text = text.replace('Position("conv1", options(16, 32), conv),', "")
    text = text.replace('Position("conv2", options(32, 64), conv),', "")
    text = text.replace("options(8, 16)", "options(8, 16, 24)")
    (tmp_path / "twelve.py").write_text(text)
    flags = ("--space", "twelve.py:space", "--device", "simulated", "--recipe", "smoke", "--json")
    assert hwnas_in(tmp_path, "profile", *flags).code == 0
    refused(hwnas_in(tmp_path, "tables", "check", *flags), "plain has 0 networks")


def test_a_table_of_other_counts_of_networks_is_another_model(
    folder: Path, hwnas_in: Commands
) -> None:
    recipe = {"name": "smoke", "calibration": {"fit": 14}}
    (folder / "run.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    flags = ("--space", SPACE, "--device", "simulated", "--config", "run.yaml", "--json")
    refused(hwnas_in(folder, "tables", "check", *flags), "does not hold all of plain")


# ---- before a known table is used


@pytest.mark.parametrize(
    ("factor", "words"),
    [([2.0, 1.0], "no longer matches this machine"), ([2.0, 2.0], "100% slower now")],
    ids=["rows", "pace"],
)
def test_a_search_says_that_its_table_no_longer_holds(
    factor: list[float], words: str, folder: Path, hwnas_in: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = SimulatedSession._block

    def slower(session: SimulatedSession, protocol: Protocol) -> Samples:
        return plain(session, protocol) * factor

    monkeypatch.setattr(SimulatedSession, "_block", slower)
    too_little = ("search", *SMALL, "--latency-ms", "0.001", "--json")
    answer = hwnas_in(folder, *too_little)
    assert answer.code == 3, "the table is used all the same"
    assert words in answer.told
    assert "Traceback" not in answer.told
    assert words not in hwnas_in(folder, *too_little, "--quiet").told


def test_a_search_says_nothing_of_a_table_that_holds(folder: Path, hwnas_in: Commands) -> None:
    answer = hwnas_in(folder, "search", *SMALL, "--latency-ms", "0.001")
    assert answer.code == 3
    assert "matches" not in answer.told
    assert "slower" not in answer.told


def test_the_simulated_device_is_what_its_table_says(job: Job) -> None:
    """That the tests above measure nothing: every row is the stated cost."""
    assert isinstance(job.profiler, SimulatedProfiler)
    space: SearchSpace = job.space
    for op, inside in zip(
        space.lattice.ops, job.table.in_network_us(space.lattice.ops), strict=True
    ):
        alone = job.table.lookup(op)
        assert alone.median_us == pytest.approx(CALL_US + op_us(op), abs=2e-3)
        assert alone.low_us == alone.median_us == alone.high_us
        first = op.inputs[0] == space.input
        assert inside == pytest.approx(op_us(op) + (CALL_US if first else 0), abs=6e-3)
