"""One process trains in a folder; the lock ends with it."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.checkpoints.lock import RunLock

HOLD = (
    "import sys; from pathlib import Path; from train.checkpoints.lock import RunLock\n"
    "with RunLock(Path(sys.argv[1])):\n"
    "    print('held', flush=True); sys.stdin.read()\n"
)


@pytest.fixture
def other(tmp_path):
    """Another process that holds the folder."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_d13_a_second_process_is_refused_with_who_holds_the_folder(other, tmp_path):
    words = rf"is being trained by process {other.pid} on \S+ since 20\d\d-\S+; .*--run"
    with pytest.raises(ValueError, match=words), RunLock(tmp_path / "run"):
        pass


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_d13_the_lock_ends_with_its_process(number, other, tmp_path):
    other.send_signal(number)
    other.wait()
    with RunLock(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / "run" / ".lock").read_text()


def test_d13_the_same_process_is_refused_too_and_may_lock_again(tmp_path):
    with RunLock(tmp_path):
        with pytest.raises(ValueError, match=f"by process {os.getpid()} on"), RunLock(tmp_path):
            pass
        with pytest.raises(ValueError, match="is being trained"), RunLock(tmp_path):  # the refused one took nothing
            pass
    with RunLock(tmp_path):
        pass


def test_a_lock_that_was_only_just_taken_names_nobody(tmp_path):
    with RunLock(tmp_path):
        (tmp_path / ".lock").write_text("")
        with pytest.raises(ValueError, match="is being trained by another process"), RunLock(tmp_path):
            pass


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_that_cannot_lock_is_only_warned_of(code, tmp_path, monkeypatch, caplog):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", fail)
    for _ in range(2):  # nothing stays that would keep the next one out
        with RunLock(tmp_path):
            assert f"{tmp_path} cannot be locked ({os.strerror(code)})" in caplog.text
        caplog.clear()


def test_a_full_disk_keeps_nobody_from_training(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", fail)
    with RunLock(tmp_path), pytest.raises(ValueError, match="is being trained by another process"), RunLock(tmp_path):
        pass


def test_d14_a_missing_folder_is_made_and_a_relative_one_means_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with RunLock(Path("missing") / "run"):
        assert (tmp_path / "missing" / "run" / ".lock").is_file()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_d14_a_folder_that_is_read_only_is_refused_in_a_sentence(code, tmp_path, monkeypatch):
    def fail(path, *_, **__):
        raise OSError(code, os.strerror(code), path)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(OSError, match=rf"cannot be written to \({os.strerror(code)}\); .*--run"), RunLock(tmp_path):
        pass


def test_d14_a_file_in_place_of_the_folder_is_refused_in_a_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot be written to"), RunLock(tmp_path / "file" / "run"):
        pass


def test_d14_a_lock_file_that_is_a_symbolic_link_is_named_as_one(tmp_path):
    (tmp_path / ".lock").symlink_to(tmp_path / "other")
    words = r"/\.lock is a symbolic link, which a lock must not follow: remove the link, or .*--run"
    with pytest.raises(OSError, match=words), RunLock(tmp_path):
        pass


def test_d14_a_lock_file_with_another_hard_link_in_a_folder_of_all_is_named_as_one(tmp_path):
    (folder := tmp_path / "run").mkdir()
    folder.chmod(0o777)
    (folder / ".lock").touch()
    (tmp_path / "other").hardlink_to(folder / ".lock")
    words = r"/\.lock cannot be locked \(lock file has another hard link .*\): remove it while .*--run"
    with pytest.raises(OSError, match=words), RunLock(folder):
        pass
