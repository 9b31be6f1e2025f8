"""TensorRT's sessions and profiler: on a stated card, under a package that answers as TensorRT does
and computes by ONNX Runtime (PyTorch for bfloat16, which that has not on a CPU); on a real card
where there is one (`-m gpu`). The real builder is tried elsewhere, since it needs no card.
"""

import ctypes
import enum
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
import torch

import profilers.cuda
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.ops import OpBuilder, OpSpec, Tensor
from profilers.base import Session, WrongKernels
from profilers.cuda import Card, open_cuda
from profilers.graph_module import GraphModule
from profilers.graphs import emit, random_parameters
from profilers.measure import GPU_PROTOCOL, Protocol
from profilers.trt import PLAN, TOLERATED, TrtProfiler, TrtSession, random_values
from profilers.trt_build import Engine, loaded
from quant.errors import HwnasError, InvalidInput, MissingDependency
from quant.precision import TENSORRT, Format, Precision

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "w8a8")
INPUT = Tensor(8, 6, 6)
QUICK = Protocol(rounds=2, warmup_ms=1, block_ms=2, min_runs=5, max_runs=20)
KERNEL_US = 40.0

OPS: dict[str, Callable[[Precision, Tensor], OpSpec]] = {
    "conv": lambda p, t: conv_norm_activation(t, 12, kernel=3, stride=2, precision=p),
    "residual": lambda p, t: inverted_residual(
        t, t.channels, kernel=3, expansion=3, squeeze=4, precision=p, activation="hard_swish"
    ),
    "classifier": lambda p, t: classifier(t, 16, 4, precision=p),
}


