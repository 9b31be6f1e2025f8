"""The commands: parse, call one function of `hwnas.run`, print."""

import json
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

import hwnas
from quant.errors import HwnasError, InvalidInput, Unreachable

if TYPE_CHECKING:  # loaded when a command uses it (see hwnas/__init__.py): help must be quick
    import hwnas.run
    from hwnas.run import Job
    from hwnas.store import Run

app = typer.Typer(
    help="Find the most accurate network under a latency limit, measured on your device.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Space = Annotated[
    str | None, typer.Option(help="A space's name, or path.py:function. [default: mobile-tiny]")
]
Data = Annotated[str | None, typer.Option(help="digits, or fashion-mnist:DIR. [default: digits]")]
Device = Annotated[str | None, typer.Option(help="cpu, gpu or simulated. [default: cpu]")]
Threads = Annotated[int | None, typer.Option(help="Threads of the runtime. [default: 1]", min=1)]
Batch = Annotated[int | None, typer.Option(help="Images a call. [default: 1]", min=1)]
Method = Annotated[str | None, typer.Option(help="The search system. [default: spos]")]
Recipe = Annotated[
    str | None, typer.Option(help="How much is trained and searched. [default: quick]")
]
Seed = Annotated[int | None, typer.Option(help="The seed of everything random. [default: 0]")]
Tables = Annotated[
    Path | None,
    typer.Option(help="Folder of latency tables. [default: $HWNAS_HOME/tables, else ./tables]"),
]
RunPath = Annotated[
    Path | None, typer.Option("--run", help="A run directory. [default: the newest that matches]")
]
AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
LatencyMs = Annotated[float | None, typer.Option(help="The latency limit in milliseconds.")]
Fraction = Annotated[
    float | None,
    typer.Option(
        help="Instead of --latency-ms: this far from the smallest reachable bound to the largest.",
        min=0,
        max=1,
    ),
]

_screen = Console(stderr=True, highlight=False, markup=False)


@app.command()
def profile(
    space: Space = None,
    data: Data = None,
    device: Device = None,
    threads: Threads = None,
    batch: Batch = None,
    recipe: Recipe = None,
    tables: Tables = None,
    as_json: AsJson = False,
) -> None:
    """Measure every op of a space on this device, and calibrate on whole networks.

    Example: hwnas profile --device cpu --threads 1
    """
    with _outcome(as_json) as done, _job(locals()) as job:
        _announce_profile(job)
        table, found, quality = job.table, job.latency_range(), job.model.quality
        done(
            {
                "table": str(job.table_path),
                "rows": len(table.rows),
                "unstable_rows": sum(not row.stable for row in table.rows.values()),
                "quality": asdict(quality),
                "upper_ratio": job.model.upper_ratio,
                "feasible_min": {"latency_ms": found.smallest},
                "feasible_max": {"latency_ms": found.largest},
            },
            [
                ("table", str(job.table_path)),
                ("rows", str(len(table.rows))),
                ("error on unseen networks", f"{quality.mean_error:.1%} mean, "
                                             f"{quality.worst_error:.1%} worst"),
                ("rank correlation (tau)", f"{quality.tau:.3f}"),
                ("bound", f"{job.model.upper_ratio:.3f} x prediction, holds for "
                          f"{quality.coverage:.0%} of {quality.networks} unseen networks"),
                ("reachable", f"{found.smallest:.4g} to {found.largest:.4g} ms (upper bounds)"),
            ],
        )  # fmt: skip


@app.command()
def train(
    space: Space = None,
    data: Data = None,
    device: Device = None,
    threads: Threads = None,
    batch: Batch = None,
    method: Method = None,
    recipe: Recipe = None,
    seed: Seed = None,
    tables: Tables = None,
    run: RunPath = None,
    as_json: AsJson = False,
) -> None:
    """Train the supernet of a run; it goes on where it stopped.

    Example: hwnas train --data digits
    """
    with _outcome(as_json) as done, _job(locals()) as job:
        where = hwnas.run.open_run(job)
        with where.locked():
            hwnas.run.train(job, where)
        facts = {"run": str(where.path), "steps": job.recipe.supernet.steps}
        done(facts, [("run", str(where.path)), ("steps", str(job.recipe.supernet.steps))])


