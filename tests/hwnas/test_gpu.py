"""A search for a GPU, from nothing to a certificate that is verified: under PyTorch on the CPU,
whose card is stated; and under both runtimes on a real card where there is one (`-m gpu`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hwnas.export.certificate import sha256
from hwnas.job import Job
from hwnas.spaces.blocks import conv_norm_activation
from latency_tables.ops import Tensor
from profilers.cuda import Card, card
from profilers.devices import open_profiler
from profilers.graphs import OPS_METADATA, emit, random_parameters
from profilers.measure import GPU_PROTOCOL, Measurement, Protocol, summarise
from profilers.torch_cuda import TorchProfiler
from quant.errors import MissingDependency
from quant.precision import Precision

Commands = Callable[..., Any]

ROOT = Path(__file__).parents[2]
SPACE = """
from hwnas.spaces.mobile import Stage, mobile

def {name}(*, classes, image_channels, size, precisions):
    return mobile(
        "{name}", (Stage(1, 1, {first}), Stage(2, 2, {second})), classes=classes, size=size,
        image_channels=image_channels, kernels=(3,), expansions=(3,), precisions=precisions,
    )
"""
"""Twelve networks."""

SEARCH = ("--precisions", "fp16", "--limit-fraction", "0.5", "--json")
STATED = Card("Stated 9000", (8, 9), "580.65", 24_000_000_000)
RECIPE = {
    "name": "smoke",
    "protocol": {"rounds": 2, "max_rounds": 2, "warmup_ms": 1.0, "block_ms": 1.0, "min_runs": 3,
                 "max_runs": 5},
}  # fmt: skip
"""Of a CPU that others use: nothing of it is a claim."""


def space_in(folder: Path, name: str, *widths: tuple[int, int]) -> tuple[str, str]:
    """The flag of a space that is written into a folder."""
    first, second = widths
    path = folder / f"{name}.py"
    path.write_text(SPACE.format(name=name, first=first, second=second))
    return "--space", f"{path}:{name}"


@pytest.fixture(scope="module")
def on_the_cpu(
    timed_here: Callable[..., Any], measured_here: Callable[..., Any]
) -> Callable[[], AbstractContextManager[None]]:
    """PyTorch's backend under a stated card, for as long as the block lasts; in this process."""

    @contextmanager
    def patched() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TorchProfiler, "place", torch.device("cpu"))
            patch.setattr("profilers.torch_cuda.card", lambda: STATED)
            patch.setattr("hwnas.calibration.measure_models", timed_here)
            patch.setattr("hwnas.ship.measure", measured_here)
            yield

    return patched


@pytest.fixture(scope="module")
def searched_here(
    tmp_path_factory: pytest.TempPathFactory,
    hwnas_in: Commands,
    on_the_cpu: Callable[[], AbstractContextManager[None]],
) -> tuple[Path, dict[str, Any]]:
    """A folder in which such a search has finished, and what it answered."""
    folder = tmp_path_factory.mktemp("stated")
    (folder / "run.json").write_text(json.dumps({"recipe": RECIPE}))
    small = space_in(folder, "small", (16, 24), (24, 32))
    asked = (*small, "--device", "gpu-torch", *SEARCH, "--config", "run.json")
    answer = hwnas_in(folder, "search", *asked, within=on_the_cpu())
    assert answer.code in (0, 4), answer.told
    return folder, answer.content


def assert_certified(
    folder: Path, found: dict[str, Any], device: str, suffix: str
) -> dict[str, Any]:
    """The certificate of a search's answer, which tells the engine that was measured."""
    content = json.loads((folder / found["certificate"]).read_text())
    result = (folder / found["certificate"]).parent
    engine = result / content["engine"]["file"]
    assert engine.name == f"model{suffix}"
    assert content["engine"]["size_bytes"] == engine.stat().st_size
    assert content["hashes"]["engine"] == sha256(engine)
    assert content["hashes"]["model"] == sha256(result / "model.onnx")
    assert content["host"]["device"] == device
    assert content["host"]["cpu"] in content["engine"]["runs_on"]
    measured, limits = content["measured"], content["limits"]
    assert 0 < measured["min_ms"] <= measured["latency_ms"]
    assert content["holds"] == {
        name: measured["latency_ms"] <= value for name, value in limits.items()
    }
    return content


def test_a_search_ships_the_program_that_was_timed(
    searched_here: tuple[Path, dict[str, Any]],
) -> None:
    folder, found = searched_here
    content = assert_certified(folder, found, "gpu-torch", ".pt2")
    assert content["engine"]["runtime"] == f"pytorch {torch.__version__}"
    assert content["host"]["flags"].startswith("sm89 driver 580.65 cudnn ")
    assert content["protocol"]["max_spread"] == GPU_PROTOCOL.max_spread
    told = {OPS_METADATA: ""}
    file = (folder / found["certificate"]).with_name("model.pt2")
    program = torch.export.load(file, extra_files=told)
    assert {op["precision"] for op in map(json.loads, json.loads(told[OPS_METADATA]))} >= {"fp16"}
    x = torch.rand(2, *tuple(program.example_inputs[0][0].shape)[1:])
    assert torch.isfinite(program.module()(x)).all()


