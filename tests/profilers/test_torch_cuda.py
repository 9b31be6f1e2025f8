"""PyTorch's sessions and programs: real PyTorch, on the CPU, timed by the CPU's clock; on a real
card where there is one (`-m gpu`).
"""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import profilers.cuda
from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.ops import OpSpec, Tensor
from profilers.cuda import Card, TorchCuda, open_cuda
from profilers.graph_module import GraphModule
from profilers.graphs import emit, random_parameters
from profilers.measure import GPU_PROTOCOL, Protocol
from profilers.modules import Network
from profilers.torch_cuda import (
    PROGRAM,
    TorchProfiler,
    TorchSession,
    cudnn_version,
    inputs_of,
    load_program,
    save_program,
)
from quant.errors import InvalidInput, MissingDependency
from quant.precision import TORCH, Format, Precision

PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
CPU = torch.device("cpu")
INPUT = Tensor(8, 6, 6)
QUICK = Protocol(rounds=2, warmup_ms=1, block_ms=2, min_runs=5, max_runs=20)

OPS: dict[str, Callable[[Precision, Tensor], OpSpec]] = {
    "conv": lambda p, t: conv_norm_activation(t, 12, kernel=3, stride=2, precision=p),
    "residual": lambda p, t: inverted_residual(
        t, t.channels, kernel=3, expansion=3, squeeze=4, precision=p, activation="hard_swish"
    ),
    "classifier": lambda p, t: classifier(t, 16, 4, precision=p),
}

every_precision = pytest.mark.parametrize("precision", PRECISIONS)
every_block = pytest.mark.parametrize("block", OPS)


def ops_of(precision: str, block: str = "conv", spec: Tensor = INPUT) -> list[OpSpec]:
    """An op between two others: types change on both its sides."""
    first = conv_norm_activation(spec, spec.channels, kernel=3, precision=Precision("fp32"))
    if precision == "tf32":
        first = conv_norm_activation(spec, spec.channels, kernel=3, precision=Precision("tf32"))
    return [first, OPS[block](Precision(precision), first.output)]


def model_of(ops: list[OpSpec], seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    return emit(ops, [random_parameters(op, rng) for op in ops], TORCH)


def images(batch: int, seed: int = 1, spec: Tensor = INPUT) -> np.ndarray:
    shape = (batch, spec.channels, spec.height, spec.width)
    return np.random.default_rng(seed).random(shape, np.float32)


@pytest.fixture
def profiler(monkeypatch: pytest.MonkeyPatch, stated_card: Card) -> TorchProfiler:
    monkeypatch.setattr(TorchProfiler, "place", CPU)
    return TorchProfiler(batch=2)


# ---- programs


@every_block
@every_precision
def test_a_program_computes_what_its_graph_does_for_any_batch(
    precision: str, block: str, profiler: TorchProfiler, tmp_path: Path
) -> None:
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(model_of(ops_of(precision, block)).SerializeToString())
    program = profiler.compiled(graph)
    assert program.suffix == profiler.suffix == PROGRAM
    with profiler.prepare(program) as exported, profiler.prepare(onnx.load(graph)) as plain:
        for batch in (1, 2, 5):
            np.testing.assert_array_equal(exported.run(images(batch)), plain.run(images(batch)))


def test_a_program_is_made_once_and_goes_with_its_profiler(
    stated_card: Card, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchProfiler, "place", CPU)
    graph, profiler = tmp_path / "graph.onnx", TorchProfiler()
    graph.write_bytes(model_of(ops_of("fp32")).SerializeToString())
    program = profiler.compiled(graph)
    monkeypatch.setattr("profilers.torch_cuda.save_program", None)
    assert profiler.compiled(graph) == program
    assert profiler.compiled(program) == program
    assert program.exists()
    del profiler
    assert not program.exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_a_loaded_program_asserts_the_device_that_it_runs_on(
    precision: str, tmp_path: Path
) -> None:
    """Where types change a program asserts its device: it would stop on any but the exporter's."""
    path = tmp_path / "net.pt2"
    save_program(model_of(ops_of(precision)), path, batch=1)

    def places(module: Any) -> set[str]:
        return {
            str(node.kwargs["device"])
            for part in module.modules()
            if isinstance(part, torch.fx.GraphModule)
            for node in part.graph.nodes
            if node.kwargs.get("device") is not None
        }

    changes = set() if precision == "fp32" else {"cpu"}
    assert places(torch.export.load(path).module()) == changes
    module, ops = load_program(path, torch.device("meta"))
    assert ops == ops_of(precision)
    assert places(module) == (changes and {"meta"})
    assert {str(held.device) for held in module.buffers()} == {"meta"}
    found = module(torch.empty(3, 8, 6, 6, device="meta"))
    assert (tuple(found.shape), str(found.device)) == ((3, 12, 3, 3), "meta")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 half", b"no archive"])
def test_a_damaged_program_is_invalid(
    content: bytes, profiler: TorchProfiler, tmp_path: Path
) -> None:
    path = tmp_path / "half.pt2"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=r"half\.pt2 is not a whole program") as caught:
        profiler.prepare(path)
    assert "\n" not in str(caught.value)