@app.command()
def search(
    latency_ms: LatencyMs = None,
    limit_fraction: Fraction = None,
    space: Space = None,
    data: Data = None,
    device: Device = None,
    threads: Threads = None,
    batch: Batch = None,
    method: Method = None,
    recipe: Recipe = None,
    seed: Seed = None,
    tables: Tables = None,
    run: RunPath = None,
    as_json: AsJson = False,
) -> None:
    """Find, train, export and measure the most accurate network under a limit.

    Does whatever is missing: the table, the supernet, the search, the finalists' training.

    Example: hwnas search --latency-ms 0.25
    """
    with _outcome(as_json) as done, _job(locals()) as job:
        if (latency_ms is None) == (limit_fraction is None):
            raise InvalidInput(
                "A search needs one limit.",
                accepted="--latency-ms X, or --limit-fraction F",
                next_step="hwnas search --limit-fraction 0.5",
            )
        _announce_profile(job)
        found = job.latency_range()
        if latency_ms is None:
            share = (limit_fraction or 0.0) * (found.largest - found.smallest)
            latency_ms = _rounded_up(found.smallest + share)
        limit = job.latency_limit(latency_ms)
        _announce_limit(latency_ms, found.smallest, found.largest)
        hwnas.run.FeasibleSet(job.space, [limit])
        where = hwnas.run.open_run(job)
        with where.locked():
            summary = hwnas.run.search_to_certificate(job, where, [limit])
        done(summary, hwnas.run.result_rows(summary))


@app.command()
def retrain(run: RunPath = None, tables: Tables = None, as_json: AsJson = False) -> None:
    """Train the finalists of a run's newest result.

    Example: hwnas retrain --run runs/mobile-tiny-digits-cpu-1
    """
    with _outcome(as_json) as done, _result(run, tables) as (job, where, result):
        networks = hwnas.run.retrain_finalists(job, where, result)
        found = [hwnas.run.torch_accuracy(network, job.splits) for network in networks]
        rows = [(f"finalist {n}", f"{a:.2%} on SEARCH-VAL") for n, a in enumerate(found)]
        done({"run": str(where.path), "search_val": found}, rows)


@app.command()
def export(
    run: RunPath = None,
    tables: Tables = None,
    as_json: AsJson = False,
    format_: Annotated[str, typer.Option("--format", help="onnx.")] = "onnx",
) -> None:
    """Write the finalists of a run's newest result as files, and hold them against PyTorch.

    Example: hwnas export --run runs/mobile-tiny-digits-cpu-1
    """
    with _outcome(as_json) as done:
        if format_ != "onnx":
            raise InvalidInput(f"--format is {format_!r}.", accepted="onnx")
        with _result(run, tables) as (job, where, result):
            found = hwnas.run.export(job, where, result)
            rows = [
                (str(c.path), f"{c.search_val:.2%} on SEARCH-VAL, answers as PyTorch on "
                              f"{c.agreement.same_class:.2%} of the images")
                for c in found
            ]  # fmt: skip
            done({"run": str(where.path), "files": [str(c.path) for c in found]}, rows)


@app.command()
def verify(run: RunPath = None, tables: Tables = None, as_json: AsJson = False) -> None:
    """Measure a run's newest result again, in fresh processes, against its certificate.

    Example: hwnas verify --run runs/mobile-tiny-digits-cpu-1
    """
    with _outcome(as_json) as done, _result(run, tables) as (job, where, result):
        if (result / "certificate.json").exists():
            content = hwnas.run.remeasure(job, result)
        else:
            content = hwnas.run.verify(job, where, hwnas.run.read_limits(job, result))
        measured, limit = content["measured"], content["limits"]["latency_ms"]
        holds = measured["median_ms"] <= limit and measured["stable"]
        median, p95 = measured["median_ms"], measured["p95_ms"]
        facts = {
            "status": "ok" if holds else "failed",
            "exit_code": 0 if holds else 4,
            "run": str(where.path),
            "limits": content["limits"],
            "measured": measured,
            "accuracy": content["accuracy"],
            "certificate": str(result / "certificate.json"),
        }
        rows = [
            ("limit", f"{limit:.4g} ms"),
            ("measured", f"{median:.4g} ms median, {p95:.4g} ms p95"),
            ("verdict", "under the limit" if holds else "NOT under the limit, or unstable"),
            ("accuracy on TEST", f"{content['accuracy']['test']:.2%}"),
        ]
        done(facts, rows)


def main() -> None:
    """Run the command line."""
    app()


# ---- what the commands share


_REQUEST = ("space", "data", "device", "threads", "batch", "method", "recipe", "seed")


