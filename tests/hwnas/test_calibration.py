"""Whole networks: which are measured, how they are priced and told, and how they are shared out."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from hwnas.calibration import (
    LEAST_NETWORKS,
    calibrated,
    calibration_networks,
    draw,
    fitted,
    measured_networks,
    model_files,
    network_models,
)
from hwnas.recipes import CalibrationRecipe, recipe
from hwnas.spaces.base import SearchSpace
from hwnas.spaces.mobile import Stage, mobile
from latency_tables.boundaries import chain_key, probes, with_heads
from latency_tables.model import LatencyModel, MeasuredNetwork, calibrate
from latency_tables.ops import OpSpec
from latency_tables.table import LatencyTable, Row
from profilers.graphs import read_ops
from profilers.simulated import CALL_US, SimulatedProfiler, op_us
from quant.errors import InvalidInput

SMOKE = recipe("smoke")


@pytest.fixture(scope="module")
def few() -> SearchSpace:
    """Eight architectures."""
    stages = (Stage(1, 2, (16, 24)),)
    return mobile("few", stages, classes=4, size=8, kernels=(3,), expansions=(3,), skip=False)


def row_of(*ops: OpSpec) -> Row:
    us = CALL_US + sum(map(op_us, ops))
    texts = json.dumps([op.to_json() for op in ops])
    return Row(chain_key(ops), texts, ops[-1].precision.name, *[us] * 5, 0.0, 50, True)


@pytest.fixture
def table(small: SearchSpace) -> LatencyTable:
    """Of the simulated device."""
    ops = small.lattice.ops
    found = LatencyTable(SimulatedProfiler().host(), SMOKE.protocol.to_dict())
    found.rows = {op.key: row_of(op) for op in ops}
    found.chains = {chain_key(chain): row_of(*chain) for chain in with_heads(probes(ops).values())}
    return found


# ---- which networks


def test_networks_are_drawn_alike_every_time_and_each_once(small: SearchSpace) -> None:
    first = draw(small, 40)
    assert first == draw(small, 40)
    assert len(set(first)) == 40
    assert draw(small, 40, seed=2) != first
    assert first[:10] == draw(small, 10), "fewer are the first of more"


def test_networks_are_drawn_apart_from_those_that_are_named(small: SearchSpace) -> None:
    first = draw(small, 40)
    others = draw(small, 40, seed=2, but=first)
    assert len(others) == 40
    assert set(others).isdisjoint(first)


def test_a_space_gives_no_more_networks_than_it_has(few: SearchSpace) -> None:
    assert set(draw(few, 100)) == set(few.enumerate())
    assert draw(few, 100, but=list(few.enumerate())) == []
    with pytest.raises(InvalidInput, match=f"8 networks of few.*at least {LEAST_NETWORKS}"):
        calibration_networks(few, CalibrationRecipe(fit=20, bound=9, test=10))


def test_files_of_networks_hold_their_ops_and_go_with_the_block(small: SearchSpace) -> None:
    chains = [small.lower(architecture) for architecture in draw(small, 3)]
    told: list[tuple[int, int]] = []
    models = network_models(
        chains, SimulatedProfiler(), lambda _, done, of: told.append((done, of))
    )
    with model_files(models) as paths:
        assert [tuple(read_ops(onnx.load(path))) for path in paths] == chains
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert not any(path.exists() for path in paths)


def test_networks_that_a_journal_holds_are_not_checked_again(
    small: SearchSpace, table: LatencyTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A check may build an engine: an interrupted calibration goes on with those that it lacks."""
    counts = CalibrationRecipe(fit=6, bound=3, test=3)
    recipe = SMOKE.model_copy(update={"calibration": counts, "processes": 1})
    profiler, journal, checked = SimulatedProfiler(), tmp_path / "networks.journal", []
    monkeypatch.setattr(profiler, "check", checked.append)

    def calibrate_until(blocks: int) -> LatencyModel:
        def progress(label: str, done: int, _: int) -> None:
            if label.startswith("timing") and done == blocks:
                raise KeyboardInterrupt

        return calibrated(small, profiler, table, recipe, journal=journal, progress=progress)

    with pytest.raises(KeyboardInterrupt):
        calibrate_until(5)
    assert len(checked) == 12
    checked.clear()
    calibrate_until(99)
    assert len(checked) == 7
    checked.clear()
    assert calibrate_until(99).quality.networks == 3
    assert checked == []


