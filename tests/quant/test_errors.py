"""The error tree: exit codes, and sentences that a user can act on."""

import pytest

from quant import errors

CODES = {
    "HwnasError": 1,
    "InvalidInput": 2,
    "TableError": 2,
    "MissingDependency": 2,
    "Unreachable": 3,
    "Unstable": 4,
}


def test_every_error_has_its_exit_code_and_none_is_left_out() -> None:
    found = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.HwnasError)
    }
    assert found == CODES


def test_a_table_error_and_a_missing_package_are_invalid_input() -> None:
    for kind in (errors.TableError, errors.MissingDependency):
        with pytest.raises(errors.InvalidInput, match=r"^no\.$"):
            raise kind("no.")


def test_what_went_wrong_stands_before_what_is_accepted_and_what_comes_next() -> None:
    error = errors.InvalidInput("X is 3.", accepted="1 or 2", next_step="try 1")
    assert str(error) == "X is 3. Accepted: 1 or 2. Next: try 1."
    assert (error.what, error.accepted, error.next_step) == ("X is 3.", "1 or 2", "try 1")


def test_parts_that_are_not_there_leave_no_trace_in_the_sentence() -> None:
    assert str(errors.Unstable("Too noisy.")) == "Too noisy."
    assert str(errors.Unstable("Too noisy.", next_step="wait")) == "Too noisy. Next: wait."
    assert str(errors.TableError("Bad.", accepted="a table")) == "Bad. Accepted: a table."


def test_an_unreachable_limit_tells_the_range_that_can_be_reached() -> None:
    error = errors.Unreachable(
        "0.1 ms cannot be met.",
        smallest={"latency_ms": 0.4},
        largest={"latency_ms": 2.5},
        next_step="try 0.5",
    )
    assert (error.smallest["latency_ms"], error.largest["latency_ms"]) == (0.4, 2.5)
    assert str(error) == "0.1 ms cannot be met. Next: try 0.5."
    assert error.together == {}
    assert not isinstance(error, errors.InvalidInput)


def test_limits_that_exclude_each_other_tell_what_can_be_met_together() -> None:
    error = errors.Unreachable(
        "Not both.",
        smallest={"latency_ms": 0.4, "size_mb": 1.0},
        largest={"latency_ms": 2.5, "size_mb": 4.0},
        together={"latency_ms": 0.6, "size_mb": 1.2},
    )
    assert error.together == {"latency_ms": 0.6, "size_mb": 1.2}
    assert str(error) == "Not both."
