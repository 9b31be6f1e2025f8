"""Run directories: what they are of, how they are found, named, made and locked."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml

from hwnas.recipes import recipe
from hwnas.store import Run, RunConfig, list_runs, open_run, read_run
from quant.errors import InvalidInput

CONFIG = RunConfig(
    space="mobile-tiny",
    space_fingerprint="00ff",
    data="fashion-mnist:/some/where",
    data_fingerprint="11ee",
    image_size=32,
    device="cpu",
    threads=1,
    batch=1,
    method="spos",
    recipe=recipe("quick").model_dump(),
    seed=0,
)
CHANGES = {
    "space": "mobile",
    "space_fingerprint": "22",
    "precisions": ["fp16"],
    "data": "digits",
    "data_fingerprint": "33",
    "image_size": 64,
    "device": "gpu",
    "threads": 2,
    "batch": 8,
    "portable": True,
    "method": "fairnas",
    "recipe": recipe({"name": "quick", "supernet": {"steps": 20000}}).model_dump(),
    "seed": 1,
}
TOLD = {
    field: f"{field}: {getattr(CONFIG, field)} against {value}"
    for field, value in CHANGES.items()
    if field != "recipe"
} | {"recipe": "recipe.supernet.steps: 1600 against 20000"}
"""What is told of each difference; nested fields have their path."""


def changed(field: str) -> RunConfig:
    return CONFIG.model_copy(update={field: CHANGES[field]})


# ---- identity


def test_a_run_of_before_there_were_such_fields_has_their_defaults(tmp_path: Path) -> None:
    fields = CONFIG.model_dump(exclude={"portable", "precisions"})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(fields))
    assert read_run(tmp_path).config == CONFIG


def test_every_field_belongs_to_the_identity_and_is_named_with_both_values() -> None:
    assert set(CHANGES) == set(RunConfig.model_fields)
    assert CONFIG.difference(CONFIG) == ""
    for field, told in TOLD.items():
        assert CONFIG.difference(changed(field)) == told


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"finalists": 9}, "recipe.finalists: 3 against 9"),
        ({"retrain": {"flip": True}}, "recipe.retrain.flip: False against True"),
        ({"protocol": {"rounds": 3}}, "recipe.protocol.rounds: 4 against 3"),
        ({"calibration": {"bound": 19}}, "recipe.calibration.bound: 99 against 19"),
        (
            {"supernet": {"batch": 8}, "finalists": 9},
            "recipe.supernet.batch: 32 against 8",
        ),
    ],
)
def test_a_difference_inside_the_recipe_is_told_with_its_path(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    fields = recipe({"name": "quick", **change}).model_dump()
    other = CONFIG.model_copy(update={"recipe": fields})
    assert CONFIG.difference(other) == told
    open_run(other, tmp_path / "run")
    with pytest.raises(InvalidInput) as caught:
        open_run(CONFIG, tmp_path / "run")
    assert caught.value.what == f"The flags contradict {tmp_path / 'run'} ({told})."


def without(fields: dict[str, Any], *path: str) -> dict[str, Any]:
    first, *rest = path
    if not rest:
        return {name: value for name, value in fields.items() if name != first}
    return {**fields, first: without(fields[first], *rest)}


def test_a_field_that_one_recipe_lacks_is_a_difference() -> None:
    """As in a run of a version with another recipe."""
    less = CONFIG.model_copy(update={"recipe": without(CONFIG.recipe, "supernet", "flip")})
    assert CONFIG.difference(less) == "recipe.supernet.flip: False against None"


def test_a_field_that_the_other_recipe_lacks_is_a_difference_too() -> None:
    less = CONFIG.model_copy(update={"recipe": without(CONFIG.recipe, "supernet", "flip")})
    assert less.difference(CONFIG) == "recipe.supernet.flip: None against False"


def test_a_new_run_is_made_where_asked_and_read_back_the_same(tmp_path: Path) -> None:
    made = open_run(CONFIG, tmp_path / "deep" / "run")
    assert read_run(made.path).config == CONFIG
    assert yaml.safe_load((made.path / "config.yaml").read_text()) == CONFIG.model_dump()
    again = open_run(CONFIG, made.path)
    assert (again.path, again.config) == (made.path, CONFIG)


@pytest.mark.parametrize("field", CHANGES)
def test_a_contradiction_is_refused_and_names_the_field(field: str, tmp_path: Path) -> None:
    open_run(CONFIG, tmp_path / "run")
    with pytest.raises(InvalidInput, match="contradict") as caught:
        open_run(changed(field), tmp_path / "run")
    told = changed(field).difference(CONFIG)
    assert caught.value.what == f"The flags contradict {tmp_path / 'run'} ({told})."
    assert told.startswith(field)
    assert "--run" in caught.value.next_step
    assert read_run(tmp_path / "run").config == CONFIG


def age(run: Run, seconds: int) -> None:
    stamp = 1_700_000_000 - seconds
    os.utime(run.path / "config.yaml", (stamp, stamp))


def test_without_a_path_the_newest_matching_run_is_taken(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    runs = {name: open_run(CONFIG, root / name) for name in ("a", "b", "c")}
    other = open_run(changed("seed"), root / "other")
    for name, seconds in (("a", 30), ("b", 10), ("c", 20)):
        age(runs[name], seconds)
    age(other, 0)
    assert open_run(CONFIG, None, root).path == root / "b"
    age(runs["c"], 5)
    assert open_run(CONFIG, None, root).path == root / "c"
    assert open_run(changed("seed"), None, root).path == root / "other"
    assert len(list(root.iterdir())) == 4


def test_runs_are_listed_newest_first_without_the_damaged_ones(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    runs = [open_run(CONFIG.model_copy(update={"seed": n}), root / f"r{n}") for n in range(4)]
    for run, seconds in zip(runs, (30, 10, 20, 0), strict=True):
        age(run, seconds)
    (runs[3].path / "config.yaml").write_text("seed: many")
    (root / "empty").mkdir()
    (root / "text").write_text("not a run")
    (root / "in the way" / "config.yaml").mkdir(parents=True)
    for content in (b"", b"- a", b"space: [", b"\xff\xfe\x00"):
        folder = root / f"damaged {content!r}"
        folder.mkdir()
        (folder / "config.yaml").write_bytes(content)
    assert [run.path.name for run in list_runs(root)] == ["r1", "r2", "r0"]
    assert [run.config.seed for run in list_runs(root)] == [1, 2, 0]
    # nor do they stand in the way of a new run, or of one that matches
    assert open_run(runs[0].config, None, root).path == runs[0].path
    assert open_run(runs[3].config, None, root).path.name == "mobile-tiny-fashion-mnist-where-cpu-1"


def test_no_folder_has_no_runs(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "runs") == []


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"data": "digits"}, "mobile-tiny-digits-cpu"),
        ({"data": "fashion-mnist:/some/where"}, "mobile-tiny-fashion-mnist-where-cpu"),
        ({"data": "folder:photos"}, "mobile-tiny-folder-photos-cpu"),
        ({"data": "folder:../my photos/"}, "mobile-tiny-folder-my-photos-cpu"),
        ({"data": "folder:."}, "mobile-tiny-folder-cpu"),
        ({"data": "torchvision:CIFAR10"}, "mobile-tiny-torchvision-CIFAR10-cpu"),
        ({"data": "/data/sets/cells.npz"}, "mobile-tiny-cells-cpu"),
        ({"data": "cells.v2.npz"}, "mobile-tiny-cells.v2-cpu"),
        ({"data": "über größe.npz"}, "mobile-tiny-ber-gr-e-cpu"),
        ({"data": "digits", "space": "mobile", "device": "gpu"}, "mobile-digits-gpu"),
        ({"data": "digits", "space": "spaces/own_space.py:space"}, "own-space.py-space-digits-cpu"),
        ({"data": "digits", "device": "simulated"}, "mobile-tiny-digits-simulated"),
    ],
)
def test_a_run_is_named_after_what_it_is_of(
    fields: dict[str, str], name: str, tmp_path: Path
) -> None:
    root = tmp_path / "runs"
    run = open_run(CONFIG.model_copy(update=fields), None, root)
    assert run.path == root / f"{name}-1"
    assert run.path.parent == root
    assert read_run(run.path).config.data == fields["data"]


def test_new_runs_get_names_that_tell_what_they_are_of_and_are_never_taken(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    names = []
    for seed in range(3):
        config = CONFIG.model_copy(update={"seed": seed})
        names.append(open_run(config, None, root).path.name)
    assert names == [f"mobile-tiny-fashion-mnist-where-cpu-{number}" for number in (1, 2, 3)]
    assert (
        open_run(changed("device"), None, root).path.name == "mobile-tiny-fashion-mnist-where-gpu-1"
    )
    for file in (root / names[0]).iterdir():
        file.unlink()
    (root / names[0]).rmdir()
    made = [open_run(CONFIG.model_copy(update={"seed": s}), None, root).path.name for s in (9, 10)]
    assert not set(made) & set(names[1:])
    assert len(set(made)) == 2
    assert [read_run(root / name).config.seed for name in names[1:]] == [1, 2]
    assert open_run(CONFIG.model_copy(update={"seed": 2}), None, root).path.name == names[2]


def test_a_folder_in_the_way_without_a_config_is_left_alone(tmp_path: Path) -> None:
    root = tmp_path / "runs"
    (root / "mobile-tiny-fashion-mnist-where-cpu-1").mkdir(parents=True)
    run = open_run(CONFIG, None, root)
    assert run.path.name == "mobile-tiny-fashion-mnist-where-cpu-2"


def test_two_processes_that_choose_the_same_name_get_two_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other process is quicker: it makes its folder when this one has just chosen the name."""
    root = tmp_path / "runs"
    mkdir, others = Path.mkdir, iter(["1", "2"])

    def late(path: Path, *arguments: Any, **options: Any) -> None:
        if path.parent == root and (number := next(others, None)):
            mkdir(root / f"mobile-tiny-fashion-mnist-where-cpu-{number}")
        mkdir(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", late)
    run = open_run(CONFIG, None, root)
    assert run.path.name == "mobile-tiny-fashion-mnist-where-cpu-3"
    assert [folder.name for folder in root.iterdir() if (folder / "config.yaml").exists()] == [
        run.path.name
    ]


MAKE_RUNS = """
import sys
from pathlib import Path
from hwnas.store import open_run, read_run
root = Path(sys.argv[1])
config = read_run(Path(sys.argv[2])).config
print("ready", flush=True)
sys.stdin.readline()
for seed in range(int(sys.argv[3]), int(sys.argv[3]) + 8):
    print(open_run(config.model_copy(update={"seed": seed}), None, root).path.name)
"""


def test_processes_that_make_runs_at_once_get_a_folder_each(tmp_path: Path) -> None:
    root, example = tmp_path / "runs", open_run(CONFIG, tmp_path / "example").path
    makers = [
        subprocess.Popen(
            [sys.executable, "-c", MAKE_RUNS, str(root), str(example), str(1000 * number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(3)
    ]  # fmt: skip
    for maker in makers:
        assert maker.stdout is not None
        assert maker.stdout.readline() == "ready\n"
    for maker in makers:
        assert maker.stdin is not None
        maker.stdin.write("go\n")
        maker.stdin.flush()
    names = [name for maker in makers for name in maker.communicate()[0].split()]
    assert all(maker.returncode == 0 for maker in makers)
    assert len(names) == len(set(names)) == 24
    seeds = {read_run(root / name).config.seed for name in names}
    assert seeds == {1000 * number + seed for number in range(3) for seed in range(8)}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"threads": "many"}, "threads"),
        ({"seed": 1.5}, "seed"),
        ({"space": None}, "space"),
        ({"colour": "red"}, "colour"),
        ({"batch": [1]}, "batch"),
        ({"image_size": "large"}, "image_size"),
        ({"recipe": "quick"}, "recipe"),
        ({"recipe": None}, "recipe"),
    ],
)
def test_a_wrong_field_of_config_yaml_is_refused_with_its_path(
    change: dict[str, object], field: str, tmp_path: Path
) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    file = run.path / "config.yaml"
    file.write_text(yaml.safe_dump({**CONFIG.model_dump(), **change}))
    with pytest.raises(InvalidInput) as caught:
        read_run(run.path)
    assert caught.value.what.startswith(f"{file}: {field}: ")
    assert caught.value.what.endswith(".")
    assert "\n" not in str(caught.value)
    assert "--run" in caught.value.next_step


