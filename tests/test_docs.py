"""The documents say what the code does."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from typer.main import get_command

from hwnas.cli import app
from hwnas.recipes import RECIPES, CalibrationRecipe
from latency_tables.model import COVERAGE
from latency_tables.percentiles import MEDIAN, PERCENTILES
from latency_tables.table import Row
from profilers.measure import Protocol

ROOT = Path(__file__).parents[1]
DOCS = sorted((ROOT / "docs").glob("*.md"))
README = (ROOT / "README.md").read_text()
COMMANDS = get_command(app).commands  # type: ignore[attr-defined]


def test_the_first_block_of_the_readme_is_the_demo() -> None:
    first = re.search(r"```sh\n(.*?)```", README, re.DOTALL)
    assert first
    assert first[1].strip() == "make demo"


def test_every_command_is_in_the_readme() -> None:
    for name in COMMANDS:
        assert re.search(rf"\b{name}\b", README), name


def test_every_command_on_tables_is_in_both_documents() -> None:
    for name in COMMANDS["tables"].commands:
        for document in ("commands.md", "tables.md"):
            assert f"hwnas tables {name} " in (ROOT / "docs" / document).read_text(), name


def test_the_columns_and_numbers_of_the_tables_document_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "tables.md").read_text()
    head = text[: text.index("## How a row")]
    named = re.findall(r"`(\w+)`", "".join(re.findall(r"^\| (`.*?) \|", head, re.MULTILINE)))
    assert named == [item.name for item in fields(Row)]
    p, counts = Protocol(), CalibrationRecipe()
    for words in (
        f"a warm-up of {p.warmup_ms:g} ms, then calls for {p.block_ms:g} ms "
        f"({p.min_runs} at least, {p.max_runs} at most)",
        f"After {p.rounds} rounds",
        f"above {p.tolerance:.1%}",
        f"up to {p.max_rounds}.",
        f"each in {RECIPES['quick'].processes} fresh processes",
        f"{counts.fit} fit factors, constant and offset; {counts.bound} others set the ratio; "
        f"{counts.test} further ones",
        f"with probability {COVERAGE:g}",
        f"({', '.join(map(str, (MEDIAN, *PERCENTILES)))})",
    ):
        assert words.replace("%", " %") in " ".join(text.split()), words


DOCUMENTS = [
    "README.md", "CONTRIBUTING.md", "ARCHITECTURE.md", *(f"docs/{p.name}" for p in DOCS)
]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_command_line_in_a_document_parses(document: str) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    for line in re.findall(r"^hwnas (\w+) ?(\w*)([^\n#|]*)", "".join(blocks), re.MULTILINE):
        name, second, rest = line
        command = getattr(COMMANDS[name], "commands", {}).get(second, COMMANDS[name])
        options = {flag for option in command.params for flag in option.opts}
        assert set(re.findall(r"--[\w-]+", rest)) <= options, line


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_make_target_in_a_document_is_there(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    text = (ROOT / document).read_text()
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_file_that_the_architecture_names_is_there() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    named = re.findall(r"`((?:hwnas|profilers|quant|latency_tables|examples)/[\w/.]+)`", text)
    assert len(named) > 10
    for name in named:
        assert (ROOT / name).exists(), name


def test_the_readme_marks_the_gpu_until_a_result_of_one_is_committed() -> None:
    measured = list((ROOT / "benchmarks" / "results").glob("gpu*.json"))
    assert bool(measured) != ("built and inspected, not yet timed" in README)


def test_no_document_quotes_a_path_of_a_machine() -> None:
    for path in [*ROOT.glob("*.md"), *DOCS, *ROOT.glob("*/*.py"), *ROOT.glob("hwnas/*/*.py")]:
        assert not re.search(r"/(root|home|work|tmp)/", path.read_text()), path


def test_every_flag_is_told_in_the_documents() -> None:
    told = README + "".join(path.read_text() for path in DOCS)
    for command in COMMANDS.values():
        for option in command.params:
            for flag in option.opts:
                if flag.startswith("--max-") or flag in ("--config", "--image-size", "--recipe"):
                    assert flag in told, flag


def test_the_recipes_of_the_documents_are_those_of_the_code() -> None:
    text = (ROOT / "docs" / "commands.md").read_text()
    for name, recipe in RECIPES.items():
        (line,) = re.findall(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)
        supernet, scored, finalists = (
            [int(n.replace(",", "")) for n in re.findall(r"[\d,]*\d", cell)]
            for cell in line.split("|")
        )
        assert supernet == [recipe.supernet.steps, recipe.supernet.batch]
        assert scored == [recipe.evaluations]
        assert finalists[:2] == [recipe.finalists, recipe.retrain.steps]
