"""Which numbered folders count, which stay, and what becomes of the rest."""

import errno
import os
import shutil

import pytest

from train.checkpoints import digests
from train.checkpoints import folders as step_folders
from train.checkpoints.folders import StepFolders


def written(folders, step, content="whole"):
    fresh = folders.saving(step, 7)
    fresh.mkdir()
    (fresh / "file").write_text(content)
    folders.add(step, fresh)


def content(folders, step):
    return (folders.path(step) / "file").read_text()


@pytest.fixture
def folder(tmp_path):
    folders = StepFolders(tmp_path)
    for step in (4, 8, 12):
        written(folders, step)
    return tmp_path


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_steps_are_newest_first(folder):
    written(StepFolders(folder), 100)
    assert StepFolders(folder).newest() == [100, 12, 8, 4]
    assert StepFolders(folder).newest(2) == [100, 12]
    assert StepFolders(folder / "none").newest() == []


def test_d2_a_damaged_newest_step_is_passed_over_and_named_once(folder, caplog):
    os.truncate(folder / "12" / "file", 2)
    (folder / "8" / "file").unlink()
    folders = StepFolders(folder)
    assert folders.newest(1) == folders.newest(1) == [4]
    words = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert words == [
        "step 12 is damaged (file has 2 bytes, but was written with 5): using step 4",
        "step 8 is damaged (file is missing): using step 4",
    ]
    assert names(folder) == ["12", "4", "8"]


def test_d2_where_no_step_is_whole_there_is_none(folder, caplog):
    for step in ("4", "8", "12"):
        (folder / step / "file").write_text("wrong")
    assert StepFolders(folder).newest() == []
    assert "step 4 is damaged (file: its content changed after it was written): there is no older one" in caplog.text


def test_each_step_is_read_once_and_no_more_than_needed(folder, monkeypatch):
    read, damage = [], digests.damage
    monkeypatch.setattr(digests, "damage", lambda path: read.append(path.name) or damage(path))
    folders = StepFolders(folder)
    assert folders.newest(1) == [12]
    assert read == ["12"]
    assert folders.newest(2) == [12, 8]
    assert folders.has(12)
    assert not folders.has(13)
    assert read == ["12", "8"]


def test_d4_junk_copies_files_and_links_do_not_count(folder, tmp_path_factory, caplog):
    shutil.copytree(folder / "12", folder / "13")
    (folder / "13" / "digests.json").unlink()
    (folder / "14").touch()
    outside = tmp_path_factory.mktemp("outside") / "12"
    shutil.copytree(folder / "12", outside)
    (folder / "15").symlink_to(outside)
    (folder / "16").symlink_to("nowhere")
    (folder / "17").mkdir()
    for unlike in ("012", "1_3", "٣", "-1", "1e3", "12 ", ".saving-20", "damaged-21", "notes"):
        (folder / unlike).mkdir()
    before = names(folder)
    assert StepFolders(folder).newest(1) == [12]
    for step in (13, 17):
        assert f"step {step} is damaged (it was saved without digests: digests.json is missing)" in caplog.text
    for step in (14, 15, 16):
        assert f"step {step} is damaged (it is not a folder): using step 12" in caplog.text
    assert len(caplog.records) == 5
    assert names(folder) == before


def test_what_is_in_the_way_of_a_step_is_moved_aside(folder, caplog):
    (folder / "12" / "file").write_text("wrong")
    (folder / "16").symlink_to(folder / "4")
    folders = StepFolders(folder)
    assert folders.newest(1) == [8]
    for step in (12, 16):
        written(folders, step, "again")
    assert folders.newest() == StepFolders(folder).newest() == [16, 12, 8, 4]
    assert content(folders, 12) == content(folders, 16) == "again"
    assert content(folders, 4) == (folder / "damaged-16" / "file").read_text() == "whole"
    assert (folder / "damaged-12" / "file").read_text() == "wrong"
    assert "step 12 is saved again; its former folder is now damaged-12" in caplog.text
    (folder / "12" / "file").write_text("wrong again")
    written(StepFolders(folder), 12, "third")
    assert (folder / "damaged-12" / "file").read_text() == "wrong again"


