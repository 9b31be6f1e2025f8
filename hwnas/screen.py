"""What the commands print: a result on standard output, everything else on standard error.

With --json a command prints one object, whether it did what was asked or not.
"""

import errno
import json
import logging
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from quant.errors import HwnasError, InvalidInput, Unreachable

Rows = Sequence[tuple[str, str]]
"""What a person reads: (what, value) lines."""

INTERRUPTED = 130
REFUSED = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM,
)  # fmt: skip
"""The operating system's refusals that are no defect of ours, wherever they come from."""


class _StandardError(Console):
    """Standard error. Where whoever read it has left, the command goes on, and tells nobody."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        unread(sys.stderr)


class Screen:
    """One command's output. `known` is told in the JSON object of a failure too."""

    def __init__(self, *, as_json: bool, quiet: bool = False, verbose: bool = False) -> None:
        self.as_json = as_json
        self.quiet = quiet
        self.verbose = verbose
        self.known: dict[str, Any] = {}
        self.exit_code = 0
        self._said: set[str] = set()
        self._told = _StandardError(stderr=True, highlight=False, markup=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """A line for people on standard error, unless --quiet."""
        if not self.quiet:
            self._told.print(text)

    def say_once(self, text: str) -> None:
        """The same, unless the same line was said before."""
        if text not in self._said:
            self._said.add(text)
            self.say(text)

    def done(self, facts: Mapping[str, Any], rows: Rows) -> None:
        """The command's result."""
        if "feasible_min" in facts:
            self.feasible(facts["feasible_min"], facts["feasible_max"])
        content = {"status": "ok", "exit_code": 0, **facts, **self.known}
        self.exit_code = content["exit_code"]
        with to_standard_output():
            if self.as_json:
                _print_json(content)
            else:
                print_rows(rows)

    def fail(self, error: HwnasError) -> None:
        """Why the command did not do what was asked."""
        told = {"what": error.what, "accepted": error.accepted, "next": error.next_step}
        if isinstance(error, Unreachable):
            self.feasible(error.smallest, error.largest)
        self._failed("error", error.exit_code, told)
        self._told.print(Text("error:", style="bold red"), Text(str(error)))

    def interrupted(self) -> None:
        """The user, or the system, asked the command to stop."""
        told = {"what": "interrupted", "accepted": "", "next": "run the same command again"}
        self._failed("interrupted", INTERRUPTED, told)
        self._told.print("Interrupted. The same command goes on where this one stopped.")

    def crashed(self, error: Exception) -> None:
        """A defect of ours: the traceback goes to standard error."""
        what = f"{type(error).__name__}: {error}"
        told = {"what": what, "accepted": "", "next": "report it with the traceback above"}
        self._told.print(traceback.format_exc())
        self._failed("error", HwnasError.exit_code, told)

    def feasible(self, smallest: Mapping[str, float], largest: Mapping[str, float]) -> None:
        """Note the reachable range of costs: every later object tells it."""
        for name, values in (("feasible_min", smallest), ("feasible_max", largest)):
            self.known[name] = {**self.known.get(name, {}), **values}

    def _failed(self, status: str, code: int, error: dict[str, str]) -> None:
        self.exit_code = code
        if self.as_json:
            with suppress(InvalidInput), to_standard_output():
                _print_json({**self.known, "status": status, "exit_code": code, "error": error})

    @contextmanager
    def progress(self) -> Iterator[Callable[[str, int, int], None]]:
        """A bar for each thing that is being done; lines where standard error is no terminal."""
        bars_fit = self._told.is_terminal and not self.quiet
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._told, disable=not bars_fit) as bars:
            tasks: dict[str, Any] = {}

            def tell(label: str, done: int, total: int) -> None:
                if label not in tasks:
                    tasks[label] = bars.add_task(label, total=total)
                    if not bars_fit:
                        self.say(f"{label}: {total}")
                bars.update(tasks[label], completed=done, total=total)

            yield tell


