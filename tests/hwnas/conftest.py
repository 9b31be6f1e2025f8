"""What several files share: spaces small enough to list and costs for them; commands in a folder, a
folder whose table is measured, and measuring without fresh processes; a second process with
another hash seed.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import hwnas
from hwnas import cli
from hwnas.costs.limits import AdditiveCost, Cost, counted_cost
from hwnas.data import digits
from hwnas.job import Job
from hwnas.spaces.base import Architecture, Build, Choice, Position, SearchSpace, State
from hwnas.spaces.blocks import conv_norm_activation
from hwnas.spaces.mobile import Stage, mobile, mobile_tiny
from latency_tables.model import LatencyModel, Quality
from latency_tables.ops import Tensor
from profilers.base import Profiler
from profilers.measure import Measurement, Protocol, Samples, summarise
from quant.precision import Precision

ROOT = Path(hwnas.__file__).parents[1]
UNKNOWN_QUALITY = Quality(0, 0, 0, 0, 0, 0, 0, 0)
SPACE = f"{ROOT / 'examples' / 'own_space.py'}:space"
SMALL = ("--space", SPACE, "--device", "simulated", "--recipe", "smoke")


@pytest.fixture(scope="session", autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Results are compared to the last bit, which holds for equal numbers of threads; and threads
    that wait for each other cost many times more than these tensors."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session", autouse=True)
def digits_once() -> Iterator[None]:
    """What `--data digits` names is enlarged once, not by every command; nobody writes in it."""
    made = digits()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwnas.data.names.digits", lambda: made.mapped(lambda x: x))
        yield
    assert made.fingerprint == digits().fingerprint


# ---- commands


class Answer(NamedTuple):
    """What a command answered: its exit code, standard output and standard error."""

    code: int
    out: str
    told: str

    @property
    def content(self) -> dict[str, Any]:
        """The object on standard output."""
        content: dict[str, Any] = json.loads(self.out)
        return content

    @property
    def first_told(self) -> str:
        """The first line of standard error."""
        return self.told.splitlines()[0]


@pytest.fixture(scope="session")
def hwnas_in() -> Callable[..., Answer]:
    """Give a command in a folder, in this process: `hwnas_in(folder, "search", "--json")`; inside
    of a further context where one is given.
    """

    def give(
        folder: Path, *arguments: str, within: AbstractContextManager[None] | None = None
    ) -> Answer:
        out, told = io.StringIO(), io.StringIO()
        with (
            contextlib.chdir(folder),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(told),
            within or contextlib.nullcontext(),
        ):
            code = cli.run(list(arguments))
        return Answer(code, out.getvalue(), told.getvalue())

    return give


@pytest.fixture(scope="session")
def searched(
    tmp_path_factory: pytest.TempPathFactory, hwnas_in: Callable[..., Answer]
) -> tuple[Path, Answer]:
    """A folder in which a search has finished, whose networks fresh processes measured, and what it
    answered. To be copied, and not to be written.
    """
    folder = tmp_path_factory.mktemp("searched")
    answer = hwnas_in(folder, "search", *SMALL, "--limit-fraction", "0.5", "--json")
    assert answer.code == 0, answer.told
    return folder, answer


@pytest.fixture(scope="session")
def searched_by_process(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, "subprocess.CompletedProcess[str]"]:
    """The same search as a process of its own, quiet, from nothing and under another hash seed; its
    folder, in which the run is called `run`, and how it ended.
    """
    folder = tmp_path_factory.mktemp("process")
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    done = subprocess.run(
        [sys.executable, "-m", "hwnas", "search", *SMALL, "--limit-fraction", "0.5", "--quiet",
         "--run", "run"],
        cwd=folder,
        env={**os.environ, "PYTHONHASHSEED": hash_seed, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    return folder, done


@pytest.fixture(scope="session")
def searched_as(searched: tuple[Path, Answer]) -> Callable[[Path, str], Path]:
    """Copy the finished search into a folder, its run under a name; the folder."""

    def copy(folder: Path, run: str) -> Path:
        shutil.copytree(searched[0] / "tables", folder / "tables")
        shutil.copytree(searched[0] / searched[1].content["run"], folder / run)
        return folder

    return copy


@pytest.fixture(scope="session")
def profiled(searched: tuple[Path, Answer]) -> Callable[[Path], Path]:
    """Copy the table of the small space into a folder, to search in it at once; the folder."""

    def copy(folder: Path) -> Path:
        shutil.copytree(searched[0] / "tables", folder / "tables")
        return folder

    return copy


def _measured_here(job: Job, paths: Sequence[Path], *_: object) -> list[Measurement]:
    found = []
    for path in paths:
        with job.profiler.prepare(path) as session:
            block = session.block(job.recipe.protocol).round(3)  # as it is told between processes
            found.append(summarise([block] * job.recipe.processes, job.recipe.protocol))
    return found


@pytest.fixture(scope="session")
def measured_here() -> Callable[..., list[Measurement]]:
    """The same measurement without fresh processes, which take a second each to start; this
    process's device counts.
    """
    return _measured_here


def _timed_here(
    profiler: Profiler,
    models: Sequence[Path],
    protocol: Protocol,
    *_: object,
    processes: int | None = None,
    **__: object,
) -> list[list[Samples]]:
    found = []
    for path in models:
        with profiler.prepare(path) as session:
            block = session.block(protocol).round(3)
            found.append([block] * (processes or protocol.rounds))
    return found


@pytest.fixture(scope="session")
def timed_here() -> Callable[..., list[list[Samples]]]:
    """`measure_models` without fresh processes: the blocks of each model file."""
    return _timed_here


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Networks are measured in this process: the simulated device answers the same."""
    monkeypatch.setattr("hwnas.ship.measure", _measured_here)
    monkeypatch.setattr("hwnas.job.measure", _measured_here)


