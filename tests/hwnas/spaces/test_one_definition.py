"""Law 1: no module outside hwnas/spaces tests a block's kind."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import hwnas
from hwnas.spaces.registry import SPACES

ROOT = Path(hwnas.__file__).parents[1]
ROOM = ROOT / "hwnas" / "spaces"
OUTSIDE = sorted(
    path
    for package in ("hwnas", "profilers", "latency_tables", "quant")
    for path in (ROOT / package).rglob("*.py")
    if ROOM not in path.parents
)
LAYER_KINDS = {
    "conv", "linear", "activation", "pool", "max_pool", "half", "add", "mul", "concat", "split",
    "shuffle",
}  # fmt: skip
PRIVATE_MODULES = {"hwnas.spaces.blocks"}


def _words_of_the_spaces() -> set[str]:
    """Every block's function, every layer's role that is no kind, every block gene's choice."""
    words = {"skip", "SKIP"}
    tree = ast.parse((ROOM / "blocks.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            words.add(node.name)
        if isinstance(node, ast.keyword) and node.arg == "role":
            assert isinstance(node.value, ast.Constant)
            words.add(str(node.value.value))
    for space in SPACES.values():
        for gene in space(classes=10).genes:
            if gene.name.endswith(".block"):
                words.update(gene.choices)
    return words - LAYER_KINDS


WORDS = _words_of_the_spaces()
BLOCK_CHOICE = re.compile(r"k\d+e\d+")


def _docstrings(tree: ast.AST) -> set[int]:
    """Ids of strings that stand alone as a statement: they test nothing."""
    return {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def mentions(source: str) -> Iterator[tuple[int, str]]:
    """Line and word of each block's kind in code; comments and docstrings are not code."""
    tree = ast.parse(source)
    free = _docstrings(tree)
    for node in ast.walk(tree):
        found: list[str] = []
        match node:
            case ast.Constant(value=str(text)) if id(node) not in free:
                found = [w for w in re.findall(r"\w+", text) if _is_kind(w)]
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name):
                found = [name]
            case ast.keyword(arg=str(name)) | ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found = [name]
            case ast.ImportFrom(module=str(module)):
                found = [alias.name for alias in node.names]
                if module in PRIVATE_MODULES:
                    yield node.lineno, module
            case ast.Import():
                yield from ((node.lineno, a.name) for a in node.names if a.name in PRIVATE_MODULES)
        yield from ((getattr(node, "lineno", 0), word) for word in found if _is_kind(word))


def _is_kind(word: str) -> bool:
    return word in WORDS or BLOCK_CHOICE.fullmatch(word) is not None


def test_the_words_are_those_of_the_spaces() -> None:
    assert {"inverted_residual", "squeeze_excite", "expand", "depthwise", "project"} <= WORDS
    assert {"shuffle_unit", "basic_block", "bypass", "blend"} <= WORDS
    assert {"skip", "k3e3", "k7e6", "k7", "xception"} <= WORDS
    assert not WORDS & LAYER_KINDS


@pytest.mark.parametrize(
    "code",
    [
        "if layer.role == 'depthwise': pass",
        "if gene in ('k3e3', 'k5e6'): pass",
        "x = 'block3 skip'",
        "from hwnas.spaces.mobile import SKIP",
        "from hwnas.spaces import blocks\nblocks.inverted_residual(1)",
        "from hwnas.spaces.blocks import classifier as head",
        "import hwnas.spaces.blocks",
        "match role:\n    case 'expand': pass",
        "f(squeeze=4)",
        "def f(skip): ...",
        "names = {'project': 1}",
        "x = f'{a} k7e3'",
        "if gene == 'xception': pass",
    ],
)
def test_code_that_names_a_kind_is_found(code: str) -> None:
    assert list(mentions(code))


@pytest.mark.parametrize(
    "code",
    [
        '"""What a skip does to depthwise layers."""',
        "# if the block is k3e3, expand it\nx = 1",
        "def f():\n    '''A k3e3 block.'''",
        "if layer.groups > 1 and layer.kind == 'conv': pass",
        "tensor.unsqueeze(0)",
    ],
)
def test_what_is_said_about_kinds_and_what_asks_for_groups_is_free(code: str) -> None:
    assert not list(mentions(code))


def test_there_are_modules_to_look_at() -> None:
    names = {str(path.relative_to(ROOT)) for path in OUTSIDE}
    assert {"hwnas/supernet/network.py", "profilers/graphs.py", "hwnas/run.py"} <= names


@pytest.mark.parametrize("path", OUTSIDE, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_module_outside_the_spaces_names_a_block_kind(path: Path) -> None:
    found = [f"{path.name}:{line} {word}" for line, word in mentions(path.read_text())]
    assert not found
