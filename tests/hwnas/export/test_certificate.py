"""Certificates: hashes, what they are read back as, and what is none."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hwnas.export.certificate import read_certificate, sha256, write_certificate
from quant.errors import InvalidInput


def test_a_files_hash_is_the_published_test_vector(tmp_path: Path) -> None:
    """FIPS 180-2, appendix B.1, and the hash of nothing."""
    (tmp_path / "abc").write_bytes(b"abc")
    (tmp_path / "empty").touch()
    assert sha256(tmp_path / "abc") == (
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )
    assert sha256(tmp_path / "empty") == (
        "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    )


def test_the_code_version_is_the_same_in_processes_of_any_hash_seed_and_folder(
    tmp_path: Path,
) -> None:
    code = "from hwnas.export.certificate import code_version; print(code_version())"
    told = set()
    for seed, folder in (("1", Path.cwd()), ("2", tmp_path)):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment, cwd=folder, capture_output=True, text=True, check=True,
        )  # fmt: skip
        told.add(done.stdout.strip())
    (version,) = told
    assert len(version) == 64
    assert int(version, 16) > 0


def copied_source(folder: Path) -> str:
    """The code version of a copy of the four packages' smallest part that can be imported."""
    code = "from hwnas.export.certificate import code_version; print(code_version())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.strip()


def test_the_code_version_tells_any_change_of_the_source(tmp_path: Path) -> None:
    home = Path(__file__).resolve().parents[3]
    for package in ("hwnas", "profilers", "latency_tables", "quant"):
        for source in (home / package).rglob("*.py"):
            target = tmp_path / source.relative_to(home)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    versions = [copied_source(tmp_path)]
    for name in ("quant/precision.py", "hwnas/spaces/blocks.py"):
        path = tmp_path / name
        path.write_text(path.read_text() + "# a comment\n")
        versions.append(copied_source(tmp_path))
    (tmp_path / "profilers/devices.py").rename(tmp_path / "profilers/renamed.py")
    versions.append(copied_source(tmp_path))
    (tmp_path / "latency_tables/notes.txt").write_text("not code")
    assert copied_source(tmp_path) == versions[-1]
    assert len(set(versions)) == 4


def test_a_certificate_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    names = ("upper", "holds", "predicted", "measured", "accuracy", "architecture", "counts")
    content: dict[str, object] = {name: {"a": 1} for name in (*names, "hashes", "host")}
    content |= {"limits": {"latency_ms": 0.21}, "text": "ü", "list": [1, None, True]}
    path = tmp_path / "results" / "certificate.json"
    write_certificate(path, content)
    assert read_certificate(path) == content
    assert json.loads(path.read_text()) == content
    assert [p.name for p in path.parent.iterdir()] == ["certificate.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"limits": ', b"not json", b"\xff\xfe\x00", b"[1, 2]", b'"text"', b"null"],
    ids=["empty", "brace", "truncated", "text", "binary", "list", "string", "null"],
)
def test_what_is_no_certificate_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="is not a certificate") as caught:
        read_certificate(path)
    assert str(path) in caught.value.what
    assert caught.value.next_step


@pytest.mark.parametrize("folder", [False, True])
def test_a_certificate_that_is_not_there_is_refused(folder: bool, tmp_path: Path) -> None:
    path = tmp_path / "certificate.json"
    if folder:
        path.mkdir()
    with pytest.raises(InvalidInput, match="is not a certificate"):
        read_certificate(path)