# ---- spaces and costs


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
def large() -> SearchSpace:
    """20 positions, about 2,500 ops, 5,000 edges and 1e24 architectures."""
    return mobile(
        "large",
        (
            Stage(1, 1, (8, 16, 24, 32)),
            Stage(2, 2, (16, 24, 32, 40)),
            Stage(3, 2, (32, 40, 48, 56)),
            Stage(4, 2, (64, 80, 96, 112)),
            Stage(4, 1, (80, 96, 112, 128)),
            Stage(3, 2, (160, 192, 224, 256)),
            Stage(1, 1, (256, 320, 384, 448)),
        ),
        classes=100,
        size=64,
    )


@pytest.fixture(scope="session")
def random_space() -> Callable[[int], SearchSpace]:
    """Up to a few hundred architectures, from a seed: any choices may be illegal, dead ends too."""

    def build(seed: int) -> SearchSpace:
        rng = np.random.default_rng(seed)
        widths = (8, 16, 24)
        choices = ("skip", *widths)
        positions = []
        for number in range(int(rng.integers(2, 6))):
            legal = {w: {c for c in choices if rng.random() < 0.45} for w in widths}
            legal[8].add(8)
            options = {"width": choices, "kernel": (1, 3)}
            positions.append(Position(f"p{number}", options, _convolution(legal)))
        head = _convolution({width: {8} for width in widths})
        positions.append(Position("head", {"width": (8,), "kernel": (1, 3)}, head))
        return SearchSpace(f"random {seed}", Tensor(8, 4, 4), tuple(positions))

    return build


def _convolution(legal: Mapping[int, set[object]]) -> Build:
    def build(state: State, values: Mapping[str, Any]) -> Choice | None:
        width, kernel = values["width"], values["kernel"]
        if width not in legal[state.tensor.channels] or (width == "skip" and kernel == 3):
            return None
        if width == "skip":
            return Choice(None, state)
        op = conv_norm_activation(state.tensor, width, kernel=kernel, precision=Precision("fp32"))
        return Choice(op, State(op.output))

    return build


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
) -> Callable[[SearchSpace, str], Cost]:
    """A cost of a space by its name: counted, or the latency-like one."""

    def build(space: SearchSpace, name: str) -> Cost:
        return latency_like(space) if name == "latency_ms" else counted_cost(space, name)

    return build


# ---- another process


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
