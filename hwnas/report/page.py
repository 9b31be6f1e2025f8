"""The report of a search: one page with the result's table and one picture."""

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from hwnas.conditions import LATENCY, condition
from latency_tables.files import write_text
from latency_tables.percentiles import MEDIAN

Point = tuple[float, float, str]
"""Latency in ms, accuracy, label."""

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; } td { padding: .2rem 1.5rem .2rem 0; vertical-align: top; }
td + td { font-variant-numeric: tabular-nums; }
"""


def front(points: list[Point]) -> list[Point]:
    """The points that no other beats in both latency and accuracy, fastest first.

    >>> front([(2.0, 0.9, "b"), (1.0, 0.8, "a"), (3.0, 0.85, "c")])
    [(1.0, 0.8, 'a'), (2.0, 0.9, 'b')]
    """
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or point[1] > best[-1][1]:
            best.append(point)
    return best


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """The result as (what, value) for a terminal or a page."""
    predicted = summary["predicted"]
    shared = summary["search_val_shared_weights"]
    name = summary["method"]["name"]
    limits = summary["limits"]

    def binds(cost: str) -> bool:
        return bool(limits[cost]["binding"])  # what does not bind is said first

    return [
        *(("limit", _limit(summary, cost)) for cost in sorted(limits, key=binds)),
        ("predicted", f"{predicted['latency_ms']:.4g} ms"),
        ("bound", f"{predicted['upper_latency_ms']:.4g} ms at {predicted['coverage']:.0%}"),
        *measured_rows(summary),
        ("accuracy on TEST", f"{summary['accuracy']['test']:.2%}"),
        ("accuracy on SEARCH-VAL", f"{summary['accuracy']['search_val']:.2%}"),
        (
            "best with shared weights",
            f"{_percent(shared[name])} {name}, {_percent(shared['random'])} random, "
            f"{summary['evaluated']} architectures each",
        ),
        ("model", f"{summary['model']} ({summary['size_bytes'] / 1e6:.3g} MB)"),
        *(
            (f"model for {device}", f"{told['model']}, {told['accuracy']['test']:.2%} on TEST")
            for device, told in summary.get("files", {}).items()
        ),
        *(("note", sentence) for sentence in summary["notes"]),
        ("BitOPs", _bitops(summary["bitops"], summary["bitops_searched"])),
        ("certificate", summary["certificate"]),
        ("report", summary["report"]),
    ]


def measured_rows(told: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured, a line for each condition."""
    every = {LATENCY: told["measured"]} | told.get("measured_under", {})
    rows = []
    for cost, m in every.items():
        others = [] if cost == LATENCY else [limit_text(cost, m["latency_ms"])]
        parts = [*others, f"{m['median_ms']:.4g} ms median", f"{m['p95_ms']:.4g} ms p95",
                 f"{m['runs']} runs", "stable" if m["stable"] else "UNSTABLE"]  # fmt: skip
        rows.append(("measured", ", ".join(parts)))
    return rows


def number(value: float) -> str:
    """A value for people.

    >>> number(0.21), number(2.5e6), number(3e12)
    ('0.21', '2,500,000', '3e+12')
    """
    return f"{value:,.0f}" if 1e4 <= value < 1e10 else f"{value:.4g}"


def limit_text(cost: str, value: float) -> str:
    """A limit for people.

    >>> limit_text("latency_ms", 0.21), limit_text("size_mb", 1.5), limit_text("params", 2.5e6)
    ('0.21 ms', '1.5 MB (size)', '2,500,000 params')
    >>> limit_text("latency_p95_ms@gpu", 0.21)
    '0.21 ms (p95, gpu)'
    """
    if asked := condition(cost):
        about = [f"p{asked.percentile}"] if asked.percentile != MEDIAN else []
        about += [asked.device] if asked.device else []
        return f"{number(value)} ms" + (f" ({', '.join(about)})" if about else "")
    name, _, unit = cost.rpartition("_")
    match unit:
        case "mb":
            return f"{number(value)} MB ({name})"
        case _:
            return f"{number(value)} {cost}"


def _limit(summary: dict[str, Any], cost: str) -> str:
    limit = summary["limits"][cost]
    text = limit_text(cost, limit["value"])
    if condition(cost) is not None and cost != LATENCY:  # the row `bound` is of the device's median
        text += f", bound {number(limit['upper'])} ms"
    if limit["binding"]:
        return text
    low, high = summary["feasible_min"][cost], summary["feasible_max"][cost]
    return (
        f"{text} does not bind: the space reaches {number(low)} to {number(high)}; "
        f"try {limit_text(cost, (low + high) / 2)}"
    )


def _bitops(every: float, searched: float) -> str:
    """MACs x bits x bits for people.

    >>> _bitops(1.2e11, 6.78e9)
    '1.2e+11 in all layers, 6,780,000,000 where the precision is searched'
    """
    return f"{number(every)} in all layers, {number(searched)} where the precision is searched"


def write_report(
    path: Path, summary: dict[str, Any], found: list[Point], baseline: list[Point]
) -> None:
    """Write the page: the table of `rows`, and accuracy against predicted latency."""
    figure = go.Figure()
    name = summary["method"]["name"]
    for label, points, colour in (("random", baseline, "#b0b0b0"), (name, found, "#1f77b4")):
        figure.add_scatter(
            x=[p[0] for p in points],
            y=[p[1] for p in points],
            text=[p[2] for p in points],
            mode="markers",
            name=label,
            marker={"color": colour, "size": 7},
        )
    best = front(found + baseline)
    figure.add_scatter(
        x=[p[0] for p in best], y=[p[1] for p in best], mode="lines", name="front",
        line={"shape": "hv", "color": "#d62728"},
    )  # fmt: skip
    if limit := summary["limits"].get("latency_ms"):
        figure.add_vline(
            x=limit["value"],
            line_dash="dash",
            annotation_text=f"limit {limit['value']:.4g} ms",
            annotation_position="top left",
        )
    figure.add_scatter(
        x=[summary["measured"]["median_ms"]],
        y=[summary["accuracy"]["search_val_shared_weights"]],
        mode="markers",
        name="shipped, as measured",
        marker={"symbol": "star", "size": 14, "color": "#2ca02c"},
    )
    figure.update_layout(
        template="plotly_white",
        xaxis_title="predicted latency, ms",
        yaxis_tickformat=".1%",
        yaxis_title="SEARCH-VAL accuracy, shared weights",
        height=520,
    )
    table = "".join(
        f"<tr><td>{html.escape(what)}</td><td>{html.escape(value)}</td></tr>"
        for what, value in rows(summary)
    )
    picture = figure.to_html(full_html=False, include_plotlyjs=True)
    write_text(
        path,
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>hwnas</title>"
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(summary['run'])}</h1>"
        f"<table>{table}</table>{picture}</body></html>\n",
    )


def _percent(value: float | None) -> str:
    return "none" if value is None else f"{value:.2%}"
