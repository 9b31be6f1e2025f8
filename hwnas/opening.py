"""From flags to a job with its limits, and what a user is told before the work begins."""

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hwnas
from hwnas.conditions import LATENCY, Condition, condition
from hwnas.flags import REQUEST
from hwnas.screen import Screen, columns
from latency_tables.percentiles import MEDIAN, PERCENTILES
from quant.errors import InvalidInput

if TYPE_CHECKING:  # loaded when a command uses it (see hwnas/__init__.py): help must be quick
    import hwnas.config
    import hwnas.run
    from hwnas.costs.feasible import FeasibleSet, LimitedCost
    from hwnas.costs.limits import Limit
    from hwnas.job import Plan
    from hwnas.run import Job
    from hwnas.spaces.base import SearchSpace
    from hwnas.store import Run
    from latency_tables.table import LatencyTable


@contextmanager
def opened_job(
    flags: Mapping[str, Any], screen: Screen
) -> Iterator[tuple["Job", dict[str, float]]]:
    """The job that a command's flags and --config ask for, and the file's limits.

    With --run, flags that were not given are the run's own; raises InvalidInput where one that was
    given contradicts it.
    """
    given = {name: flags[name] for name in REQUEST if flags.get(name) is not None}
    if "precisions" in given:
        given["precisions"] = [name.strip() for name in given["precisions"].split(",")]
    path, tables, limited = flags.get("run"), flags.get("tables"), {}
    train_on = flags.get("train_on")
    fix = fixed_options(flags.get("fix"))
    if flags.get("config") is not None:
        config = hwnas.config.read_config(flags["config"])
        given = {n: x for n in REQUEST if (x := getattr(config, n)) is not None} | given
        path = path or (Path(config.run) if config.run else None)
        tables = tables or (Path(config.tables) if config.tables else None)
        if "train_on" in flags:  # of no use to a command that trains nothing
            train_on = train_on or config.train_on
        limited = dict(config.limits)
        fix = {option: Path(result) for option, result in config.fix.items()} | fix
    if path is not None and (path / "config.yaml").exists():
        given = hwnas.run.request_fields(hwnas.run.read_run(path), given)
    request = hwnas.run.Request(
        **given,
        tables=tables_folder(tables),
        run=path,
        train_on=train_on,
        fixed=hwnas.run.fixed_genes(fix),
    )
    with screen.progress() as progress:
        yield hwnas.run.Job(request, progress), limited


@contextmanager
def opened_result(flags: Mapping[str, Any], screen: Screen) -> Iterator[tuple["Job", "Run", Path]]:
    """The job, run and newest result that the later stages work on, with the run held: those that
    --run, --tables and --train-on ask for.
    """
    run = flags["run"]
    if run is None:
        found = hwnas.run.list_runs()
        if not found:
            raise InvalidInput("There is no run under ./runs.", next_step="run hwnas search")
        run = found[0].path
    where = hwnas.run.read_run(run)
    screen.known["run"] = str(where.path)
    with screen.progress() as progress, where.locked():
        result = where.best()
        request = hwnas.run.request_of(where, tables_folder(flags["tables"]))
        request = replace(request, train_on=flags["train_on"], fixed=hwnas.run.read_fixed(result))
        job = hwnas.run.Job(request, progress)
        tell_range(job, screen)
        yield job, where, result


def tell_range(job: "Job", screen: Screen) -> None:
    """Note the reachable latency where a table is there that tells it; nothing is measured."""
    with suppress(InvalidInput):  # a stage that needs no table does not fail for one
        if hwnas.run.is_profiled(job):
            found = job.latency_range()
            screen.feasible({"latency_ms": found.smallest}, {"latency_ms": found.largest})


def tables_folder(given: Path | None) -> Path:
    """The folder of latency tables: as named, else $HWNAS_HOME/tables, else ./tables."""
    home = os.environ.get("HWNAS_HOME")
    return given or (Path(home) / "tables" if home else Path("tables"))


