"""Which profiler measures which device.

The backends of GPUs import PyTorch, so they are loaded when they are asked for: a measuring process
of a CPU stays light.
"""

import importlib

from profilers.base import Profiler
from profilers.measure import GPU_PROTOCOL, Protocol
from quant.errors import InvalidInput

_BACKENDS = {
    "cpu": ("profilers.ort", "OrtProfiler", Protocol()),
    "gpu": ("profilers.trt", "TrtProfiler", GPU_PROTOCOL),
    "gpu-torch": ("profilers.torch_cuda", "TorchProfiler", GPU_PROTOCOL),
    "simulated": ("profilers.simulated", "SimulatedProfiler", Protocol()),
}
"""What measures each device, and how. `gpu` is TensorRT and nothing else: which runtime a table and
a certificate are of is never guessed."""

DEVICES = tuple(_BACKENDS)


def open_profiler(
    device: str, *, threads: int = 1, batch: int = 1, portable: bool = False
) -> Profiler:
    """The profiler of a device in a condition; raises InvalidInput for one that is not there."""
    module, name, _ = _backend(device)
    backend: type[Profiler] = getattr(importlib.import_module(module), name)
    return backend(threads=threads, batch=batch, portable=portable)


def protocol_of(device: str) -> Protocol:
    """How latencies are taken on a device, which need not be here, unless a recipe says otherwise;
    raises InvalidInput for a name that is not one.
    """
    return _backend(device)[2]


def _backend(device: str) -> tuple[str, str, Protocol]:
    if device not in _BACKENDS:
        raise InvalidInput(
            f"{device!r} is not a device.",
            accepted=", ".join(_BACKENDS),
            next_step="hwnas search --device cpu",
        )
    return _BACKENDS[device]
