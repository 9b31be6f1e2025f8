"""The flags of the commands: each written once, with its help and its completion."""

from pathlib import Path
from typing import Annotated, Any

import typer

REQUEST = (
    "space", "precisions", "data", "image_size", "device", "threads", "batch", "portable", "method",
    "recipe", "seed",
)  # fmt: skip
"""The flags that make a run what it is."""


def _names(*names: str) -> Any:
    return lambda: list(names)


_LIMITS, _WHAT, _WHERE, _TOLD = "Limits", "What is searched", "Where things are kept", "Output"
_ELSEWHERE = "Another machine"

Space = Annotated[
    str | None,
    typer.Option(
        help="mobile-tiny, shufflenet-tiny, resnet-tiny (32 px), mobile, shufflenet, resnet18, "
        "resnet34 (224 px), or path.py:function. (default: mobile-tiny)",
        rich_help_panel=_WHAT,
        autocompletion=_names(
            "mobile-tiny",
            "mobile",
            "shufflenet-tiny",
            "shufflenet",
            "resnet-tiny",
            "resnet18",
            "resnet34",
        ),
    ),
]
Precisions = Annotated[
    str | None,
    typer.Option(
        metavar="NAMES",
        help="What blocks choose from, as fp16,w8a8. (default: the space's own)",
        rich_help_panel=_WHAT,
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, FILE.npz, folder:DIR, fashion-mnist:DIR, torchvision:NAME, or to profile "
        "before there are images none:CLASSES. (default: digits)",
        rich_help_panel=_WHAT,
    ),
]
ImageSize = Annotated[
    int | None,
    typer.Option(
        help="Side of the images in pixels. (default: arrays their own, pictures the space's)",
        min=4,
        rich_help_panel=_WHAT,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, gpu (TensorRT), gpu-torch (PyTorch) or simulated. (default: cpu)",
        rich_help_panel=_WHAT,
        autocompletion=_names("cpu", "gpu", "gpu-torch", "simulated"),
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(help="Threads of the runtime. (default: 1)", min=1, rich_help_panel=_WHAT),
]
Batch = Annotated[
    int | None, typer.Option(help="Images a call. (default: 1)", min=1, rich_help_panel=_WHAT)
]
Portable = Annotated[
    bool | None,
    typer.Option(
        "--portable",
        help="Files that are exact on any CPU: dense layers have weights of 7 bits. (default: "
        "only where this CPU needs it)",
        rich_help_panel=_WHAT,
    ),
]
Method = Annotated[
    str | None,
    typer.Option(
        help="The search system. (default: spos)",
        rich_help_panel=_WHAT,
        autocompletion=_names("spos"),
    ),
]
Recipe = Annotated[
    str | None,
    typer.Option(
        help="How much is trained and searched: quick, standard, thorough, or smoke to try the "
        "path. (default: quick for digits, else standard)",
        rich_help_panel=_WHAT,
        autocompletion=_names("quick", "standard", "thorough", "smoke"),
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        help="The seed of everything random. (default: 0)",
        min=0,
        max=2**63 - 1,
        rich_help_panel=_WHAT,
    ),
]
TrainOn = Annotated[
    str | None,
    typer.Option(
        help="Where weights are trained and scored, cpu or cuda; no part of what a run is. "
        "(default: cuda where PyTorch can use it)",
        rich_help_panel=_WHERE,
        autocompletion=_names("cpu", "cuda"),
    ),
]
Fix = Annotated[
    list[str] | None,
    typer.Option(
        metavar="OPTION=RESULT",
        help="Leave an option as a result has it and search the others: block=RESULT; any number. "
        "RESULT is its folder, or its architecture.json.",
        rich_help_panel=_WHAT,
    ),
]
ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="A YAML file of these flags; flags win.", rich_help_panel=_WHERE),
]
Tables = Annotated[
    Path | None,
    typer.Option(
        help="Folder of latency tables. (default: $HWNAS_HOME/tables, else ./tables)",
        rich_help_panel=_WHERE,
    ),
]
RunPath = Annotated[
    Path | None,
    typer.Option(
        "--run",
        help="A run directory. (default: the newest under ./runs that matches)",
        rich_help_panel=_WHERE,
    ),
]
Bundle = Annotated[
    Path | None,
    typer.Option(
        help="Measure nothing: write a folder to be measured on another machine.",
        rich_help_panel=_ELSEWHERE,
    ),
]
FromBundle = Annotated[
    Path | None,
    typer.Option(
        help="Measure nothing: make a table of what another machine measured (result.jsonl, or "
        "the folder with it).",
        rich_help_panel=_ELSEWHERE,
    ),
]
Capability = Annotated[
    list[str] | None,
    typer.Option(
        "--compute-capability",
        metavar="SM",
        help="With --format tensorrt: the card to build for, as sm89; any number. (default: this "
        "machine's)",
        rich_help_panel=_ELSEWHERE,
    ),
]
TableName = Annotated[
    str | None,
    typer.Option(
        "--name",
        help="With --from-bundle: how the table's file begins.",
        rich_help_panel=_ELSEWHERE,
    ),
]
AsJson = Annotated[
    bool, typer.Option("--json", help="One JSON object on standard output.", rich_help_panel=_TOLD)
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Results and errors only.", rich_help_panel=_TOLD)
]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Tell every stage.", rich_help_panel=_TOLD)
]


def _limit(text: str) -> Any:
    return typer.Option(help=text, rich_help_panel=_LIMITS)


LatencyMs = Annotated[
    list[str] | None,
    typer.Option(
        metavar="[DEVICE=]MS",
        help="Latency on the device, in milliseconds; once for each device: cpu=3.",
        rich_help_panel=_LIMITS,
    ),
]
Percentile = Annotated[
    int | None,
    typer.Option(
        help="Hold this percentile of the calls under --latency-ms: 50, 90 or 95. (default: 50)",
        rich_help_panel=_LIMITS,
    ),
]
LimitFraction = Annotated[
    float | None,
    typer.Option(
        help="Instead of --latency-ms: this far from the smallest reachable bound to the largest.",
        min=0,
        max=1,
        rich_help_panel=_LIMITS,
    ),
]
MaxParams = Annotated[float | None, _limit("Parameters.")]
MaxMacs = Annotated[float | None, _limit("Multiply-accumulates an image.")]
MaxSizeMb = Annotated[float | None, _limit("The file as shipped, in megabytes of 10^6 bytes.")]
MaxBitops = Annotated[
    float | None, _limit("MACs x weight bits x input bits of all layers; fp32 is 32 x 32.")
]
MaxActivationMb = Annotated[
    float | None, _limit("Peak activation memory of an image, in 10^6 bytes.")
]
