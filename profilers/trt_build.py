"""Engines of TensorRT, built: of `tensorrt` (10.13 or later) or `tensorrt_rtx`; needs no GPU.

One code path for both. A graph's types are its precision (`profilers.graphs`), so networks are
strongly typed and the builder gets no flag but whether fp32 may run as tf32. TensorRT for RTX
builds for named compute capabilities, without a GPU; the full package for the card that it finds.
"""

import functools
import importlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from latency_tables.files import write_bytes
from latency_tables.ops import Layer, OpSpec
from profilers.cuda import WITHOUT, card, out_of_memory
from profilers.graphs import read_ops, runs_tf32
from quant.errors import HwnasError, InvalidInput, MissingDependency
from quant.precision import TENSORRT

RTX = "tensorrt_rtx"
OLDEST = {"tensorrt": (10, 13), RTX: (1, 4)}
"""The packages in the order in which they are tried, each from this release on."""

TIMINGS = 8
"""How often the builder times a tactic, as trtexec does."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of an engine: its inputs' and outputs' types, and the ONNX nodes that it runs."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """A built engine; `kernels` is empty where the runtime tells them only on a card."""

    plan: bytes
    kernels: tuple[Kernel, ...]


@functools.cache
def package() -> ModuleType:
    """TensorRT; raises MissingDependency where neither package can be used."""
    reasons = []
    for name, oldest in OLDEST.items():
        try:
            found = importlib.import_module(name)
        except (ImportError, OSError) as error:  # OSError: of a library that the package loads
            reasons.append(f"{name}: {error}")
            continue
        if tuple(map(int, found.__version__.split(".")[:2])) >= oldest:
            return found
        reasons.append(f"{name}: {found.__version__} is too old")
    raise MissingDependency(
        f"TensorRT is not installed ({'; '.join(reasons)}).",
        accepted=", ".join(f"{name} {x}.{y} or later" for name, (x, y) in OLDEST.items()),
        next_step="make setup DEVICE=gpu, or use --device gpu-torch, or --device cpu",
    )


def version() -> str:
    """The package with its version, such as `tensorrt_rtx 1.7.1.116`."""
    trt = package()
    return f"{trt.__name__} {trt.__version__}"


def capabilities() -> list[str]:
    """The compute capabilities that engines can be built for without such a card."""
    trt = package()
    if not hasattr(trt, "ComputeCapability"):
        return []
    return [name.lower() for name in trt.ComputeCapability.__members__ if name.startswith("SM")]


# ---- building


def build(
    model: onnx.ModelProto,
    *,
    batch: int = 1,
    batches: tuple[int, int, int] | None = None,
    targets: Sequence[str] = (),
    cache: Path | None = None,
) -> Engine:
    """The engine of an emitted graph for `batch` images, or for `batches`: the fewest, the usual
    number and the most.

    `targets` name compute capabilities, such as sm89; without any it is built for this machine's
    card. `cache` is a file of the timings that the builder takes. Raises InvalidInput where the
    graph or the target cannot be had, MissingDependency where a card is needed and not there.
    """
    trt, log = package(), logger()
    targets = named_targets(targets)
    log.lines.clear()
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # where the full runtime finds no driver
        raise refusal("starts no builder") from error
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        raise _unread(parser.get_error(0))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    config.max_aux_streams = 0
    config.avg_timing_iterations = TIMINGS
    (config.set_flag if runs_tf32(read_ops(model)) else config.clear_flag)(trt.BuilderFlag.TF32)
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [(count, *tuple(tensor.shape)[1:]) for count in batches or (batch,) * 3]
        profile.set_shape(tensor.name, *shapes)
    config.add_optimization_profile(profile)
    if hasattr(config, "num_compute_capabilities"):
        _aim_rtx(config, targets or _own_target())
    if cache is not None and trt.__name__ != RTX:  # whose builder times nothing
        known = cache.read_bytes() if cache.exists() else b""
        config.set_timing_cache(config.create_timing_cache(known), False)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refusal("builds no engine of this graph")
    if cache is not None and trt.__name__ != RTX:
        write_bytes(cache, bytes(config.get_timing_cache().serialize()))
    return Engine(bytes(plan), kernels_of("\n".join(log.texts())))


def _unread(error: Any) -> InvalidInput:
    """The error for a graph, from the parser's first complaint."""
    where = f" at {error.node_operator()} {error.node_name()}" if error.node_name() else ""
    return InvalidInput(
        f"{version()} does not read the graph{where}: {error.code().name}, "
        f"{_shortened(error.desc())}.",
        next_step="search other precisions, or another space, for this device",
    )


