"""`--config run.yaml`: what it may say, and every way to say it wrongly."""

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from hwnas.config import Config, read_config
from hwnas.job import LIMITS, Job, Request
from hwnas.recipes import RECIPES, recipe
from quant.errors import InvalidInput


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "run.yaml"


def refused(file: Path, text: str | bytes) -> InvalidInput:
    """The error for a file with this content: one sentence that begins with the file's name."""
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InvalidInput) as caught:
        read_config(file)
    assert caught.value.what.startswith(f"--config {file}")
    assert caught.value.what.endswith(".")
    assert "\n" not in str(caught.value)
    return caught.value


# ---- what it may say

EVERYTHING: dict[str, Any] = {
    "space": "mobile",
    "precisions": ["fp16", "w8a8"],
    "data": "folder:photos",
    "image_size": 96,
    "device": "simulated",
    "threads": 2,
    "batch": 8,
    "portable": True,
    "method": "spos",
    "recipe": {"name": "standard", "supernet": {"steps": 20000, "flip": True}},
    "seed": 7,
    "limits": {"latency_ms": 10, "size_mb": 4.5},
    "fix": {"block": "runs/mine/results/params=40000.0"},
    "tables": "elsewhere/tables",
    "run": "runs/mine",
    "train_on": "cpu",
}


def test_every_field_is_read_as_it_stands(file: Path) -> None:
    assert set(EVERYTHING) == set(Config.model_fields)
    file.write_text(yaml.safe_dump(EVERYTHING))
    assert read_config(file).model_dump() == EVERYTHING


def test_each_field_alone_leaves_the_others_unsaid(file: Path) -> None:
    for name, value in EVERYTHING.items():
        file.write_text(yaml.safe_dump({name: value}))
        assert read_config(file).model_dump(exclude_defaults=True) == {name: value}


def test_the_fields_are_those_of_a_request_and_the_limits() -> None:
    """So that nothing which a flag can say is missing from the file. Flags fix options as results
    have them; a request has the genes.
    """
    of_a_request = set(Request.__dataclass_fields__) - {"fixed"}
    assert set(Config.model_fields) == of_a_request | {"limits", "fix"}


@pytest.mark.parametrize("text", ["", "\n\n", "# only a comment\n", "---\n", "null\n", "{}\n"])
def test_an_empty_file_says_nothing(text: str, file: Path) -> None:
    file.write_text(text)
    assert read_config(file) == Config()


@pytest.mark.parametrize("name", LIMITS)
def test_every_limit_can_be_given(name: str, file: Path) -> None:
    file.write_text(f"limits: {{{name}: 1.5}}")
    assert read_config(file).limits == {name: 1.5}


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e6", 1e6), ("2.5E-1", 0.25), ("1e+3", 1000.0), ("3", 3.0), ("0.5", 0.5), (".5", 0.5)],
)
def test_numbers_are_written_as_on_the_command_line(text: str, value: float, file: Path) -> None:
    """YAML 1.1, which PyYAML speaks, takes 1e6 for a text."""
    file.write_text(f"limits: {{macs: {text}}}")
    found = read_config(file).limits["macs"]
    assert found == value == float(text)
    assert isinstance(found, int | float)


def test_a_text_that_looks_like_a_number_in_part_stays_a_text(file: Path) -> None:
    file.write_text("space: 1e6.py:space\ndata: 3e\ntables: '1e6'\n")
    config = read_config(file)
    assert (config.space, config.data, config.tables) == ("1e6.py:space", "3e", "1e6")


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_a_name_or_a_mapping_that_changes_it(name: str, file: Path) -> None:
    file.write_text(f"recipe: {name}")
    assert Job(Request(recipe=read_config(file).recipe)).recipe == RECIPES[name]
    file.write_text(f"recipe: {{name: {name}, retrain: {{steps: 12, learning_rate: 1e-3}}}}")
    changed = Job(Request(recipe=read_config(file).recipe)).recipe
    assert changed == recipe({"name": name, "retrain": {"steps": 12, "learning_rate": 0.001}})
    assert changed != RECIPES[name]


def test_the_example_of_the_document_is_read(file: Path) -> None:
    root = Path(__file__).parents[2]
    text = (root / "docs" / "commands.md").read_text(encoding="utf-8")
    file.write_text(text.partition("```yaml\n")[2].partition("```")[0])
    config = read_config(file)
    assert config.space == "mobile"
    assert config.limits == {"latency_ms": 10, "size_mb": 4}
    assert recipe(config.recipe).supernet.steps == 20000


def test_a_configuration_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValidationError):
        Config().seed = 3  # type: ignore[misc]


# ---- wrong values

