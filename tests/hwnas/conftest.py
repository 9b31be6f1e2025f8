"""Spaces small enough to list, costs for them, and a second process with another hash seed."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hwnas
from hwnas.costs.limits import AdditiveCost, counted_cost
from hwnas.spaces.base import Architecture, SearchSpace
from hwnas.spaces.mobile import Stage, mobile, mobile_tiny
from latency_tables.model import LatencyModel, Quality

ROOT = Path(hwnas.__file__).parents[1]
UNKNOWN_QUALITY = Quality(0, 0, 0, 0, 0, 0, 0, 0)


@pytest.fixture(scope="session")
def tiny() -> SearchSpace:
    """The shipped preset: 58 million architectures."""
    return mobile_tiny(classes=10)


@pytest.fixture(scope="session")
def small() -> SearchSpace:
    """120 architectures: widths, skips and precisions all take part."""
    return mobile(
        "small",
        (Stage(1, 1, (16, 24)), Stage(2, 2, (24, 32))),
        classes=4,
        size=16,
        kernels=(3,),
        expansions=(3,),
    )


@pytest.fixture(scope="session")
def small_list(small: SearchSpace) -> list[Architecture]:
    """Every architecture of `small`."""
    return list(small.enumerate())


@pytest.fixture(scope="session")
def latency_like() -> Callable[[SearchSpace], AdditiveCost]:
    """A cost with a model's offset, factors and bound, over rows drawn once from a fixed seed."""

    def build(space: SearchSpace) -> AdditiveCost:
        model = LatencyModel({"fp32": 0.83, "w8a8": 1.07}, -3.1, 12.7, 1.073, 0.99, UNKNOWN_QUALITY)
        ops = space.lattice.ops
        rows = np.random.default_rng(7).uniform(5.0, 90.0, len(ops))
        per_op = [
            model.op_cost_us(op.precision.name, row) for op, row in zip(ops, rows, strict=True)
        ]
        return AdditiveCost(
            "latency_ms", np.array(per_op), model.predict_ms, model.upper_ms, model.budget_us
        )

    return build


@pytest.fixture(scope="session")
def cost_named(
    latency_like: Callable[[SearchSpace], AdditiveCost],
) -> Callable[[SearchSpace, str], AdditiveCost]:
    """A cost of a space by its name: counted, or the latency-like one."""

    def build(space: SearchSpace, name: str) -> AdditiveCost:
        return latency_like(space) if name == "latency_ms" else counted_cost(space, name)

    return build


@pytest.fixture(scope="session")
def in_process() -> Callable[[str, str], str]:
    """Run a script in a fresh interpreter with the given PYTHONHASHSEED; what it printed."""

    def run(script: str, hash_seed: str) -> str:
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout.strip()

    return run
