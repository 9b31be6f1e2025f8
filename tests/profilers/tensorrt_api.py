"""Writes `tensorrt_api.json`: the public names of the classes that a backend uses, by release.

    pip download --no-deps tensorrt-cu13-bindings==11.4.0.106     # and the other releases
    python tests/profilers/tensorrt_api.py *.whl

Takes wheels of the bindings, of this Python's version, and needs `cc`. The bindings are imported
beside empty libraries of the names that they are linked with: classes, members and signatures are
registered by the bindings themselves, so they are the real ones, but nothing can be built.
Imports the standard library alone.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

Description = dict[str, dict[str, Any]]

RECORD = Path(__file__).with_suffix(".json")
MODULE = "the module"
CLASSES = (
    "Builder", "BuilderFlag", "ComputeCapability", "DataType", "EngineInspector",
    "EngineInvalidityDiagnostics", "EngineValidity", "ErrorCode", "HardwareCompatibilityLevel",
    "IBuilderConfig", "ICudaEngine", "IExecutionContext", "IHostMemory", "ILayer", "ILogger",
    "INetworkDefinition", "IOptimizationProfile", "IProfiler", "IRuntimeConfig", "ITensor",
    "ITimingCache", "LayerInformationFormat", "Logger", "MemoryPoolType",
    "NetworkDefinitionCreationFlag", "OnnxParser", "OnnxParserFlag", "ParserError",
    "PreviewFeature", "ProfilingVerbosity", "Runtime", "TacticSource", "TensorFormat",
    "TensorIOMode",
)  # fmt: skip
LIBRARIES = (
    "libnvinfer.so.10", "libnvinfer_plugin.so.10", "libnvonnxparser.so.10",
    "libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11",
    "libtensorrt_rtx.so.1", "libtensorrt_onnxparser_rtx.so.1",
)  # fmt: skip
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry", "getNvOnnxParserVersion", "getPluginRegistry",
    "initLibNvInferPlugins",
)  # fmt: skip


def public(holder: object) -> list[str]:
    """The names of a module or class that are neither private nor modules themselves."""
    return [
        name
        for name in sorted(dir(holder))
        if not name.startswith("_") and not isinstance(getattr(holder, name), ModuleType)
    ]


def call(method: object, name: str) -> dict[str, Any] | None:
    """What a method takes over all its overloads, and the class that it returns, as pybind11
    wrote them into its docstring; None for what is no method."""
    pattern = rf"^(?:\d+\. )?{name}\(self: [\w.:]+(.*)\) -> ([\w.:]+)"
    overloads = re.findall(pattern, method.__doc__ or "", re.MULTILINE)
    if not overloads:
        return None
    parameters = dict.fromkeys(p for text, _ in overloads for p in re.findall(r", (\w+): ", text))
    returned = re.split(r"\.|::", overloads[0][1])[-1]
    return {"parameters": list(parameters), "returns": returned.replace("IParserE", "ParserE")}


def describe(trt: ModuleType) -> Description:
    """Names and calls of the classes that a package has, under the classes' names."""
    held = {name: getattr(trt, name) for name in CLASSES if hasattr(trt, name)}
    calls = {
        owner: {name: found for name in public(kind) if (found := call(getattr(kind, name), name))}
        for owner, kind in held.items()
    }
    names = {MODULE: public(trt)} | {owner: public(kind) for owner, kind in held.items()}
    return {"names": names, "calls": {owner: found for owner, found in calls.items() if found}}


def merged(descriptions: Mapping[str, Description]) -> dict[str, Any]:
    """One record of several releases: what all of them have, and who has the rest.

    A call takes the parameters that it has in every release with its method.
    """
    everywhere: dict[str, list[str]] = {}
    somewhere: dict[str, dict[str, list[str]]] = {}
    calls: dict[str, dict[str, Any]] = {}
    for owner in (MODULE, *CLASSES):
        holders = {r: d["names"].get(owner, []) for r, d in descriptions.items()}
        for name in sorted(set().union(*holders.values())):
            having = [release for release, names in holders.items() if name in names]
            if len(having) == len(holders):
                everywhere.setdefault(owner, []).append(name)
            else:
                somewhere.setdefault(owner, {})[name] = having
            taken = [descriptions[r]["calls"].get(owner, {}).get(name) for r in having]
            if all(taken):
                calls.setdefault(owner, {})[name] = common([call for call in taken if call])
    return {
        "releases": list(descriptions),
        "everywhere": everywhere,
        "somewhere": somewhere,
        "calls": calls,
    }


def common(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """The parameters that all of several calls take, and what the last returns."""
    shared = set.intersection(*(set(call["parameters"]) for call in calls))
    return calls[-1] | {"parameters": [p for p in calls[-1]["parameters"] if p in shared]}


def write_empty_libraries(folder: Path) -> None:
    """Shared objects that satisfy the linker and do nothing."""
    source = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in SYMBOLS)
    for library in LIBRARIES:
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-x", "c", "-", "-o"]
        subprocess.run([*command, str(folder / library)], input=source.encode(), check=True)


def read(wheel: Path) -> tuple[str, Description]:
    """A release's name and what is in it, found out in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        write_empty_libraries(Path(folder))
        zipfile.ZipFile(wheel).extractall(folder)
        (bindings,) = Path(folder).glob("*_bindings")
        told = subprocess.run(
            [sys.executable, __file__, "--describe", bindings.name],
            env=os.environ | {"PYTHONPATH": folder, "LD_LIBRARY_PATH": folder},
            capture_output=True,
            check=True,
        )
    version = wheel.name.split("-")[1]
    return f"{bindings.name.removesuffix('_bindings')} {version}", json.loads(told.stdout)


def main(arguments: list[str]) -> None:
    """`--describe MODULE` tells one package to standard output; else wheels become the record."""
    if arguments[0] == "--describe":
        sys.stdout.write(json.dumps(describe(importlib.import_module(arguments[1]))))
        return
    descriptions = dict(read(Path(wheel)) for wheel in arguments)
    ordered = sorted(descriptions, key=lambda r: (r.split()[0], *map(int, re.findall(r"\d+", r))))
    record = merged({release: descriptions[release] for release in ordered})
    RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
