"""`hwnas tables ...`: what is in latency tables, how true they are, how two differ or merge."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import hwnas
from hwnas.flags import (
    AsJson,
    Batch,
    ConfigFile,
    Data,
    Device,
    ImageSize,
    Precisions,
    Quiet,
    Recipe,
    Space,
    Tables,
    Threads,
    Verbose,
)
from hwnas.opening import opened_job, tables_folder
from hwnas.screen import as_rows, command

if TYPE_CHECKING:  # loaded when a command uses it (see hwnas/__init__.py): help must be quick
    import hwnas.listing
    import hwnas.quality

tables_app = typer.Typer()

TableFile = Annotated[Path, typer.Argument(help="A table's file.")]


@tables_app.callback(invoke_without_command=True)
def list_tables(
    context: typer.Context,
    tables: Tables = None,
    shipped: Annotated[
        bool, typer.Option("--shipped", help="Those that come with hwnas, of other machines.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The latency tables of a folder; what is in one, how true it is, how two differ.

    Example: hwnas tables --tables tables
    """
    if context.invoked_subcommand is not None:
        return
    with command(locals()) as screen:
        folder = tables_folder(tables)
        found = hwnas.listing.shipped_tables() if shipped else hwnas.listing.tables(folder)
        head = ["table", "device", "runtime", "threads", "batch", "rows", "error"]
        lines = [
            [x["table"], x["error"], "", "", "", "", ""]
            if "error" in x
            else [x["table"], x["device"], x["runtime"], str(x["threads"]), str(x["batch"]),
                  str(x["rows"]),
                  ", ".join(f"{m['mean_error']:.1%}" for m in x["models"].values()) or "none yet"]
            for x in found
        ]  # fmt: skip
        none = [("no tables", f"in {folder}; hwnas profile makes one")]
        screen.done({"tables": found}, as_rows(head, lines) if found else none)


@tables_app.command("show")
def show_table(context: typer.Context, table: TableFile, as_json: AsJson = False) -> None:
    """What is in a table: host, protocol, latency models with their error, and every row.

    Example: hwnas tables show tables/cpu-onnxruntime-t1-b1.parquet
    """
    with command({"as_json": _as_json(context, as_json)}) as screen:
        found = hwnas.listing.table(table)
        rows = [(name, str(value)) for name, value in found["host"].items() if value]
        rows += [
            (f"model of {name}", f"{m['quality']['mean_error']:.1%} mean error, bound "
                                 f"{m['upper_ratio']:.3f} x prediction at {m['coverage']:.0%}")
            for name, m in found["models"].items()
        ]  # fmt: skip
        rows += [
            (f"searched in {name}", f"{len(ratios)} networks at percentile {percentile}, measured "
                                    f"up to {max(ratios.values()):.3f} x prediction")
            for name, m in found["models"].items()
            for percentile, ratios in m["searched"].items()
        ]  # fmt: skip
        rows += [
            (f"check of {name}", f"{r['quality']['mean_error']:.1%} mean error on "
                                 f"{r['quality']['networks']} held-out networks, {r['made']}")
            for name, r in found["reports"].items()
        ]  # fmt: skip
        if "inside" in found:
            rows.append(("costs inside", _told_by(found["inside"])))
        rows += [(f"{row['median_us']:.1f} us", row["key"]) for row in found["rows"]]
        screen.done(found, rows)


