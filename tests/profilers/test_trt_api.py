"""The TensorRT backend keeps to the names that every supported release has.

`tensorrt_api.json` says which those are, read from the real bindings by `tensorrt_api.py`. The
backend's source is read, not run: each attribute of the package, of its classes and of their
objects is held against the record, unless a guard stands before it.

What an expression is follows from how it was made (`trt.Builder(logger)`,
`builder.create_network(flags)`), else from its name: `engine`, `self.engine` and `self._engine`
are engines (`OBJECTS`), unless an annotation says otherwise. A subclass in the source adds the
names that it gives itself. Guards are `getattr` with a default, `hasattr(holder, "name")`, which
leaves the releases that have that name, and `rtx` in the name of a function or class, which leaves
those of that package.
"""

import ast
import inspect
import json
import runpy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent
BACKENDS = sorted((HERE.parents[1] / "profilers").glob("trt*.py"))
RECORDER = runpy.run_path(str(HERE / "tensorrt_api.py"))
MODULE: str = RECORDER["MODULE"]
CLASSES: tuple[str, ...] = RECORDER["CLASSES"]
RECORD = json.loads(RECORDER["RECORD"].read_text())
RELEASES: tuple[str, ...] = tuple(RECORD["releases"])
EVERY = frozenset(RELEASES)
RTX = frozenset(release for release in RELEASES if release.startswith("tensorrt_rtx "))
OBJECTS = {
    "trt": MODULE, "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser",
    "config": "IBuilderConfig", "profile": "IOptimizationProfile", "engine": "ICudaEngine",
    "context": "IExecutionContext", "runtime": "Runtime", "inspector": "EngineInspector",
    "cache": "ITimingCache", "logger": "ILogger",
}  # fmt: skip

Name = tuple[str, str]


def releases_with(owner: str, name: str) -> tuple[str, ...]:
    """The releases whose class (or module) has a name."""
    if name in RECORD["everywhere"].get(owner, ()):
        return RELEASES
    return tuple(RECORD["somewhere"].get(owner, {}).get(name, ()))


def names_of(release: str) -> dict[str, list[str]]:
    """Every recorded name of one release, by class."""
    found: dict[str, list[str]] = {}
    for owner in (MODULE, *CLASSES):
        known = [*RECORD["everywhere"].get(owner, ()), *RECORD["somewhere"].get(owner, ())]
        if names := sorted(name for name in known if release in releases_with(owner, name)):
            found[owner] = names
    return found


def names_given(kind: ast.ClassDef) -> Iterator[str]:
    """The names that a class adds: its methods, its annotations, what they set on `self`."""
    for node in ast.walk(kind):
        match node:
            case ast.FunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                yield name
            case ast.Attribute(value=ast.Name(id="self"), attr=name, ctx=ast.Store()):
                yield name


@dataclass(frozen=True)
class Use:
    """A name that a source takes from a class or the module, or a keyword that it gives a call."""

    line: int
    owner: str
    name: str
    releases: frozenset[str]
    keyword: str = ""

    @property
    def lacking(self) -> list[str]:
        """The releases in which this fails."""
        having = frozenset(releases_with(self.owner, self.name))
        if self.keyword:
            call = RECORD["calls"].get(self.owner, {}).get(self.name)
            having = frozenset() if call and self.keyword not in call["parameters"] else EVERY
        return [release for release in RELEASES if release in self.releases - having]


