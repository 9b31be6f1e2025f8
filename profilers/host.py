"""What a table's provenance records of the machine, and where a measurement is pinned."""

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_ISA = re.compile(r"avx|fma|vnni|amx|sse4|asimd|neon|sve|i8mm|bf16|fp16")


def cpu_model() -> str:
    """The processor's name."""
    text = _cpuinfo()  # Arm boards name themselves at its end, with a capital
    match = re.search(r"model name\s*:\s*(.+)", text) or re.search(r"Model\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.processor() or platform.machine()


def cpu_flags() -> str:
    """The instruction sets that decide which kernels run, in one sorted line."""
    match = re.search(r"(?:flags|Features)\s*:\s*(.+)", _cpuinfo())
    return " ".join(sorted(flag for flag in match[1].split() if _ISA.search(flag))) if match else ""


def saturates(flags: str, machine: str) -> bool:
    """Whether a CPU's 8-bit kernels may add two products in 16 bits, which can be too few: x86
    without VNNI, or of which no flags are known.
    """
    x86 = machine.lower() in ("x86_64", "amd64", "i686", "i386")
    return x86 and not {"avx512_vnni", "avx_vnni"} & set(flags.split())


def governor() -> str:
    """The frequency governor, or "" where the system shows none."""
    return _GOVERNOR.read_text().strip() if _GOVERNOR.exists() else ""


def disturbances() -> list[str]:
    """What may make measurements unstable here, each with what to do about it."""
    found = []
    if governor() not in ("", "performance"):
        found.append(f"the frequency governor is {governor()}: set it to performance")
    if hasattr(os, "getloadavg") and (load := os.getloadavg()[0]) > 1.5:
        found.append(f"other processes are using the cores (load {load:.1f}): stop them")
    return found


def usable_cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Run on the last `threads` processors this process may use, and go back afterwards.

    Does nothing where the system cannot pin.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, set(sorted(before)[-threads:]))
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _cpuinfo() -> str:
    return _CPUINFO.read_text() if _CPUINFO.exists() else ""
