"""Provenance of a machine, and pinning to its processors."""

import os
from pathlib import Path

import pytest

from profilers import host
from profilers.host import pinned

needs_affinity = pytest.mark.skipif(
    not hasattr(os, "sched_setaffinity"), reason="this system cannot pin"
)


@needs_affinity
def test_a_measurement_runs_on_as_many_processors_as_it_has_threads() -> None:
    before = os.sched_getaffinity(0)
    for threads in range(1, len(before) + 1):
        with pinned(threads):
            assert os.sched_getaffinity(0) == set(sorted(before)[-threads:])
        assert os.sched_getaffinity(0) == before


@needs_affinity
def test_the_affinity_comes_back_after_an_error() -> None:
    before = os.sched_getaffinity(0)
    with pytest.raises(ZeroDivisionError), pinned(1):
        raise ZeroDivisionError
    assert os.sched_getaffinity(0) == before


@needs_affinity
def test_pinning_nests() -> None:
    before = os.sched_getaffinity(0)
    with pinned(len(before)):
        with pinned(1):
            assert len(os.sched_getaffinity(0)) == 1
        assert os.sched_getaffinity(0) == before


@needs_affinity
def test_more_threads_than_processors_use_them_all() -> None:
    before = os.sched_getaffinity(0)
    with pinned(len(before) + 10):
        assert os.sched_getaffinity(0) == before


def test_a_system_that_cannot_pin_runs_unpinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    with pinned(1):
        ran = True
    assert ran


def test_flags_are_the_instruction_sets_that_decide_kernels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "model name\t: Some CPU 9000\nflags\t\t: fpu vme avx512_vnni sse4_2 avx2 fma ht\n"
    (tmp_path / "cpuinfo").write_text(text * 2)
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    assert host.cpu_flags() == "avx2 avx512_vnni fma sse4_2"
    assert host.cpu_model() == "Some CPU 9000"


def test_arm_flags_are_read_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text = "Features\t: fp asimd evtstrm aes asimddp i8mm bf16\n\nModel\t\t: Some Board 5\n"
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    assert host.cpu_flags() == "asimd asimddp bf16 i8mm"
    assert host.cpu_model() == "Some Board 5"


def test_a_system_without_these_files_is_still_described(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "absent")
    monkeypatch.setattr(host, "_GOVERNOR", tmp_path / "absent")
    assert host.cpu_flags() == ""
    assert host.governor() == ""
    assert host.cpu_model()


def test_the_governor_is_read_without_its_newline(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "governor").write_text("performance\n")
    monkeypatch.setattr(host, "_GOVERNOR", tmp_path / "governor")
    assert host.governor() == "performance"