class Uses(ast.NodeVisitor):
    """Collects the uses of a source in `found`."""

    def __init__(self) -> None:
        self.found: list[Use] = []
        self.releases = EVERY
        self.given: set[Name] = set()
        self.known: dict[str, str | None] = {}

    def owner(self, node: ast.expr | None) -> str | None:
        """The recorded class that an expression is, or is an object of."""
        match node:
            case ast.Attribute(value=value, attr=name) if self.owner(value) == MODULE:
                return name if name in CLASSES else f"unrecorded {name}"
            case ast.Call(func=ast.Attribute(value=value, attr=name)):
                holder = self.owner(value)
                if holder == MODULE:
                    return name if name in CLASSES else None
                returned = RECORD["calls"].get(holder, {}).get(name, {}).get("returns")
                return returned if returned in CLASSES else None
            case ast.Name(id=name) | ast.Attribute(attr=name):
                return self.known.get(ast.unparse(node), OBJECTS.get(name.strip("_").lower()))
        return None

    def use(self, node: ast.expr, holder: ast.expr, name: str, keyword: str = "") -> None:
        owner = self.owner(holder)
        if owner and not name.startswith("_") and (owner, name) not in self.given:
            self.found.append(Use(node.lineno, owner, name, self.releases, keyword))

    def holding(self, test: ast.expr, *, fails: bool = False) -> frozenset[str]:
        """The releases in which a test may hold, or fail."""
        match test:
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return self.holding(operand, fails=not fails)
            case ast.BoolOp(op=op, values=values):
                parts = [self.holding(value, fails=fails) for value in values]
                each_counts = isinstance(op, ast.And) != fails
                return frozenset.intersection(*parts) if each_counts else frozenset.union(*parts)
            case ast.Call(
                func=ast.Name(id="hasattr"), args=[holder, ast.Constant(value=str(name))]
            ) if owner := self.owner(holder):
                having = frozenset(releases_with(owner, name))
                return EVERY - having if fails else having
        return EVERY

    @contextmanager
    def within(self, releases: frozenset[str]) -> Iterator[None]:
        """What is found inside runs in these releases alone."""
        before = self.releases
        self.releases = before & releases
        yield
        self.releases = before

    def visit_all(self, nodes: Iterable[ast.AST], releases: frozenset[str]) -> None:
        with self.within(releases):
            for node in nodes:
                self.visit(node)

    def visit_Module(self, node: ast.Module) -> None:
        for kind in (found for found in ast.walk(node) if isinstance(found, ast.ClassDef)):
            owners = [owner for base in kind.bases if (owner := self.owner(base))]
            self.given |= {(owner, name) for owner in owners for name in names_given(kind)}
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.use(node, node.value, node.attr)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        match node:
            case ast.Call(
                func=ast.Name(id="getattr"), args=[holder, ast.Constant(value=str(name))]
            ):
                self.use(node, holder, name)
            case ast.Call(func=ast.Attribute(value=value, attr=name), keywords=keywords):
                for keyword in keywords:
                    self.use(node, value, name, keyword.arg or "")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        if owner := self.owner(node.value):
            self.known |= {ast.unparse(target): owner for target in node.targets}

    def visit_arg(self, node: ast.arg) -> None:
        if node.annotation and ast.unparse(node.annotation) != "Any":
            self.known[node.arg] = self.owner(node.annotation)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        fails = isinstance(node.op, ast.Or)
        for index, value in enumerate(node.values):
            before = (self.holding(earlier, fails=fails) for earlier in node.values[:index])
            self.visit_all([value], EVERY.intersection(*before))

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.visit(node.test)
        self.visit_all([node.body], self.holding(node.test))
        self.visit_all([node.orelse], self.holding(node.test, fails=True))

    def visit_If(self, node: ast.If) -> None:
        self.visit(node.test)
        self.visit_all(node.body, self.holding(node.test))
        self.visit_all(node.orelse, self.holding(node.test, fails=True))
        if isinstance(node.body[-1], ast.Return | ast.Raise):
            self.releases &= self.holding(node.test, fails=True)

    def visit_FunctionDef(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        known = dict(self.known)
        with self.within(RTX if "rtx" in node.name.lower() else EVERY):
            self.generic_visit(node)
        self.known = known

    visit_ClassDef = visit_FunctionDef  # noqa: N815


def uses(source: str) -> list[Use]:
    visitor = Uses()
    visitor.visit(ast.parse(source))
    return visitor.found


def outside(source: str) -> list[str]:
    """What a source uses that some release lacks, told by its place."""
    return [
        f"line {use.line}: {use.owner}.{use.name}{use.keyword and f'({use.keyword}=)'} "
        f"is not in {', '.join(use.lacking)}"
        for use in uses(source)
        if use.lacking
    ]


# ---- the backend


@pytest.mark.parametrize("path", BACKENDS, ids=lambda path: path.name)
def test_the_backend_uses_only_what_every_release_has(path: Path) -> None:
    assert outside(path.read_text()) == []


@pytest.mark.skipif(not BACKENDS, reason="no backend yet")
def test_the_backend_is_read_and_not_only_opened() -> None:
    """A backend parses, builds and runs: if its objects had other names, nothing would be held."""
    found = {use.owner for path in BACKENDS for use in uses(path.read_text())}
    wanted = {"IBuilderConfig", "OnnxParser", "Runtime", "ICudaEngine", "IExecutionContext"}
    assert {MODULE, "Builder", *wanted} <= found


# ---- the record


@pytest.mark.parametrize("package", ["tensorrt", "tensorrt_rtx"])
def test_the_record_is_what_an_installed_package_has(package: str) -> None:
    trt = pytest.importorskip(package, exc_type=ImportError)
    described = RECORDER["describe"](trt)
    release = f"{package} {trt.__version__}"
    if release in RELEASES:
        assert described["names"] == names_of(release)
    for owner, names in RECORD["everywhere"].items():
        assert set(names) <= set(described["names"][owner]), owner
    for owner, calls in RECORD["calls"].items():
        for name in calls.keys() & described["calls"].get(owner, {}).keys():
            found = described["calls"][owner][name]
            assert set(calls[name]["parameters"]) <= set(found["parameters"]), (owner, name)


REMOVED = {
    "BuilderFlag": "FP16 INT8 FP8 BF16 INT4 FP4 OBEY_PRECISION_CONSTRAINTS "
    "PREFER_PRECISION_CONSTRAINTS",
    "IBuilderConfig": "int8_calibrator set_calibration_profile get_calibration_profile "
    "set_quantization_flag get_quantization_flag quantization_flags clear_quantization_flag",
    "ICudaEngine": "device_memory_size",
}
"""From the vendor's guide from 10.x to 11.x, "Removed Python APIs and Replacements"."""


def test_the_record_tells_the_generations_apart_as_the_vendor_does() -> None:
    full = [release for release in RELEASES if release not in RTX]
    tenth = [release for release in full if release.startswith("tensorrt 10.")]
    assert 0 < len(tenth) < len(full) < len(RELEASES)
    for owner, names in REMOVED.items():
        for name in names.split():
            assert [r for r in full if r in releases_with(owner, name)] == tenth, name


def test_releases_are_merged_as_sets_are() -> None:
    trts = [ModuleType(name) for name in ("first", "second")]
    for trt, names in zip(trts, (["TF32", "FP16"], ["TF32", "NEW"]), strict=True):
        trt.__dict__["BuilderFlag"] = type("BuilderFlag", (), dict.fromkeys(names))
    described = [RECORDER["describe"](trt) for trt in trts]
    record = RECORDER["merged"](dict(zip("ab", described, strict=True)))
    assert record["everywhere"] == {MODULE: ["BuilderFlag"], "BuilderFlag": ["TF32"]}
    assert record["somewhere"] == {"BuilderFlag": {"FP16": ["a"], "NEW": ["b"]}}


def test_a_call_is_read_from_what_pybind11_writes() -> None:
    def method() -> None:
        """m(*args, **kwargs)
        Overloaded function.

        1. m(self: a.b.Kind, x: typing.SupportsInt, y: dict[str, int] = {'k': 1}) -> a.b.Result

        2. m(self: a.b.Kind, z: str) -> a.b.Result
        """

    method.__doc__ = inspect.cleandoc(method.__doc__)
    assert RECORDER["call"](method, "m") == {"parameters": ["x", "y", "z"], "returns": "Result"}
    assert RECORDER["call"](property(), "m") is None


# ---- controls: what must be found out, and what must pass

BACKEND = """
def build(self, model):
    trt, logger = self.trt, self.logger
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model):
        raise ValueError([parser.get_error(i).desc() for i in range(parser.num_errors)])
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    config.max_aux_streams = 0
    config.set_memory_pool_limit(pool=trt.MemoryPoolType.WORKSPACE, pool_size=1 << 30)
    return builder.build_serialized_network(network, config)

def load(self, plan):
    engine = trt.Runtime(self.logger).deserialize_cuda_engine(plan)
    self._context = engine.create_execution_context()
    self._context.execute_async_v3(self.stream)
    return engine.device_memory_size_v2
"""


def test_a_backend_inside_every_release_passes() -> None:
    assert outside(BACKEND) == []
    found: dict[str, list[str]] = {}
    for use in uses(BACKEND):
        found.setdefault(use.owner, []).append(use.name + (use.keyword and f"({use.keyword}=)"))
    assert {owner: " ".join(sorted(names)) for owner, names in found.items()} == {
        MODULE: "Builder BuilderFlag MemoryPoolType NetworkDefinitionCreationFlag OnnxParser "
        "Runtime",
        "Builder": "build_serialized_network create_builder_config create_network",
        "BuilderFlag": "TF32",
        "IBuilderConfig": "clear_flag max_aux_streams set_memory_pool_limit "
        "set_memory_pool_limit(pool=) set_memory_pool_limit(pool_size=)",
        "ICudaEngine": "create_execution_context device_memory_size_v2",
        "IExecutionContext": "execute_async_v3",
        "MemoryPoolType": "WORKSPACE",
        "NetworkDefinitionCreationFlag": "STRONGLY_TYPED",
        "OnnxParser": "get_error num_errors parse",
        "ParserError": "desc",
        "Runtime": "deserialize_cuda_engine",
    }


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("config.set_flag(trt.BuilderFlag.FP16)", "BuilderFlag.FP16"),
        ("self.trt.BuilderFlag.FP16", "BuilderFlag.FP16"),
        ("engine.num_bindings", "ICudaEngine.num_bindings"),
        ("self._engine.num_bindings", "ICudaEngine.num_bindings"),
        ("getattr(engine, 'num_bindings')", "ICudaEngine.num_bindings"),
        ("trt.Volume", "the module.Volume"),
        ("trt.ComputeCapability", "the module.ComputeCapability"),
        ("trt.Dims.MAX_DIMS", "unrecorded Dims.MAX_DIMS"),
        ("config.int8_calibrator = None", "IBuilderConfig.int8_calibrator"),
        ("made = trt.Builder(x)\nmade.platform_has_fast_fp16", "Builder.platform_has_fast_fp16"),
        ("builder.create_network(0).add_plugin_v2", "INetworkDefinition.add_plugin_v2"),
        ("parser.get_error(0).text()", "ParserError.text"),
        ("class Log(trt.ILogger):\n  pass\nlogger.told", "ILogger.told"),
        ("class Log:\n  def __init__(self): self.told = 0\nlogger.told", "ILogger.told"),
        ("builder.create_network(flag=1)", "Builder.create_network(flag=)"),
        ("self.runtime.get_engine_validity(plan)", "Runtime.get_engine_validity"),
        ("def rtx():\n  config.remote_auto_tuning_config", "tuning_config is not in te"),
        ("if hasattr(engine, 'num_bindings'): pass\nelse: engine.num_bindings", "num_bindings"),
        ("if hasattr(engine, 'name'): engine.num_bindings", "num_bindings"),
        ("if hasattr(other, 'num_bindings'): engine.num_bindings", "num_bindings"),
        ("if hasattr(trt, 'ComputeCapability'): trt.ComputeCapability.SM121", "rtx 1.4.0.76"),
        ("if x or hasattr(runtime, 'engine_header_size'): runtime.engine_header_size", "11.4"),
        ("def f():\n if not hasattr(engine, 'own'): return\nengine.own", "line 3"),
        ("def f(cache: Any): cache.exists()", "ITimingCache.exists"),
        ("def f(held: trt.ITimingCache): held.exists()", "ITimingCache.exists"),
        ("if x: held = trt.Runtime(log)\nheld.engine_header_size", "Runtime.engine_header_size"),
        ("def f(cache: Path): pass\ncache.exists()", "line 2: ITimingCache.exists"),
        ("hasattr(engine, 'num_bindings') or engine.num_bindings", "num_bindings"),
    ],
)  # fmt: skip
def test_a_name_that_some_release_lacks_is_found_out(source: str, told: str) -> None:
    (problem,) = outside(source)
    assert told in problem