def named_targets(names: Sequence[str]) -> list[str]:
    """Compute capabilities as they are written, each once; raises InvalidInput for one that no
    engine can be built for here.
    """
    known = capabilities()
    for name in names:
        if name.lower() not in known:
            raise InvalidInput(
                f"{version()} builds no engine for {name!r}.",
                accepted=", ".join(known) or "this machine's own card",
                next_step="name another --compute-capability, or none for this machine's card"
                if known
                else "pip install 'hwnas[gpu-build]', whose package builds for other cards",
            )
    return list(dict.fromkeys(name.lower() for name in names))


def _aim_rtx(config: Any, targets: Sequence[str]) -> None:
    """Have TensorRT for RTX build for compute capabilities."""
    trt = package()
    config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, name.upper()), index)


def _own_target() -> list[str]:
    """This machine's card, by name where TensorRT for RTX names it."""
    return [card().sm if card().sm in capabilities() else "current"]


_LAYER = re.compile(
    r"^Name: (?P<name>.*?), LayerType: (?P<kind>.*?), Inputs: \[(?P<inputs>.*?)\], "
    r"(?:Constants: \[.*?\], )?Outputs: \[(?P<outputs>.*?)\], TacticName.*?Metadata: (?P<nodes>.*)$"
)
_DATATYPE = re.compile(r"Datatype: (\w+)")
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def kernels_of(log: str) -> tuple[Kernel, ...]:
    """The kernels that a builder's verbose log lists."""
    found = [_LAYER.match(line) for line in log.split("\n")]
    return tuple(
        Kernel(
            each["name"],
            each["kind"],
            tuple(_DATATYPE.findall(each["inputs"])),
            tuple(_DATATYPE.findall(each["outputs"])),
            tuple(_NODE.findall(each["nodes"])),
        )
        for each in found
        if each
    )


def wrong_kernels(ops: Sequence[OpSpec], kernels: Sequence[Kernel]) -> str:
    """The first weighted layer of an integer or fp8 op that an engine does not run on such codes,
    though there are kernels for it; "" where there is none, or the engine does not tell.
    """
    for number, op in enumerate(ops):
        codes = TENSORRT.kernel(op.precision)
        for index, layer in enumerate(op.layers):
            if not (layer.has_weights and _has_kernels(codes, layer)):
                continue
            kind = "Gemm" if layer.kind == "linear" else "Conv"
            node = f"op{number:03d}.{index}.{layer.role or layer.function or layer.kind}.{kind}"
            mine = [kernel for kernel in kernels if kernel.name.startswith(node)]
            if mine and not any(codes in held.lower() for k in mine for held in k.inputs):
                return f"{node} takes {', '.join(mine[0].inputs)}"
    return ""


def _has_kernels(codes: str, layer: Layer) -> bool:
    """Whether every card that has the codes multiplies those of a layer.

    Windows over 5 x 5, and convolutions in groups, have no fp8 kernels everywhere: there they run
    on the floats that the codes stand for, which changes no value and is timed as it is.
    """
    return codes == "int8" or (codes == "fp8" and layer.kernel <= 5 and layer.groups == 1)


# ---- what the runtime says


