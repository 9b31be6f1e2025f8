"""What two tables have in common and where they differ: counts, ratios, rows that moved most."""

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latency_tables.difference import TOLD, difference
from latency_tables.host import Host
from latency_tables.table import LatencyTable, Row

HOST = Host("cpu", "onnxruntime", "1.23.0", "a CPU", "avx2")
PROTOCOL = {"rounds": 5, "block_ms": 8.0}


def row(key: str, us: float) -> Row:
    return Row(key, json.dumps([key]), "fp32", us, us, us, us, us, 0.0, 100, True)


def table(
    rows: Mapping[str, float], chains: Mapping[str, float] | None = None, pace_us: float = 1.0
) -> LatencyTable:
    return LatencyTable(
        HOST,
        dict(PROTOCOL),
        {key: row(key, us) for key, us in rows.items()},
        chains={key: row(key, us) for key, us in (chains or {}).items()},
        pace_us=pace_us,
    )


def test_a_table_does_not_differ_from_itself() -> None:
    one = table({"a": 3.0, "b": 5.0}, {"a => b": 7.0}, pace_us=2.5)
    found = difference(one, one)
    assert (found.condition, found.only_first, found.only_second, found.common) == ("", 0, 0, 3)
    assert (found.ratio, found.pace_ratio) == (1.0, 1.0)
    assert all(each.first_us == each.second_us for each in found.changed)


def test_rows_are_counted_with_chains_and_the_middle_ratio_is_that_of_common_ones() -> None:
    one = table({"a": 1.0, "b": 2.0, "c": 4.0}, {"a => b": 2.5, "b => c": 5.0})
    other = table({"b": 2.2, "c": 8.0, "d": 1.0}, {"a => b": 3.0, "c => d": 1.0})
    found = difference(one, other)
    assert (found.only_first, found.only_second, found.common) == (2, 2, 3)
    assert found.ratio == pytest.approx(1.2)  # of 1.1, 1.2 and 2
    assert [each.key for each in found.changed] == ["c", "b", "a => b"]
    assert (found.changed[0].first_us, found.changed[0].second_us) == (4.0, 8.0)


def test_tables_without_a_common_row_have_no_ratio() -> None:
    found = difference(table({"a": 1.0}), table({"b": 1.0}))
    assert (found.common, found.ratio, found.changed) == (0, None, ())
    assert difference(table({}), table({})).ratio is None


def test_a_row_that_got_quicker_is_as_far_as_one_that_got_slower_as_many_times() -> None:
    keys = "abcde"
    one = table(dict.fromkeys(keys, 10.0))
    other = table(dict(zip(keys, (10.0, 10.0, 10.0, 15.0, 5.0), strict=True)))
    assert [each.key for each in difference(one, other).changed[:2]] == ["e", "d"]


def test_rows_are_told_at_their_own_pace_and_the_pace_beside_them() -> None:
    found = difference(table({"a": 4.0}, pace_us=2.0), table({"a": 5.0}, pace_us=3.0))
    assert (found.ratio, found.pace_ratio) == (1.25, 1.5)


@pytest.mark.parametrize("name", ["cpu", "threads", "runtime_version"])
def test_the_host_that_differs_is_named_and_the_rows_are_compared_all_the_same(name: str) -> None:
    other = replace(table({"a": 2.0}), host=replace(HOST, **{name: 7}))
    found = difference(table({"a": 1.0}), other)
    assert found.condition == f"{name}: {getattr(HOST, name)} against 7"
    assert found.ratio == 2.0


def test_another_protocol_is_named_where_the_hosts_are_one() -> None:
    other = table({"a": 1.0})
    other.protocol["rounds"] = 6
    assert difference(table({"a": 1.0}), other).condition == "rounds: 5 against 6"
    renamed = replace(other, host=replace(HOST, hostname="elsewhere", governor="powersave"))
    assert difference(other, renamed).condition == ""


times = st.floats(0.01, 1e5)


@settings(max_examples=60, deadline=None)
@given(
    first=st.dictionaries(st.text("abcdefghijklmnop", min_size=1, max_size=1), times),
    second=st.dictionaries(st.text("abcdefghijklmnop", min_size=1, max_size=1), times),
)
def test_the_rows_told_are_those_furthest_from_the_middle(
    first: dict[str, float], second: dict[str, float]
) -> None:
    found = difference(table(first), table(second))
    ratios = {key: second[key] / us for key, us in first.items() if key in second}
    assert found.common == len(ratios)
    assert found.only_first + found.common == len(first)
    assert found.only_second + found.common == len(second)
    assert len(found.changed) == min(TOLD, len(ratios))
    if not ratios:
        return
    assert found.ratio == pytest.approx(median(ratios.values()))

    def moved(key: str) -> float:
        return abs(math.log(ratios[key] / median(ratios.values())))

    told = [moved(each.key) for each in found.changed]
    assert told == sorted(told, reverse=True)
    untold = [moved(key) for key in ratios if key not in {each.key for each in found.changed}]
    assert all(each <= told[-1] + 1e-12 for each in untold)
