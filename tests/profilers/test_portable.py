"""Files that are exact on CPUs without VNNI.

Oracles: the arithmetic of AVX2's vpmaddubsw written out in NumPy; where qemu is installed, a CPU
without VNNI that it emulates.
"""

import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from hwnas.spaces.blocks import classifier, conv_norm_activation, inverted_residual
from latency_tables.ops import Layer, OpBuilder, OpSpec, Tensor
from profilers import ort
from profilers.devices import open_profiler
from profilers.graphs import emit, random_parameters
from profilers.host import saturates
from profilers.modules import Network
from profilers.ort import OrtProfiler
from quant.integer import IntegerWeights
from quant.precision import ONNXRUNTIME, TENSORRT, Precision, Runtime

PORTABLE = ONNXRUNTIME.portable
W8A8 = Precision("w8a8")
INPUT = Tensor(8, 10, 10)


def ops(precision: Precision = W8A8) -> list[OpSpec]:
    stem = conv_norm_activation(INPUT, 16, kernel=3, precision=precision)
    body = inverted_residual(stem.output, 16, kernel=5, expansion=3, precision=precision, squeeze=4)
    return [stem, body, classifier(body.output, 32, 10, precision=precision)]


def loudest(runtime: Runtime, precision: Precision = W8A8) -> Network:
    """A network whose weights all stand at an end of their codes and whose inputs are all large:
    the sums are as far out as they can be."""
    torch.manual_seed(0)
    network = Network(ops(precision), runtime).eval()
    for module in network.op_modules:
        for layer in module.weighted_layers.values():
            torch.nn.init.ones_(layer.weight)
        for quantiser in module.activation_quantisers.values():
            quantiser.limit = 1.0
        for index, layer in module.weighted_layers.items():
            if module.op.layers[index].norm:  # a small norm, so that sums are not cut off
                one, fan_in = torch.ones(len(layer.weight)), layer.weight[0].numel()
                module.set_norm(index, one * 0.9, one * 0.01, one * 0, (one * fan_in) ** 2)
            elif layer.bias is not None:
                torch.nn.init.zeros_(layer.bias)
    return network


def layers_and_codes(network: Network) -> Iterator[tuple[OpSpec, int, Layer, np.ndarray]]:
    for module, numbers in zip(network.op_modules, network.parameters_for_graph(), strict=True):
        for index, weights in numbers.weights.items():
            assert isinstance(weights, IntegerWeights)
            yield module.op, index, module.op.layers[index], weights.codes


