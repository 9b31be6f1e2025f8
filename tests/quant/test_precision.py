"""Precisions, formats and grids: what each name means, and what is refused."""

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.errors import InvalidInput
from quant.precision import (
    FLOATS,
    ONNXRUNTIME,
    TENSORRT,
    TORCH,
    Format,
    Precision,
    Runtime,
    weight_top,
)

WIDTHS = range(2, 9)
INTEGERS = [f"w{w}a{a}" for w, a in itertools.product(WIDTHS, WIDTHS)]


@pytest.mark.parametrize("name", INTEGERS)
def test_an_integer_precision_has_the_bits_of_its_name(name: str) -> None:
    precision = Precision(name)
    assert precision.is_integer
    assert f"w{precision.weight_bits}a{precision.activation_bits}" == name == str(precision)


@pytest.mark.parametrize(
    ("name", "bits"), [("fp32", 32), ("tf32", 32), ("fp16", 16), ("bf16", 16), ("fp8", 8)]
)
def test_a_float_precision_keeps_weights_and_activations_alike(name: str, bits: int) -> None:
    precision = Precision(name)
    assert not precision.is_integer
    assert (precision.weight_bits, precision.activation_bits) == (bits, bits)


@pytest.mark.parametrize(
    "name",
    ["", "int8", "FP32", "w8", "a8", "w8a9", "w9a8", "w0a8", "w8a0", "w16a16", "w8a8 ", "w8a8\n"],
)
def test_another_name_is_refused_with_the_accepted_ones(name: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        Precision(name)
    message = str(caught.value)
    assert repr(name) in message
    assert all(accepted in message for accepted in [*FLOATS, "w8a8"])


@given(st.from_regex(r"(w[0-9]{1,2}a[0-9]{1,2}|[a-z]{0,2}[0-9]{0,2})\s?", fullmatch=True))
def test_no_text_is_a_precision_unless_it_reads_back(text: str) -> None:
    try:
        precision = Precision(text)
    except InvalidInput:
        return
    bits = f"w{precision.weight_bits}a{precision.activation_bits}"
    assert text in FLOATS or text == bits


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("runtime", [ONNXRUNTIME, TENSORRT], ids=lambda r: r.name)
def test_every_accepted_precision_has_a_weight_code_and_an_activation_code_besides_zero(
    bits: int, runtime: Runtime
) -> None:
    try:
        precision = Precision(f"w{bits}a{bits}")
    except InvalidInput:
        return
    assert weight_top(precision.weight_bits) >= 1
    for signed in (True, False):
        grid = runtime.grid(precision.activation_bits, signed=signed)
        assert grid.high >= 1, grid
        assert grid.top >= 1, grid


def test_equal_names_are_equal_precisions_and_share_a_hash() -> None:
    assert {Precision("w4a8"), Precision("w4a8"), Precision("w8a4")} == {
        Precision("w8a4"),
        Precision("w4a8"),
    }


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("kind", [*FLOATS, *(f"a{bits}" for bits in range(1, 9))])
def test_a_format_reads_back_from_its_text(kind: str, signed: bool) -> None:
    written = Format(kind, signed)
    read = Format.parse(str(written))
    assert (read.type, read.signed) == (kind, signed)


def test_all_formats_have_different_texts() -> None:
    kinds = [*FLOATS, *(f"a{bits}" for bits in range(1, 9))]
    texts = {str(Format(kind, signed)) for kind in kinds for signed in (True, False)}
    assert len(texts) == 2 * len(kinds)


def test_a_format_is_quantised_exactly_if_its_type_is_codes() -> None:
    assert Format("a4").is_quantised
    assert Format("a4").bits == 4
    for name, bits in FLOATS.items():
        assert not Format(name).is_quantised
        assert Format(name).bits == bits


def test_an_integer_op_hands_on_activation_bits_and_a_float_op_its_own_type() -> None:
    assert Precision("w4a8").format(signed=False) == Format("a8", signed=False)
    assert Precision("w8a3").format(signed=True) == Format("a3", signed=True)
    assert Precision("fp16").format(signed=True) == Format("fp16", signed=True)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("runtime", [ONNXRUNTIME, TENSORRT], ids=lambda r: r.name)
def test_a_signed_grid_is_the_whole_of_twos_complement(runtime: Runtime, bits: int) -> None:
    grid = runtime.grid(bits, signed=True)
    assert grid.high - grid.low + 1 == 2**bits
    assert grid.high + grid.low == -1
    assert grid.top == -grid.low


def test_unsigned_eight_bits_have_255_steps_on_onnxruntime_and_127_on_tensorrt() -> None:
    ort, trt = (runtime.grid(8, signed=False) for runtime in (ONNXRUNTIME, TENSORRT))
    assert (ort.low, ort.high, ort.top) == (0, 255, 255)
    assert (trt.low, trt.high, trt.top) == (0, 127, 127)


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_unsigned_grid_of_tensorrt_is_the_upper_half_of_its_signed_one(bits: int) -> None:
    unsigned, signed = (TENSORRT.grid(bits, signed=sign) for sign in (False, True))
    assert (unsigned.low, unsigned.high) == (0, signed.high)
    assert ONNXRUNTIME.grid(bits, signed=False).high == 2 * unsigned.high + 1


def test_a_known_precision_has_the_kernel_that_runs_it() -> None:
    assert ONNXRUNTIME.kernel(Precision("w8a8")) == "int8" == TENSORRT.kernel(Precision("w8a8"))
    assert [TENSORRT.kernel(Precision(name)) for name in FLOATS] == list(FLOATS)


@pytest.mark.parametrize(
    ("runtime", "name"),
    [(ONNXRUNTIME, "fp8"), (TENSORRT, "pact-w4a4"), (TORCH, "fp8")],
    ids=lambda x: str(getattr(x, "name", x)),
)
def test_a_precision_without_a_kernel_is_refused_with_the_runtimes_own(
    runtime: Runtime, name: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        runtime.kernel(Precision(name))
    message = str(caught.value)
    assert name in message
    assert f"Accepted: {', '.join(runtime.kernels)}." in message


def test_onnxruntime_runs_every_integer_precision_whose_codes_fit_a_signed_byte() -> None:
    """By brute force over all names; DoReFa's codes at eight bits reach +-255."""
    for name in [*FLOATS, *INTEGERS, *(f"pact-{name}" for name in [*INTEGERS, "w1a2", "w1a8"])]:
        precision = Precision(name)
        fits = precision.is_integer and precision.weight_top <= 127
        if fits or name == "fp32":
            assert ONNXRUNTIME.kernel(precision) == ("int8" if fits else "fp32")
            continue
        with pytest.raises(InvalidInput, match=name) as caught:
            ONNXRUNTIME.kernel(precision)
        assert caught.value.accepted == "fp32, w<2-8>a<2-8>, pact-w<1-7>a<2-8>"
        assert caught.value.next_step


@pytest.mark.parametrize("runtime", [ONNXRUNTIME, TENSORRT], ids=lambda r: r.name)
def test_every_name_of_a_kernel_is_a_precision_at_its_ends(runtime: Runtime) -> None:
    for names, kernel in runtime.kernels.items():
        for end in (0, 1):
            name = re.sub(r"<(\d)-(\d)>", lambda found, end=end: found[1 + end], names)
            assert runtime.kernel(Precision(name)) == kernel


@pytest.mark.parametrize("bits", range(1, 8))
def test_dorefa_has_two_to_the_bits_levels_in_odd_codes(bits: int) -> None:
    top = Precision(f"pact-w{bits}a8").weight_top
    assert len(range(-top, top + 1, 2)) == 2**bits


@pytest.mark.parametrize("bits", WIDTHS)
def test_weight_codes_are_symmetric_with_one_level_fewer_than_the_bits_hold(bits: int) -> None:
    levels = range(-weight_top(bits), weight_top(bits) + 1)
    assert len(levels) == 2**bits - 1
