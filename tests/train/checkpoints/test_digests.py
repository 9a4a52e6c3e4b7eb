"""What is not as it was written is noticed, whatever it is."""

import errno
import json
import os
import shutil

import pytest

from train.checkpoints import digests

FILES = {"a": b"some bytes", "below/b": b"", "below/further/c": bytes(range(256)) * 41, "d.json": b'{"x": 1}'}


@pytest.fixture
def folder(tmp_path):
    written = tmp_path / "written"
    for name, content in FILES.items():
        (written / name).parent.mkdir(parents=True, exist_ok=True)
        (written / name).write_bytes(content)
    digests.write(written)
    return written


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def test_a_folder_that_nobody_touched_is_whole(folder, tmp_path):
    assert digests.damage(folder) is None
    assert {path.name for path in folder.iterdir()} == {"a", "below", "d.json", "digests.json"}
    digests.write(folder)  # the manifest is no file of its own manifest
    assert digests.damage(folder) is None
    folder.rename(tmp_path / "elsewhere")
    assert digests.damage(tmp_path / "elsewhere") is None


def test_a_process_killed_between_the_manifest_and_its_name_leaves_nothing_to_miss(folder, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(digests.Path, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            digests.write(folder)
    digests.write(folder)
    assert digests.damage(folder) is None
    assert {path.name for path in folder.iterdir()} == {"a", "below", "d.json", "digests.json"}


def test_the_manifest_is_what_sha256sum_says(folder):
    rows = json.loads((folder / "digests.json").read_text())["files"]
    assert rows.keys() == FILES.keys()
    assert rows["below/b"] == {
        "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        "size": 0,
    }


@pytest.mark.parametrize("name", [name for name, content in FILES.items() if content])
def test_d3_a_flipped_bit_anywhere_in_a_file_is_noticed(name, folder):
    for position in range(0, len(FILES[name]), max(1, len(FILES[name]) // 7)):
        flip(folder / name, position)
        assert digests.damage(folder) == f"{name}: its content changed after it was written"
        flip(folder / name, position)
    assert digests.damage(folder) is None


def test_d3_a_flipped_bit_anywhere_in_the_manifest_is_noticed(tmp_path):
    (tmp_path / "file").write_text("content")
    digests.write(tmp_path)
    for position in range(len((tmp_path / "digests.json").read_bytes())):
        flip(tmp_path / "digests.json", position)
        assert digests.damage(tmp_path) is not None, position
        flip(tmp_path / "digests.json", position)
    assert digests.damage(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[" * 100_000,
        b"\xff",
        b'{"files": {"a": 1}}',
        b'{"files": {"a": {"size": "1"}}, "version": 1}',
    ],
)
def test_a_manifest_that_is_none_is_noticed(content, folder):
    (folder / "digests.json").write_bytes(content)
    assert digests.damage(folder) == "digests.json: its content changed after it was written"


def link(path, target):
    path.unlink()
    path.symlink_to(target)


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: (folder / "a").unlink(), "a is missing"),
        (lambda folder: shutil.rmtree(folder / "below" / "further"), "below/further/c is missing"),
        (lambda folder: os.truncate(folder / "a", 3), "a has 3 bytes, but was written with 10"),
        (lambda folder: (folder / "d.json").write_bytes(b"{} and more"), "d.json has 11 bytes, but was written with 8"),
        (lambda folder: (folder / "below" / "new").touch(), "below/new was not there when it was written"),
        (lambda folder: link(folder / "a", folder / "d.json"), "a is a symbolic link"),
        (lambda folder: (folder / "below" / "loop").symlink_to(folder), "below/loop is a symbolic link"),
        (lambda folder: os.mkfifo(folder / "pipe"), "pipe is neither a file nor a folder"),
        (lambda folder: (folder / "digests.json").unlink(), "it was saved without digests: digests.json is missing"),
        (lambda folder: link(folder / "digests.json", folder / "a"), "digests.json is a symbolic link"),
        (lambda folder: shutil.rmtree(folder), "it is not a folder"),
    ],
)
def test_d2_d4_what_is_missing_cut_off_added_or_a_link_is_named(harm, words, folder):
    harm(folder)
    assert digests.damage(folder) == words


def test_d4_a_copy_whose_file_is_a_link_to_the_same_bytes_does_not_count(folder, tmp_path):
    shutil.move(folder / "a", tmp_path / "a")
    (folder / "a").symlink_to(tmp_path / "a")
    assert digests.damage(folder) == "a is a symbolic link"
    (tmp_path / "link").symlink_to(folder)
    assert digests.damage(tmp_path / "link") == "it is not a folder"


def test_a_file_that_cannot_be_read_is_damage(folder, monkeypatch):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(digests.hashlib, "file_digest", fail)
    assert "Input/output error" in digests.damage(folder)


def test_a_folder_with_a_link_is_not_given_digests(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="a is a symbolic link"):
        digests.write(tmp_path)
    assert not (tmp_path / "digests.json").exists()


def test_d6_a_manifest_that_could_not_be_written_is_not_there(folder, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(digests.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        digests.write(folder)
    assert digests.damage(folder) == "it was saved without digests: digests.json is missing"
