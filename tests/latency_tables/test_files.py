"""Atomic writes: a reader sees the old file or the new one, and refusals are one sentence. Locks:
one process holds, the others are told which, and a killed one holds nothing.

What a kill leaves is shown with real processes and SIGKILL.
"""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from latency_tables.files import explained, held, write_atomically, write_text
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


def refusing(code: int) -> Callable[..., None]:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


@pytest.mark.parametrize("call", ["fsync", "chmod"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_refusal_after_writing_keeps_the_old_file_and_no_other(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(os if call == "fsync" else Path, call, refusing(code))
        with pytest.raises(InvalidInput, match=os.strerror(code)) as caught:
            write_text(path, "new")
    assert str(path) in str(caught.value)
    assert path.read_text() == "old"
    assert _names(tmp_path) == ["c.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"


def test_a_temporary_file_that_cannot_be_removed_does_not_hide_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refusing(errno.EROFS))
        with pytest.raises(InvalidInput, match=os.strerror(errno.ENOSPC)):
            write_atomically(path, refusing(errno.ENOSPC))
    assert path.read_text() == "old"
    write_text(path, "new")
    assert path.read_text() == "new"
    assert _names(tmp_path) == ["c.txt"]


def test_the_file_reaches_the_disk_before_its_name_and_its_name_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a loss of power could leave the new name on an empty file."""
    path, told = tmp_path / "c.txt", []
    flush, move = os.fsync, Path.replace

    def watched_flush(number: int) -> None:
        told.append("folder" if stat.S_ISDIR(os.fstat(number).st_mode) else "file")
        flush(number)

    def watched_move(self: Path, target: Path) -> Path:
        told.append("moved")
        return move(self, target)

    monkeypatch.setattr(os, "fsync", watched_flush)
    monkeypatch.setattr(Path, "replace", watched_move)
    write_text(path, "new")
    assert told == ["file", "moved", "folder"]


def test_a_file_system_that_cannot_flush_folders_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def fsync(number: int) -> None:
        if stat.S_ISDIR(os.fstat(number).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(number)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "c.txt", "new")
    assert (tmp_path / "c.txt").read_text() == "new"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_that_is_read_only_is_invalid_input(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(InvalidInput, match="Permission denied"):
            write_text(path, "new")
        assert path.read_text() == "old"
        assert _names(tmp_path) == ["c.txt"]
    finally:
        tmp_path.chmod(0o755)


def test_a_folder_that_cannot_be_made_is_invalid_input(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput, match=r"c\.txt cannot be written"):
        write_text(tmp_path / "file" / "c.txt", "new")


def test_only_the_systems_refusals_are_explained(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), explained(tmp_path):
        _ = 1 / 0
    with pytest.raises(InvalidInput, match="a reason without a number"), explained(tmp_path):
        raise OSError("a reason without a number")


# ---- after a kill, and between processes


def python(code: str, *arguments: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from latency_tables.files import write_atomically

def write(temporary):
    temporary.write_text("new, hal")
    os.kill(os.getpid(), signal.SIGKILL)

write_atomically(Path(sys.argv[1]), write)
"""

KILLED_BEFORE_THE_MOVE = """
import os, signal, sys
from pathlib import Path
from latency_tables.files import write_text

os.fsync = lambda number: os.kill(os.getpid(), signal.SIGKILL)
write_text(Path(sys.argv[1]), "new, " * 10_000)
"""


@pytest.mark.parametrize("code", [KILLED_WHILE_WRITING, KILLED_BEFORE_THE_MOVE])
def test_a_killed_writer_leaves_the_old_file_and_nothing_that_adds_up(
    code: str, tmp_path: Path
) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    for _ in range(2):
        with python(code, path) as writer:
            assert writer.wait() == -signal.SIGKILL
        assert path.read_text() == "old"
        assert len(_names(tmp_path)) == 2
    write_text(path, "new")
    assert path.read_text() == "new"  # and nothing of the longer text that was left
    assert _names(tmp_path) == ["c.txt"]
    assert path.stat().st_mode & 0o777 == 0o644


WRITING = """
import sys
from pathlib import Path
from latency_tables.files import write_atomically

def write(temporary):
    temporary.write_text("theirs, hal")
    print("half", flush=True)
    sys.stdin.readline()
    temporary.write_text("theirs, whole")

write_atomically(Path(sys.argv[1]), write)
"""


def test_a_file_that_another_process_is_writing_is_refused_and_not_mixed(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    write_text(path, "old")
    with python(WRITING, path) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "half\n"
        with pytest.raises(InvalidInput, match="being written by another process") as caught:
            write_text(path, "mine")
        assert caught.value.next_step
        assert path.read_text() == "old"
        writer.communicate("go on\n")
    assert path.read_text() == "theirs, whole"
    write_text(path, "mine")
    assert path.read_text() == "mine"
    assert _names(tmp_path) == ["c.txt"]


def test_a_file_moved_away_between_opening_and_locking_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other writer's file has its final name by then: writing to it would show half of ours."""
    path = tmp_path / "c.txt"

    def flock(file: object, _: int) -> None:
        (tmp_path / ".c.txt.partial").rename(path)

    with monkeypatch.context() as patch:
        patch.setattr("fcntl.flock", flock)
        with pytest.raises(InvalidInput, match="being written by another process"):
            write_text(path, "mine")
    assert path.read_text() == ""  # as the other writer moved it there
    write_text(path, "mine")
    assert path.read_text() == "mine"


HOLD = """
import sys
from pathlib import Path
from latency_tables.files import held
from quant.errors import InvalidInput
try:
    with held(Path(sys.argv[1]), "the thing"):
        print("held", flush=True)
        sys.stdin.readline()
except InvalidInput as error:
    print(error.what, flush=True)
"""


def answer(path: Path) -> str:
    with python(HOLD, path) as other:
        return other.communicate("")[0].strip()


def test_one_process_holds_a_lock_and_the_others_are_told_which(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "x.lock"
    with held(path, "the thing"):
        for _ in range(2):  # being refused does not change who is named
            assert answer(path) == f"the thing is in use by process {os.getpid()}."
    assert answer(path) == "held"
    assert _names(path.parent) == ["x.lock"]


def test_a_lock_is_held_once_within_a_process_too(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with held(path, "the thing"):
        told = f"the thing is in use by process {os.getpid()}"
        with pytest.raises(InvalidInput, match=told), held(path, "the thing"):
            pass
        assert answer(path) != "held", "the refusal released nothing"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_process_holds_nothing(number: int, tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with python(HOLD, path) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        told = f"in use by process {other.pid}"
        with pytest.raises(InvalidInput, match=told) as caught, held(path, "the thing"):
            pass
        assert "wait for it" in caught.value.next_step
        other.send_signal(number)
        other.wait()
    with held(path, "the thing"):
        assert path.read_text() == str(os.getpid())


def test_a_child_does_not_keep_a_lock_that_its_parent_released(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    with held(path, "the thing"):
        child = python("import sys; sys.stdin.read()")
    with child:
        assert answer(path) == "held"


def test_an_error_inside_releases_the_lock_and_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "x.lock"
    for error in (KeyError(), OSError(errno.ENOSPC, "not ours"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, held(path, "the thing"):
            raise error
        assert caught.value is error
    assert answer(path) == "held"


def test_a_lock_that_cannot_be_written_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    below = held(tmp_path / "file" / "x.lock", "the thing")
    with pytest.raises(InvalidInput, match=r"x\.lock cannot be written"), below:
        pass
    monkeypatch.setattr("fcntl.flock", refusing(errno.ENOLCK))
    beside = held(tmp_path / "x.lock", "the thing")
    with pytest.raises(InvalidInput, match=os.strerror(errno.ENOLCK)), beside:
        pass
