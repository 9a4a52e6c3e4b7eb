"""What a session does with its checkpoints."""

import types

import jax.numpy as jnp
import pytest

from tests.small_states import assert_same
from train.checkpoints.checkpoints import Checkpoints
from train.engine.session import Session
from train.update.step import TrainState


def state(step):
    return TrainState(jnp.asarray(step, jnp.int32), {"kernel": jnp.full(3, step / 7)}, {})


@pytest.fixture
def session(tmp_path):
    """A session of only checkpoints, after steps 2, 9 and 11."""
    with Checkpoints(tmp_path / "checkpoints", keep=5) as checkpoints:
        for step in (2, 9, 11):
            checkpoints.save(state(step), {})
        placed = types.SimpleNamespace(place=lambda state: state)
        others = dict.fromkeys(("experiment", "objective", "splits", "training_examples", "batches", "texts", "graph"))
        yield Session(**others, placed=placed, state=state(11), checkpoints=checkpoints, changed=False)


def test_going_back_restores_a_step_and_makes_it_the_latest(session):
    session.go_back_to(9)
    assert_same(session.state, state(9))
    assert session.checkpoints.steps == [2, 9]


def test_a_step_that_cannot_be_restored_removes_no_later_one(session, monkeypatch):
    def fail(*_, **__):
        raise OSError("input/output error")

    monkeypatch.setattr(session.checkpoints, "restore", fail)
    with pytest.raises(OSError, match="input/output error"):
        session.go_back_to(9)
    assert session.checkpoints.steps == [2, 9, 11]
    assert_same(session.state, state(11))
