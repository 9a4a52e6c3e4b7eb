"""A disk without room is said before training, and not when it is full."""

import shutil

import jax.numpy as jnp
import pytest

from train.checkpoints import disk_space
from train.checkpoints.disk_space import check_room, check_space, estimate
from train.update.step import TrainState

STATE = TrainState(
    jnp.int32(5), {"kernel": jnp.ones((5, 3)), "half": jnp.ones(7, jnp.bfloat16)}, {"count": jnp.arange(11)}
)
SIZE = 3 * 4 + 5 * 3 * 4 + 7 * 2 + 11 * 4  # the step, and what was skipped


@pytest.fixture
def free(monkeypatch):
    """Lets the disk have so many bytes left."""

    def leave(count):
        usage = shutil.disk_usage("/")._replace(free=count)
        monkeypatch.setattr(disk_space.shutil, "disk_usage", lambda path: usage)

    return leave


def test_a_state_takes_the_bytes_of_its_arrays():
    assert estimate(STATE) == SIZE


def test_d7_a_disk_without_room_is_warned_of_before_training(tmp_path, free, caplog):
    folder = tmp_path / "new" / "checkpoints"
    free(4 * SIZE)
    check_space(folder, STATE, keep=3)  # those that stay, and the one being written
    assert not caplog.records
    free(4 * SIZE - 1)
    check_space(folder, STATE, keep=3)
    assert f"{folder}: the run will save 4 checkpoints of 0.0 MB, but the disk has only 0.0 MB free" in caplog.text
    assert not folder.parent.exists()


def test_d7_what_is_there_already_needs_no_room(tmp_path, free, caplog):
    for name in ("4", "8", "damaged-8"):
        (tmp_path / name).mkdir()
    free(2 * SIZE)
    check_space(tmp_path, STATE, keep=3)
    assert not caplog.records
    check_space(tmp_path, STATE, keep=4)
    assert "3 checkpoints" in caplog.text
    free(SIZE)
    caplog.clear()
    check_space(tmp_path, STATE, keep=1)  # one is always being written
    assert not caplog.records


def test_d7_room_for_anything_else_is_checked_too(tmp_path, free, caplog):
    folder = tmp_path / "new" / "cache"
    free(5_000_000)
    check_room(folder, 5_000_000, "the tokens", "buy a disk")
    assert not caplog.records
    check_room(folder, 5_000_001, "the tokens", "buy a disk")
    assert f"{folder}: the tokens need about 5.0 MB, but the disk has only 5.0 MB free" in caplog.text
    assert "free some space, or buy a disk" in caplog.text
    assert not folder.parent.exists()


def test_a_real_disk_is_asked(tmp_path, caplog):
    check_space(tmp_path / "missing", STATE, keep=2)
    assert not caplog.records