@contextmanager
def _job(flags: dict[str, Any]) -> Iterator["Job"]:
    """The job that a command's flags ask for, with a progress bar while it works.

    With --run, flags that were not given are the run's own; raises InvalidInput where one that was
    given contradicts it.
    """
    given = {name: flags[name] for name in _REQUEST if flags.get(name) is not None}
    path: Path | None = flags.get("run")
    if path is not None and (path / "config.yaml").exists():
        config = hwnas.run.read_run(path).config
        for name, value in given.items():
            if value != (known := getattr(config, name)):
                raise InvalidInput(
                    f"--{name} {value} contradicts {path}, whose {name} is {known}.",
                    next_step=f"drop --{name}, or name another --run",
                )
        given = {name: getattr(config, name) for name in _REQUEST}
    request = hwnas.run.Request(**given, tables=_tables(flags.get("tables")), run=path)
    with _progress() as progress:
        yield hwnas.run.Job(request, progress)


@contextmanager
def _result(run: Path | None, tables: Path | None) -> Iterator[tuple["Job", "Run", Path]]:
    """The job, run and newest result that the later stages work on, with the run held."""
    if run is None:
        configs = sorted(Path("runs").glob("*/config.yaml"), key=lambda p: p.stat().st_mtime)
        if not configs:
            raise InvalidInput("There is no run under ./runs.", next_step="run hwnas search")
        run = configs[-1].parent
    where = hwnas.run.read_run(run)
    with _progress() as progress, where.locked():
        job = hwnas.run.Job(hwnas.run.request_of(where, _tables(tables)), progress)
        yield job, where, where.best()


def _tables(given: Path | None) -> Path:
    home = os.environ.get("HWNAS_HOME")
    return given or (Path(home) / "tables" if home else Path("tables"))


@contextmanager
def _outcome(as_json: bool) -> Iterator[Callable[[dict[str, Any], list[tuple[str, str]]], None]]:
    """Print what a command found, or why it could not, and leave with its exit code."""
    code = 0

    def done(facts: dict[str, Any], rows: list[tuple[str, str]]) -> None:
        nonlocal code
        content = {"status": "ok", "exit_code": 0, **facts}
        code = content["exit_code"]
        if as_json:
            _print_json(content)
        else:
            _print_rows(rows)

    try:
        yield done
    except HwnasError as error:
        code = error.exit_code
        _screen.print(Text("error:", style="bold red"), Text(str(error)), soft_wrap=True)
        if as_json:
            _print_json(_failure(error))
    except KeyboardInterrupt:
        code = 130
        _screen.print("Interrupted. The same command goes on where this one stopped.")
        if as_json:
            what = {"what": "interrupted", "accepted": "", "next": "run the same command again"}
            _print_json({"status": "interrupted", "exit_code": code, "error": what})
    except Exception as error:  # a defect of ours: the traceback goes to standard error
        code = HwnasError.exit_code
        _screen.print(traceback.format_exc(), soft_wrap=True)
        if as_json:
            what = {"what": f"{type(error).__name__}: {error}", "accepted": "", "next": "report it"}
            _print_json({"status": "error", "exit_code": code, "error": what})
    raise typer.Exit(code)


def _failure(error: HwnasError) -> dict[str, Any]:
    told = {"what": error.what, "accepted": error.accepted, "next": error.next_step}
    content: dict[str, Any] = {"status": "error", "exit_code": error.exit_code, "error": told}
    if isinstance(error, Unreachable):
        content |= {"feasible_min": error.smallest, "feasible_max": error.largest}
    return content


def _print_json(content: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(content, indent=2) + "\n")


def _print_rows(rows: list[tuple[str, str]]) -> None:
    width = max(len(what) for what, _ in rows)
    screen = Console(highlight=False, markup=False, soft_wrap=True)
    for what, value in rows:
        screen.print(Text(what.ljust(width + 2), style="bold"), value, sep="")


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=_screen, disable=not _screen.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def tell(label: str, done: int, total: int) -> None:
            if label not in tasks:
                tasks[label] = bars.add_task(label, total=total)
            bars.update(tasks[label], completed=done, total=total)

        yield tell


def _rounded_up(value: float, digits: int = 4) -> float:
    """The value with a few significant digits, never less than it was."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")


def _announce_profile(job: "Job") -> None:
    plan = hwnas.run.plan(job)
    if plan.missing or plan.networks:
        _screen.print(
            f"Profiling {plan.missing} of {plan.rows} ops and {plan.networks} whole networks on "
            f"{job.request.device}: about {max(plan.minutes, 0.1):.1f} minutes.",
            soft_wrap=True,
        )


def _announce_limit(value: float, smallest: float, largest: float) -> None:
    told = f"Limit {value:.4g} ms; this space reaches {smallest:.4g} to {largest:.4g} ms"
    if value >= largest:
        middle = (smallest + largest) / 2
        told += f", so the limit does not bind: try --latency-ms {middle:.2g}"
    _screen.print(f"{told}.", soft_wrap=True)
