"""Which profiler measures which device."""

from profilers.base import Profiler
from profilers.ort import OrtProfiler
from profilers.simulated import SimulatedProfiler
from quant.errors import InvalidInput, MissingDependency

DEVICES = ("cpu", "gpu", "simulated")


def open_profiler(
    device: str, *, threads: int = 1, batch: int = 1, portable: bool = False
) -> Profiler:
    """The profiler of a device in a condition; raises InvalidInput for one that is not there."""
    match device:
        case "cpu":
            return OrtProfiler(threads=threads, batch=batch, portable=portable)
        case "simulated":
            return SimulatedProfiler(threads=threads, batch=batch, portable=portable)
        case "gpu":
            raise MissingDependency(
                "This version of hwnas cannot measure on a GPU.",
                accepted="cpu, simulated",
                next_step="use --device cpu",
            )
        case _:
            raise InvalidInput(
                f"{device!r} is not a device.",
                accepted="cpu, simulated",
                next_step="hwnas search --device cpu",
            )
