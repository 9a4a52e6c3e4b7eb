"""A folder of two checkpoints, and a copy of it to write to."""

import shutil

import pytest

from tests.small_states import small
from train.checkpoints.checkpoints import Checkpoints


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
    """A folder with steps 4 and 8, not to be written to."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with Checkpoints(folder) as checkpoints:
        for step in (4, 8):
            checkpoints.save(small(step), {"step": str(step)})
    return folder


@pytest.fixture
def copy(two_steps, tmp_path):
    return shutil.copytree(two_steps, tmp_path / "copy")
