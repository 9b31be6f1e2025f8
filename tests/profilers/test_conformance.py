"""The contract of a profiler. A new backend joins `BACKENDS` and passes as it is; those of cards
join `CARDS`, and run where there is one (`-m gpu`).
"""

import functools
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnx
import pytest
import torch

from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.host import Host
from latency_tables.ops import OpBuilder, OpSpec, Tensor
from profilers.base import Profiler, Session, WrongKernels
from profilers.cuda import Card
from profilers.graphs import emit, random_parameters
from profilers.measure import Protocol, summarise
from profilers.modules import Network
from profilers.ort import OrtProfiler
from profilers.simulated import SimulatedProfiler
from profilers.torch_cuda import TorchProfiler
from profilers.trt import TrtProfiler
from quant.errors import InvalidInput, MissingDependency
from quant.precision import ONNXRUNTIME, Format, Precision, Runtime


class TorchOnCpu(TorchProfiler):
    """PyTorch's backend on the CPU, timed by its clock, under the name of a stated card."""

    place = torch.device("cpu")

    def host(self) -> Host:
        with patch("profilers.torch_cuda.card", lambda: Card("Stated 9000", (8, 9), "580", 0)):
            return super().host()


BACKENDS: list[type[Profiler]] = [OrtProfiler, SimulatedProfiler, TorchOnCpu]
CARDS: list[type[Profiler]] = [TrtProfiler, TorchProfiler]
QUICK = Protocol(rounds=3, warmup_ms=1.0, block_ms=2.0, min_runs=5, max_runs=50)
FP32, FP16, W8A8 = Precision("fp32"), Precision("fp16"), Precision("w8a8")
INPUT = Tensor(8, 8, 8)


@pytest.fixture(
    params=[*BACKENDS, *(pytest.param(each, marks=pytest.mark.gpu) for each in CARDS)],
    ids=lambda backend: backend.__name__,
)
def backend(request: pytest.FixtureRequest) -> type[Profiler]:
    if request.param in CARDS and (reason := refusal(request.param, FP32)):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def profiler(backend: type[Profiler]) -> Profiler:
    return backend()


@pytest.fixture
def reduced(backend: type[Profiler]) -> Precision:
    """The precision of fewest bits that the backend has kernels for."""
    return FP16 if refusal(backend, W8A8) else W8A8


@pytest.fixture
def session(profiler: Profiler, reduced: Precision) -> Iterator[Session]:
    with profiler.prepare(model([chain(reduced)[0]], profiler.runtime)) as opened:
        yield opened


@functools.cache
def refusal(backend: type[Profiler], precision: Precision) -> str:
    """Why a runtime has no kernels for a precision, or a card does not run it; "" where it does."""
    try:
        backend.runtime.kernel(precision)
        if backend in CARDS:
            backend().prepare(model(chain(precision), backend.runtime)).close()
    except MissingDependency as error:
        return str(error)
    except InvalidInput as error:
        return error.what
    return ""


def chain(precision: Precision, spec: Tensor = INPUT) -> list[OpSpec]:
    body = inverted_residual(spec, spec.channels, kernel=3, expansion=3, precision=precision)
    return [body, classifier(body.output, 16, 4, precision=FP32)]