def test_another_programs_archive_is_invalid(profiler: TorchProfiler, tmp_path: Path) -> None:
    path = tmp_path / "foreign.pt2"
    torch.export.save(torch.export.export(nn.ReLU(), (torch.ones(2),)), path)
    with pytest.raises(InvalidInput, match="not a whole program that hwnas exported"):
        profiler.prepare(path)


def test_a_programs_weights_keep_their_layout(tmp_path: Path) -> None:
    """Channels-last, as they are timed: which kernels a card takes hangs on it."""
    path, model = tmp_path / "net.pt2", model_of(ops_of("fp16"))
    save_program(model, path, batch=1)
    wanted = {name: held.stride() for name, held in GraphModule(model).named_buffers()}
    for place in ("cpu", "meta"):
        module, _ = load_program(path, torch.device(place))
        assert {name: held.stride() for name, held in module.named_buffers()} == wanted
    assert any(stride[1] == 1 for stride in wanted.values() if len(stride) == 4)


# ---- sessions


@every_precision
def test_inputs_have_the_types_and_the_layout_of_the_graph(precision: str) -> None:
    """The graph itself says its types."""
    kind = precision if precision in TYPES else "fp32"
    op = OPS["conv"](Precision(precision), Tensor(8, 6, 6, Format(kind)))
    (given,) = inputs_of([op], 3)
    assert [given.dtype] == GraphModule(model_of([op])).input_types
    session = TorchSession(GraphModule(model_of([op])), [given], CPU, tf32=False)
    (placed,) = session._inputs
    assert placed.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(placed, given)


def test_the_output_is_that_of_the_stand_alone_network(profiler: TorchProfiler) -> None:
    network = Network([ops_of("fp32", "classifier")[1]], TORCH).eval()
    with profiler.prepare(emit(network.ops, network.parameters_for_graph(), TORCH)) as session:
        found = session.run(images(5))
    with torch.no_grad():
        wanted = network(torch.from_numpy(images(5))).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tf32", [False, True])
def test_arithmetic_is_as_declared_while_it_runs_and_as_before_afterwards(tf32: bool) -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    seen = []

    class Seeing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            allowed = (cudnn.allow_tf32, matmul.allow_tf32)
            seen.append((*allowed, cudnn.benchmark, torch.is_grad_enabled()))
            return x

    before = (cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, torch.is_grad_enabled())
    with TorchSession(Seeing(), [torch.zeros(1, 1, 2, 2)], CPU, tf32=tf32) as session:
        session.run(images(1))
        assert seen.pop() == (tf32, tf32, False, False)
        session.block(QUICK)
        assert set(seen) == {(tf32, tf32, True, False)}
    assert before == (
        cudnn.allow_tf32, matmul.allow_tf32, cudnn.benchmark, torch.is_grad_enabled()
    )  # fmt: skip


def test_a_session_lets_go_of_its_module_when_it_is_closed(profiler: TorchProfiler) -> None:
    session = profiler.prepare(model_of(ops_of("fp32")))
    assert any(True for _ in session._module.buffers())
    session.close()
    assert not any(True for _ in session._module.buffers())
    assert session._inputs == []


# ---- the profiler


def test_the_host_tells_pytorch_the_card_and_cudnn(profiler: TorchProfiler) -> None:
    host = profiler.host()
    assert (host.device, host.runtime) == ("gpu-torch", "pytorch")
    assert host.runtime_version == torch.__version__
    assert host.flags == f"sm89 driver 580.65 cudnn {cudnn_version()}"
    assert (host.cpu, host.batch) == ("Stated 9000", 2)


def test_integers_have_no_kernel(profiler: TorchProfiler) -> None:
    with pytest.raises(InvalidInput, match="pytorch has no kernel for w8a8"):
        profiler.check(model_of(ops_of("w8a8")))


def test_a_pytorch_that_does_not_reach_the_card_is_a_missing_dependency(stated_cuda: Any) -> None:
    with pytest.raises(MissingDependency, match=r"PyTorch .* cannot use the Stated 9000") as caught:
        TorchProfiler()
    assert caught.value.next_step == "make setup DEVICE=gpu"


# ---- on a real card


@pytest.fixture
def real() -> TorchProfiler:
    return real_profiler(batch=2)


def real_profiler(batch: int) -> TorchProfiler:
    try:
        return TorchProfiler(batch=batch)
    except MissingDependency as error:
        pytest.skip(str(error))