def avx2_sums(activations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    """What vpmaddubsw, vpmaddwd and vpaddd make of unsigned (n,) times signed (channels, n): the
    products of neighbours are added in 16 bits, which saturate; those sums in 32."""
    products = activations.astype(np.int64) * codes.astype(np.int64)
    if products.shape[1] % 2:
        products = np.pad(products, ((0, 0), (0, 1)))
    pairs = products.reshape(len(products), -1, 2).sum(2)
    info = np.iinfo(np.int16)
    return pairs.clip(info.min, info.max).sum(1)


def exact_sums(activations: np.ndarray, codes: np.ndarray) -> np.ndarray:
    return (activations.astype(np.int64) * codes.astype(np.int64)).sum(1)


# ---- codes


def test_sixteen_bits_hold_two_products_of_codes_up_to_64() -> None:
    """The emulation itself, at the ends: 2 x 255 x 64 is 32,640, and 16 bits end at 32,767."""
    worst = np.full(32, 255, np.uint8)
    for code in range(1, 128):
        codes = np.array([[code] * 32, [-code] * 32], np.int8)
        assert (avx2_sums(worst, codes) == exact_sums(worst, codes)).all() == (code <= 64)


@pytest.mark.parametrize("runtime", [ONNXRUNTIME, PORTABLE], ids=["plain", "portable"])
def test_the_worst_sums_of_dense_layers_are_exact_in_portable_files_alone(runtime: Runtime) -> None:
    seen = 0
    for op, index, _, codes in layers_and_codes(loudest(runtime)):
        if op.is_channelwise(index):
            continue
        flat = codes.reshape(len(codes), -1)
        worst = np.full(flat.shape[1], 255, np.uint8)
        exact = (avx2_sums(worst, flat) == exact_sums(worst, flat)).all()
        assert exact == (runtime == PORTABLE)
        seen += 1
    assert seen == 7


@pytest.mark.parametrize("name", ["w8a8", "w7a8", "w4a8"])
def test_dense_codes_end_at_63_and_depthwise_ones_where_their_bits_do(name: str) -> None:
    precision = Precision(name)
    torch.manual_seed(0)
    found = {True: set(), False: set()}
    for op, index, _, codes in layers_and_codes(Network(ops(precision), PORTABLE)):
        found[op.is_channelwise(index)].add(int(np.abs(codes).max()))
    top = 2 ** (precision.weight_bits - 1) - 1
    assert found == {True: {top}, False: {min(top, 63)}}


def test_a_layer_is_channelwise_only_where_every_channel_is_convolved_alone() -> None:
    """Groups of two channels, and one channel in all, are sums of neighbours too."""
    for channels_in, channels, groups, alone in (
        (8, 8, 8, True), (8, 8, 4, False), (8, 8, 1, False), (1, 1, 1, False), (8, 16, 8, False),
        (16, 8, 8, False),
    ):  # fmt: skip
        builder = OpBuilder(W8A8, Tensor(channels_in, 4, 4))
        builder.conv(0, channels, kernel=3, groups=groups, role="conv")
        op = builder.build()
        assert op.is_channelwise(0) == alone
        kept = PORTABLE.layer_precision(W8A8, channelwise=op.is_channelwise(0))
        assert kept == (W8A8 if alone else Precision("w7a8"))


def test_dorefas_odd_codes_take_a_bit_more() -> None:
    """2^bits levels in steps of two: codes up to 2^bits - 1."""
    for bits in range(1, 9):
        precision = Precision(f"pact-w{bits}a4")
        held = PORTABLE.layer_precision(precision, channelwise=False)
        assert held.is_pact
        assert held.activation_bits == 4
        assert held.weight_bits == min(bits, 6)
        assert 2**held.weight_bits - 1 <= 64
        assert ONNXRUNTIME.layer_precision(precision, channelwise=False) == precision


@pytest.mark.parametrize("name", ["fp32", "fp16", "w2a8", "w7a4"])
def test_what_is_exact_anyway_stays_as_it_is(name: str) -> None:
    precision = Precision(name)
    for runtime in (ONNXRUNTIME, PORTABLE, TENSORRT):
        assert runtime.layer_precision(precision, channelwise=False) is precision


def test_a_table_is_the_same_for_portable_files() -> None:
    """The kernels are, and so are the graphs that are timed and where their rows are kept."""
    plain, portable = OrtProfiler(), OrtProfiler(portable=True)
    assert plain.host() == portable.host()
    models = [
        emit(ops(), [random_parameters(op, np.random.default_rng(0)) for op in ops()], p.runtime)
        for p in (plain, portable)
    ]
    assert models[0] == models[1]
    portable.check(emit(ops(), loudest(PORTABLE).parameters_for_graph(), PORTABLE))


# ---- which CPUs need it


@pytest.mark.parametrize(
    ("flags", "machine", "needed"),
    [
        ("avx avx2 fma sse4_1 sse4_2", "x86_64", True),
        ("avx512bw avx512f avx512vl", "AMD64", True),
        ("avx2 avx512_vnni avx512f", "x86_64", False),
        ("avx avx2 avx_vnni", "x86_64", False),
        ("avx2 avx_vnni_int8", "x86_64", True),
        ("", "x86_64", True),
        ("asimd asimddp i8mm", "aarch64", False),
        ("", "arm64", False),
    ],
)
def test_x86_without_vnni_needs_it(
    flags: str, machine: str, needed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saturates(flags, machine) == needed
    monkeypatch.setattr(ort, "cpu_flags", lambda: flags)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    for asked in (False, True):
        profiler = open_profiler("cpu", portable=asked)
        assert profiler.runtime == (PORTABLE if needed or asked else ONNXRUNTIME)
        assert profiler.runtime.is_portable == (needed or asked)
    assert not open_profiler("simulated").runtime.is_portable
    assert open_profiler("simulated", portable=True).runtime == PORTABLE


# ---- a CPU without VNNI

ANSWER = """
import sys, numpy as np, onnxruntime as ort
session = ort.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
np.save(sys.argv[3], session.run(None, {"input": np.load(sys.argv[2])})[0])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("qemu-x86_64") is None, reason="needs qemu-x86_64 (qemu-user)")
@pytest.mark.skipif(platform.machine() != "x86_64", reason="emulates one x86 CPU on another")
def test_a_portable_file_is_the_same_to_the_last_bit_on_an_emulated_haswell(tmp_path: Path) -> None:
    """And one with codes up to 127, on the same worst case, is not."""
    if saturates(OrtProfiler().host().flags, platform.machine()):
        pytest.skip("this CPU has no VNNI to compare with")
    feed = np.random.default_rng(0).uniform(0.7, 1, (4, 8, 10, 10)).astype(np.float32)
    np.save(tmp_path / "feed.npy", feed)
    same = {}
    for name, runtime in (("plain", ONNXRUNTIME), ("portable", PORTABLE)):
        path = tmp_path / f"{name}.onnx"
        model = emit(ops(), loudest(runtime).parameters_for_graph(), runtime)
        path.write_bytes(model.SerializeToString())
        answers = []
        for emulator in ([], ["qemu-x86_64", "-cpu", "Haswell"]):
            out = tmp_path / f"{name}-{len(emulator)}.npy"
            subprocess.run(
                [*emulator, sys.executable, "-c", ANSWER, path, tmp_path / "feed.npy", out],
                check=True, capture_output=True, timeout=600,
            )  # fmt: skip
            answers.append(np.load(out))
        assert np.abs(answers[0]).min() > 0
        same[name] = np.array_equal(*answers)
    assert same == {"plain": False, "portable": True}