WRONG = {
    "space": ["1", "true", "[mobile]", "{name: mobile}"],
    "data": ["1", "[digits]"],
    "image_size": ["0", "-1", "1.5", "32.0", "'32'", "true", "large", "[32]"],
    "device": ["0", "[cpu]"],
    "threads": ["0", "-2", "1.0", "many", "'2'", "false"],
    "batch": ["0", "-1", "2.5", "one"],
    "method": ["1", "[spos]"],
    "seed": ["-1", "1.0", "true", "'1'", "2001-01-01", "[1]"],
    "limits": ["5", "[1]", "latency_ms", "null"],
    "limits.latency_ms": ["0", "-1", ".nan", ".inf", "-.inf", "fast", "true", "'5'", "null", "[1]"],
    "limits.params": ["0", "-1e6", ".inf", "many"],
    "limits.size_mb": ["0.0", "true"],
    "tables": ["1", "[a]"],
    "run": ["1", "true"],
    "recipe": ["5", "[quick]", "true", "1.5"],
    "recipe.supernet.steps": ["0", "-1", "1.5", "many", "null"],
    "recipe.supernet.flip": ["sideways"],
    "recipe.supernet.learning_rate": ["0", ".nan", ".inf"],
    "recipe.retrain.label_smoothing": ["1", "-0.1"],
    "recipe.calibration.bound": ["0"],
    "recipe.population": ["1"],
    "recipe.least_agreement": ["2"],
    "recipe.supernet": ["5", "null"],
}


def written(path: str, value: str) -> str:
    """A field by its path, as YAML in flow style; a recipe has a name."""
    first, _, rest = path.partition(".")
    if not rest:
        return f"{{{path}: {value}}}"
    inner = written(rest, value)
    return f"{{{first}: {inner if first != 'recipe' else '{name: quick, ' + inner[1:]}}}"


@pytest.mark.parametrize(
    ("path", "value"), [(path, value) for path, values in WRONG.items() for value in values]
)
def test_a_wrong_value_is_refused_with_its_path(path: str, value: str, file: Path) -> None:
    error = refused(file, written(path, value))
    assert error.what.startswith(f"--config {file}: {path}: ")


@pytest.mark.parametrize("field", ["colour", "Space", "latency_ms", "limit", "config", "json"])
def test_an_unknown_field_is_refused_with_those_that_are_known(field: str, file: Path) -> None:
    error = refused(file, f"{field}: 1")
    assert error.what == f"--config {file}: {field}: no such field."
    assert error.accepted == ", ".join(Config.model_fields)


@pytest.mark.parametrize("name", ["latency", "flops", "weight_bytes", "--latency-ms", "''"])
def test_an_unknown_limit_is_refused_with_those_that_are_known(name: str, file: Path) -> None:
    error = refused(file, f"limits: {{{name}: 1}}")
    plain = name.strip("'")
    assert error.what == f"--config {file}: limits.{plain}: no such field."
    assert error.accepted == ", ".join(LIMITS)


def test_an_unknown_field_of_the_recipe_is_refused(file: Path) -> None:
    error = refused(file, "recipe: {name: quick, supernet: {stepz: 3}}")
    assert error.what == f"--config {file}: recipe.supernet.stepz: no such field."


def test_an_unknown_recipe_is_refused_with_those_that_are_known(file: Path) -> None:
    for text in ("recipe: fast", "recipe: {name: fast}"):
        error = refused(file, text)
        assert "'fast'" in error.what
        assert error.accepted == ", ".join(RECIPES)
    error = refused(file, "recipe: {supernet: {steps: 3}}")
    assert error.what == f"--config {file}: recipe.name: it is missing."
    assert error.next_step == "name the recipe that the other fields change"


@pytest.mark.parametrize(
    ("text", "path"),
    [("1: 2", "1"), ("limits: {1: 2}", "limits.1"), ("recipe: {name: quick, 1: 2}", "recipe.1")],
)
def test_a_key_that_is_no_text_is_refused(text: str, path: str, file: Path) -> None:
    assert refused(file, text).what.startswith(f"--config {file}: {path}")


# ---- no configuration at all


@pytest.mark.parametrize("text", ["- a\n- b\n", "5", "just text", "[space, data]", "true"])
def test_a_file_that_holds_no_mapping_is_refused(text: str, file: Path) -> None:
    assert refused(file, text).what.startswith(f"--config {file}: the file: ")


@pytest.mark.parametrize(
    "text",
    [
        b"space: [unclosed",
        b"space: mobile: tiny",
        b"\tspace: mobile",
        b"space: !!python/object/apply:os.system ['touch pwned']",
        b"? {a: b}\n: c",
        b"space: *nobody",
        b"a: 1\n---\nb: 2\n",
        b"space: \x00",
        b"seed: 2001-13-45",
        b"\xff\xfe\x00binary",
        "space: größe".encode("latin-1"),
    ],
)
def test_a_file_that_is_no_yaml_is_refused_in_one_sentence(
    text: bytes, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(file.parent)
    error = refused(file, text)
    assert error.what.startswith(f"--config {file} is not readable YAML: ")
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_a_file_that_cannot_be_read_is_refused_with_the_reason(file: Path) -> None:
    with pytest.raises(InvalidInput) as caught:
        read_config(file)
    assert caught.value.what == f"--config {file} cannot be read: No such file or directory."
    with pytest.raises(InvalidInput) as caught:
        read_config(file.parent)
    assert caught.value.what == f"--config {file.parent} cannot be read: Is a directory."
    assert caught.value.accepted == "a YAML file"
