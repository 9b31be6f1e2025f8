"""Names of devices, and what is said where there is none."""

import subprocess
import sys

import pytest

from profilers.devices import DEVICES, open_profiler, protocol_of
from profilers.measure import GPU_PROTOCOL, Protocol
from profilers.ort import OrtProfiler
from profilers.simulated import SimulatedProfiler
from quant.errors import InvalidInput, MissingDependency


@pytest.mark.parametrize(
    ("device", "backend"), [("cpu", OrtProfiler), ("simulated", SimulatedProfiler)]
)
def test_a_device_opens_in_the_condition_asked_for(device: str, backend: type) -> None:
    profiler = open_profiler(device, threads=2, batch=8)
    assert type(profiler) is backend
    assert (profiler.threads, profiler.batch) == (2, 8)
    assert profiler.host().device == device, "the measuring process opens it by this name"


@pytest.mark.parametrize("device", ["tpu", "", "CPU", "cuda:0"])
def test_an_unknown_device_is_invalid_and_the_known_ones_are_told(device: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        open_profiler(device)
    assert repr(device) in caught.value.what
    assert "cpu" in caught.value.accepted
    assert caught.value.next_step
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("no_card")
@pytest.mark.parametrize("device", ["gpu", "gpu-torch"])
def test_a_gpu_that_is_not_there_is_a_missing_dependency_with_what_still_works(
    device: str,
) -> None:
    with pytest.raises(MissingDependency) as caught:
        open_profiler(device)
    assert "libcuda.so.1 was not found" in caught.value.what
    assert "--device cpu" in caught.value.next_step
    assert "--compute-capability sm89" in caught.value.next_step
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_measuring_process_of_a_cpu_loads_no_pytorch() -> None:
    code = "import profilers.worker, sys; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_has_a_protocol_whether_or_not_it_is_there(device: str) -> None:
    gpu = device.startswith("gpu")
    assert protocol_of(device) == (GPU_PROTOCOL if gpu else Protocol())
    assert (protocol_of(device).max_spread < 0.03) == gpu
