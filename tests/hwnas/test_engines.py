"""`hwnas export --format tensorrt` by the real TensorRT for RTX, for cards that are not here."""

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import onnx
import onnxruntime
import pytest
import torch

import hwnas.engines
import hwnas.run
from hwnas.data import Images, Splits, as_input, digits
from hwnas.engines import attributed, engine_rows, export_engine
from hwnas.job import Job
from hwnas.retrain import load_weights
from hwnas.spaces.registry import load_space
from latency_tables.host import Host
from latency_tables.ops import OpSpec
from profilers.graphs import emit, random_parameters, read_ops
from profilers.measure import Measurement
from profilers.modules import Network
from profilers.ort_session import session_options
from profilers.trt_build import RTX, Engine, Kernel, build, package, version
from quant.precision import TENSORRT, Runtime

rtx = pytest.importorskip(
    "tensorrt_rtx",
    reason="pip install 'hwnas[gpu-build]': TensorRT for RTX builds without a GPU",
    exc_type=ImportError,
)
if package().__name__ != RTX:
    pytest.skip("the full TensorRT is used, which builds for its own card", allow_module_level=True)

ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "docs" / "output.schema.json").read_text())
EXPORT = ("export", "--run", "run", "--format", "tensorrt")
SM89 = (*EXPORT, "--compute-capability", "sm89")
Answer = Any  # of conftest.py, as `hwnas_in` gives it
Commands = Callable[..., Answer]
Copied = Callable[[Path, str], Path]


def result_in(folder: Path) -> Path:
    """The newest result of the run in a folder."""
    return folder / "run" / (folder / "run" / "best").read_text().strip()


def files_of(result: Path) -> dict[str, bytes]:
    return {str(p.relative_to(result)): p.read_bytes() for p in result.rglob("*") if p.is_file()}


def assert_valid(name: str, content: Any) -> None:
    part = {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    for schema in (part, SCHEMA):
        jsonschema.Draft202012Validator(schema).validate(content)


def is_valid(name: str, content: Any) -> bool:
    part = {"$ref": f"#/$defs/{name}", "$defs": SCHEMA["$defs"]}
    return jsonschema.Draft202012Validator(part).is_valid(content)


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory, searched_as: Copied) -> dict[str, bytes]:
    """The files of the certified result, before anything is exported."""
    return files_of(result_in(searched_as(tmp_path_factory.mktemp("before"), "run")))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, searched_as: Copied) -> Path:
    return searched_as(tmp_path_factory.mktemp("engines"), "run")


@pytest.fixture(scope="module")
def told(folder: Path, hwnas_in: Commands) -> dict[str, Any]:
    """What the export for one card answers."""
    answer = hwnas_in(folder, *SM89, "--json")
    assert answer.code == 0, answer.told
    return dict(answer.content)


@pytest.fixture(scope="module")
def ops(folder: Path) -> list[OpSpec]:
    """The network that was found."""
    space = load_space(
        f"{ROOT / 'examples' / 'own_space.py'}:space", classes=10, image_channels=1, size=32
    )
    chosen = json.loads((result_in(folder) / "architecture.json").read_text())
    return list(space.lower(space.parse(chosen)))


# ---- what is in the folder


def test_a_folder_holds_the_graph_the_engine_and_the_certificate(
    folder: Path, told: dict[str, Any], before: dict[str, bytes]
) -> None:
    """And the result beside it stays as it was."""
    made = folder / told["engine"]["folder"]
    assert made == result_in(folder) / "tensorrt-sm89"
    assert sorted(p.name for p in made.iterdir()) == [
        "certificate.json",
        "model.onnx",
        "model.plan",
    ]
    written = json.loads((made / "certificate.json").read_text())
    assert written.keys() == told["engine"].keys() - {"folder"}
    for field in written.keys() - {"made"}:
        assert written[field] == told["engine"][field]
    after = files_of(result_in(folder))
    assert {name: after[name] for name in before} == before