def latency_limits(
    asked: Sequence[str] | None, percentile: int | None, device: str | None
) -> tuple[dict[str, float], str | None]:
    """The limits that --latency-ms asks for, by name, and the device of the search.

    Where no flag names that device, and no limit goes without one, it is the first that is named.
    Raises InvalidInput for what is not a number, and for two limits on one device.
    """
    pairs = [text.rpartition("=")[::2] for text in asked or ()]
    if percentile is not None and not pairs:
        raise InvalidInput("--percentile needs --latency-ms.", accepted="both, or neither")
    if percentile not in (None, MEDIAN, *PERCENTILES):
        known = ", ".join(map(str, (MEDIAN, *PERCENTILES)))
        raise InvalidInput(f"--percentile is {percentile}.", accepted=known)
    if device is None and pairs and all(name for name, _ in pairs):
        device = pairs[0][0]
    found: dict[str, float] = {}
    for named, text in pairs:
        other = "" if named == device else named
        name = Condition(other, percentile or MEDIAN).name
        try:
            value = float(text)
        except ValueError:
            raise InvalidInput(
                f"--latency-ms is {text!r}.", accepted="milliseconds, as 3 or as cpu=3"
            ) from None
        if name in found:
            raise InvalidInput(f"--latency-ms limits {named or 'the device'} twice.")
        found[name] = value
    return found, device


def fixed_options(asked: Sequence[str] | None) -> dict[str, Path]:
    """What --fix asks for: a result for each option. Raises InvalidInput where one is not clear."""
    found: dict[str, Path] = {}
    for text in asked or ():
        option, _, result = text.partition("=")
        if not option or not result:
            raise InvalidInput(f"--fix is {text!r}.", accepted="OPTION=RESULT, as block=RESULT")
        if option in found:
            raise InvalidInput(f"--fix fixes {option} twice.")
        found[option] = Path(result)
    return found


def is_latency(name: str) -> bool:
    """Whether a limit is on a latency."""
    return condition(name) is not None


def opened_limits(
    job: "Job", limited: dict[str, float], fraction: float | None, screen: Screen
) -> list["Limit"]:
    """The limits asked for, tables measured where they are missing; what is known is told first."""
    hwnas.run.check_limits(limited)  # latencies too, before anything is measured for them
    counted = {name: value for name, value in limited.items() if not is_latency(name)}
    known = job.limits(counted)  # refused at once where no table is needed to know better
    names = [name for name in limited if is_latency(name)]
    for name in names:
        if (asked := condition(name)) is not None and asked.device:
            job.under(name)  # refused at once where the device is not there
    for name in dict.fromkeys([LATENCY, *names]):
        _measured(job, name, limited if fraction is None else {}, known, screen)
    found = {name: job.under(name).latency_range() for name in names or [LATENCY]}
    screen.feasible(
        {name: range_.smallest for name, range_ in found.items()},
        {name: range_.largest for name, range_ in found.items()},
    )
    if fraction is not None:
        own = job.first_range()
        value = own.smallest + fraction * (own.largest - own.smallest)
        limited = {**limited, LATENCY: _rounded_up(value)}
    return job.limits(limited)


def _measured(
    job: "Job",
    name: str,
    limited: Mapping[str, float],
    known: "Sequence[Limit]",
    screen: Screen,
) -> None:
    """Measure the table of one condition where it is missing; what is known is told first."""
    there = job.under(name)
    plan = hwnas.run.plan(there)
    if plan.missing or plan.networks:
        _announce_loose(hwnas.run.FeasibleSet(job.searched, known).feasibility().rows, screen)
        low, high = plan.probe_ms
        text = f"networks of this space take about {low:.3g} to {high:.3g} ms here"
        asked = limited.get(name)
        if asked is not None and asked > 1.2 * high:
            screen.say(
                f"Limit {asked:.4g} ms does not bind: {text}; try --latency-ms "
                f"{(low + high) / 2:.2g}."
            )
        else:
            screen.say(f"Before measuring: {text} (the smallest and the largest, timed once).")
    announce_profile(there, plan, screen)
    table = there.table  # measured now where it is missing
    if plan.missing or plan.networks:
        announce_noise(there.space, table, there.table_path, screen)
    elif not screen.quiet:
        _announce_drift(there, screen)


def _announce_drift(job: "Job", screen: Screen) -> None:
    """Whether a table that was measured before still matches the machine."""
    found = hwnas.run.drift(job.profiler, job.table, job.space.lattice.ops, job.recipe.protocol)
    if not found.matches:
        screen.say(
            f"{job.table_path} no longer matches this machine: ops take {found.rows:.2f} of the "
            "time that it tells. Remove it to measure again."
        )
    elif found.pace > 1 + (job.model.upper_ratio - 1) / 2:
        screen.say(
            f"This machine is {found.pace - 1:.0%} slower now than when its table was measured: "
            "what is found may measure over the limit."
        )