def test_d5_what_was_not_given_digests_has_no_number(folder, monkeypatch):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(digests, "write", full)
    folders = StepFolders(folder)
    with pytest.raises(OSError, match="No space"):
        written(folders, 16)
    assert folders.newest() == StepFolders(folder).newest() == [12, 8, 4]
    assert names(folder) == [".saving-16-7", "12", "4", "8"]
    folders.sweep()
    monkeypatch.undo()
    written(folders, 16)
    assert folders.newest(1) == [16]


def test_the_latest_and_the_protected_stay(folder):
    folders = StepFolders(folder)
    for step in (16, 20):
        written(folders, step)
    folders.prune(2, {8})
    assert names(folder) == ["16", "20", "8"]
    folders.prune(2, ())
    assert names(folder) == ["16", "20"]
    folders.prune(5, ())
    assert names(folder) == ["16", "20"]


def test_a_damaged_step_pushes_no_whole_one_out(folder):
    (folder / "12" / "file").write_text("wrong")
    (folder / "13").mkdir()
    (folder / "13" / "thesis").touch()
    (folder / "3").mkdir()
    folders = StepFolders(folder)
    written(folders, 16)
    folders.prune(2, ())
    assert names(folder) == ["12", "13", "16", "3", "8"]  # nor does what is not ours
    folders.prune(1, ())
    assert names(folder) == ["13", "16", "3"]


def test_later_steps_are_removed(folder):
    (folder / "9").mkdir()
    folders = StepFolders(folder)
    folders.remove_after(4)
    assert names(folder) == ["4", "9"]
    assert folders.newest() == [4]


def test_d1_what_a_killed_process_left_is_swept(folder):
    (folder / ".saving-16-5" / "state").mkdir(parents=True)
    (folder / ".removed-2").mkdir()
    (folder / ".removed-3").symlink_to(folder / "4")
    (folder / ".saving-me").mkdir()
    folders = StepFolders(folder)
    assert folders.newest(1) == [12]
    assert ".saving-16-5" in names(folder)  # one who only reads removes nothing
    folders.sweep()
    assert names(folder) == [".saving-me", "12", "4", "8"]
    assert content(folders, 4) == "whole"


def test_a_step_that_goes_while_it_is_read_is_no_damage(folder, monkeypatch, caplog):
    damage = digests.damage

    def slow(path):
        if path.name == "12":
            shutil.rmtree(path)
        return damage(path)

    monkeypatch.setattr(digests, "damage", slow)
    assert StepFolders(folder).newest(1) == [8]
    assert not caplog.records


def test_a_step_that_cannot_be_removed_is_only_warned_of(folder, monkeypatch, caplog):
    def fail(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(step_folders.shutil, "rmtree", fail)
    folders = StepFolders(folder)
    folders.prune(1, ())
    assert names(folder) == [".removed-4", ".removed-8", "12"]
    assert ".removed-4 cannot be removed" in caplog.text
    monkeypatch.undo()
    folders.sweep()
    assert names(folder) == ["12"]


def test_d14_a_folder_that_cannot_be_made_is_refused_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert StepFolders(step_folders.Path("missing") / "checkpoints").folder == tmp_path / "missing" / "checkpoints"
    assert (tmp_path / "missing" / "checkpoints").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/checkpoints cannot be created \(Not a directory\); .*--run"):
        StepFolders(tmp_path / "file" / "checkpoints")


def test_what_an_interruption_saved_makes_way_for_regular_steps(tmp_path):
    folders = StepFolders(tmp_path)
    kept = []
    for step in (10, 13, 20, 21, 25, 30):
        written(folders, step)
        folders.prune(2, (), lambda step: step % 10 == 0)
        kept.append(sorted(folders.newest()))
    assert kept == [[10], [10, 13], [10, 20], [10, 20, 21], [10, 20, 25], [20, 30]]