def test_the_certificate_names_what_it_certifies(
    folder: Path, told: dict[str, Any], ops: list[OpSpec]
) -> None:
    content, result = told["engine"], result_in(folder)
    made = folder / content["folder"]

    def sha256(path: Path) -> str:
        return hashlib.sha256(path.read_bytes()).hexdigest()

    source = json.loads((result / "certificate.json").read_text())
    assert content["hashes"]["model"] == sha256(made / "model.onnx")
    assert content["hashes"]["engine"] == sha256(made / "model.plan")
    assert content["hashes"]["source"] == sha256(result / "model.onnx") == source["hashes"]["model"]
    assert content["hashes"]["code"] == source["hashes"]["code"]
    assert content["architecture"] == source["architecture"]
    assert content["source"] == {
        "result": result.name, "runtime": "simulated", "limits": source["limits"]
    }  # fmt: skip
    model = onnx.load(made / "model.onnx")
    assert read_ops(model) == ops
    engine = build(model, targets=("sm89",))
    assert engine.plan == (made / "model.plan").read_bytes()
    assert content["engine"] == {
        "file": "model.plan",
        "size_bytes": len(engine.plan),
        "runtime": f"tensorrt_rtx {rtx.__version__}",
        "compute_capabilities": ["sm89"],
        "batch": 1,
        "kernels": len(engine.kernels),
        "integer_kernels": sum("Int8" in kernel.inputs for kernel in engine.kernels),
    }
    integer = [op for op in ops if op.precision.is_integer]
    assert content["engine"]["integer_kernels"] >= sum(
        layer.has_weights for op in integer for layer in op.layers
    )
    assert content["measured"] is None
    assert "sm89, on no card" in content["latency"]


def network_on(runtime: Runtime, ops: list[OpSpec], folder: Path) -> Network:
    """The network that was found, on a runtime's grid."""
    network = Network(ops, runtime)
    load_weights(network, result_in(folder) / "weights.pt")
    return network.eval()


def classes(network: Network, images: Images) -> torch.Tensor:
    """The probability of each class (images, classes)."""
    with torch.no_grad():
        return network(torch.from_numpy(as_input(images.x))).softmax(1)


def test_the_accuracy_is_that_of_the_shipped_graph(
    folder: Path, told: dict[str, Any], ops: list[OpSpec]
) -> None:
    """Counted here, and by ONNX Runtime in the graph as it is written, where a tie may fall to the
    other side."""
    data, accuracy = digits(), told["engine"]["accuracy"]
    options = session_options(1)
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    path = folder / told["engine"]["folder"] / "model.onnx"
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    network = network_on(TENSORRT, ops, folder)
    with data.final() as test:
        for images, stated in ((test, "test"), (data.search_val, "search_val")):
            right = classes(network, images).argmax(1).numpy() == images.y
            assert accuracy[stated] == right.mean()
            answers = session.run(None, {"input": as_input(images.x)})[0].argmax(1)
            assert (answers == images.y).mean() == pytest.approx(accuracy[stated], abs=0.01)