AWAY = {"fp32": 1e-4, "tf32": 5e-3, "fp16": 1e-2, "bf16": 5e-2}
"""Between a card's and a CPU's output, of its size: sums of products are rounded in another order,
and of tf32 to ten bits."""


@pytest.mark.gpu
@every_block
@every_precision
def test_every_block_answers_on_a_card_as_on_a_cpu(
    precision: str, block: str, real: TorchProfiler, tmp_path: Path
) -> None:
    """And its program to the last bit as its graph does."""
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(model_of(ops_of(precision, block)).SerializeToString())
    with real.prepare(onnx.load(graph)) as session:
        found = session.run(images(5))
        assert (session.block(QUICK) > 0).all()
        np.testing.assert_array_equal(session.run(images(5)), found)
    with real.prepare(graph) as program:
        np.testing.assert_array_equal(program.run(images(5)), found)
        assert (program.block(QUICK) > 0).all()
    module = GraphModule(onnx.load(graph))
    with torch.no_grad():
        wanted = module(torch.from_numpy(images(5))).float().numpy()
    assert np.linalg.norm(found - wanted) <= AWAY[precision] * np.linalg.norm(wanted)


@pytest.mark.gpu
def test_a_program_loads_in_a_fresh_process_with_the_same_output(
    real: TorchProfiler, tmp_path: Path
) -> None:
    graph = tmp_path / "graph.onnx"
    graph.write_bytes(model_of(ops_of("fp16")).SerializeToString())
    program = real.compiled(graph)
    np.save(tmp_path / "x.npy", images(2))
    with real.prepare(program) as session:
        np.save(tmp_path / "y.npy", session.run(images(2)))
    script = (
        "import sys, numpy as np; from pathlib import Path\n"
        "from profilers.torch_cuda import TorchProfiler\n"
        "folder, program = map(Path, sys.argv[1:])\n"
        "with TorchProfiler(batch=2).prepare(program) as session:\n"
        "    found = session.run(np.load(folder / 'x.npy'))\n"
        "np.testing.assert_array_equal(found, np.load(folder / 'y.npy'))\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(program)], check=True)


@pytest.mark.gpu
def test_a_graph_takes_as_long_as_many_calls() -> None:
    """Of some hundreds of microseconds each, which queue behind each other."""
    spec = Tensor(256, 64, 64)
    op = conv_norm_activation(spec, 256, kernel=3, precision=Precision("fp32"))
    with real_profiler(batch=16).prepare(model_of([op])) as session:
        graph_us = float(np.median(session.block(GPU_PROTOCOL)[:, 0]))

        def many() -> None:
            for _ in range(20):
                session._launch()

        with session._working(choosing=True):
            cuda = open_cuda()
            plain_us = float(np.median([cuda.elapsed_us(many) / 20 for _ in range(20)]))
    assert graph_us == pytest.approx(plain_us, rel=0.1)


@pytest.mark.gpu
def test_reduced_precision_is_quicker_where_a_card_has_the_kernels() -> None:
    """Dense products of a size that a card is busy with."""
    profiler = real_profiler(batch=16)
    if profilers.cuda.card().capability < (8, 0):
        pytest.skip(f"{profilers.cuda.card().sm} has no tf32")
    spec, us = Tensor(256, 64, 64), {}
    for precision in ("fp32", "tf32", "fp16"):
        op = conv_norm_activation(spec, 256, kernel=3, precision=Precision(precision))
        with profiler.prepare(model_of([op])) as session:
            us[precision] = float(np.median(session.block(GPU_PROTOCOL)[:, 0]))
    assert us["fp16"] < us["tf32"] < us["fp32"]


@pytest.mark.gpu
def test_a_batch_that_no_card_holds_is_one_sentence() -> None:
    """Small going in, wide coming out."""
    profiler = real_profiler(batch=2048)
    wide = conv_norm_activation(Tensor(1, 112, 112), 8192, kernel=1, precision=Precision("fp32"))
    with profiler.prepare(model_of([wide])) as session:
        with pytest.raises(InvalidInput, match="has not enough free memory"):
            session.block(QUICK)
        small = session.run(images(1, spec=Tensor(1, 112, 112)))
        assert small.shape == (1, 8192, 112, 112)


@pytest.mark.gpu
def test_closed_sessions_give_the_cards_memory_back() -> None:
    profiler = real_profiler(batch=8)
    model = model_of(
        [conv_norm_activation(Tensor(64, 64, 64), 64, kernel=3, precision=Precision("fp32"))]
    )

    def held_bytes() -> int:
        with profiler.prepare(model) as session:
            session.block(QUICK)
        assert isinstance(open_cuda(), TorchCuda)
        return int(torch.cuda.memory_allocated())

    first = held_bytes()
    assert [held_bytes() for _ in range(3)] == [first] * 3