# ---- what was measured


def blocks_of(us: float, speeds: list[float]) -> list[np.ndarray]:
    """A block of four calls at each speed of the machine; the pace is 10 us at speed 1."""
    return [np.tile([us * speed, 10.0 * speed], (4, 1)) for speed in speeds]


def test_a_network_is_told_at_the_tables_pace_and_as_it_was_observed(
    small: SearchSpace, table: LatencyTable
) -> None:
    table.pace_us = 20.0
    chains = [small.lower(architecture) for architecture in draw(small, 4)]
    us = [100.0, 150.0, 200.0, 250.0]
    speeds = [1.0, 1.5, 3.0]
    blocks = [blocks_of(each, speeds) for each in us]
    found = measured_networks(chains, blocks, table, SMOKE)
    assert [network.latency_us for network in found] == pytest.approx([2 * each for each in us])
    assert [network.observed_us for network in found] == pytest.approx([1.5 * each for each in us])
    calls = np.repeat(speeds, 4)  # of all blocks, at the machine's pace
    for percentile in (90, 95):
        wanted = [each * float(np.percentile(calls, percentile)) for each in us]
        assert [network.tails_us[percentile] for network in found] == pytest.approx(wanted)


def test_a_network_is_priced_by_what_its_ops_cost_inside_it(
    small: SearchSpace, table: LatencyTable
) -> None:
    chains = [small.lower(architecture) for architecture in draw(small, 10)]
    blocks = [blocks_of(100.0, [1.0])] * len(chains)
    for ops, network in zip(chains, measured_networks(chains, blocks, table, SMOKE), strict=True):
        assert [name for name, _ in network.rows] == [op.precision.name for op in ops]
        wanted = [op_us(op) + CALL_US * (place == 0) for place, op in enumerate(ops)]
        assert [us for _, us in network.rows] == pytest.approx(wanted)


# ---- the model


@pytest.mark.parametrize(
    ("drawn", "parts"), [(40, (20, 10, 10)), (20, (10, 5, 5)), (12, (6, 3, 3))]
)
def test_networks_are_shared_out_in_the_recipes_proportions(
    drawn: int, parts: tuple[int, int, int]
) -> None:
    """In order: so a space with fewer networks than asked for has all three parts too."""
    rng = np.random.default_rng(0)
    networks = []
    for _ in range(drawn):
        rows = tuple(("fp32", float(us)) for us in rng.uniform(5, 50, rng.integers(3, 9)))
        latency = sum(us for _, us in rows) * float(rng.uniform(0.9, 1.1))
        networks.append(MeasuredNetwork(rows, latency, latency))
    counts = CalibrationRecipe(fit=20, bound=10, test=10)
    fit, bound, test = parts
    assert fitted(networks, counts) == calibrate(
        networks[:fit], networks[fit : fit + bound], networks[fit + bound :]
    )
    assert fitted(networks, counts).quality.networks == test


def test_the_simulated_device_is_calibrated_to_itself(
    small: SearchSpace, table: LatencyTable, tmp_path: Path
) -> None:
    """Its cost is a sum and has no noise: factors of 1, no constants, a bound at the prediction."""
    quick = recipe({"name": "smoke", "processes": 1})
    model = calibrated(
        small, SimulatedProfiler(), table, quick, journal=tmp_path / "networks.journal"
    )
    assert list(model.scales.values()) == pytest.approx([1.0] * len(model.scales), abs=1e-3)
    assert model.upper_ratio == pytest.approx(1.0, abs=1e-3)
    assert model.quality.worst_error < 1e-3
