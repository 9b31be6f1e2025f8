"""Names of devices, and what is said where there is none."""

import pytest

from profilers.devices import open_profiler
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


def test_a_gpu_is_a_missing_dependency_with_the_next_step() -> None:
    with pytest.raises(MissingDependency) as caught:
        open_profiler("gpu")
    assert "GPU" in caught.value.what
    assert "--device cpu" in caught.value.next_step
    assert "gpu" not in caught.value.accepted
    assert caught.value.exit_code == 2
