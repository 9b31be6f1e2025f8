"""The commands: parse, call one function of the stages, print."""

import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

import hwnas
from hwnas.flags import (
    AsJson,
    Batch,
    Bundle,
    Capability,
    ConfigFile,
    Data,
    Device,
    Fix,
    FromBundle,
    ImageSize,
    LatencyMs,
    LimitFraction,
    MaxActivationMb,
    MaxBitops,
    MaxMacs,
    MaxParams,
    MaxSizeMb,
    Method,
    Percentile,
    Portable,
    Precisions,
    Quiet,
    Recipe,
    RunPath,
    Seed,
    Space,
    TableName,
    Tables,
    Threads,
    TrainOn,
    Verbose,
)  # fmt: skip
from hwnas.opening import (
    announce_feasibility,
    announce_noise,
    announce_profile,
    announce_recipe,
    check_bundle,
    check_format,
    is_latency,
    latency_limits,
    opened_job,
    opened_limits,
    opened_result,
    tell_range,
)
from hwnas.screen import (
    Rows,
    Screen,
    as_rows,
    command,
    to_standard_output,
    unread,
)
from hwnas.table_commands import tables_app
from quant.errors import InvalidInput

if TYPE_CHECKING:  # loaded when a command uses it (see hwnas/__init__.py): help must be quick
    import hwnas.bundle
    import hwnas.engines
    import hwnas.listing
    import hwnas.predict
    import hwnas.run

