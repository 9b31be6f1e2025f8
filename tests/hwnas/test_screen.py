"""What every command prints with --json, on success and on failure, against the schema of it."""

import copy
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from typer.main import get_command

import hwnas.ship
from hwnas import cli
from hwnas.screen import Screen, outcome
from profilers.measure import Measurement
from quant.errors import InvalidInput, Unreachable, Unstable

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "output.schema.json").read_text())
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SMALL = ("--space", SPACE, "--device", "simulated", "--recipe", "smoke")
COMMANDS = (
    "profile", "train", "search", "retrain", "export", "verify", "predict", "devices", "spaces",
    "tables", "tables check", "tables show", "tables diff", "tables merge", "tables export", "runs",
)  # fmt: skip
Commands = Callable[..., Any]


def whole(text: str) -> Any:
    """The one object that standard output holds, by the letter of JSON (which has no NaN)."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    assert text.startswith("{")
    assert text.endswith("}\n")
    return json.loads(text, parse_constant=refuse)


def validator(name: str) -> jsonschema.Draft202012Validator:
    """The validator of one command, or of `failure`."""
    part = {"$ref": f"#/$defs/{name.replace(' ', '-')}", "$defs": SCHEMA["$defs"]}
    return jsonschema.Draft202012Validator(part)


def assert_valid(name: str, content: Any) -> None:
    errors = [
        f"{error.json_path}: {error.message}" for error in validator(name).iter_errors(content)
    ]
    assert errors == []
    jsonschema.Draft202012Validator(SCHEMA).validate(content)


@pytest.fixture(scope="module")
def folder(
    tmp_path_factory: pytest.TempPathFactory, searched_as: Callable[[Path, str], Path]
) -> Path:
    """A folder with a searched run in it."""
    folder = searched_as(tmp_path_factory.mktemp("searched"), "runs/a")
    (folder / "tables" / "torn.parquet").write_bytes(b"PAR1")
    (folder / "torn.onnx").write_bytes(b"no model")
    return folder


def arguments_of(command: str, folder: Path) -> list[str]:
    """A command as it is typed in `folder`, to succeed."""
    result = folder / "runs" / "a" / (folder / "runs" / "a" / "best").read_text().strip()
    (table,) = (folder / "tables").glob("simulated*.parquet")
    more = {
        "profile": SMALL,
        "train": (*SMALL, "--run", "runs/a"),
        "search": (*SMALL, "--limit-fraction", "0.5", "--max-params", "40000", "--run", "runs/a"),
        "predict": (str(result / "model.onnx"),),
        "tables check": ("--networks", "6", *SMALL),
        "tables show": (str(table),),
        "tables diff": (str(table), str(table)),
        "tables merge": (str(table), str(table), "--into", "both.parquet"),
        "tables export": (str(table), "--csv", "rows.csv"),
    }
    return [*command.split(), *more.get(command, ()), "--json"]


@pytest.fixture(scope="module")
def told(
    folder: Path,
    hwnas_in: Commands,
    measured_here: Callable[..., list[Measurement]],
    timed_here: Callable[..., Any],
) -> dict[str, dict[str, Any]]:
    """What each command prints on success, and `failure` with everything that it can hold."""
    answers = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hwnas.ship, "measure", measured_here)
        patch.setattr("hwnas.quality.measure_models", timed_here)
        for command in COMMANDS:
            answer = hwnas_in(folder, *arguments_of(command, folder))
            assert answer.code == 0, answer.told
            answers[command] = whole(answer.out)
        patch.setattr(hwnas.run, "search_to_certificate", raising(Unstable("It was busy.")))
        answer = hwnas_in(folder, *arguments_of("search", folder))
    answers["failure"] = whole(answer.out)
    return answers


def raising(error: BaseException) -> Callable[..., Any]:
    def broken(*_: object, **__: object) -> None:
        raise error

    return broken


# ---- the schema


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_schema_has_a_part_for_every_command_and_one_for_failure() -> None:
    parts = [choice["$ref"].rpartition("/")[2] for choice in SCHEMA["anyOf"]]
    assert parts == [*(command.replace(" ", "-") for command in COMMANDS), "failure"]
    registered = get_command(cli.app).commands  # type: ignore[attr-defined]
    assert {command.partition(" ")[0] for command in COMMANDS} == set(registered)


@pytest.mark.parametrize("command", COMMANDS)
def test_success_is_as_the_schema_says(command: str, told: dict[str, dict[str, Any]]) -> None:
    assert_valid(command, told[command])
    others = [name for name in (*COMMANDS, "failure") if validator(name).is_valid(told[command])]
    assert others == [command], "an object tells which command it is of"


def test_a_failure_that_knows_a_run_and_a_range_tells_them(
    told: dict[str, dict[str, Any]],
) -> None:
    assert_valid("failure", told["failure"])
    assert told["failure"]["run"] == "runs/a"
    assert set(told["failure"]["feasible_min"]) == {"latency_ms", "params"}
    for name, value in told["failure"]["feasible_min"].items():
        assert 0 < value < told["failure"]["feasible_max"][name]


def test_a_file_that_is_no_table_and_a_result_without_a_file_are_listed_too(
    folder: Path, told: dict[str, dict[str, Any]], tmp_path: Path, hwnas_in: Commands
) -> None:
    assert [set(table) == {"table", "error"} for table in told["tables"]["tables"]] == [False, True]
    (tmp_path / "runs" / "b" / "results" / "params=1").mkdir(parents=True)
    (tmp_path / "runs" / "b" / "config.yaml").write_bytes(
        (folder / "runs" / "a" / "config.yaml").read_bytes()
    )
    listed = whole(hwnas_in(tmp_path, "runs", "--json").out)
    assert_valid("runs", listed)
    assert listed["runs"][0]["results"][0]["model"] is None
    assert not listed["runs"][0]["trained"]


OPTIONAL = {"run", "feasible_min", "feasible_max"}
"""Of a failure."""

MAPS = (
    "architecture", "genes", "models", "scales", "limits", "holds", "feasible_min",
    "feasible_max", "search_val_shared_weights", "reports", "tails",
)  # fmt: skip
"""Objects whose names are the user's: of genes, latency models, precisions, limits, strategies."""

