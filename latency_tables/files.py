"""Files that are never seen half-written, and locks that no killed process leaves behind."""

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from quant.errors import InvalidInput


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusal to write `path` into one sentence for the user."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise InvalidInput(
            f"{path} cannot be written: {reason}.",
            next_step="free some space or name another place; nothing that was there is lost",
        ) from error


@contextmanager
def held(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path`, with this process's id in it.

    The system releases it when the process ends, however that happens; the file stays. Raises
    InvalidInput that names `what` and the process which holds it.
    """
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b", buffering=0)
    with file:
        with explained(path):
            if not _locked(file):
                file.seek(0)
                holder = file.read().decode(errors="replace").strip() or "unknown"
                raise InvalidInput(
                    f"{what} is in use by process {holder}.",
                    next_step="wait for it, or name another one",
                )
            file.truncate(0)
            file.write(str(os.getpid()).encode())
        yield


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a temporary path beside `path`, flush it to disk, and move it into place.

    A reader sees the old file or the new one. The temporary file has one name for each `path`: what
    a killed process left there is overwritten by the next write. Raises InvalidInput where the disk
    refuses, and where another process is writing `path`.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("ab") as file:
            # A file that is locked but no longer there was moved into place by who held it before.
            if not _locked(file) or not _is_at(file, temporary):
                raise InvalidInput(
                    f"{path} is being written by another process.",
                    next_step="wait for it, or name another one",
                )
            try:
                file.truncate(0)
                write(temporary)
                os.fsync(file.fileno())
                temporary.chmod(0o644)
                temporary.replace(path)
            except BaseException:
                with suppress(OSError):
                    temporary.unlink()
                raise
        _flush_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file of bytes atomically."""
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; OSError and ValueError are for each caller to put in its words."""
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not an object")
    return content


def _locked(file: IO[bytes]) -> bool:
    """Whether this process got the lock of an open file."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(file: IO[bytes], path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    return False


def _flush_folder(path: Path) -> None:
    """Make a move in a folder survive a loss of power, where the file system can."""
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(folder)