def spread(job: Job, paths: list[Path], ratio: float) -> list[Measurement]:
    """Three processes in which a file takes 100 us, and so much more, and twice that."""
    blocks = [np.array([[us, 1.0]] * 60) for us in 0.1 * (1 + ratio * np.arange(3))]
    return [summarise(blocks, job.recipe.protocol) for _ in paths]


@pytest.mark.parametrize(("ratio", "code"), [(0.02, 0), (0.03, 4)])
def test_a_gpus_certificate_does_not_hold_on_a_spread_beyond_its_protocol(
    ratio: float,
    code: int,
    hwnas_in: Commands,
    searched_here: tuple[Path, dict[str, Any]],
    on_the_cpu: Callable[[], AbstractContextManager[None]],
) -> None:
    """2.5 % of the median, where a CPU may spread by ten."""
    with on_the_cpu(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("hwnas.ship.measure", lambda job, paths: spread(job, paths, ratio))
        answer = hwnas_in(searched_here[0], "verify", "--json")
    assert answer.code == code, answer.told
    content = answer.content
    assert all(content["holds"].values())
    assert content["measured"]["spread"] == pytest.approx(ratio, rel=0.05)
    assert content["measured"]["stable"] is (code == 0)
    assert Protocol().max_spread > ratio


# ---- on a real card

PRECISION = Precision("fp16")
DEVICES = {"gpu-torch": ".pt2", "gpu": ".plan"}


def usable(device: str) -> None:
    """Skip, with the reason, where a device does not run here."""
    op = conv_norm_activation(Tensor(8, 8, 8), 8, kernel=3, precision=PRECISION)
    try:
        profiler = open_profiler(device)
        model = emit([op], [random_parameters(op, np.random.default_rng(0))], profiler.runtime)
        profiler.prepare(model).close()
    except MissingDependency as error:
        pytest.skip(str(error))


def command(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    return subprocess.run(
        [sys.executable, "-m", "hwnas", *arguments],
        cwd=folder, capture_output=True, text=True, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module", params=DEVICES)
def on_a_card(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, dict[str, Any]]:
    """A device, a folder in which a search has finished, and what it answered; in batches, so that
    the card has something to do."""
    usable(request.param)
    folder = tmp_path_factory.mktemp(request.param)
    wide = space_in(folder, "wide", (32, 64), (64, 128))
    done = command(
        folder, "search", *wide, "--device", request.param, "--recipe", "smoke", "--batch", "32",
        *SEARCH,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, folder, json.loads(done.stdout)


@pytest.mark.gpu
def test_a_search_on_a_card_certifies_what_was_measured_on_it(
    on_a_card: tuple[str, Path, dict[str, Any]],
) -> None:
    device, folder, found = on_a_card
    content = assert_certified(folder, found, device, DEVICES[device])
    assert found["status"] == "ok"
    assert content["host"]["cpu"] == card().name
    assert content["host"]["flags"].startswith(f"{card().sm} driver {card().driver}")
    assert content["host"]["batch"] == 32
    assert content["measured"]["stable"]
    assert content["protocol"]["max_spread"] == GPU_PROTOCOL.max_spread
    upper_ms = content["predicted"]["upper_latency_ms"]
    assert 0.2 * upper_ms < content["measured"]["latency_ms"] < 2 * upper_ms


@pytest.mark.gpu
def test_a_certificate_is_verified_on_the_card(
    on_a_card: tuple[str, Path, dict[str, Any]],
) -> None:
    _, folder, found = on_a_card
    before = json.loads((folder / found["certificate"]).read_text())
    done = command(folder, "verify", "--json")
    content = json.loads(done.stdout)
    holds = all(content["holds"].values()) and content["measured"]["stable"]
    assert done.returncode == (0 if holds else 4), done.stderr[-3000:]
    first, again = (x["measured"]["median_ms"] for x in (before, content))
    assert again == pytest.approx(first, rel=0.2)
    assert content["accuracy"]["test"] == pytest.approx(before["accuracy"]["test"], abs=0.01)


@pytest.mark.gpu
def test_the_kernels_of_an_engine_are_told_by_op(
    on_a_card: tuple[str, Path, dict[str, Any]],
) -> None:
    """Where it is an engine; else that there are none is told."""
    device, folder, _ = on_a_card
    done = command(folder, "verify", "--layers", "--json")
    content = json.loads(done.stdout)
    if device == "gpu-torch":
        assert done.returncode == 2
        assert "kernels of a TensorRT engine" in content["error"]["what"]
        return
    total_us = sum(layer["rescaled_us"] for layer in content["layers"])
    assert total_us == pytest.approx(1000 * content["measured"]["median_ms"], rel=0.2)


@pytest.mark.gpu
def test_devices_tells_a_card(tmp_path: Path) -> None:
    found = json.loads(command(tmp_path, "devices", "--json").stdout)["devices"]
    told = {each["device"]: each for each in found}
    for device in DEVICES:
        reason = refused().get(device)
        assert told[device]["usable"] == (reason is None)
        assert (reason or card().name).partition(". ")[0] in told[device]["about"]


def refused() -> dict[str, str]:
    """The devices that are not here, and why."""
    found = {}
    for device in DEVICES:
        try:
            open_profiler(device)
        except MissingDependency as error:
            found[device] = str(error)
    return found
