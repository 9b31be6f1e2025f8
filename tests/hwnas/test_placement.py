"""Where weights are trained: how a device is chosen, what it is asked, and what contexts leave."""

import platform
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

import hwnas.placement
from hwnas.placement import (
    HOST,
    NAMES,
    SHARE_OF_MEMORY,
    Placement,
    cuda_fault,
    placement,
    placement_of,
    total,
)
from quant.errors import InvalidInput, MissingDependency


@pytest.fixture
def undecided() -> Iterator[None]:
    """Nothing was found out yet, nor is anything remembered afterwards."""
    for known in (placement, cuda_fault):
        known.cache_clear()
    yield
    for known in (placement, cuda_fault):
        known.cache_clear()


# ---- choosing


@pytest.mark.usefixtures("undecided")
def test_without_a_name_it_is_cuda_where_that_works_and_cpu_elsewhere(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for fault, expected in (("", "cuda"), ("it has no driver", "cpu")):
        monkeypatch.setattr(hwnas.placement, "cuda_fault", lambda fault=fault: fault)
        placement.cache_clear()
        assert placement(None).device.type == expected
        assert placement("cpu") is HOST


@pytest.mark.usefixtures("undecided")
def test_cuda_that_does_not_work_is_refused_in_a_sentence_that_says_what_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(hwnas.placement, "cuda_fault", lambda: "it has no driver")
    with pytest.raises(MissingDependency) as caught:
        placement("cuda")
    assert caught.value.exit_code == 2
    assert caught.value.what == "PyTorch cannot compute on CUDA here: it has no driver."
    assert caught.value.accepted.startswith("cpu, ")
    assert "--train-on cuda" in caught.value.next_step


@pytest.mark.parametrize("name", ["gpu", "CUDA", "cuda:1", ""])
def test_another_name_is_refused_with_those_that_are_known(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        placement(name)
    assert repr(name) in caught.value.what
    assert caught.value.accepted == ", ".join(NAMES)


@pytest.mark.usefixtures("undecided")
def test_a_card_that_is_there_by_name_only_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is asked beforehand says yes; computing alone tells the truth, in one line."""

    def broken(*_: object, **__: object) -> object:
        warnings.warn("the driver is too old", stacklevel=1)
        raise RuntimeError("no kernel image is available.\nCompile with more traces")

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cuda_fault() == "no kernel image is available"


@pytest.mark.usefixtures("undecided")
@pytest.mark.parametrize(("factor", "works"), [(1.0, True), (1.5, False)])
def test_a_card_that_computes_wrongly_is_found_out(
    factor: float, works: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A convolution on the CPU in its place, right and then wrong."""
    ones, conv2d = torch.ones, torch.nn.functional.conv2d
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "ones", lambda *s, device, dtype: ones(*s, dtype=dtype))
    monkeypatch.setattr(hwnas.placement.functional, "conv2d", lambda x, w: conv2d(x, w) * factor)
    assert (not cuda_fault()) == works


@pytest.mark.skipif(torch.version.cuda is not None, reason="this build of torch has CUDA")
@pytest.mark.usefixtures("undecided")
def test_a_build_of_torch_without_cuda_says_so() -> None:
    assert cuda_fault() == f"torch {torch.__version__} is built without it"


# ---- what it says of a device


def test_a_cpu_is_as_before() -> None:
    assert HOST.text == "cpu"
    assert HOST.memory_format == torch.contiguous_format
    assert HOST.optimiser_options == {"fused": None}
    assert HOST.holds(np.zeros(3))
    HOST.finish()
    with HOST.training():
        assert not torch.is_autocast_enabled("cpu")
        assert torch.nn.functional.linear(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_a_device_apart_has_its_own_ways() -> None:
    apart = Placement(torch.device("cuda", 0))
    assert apart.memory_format == torch.channels_last
    assert apart.optimiser_options == {"fused": True}


def test_where_a_module_is_follows_its_weights() -> None:
    assert placement_of(nn.Linear(2, 2)) == HOST
    assert placement_of(nn.ReLU()) == HOST
    assert placement_of(nn.Linear(2, 2, device="meta")).device.type == "meta"


@pytest.mark.parametrize(("share", "fits"), [(0.999, True), (1.001, False)])
def test_a_split_stays_on_the_host_where_it_would_take_too_much_of_the_free_memory(
    share: float, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = 10**6
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, 10 * free))
    array = np.zeros(int(share * SHARE_OF_MEMORY * free), np.uint8)
    assert Placement(torch.device("cuda", 0)).holds(array) == fits


def test_on_a_cpu_nothing_is_copied_but_what_pytorch_cannot_hold() -> None:
    array = np.arange(6)
    for give in (HOST.put, HOST.send):
        given = give(array)
        given[0] += 1
        assert array[0] == given[0]
    array.flags.writeable = False
    given = HOST.put(array)
    given[0] += 1
    assert array[0] != given[0]


# ---- contexts


SWITCHES = (torch.backends.cudnn, torch.backends.cuda.matmul)


def test_scoring_is_exact_and_leaves_everything_as_it_was() -> None:
    before = [switch.allow_tf32 for switch in SWITCHES]
    assert any(before), "there is something to switch off"
    with torch.autocast("cpu", torch.bfloat16), suppress(KeyError), HOST.scoring():
        assert not any(switch.allow_tf32 for switch in SWITCHES)
        assert not torch.is_grad_enabled()
        product = torch.ones(2, 2) @ torch.ones(2, 2)
        assert product.dtype == torch.float32
        raise KeyError
    assert [switch.allow_tf32 for switch in SWITCHES] == before
    assert torch.is_grad_enabled()


def test_a_total_is_added_up_in_order_in_double() -> None:
    """Where a sum in float, or in another order, is another number."""
    parts = [torch.tensor(x) for x in (1e8, 0.3, -1e8, 0.1)]
    expected = 0.0
    for part in parts:
        expected += float(part)
    assert total(parts) == expected
    assert total(parts) != float(torch.stack(parts).sum())
    assert total(parts) != total(parts[::-1])


# ---- a card


@pytest.mark.gpu
def test_a_cards_name_is_told_and_what_is_put_there_comes_back(cuda: Placement) -> None:
    assert cuda.text == f"cuda ({torch.cuda.get_device_name(0)})"
    array = np.random.default_rng(0).integers(0, 256, (5, 7), dtype=np.uint8)
    for give in (cuda.put, cuda.send):
        np.testing.assert_array_equal(give(array).cpu(), array)
    module = nn.Conv2d(3, 4, 3)
    cuda.move(module)
    assert placement_of(module) == cuda
    assert module.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_training_convolves_in_bf16_and_scoring_in_full_fp32(cuda: Placement) -> None:
    """1 + 2^-12 needs more bits than TF32 has; summed over 64 channels it is exact in fp32."""
    x = torch.full((1, 64, 4, 4), 1 + 2.0**-12, device=cuda.device)
    weight = torch.ones(1, 64, 1, 1, device=cuda.device)
    with cuda.training():
        assert torch.nn.functional.conv2d(x, weight).dtype == torch.bfloat16
        with cuda.scoring():
            exact = torch.nn.functional.conv2d(x, weight)
    assert exact.dtype == torch.float32
    assert torch.equal(exact, torch.full_like(exact, 64 + 2.0**-6))


# ---- memory


FAULTS = """
import resource
import torch
from hwnas.placement import HOST
keeps = {keeps}
if keeps:
    HOST.keep_memory()
for _ in range(20):
    torch.ones(20_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(20_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's")
def test_memory_that_is_kept_is_not_asked_for_again_page_by_page() -> None:
    """80 MB time and again: some 20,000 pages each time without it, next to none with it."""
    faults = {
        keeps: int(
            subprocess.run(
                [sys.executable, "-c", FAULTS.format(keeps=keeps)],
                capture_output=True, text=True, check=True,
            ).stdout
        )
        for keeps in (True, False)
    }  # fmt: skip
    assert 10 * faults[True] < faults[False]


@pytest.mark.parametrize("fault", [AttributeError, TypeError])
def test_a_c_library_without_the_option_is_left_alone(
    fault: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_: None) -> None:
        raise fault

    monkeypatch.setattr(hwnas.placement.ctypes, "CDLL", missing)
    hwnas.placement._keep_freed_memory.__wrapped__()
