"""Atomic writes: a reader sees the old file or the new one, and refusals are one sentence."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from latency_tables.files import explained, write_atomically, write_text
from quant.errors import InvalidInput, TableError


@contextmanager
def _disk_with_room_for(size: int) -> Iterator[None]:
    """The system itself refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_text_is_written_where_no_folder_was_yet(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "one\n")
    assert path.read_text() == "one\n"
    assert _names(path.parent) == ["c.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_second_text_replaces_the_first_whole(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "a long first text\n")
    write_text(path, "short\n")
    assert path.read_text() == "short\n"
    assert _names(tmp_path) == ["c.txt"]


def test_while_it_is_written_a_reader_sees_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    seen = []

    def write(temporary: Path) -> None:
        temporary.write_text("new, hal")
        seen.append((path.read_text(), temporary.parent, temporary.name.startswith(".c.txt.")))
        temporary.write_text("new, whole")

    write_atomically(path, write)
    assert seen == [("old", tmp_path, True)]  # beside it: moving stays on one file system
    assert path.read_text() == "new, whole"


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), TableError("row")])
def test_a_writer_that_fails_leaves_the_old_file_and_no_other(
    error: BaseException, tmp_path: Path
) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("new, hal")
        raise error

    with pytest.raises(type(error)) as caught:
        write_atomically(path, write)
    assert caught.value is error
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["c.txt"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_a_disk_that_refuses_is_invalid_input_that_names_file_and_reason(
    code: int, tmp_path: Path
) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    error = OSError(code, "the system's reason")

    def write(temporary: Path) -> None:
        temporary.write_text("new, hal")
        raise error

    with pytest.raises(InvalidInput, match="the system's reason") as caught:
        write_atomically(path, write)
    assert str(path) in str(caught.value)
    assert "Next: free some space" in str(caught.value)
    assert caught.value.__cause__ is error
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["c.txt"]


def test_a_disk_that_is_really_full_is_invalid_input_and_loses_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    with _disk_with_room_for(4096), pytest.raises(InvalidInput, match="cannot be written"):
        write_text(path, "x" * 100_000)
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["c.txt"]


def test_a_move_that_the_system_refuses_is_invalid_input(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(InvalidInput, match="folder cannot be written"):
        write_text(path, "new")
    assert _names(tmp_path) == ["folder"]
    assert _names(path) == []


def test_a_move_onto_a_disk_turned_readonly_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")

    def refuse(self: Path, target: Path) -> Path:
        raise OSError(errno.EROFS, "Read-only file system", str(target))

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(InvalidInput, match="Read-only file system"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["c.txt"]


def test_a_folder_that_cannot_be_made_is_invalid_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"c\.txt cannot be written"):
        write_text(tmp_path / "file" / "c.txt", "new")


def test_only_the_systems_refusals_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), explained(tmp_path):
        _ = 1 / 0
    with pytest.raises(InvalidInput, match="a reason without a number"), explained(tmp_path):
        raise OSError("a reason without a number")