@tables_app.command("check")
def check_table(
    context: typer.Context,
    networks: Annotated[int, typer.Option(help="How many held-out networks.")] = 40,
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
    as_json: AsJson = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Hold a space's table against networks that it has not seen, and keep the report in it.

    Each network is measured twice. Rivals on the same networks: the best straight line on MACs, and
    a plain sum of rows of single operators.

    Example: hwnas tables check --space mobile --data none:1000
    """
    above = context.parent.params if context.parent else {}
    flags = locals() | {"as_json": _as_json(context, as_json)}
    flags["tables"] = tables or above.get("tables")
    with command(flags) as screen, opened_job(flags, screen) as (job, _):
        report = hwnas.quality.check(job, networks)
        found, floor, rivals = report["quality"], report["floor"], report["rivals"]
        head = ["", "mean error", "worst", "within 5 %", "within 10 %", "tau", "Spearman"]
        names = {"this table": found, "line on MACs": rivals["macs"],
                 "sum of operators": rivals["single_operators"]}  # fmt: skip
        lines = [
            [name, f"{q['mean_error']:.2%}", f"{q['worst_error']:.1%}", f"{q['within_5']:.0%}",
             f"{q['within_10']:.0%}", f"{q['tau']:.3f}", f"{q['spearman']:.3f}"]
            for name, q in names.items()
        ]  # fmt: skip
        twice = [f"{floor['mean_error']:.2%}", f"{floor['worst_error']:.1%}"]
        lines.insert(1, ["measured twice", *twice, "", "", f"{floor['tau']:.3f}", ""])
        ratio, ranking = report["additivity"], report["ranking"]
        screen.done(
            {"table": str(job.table_path), **report},
            [
                ("table", str(job.table_path)),
                ("held-out networks", str(found["networks"])),
                *as_rows(head, lines),
                ("bound holds for", f"{found['coverage']:.0%}"),
                ("ops add up to", f"{ratio['ratio']:.1%} of the network, +- {ratio['spread']:.1%}"),
                ("ranking", f"noise {ranking['noise']:.2%}, one gene moves {ranking['step']:.2%}"),
            ],
        )


@tables_app.command("diff")
def diff_tables(
    context: typer.Context, first: TableFile, second: TableFile, as_json: AsJson = False
) -> None:
    """Where the second table differs from the first: host, protocol, rows.

    Example: hwnas tables diff before.parquet after.parquet
    """
    with command({"as_json": _as_json(context, as_json)}) as screen:
        found = hwnas.listing.difference(first, second)
        ratio = found["ratio"]
        rows = [
            ("condition", found["condition"] or "the same"),
            ("rows", f"{found['common']} in both, {found['only_first']} only in the first, "
                     f"{found['only_second']} only in the second"),
            ("pace", f"the second's machine took {found['pace_ratio']:.3f} of the first's time"),
        ]  # fmt: skip
        if ratio is not None:
            rows.append(("common rows", f"second / first is {ratio:.3f} in the middle"))
        rows += [
            (f"{row['second_us'] / row['first_us']:.3f}", row["key"]) for row in found["changed"]
        ]
        screen.done(found, rows)


@tables_app.command("merge")
def merge_tables(
    context: typer.Context,
    first: TableFile,
    second: TableFile,
    into: Annotated[Path, typer.Option(help="The file to write.")],
    as_json: AsJson = False,
) -> None:
    """Put two tables of one host and protocol together; rows that both have are the second's.

    Example: hwnas tables merge a.parquet b.parquet --into both.parquet
    """
    with command({"as_json": _as_json(context, as_json)}) as screen:
        rows = hwnas.listing.merge(first, second, into)
        screen.done({"table": str(into), "rows": rows}, [("table", str(into)), ("rows", str(rows))])


@tables_app.command("export")
def export_table(
    context: typer.Context,
    table: TableFile,
    csv: Annotated[Path, typer.Option(help="The CSV file to write.")],
    as_json: AsJson = False,
) -> None:
    """Write the rows of a table as CSV.

    Example: hwnas tables export tables/cpu-onnxruntime-t1-b1.parquet --csv rows.csv
    """
    with command({"as_json": _as_json(context, as_json)}) as screen:
        rows = hwnas.listing.export_csv(table, csv)
        screen.done({"csv": str(csv), "rows": rows}, [("csv", str(csv)), ("rows", str(rows))])


def _told_by(inside: dict[str, Any]) -> str:
    """How many rows each way prices; ways that price none are left out."""
    error = inside["slope_error"]
    near = f" (standard error {error:.1%} in the middle)" if error is not None else ""
    names = {"slope": f"by slopes{near}", "host": "behind a host",
             "boundary": "by their boundary", "alone": "as they do alone"}  # fmt: skip
    return ", ".join(f"{inside[way]} {name}" for way, name in names.items() if inside[way])


def _as_json(context: typer.Context, given: bool) -> bool:
    """Whether --json was given, to the command or before it."""
    above = context.parent.params if context.parent else {}
    return bool(given or above.get("as_json", False))