@contextmanager
def outcome(*, as_json: bool, quiet: bool = False, verbose: bool = False) -> Iterator[Screen]:
    """A screen for one command. Whatever ends the command ends here, with its exit code in
    `exit_code` and its sentence printed.
    """
    screen = Screen(as_json=as_json, quiet=quiet, verbose=verbose)
    log = logging.getLogger("hwnas")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    if verbose:
        log.setLevel(logging.INFO)
        log.addHandler(handler)
    try:
        yield screen
    except HwnasError as error:
        screen.fail(error)
    except KeyboardInterrupt:
        screen.interrupted()
    except BrokenPipeError:  # whoever read our output has left: no failure, and nobody to tell
        raise
    except OSError as error:
        refused = refusal(error)
        screen.fail(refused) if refused else screen.crashed(error)
    except Exception as error:
        screen.crashed(error)
    finally:
        log.removeHandler(handler)


def refusal(error: OSError) -> InvalidInput | None:
    """The system's refusal as a sentence; None where it is none, but a defect of ours. What has no
    name is a temporary file: all others are named where they are written.
    """
    reason = error.strerror or str(error)
    if error.errno not in REFUSED and "usable temporary directory" not in reason:
        return None
    where = error.filename or tempfile.tempdir or "The temporary folder"
    told = "read or written" if error.errno in (errno.EACCES, errno.EPERM) else "written"
    return InvalidInput(
        f"{where} cannot be {told}: {reason}.",
        next_step="free some space or name another place; nothing that was there is lost, and the "
        "same command goes on",
    )


@contextmanager
def to_standard_output() -> Iterator[None]:
    """Raise InvalidInput where standard output cannot be written; nothing more goes there then."""
    try:
        yield
    except BrokenPipeError:  # no failure: see `outcome`
        raise
    except OSError as error:
        unread(sys.stdout)
        raise InvalidInput(
            f"Standard output cannot be written: {error.strerror}.",
            next_step="free some space; the same command prints its result again",
        ) from error


def unread(stream: TextIO) -> None:
    """Let what is still written to a stream go nowhere: its reader left, or the disk is full."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def print_rows(rows: Rows) -> None:
    """(what, value) lines on standard output, the values in one column."""
    longest = max((len(what) for what, _ in rows), default=0)
    width = longest + 2 if longest else 0
    out = Console(highlight=False, markup=False, soft_wrap=True)
    for what, value in rows:
        out.print(Text(what.ljust(width), style="bold"), value, sep="")


def columns(head: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a plain table, each column as wide as its widest cell.

    >>> columns(["cost", "limit"], [["params", "5"]])
    ['cost    limit', 'params  5']
    """
    widths = [max(map(len, column)) for column in zip(head, *lines, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *lines)
    ]


def _print_json(content: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(_finite(content), indent=2) + "\n")
    sys.stdout.flush()


def _finite(content: Any) -> Any:
    """The same, with null for numbers that JSON does not have."""
    match content:
        case dict():
            return {name: _finite(value) for name, value in content.items()}
        case list() | tuple():
            return [_finite(value) for value in content]
        case float() if not math.isfinite(content):
            return None
        case _:
            return content


# ---- what the commands share


@contextmanager
def command(flags: Mapping[str, Any]) -> Iterator[Screen]:
    """The screen of a command; leaves with its exit code."""
    quiet, verbose = flags.get("quiet", False), flags.get("verbose", False)
    with outcome(as_json=flags["as_json"], quiet=quiet, verbose=verbose) as screen:
        if quiet and verbose:
            raise InvalidInput("--quiet contradicts --verbose.", next_step="drop one of them")
        yield screen
    raise typer.Exit(screen.exit_code)


def as_rows(head: list[str], lines: list[list[str]]) -> Rows:
    """A head and its lines, in columns, as rows to print."""
    return [("", line) for line in columns(head, lines)]
