"""The simulated device costs what it states, written out here once more from the docstring."""

import itertools

import numpy as np
import pytest

from hwnas.costs.samplers import UniformSampler
from hwnas.spaces.blocks import conv_norm_activation
from hwnas.spaces.mobile import mobile_tiny
from latency_tables.ops import Layer, OpSpec, Tensor
from profilers.graphs import emit, random_parameters
from profilers.measure import Protocol
from profilers.simulated import CALL_US, SimulatedProfiler, op_us
from quant.precision import Format, Precision

FP32, W8A8 = Precision("fp32"), Precision("w8a8")


def conv(kind: str, precision: Precision) -> OpSpec:
    """A 1 x 1 convolution of 10 channels to 20 on 5 x 5, its relu, and nothing else."""
    spec = Tensor(10, 5, 5, Format.parse(kind))
    return conv_norm_activation(spec, 20, kernel=1, precision=precision)


def latency_us(ops: list[OpSpec], batch: int = 1) -> float:
    rng = np.random.default_rng(0)
    model = emit(ops, [random_parameters(op, rng) for op in ops])
    with SimulatedProfiler(batch=batch).prepare(model) as session:
        samples = session.block(Protocol(min_runs=4))
    assert len(np.unique(samples, axis=0)) == 1, "there is no noise"
    assert samples.shape == (4, 2)
    assert samples[0, 1] == 1.0, "and one pace"
    return float(samples[0, 0])


@pytest.mark.parametrize(
    ("kind", "precision", "by_hand"),
    [
        # 2 us + 5000 MACs at the kernel's rate + (250 + 500 + 500) values at 20000 a us
        ("fp32", FP32, 2 + 5000 / 40_000 + 1250 / 20_000),
        ("a8", W8A8, 2 + 5000 / 120_000 + 1250 / 20_000),
        # + the 250 values of the input, converted at 4000 a us
        ("a8+", FP32, 2 + 5000 / 40_000 + 1250 / 20_000 + 250 / 4_000),
        ("fp32", W8A8, 2 + 5000 / 120_000 + 1250 / 20_000 + 250 / 4_000),
    ],
)
def test_an_op_costs_what_the_model_states(kind: str, precision: Precision, by_hand: float) -> None:
    assert op_us(conv(kind, precision)) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("precision", [FP32, W8A8], ids=str)
def test_only_a_change_of_format_is_priced_as_a_conversion(precision: Precision) -> None:
    same, changed = ("a8", "fp32") if precision.is_integer else ("fp32", "a8")
    assert op_us(conv(changed, precision)) - op_us(conv(same, precision)) == pytest.approx(
        250 / 4000
    )
    assert op_us(conv(f"{same}+", precision)) == op_us(conv(same, precision))


def test_every_input_that_changes_format_is_priced() -> None:
    fp32, a8 = (Tensor(10, 5, 5, Format(kind)) for kind in ("fp32", "a8"))
    costs = [
        op_us(OpSpec(inputs, (Layer("add", (0, 1)),), W8A8))
        for inputs in ((a8, a8), (a8, fp32), (fp32, fp32))
    ]
    assert np.diff(costs) == pytest.approx([250 / 4000] * 2)


def test_a_network_costs_its_call_and_its_ops() -> None:
    space = mobile_tiny(classes=10)
    sampler, rng = UniformSampler(space), np.random.default_rng(0)
    for _ in range(10):
        ops = list(space.lower(sampler.sample(rng)))
        assert latency_us(ops) == pytest.approx(CALL_US + sum(map(op_us, ops)))
        alone = [latency_us([op]) for op in ops]
        assert latency_us(ops) == pytest.approx(sum(alone) - (len(ops) - 1) * CALL_US)


def test_each_image_costs_the_same_and_the_call_only_once() -> None:
    ops = [conv("fp32", W8A8)]
    latencies = [latency_us(ops, batch) for batch in (1, 2, 3, 8)]
    slope = latencies[1] - latencies[0]
    assert slope == pytest.approx(op_us(ops[0]))
    assert latencies == pytest.approx([CALL_US + batch * slope for batch in (1, 2, 3, 8)])


def test_the_devices_fastest_precision_depends_on_the_op() -> None:
    """Integers win where MACs dominate and lose where the conversion does, as on real devices."""
    sizes = {"many": Tensor(256, 8, 8), "few": Tensor(2, 64, 64)}
    cost = {
        (name, precision): op_us(
            conv_norm_activation(spec, spec.channels, kernel=1, precision=precision)
        )
        for (name, spec), precision in itertools.product(sizes.items(), (FP32, W8A8))
    }
    assert cost["many", W8A8] < cost["many", FP32]
    assert cost["few", W8A8] > cost["few", FP32]