def model(ops: list[OpSpec], runtime: Runtime = ONNXRUNTIME, seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    return emit(ops, [random_parameters(op, rng) for op in ops], runtime)


def images(batch: int = 1, seed: int = 0, spec: Tensor = INPUT) -> np.ndarray:
    shape = (batch, spec.channels, spec.height, spec.width)
    return np.random.default_rng(seed).random(shape, dtype=np.float32)


def test_the_condition_is_one_thread_and_one_image_unless_said(backend: type[Profiler]) -> None:
    assert (backend().threads, backend().batch) == (1, 1)
    told = backend(threads=2, batch=4)
    assert (told.threads, told.batch) == (2, 4)
    assert (told.host().threads, told.host().batch) == (2, 4)


def test_the_host_says_where_and_how(profiler: Profiler) -> None:
    host = profiler.host()
    assert isinstance(host, Host)
    assert all([host.device, host.runtime, host.runtime_version, host.cpu, host.hostname])
    assert profiler.seconds_per_row > 0
    assert "fp32" in profiler.runtime.kernels


def test_the_host_is_the_same_when_asked_again(backend: type[Profiler]) -> None:
    assert backend().host() == backend().host()
    assert backend().host().difference(backend().host()) == ""


def test_another_condition_is_another_host(backend: type[Profiler]) -> None:
    mine = backend().host()
    assert mine.difference(backend(threads=2).host()).startswith("threads")
    assert mine.difference(backend(batch=2).host()).startswith("batch")


def test_no_two_backends_are_one_host() -> None:
    hosts = [each().host() for each in BACKENDS]
    for number, mine in enumerate(hosts):
        for other in hosts[number + 1 :]:
            assert mine.difference(other)
            assert mine.file_name != other.file_name


def test_a_block_holds_positive_finite_microseconds_of_enough_runs(session: Session) -> None:
    samples = session.block(QUICK)
    assert samples.ndim == 2
    assert samples.shape[1] == 2, "each call's time, and the pace beside it"
    assert QUICK.min_runs <= len(samples) <= QUICK.max_runs
    assert np.isfinite(samples).all()
    assert (samples > 0).all()
    assert samples.max() < 1e6, "microseconds, not nanoseconds"


def test_a_session_gives_block_after_block(session: Session) -> None:
    measured = summarise([session.block(QUICK) for _ in range(3)], QUICK)
    assert measured.runs >= 3 * QUICK.min_runs
    assert 0 < measured.min_us <= measured.median_us <= measured.p95_us * 1.5


def test_the_same_input_gives_the_same_output(profiler: Profiler, reduced: Precision) -> None:
    graph, x = model(chain(reduced), profiler.runtime), images()
    with profiler.prepare(graph) as session:
        first, again = session.run(x), session.run(x)
        other = session.run(images(seed=1))
    with profiler.prepare(graph) as reopened:
        after = reopened.run(x)
    np.testing.assert_array_equal(first, again)
    np.testing.assert_array_equal(first, after)
    assert not np.array_equal(first, other)


def test_timing_does_not_change_the_output(session: Session) -> None:
    before = session.run(images())
    session.block(QUICK)
    np.testing.assert_array_equal(session.run(images()), before)


def test_the_output_is_that_of_the_pytorch_network(profiler: Profiler) -> None:
    network = Network(chain(FP32), profiler.runtime).eval()
    x = images(batch=2)
    graph = emit(network.ops, network.parameters_for_graph(), profiler.runtime)
    with profiler.prepare(graph) as session:
        found = session.run(x)
    with torch.no_grad():
        wanted = network(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_runs_whatever_the_condition(
    backend: type[Profiler], reduced: Precision, batch: int
) -> None:
    with backend(batch=2).prepare(model(chain(reduced), backend.runtime)) as session:
        assert session.run(images(batch)).shape == (batch, 4)
        assert len(session.block(QUICK)) >= QUICK.min_runs


def test_what_the_device_runs_answers_as_its_graph_does(
    profiler: Profiler, reduced: Precision, tmp_path: Path
) -> None:
    path, x = tmp_path / "graph.onnx", images(3)
    path.write_bytes(model(chain(reduced), profiler.runtime).SerializeToString())
    compiled = profiler.compiled(path)
    assert compiled.suffix == profiler.suffix
    assert profiler.compiled(compiled) == compiled
    answers = []
    for each in (onnx.load(path), path, compiled):
        with profiler.prepare(each) as session:
            answers.append(session.run(x))
            assert (session.block(QUICK) > 0).all()
    np.testing.assert_array_equal(answers[0], answers[1])
    np.testing.assert_array_equal(answers[0], answers[2])


@pytest.mark.parametrize("kind", ["a8", "a8+"])
def test_an_op_whose_input_is_codes_can_be_timed(
    backend: type[Profiler], profiler: Profiler, kind: str
) -> None:
    if reason := refusal(backend, W8A8):
        pytest.skip(reason)
    op = conv_norm_activation(Tensor(8, 8, 8, Format.parse(kind)), 8, kernel=3, precision=FP32)
    graph = model([op], profiler.runtime)
    profiler.check(graph)
    with profiler.prepare(graph) as session:
        assert (session.block(QUICK) > 0).all()
        assert session.run(np.zeros((1, 8, 8, 8), np.uint8)).shape == (1, 8, 8, 8)


def test_an_op_of_two_inputs_can_be_timed(profiler: Profiler) -> None:
    builder = OpBuilder(FP32, INPUT, INPUT)
    builder.add(0, 1)
    with profiler.prepare(model([builder.build()], profiler.runtime)) as session:
        assert (session.block(QUICK) > 0).all()
        np.testing.assert_array_equal(session.run(images(), images()), 2 * images())


def test_a_much_larger_network_takes_longer(backend: type[Profiler], profiler: Profiler) -> None:
    """So large that a card is busy with it, too."""
    latencies = []
    larger = Tensor(256, 128, 128) if backend in CARDS else Tensor(64, 32, 32)
    for spec in (Tensor(8, 4, 4), larger):
        with profiler.prepare(model(chain(FP32, spec), profiler.runtime)) as session:
            latencies.append(float(np.median(session.block(QUICK)[:, 0])))
    assert latencies[1] > 3 * latencies[0]


def test_a_larger_batch_takes_longer(backend: type[Profiler]) -> None:
    latencies = []
    spec, most = (Tensor(64, 64, 64), 64) if backend in CARDS else (Tensor(32, 16, 16), 16)
    graph = model(chain(FP32, spec), backend.runtime)
    for batch in (1, most):
        with backend(batch=batch).prepare(graph) as session:
            latencies.append(float(np.median(session.block(QUICK)[:, 0])))
    assert latencies[1] > 3 * latencies[0]


def test_a_closed_session_refuses_to_work(profiler: Profiler) -> None:
    session = profiler.prepare(model(chain(FP32), profiler.runtime))
    session.run(images())
    session.close()
    with pytest.raises(RuntimeError, match="closed"):
        session.run(images())
    with pytest.raises(RuntimeError, match="closed"):
        session.block(QUICK)
    with pytest.raises(RuntimeError, match="closed"), session:
        pass
    session.close()  # once more does no harm


def test_a_with_block_gives_the_session_and_closes_it(profiler: Profiler) -> None:
    session = profiler.prepare(model(chain(FP32), profiler.runtime))
    with session as entered:
        assert entered is session
    with pytest.raises(RuntimeError, match="closed"):
        session.run(images())


def test_a_with_block_closes_on_an_error_and_lets_it_through(profiler: Profiler) -> None:
    session = profiler.prepare(model(chain(FP32), profiler.runtime))
    with pytest.raises(ZeroDivisionError), session:
        raise ZeroDivisionError
    with pytest.raises(RuntimeError, match="closed"):
        session.run(images())


@pytest.mark.parametrize("precision", [FP32, W8A8], ids=str)
def test_good_models_pass_the_check(
    backend: type[Profiler], profiler: Profiler, precision: Precision
) -> None:
    if reason := refusal(backend, precision):
        pytest.skip(reason)
    profiler.check(model(chain(precision), profiler.runtime))


def test_a_foreign_model_fails_the_check(profiler: Profiler) -> None:
    foreign = model(chain(FP32), profiler.runtime)
    del foreign.metadata_props[:]
    with pytest.raises(InvalidInput, match="metadata"):
        profiler.check(foreign)


def test_wrong_kernels_are_an_error_of_the_program_not_of_the_user() -> None:
    assert issubclass(WrongKernels, RuntimeError)
    assert not issubclass(WrongKernels, InvalidInput)


def test_the_protocol_decides_how_many_runs_a_block_has(profiler: Profiler) -> None:
    for runs in (3, 17):
        exactly = Protocol(warmup_ms=0.1, block_ms=0.1, min_runs=runs, max_runs=runs)
        with profiler.prepare(model([chain(FP32)[0]], profiler.runtime)) as session:
            assert len(session.block(exactly)) == runs