def test_a_run_of_an_older_version_is_refused_with_a_sentence(tmp_path: Path) -> None:
    """Its recipe was a name, and it had no image size."""
    old = {**CONFIG.model_dump(exclude={"image_size"}), "recipe": "quick"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    with pytest.raises(InvalidInput) as caught:
        open_run(CONFIG, tmp_path)
    assert caught.value.what == f"{tmp_path / 'config.yaml'}: image_size: Field required."
    assert "another version" in caught.value.next_step
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == old


def test_a_field_that_is_not_there_is_named(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    content = CONFIG.model_dump()
    del content["recipe"]
    (run.path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidInput, match=r"config\.yaml: recipe: "):
        read_run(run.path)


@pytest.mark.parametrize(
    "content",
    [b"", b"- a\n- b\n", b"space: [unclosed", b"just text", b"\xff\xfe\x00binary"],
    ids=["empty", "list", "not YAML", "text", "binary"],
)
def test_a_config_yaml_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    (run.path / "config.yaml").write_bytes(content)
    with pytest.raises(InvalidInput, match=r"config\.yaml"):
        read_run(run.path)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="is not a run"):
        read_run(tmp_path)


# ---- inside a run


def test_the_newest_result_is_the_one_last_pointed_to(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with pytest.raises(InvalidInput, match="no result yet"):
        run.best()
    for limits in ("latency_ms=0.2", "latency_ms=0.1"):
        run.point_to(run.result(limits))
        assert run.best() == run.path / "results" / limits
    run.path.rename(tmp_path / "moved")  # the pointer is relative, so that a run can be moved
    assert read_run(tmp_path / "moved").best() == tmp_path / "moved/results/latency_ms=0.1"


def test_every_line_of_the_log_is_json_with_time_event_and_fields(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    run.log("train", steps=3, start=0)
    run.log("note", text='two\nlines, "quoted", ünïcode', nothing=None)
    open_run(CONFIG, tmp_path / "run").log("search", accuracy=0.5)
    lines = [json.loads(line) for line in (run.path / "log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["train", "note", "search"]
    assert (lines[0]["steps"], lines[0]["start"]) == (3, 0)
    assert lines[1]["text"] == 'two\nlines, "quoted", ünïcode'
    for line in lines:
        assert datetime.fromisoformat(line["time"]).tzinfo is not None


def test_where_weights_were_trained_is_read_from_the_log(tmp_path: Path) -> None:
    """Each device once, whatever else the log tells; half a line, as a crash leaves it, is none."""
    run = open_run(CONFIG, tmp_path / "run")
    assert run.trained_on() == []
    run.log("train", steps=3, on="cuda (NVIDIA L4)")
    run.log("note", text="on")
    for _ in range(2):
        run.log("retraining", finalist=0, on="cpu")
    with (run.path / "log.jsonl").open("a") as file:
        file.write('{"time": "2026", "event": "train", "on": "mo')
    assert run.trained_on() == ["cpu", "cuda (NVIDIA L4)"]


TRY_TO_LOCK = """
import sys
from pathlib import Path
from hwnas.store import read_run
from quant.errors import InvalidInput
try:
    with read_run(Path(sys.argv[1])).locked():
        print("held", flush=True)
        if len(sys.argv) > 2:
            sys.stdin.read()
except InvalidInput as error:
    print(error.what)
    print(error.next_step)
"""


def try_to_lock(run: Run) -> list[str]:
    told = subprocess.run(
        [sys.executable, "-c", TRY_TO_LOCK, str(run.path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return told.stdout.splitlines()


def test_a_second_process_is_told_who_holds_the_run_and_gets_it_afterwards(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with run.locked():
        what, next_step = try_to_lock(run)
        assert what == f"{run.path} is in use by process {os.getpid()}."
        assert next_step == "wait for it, or name another one"
        assert try_to_lock(run)[0] == what  # being refused does not change who is named
    assert try_to_lock(run) == ["held"]


def test_a_killed_process_releases_the_run(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "-c", TRY_TO_LOCK, str(run.path), "wait"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as holder:  # fmt: skip
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InvalidInput, match=f"in use by process {holder.pid}"), run.locked():
            pass
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with run.locked():
        pass


def test_the_lock_outlives_no_process_and_is_no_part_of_the_run(tmp_path: Path) -> None:
    """A file that a killed process left behind, with its number in it, holds nothing."""
    run = open_run(CONFIG, tmp_path / "run")
    (run.path / ".lock").write_text("4194304")
    with run.locked():
        assert (run.path / ".lock").read_text() == str(os.getpid())
    assert try_to_lock(run) == ["held"]


def test_a_run_that_cannot_be_made_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    makers: list[Callable[[], Run]] = [
        lambda: open_run(CONFIG, tmp_path / "file" / "run"),
        lambda: open_run(CONFIG, None, tmp_path / "file"),
    ]
    for make in makers:
        with pytest.raises(
            InvalidInput, match=r"cannot be written: (Not a directory|File exists)\."
        ):
            make()


def test_a_log_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    (run.path / "log.jsonl").mkdir()
    with pytest.raises(InvalidInput, match=r"log\.jsonl cannot be written: Is a directory\."):
        run.log("train", steps=3)


def test_an_error_inside_releases_the_run(tmp_path: Path) -> None:
    run = open_run(CONFIG, tmp_path / "run")
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    with run.locked():
        pass