def test_scores_are_taken_on_tensorrts_grid(
    tmp_path: Path, searched_as: Copied, ops: list[OpSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Told by a score that moves with every step of the grid: the mean probability of the right
    class."""

    def sure(network: Network, data: Splits | Images) -> float:
        images = data.search_val if isinstance(data, Splits) else data
        return float(classes(network, images)[range(len(images.y)), images.y].mean())

    folder = searched_as(tmp_path, "run")
    monkeypatch.setattr(hwnas.engines, "accuracy_on", sure)
    monkeypatch.setattr("hwnas.export.requantise.accuracy", sure)
    where = hwnas.run.read_run(folder / "run")
    job = Job(hwnas.run.request_of(where, folder / "tables"))
    found = export_engine(job, result_in(folder), ["sm89"])["accuracy"]
    theirs, ours = (network_on(r, ops, folder) for r in (TENSORRT, job.profiler.runtime))
    assert found["search_val"] == sure(theirs, job.splits)
    assert found["search_val_before"] == sure(ours, job.splits)
    assert found["search_val"] != found["search_val_before"]
    with job.splits.final() as test:
        assert found["test"] == sure(theirs, test)


def test_an_engine_for_two_cards_is_another_in_another_folder(
    folder: Path, told: dict[str, Any], hwnas_in: Commands
) -> None:
    both = ("--compute-capability", "sm80", "--compute-capability", "SM89")
    answer = hwnas_in(folder, *EXPORT, *both, "--json")
    assert answer.code == 0, answer.told
    found = answer.content["engine"]
    assert found["folder"].endswith("tensorrt-sm80-sm89")
    assert found["engine"]["compute_capabilities"] == ["sm80", "sm89"]
    assert found["hashes"]["engine"] != told["engine"]["hashes"]["engine"]
    assert found["hashes"]["model"] == told["engine"]["hashes"]["model"]
    assert found["accuracy"] == told["engine"]["accuracy"]
    plan = (folder / found["folder"] / "model.plan").read_bytes()
    model = onnx.load(folder / found["folder"] / "model.onnx")
    assert plan == build(model, targets=("sm80", "sm89")).plan


def test_the_same_export_again_writes_the_same_files(
    folder: Path, told: dict[str, Any], hwnas_in: Commands
) -> None:
    made = folder / told["engine"]["folder"]
    files = files_of(made)
    answer = hwnas_in(folder, *SM89)
    assert answer.code == 0, answer.told
    for name in ("model.onnx", "model.plan"):
        assert files_of(made)[name] == files[name]
    rows = dict(engine_rows(told["engine"]))
    for what in ("engine", "latency", "accuracy on TEST"):
        assert rows[what] in answer.out
    assert (folder / rows["engine"]).is_file()
    assert rows["runs on"] == f"sm89, under {version()}, in batches of 1"


def test_an_engine_has_the_batch_of_its_run(folder: Path, tmp_path: Path) -> None:
    where = hwnas.run.read_run(folder / "run")
    request = replace(hwnas.run.request_of(where, folder / "tables"), batch=8)
    content = export_engine(Job(request), result_in(folder), ["sm80"])
    made = Path(content["folder"])
    assert content["engine"]["batch"] == 8
    model = onnx.load(made / "model.onnx")
    assert (made / "model.plan").read_bytes() == build(model, batch=8, targets=("sm80",)).plan


# ---- refusals: before anything is scored, measured or written


def never(*_: object, **__: object) -> None:
    raise AssertionError("this comes after what is refused")


@pytest.fixture
def untouched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing is scored, and nothing is written beside the result."""
    files = files_of(result_in(folder))
    monkeypatch.setattr(hwnas.engines, "rescored", never)
    yield
    assert files_of(result_in(folder)) == files


@pytest.mark.usefixtures("untouched")
@pytest.mark.parametrize("name", ["sm33", "current", "8.9"])
def test_an_unknown_card_is_answered_with_those_accepted(
    folder: Path, hwnas_in: Commands, name: str
) -> None:
    answer = hwnas_in(folder, *SM89, "--compute-capability", name, "--json")
    assert answer.code == 2
    assert_valid("failure", answer.content)
    assert f"builds no engine for '{name}'" in answer.content["error"]["what"]
    assert "sm80, sm86, sm89" in answer.content["error"]["accepted"]


@pytest.mark.usefixtures("no_card")
@pytest.mark.usefixtures("untouched")
def test_without_a_gpu_and_a_name_the_user_is_told_what_works(
    folder: Path, hwnas_in: Commands
) -> None:
    answer = hwnas_in(folder, *EXPORT, "--json")
    assert answer.code == 2
    assert_valid("failure", answer.content)
    assert "No NVIDIA driver is on this machine" in answer.content["error"]["what"]
    assert "--compute-capability sm89" in answer.content["error"]["next"]


@pytest.mark.usefixtures("untouched")
def test_without_a_package_the_user_is_told_which(
    folder: Path, hwnas_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tensorrt", RTX):
        monkeypatch.setitem(sys.modules, name, None)
    package.cache_clear()
    answer = hwnas_in(folder, *SM89, "--json")
    monkeypatch.undo()
    package.cache_clear()
    assert answer.code == 2
    assert "TensorRT is not installed" in answer.content["error"]["what"]
    assert "Traceback" not in answer.told


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--format", "plan"), "--format is 'plan'"),
        (("--compute-capability", "sm89"), "--compute-capability needs --format tensorrt"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(
    folder: Path, hwnas_in: Commands, flags: tuple[str, ...], words: str
) -> None:
    answer = hwnas_in(folder, "export", "--run", "run", *flags, "--json")
    assert answer.code == 2
    assert words in answer.content["error"]["what"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda result: (result / "certificate.json").unlink(), "is not a certificate"),
        (lambda result: (result / "model.onnx").write_bytes(b"other"), "is not what its cert"),
    ],
)
def test_what_is_not_certified_is_not_exported(
    harm: Callable[[Path], object],
    words: str,
    tmp_path: Path,
    searched_as: Copied,
    hwnas_in: Commands,
) -> None:
    folder = searched_as(tmp_path, "run")
    harm(result_in(folder))
    answer = hwnas_in(folder, *SM89, "--json")
    assert answer.code == 2
    assert words in answer.content["error"]["what"]
    assert answer.content["error"]["next"]
    assert not list(result_in(folder).glob("tensorrt*"))


@pytest.mark.usefixtures("quick")
def test_a_precision_that_tensorrt_does_not_run_is_named(
    tmp_path: Path, hwnas_in: Commands
) -> None:
    """A network of DoReFa's weights and PACT's activations, found on the simulated device."""
    space = (ROOT / "examples" / "own_space.py").read_text()
    space = space.replace('["fp32", "w8a8"]', '["pact-w4a4"]')
    (tmp_path / "space.py").write_text(space)
    small = ("--space", "space.py:space", "--device", "simulated", "--recipe", "smoke")
    answer = hwnas_in(
        tmp_path, "search", *small, "--limit-fraction", "0.9", "--run", "run", "--quiet"
    )
    assert answer.code == 0, answer.told
    answer = hwnas_in(tmp_path, *SM89, "--json")
    assert answer.code == 2
    assert_valid("failure", answer.content)
    assert "tensorrt has no kernel for pact-w4a4" in answer.content["error"]["what"]
    assert not list(result_in(tmp_path).glob("tensorrt*"))


def test_an_engine_that_runs_integers_as_floats_is_not_shipped(
    folder: Path, hwnas_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_floats(model: onnx.ModelProto, **options: Any) -> Engine:
        engine = build(model, **options)
        worse = [replace(kernel, inputs=("Float",)) for kernel in engine.kernels]
        return replace(engine, kernels=tuple(worse))

    files = files_of(result_in(folder))
    monkeypatch.setattr(hwnas.engines, "build", as_floats)
    answer = hwnas_in(folder, *SM89, "--json")
    assert answer.code == 1
    assert "does not run this network as declared" in answer.content["error"]["what"]
    assert files_of(result_in(folder)) == files


# ---- kernel by kernel


def test_layers_are_told_of_engines_alone(
    folder: Path, hwnas_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hwnas.run, "remeasure", never)
    monkeypatch.setattr(hwnas.run, "verify", never)
    answer = hwnas_in(folder, "verify", "--run", "run", "--layers", "--json")
    assert answer.code == 2
    assert_valid("failure", answer.content)
    assert "model.onnx is none" in answer.content["error"]["what"]
    assert answer.content["error"]["next"] == "drop --layers"


@pytest.fixture(scope="module")
def kernels(ops: list[OpSpec]) -> tuple[Kernel, ...]:
    rng = np.random.default_rng(0)
    model = emit(ops, [random_parameters(op, rng) for op in ops], TENSORRT)
    return build(model, targets=("sm89",)).kernels


def test_every_kernels_time_goes_to_the_op_that_it_runs(
    ops: list[OpSpec], kernels: tuple[Kernel, ...]
) -> None:
    """By brute force: each kernel's own op, or that of the first node that it tells. Nothing is
    lost, and the parts of the engine's latency make up the whole."""
    positions = [f"position {number}" for number in range(len(ops))]
    rng = np.random.default_rng(1)
    times = {kernel.name: float(rng.uniform(1, 9)) for kernel in kernels}
    whole_us = 0.6 * sum(times.values())
    found = attributed(times, kernels, positions, whole_us)
    wanted = dict.fromkeys((*positions, ""), 0.0)
    for kernel in kernels:
        named = [name for name in (kernel.name, *kernel.nodes) if name.startswith("op0")]
        wanted[positions[int(named[0][2:5])] if named else ""] += times[kernel.name]
    assert {part.op: part.alone_us for part in found} == pytest.approx(
        {op: alone for op, alone in wanted.items() if alone}
    )
    assert [part.op for part in found if part.op] == positions, "in the network's order"
    assert sum(part.kernels for part in found) == len(kernels)
    assert sum(part.alone_us for part in found) == pytest.approx(sum(times.values()))
    assert sum(part.rescaled_us for part in found) == pytest.approx(whole_us)
    for part in found:
        assert part.rescaled_us == pytest.approx(0.6 * part.alone_us)


def test_a_kernel_that_the_engine_does_not_list_belongs_to_no_op(
    ops: list[OpSpec], kernels: tuple[Kernel, ...]
) -> None:
    positions = [str(number) for number in range(len(ops))]
    (part,) = attributed({"a copy of the driver's": 3.0}, kernels, positions, 1.5)
    assert (part.op, part.kernels, part.alone_us, part.rescaled_us) == ("", 1, 3.0, 1.5)


# ---- the schema


def test_what_is_told_is_as_the_schema_says(told: dict[str, Any]) -> None:
    assert_valid("export", told)
    for path in (("engine", "hashes"), ("engine", "engine"), ("engine", "accuracy"), ("engine",)):
        inside = told
        for name in path:
            inside = inside[name]
        for field in inside:
            short = copy.deepcopy(told)
            parent = short
            for name in path:
                parent = parent[name]
            del parent[field]
            assert not is_valid("export", short), f"without {path} {field}"
            parent.update({field: inside[field], "surprise": [1]})
            assert not is_valid("export", short), f"more at {path}"


def test_a_measured_engine_is_as_the_schema_says(told: dict[str, Any]) -> None:
    """In the place of what is told of an engine that was not measured."""
    measurement = Measurement(120.0, 120.0, 119.0, 121.0, 110.0, 130.0, 0.01, 100, True)
    host = Host("gpu", "tensorrt", "11.4", "NVIDIA H100", "sm90 driver 580", 1, 1, "", "there")
    content = copy.deepcopy(told)
    engine = content["engine"]
    del engine["latency"], engine["engine"]["kernels"], engine["engine"]["integer_kernels"]
    engine |= {"measured": asdict(measurement), "host": asdict(host)}
    assert_valid("export", content)
    assert dict(engine_rows(engine))["latency"] == "0.12 ms"
    for other in ({"host": None}, {"measured": None}, {"latency": "not measured"}):
        assert not is_valid("export", {**content, "engine": {**engine, **other}})


def test_layers_are_as_the_schema_says(
    folder: Path, ops: list[OpSpec], kernels: tuple[Kernel, ...]
) -> None:
    times = {kernel.name: 2.0 for kernel in kernels}
    parts = [asdict(part) for part in attributed(times, kernels, [str(i) for i in range(4)], 9.0)]
    content = json.loads((result_in(folder) / "certificate.json").read_text())
    named = ("limits", "holds", "measured", "accuracy")
    told = {
        "status": "ok", "exit_code": 0, "run": "run", "certificate": "certificate.json",
        **{name: content[name] for name in named},
    }  # fmt: skip
    assert_valid("verify", told)
    assert_valid("verify", {**told, "layers": parts})
    for wrong in ([], [{**parts[0], "kernels": 0}], [{**parts[0], "surprise": [1]}]):
        assert not is_valid("verify", {**told, "layers": wrong})
    for device in ("gpu", "gpu-torch"):
        limits = {f"latency_p95_ms@{device}": 0.3}
        held = dict.fromkeys(limits, True)
        assert_valid("verify", {**told, "limits": limits, "holds": held})