@functools.cache
def logger() -> Any:
    """The one logger of the process: the first that TensorRT gets is the one that it keeps."""
    trt = package()

    class Log(trt.ILogger):  # type: ignore[name-defined, misc]
        """Keeps what is said, for errors and for the list of kernels."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[tuple[int, str]] = []

        def log(self, severity: Any, text: str) -> None:
            self.lines.append((int(severity), text))

        def texts(self, worst: int = 0, least: int = 4) -> list[str]:
            """What was said at severities from `worst` to `least` (0: internal error, 4: all)."""
            return [text for severity, text in self.lines if worst <= severity <= least]

    return Log()


def refusal(what: str) -> HwnasError:
    """The error for something that TensorRT does not do, from what it logged."""
    said = " ".join(logger().texts(least=1))
    if lacking := re.search(r"Cannot compile .*?(?=\. In |$)", said, re.DOTALL):
        return InvalidInput(
            f"{version()} has no kernels for this graph on the target: {_shortened(lacking[0])}.",
            accepted="sm89 or newer for fp8; sm80 or newer for bf16, fp32 and w8a8; sm75 for fp16",
            next_step="name another --compute-capability, or search other precisions",
        )
    if re.search(r"CHECK\(dtype|cannot be quantized by input", said):
        return InvalidInput(
            f"{version()} builds no integer networks: {_shortened(said)}.",
            accepted=f"{RTX} 1.7 or later for w8a8",
            next_step="pip install 'hwnas[gpu-build]', or search other precisions",
        )
    if re.search(
        r"driver version is insufficient|no CUDA-capable device|"
        r"(cudaError|CUDA initialization failure with error:) ?(35|100)\b",
        said,
    ):
        return MissingDependency(
            f"{version()} finds no NVIDIA driver, or one that is too old for it.",
            accepted="an NVIDIA GPU with a driver as new as the package",
            next_step=WITHOUT,
        )
    if re.search(r"out of memory|OutOfMemory|cudaError ?2\b", said, re.IGNORECASE):
        return out_of_memory()
    if re.search(r"[Uu]nsupported (SM|compute|GPU)|not supported on this (GPU|device)", said):
        return unsupported()
    return HwnasError(
        f"{version()} {what}: {_shortened(said) or 'it gives no reason'}.",
        next_step="use --device gpu-torch, or search other precisions for this device",
    )


def _shortened(said: str) -> str:
    """What was said, on one line and without the full stop, at most 300 characters of it."""
    return " ".join(said.split())[:300].rstrip(". ")


def unsupported(what: str = "does not run") -> MissingDependency:
    """The error for a card that this TensorRT does not run on."""
    return MissingDependency(
        f"{version()} {what} on the {card().name} ({card().sm}).",
        accepted=", ".join(capabilities()) or "a newer card, or an older package",
        next_step="pip install tensorrt (for data-centre GPUs), or use --device gpu-torch",
    )


def loaded(plan: bytes) -> Any:
    """The engine of a plan; raises InvalidInput with the reason where it does not load here."""
    trt, log = package(), logger()
    log.lines.clear()
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is not None:
        return engine
    said = " ".join(log.texts(least=1))
    if re.search(r"out of memory|OutOfMemory", said, re.IGNORECASE):
        raise out_of_memory()
    causes = _diagnosed(runtime, plan) or _shortened(said) or "it gives no reason"
    raise InvalidInput(
        f"{version()} does not load this engine on the {card().name} ({card().sm}): {causes}. An "
        "engine runs on the cards and with the package that it was built for.",
        next_step="build it again here: hwnas export --format tensorrt",
    )


def _diagnosed(runtime: Any, plan: bytes) -> str:
    """Why TensorRT for RTX finds a plan not valid here; "" where it does not say.

    Raises MissingDependency for a card that it never runs on, InvalidInput where memory is short.
    """
    trt = package()
    if not hasattr(runtime, "get_engine_validity"):
        return ""
    _, bits = runtime.get_engine_validity(plan)
    causes = trt.EngineInvalidityDiagnostics.__members__.items()
    told = [name.lower().replace("_", " ") for name, bit in causes if int(bits) & int(bit)]
    if "unsupported cc" in told and card().sm not in capabilities():
        raise unsupported()
    if "insufficient gpu memory" in told:
        raise out_of_memory()
    return ", ".join(told)


def inspected(told: str) -> tuple[Kernel, ...]:
    """The kernels of an engine inspector's JSON; names of its fields differ by version."""
    return tuple(
        Kernel(
            layer.get("Name", ""),
            layer.get("LayerType", ""),
            _types(layer.get("Inputs", [])),
            _types(layer.get("Outputs", [])),
            tuple(_NODE.findall(layer.get("Metadata", ""))),
        )
        for layer in json.loads(told).get("Layers", [])
        if isinstance(layer, dict)
    )


def _types(tensors: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    return tuple(str(t.get("Datatype") or t.get("Format/Datatype", "")) for t in tensors)