WRONG = {"surprise": [1]}
"""No field of any object holds such a thing."""


def places(content: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    """The path of every value in an object, and of everything in it."""
    yield path
    inner: Iterable[tuple[str | int, Any]] = ()
    if isinstance(content, dict):
        inner = content.items()
    elif isinstance(content, list):
        inner = enumerate(content)
    for name, value in inner:
        yield from places(value, (*path, name))


def changed(content: Any, path: tuple[str | int, ...], change: Callable[[Any, Any], None]) -> Any:
    """A copy of an object, in which `change(parent, name)` was done to the value at `path`."""
    content = copy.deepcopy(content)
    parent = content
    for name in path[:-1]:
        parent = parent[name]
    change(parent, path[-1])
    return content


def shortened(told: dict[str, Any]) -> dict[str, Any]:
    """The same object with one element of each list: mutating all of them tells nothing more."""

    def short(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: short(inner) for name, inner in list(value.items())}
        return [short(each) for each in value[:1]] if isinstance(value, list) else value

    return {name: short(value) for name, value in told.items()}


STAGES = ("train", "retrain", "export", "verify")
"""They tell the reachable range only where a table is there."""


@pytest.mark.parametrize("command", [*COMMANDS, "failure"])
def test_the_schema_refuses_a_field_that_is_missing(
    command: str, told: dict[str, dict[str, Any]]
) -> None:
    content, check = shortened(told[command]), validator(command)
    refused = 0
    for path in places(content):
        named = bool(path) and isinstance(path[-1], str)
        in_map = len(path) > 1 and path[-2] in MAPS
        if not named or in_map or (command == "failure" and path[-1] in OPTIONAL):
            continue
        if command in STAGES and path[-1] in ("feasible_min", "feasible_max"):
            continue
        without = changed(content, path, lambda parent, name: parent.pop(name))
        assert not check.is_valid(without), f"{command} without {path}"
        refused += 1
    assert refused >= 3


@pytest.mark.parametrize("command", [*COMMANDS, "failure"])
def test_the_schema_refuses_a_field_too_many(command: str, told: dict[str, dict[str, Any]]) -> None:
    content, check = shortened(told[command]), validator(command)
    for path in places({"": content}):
        inside = {"": content}
        for name in path:
            inside = inside[name]
        if not path or not isinstance(inside, dict):
            continue
        more = changed({"": content}, (*path, "surprise"), lambda o, name: o.update({name: WRONG}))
        assert not check.is_valid(more[""]), f"{command} with another field at {path}"


@pytest.mark.parametrize("command", [*COMMANDS, "failure"])
def test_the_schema_refuses_a_value_of_another_type(
    command: str, told: dict[str, dict[str, Any]]
) -> None:
    content, check = shortened(told[command]), validator(command)
    for path in places(content):
        inside: Any = content
        for name in path:
            inside = inside[name]
        for other in others(path[-1], inside) if path else []:

            def put(parent: Any, name: Any, other: Any = other) -> None:
                parent[name] = other

            wrong = changed(content, path, put)
            assert not check.is_valid(wrong), f"{command} with {other!r} at {path}"


def others(name: str | int, value: Any) -> list[Any]:
    """What a field with such a value may not hold."""
    match value:
        case bool():
            return ["yes", 1, None]
        case int() | float():
            below = [] if name == "per_op_us" else [-abs(value) - 2]
            return [str(value), True, [value], *below]
        case str():
            return [0, [value], *([] if name == "model" else [None])]
        case _:
            return [0, "text", WRONG, [WRONG]]


@pytest.mark.parametrize(
    ("command", "change"),
    [
        ("search", {"status": "ok", "exit_code": 4}),
        ("search", {"status": "unstable", "exit_code": 0}),
        ("search", {"limits": {}}),
        ("verify", {"status": "failed", "exit_code": 0}),
        ("verify", {"limits": {"watts": 3.0}}),
        ("failure", {"status": "interrupted", "exit_code": 2}),
        ("failure", {"status": "error", "exit_code": 130}),
        ("failure", {"exit_code": 0}),
        ("failure", {"exit_code": 3, "feasible_min": {}, "feasible_max": {}}),
        ("predict", {"coverage": 1.01}),
        ("profile", {"rows": 1.5}),
        ("verify", {"holds": {"latency_p95": True}}),
        ("verify", {"measured_under": {}}),
        ("tables check", {"ranking": {"noise": 0.1}}),
        ("tables diff", {"ratio": 0.0}),
        ("tables merge", {"rows": -1}),
        ("tables export", {"csv": ""}),
    ],
)
def test_the_schema_refuses_what_contradicts_itself(
    command: str, change: dict[str, Any], told: dict[str, dict[str, Any]]
) -> None:
    assert not validator(command).is_valid({**told[command], **change})


def test_no_architecture_without_the_reachable_range_is_refused(
    told: dict[str, dict[str, Any]],
) -> None:
    failure = {**told["failure"], "exit_code": 3}
    assert validator("failure").is_valid(failure)
    for name in ("feasible_min", "feasible_max"):
        without = {key: value for key, value in failure.items() if key != name}
        assert not validator("failure").is_valid(without)


# ---- failures of every command


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("profile --device toaster", "'toaster' is not a device"),
        ("profile --colour red", "No such option: --colour"),
        ("profile --threads many", "--threads"),
        ("profile --threads 0", "--threads"),
        ("train --method nothing", "--method is 'nothing'"),
        ("train --seed -1", "--seed"),
        ("train --seed", "requires an argument"),
        ("search", "needs one limit"),
        ("search --latency-ms soon", "--latency-ms"),
        ("search --limit-fraction 1.5", "--limit-fraction"),
        ("search --latency-ms 1 --limit-fraction 0.5", "needs one latency limit"),
        ("retrain", "no run under ./runs"),
        ("retrain --run nowhere", "nowhere is not a run"),
        ("retrain everything", "unexpected extra argument"),
        ("export --format caffe", "--format is 'caffe'"),
        ("export --run nowhere", "nowhere is not a run"),
        ("verify", "no run under ./runs"),
        ("verify --run", "requires an argument"),
        ("verify --quiet --verbose", "--quiet contradicts --verbose"),
        ("predict", "Missing argument"),
        ("predict nothing.onnx", "nothing.onnx is not a readable ONNX file"),
        ("predict notes.txt", "neither an ONNX file nor an architecture"),
        ("devices all", "unexpected extra argument"),
        ("devices --quiet", "No such option: --quiet"),
        ("spaces --space nothing", "--space is 'nothing'"),
        ("spaces --space no.py:space", "no.py, which is not there"),
        ("tables hide", "No such command 'hide'"),
        ("tables --tables", "requires an argument"),
        ("tables show", "Missing argument"),
        ("tables show nothing.parquet", "no table nothing.parquet"),
        ("tables check --networks 4", "--networks is 4"),
        ("tables check --networks some", "--networks"),
        ("tables check --device simulated --recipe smoke", "does not hold all of mobile-tiny"),
        ("tables check --tables nowhere --device simulated", "does not hold all of mobile-tiny"),
        ("tables check --quiet --verbose", "--quiet contradicts --verbose"),
        ("tables diff a.parquet", "Missing argument"),
        ("tables diff a.parquet b.parquet", "no table a.parquet"),
        ("tables merge a.parquet b.parquet", "Missing option"),
        ("tables merge a.parquet b.parquet --into c.parquet", "no table a.parquet"),
        ("tables export a.parquet", "Missing option"),
        ("tables export a.parquet --csv rows.csv", "no table a.parquet"),
        ("runs a b", "unexpected extra argument"),
        ("runs --newest", "No such option: --newest"),
        ("nothing", "No such command 'nothing'"),
        ("--nothing", "No such option: --nothing"),
    ],
)
def test_bad_input_is_code_2_one_object_and_one_sentence(
    arguments: str, words: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    first, *rest = arguments.split()
    answer = hwnas_in(tmp_path, first, "--json", *rest)
    content = whole(answer.out)
    assert_valid("failure", content)
    assert answer.code == content["exit_code"] == 2
    assert content["status"] == "error"
    assert words in content["error"]["what"]
    lines = answer.told.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: ")
    assert words in lines[0]
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


INNER = {
    "profile": "hwnas.run.plan",
    "train": "hwnas.run.train",
    "search": "hwnas.run.search_to_certificate",
    "retrain": "hwnas.run.retrain_finalists",
    "export": "hwnas.run.export",
    "verify": "hwnas.run.remeasure",
    "predict": "hwnas.predict.predict_file",
    "devices": "hwnas.listing.devices",
    "spaces": "hwnas.listing.spaces",
    "tables": "hwnas.listing.tables",
    "tables check": "hwnas.quality.check",
    "tables show": "hwnas.listing.table",
    "tables diff": "hwnas.listing.difference",
    "tables merge": "hwnas.listing.merge",
    "tables export": "hwnas.listing.export_csv",
    "runs": "hwnas.listing.runs",
}
"""The function that does a command's work."""


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (ZeroDivisionError("a defect"), 1, "error"),
        (Unstable("The machine is too busy."), 4, "error"),
        (Unreachable("No.", smallest={"params": 2.0}, largest={"params": 3.0}), 3, "error"),
        (OSError(28, "No space left on device", "somewhere/file"), 2, "error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
@pytest.mark.parametrize("command", COMMANDS)
def test_what_ends_a_command_is_its_exit_code_and_one_object(
    command: str,
    error: BaseException,
    code: int,
    status: str,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    hwnas_in: Commands,
) -> None:
    monkeypatch.setattr(INNER[command], raising(error))
    answer = hwnas_in(folder, *arguments_of(command, folder))
    content = whole(answer.out)
    assert_valid("failure", content)
    assert (answer.code, content["exit_code"], content["status"]) == (code, code, status)
    assert ("Traceback" in answer.told) == (code == 1)


@pytest.mark.parametrize("command", ["nothing", "search", "--nothing", "predict"])
def test_without_json_a_failure_prints_nothing_on_standard_output(
    command: str, tmp_path: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(tmp_path, command)
    assert (answer.code, answer.out) == (2, "")
    assert answer.told.startswith("error: ")


def test_a_noisy_measurement_is_status_unstable_and_code_4(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    hwnas_in: Commands,
    measured_here: Callable[..., list[Measurement]],
) -> None:
    measured = Measurement(20.0, 20.0, 19.5, 21.0, 19.0, 30.0, 0.4, 20, stable=False)
    monkeypatch.setattr(hwnas.ship, "measure", lambda _, paths: [measured] * len(paths))
    common = (*SMALL, "--latency-ms", "0.05", "--run", "runs/a", "--json")
    answer = hwnas_in(folder, "search", *common)
    content = whole(answer.out)
    assert_valid("search", content)
    assert (answer.code, content["exit_code"], content["status"]) == (4, 4, "unstable")
    assert content["measured"]["spread"] == 0.4
    answer = hwnas_in(folder, "verify", "--run", "runs/a", "--json")
    content = whole(answer.out)
    assert_valid("verify", content)
    assert (answer.code, content["status"], content["holds"]) == (4, "failed", {"latency_ms": True})
    monkeypatch.setattr(hwnas.ship, "measure", measured_here)
    assert hwnas_in(folder, "search", *common).code == 0, "it is measured again"


def test_a_limit_that_no_longer_holds_is_status_failed_and_code_4(
    folder: Path, monkeypatch: pytest.MonkeyPatch, hwnas_in: Commands
) -> None:
    slow = Measurement(1e6, 1e6, 1e6, 1e6, 1e6, 1e6, 0.0, 20, stable=True)
    monkeypatch.setattr(hwnas.ship, "measure", lambda _, paths: [slow] * len(paths))
    answer = hwnas_in(folder, "verify", "--run", "runs/a", "--json")
    content = whole(answer.out)
    assert_valid("verify", content)
    assert (answer.code, content["status"], content["holds"]) == (
        4,
        "failed",
        {"latency_ms": False},
    )


# ---- the screen itself


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    Screen(as_json=True).done(
        {"tau": math.nan, "worst": [math.inf, 1.0], "a": {"b": -math.inf}}, []
    )
    content = whole(capsys.readouterr().out)
    assert content["tau"] is None
    assert content["worst"] == [None, 1.0]
    assert content["a"] == {"b": None}


def test_what_is_known_is_told_with_whatever_comes(capsys: pytest.CaptureFixture[str]) -> None:
    with outcome(as_json=True) as screen:
        screen.known["run"] = "runs/a"
        screen.feasible({"params": 1.0}, {"params": 2.0})
        screen.feasible({"latency_ms": 0.1}, {"latency_ms": 0.2})
        raise InvalidInput("This is wrong.", accepted="that", next_step="do it")
    out, told = capsys.readouterr()
    assert whole(out) == {
        "run": "runs/a",
        "feasible_min": {"params": 1.0, "latency_ms": 0.1},
        "feasible_max": {"params": 2.0, "latency_ms": 0.2},
        "status": "error",
        "exit_code": 2,
        "error": {"what": "This is wrong.", "accepted": "that", "next": "do it"},
    }
    assert told == "error: This is wrong. Accepted: that. Next: do it.\n"
    assert screen.exit_code == 2


def test_a_line_is_said_once_where_it_is_asked_for_once(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=False)
    for text in ("one", "two", "one"):
        screen.say_once(text)
    screen.say("two")
    assert capsys.readouterr().err == "one\ntwo\ntwo\n"


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_a_line_for_each_thing_that_is_done_and_none_with_quiet(
    quiet: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    screen = Screen(as_json=False, quiet=quiet)
    with screen.progress() as tell:
        for done in range(1, 4):
            tell("timing ops", done, 3)
        tell("training", 1, 10)
    out, told = capsys.readouterr()
    assert out == ""
    assert told == ("" if quiet else "timing ops: 3\ntraining: 10\n")


def test_text_in_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    screen = Screen(as_json=False)
    screen.say("fp32 [fp32:3x32x32] [bold]conv[/bold]")
    screen.done({}, [("op [1]", "[red]value[/red]")])
    out, told = capsys.readouterr()
    assert told == "fp32 [fp32:3x32x32] [bold]conv[/bold]\n"
    assert out == "op [1]  [red]value[/red]\n"


def test_the_refusals_of_the_system_are_a_sentence_that_names_the_file(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with outcome(as_json=True) as screen:
        raise OSError(30, "Read-only file system", "runs/a/best")
    out, told = capsys.readouterr()
    assert screen.exit_code == 2
    assert "runs/a/best cannot be written: Read-only file system" in whole(out)["error"]["what"]
    assert "Traceback" not in told


def test_another_error_of_the_system_is_a_defect(capsys: pytest.CaptureFixture[str]) -> None:
    with outcome(as_json=True) as screen:
        raise OSError(9, "Bad file descriptor")
    out, told = capsys.readouterr()
    assert screen.exit_code == whole(out)["exit_code"] == 1
    assert "Traceback" in told