def model_of(*ops: OpSpec, seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    return emit(ops, [random_parameters(op, rng) for op in ops], TENSORRT)


def small(precision: str = "fp32", kind: str = "fp32") -> onnx.ModelProto:
    return model_of(OPS["conv"](Precision(precision), Tensor(8, 6, 6, Format.parse(kind))))


def wanted(model: onnx.ModelProto, *inputs: np.ndarray) -> np.ndarray:
    """PyTorch's output."""
    module = GraphModule(model)
    given = [
        torch.from_numpy(x).to(kind) for x, kind in zip(inputs, module.input_types, strict=True)
    ]
    with torch.no_grad():
        found: np.ndarray = module(*given).float().numpy()
    return found


def images(batch: int, seed: int = 1, spec: Tensor = INPUT) -> np.ndarray:
    shape = (batch, spec.channels, spec.height, spec.width)
    return np.random.default_rng(seed).random(shape, np.float32)


# ---- a package that answers as TensorRT does


class Mode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class Diagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4
    INSUFFICIENT_GPU_MEMORY = 16


NUMPY = {
    onnx.TensorProto.FLOAT: ("FLOAT", np.dtype(np.float32)),
    onnx.TensorProto.FLOAT16: ("HALF", np.dtype(np.float16)),
    onnx.TensorProto.BFLOAT16: ("BF16", np.dtype(ml_dtypes.bfloat16)),
    onnx.TensorProto.INT8: ("INT8", np.dtype(np.int8)),
}


def at(address: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray:
    """The array that lies in memory at an address."""
    size = int(np.prod(shape)) * dtype.itemsize
    held = (ctypes.c_uint8 * size).from_address(address)
    return np.frombuffer(held, np.uint8).view(dtype).reshape(shape)


class FakeEngine:
    """A plan's engine: its tensors as TensorRT tells them, its numbers as it is written."""

    def __init__(self, trt: "FakeTrt", plan: bytes) -> None:
        head, _, graph = plan.partition(b"\n")
        self.trt, self.batch, self.model = trt, int(head), onnx.load_from_string(graph)
        self.inputs = {item.name: item for item in self.model.graph.input}
        self.outputs = {item.name: item for item in self.model.graph.output}
        self.tensors = [*self.outputs, *self.inputs] if trt.outputs_first else [
            *self.inputs, *self.outputs
        ]  # fmt: skip
        self.num_io_tensors = len(self.tensors)

    def get_tensor_name(self, index: int) -> str:
        return self.tensors[index]

    def get_tensor_mode(self, name: str) -> Mode:
        return Mode.INPUT if name in self.inputs else Mode.OUTPUT

    def item(self, name: str) -> Any:
        return (self.inputs | self.outputs)[name].type.tensor_type

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (-1, *(side.dim_value for side in self.item(name).shape.dim[1:]))

    def get_tensor_dtype(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(name=NUMPY[self.item(name).elem_type][0])

    def create_execution_context(self) -> "FakeContext | None":
        return None if "context" in self.trt.failing else FakeContext(self)

    def create_engine_inspector(self) -> Any:
        def told(layout: str) -> str:
            assert layout == "json"
            return json.dumps({"Layers": self.trt.layers, "Bindings": self.tensors})

        return SimpleNamespace(get_engine_information=told)

    def compute(self, inputs: list[np.ndarray]) -> np.ndarray:
        types = {item.data_type for item in self.model.graph.initializer}
        if onnx.TensorProto.BFLOAT16 in types or any(x.dtype.kind == "V" for x in inputs):
            given = [torch.from_numpy(x.astype(np.float32)) for x in inputs]
            module = GraphModule(self.model)
            kinds = zip(given, module.input_types, strict=True)
            with torch.no_grad():
                found: np.ndarray = module(*[x.to(kind) for x, kind in kinds]).float().numpy()
            return found
        import onnxruntime as ort

        session = ort.InferenceSession(
            self.model.SerializeToString(), providers=["CPUExecutionProvider"]
        )
        answer: np.ndarray = session.run(None, dict(zip(self.inputs, inputs, strict=True)))[0]
        return answer


class FakeContext:
    """Runs an engine on a stream, in memory that was named."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine, self.trt = engine, engine.trt
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profiler: Any = None
        self.enqueue_emits_profile = True
        self.launches = 0

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return shape[0] == self.engine.batch

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert self.shapes.keys() == self.engine.inputs.keys(), "the output's shape hangs on all"
        return (self.engine.batch, *self.engine.get_tensor_shape(name)[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return "address" not in self.trt.failing

    def array(self, name: str) -> np.ndarray:
        dtype = NUMPY[self.engine.item(name).elem_type][1]
        shape = (self.engine.batch, *self.engine.get_tensor_shape(name)[1:])
        return at(self.addresses[name], shape, dtype)

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == self.trt.cuda.stream
        if "execute" in self.trt.failing:
            return False
        self.trt.cuda.work(KERNEL_US, self.compute)
        return True

    def compute(self) -> None:
        self.launches += 1
        (output,) = self.engine.outputs
        found = self.engine.compute([self.array(name) for name in self.engine.inputs])
        self.array(output)[:] = self.trt.wrong(found)

    def report_to_profiler(self) -> bool:
        assert not self.enqueue_emits_profile
        for name, ms in (("first", 0.002), ("second", 0.001 * self.launches)):
            self.profiler.report_layer_time(name, ms)
        return True


class FakeTrt:
    """The package: `failing` names what it refuses, and `said` is what it logs of it."""

    TensorIOMode, EngineInvalidityDiagnostics = Mode, Diagnostics
    LayerInformationFormat = SimpleNamespace(JSON="json")
    IProfiler = type("IProfiler", (), {})
    ComputeCapability = SimpleNamespace(__members__={"SM80": 1, "SM89": 2, "CURRENT": 3})
    __name__, __version__ = "stated_trt", "11.4.0"

    def __init__(self, cuda: Any) -> None:
        self.cuda = cuda
        self.failing: set[str] = set()
        self.said, self.bits = "", 0
        self.outputs_first = False
        self.layers: list[Any] = []
        self.wrong: Callable[[np.ndarray], np.ndarray] = lambda found: found
        self.built: list[tuple[onnx.ModelProto, int, Path]] = []
        self.log = SimpleNamespace(lines=[], texts=lambda **_: [self.said] if self.said else [])

    def Runtime(self, log: Any) -> Any:  # noqa: N802
        assert log is self.log

        def deserialize(plan: bytes) -> FakeEngine | None:
            return None if "deserialise" in self.failing else FakeEngine(self, plan)

        return SimpleNamespace(
            deserialize_cuda_engine=deserialize,
            **({"get_engine_validity": lambda plan: (2, self.bits)} if self.bits else {}),
        )

    def build(self, model: onnx.ModelProto, *, batch: int, cache: Path) -> Engine:
        self.built.append((model, batch, cache))
        return Engine(plan_of(model, batch), ())


def plan_of(model: onnx.ModelProto, batch: int) -> bytes:
    return f"{batch}\n".encode() + model.SerializeToString()


@pytest.fixture
def trt(stated_cuda: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeTrt:
    found = FakeTrt(stated_cuda)
    for module in ("trt", "trt_build"):
        monkeypatch.setattr(f"profilers.{module}.package", lambda: found)
    monkeypatch.setattr("profilers.trt_build.logger", lambda: found.log)
    monkeypatch.setattr("profilers.trt.build", found.build)
    monkeypatch.setenv("HWNAS_HOME", str(tmp_path / "home"))
    return found


def opened(trt: FakeTrt, model: onnx.ModelProto, batch: int = 4) -> TrtSession:
    return TrtSession(plan_of(model, batch), trt.cuda, batch)


# ---- running


@pytest.mark.parametrize("count", [1, 3, 4, 5, 8, 11])
def test_any_number_of_images_runs_in_batches_of_the_plan(count: int, trt: FakeTrt) -> None:
    model, x = small(), images(count)
    with opened(trt, model) as session:
        found = session.run(x)
        assert session._context.launches == -(-count // 4)
    np.testing.assert_allclose(found, wanted(model, x), rtol=1e-4, atol=1e-5)


def test_what_a_batch_lacks_is_zeros_and_not_what_was_there_before(trt: FakeTrt) -> None:
    with opened(trt, small()) as session:
        session.run(images(4))
        session.run(images(1))
        (held,) = session._inputs
        assert not trt.cuda.get(held)[1:].any()
        np.testing.assert_array_equal(trt.cuda.get(held)[:1], images(1))


@pytest.mark.parametrize("block", OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_runs_in_its_own_types(precision: str, block: str, trt: FakeTrt) -> None:
    kinds = {"fp16": "fp16", "bf16": "bf16", "w8a8": "a8"}
    spec = Tensor(8, 6, 6, Format.parse(kinds.get(precision, "fp32")))
    model = model_of(OPS[block](Precision(precision), spec))
    held = NUMPY[model.graph.input[0].type.tensor_type.elem_type][1]
    x = random_values(np.random.default_rng(2), (6, 8, 6, 6), held)
    with opened(trt, model) as session:
        assert session._inputs[0].dtype == held
        found = session.run(x)
    assert found.dtype != np.dtype(ml_dtypes.bfloat16)
    reference = wanted(model, x.astype(np.int8 if held == np.int8 else np.float32))
    away = np.linalg.norm(found.astype(np.float32) - reference) / np.linalg.norm(reference)
    assert away < {"w8a8": 0.02, "bf16": 1e-6}.get(precision, 2e-3)


@pytest.mark.parametrize("outputs_first", [False, True])
def test_several_inputs_are_taken_in_their_order(outputs_first: bool, trt: FakeTrt) -> None:
    trt.outputs_first = outputs_first
    builder = OpBuilder(Precision("fp32"), INPUT, INPUT)
    builder.add(0, 1)
    halved = images(6, seed=3) / 2
    with opened(trt, model_of(builder.build())) as session:
        np.testing.assert_array_equal(session.run(images(6), halved), images(6) + halved)
        with pytest.raises(ValueError, match="zip"):
            session.run(images(6))


def test_a_session_gives_everything_back_when_it_is_closed(trt: FakeTrt) -> None:
    session = opened(trt, small())
    session.block(QUICK)
    trt.cuda.told.clear()
    session.close()
    assert trt.cuda.told == ["wait"], "before anything that may be in use goes"
    left = [session._timer, session._context, session._engine, session._output]
    assert left == [None] * 4
    assert session._inputs == []
    for use in (session.kernel_us, session.kernels, lambda: session.block(QUICK)):
        with pytest.raises(RuntimeError, match="closed"):
            use()
    session.close()


# ---- timing


def test_a_block_times_graphs_of_the_engine(trt: FakeTrt) -> None:
    with opened(trt, small()) as session:
        first, second = session.block(QUICK), session.block(QUICK)
        assert trt.cuda.captures == [1, 25], "once for both blocks, of 40 us in 1000"
    for samples in (first, second):
        np.testing.assert_allclose(samples, [[KERNEL_US, 1.0]] * len(samples))


def test_kernels_are_timed_without_a_graph_by_their_median(trt: FakeTrt) -> None:
    with opened(trt, small()) as session:
        assert session.kernel_us(runs=5) == {"first": 2.0, "second": 3.0}
        assert session._context.profiler is None
        assert trt.cuda.captures == []


# ---- what TensorRT refuses


@pytest.mark.parametrize(
    ("failing", "said", "told"),
    [
        ("deserialise", "", "stated_trt 11.4.0 does not load .* Stated 9000 .sm89.: it gives no"),
        ("deserialise", "magic tag does not match", "magic tag does not match"),
        ("deserialise", "CUDA: Out of memory", "Stated 9000 has not enough free memory"),
        ("context", "", "gives the engine no memory to run in: it gives no reason"),
        ("context", "OutOfMemory (Requested size was 8)", "has not enough free memory"),
        ("address", "", "takes no memory for input"),
        ("execute", "", "does not run the engine: it gives no reason"),
        ("execute", "Unsupported SM: 0x900", "does not run on the Stated 9000"),
    ],
)
def test_what_is_refused_is_one_sentence(failing: str, said: str, told: str, trt: FakeTrt) -> None:
    trt.failing, trt.said = {failing}, said
    with pytest.raises(HwnasError, match=told) as caught:
        opened(trt, small()).run(images(1))
    assert "\n" not in str(caught.value)
    assert caught.value.next_step


def test_a_launch_that_fails_while_it_is_timed_tells_its_reason(trt: FakeTrt) -> None:
    with opened(trt, small()) as session:
        trt.failing, trt.said = {"execute"}, "cudaError 700"
        with pytest.raises(HwnasError, match="does not run the engine: cudaError 700"):
            session.block(QUICK)
        trt.failing = set()
        assert (session.block(QUICK)[:, 0] == KERNEL_US).all()


def test_an_engine_of_another_batch_is_refused(trt: FakeTrt) -> None:
    with pytest.raises(HwnasError, match="takes no batches of 2"):
        TrtSession(plan_of(small(), 4), trt.cuda, 2)


def test_memory_for_inputs_that_is_not_there_is_one_sentence(trt: FakeTrt) -> None:
    trt.cuda.free_bytes = 1000
    with pytest.raises(InvalidInput, match="has not enough free memory"):
        opened(trt, small())


@pytest.mark.parametrize(
    ("bits", "told"),
    [
        (1, r"on the Stated 9000 \(sm89\): version mismatch\. An engine runs"),
        (5, r"version mismatch, old cuda driver"),
        (2, r"unsupported cc"),
        (16, r"has not enough free memory"),
    ],
)
def test_why_a_plan_is_not_valid_here_is_told_in_words(bits: int, told: str, trt: FakeTrt) -> None:
    trt.failing, trt.bits = {"deserialise"}, bits
    with pytest.raises(InvalidInput, match=told):
        loaded(b"1\n")


def test_a_card_that_the_package_never_runs_on_is_no_matter_of_the_plan(
    trt: FakeTrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Card("Stated H", (9, 0), "580.65", 0)
    monkeypatch.setattr("profilers.trt_build.card", lambda: other)
    trt.failing, trt.bits = {"deserialise"}, 2
    with pytest.raises(MissingDependency, match=r"does not run on the Stated H \(sm90\)") as caught:
        loaded(b"1\n")
    assert caught.value.accepted == "sm80, sm89"
    assert "gpu-torch" in caught.value.next_step


# ---- the profiler


def test_the_host_tells_the_package_the_card_and_the_driver(trt: FakeTrt) -> None:
    profiler = TrtProfiler(threads=2, batch=8)
    host = profiler.host()
    assert (host.device, host.runtime, host.runtime_version) == ("gpu", "stated_trt", "11.4.0")
    assert (host.cpu, host.flags) == ("Stated 9000", "sm89 driver 580.65")
    assert (host.threads, host.batch) == (2, 8)
    assert profiler.memory_layer == "stated"
    trt.__version__ = "11.5.0"
    assert host.difference(TrtProfiler(threads=2, batch=8).host()).startswith("runtime_version")


def test_an_engine_is_built_and_checked_once(trt: FakeTrt, tmp_path: Path) -> None:
    profiler, model = TrtProfiler(batch=2), small()
    path = tmp_path / "graph.onnx"
    path.write_bytes(model.SerializeToString())
    profiler.check(model)
    plan = profiler.compiled(path)
    for each in (model, path, plan):
        with profiler.prepare(each) as session:
            np.testing.assert_allclose(
                session.run(images(3)), wanted(model, images(3)), rtol=1e-4, atol=1e-5
            )
    assert [batch for _, batch, _ in trt.built] == [2]
    assert plan.suffix == profiler.suffix == PLAN
    assert profiler.compiled(plan) == plan
    profiler.prepare(small("fp16"))
    assert len(trt.built) == 2


def test_plans_go_with_their_profiler(trt: FakeTrt, tmp_path: Path) -> None:
    profiler, path = TrtProfiler(), tmp_path / "graph.onnx"
    path.write_bytes(small().SerializeToString())
    plan = profiler.compiled(path)
    assert plan.exists()
    del profiler
    assert not plan.exists()


def test_timings_of_the_builder_are_kept_by_package_card_and_driver(
    trt: FakeTrt, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cache() -> Path:
        with TrtProfiler().prepare(small()):
            return trt.built[-1][2]

    first = cache()
    assert first == cache()
    assert first.parent.is_dir()
    found = {first}
    trt.__version__ = "11.5.0"
    found.add(cache())
    for card in (Card("Stated 9000", (8, 9), "590", 0), Card("Other / card", (8, 9), "590", 0)):
        monkeypatch.setattr("profilers.trt.card", lambda card=card: card)
        found.add(cache())
    trt.__name__ = "stated_rtx"
    found.add(cache())
    assert len(found) == 5
    assert {path.parent for path in found} == {first.parent}


# ---- what an engine computes is held against PyTorch


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_engine_that_answers_zeros_is_refused(precision: str, trt: FakeTrt) -> None:
    trt.wrong = np.zeros_like
    with pytest.raises(MissingDependency, match="answers zeros on the Stated 9000") as caught:
        TrtProfiler().prepare(small(precision))
    assert "gpu-torch" in caught.value.next_step


@pytest.mark.parametrize(
    "wrong", [lambda y: -y, lambda y: y * np.nan, lambda y: y[::-1], lambda y: y + 9]
)
def test_an_engine_that_answers_otherwise_is_refused_and_not_kept(
    wrong: Callable[[np.ndarray], np.ndarray], trt: FakeTrt
) -> None:
    profiler = TrtProfiler(batch=2)
    trt.wrong = wrong
    for _ in range(2):
        with pytest.raises(HwnasError, match="something else than PyTorch"):
            profiler.prepare(small())
    assert len(trt.built) == 2
    trt.wrong = lambda found: found
    profiler.prepare(small())


@pytest.mark.parametrize(
    ("precision", "kernel"), [("fp32", "fp32"), ("fp16", "fp16"), ("w8a8", "int8")]
)
def test_how_far_an_engine_may_be_away_hangs_on_its_kernels(
    precision: str, kernel: str, trt: FakeTrt
) -> None:
    """Output of a float op, since codes have steps of their own."""
    model = model_of(OPS["classifier"](Precision(precision), INPUT))
    trt.wrong = lambda y: y * np.float32(1 + 0.6 * TOLERATED[kernel])
    TrtProfiler().prepare(model)
    trt.wrong = lambda y: y * np.float32(1 + 1.4 * TOLERATED[kernel])
    with pytest.raises(HwnasError, match="computes something else"):
        TrtProfiler().prepare(model)


# ---- kernels


def layer(name: str, kind: str, held: str) -> dict[str, Any]:
    return {
        "Name": name,
        "LayerType": kind,
        "Inputs": [{"Name": "x", "Dimensions": [1, 8, 6, 6], held: "Int8" if held else ""}],
        "Outputs": [{"Name": "y", "Dimensions": [1, 8, 6, 6], "Format/Datatype": "Half"}],
        "Metadata": f"[ONNX Layer: {name}]\x1e[ONNX Layer: other]",
    }


@pytest.mark.parametrize("held", ["Datatype", "Format/Datatype"])
def test_kernels_are_what_the_inspector_tells(held: str, trt: FakeTrt) -> None:
    trt.layers = [layer("op000.0.conv.Conv", "CaskConvolution", held), "a name alone"]
    with opened(trt, small()) as session:
        (kernel,) = session.kernels()
    assert (kernel.name, kernel.kind) == ("op000.0.conv.Conv", "CaskConvolution")
    assert (kernel.inputs, kernel.outputs) == (("Int8",), ("Half",))
    assert kernel.nodes == ("op000.0.conv.Conv", "other")


def test_an_integer_op_in_float_kernels_fails_the_check(trt: FakeTrt) -> None:
    model = small("w8a8")
    names = [n.name for n in model.graph.node if n.op_type == "Conv"]
    trt.layers = [layer(name, "conv", "Datatype") for name in names]
    TrtProfiler().check(model)
    trt.layers[-1]["Inputs"][0]["Datatype"] = "Float"
    with pytest.raises(WrongKernels, match=f"{names[-1]} takes Float"):
        TrtProfiler().check(model)
    TrtProfiler().check(small("fp16"))  # whose kernels may take floats


# ---- on a real card


@pytest.fixture
def real() -> TrtProfiler:
    """TensorRT on this machine's card; the exact reason, where it does not run there."""
    return real_profiler(batch=2)


def real_profiler(batch: int = 1) -> TrtProfiler:
    try:
        profiler = TrtProfiler(batch=batch)
        with profiler.prepare(small()):
            return profiler
    except MissingDependency as error:
        pytest.skip(str(error))


def skip_without_kernels(make: Callable[[], Session]) -> Session:
    try:
        return make()
    except InvalidInput as error:
        if "has no kernels" in error.what or "builds no integer" in error.what:
            pytest.skip(str(error))
        raise


@pytest.mark.gpu
@pytest.mark.parametrize("block", OPS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_block_answers_as_pytorch_does(precision: str, block: str, real: TrtProfiler) -> None:
    model, x = model_of(OPS[block](Precision(precision), INPUT)), images(5)
    with skip_without_kernels(lambda: real.prepare(model)) as session:
        found = session.run(x).astype(np.float32)
        assert (session.block(QUICK) > 0).all()
        np.testing.assert_array_equal(session.run(x).astype(np.float32), found)
    reference = wanted(model, x)
    away = np.linalg.norm(found - reference) / np.linalg.norm(reference)
    assert away <= TOLERATED[TENSORRT.kernel(Precision(precision))]


@pytest.mark.gpu
def test_a_plan_loads_in_a_fresh_process_with_the_same_output(
    real: TrtProfiler, tmp_path: Path
) -> None:
    model, x = small(), images(2)
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(model.SerializeToString())
    np.save(tmp_path / "x.npy", x)
    with real.prepare(graph) as session:
        np.save(tmp_path / "y.npy", session.run(x))
    plan = real.compiled(graph)
    script = (
        "import sys, numpy as np; from pathlib import Path; from profilers.trt import TrtProfiler\n"
        "folder, plan = map(Path, sys.argv[1:])\n"
        "with TrtProfiler(batch=2).prepare(plan) as session:\n"
        "    found = session.run(np.load(folder / 'x.npy'))\n"
        "np.testing.assert_array_equal(found, np.load(folder / 'y.npy'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(plan)], check=True)


@pytest.mark.gpu
def test_a_graph_takes_as_long_as_many_launches(real: TrtProfiler) -> None:
    """Of an engine of some hundreds of microseconds, whose launches queue behind each other."""
    spec = Tensor(256, 64, 64)
    op = conv_norm_activation(spec, 256, kernel=3, precision=Precision("fp32"))
    profiler = real_profiler(batch=16)
    with profiler.prepare(model_of(op)) as session:
        graph_us = float(np.median(session.block(GPU_PROTOCOL)[:, 0]))

        def many() -> None:
            for _ in range(20):
                session._launch()

        plain_us = float(np.median([open_cuda().elapsed_us(many) / 20 for _ in range(20)]))
    assert graph_us == pytest.approx(plain_us, rel=0.1)


@pytest.mark.gpu
def test_kernels_of_a_real_engine_have_times_that_add_up(real: TrtProfiler) -> None:
    """Waited for one by one, they take longer than the engine, but not out of all proportion."""
    op = OPS["residual"](Precision("fp32"), Tensor(64, 56, 56))
    with real.prepare(model_of(op)) as session:
        whole_us = float(np.median(session.block(GPU_PROTOCOL)[:, 0]))
        times = session.kernel_us()
        assert times.keys() <= {kernel.name for kernel in session.kernels()}
    assert 0.8 * whole_us < sum(times.values()) < 20 * whole_us


@pytest.mark.gpu
def test_a_full_card_is_one_sentence(real: TrtProfiler) -> None:
    cuda, held = open_cuda(), []
    size = profilers.cuda.card().memory_bytes

    def fill() -> None:
        nonlocal size
        while size > 1 << 22:
            try:
                held.append(cuda.buffer((size,), np.dtype(np.int8)))
            except InvalidInput:
                size //= 2

    wide = conv_norm_activation(Tensor(64, 224, 224), 64, kernel=3, precision=Precision("fp32"))
    profiler = real_profiler(batch=16)
    with profiler.prepare(model_of(wide)):
        pass
    fill()
    try:
        with pytest.raises(InvalidInput, match="has not enough free memory"):
            profiler.prepare(model_of(wide))
    finally:
        held.clear()