def _rounded_up(value: float, digits: int = 4) -> float:
    """The value with a few significant digits, never less than it was."""
    unit = 10.0 ** (math.floor(math.log10(value)) + 1 - digits)
    return float(f"{math.ceil(value / unit) * unit:.{digits}g}")


def announce_profile(job: "Job", plan: "Plan", screen: Screen) -> None:
    """What will be measured, and about how long it takes; nothing where the table has all."""
    if plan.missing or plan.networks:
        screen.say(
            f"Profiling {plan.missing} of {plan.rows} ops and chains of them, and {plan.networks} "
            f"whole networks, on {job.request.device}: about {max(plan.minutes, 0.1):.1f} minutes."
        )


def announce_noise(space: "SearchSpace", table: "LatencyTable", path: Path, screen: Screen) -> None:
    """Whether the table was measured on a machine too busy to trust it, and what to do."""
    ops = space.lattice.ops
    unstable = sum(not table.lookup(op).stable for op in ops)
    if unstable > len(ops) / 10:
        causes = hwnas.run.disturbances() or ["the machine was not steady while it was measured"]
        screen.say(
            f"{unstable} of {len(ops)} ops were measured with a wide spread: {'; '.join(causes)}. "
            f"Remove {path} and measure again on a quiet machine for a tighter bound."
        )


def check_bundle(bundle: Path | None, from_bundle: Path | None, name: str | None) -> None:
    """Raise InvalidInput where the flags for another machine do not go together."""
    if bundle is not None and from_bundle is not None:
        raise InvalidInput(
            "--bundle contradicts --from-bundle.",
            accepted="--bundle DIR first; --from-bundle RESULT when that was measured",
        )
    if (from_bundle is None) != (name is None):
        raise InvalidInput(
            "--from-bundle needs --name, and --name needs --from-bundle.",
            accepted="--from-bundle RESULT --name pi5",
        )


def check_format(format_: str, capability: Sequence[str] | None) -> None:
    """Raise InvalidInput for a format that is none, and where a card is named for an ONNX file."""
    if format_ not in ("onnx", "tensorrt"):
        raise InvalidInput(f"--format is {format_!r}.", accepted="onnx, tensorrt")
    if capability and format_ != "tensorrt":
        raise InvalidInput(
            "--compute-capability needs --format tensorrt.", accepted="both, or neither"
        )


def announce_feasibility(feasible: "FeasibleSet", screen: Screen) -> None:
    """The feasibility table; first of all, where it is so, that a limit does not bind."""
    number = hwnas.run.number
    found = feasible.feasibility()
    screen.feasible(*hwnas.run.feasible_range(feasible).values())
    _announce_loose(found.rows, screen)
    lines = [
        [row.name, *map(number, (row.limit, row.smallest, row.median, row.largest)),
         "yes" if row.binding else "no"]
        for row in found.rows
    ]  # fmt: skip
    for line in columns(["cost", "limit", "smallest", "median", "largest", "binds"], lines):
        screen.say(line)
    screen.say(
        f"{found.share:.3g} of the space's {feasible.space.count:.3g} networks meet every limit."
    )


def _announce_loose(rows: "Sequence[LimitedCost]", screen: Screen) -> None:
    """The limits that do not bind, each with the reachable range and a limit that would."""
    number = hwnas.run.number
    for row in rows:
        if not row.binding:
            screen.say_once(
                f"Limit {hwnas.run.limit_text(row.name, row.limit)} does not bind: this space "
                f"reaches {number(row.smallest)} to {number(row.largest)}; try "
                f"{hwnas.run.flag_of(row.name)} {row.median:.2g}."
            )


def announce_recipe(job: "Job", where: "Run", limits: "Sequence[Limit]", screen: Screen) -> None:
    """What is left to do, and about how long it takes here; nothing where nothing is left."""
    if screen.quiet:
        return
    left = hwnas.run.estimate(job, where, limits)
    work = [
        f"{count} {what}"
        for count, what in (
            (left.steps, f"training steps of {left.step_ms:.3g} ms"),
            (left.scored, "networks to score"),
            (left.retrained, "finalists to retrain"),
        )
        if count
    ]
    if work:
        screen.say(
            f"Recipe {job.recipe.name}: {', '.join(work)}: about {max(left.minutes, 0.1):.1f} "
            f"minutes on {job.placement.text}. Data: {job.splits.describe()}."
        )