@pytest.mark.parametrize(
    "source",
    [
        "getattr(engine, 'num_bindings', 0)",
        "if hasattr(engine, 'num_bindings'): engine.num_bindings",
        "if hasattr(trt.BuilderFlag, 'FP16') and x: config.set_flag(trt.BuilderFlag.FP16)",
        "engine.num_bindings if hasattr(engine, 'num_bindings') else engine.num_io_tensors",
        "hasattr(engine, 'num_bindings') and engine.num_bindings",
        "not hasattr(engine, 'num_bindings') or engine.num_bindings",
        "def f():\n if not hasattr(engine, 'num_bindings'): raise X\n engine.num_bindings",
        "if x and hasattr(config, 'num_compute_capabilities'): trt.ComputeCapability.SM89",
        "if not hasattr(trt, 'EngineValidity'): pass\nelse: runtime.get_engine_validity(plan)",
        "def f(cache: Path | None): cache.exists()",
        "def validity_rtx(): return runtime.get_engine_validity(plan)",
        "class Rtx:\n def aim(self): config.set_compute_capability(trt.ComputeCapability.SM89)",
        "class Log(trt.ILogger):\n said: int\nlogger.said",
        "class Log(trt.ILogger):\n def __init__(self): self.told = 0\nlogger.told",
        "class Log(trt.ILogger):\n def text(self): pass\nLOGGER.text()",
        "self.settings.num_bindings",
        "trt.__version__",
    ],
)  # fmt: skip
def test_what_is_guarded_or_not_tensorrt_passes(source: str) -> None:
    assert outside(source) == []
