"""What a precision means: its name, its bits, the grid of its activations, the kernel that runs it.

No torch here: searching needs these facts too.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property

from quant.errors import InvalidInput

FLOATS = {"fp32": 32, "tf32": 32, "fp16": 16, "bf16": 16, "fp8": 8}
"""Float precisions and the bits that each value takes in memory."""

FP8_TOP = 448.0
"""The largest finite value of e4m3, which fp8 stands for."""

LEAST_SCALE = 1e-10
"""The smallest scale; a channel of zeros stays zeros."""

_INTEGER = re.compile(r"(?:w([2-8])|pact-w([1-8]))a([2-8])")
_ACCEPTED = f"{', '.join(FLOATS)}, w<2-8>a<2-8> such as w8a8, or pact-w<1-8>a<2-8>"


@dataclass(frozen=True)
class Precision:
    """How the weights and activations of an op are represented.

    `w4a8` is what ships best: weights in 2^4 - 1 levels per output channel, a learned step for
    activations (LSQ). `pact-w4a8` has DoReFa's 2^4 weight levels per tensor and PACT's activations,
    as SPOS used them.

    >>> Precision("w4a8").weight_bits, Precision("w4a8").activation_bits
    (4, 8)
    >>> Precision("pact-w1a2").executed
    Precision(name='w8a2')
    >>> Precision("fp32").is_integer
    False
    >>> Precision("int8")
    Traceback (most recent call last):
    quant.errors.InvalidInput: 'int8' is not a precision. Accepted: fp32, tf32, fp16, bf16, fp8, \
w<2-8>a<2-8> such as w8a8, or pact-w<1-8>a<2-8>.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in FLOATS and not _INTEGER.fullmatch(self.name):
            raise InvalidInput(
                f"{self.name!r} is not a precision.",
                accepted=_ACCEPTED,
            )

    def __str__(self) -> str:
        return self.name

    @cached_property
    def is_integer(self) -> bool:
        """Whether weights and activations are quantised to integers."""
        return self.name not in FLOATS

    @cached_property
    def is_cast(self) -> bool:
        """Whether values are floats that take less than 32 bits in memory."""
        return FLOATS.get(self.name, 32) < 32

    @cached_property
    def is_fp8(self) -> bool:
        """Whether values are e4m3 codes, each tensor's with a scale."""
        return self.name == "fp8"

    @cached_property
    def weight_bits(self) -> int:
        """Bits of one weight."""
        match = _INTEGER.fullmatch(self.name)
        return int(match[1] or match[2]) if match else FLOATS[self.name]

    @cached_property
    def activation_bits(self) -> int:
        """Bits of one activation."""
        match = _INTEGER.fullmatch(self.name)
        return int(match[3]) if match else FLOATS[self.name]

    @cached_property
    def is_pact(self) -> bool:
        """Whether weights are DoReFa's and activations PACT's."""
        return self.name.startswith("pact-")

    @cached_property
    def weight_top(self) -> int:
        """The largest weight code. Those of DoReFa are odd, in half steps, and +-1 for one bit.

        >>> Precision("w4a8").weight_top, Precision("pact-w1a2").weight_top
        (7, 1)
        >>> Precision("pact-w4a4").weight_top
        15
        """
        bits = self.weight_bits
        return 2**bits - 1 if self.is_pact else weight_top(bits)

    @cached_property
    def executed(self) -> "Precision":
        """The precision whose kernels run this one, and whose table rows it shares: every integer
        weight is held in eight bits when it is multiplied.
        """
        return Precision(f"w8a{self.activation_bits}") if self.is_integer else self

    def format(self, *, signed: bool) -> "Format":
        """The format of a tensor that an op of this precision hands on."""
        return Format(f"a{self.activation_bits}" if self.is_integer else self.name, signed)


@dataclass(frozen=True)
class Format:
    """How a tensor between two ops is represented.

    `type` is a float precision or `a<bits>` for integers; `signed` is False where no value can be
    negative (after a ReLU), which decides the grid that a quantiser uses.

    >>> str(Format("a8", signed=False)), Format("a8").bits, Format("fp32").is_quantised
    ('a8+', 8, False)
    """

    type: str = "fp32"
    signed: bool = True

    def __str__(self) -> str:
        return self.type if self.signed else f"{self.type}+"

    @classmethod
    def parse(cls, text: str) -> "Format":
        """The format whose `str` is `text`."""
        return cls(text.removesuffix("+"), not text.endswith("+"))

    @cached_property
    def is_quantised(self) -> bool:
        """Whether values are integer codes with a scale."""
        return self.type not in FLOATS

    @cached_property
    def has_scale(self) -> bool:
        """Whether values are codes with a scale, integers or fp8.

        >>> [Format(name).has_scale for name in ("a8", "fp8", "fp16")]
        [True, True, False]
        """
        return self.is_quantised or self.type == "fp8"

    @cached_property
    def bits(self) -> int:
        """Bits of one value."""
        return int(self.type[1:]) if self.is_quantised else FLOATS[self.type]


