"""A folder that is made once: whole, or made anew; and nobody waits for a dead process."""

import errno
import functools
import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from train.checkpoints import digests
from train.data.cache_folder import CacheFolder, DataCache, default_folder

FACTS = {"version": 1, "files": [["a", 3]]}
HOLD = (
    "import sys; from pathlib import Path; from train.data.cache_folder import CacheFolder\n"
    "with CacheFolder(Path(sys.argv[1]), {}).claim('shard') as mine:\n"
    "    print(mine, flush=True); sys.stdin.read()\n"
)


@pytest.fixture
def folder(tmp_path):
    """A whole folder with two files."""
    folder = CacheFolder(tmp_path / "kept", FACTS)
    folder.begin()
    for name in ("a", "b"):
        (folder.work / name).write_text(f"content of {name}")
        folder.add(folder.work / name, name)
    folder.finish()
    return folder


def test_a_folder_is_whole_once_it_is_finished(tmp_path, caplog):
    folder = CacheFolder(tmp_path / "kept", FACTS)
    assert not folder.is_whole()
    folder.begin()
    assert not folder.is_whole()
    folder.finish()
    assert folder.is_whole()
    assert not caplog.records


def flipped(folder):
    content = bytearray((folder / "b").read_bytes())
    content[3] ^= 1
    (folder / "b").write_bytes(content)


DAMAGES = {
    "flipped byte": (flipped, "b: its content changed"),
    "truncated": (lambda folder: (folder / "b").write_bytes(b"cont"), "b has 4 bytes, but was written with 12"),
    "missing": (lambda folder: (folder / "a").unlink(), "a is missing"),
    "another file": (lambda folder: (folder / "c").touch(), "c was not there"),
    "manifest": (lambda folder: (folder / digests.MANIFEST).write_text("{}"), "digests.json: its content changed"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_folder_is_removed_with_one_warning(damage, words, folder, caplog):
    damage(folder.path)
    assert not folder.is_whole()
    assert not folder.path.exists()
    (record,) = caplog.records
    assert words in record.message
    assert "it is made anew" in record.message
    folder.begin()
    folder.finish()
    assert folder.is_whole()


def test_a_folder_of_other_facts_is_foreign(folder, caplog):
    other = CacheFolder(folder.path, FACTS | {"version": 2})
    assert not other.is_whole()
    (record,) = caplog.records
    assert "it was made from something else; it is made anew" in record.message
    assert not folder.path.exists()


def test_what_an_interrupted_process_left_is_kept_only_for_the_same_facts(folder, caplog):
    (folder.path / digests.MANIFEST).unlink()
    folder.begin()
    assert (folder.path / "a").exists()
    assert not caplog.records
    other = CacheFolder(folder.path, FACTS | {"version": 2})
    other.begin()
    assert [path.name for path in other.path.iterdir()] == ["facts.json"]
    assert "it was made from something else" in caplog.text


def make(path):
    folder = CacheFolder(path, FACTS)
    folder.begin()
    (folder.work / "a").write_text("content of a")
    folder.add(folder.work / "a", "a")
    folder.finish()


STEPS = (Path, "mkdir"), (Path, "replace"), (Path, "rename"), (Path, "unlink"), (digests, "flush"), (os, "fsync")


def test_a_process_killed_at_any_moment_leaves_what_the_next_one_completes(tmp_path, caplog):
    """Killed before each step that changes the disk, one after the other."""
    for moment in itertools.count():
        steps, path = itertools.count(), tmp_path / str(moment)

        def step(*given, of, moment=moment, steps=steps, **options):
            if next(steps) == moment:
                raise KeyboardInterrupt
            return of(*given, **options)

        with pytest.MonkeyPatch.context() as patch:
            for owner, name in STEPS:
                patch.setattr(
                    owner,
                    name,
                    functools.partialmethod(step, of=getattr(owner, name))
                    if owner is Path
                    else functools.partial(step, of=getattr(owner, name)),
                )
            try:
                make(path)
            except KeyboardInterrupt:
                whole = False
            else:
                whole = True
        make(path)
        assert CacheFolder(path, FACTS).is_whole()
        assert {file.name for file in path.iterdir()} == {digests.MANIFEST, "facts.json", "a"}
        if whole:
            break
    assert moment > 10
    assert not caplog.records


def test_a_lost_manifest_is_written_again(folder):
    (folder.path / digests.MANIFEST).unlink()
    assert not folder.is_whole()
    folder.begin()
    folder.finish()
    assert folder.is_whole()
    assert (folder.path / "a").read_text() == "content of a"


def test_a_claim_ends_with_its_process(tmp_path):
    folder = CacheFolder(tmp_path / "kept", {})
    command = [sys.executable, "-c", HOLD, str(folder.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "True\n"
        with folder.claim("shard", wait=False) as mine:
            assert not mine
        with folder.claim("another shard", wait=False) as mine:
            assert mine
        process.send_signal(signal.SIGKILL)
        with folder.claim("shard") as mine:
            assert mine


def test_a_disk_that_cannot_lock_is_told_and_used(tmp_path, monkeypatch, caplog):
    def fail(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr("train.data.cache_folder.FileLock.acquire", fail)
    with CacheFolder(tmp_path / "kept", {}).claim("shard") as mine:
        assert mine
    assert "cannot be locked (Operation not supported)" in caplog.text


def test_the_folder_is_that_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_folder() == tmp_path / "seqattn" / "data"


def test_a_negative_limit_is_refused():
    with pytest.raises(ValueError, match=r"data_cache\.min_megabytes"):
        DataCache(min_megabytes=-1)
