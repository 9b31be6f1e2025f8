"""`hwnas profile --bundle` and `--from-bundle`: a space measured elsewhere becomes a table here."""

import contextlib
import hashlib
import io
import json
import os
import shlex
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import numpy as np
import pytest
import yaml

import hwnas.bundle
from hwnas import cli
from hwnas.bundle import Graphs
from hwnas.calibration import SEED, calibration_networks
from hwnas.job import Job, Request
from hwnas.spaces.registry import load_space
from latency_tables.boundaries import chain_key
from latency_tables.model import MeasuredNetwork, calibrate
from latency_tables.table import LatencyTable
from profilers.bundle_runner import RESULT
from profilers.measure import Protocol, summarise

ROOT = Path(__file__).parents[2]
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SCHEMA = json.loads((ROOT / "docs" / "output.schema.json").read_text())
RECIPE = {
    "name": "smoke",
    "protocol": {"rounds": 3, "warmup_ms": 0.5, "block_ms": 1.0, "min_runs": 4, "max_runs": 40},
}
PROTOCOL = Protocol(**RECIPE["protocol"])  # type: ignore[arg-type]
FLAGS = ("--space", SPACE, "--config", "run.yaml")
TABLE = Path("tables") / "pi5-cpu-onnxruntime-t1-b1.parquet"


class Answer(NamedTuple):
    code: int
    out: str
    told: str

    @property
    def content(self) -> dict[str, Any]:
        """The one object on standard output."""
        content: dict[str, Any] = json.loads(self.out)
        return content


def hwnas_in(folder: Path, *arguments: str) -> Answer:
    """What a command answers in a folder."""
    out, told, before = io.StringIO(), io.StringIO(), Path.cwd()
    os.chdir(folder)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(told):
            code = cli.run(list(arguments))
    finally:
        os.chdir(before)
    return Answer(code, out.getvalue(), told.getvalue())