@dataclass(frozen=True)
class Grid:
    """The integers that an activation can take: codes `low..high`, value = code * limit / top.

    `limit` is the learned end of the range; `top` is the code that stands for it.
    """

    low: int
    high: int
    top: int


@dataclass(frozen=True)
class Runtime:
    """What an inference runtime makes of a precision.

    `kernels` maps searched precisions to the kernel that executes them, several of one kernel
    written as `w<2-8>a8`; a precision that is not in it cannot be profiled or exported there.
    `unsigned_activations` tells whether an activation that is never negative gets all codes
    (ONNX Runtime, 255 steps) or the upper half of a signed type (TensorRT, 127 steps).
    `dense_weight_bits` is how many bits of a weight multiply exactly where many products are added.
    """

    name: str
    kernels: dict[str, str]
    unsigned_activations: bool
    dense_weight_bits: int = 8

    def kernel(self, precision: Precision) -> str:
        """The kernel that executes `precision`; raises InvalidInput where there is none.

        >>> ONNXRUNTIME.kernel(Precision("w4a8")), ONNXRUNTIME.kernel(Precision("pact-w1a2"))
        ('int8', 'int8')
        """
        for names, kernel in self.kernels.items():
            if re.fullmatch(names.replace("<", "[").replace(">", "]"), precision.name):
                return kernel
        raise InvalidInput(
            f"{self.name} has no kernel for {precision}.",
            accepted=", ".join(self.kernels),
            next_step="search other precisions for this device",
        )

    @cached_property
    def portable(self) -> "Runtime":
        """The same, with files that any CPU computes exactly.

        x86 CPUs without VNNI add two products of an unsigned and a signed byte in 16 bits, which
        saturate where a weight's code is beyond 64.
        """
        return replace(self, dense_weight_bits=7)

    @property
    def is_portable(self) -> bool:
        """Whether any CPU computes its files exactly."""
        return self == self.portable

    def layer_precision(self, precision: Precision, *, channelwise: bool) -> Precision:
        """What a layer of an op of `precision` is rounded to: a convolution of each channel alone
        adds no two products at once, any other layer has codes of at most `dense_weight_bits`.
        DoReFa's codes are odd numbers, which take a bit more.

        >>> ONNXRUNTIME.portable.layer_precision(Precision("w8a8"), channelwise=False)
        Precision(name='w7a8')
        >>> ONNXRUNTIME.portable.layer_precision(Precision("w8a8"), channelwise=True)
        Precision(name='w8a8')
        """
        most = self.dense_weight_bits - (precision.is_pact and self.dense_weight_bits < 8)
        if channelwise or not precision.is_integer or precision.weight_bits <= most:
            return precision
        scheme = "pact-" if precision.is_pact else ""
        return Precision(f"{scheme}w{most}a{precision.activation_bits}")

    def grid(self, bits: int, *, signed: bool) -> Grid:
        """The activation grid of `bits` bits.

        >>> ONNXRUNTIME.grid(8, signed=False), TENSORRT.grid(8, signed=False)
        (Grid(low=0, high=255, top=255), Grid(low=0, high=127, top=127))
        >>> ONNXRUNTIME.grid(8, signed=True)
        Grid(low=-128, high=127, top=128)
        """
        if signed:
            return Grid(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, 2 ** (bits - 1))
        top = 2**bits - 1 if self.unsigned_activations else 2 ** (bits - 1) - 1
        return Grid(0, top, top)


ONNXRUNTIME = Runtime(
    "onnxruntime",
    {"fp32": "fp32", "w<2-8>a<2-8>": "int8", "pact-w<1-7>a<2-8>": "int8"},
    unsigned_activations=True,
)
TENSORRT = Runtime(
    "tensorrt",
    {name: name for name in FLOATS} | {"w<2-8>a<2-8>": "int8"},
    unsigned_activations=False,
)
TORCH = Runtime(
    "pytorch",
    {"fp32": "fp32", "tf32": "tf32", "fp16": "fp16", "bf16": "bf16"},
    unsigned_activations=False,
)
"""PyTorch on an NVIDIA GPU: it has no integer convolution there."""


def weight_top(bits: int) -> int:
    """The largest weight code: symmetric, narrow range, 2^bits - 1 levels.

    >>> weight_top(8), weight_top(2)
    (127, 1)
    """
    return int(2 ** (bits - 1)) - 1
