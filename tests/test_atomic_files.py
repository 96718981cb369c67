# SPDX-License-Identifier: Apache-2.0
"""Atomic writing: after any interruption a file or folder is the old or the new one, and nothing is left behind."""

import os
import signal
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from modeling_dre_slcl import atomic_files
from modeling_dre_slcl.atomic_files import (
    TEMPORARY_PREFIX,
    atomic_file,
    atomic_folder,
    read_json,
    remove_temporary,
    sha256_file,
    sync_tree,
    write_json,
    write_text,
)


class Killed(BaseException):
    """Stands for the end of the process: no `except Exception` may swallow it."""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_only_when_complete(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_file(target) as temporary:
        temporary.write_text("content")
        assert not target.exists()
        assert temporary.name.startswith(TEMPORARY_PREFIX)
        assert temporary.suffix == ".txt"
    assert target.read_text() == "content"
    assert stat.S_IMODE(target.stat().st_mode) == 0o644
    assert names(target.parent) == ["a.txt"]


def test_interrupted_file_keeps_the_old_one(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(Killed), atomic_file(target) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise Killed
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_folder_is_replaced_as_a_whole(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with atomic_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "new.txt").write_text("new")
        assert names(target) == ["old.txt"]
    assert names(target) == ["sub"]
    assert (target / "sub" / "new.txt").read_text() == "new"
    assert names(tmp_path) == ["folder"]


def test_interrupted_folder_keeps_the_old_one(tmp_path):
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with pytest.raises(Killed), atomic_folder(target) as temporary:  # noqa: PT012
        (temporary / "new.txt").write_text("new")
        raise Killed
    assert names(target) == ["old.txt"]
    assert names(tmp_path) == ["folder"]


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(atomic_files, "sync_path", lambda path: events.append(("sync", path.name)))
    path_type = type(tmp_path)
    replace = path_type.replace
    monkeypatch.setattr(
        path_type, "replace", lambda self, target: (events.append(("rename", self.name)), replace(self, target))[1]
    )
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_text("x")
        name = temporary.name
    assert events == [("sync", name), ("rename", name), ("sync", tmp_path.name)]
    events.clear()
    with atomic_folder(tmp_path / "b") as temporary:
        (temporary / "c").write_text("x")
        name = temporary.name
    assert events == [("sync", "c"), ("sync", name), ("rename", name), ("sync", tmp_path.name)]


def test_sync_tree_makes_files_readable_for_colleagues(tmp_path):
    file = tmp_path / "sub" / "weights.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"x")
    file.chmod(0o600)
    sync_tree(tmp_path)
    assert stat.S_IMODE(file.stat().st_mode) == 0o644


def test_remove_temporary_removes_only_leftovers(tmp_path):
    (tmp_path / "keep").write_text("x")
    (tmp_path / f"{TEMPORARY_PREFIX}file").write_text("x")
    (tmp_path / f"{TEMPORARY_PREFIX}folder").mkdir()
    (tmp_path / f"{TEMPORARY_PREFIX}folder" / "inner").write_text("x")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "precious").write_text("x")
    (tmp_path / f"{TEMPORARY_PREFIX}link").symlink_to(outside)
    assert remove_temporary(tmp_path) == 3
    assert names(tmp_path) == ["keep"]
    assert names(outside) == ["precious"]
    assert remove_temporary(tmp_path / "absent") == 0


def test_json_round_trip_keeps_order_and_refuses_nan(tmp_path):
    path = tmp_path / "a.json"
    value = {"z": 1, "a": [1.5, None, "\u00e4"]}
    write_json(path, value)
    assert read_json(path) == value
    assert list(read_json(path)) == ["z", "a"]
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": float("nan")})
    assert read_json(path) == value
    assert names(tmp_path) == ["a.json"]


@pytest.mark.parametrize("content", [b"", b'{"a": ', b"\xff\xfe", b"[" * 200_000, b"1" * 5000])
def test_broken_json_names_the_file(tmp_path, content):
    path = tmp_path / "broken.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json: expected a JSON file"):
        read_json(path)


def test_sha256_matches_the_system_tool(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(256)) * 5000)
    found = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True, check=True).stdout.split()[0]
    assert sha256_file(path) == found


def test_killed_writer_leaves_a_whole_file(tmp_path):
    """A process that overwrites a file without end is killed: the file is one of the versions it wrote."""
    source = atomic_files.__file__
    program = textwrap.dedent(
        f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("atomic_files", {source!r})
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        number = 0
        while True:
            module.write_text({str(tmp_path / "a.txt")!r}, str(number) * 200_000)
            if number == 0:
                print("ready", flush=True)
            number = (number + 1) % 10
        """
    )
    for _ in range(5):
        with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            os.kill(process.pid, signal.SIGKILL)
        text = (tmp_path / "a.txt").read_text()
        assert len(text) == 200_000
        assert len(set(text)) == 1
    remove_temporary(tmp_path)
    assert names(tmp_path) == ["a.txt"]


def test_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fail(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(atomic_files, "sync_path", fail)
    with pytest.raises(OSError, match="No space left"):
        write_text(target, "new")
    assert target.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_folder_killed_between_its_two_renames_comes_back(tmp_path):
    from modeling_dre_slcl import atomic_files

    target = tmp_path / "model"
    with atomic_files.atomic_folder(target) as folder:
        (folder / "weights").write_text("old")
    process = os.fork()
    if process == 0:
        with atomic_files.atomic_folder(target) as folder:
            (folder / "weights").write_text("new")
            real = Path.replace

            def die_at_the_second_rename(self, other):
                if Path(other) == target:
                    os._exit(9)
                return real(self, other)

            Path.replace = die_at_the_second_rename
    _, status = os.waitpid(process, 0)
    assert os.WEXITSTATUS(status) == 9
    assert not target.exists()
    atomic_files.remove_temporary(tmp_path)
    assert (target / "weights").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