app = typer.Typer(
    name="hwnas",
    help="Find the most accurate network under hard limits, measured on your device.",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(tables_app, name="tables")

_UsageError: Any = typer.BadParameter.__bases__[0]
"""What the option parser raises; typer has no public name for it."""


@app.command()
def profile(
    space: Space = None,
    precisions: Precisions = None,
    data: Data = None,
    image_size: ImageSize = None,
    device: Device = None,
    threads: Threads = None,
    batch: Batch = None,
    recipe: Recipe = None,
    config: ConfigFile = None,
    tables: Tables = None,
    bundle: Bundle = None,
    from_bundle: FromBundle = None,
    name: TableName = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure every op of a space on this device, and calibrate on whole networks.

    With --bundle and --from-bundle another machine measures, which needs no hwnas.

    Example: hwnas profile --device cpu --threads 1
    """
    with command(locals()) as screen, opened_job(locals(), screen) as (job, _):
        check_bundle(bundle, from_bundle, name)
        if bundle is not None:
            written = hwnas.bundle.write(job, bundle)
            screen.done(asdict(written), _bundle_rows(written))
            return
        if from_bundle is not None:
            taken = hwnas.bundle.take(job, from_bundle, str(name))
            path, table, model, found = taken.path, taken.table, taken.model, taken.range
        else:
            announce_profile(job, hwnas.run.plan(job), screen)
            path, table, model, found = (
                job.table_path, job.table, job.model, job.latency_range()
            )  # fmt: skip
        quality = model.quality
        announce_noise(job.space, table, path, screen)
        screen.done(
            {
                "table": str(path),
                "rows": len(table.rows),
                "unstable_rows": sum(not row.stable for row in table.rows.values()),
                "quality": asdict(quality),
                "upper_ratio": model.upper_ratio,
                "feasible_min": {"latency_ms": found.smallest},
                "feasible_max": {"latency_ms": found.largest},
            },
            [
                ("table", str(path)),
                ("rows", str(len(table.rows))),
                ("error on unseen networks", f"{quality.mean_error:.1%} mean, "
                                             f"{quality.worst_error:.1%} worst"),
                ("rank correlation (tau)", f"{quality.tau:.3f}"),
                ("bound", f"{model.upper_ratio:.3f} x prediction, holds for "
                          f"{quality.coverage:.0%} of {quality.networks} unseen networks"),
                ("reachable", f"{found.smallest:.4g} to {found.largest:.4g} ms (upper bounds)"),
            ],
        )  # fmt: skip


@app.command()
def train(
    space: Space = None,
    precisions: Precisions = None,
    data: Data = None,
    image_size: ImageSize = None,
    device: Device = None,
    threads: Threads = None,
    batch: Batch = None,
    portable: Portable = None,
    method: Method = None,
    recipe: Recipe = None,
    seed: Seed = None,
    config: ConfigFile = None,
    tables: Tables = None,
    run: RunPath = None,
    train_on: TrainOn = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the supernet of a run; it goes on where it stopped.

    Example: hwnas train --data folder:photos --space mobile
    """
    with command(locals()) as screen, opened_job(locals(), screen) as (job, _):
        job.check_images()
        where = hwnas.run.open_run(job)
        screen.known["run"] = str(where.path)
        with where.locked():
            tell_range(job, screen)
            announce_recipe(job, where, (), screen)
            hwnas.run.train(job, where)
        steps = job.recipe.supernet.steps
        screen.done({"steps": steps}, [("run", str(where.path)), ("steps", str(steps))])


@app.command()
def search(
    latency_ms: LatencyMs = None,
    percentile: Percentile = None,
    limit_fraction: LimitFraction = None,
    max_params: MaxParams = None,
    max_macs: MaxMacs = None,
    max_size_mb: MaxSizeMb = None,
    max_bitops: MaxBitops = None,
    max_activation_mb: MaxActivationMb = None,
    fix: Fix = None,
    space: Space = None,
    precisions: Precisions = None,
    data: Data = None,
    image_size: ImageSize = None,
    device: Device = None,
    threads: Threads = None,
    batch: Batch = None,
    portable: Portable = None,
    method: Method = None,
    recipe: Recipe = None,
    seed: Seed = None,
    config: ConfigFile = None,
    tables: Tables = None,
    run: RunPath = None,
    train_on: TrainOn = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Find, train, export and measure the most accurate network under hard limits.

    Does whatever is missing. Other limits on the same run train no supernet again.

    Example: hwnas search --latency-ms 0.25 --max-size-mb 0.2
    """
    flags = locals()
    with command(flags) as screen:
        latencies, flags["device"] = latency_limits(latency_ms, percentile, device)
        given = {"params": max_params, "macs": max_macs, "size_mb": max_size_mb,
                 "bitops": max_bitops, "activation_mb": max_activation_mb}  # fmt: skip
        with opened_job(flags, screen) as (job, limited):
            limited = {n: x for n, x in limited.items() if not (latencies and is_latency(n))}
            limited |= latencies | {name: x for name, x in given.items() if x is not None}
            if limit_fraction is not None and latencies:
                raise InvalidInput(
                    "A search needs one latency limit.", accepted="--latency-ms or --limit-fraction"
                )
            if not limited and limit_fraction is None:
                raise InvalidInput(
                    "A search needs one limit or more.",
                    accepted="--limit-fraction F, "
                    + ", ".join(f"{f} X" for f in hwnas.run.LIMITS.values()),
                    next_step="hwnas search --limit-fraction 0.5",
                )
            job.check_images()
            limits = opened_limits(job, limited, limit_fraction, screen)
            feasible = hwnas.run.FeasibleSet(job.searched, limits)
            announce_feasibility(feasible, screen)
            where = hwnas.run.open_run(job)
            screen.known["run"] = str(where.path)
            with where.locked():
                announce_recipe(job, where, limits, screen)
                summary = hwnas.run.search_to_certificate(job, where, limits)
            screen.done(summary, hwnas.run.result_rows(summary))


@app.command()
def retrain(
    run: RunPath = None,
    tables: Tables = None,
    train_on: TrainOn = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Train the finalists of a run's newest result.

    Example: hwnas retrain --run runs/mobile-tiny-digits-cpu-1
    """
    with command(locals()) as screen, opened_result(locals(), screen) as (job, where, result):
        networks = hwnas.run.retrain_finalists(job, where, result)
        found = [hwnas.run.torch_accuracy(network, job.splits) for network in networks]
        rows = [(f"finalist {n}", f"{a:.2%} on SEARCH-VAL") for n, a in enumerate(found)]
        screen.done({"search_val": found}, rows)


@app.command()
def export(
    run: RunPath = None,
    tables: Tables = None,
    train_on: TrainOn = None,
    format_: Annotated[
        str, typer.Option("--format", help="onnx, or tensorrt (of a certified result).")
    ] = "onnx",
    capability: Capability = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Write the finalists of a run's newest result as files, and hold them against PyTorch.

    With --format tensorrt, the engine of its certified network: for this machine's GPU, or for
    compute capabilities that are named, which takes no GPU.

    Example: hwnas export --format tensorrt --compute-capability sm89
    """
    flags = locals()
    with command(flags) as screen:
        check_format(format_, capability)
        with opened_result(flags, screen) as (job, where, result):
            if format_ == "tensorrt":
                facts = hwnas.engines.export_engine(job, result, capability or ())
                screen.done({"engine": facts}, hwnas.engines.engine_rows(facts))
                return
            found = hwnas.run.export(job, where, result)
            rows = [
                (str(file.path), f"{file.search_val:.2%} on SEARCH-VAL, answers as PyTorch on "
                                 f"{file.agreement.same_class:.2%} of the images")
                for candidate in found
                for file in candidate.files.values()
            ]  # fmt: skip
            screen.done({"files": [name for name, _ in rows]}, rows)


@app.command()
def verify(
    run: RunPath = None,
    layers: Annotated[
        bool, typer.Option("--layers", help="Also tell where a TensorRT engine's time goes.")
    ] = False,
    tables: Tables = None,
    train_on: TrainOn = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure a run's newest result again, in fresh processes, against its certificate.

    Example: hwnas verify --run runs/mobile-tiny-digits-cpu-1
    """
    with command(locals()) as screen, opened_result(locals(), screen) as (job, where, result):
        if layers:
            hwnas.engines.engine_of(job, result)  # refused before anything is measured
        if (result / "certificate.json").exists():
            content = hwnas.run.remeasure(job, result)
        else:
            content = hwnas.run.verify(job, where, hwnas.run.read_limits(job, result))
        holds = all(content["holds"].values()) and hwnas.run.is_stable(content)
        facts = {
            "status": "ok" if holds else "failed",
            "exit_code": 0 if holds else 4,
            "limits": content["limits"],
            "holds": content["holds"],
            **hwnas.run.told_measured(content),
            "accuracy": content["accuracy"],
            "certificate": str(result / "certificate.json"),
        }
        parts = hwnas.engines.layer_times(job, result) if layers else []
        facts |= {"layers": [asdict(part) for part in parts]} if layers else {}
        rows = [
            *(("limit", f"{hwnas.run.limit_text(name, value)}: "
                        f"{'holds' if content['holds'][name] else 'DOES NOT HOLD'}")
              for name, value in content["limits"].items()),
            *hwnas.run.measured_rows(content),
            ("accuracy on TEST", f"{content['accuracy']['test']:.2%}"),
            *((part.op or "between ops", f"{part.rescaled_us:.1f} us in {part.kernels} kernels")
              for part in parts),
        ]  # fmt: skip
        screen.done(facts, rows)


@app.command()
def predict(
    model: Annotated[Path, typer.Argument(help="model.onnx, or architecture.json of a result.")],
    table: Annotated[
        Path | None, typer.Option(help="A latency table. (default: this device's, in --tables)")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(help="Which of the table's latency models.")
    ] = None,
    space: Space = None,
    precisions: Precisions = None,
    data: Data = None,
    image_size: ImageSize = None,
    device: Device = None,
    threads: Threads = None,
    batch: Batch = None,
    tables: Tables = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Predict the latency of a network from a table, op by op, with its upper bound.

    Example: hwnas predict runs/mobile-tiny-digits-cpu-1/results/latency_ms=0.2/model.onnx
    """
    flags = locals()
    with command(flags) as screen:
        of_run = hwnas.predict.run_of(model)
        with opened_job({**flags, "run": of_run}, screen) as (job, _):
            found = hwnas.predict.predict_file(model, job, table, calibration)
        rows = [(f"{op.cost_us:.1f} us", op.key) for op in found.ops]
        rows += [
            ("predicted", f"{found.latency_ms:.4g} ms"),
            ("bound", f"{found.upper_latency_ms:.4g} ms at {found.coverage:.0%}"),
            ("table", found.table),
            ("calibration", found.calibration),
        ]
        screen.done(asdict(found), rows)


@app.command()
def devices(as_json: AsJson = False) -> None:
    """What can be measured on this machine, and why the rest cannot.

    Example: hwnas devices
    """
    with command(locals()) as screen:
        found = hwnas.listing.devices()
        rows = [(x["device"], x["about"]) for x in found]
        screen.done({"devices": found}, rows)


@app.command()
def spaces(space: Space = None, as_json: AsJson = False) -> None:
    """The search spaces, or one of them: how large, and what its networks count.

    Example: hwnas spaces --space examples/own_space.py:space
    """
    with command(locals()) as screen:
        found = hwnas.listing.spaces(space)
        head = ["space", "px", "genes", "architectures", "rows", "params", "MACs"]
        lines = [
            [x["space"], str(x["image_size"]), str(len(x["genes"])), f"{x['architectures']:.2g}",
             str(x["rows"]), *(f"{x['smallest'][c]:.3g} to {x['largest'][c]:.3g}"
                               for c in ("params", "macs"))]
            for x in found
        ]  # fmt: skip
        screen.done({"spaces": found}, as_rows(head, lines))


@app.command()
def runs(
    root: Annotated[Path, typer.Argument(help="The folder of runs.")] = Path("runs"),
    as_json: AsJson = False,
) -> None:
    """The runs under a folder, newest first, with their results.

    Example: hwnas runs
    """
    with command(locals()) as screen:
        found = hwnas.listing.runs(root)
        head = ["run", "recipe", "result", "measured", "TEST"]
        lines = []
        for x in found:
            results = x["results"] or [{"result": "none yet", "measured_ms": None, "test": None}]
            lines += [
                [x["run"], x["recipe"], r["result"],
                 "" if r["measured_ms"] is None else f"{r['measured_ms']:.4g} ms",
                 "" if r["test"] is None else f"{r['test']:.2%}"]
                for r in results
            ]  # fmt: skip
        none = [("no runs", f"in {root}; hwnas search makes one")]
        screen.done({"runs": found}, as_rows(head, lines) if found else none)


def run(arguments: list[str]) -> int:
    """One command; what it printed is out, and the answer is its exit code."""
    screen = Screen(as_json="--json" in arguments)
    try:
        with to_standard_output():
            return int(app(arguments or ["--help"], prog_name="hwnas", standalone_mode=False) or 0)
    except InvalidInput as error:
        screen.fail(error)
    except _UsageError as error:
        context = getattr(error, "ctx", None)
        told = " ".join(error.format_message().split())
        command = context.command_path if context else "hwnas"
        screen.fail(InvalidInput(told, next_step=f"{command} --help"))
    except (KeyboardInterrupt, typer.Abort):
        screen.interrupted()
    except SystemExit as left:  # how typer and rich answer a closed pipe; nothing else of theirs
        if not isinstance(left.__context__, BrokenPipeError):
            raise
        unread(sys.stdout)  # whoever read our output has left, which is no failure
    return screen.exit_code


def main() -> NoReturn:
    """The program `hwnas`. A polite request to stop is answered like Ctrl-C."""
    signal.signal(signal.SIGTERM, _stop)
    code = run(sys.argv[1:])
    for late in (signal.SIGINT, signal.SIGTERM):
        signal.signal(late, signal.SIG_IGN)  # the answer is out, and leaving takes torch a moment
    sys.exit(code)


def _stop(_signal: int, _frame: object) -> NoReturn:
    raise KeyboardInterrupt


# ---- what the commands share


def _bundle_rows(written: "hwnas.bundle.Written") -> Rows:
    return [
        ("bundle", f"{written.bundle}, {written.size_bytes / 1e6:.3g} MB"),
        ("graphs", f"{written.rows} ops and {written.networks} whole networks"),
        ("there", f"{written.runner} (with numpy and onnxruntime)"),
        ("then here", written.import_command),
    ]