def assert_valid(name: str, content: Any) -> None:
    part = {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    jsonschema.Draft202012Validator(part).validate(content)
    jsonschema.Draft202012Validator(SCHEMA).validate(content)


def configured(folder: Path, recipe: dict[str, Any] = RECIPE) -> Path:
    (folder / "run.yaml").write_text(yaml.safe_dump({"recipe": recipe}))
    return folder


def bundled(folder: Path, python: Path, name: str, *flags: str) -> Answer:
    """A bundle `name` in a folder, measured."""
    answer = hwnas_in(folder, "profile", *FLAGS, "--bundle", name, *flags, "--json")
    assert answer.code == 0, answer.told
    measure(folder, python, name)
    return answer


def measure(folder: Path, python: Path, name: str) -> None:
    subprocess.run(
        [str(python), f"{name}/run.py"], cwd=folder, env={}, check=True, capture_output=True
    )


@pytest.fixture(scope="module")
def measured(
    tmp_path_factory: pytest.TempPathFactory, bare_python: Path
) -> tuple[Path, dict[str, Any]]:
    """A folder with a bundle that was measured, and what was told when it was written."""
    folder = configured(tmp_path_factory.mktemp("measured"))
    return folder, bundled(folder, bare_python, "there").content


@pytest.fixture(scope="module")
def imported(measured: tuple[Path, dict[str, Any]]) -> tuple[Path, dict[str, Any]]:
    """The same with its table, and what was told of that."""
    folder, _ = measured
    answer = hwnas_in(
        folder, "profile", *FLAGS, "--from-bundle", f"there/{RESULT}", "--name", "pi5", "--json"
    )
    assert answer.code == 0, answer.told
    return folder, answer.content


@pytest.fixture
def folder(measured: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    """A folder of its own with the result, without a table."""
    (tmp_path / "there").mkdir()
    shutil.copyfile(measured[0] / "there" / RESULT, tmp_path / "there" / RESULT)
    return configured(tmp_path)


def result_of(folder: Path) -> tuple[dict[str, Any], list[tuple[str, list[Any]]]]:
    """The header and the blocks of a result."""
    header, *blocks, _ = (
        json.loads(line) for line in (folder / "there" / RESULT).read_text().splitlines()
    )
    return header, [(key, samples) for key, samples in blocks]


def seal(folder: Path, header: dict[str, Any], blocks: list[tuple[str, list[Any]]]) -> None:
    text = "".join(json.dumps(line) + "\n" for line in (header, *blocks)).encode()
    last = {"blocks": len(blocks), "sha256": hashlib.sha256(text).hexdigest()}
    (folder / "there" / RESULT).write_bytes(text + json.dumps(last).encode() + b"\n")


def take(folder: Path, *flags: str, name: str = "pi5") -> Answer:
    """The import of the result in a folder."""
    words = ("--from-bundle", "there", "--name", name, "--json")
    return hwnas_in(folder, "profile", *FLAGS, *words, *flags)


def job_of(folder: Path) -> Job:
    return Job(Request(space=SPACE, recipe=RECIPE, tables=folder / "tables"))


# ---- the way through


def test_what_is_told_of_a_bundle_is_so_and_as_the_schema_says(
    measured: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = measured
    assert_valid("profile", told)
    assert_valid("bundled", told)
    job = job_of(folder)
    models = [len(list((folder / "there" / kind).glob("*.onnx"))) for kind in ("rows", "networks")]
    assert models == [told["rows"], told["networks"]]
    assert models == [len(Graphs(job).chains), job.recipe.calibration.networks]
    assert told["bundle"] == "there"
    assert told["runner"] == "python there/run.py"
    assert told["import_command"] in (folder / "there" / "README.txt").read_text()
    for field in set(told) - {"status", "exit_code"}:
        short = {key: value for key, value in told.items() if key != field}
        assert not jsonschema.Draft202012Validator(SCHEMA).is_valid(short), field
    assert not jsonschema.Draft202012Validator(SCHEMA).is_valid({**told, "table": "t"})


def test_the_command_that_is_told_takes_the_result(
    measured: tuple[Path, dict[str, Any]], folder: Path
) -> None:
    program, *words = shlex.split(measured[1]["import_command"])
    given = {"NAME": "arm", "FILE": "run.yaml", RESULT: f"there/{RESULT}"}
    answer = hwnas_in(folder, *(given.get(word, word) for word in words))
    assert (program, answer.code) == ("hwnas", 0), answer.told
    assert (folder / "tables" / "arm-cpu-onnxruntime-t1-b1.parquet").exists()


def test_every_row_is_what_its_raw_samples_summarise_to(
    imported: tuple[Path, dict[str, Any]],
) -> None:
    folder, told = imported
    assert_valid("profile", told)
    assert_valid("profiled", told)
    assert told["table"] == str(TABLE)
    header, blocks = result_of(folder)
    table = LatencyTable.load(folder / TABLE)
    assert asdict(table.host) == header["host"]
    assert table.protocol == header["identity"]["protocol"] == PROTOCOL.to_dict()
    ops = {op.key: op for op in job_of(folder).space.lattice.ops}
    assert list(table.rows) == list(ops)
    assert told["rows"] == len(ops)
    everything = table.rows | table.chains
    assert set(everything) == set(Graphs(job_of(folder)).chains)
    samples = [np.array(samples) for key, samples in blocks if not key.startswith("network")]
    assert table.pace_us == float(np.median(np.concatenate(samples)[:, 1]))
    for key, row in everything.items():
        raw = [np.array(samples) for found, samples in blocks if found == key]
        wanted = asdict(summarise(raw, PROTOCOL, pace_us=table.pace_us))
        assert wanted.pop("latency_us") == row.median_us
        assert len(raw) == PROTOCOL.rounds
        assert chain_key(row.chain) == key
        assert row.precision == row.chain[-1].precision.name
        assert {name: getattr(row, name) for name in wanted} == wanted
    assert [row.chain for row in table.rows.values()] == [(op,) for op in ops.values()]
    assert told["unstable_rows"] == sum(not row.stable for row in table.rows.values())


def test_the_calibration_is_that_of_its_whole_networks(
    imported: tuple[Path, dict[str, Any]],
) -> None:
    """Fitted here again from the raw samples, on the networks that the sampler's seed names."""
    folder, told = imported
    job, (_, blocks) = job_of(folder), result_of(folder)
    table = LatencyTable.load(folder / TABLE)
    assert list(table.models) == [job.model_name]
    chosen = calibration_networks(job.space, job.recipe.calibration)
    chains = [tuple(job.space.lower(architecture)) for architecture in chosen]
    assert SEED == 1
    assert len(set(chains)) == len(chains) == job.recipe.calibration.networks
    networks = []
    for number, ops in enumerate(chains):
        raw = [np.array(samples) for key, samples in blocks if key == f"network {number}"]
        assert len(raw) == job.recipe.processes
        inside = zip(ops, table.in_network_us(ops), strict=True)
        rows = tuple((op.precision.name, us) for op, us in inside)
        paced = summarise(raw, PROTOCOL, pace_us=table.pace_us).median_us
        calls = np.concatenate(raw)[:, 0]
        tails = {percentile: float(np.percentile(calls, percentile)) for percentile in (90, 95)}
        seen = float(np.median([np.median(block[:, 0]) for block in raw]))
        networks.append(MeasuredNetwork(rows, paced, seen, tails))
    fit, bound = job.recipe.calibration.fit, job.recipe.calibration.bound
    wanted = calibrate(networks[:fit], networks[fit : fit + bound], networks[fit + bound :])
    assert table.models[job.model_name] == wanted
    assert told["quality"] == asdict(wanted.quality)
    assert told["upper_ratio"] == wanted.upper_ratio


def test_a_named_table_predicts_and_tells_its_machine(
    imported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, told = imported
    space = load_space(SPACE, classes=10, image_channels=1, size=32)
    network = next(iter(space.enumerate()))
    (tmp_path / "a.json").write_text(json.dumps(space.describe(network)))
    answer = hwnas_in(
        folder, "predict", str(tmp_path / "a.json"), "--space", SPACE, "--table", str(TABLE),
        "--json",
    )  # fmt: skip
    assert answer.code == 0, answer.told
    assert_valid("predict", answer.content)
    low, high = told["feasible_min"]["latency_ms"], told["feasible_max"]["latency_ms"]
    assert low <= answer.content["upper_latency_ms"] * (1 + 1e-9)
    assert answer.content["upper_latency_ms"] <= high * (1 + 1e-9)
    (listed,) = hwnas_in(folder, "tables", "--json").content["tables"]
    assert listed["table"] == str(TABLE)
    shown = hwnas_in(folder, "tables", "show", str(TABLE), "--json").content
    assert shown["host"] == result_of(folder)[0]["host"]
    assert_valid("tables-show", shown)


def test_a_named_table_is_never_used_by_itself(imported: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = imported
    job = job_of(folder)
    assert job.table_path != folder / TABLE
    assert not hwnas.run.is_profiled(job)
    assert hwnas.run.plan(job).missing == len(Graphs(job).chains)


@pytest.mark.slow
def test_it_predicts_as_a_table_that_was_measured_directly(
    imported: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The same machine minutes later, other processes beside: within a factor of two, typically."""
    job = job_of(tmp_path)
    direct, there = job.table, LatencyTable.load(imported[0] / TABLE)
    assert direct.host.difference(there.host) == ""
    ratios = []
    for ops in hwnas.bundle.calibration_chains(job):
        one, other = (
            table.models[job.model_name].offset_us
            + sum(
                table.models[job.model_name].op_cost_us(r.precision, r.median_us)
                for r in map(table.lookup, ops)
            )
            for table in (direct, there)
        )
        ratios.append(other / one)
    assert 0.5 < np.median(ratios) < 2


# ---- what is refused


def assert_refused(answer: Answer, words: str) -> None:
    content = answer.content
    assert_valid("failure", content)
    assert answer.code == content["exit_code"] == 2, answer.told
    assert words in content["error"]["what"]
    lines = answer.told.splitlines()
    assert lines[-1].startswith("error: ")
    assert "Traceback" not in answer.told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--space", "mobile-tiny"), "(space: plain against mobile-tiny)"),
        (("--image-size", "16"), "(fingerprint: "),
        (("--threads", "2"), "(threads: 1 against 2)"),
        (("--batch", "4"), "(batch: 1 against 4)"),
        (("--recipe", "smoke"), "(protocol: "),
        (("--device", "simulated"), "on a CPU, not on 'simulated'"),
        (("--name", "a/b"), "--name is 'a/b'"),
        (("--name", ""), "--name is ''"),
        (("--name", ".hidden"), "--name is '.hidden'"),
        (("--from-bundle", "nowhere"), "nowhere cannot be read"),
    ],
)
def test_flags_of_another_bundle_are_refused(
    flags: tuple[str, str], words: str, folder: Path
) -> None:
    assert_refused(take(folder, *flags), words)
    assert not (folder / "tables").exists()


@pytest.mark.parametrize(
    "recipe",
    [
        {**RECIPE, "processes": 3},
        {**RECIPE, "calibration": {"fit": 13}},
        {**RECIPE, "protocol": {**PROTOCOL.to_dict(), "rounds": 2}},
    ],
)
def test_a_recipe_that_measures_otherwise_is_refused(recipe: dict[str, Any], folder: Path) -> None:
    configured(folder, recipe)
    assert_refused(take(folder), "was measured for another bundle (")


def test_a_recipe_that_trains_otherwise_is_taken(folder: Path) -> None:
    configured(folder, {**RECIPE, "supernet": {"steps": 11}})
    assert take(folder).code == 0


def test_another_version_of_hwnas_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hwnas.bundle, "__version__", "9.9")
    assert_refused(take(folder), "(hwnas: 0.1.0 against 9.9)")


def slowed(samples: list[Any]) -> list[Any]:
    return (np.array(samples) * 2).tolist()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1000]), "is not whole, or was changed"),
        (lambda path: path.write_bytes(path.read_bytes().replace(b"5", b"6", 1)), "was changed"),
        (lambda path: path.write_bytes(b""), "is not the result of a bundle"),
        (lambda path: path.unlink(), "cannot be read"),
    ],
)
def test_a_damaged_result_is_refused(
    spoil: Callable[[Path], object], words: str, folder: Path
) -> None:
    spoil(folder / "there" / RESULT)
    answer = take(folder)
    assert_refused(answer, words)
    assert answer.content["error"]["accepted"]
    assert answer.content["error"]["next"]
    assert not (folder / "tables").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--bundle", "b", "--from-bundle", "there", "--name", "x"), "contradicts --from-bundle"),
        (("--from-bundle", "there"), "--from-bundle needs --name"),
        (("--name", "x"), "--name needs --from-bundle"),
        (("--bundle", "b", "--name", "x"), "--name needs --from-bundle"),
        (("--bundle", "there"), "there is there already"),
        (("--bundle", "b", "--device", "simulated"), "on a CPU, not on 'simulated'"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    arguments: tuple[str, ...], words: str, folder: Path
) -> None:
    before = sorted(folder.rglob("*"))
    assert_refused(hwnas_in(folder, "profile", *FLAGS, *arguments, "--json"), words)
    assert sorted(folder.rglob("*")) == before


# ---- tables that are there


def test_the_same_result_twice_is_the_same_table(folder: Path) -> None:
    first = take(folder).content
    table = LatencyTable.load(folder / TABLE)
    assert take(folder).content == first
    assert LatencyTable.load(folder / TABLE) == table


def test_another_measurement_of_the_space_does_not_replace_a_table(folder: Path) -> None:
    assert take(folder).code == 0
    table = LatencyTable.load(folder / TABLE)
    header, blocks = result_of(folder)
    seal(folder, header, [(key, slowed(samples)) for key, samples in blocks])
    assert_refused(take(folder), f"{TABLE} holds another measurement of this space")
    assert LatencyTable.load(folder / TABLE) == table
    assert take(folder, name="pi5.2").code == 0


@pytest.mark.parametrize("field", ["cpu", "runtime_version", "flags"])
def test_a_table_of_another_machine_is_not_mixed(field: str, folder: Path) -> None:
    assert take(folder).code == 0
    header, blocks = result_of(folder)
    header["host"][field] = "another"
    seal(folder, header, blocks)
    assert_refused(take(folder), f"{TABLE} is there already, and the result is of another machine")
    assert take(folder, name="other").code == 0
    found = LatencyTable.load(folder / "tables" / "other-cpu-onnxruntime-t1-b1.parquet")
    assert getattr(found.host, field) == "another"


def test_a_second_space_of_the_machine_joins_the_table(folder: Path, bare_python: Path) -> None:
    """The same ops, but other networks to calibrate on: known rows stay as they are."""
    assert take(folder).code == 0
    before = LatencyTable.load(folder / TABLE)
    configured(folder, {**RECIPE, "calibration": {"fit": 14}})
    bundled(folder, bare_python, "more")
    answer = hwnas_in(folder, "profile", *FLAGS, "--from-bundle", "more", "--name", "pi5", "--json")
    assert answer.code == 0, answer.told
    after = LatencyTable.load(folder / TABLE)
    assert after.rows == before.rows
    assert len(after.models) == 2
    assert before.models.items() <= after.models.items()


def test_a_table_that_another_process_holds_is_told(folder: Path) -> None:
    (folder / "tables").mkdir()
    with hwnas.bundle.table_lock(folder / TABLE):
        assert_refused(take(folder), "is in use by process")


def test_many_unstable_rows_are_told(folder: Path) -> None:
    header, blocks = result_of(folder)
    seen: Counter[str] = Counter()
    spread = []
    for key, samples in blocks:
        spread.append((key, (np.array(samples) * [1 + seen[key], 1]).tolist()))  # not the pace
        seen[key] += 1
    seal(folder, header, spread)
    answer = take(folder)
    assert answer.code == 0
    assert answer.content["unstable_rows"] == answer.content["rows"]
    assert "were measured with a wide spread" in answer.told


@pytest.mark.slow
def test_a_bundle_and_its_table_for_several_threads_and_images(
    folder: Path, bare_python: Path
) -> None:
    bundled(folder, bare_python, "wide", "--threads", "2", "--batch", "3")
    words = ("--from-bundle", "wide", "--name", "pi5", "--threads", "2", "--batch", "3", "--json")
    answer = hwnas_in(folder, "profile", *FLAGS, *words)
    assert answer.content["table"] == str(TABLE).replace("t1-b1", "t2-b3")
    table = LatencyTable.load(folder / answer.content["table"])
    assert (table.host.threads, table.host.batch) == (2, 3)
