"""Early stopping as a value: nothing is read, removed or restored to know whether a run is over."""

import math

import pytest

from train.engine.patience import Patience


def _history(*losses):
    return [{"step": 2 * (i + 1), "loss": loss} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "waited"),
    [((), 0), ((1.0,), 0), ((2.0, 1.0), 0), ((1.0, 2.0, 3.0), 2), ((1.0, 1.0), 1), ((math.nan, math.inf), 0)],
    ids=str,
)
def test_a_run_has_waited_since_its_first_lowest_loss(losses, waited):
    patience = Patience(_history(*losses), limit=2)
    assert patience.waited == waited
    assert patience.exhausted == (waited >= 2)
    assert not Patience(_history(*losses)).exhausted


def test_the_best_steps_are_those_of_the_lowest_finite_losses():
    patience = Patience(_history(3.0, math.nan, 1.0, 2.0, 1.0))
    assert patience.best() == [6, 10, 8, 2]
    assert patience.best(2) == [6, 10]
    assert (patience.loss(8), patience.loss(4), patience.loss(5)) == (2.0, None, None)


def test_asking_changes_nothing():
    history = _history(1.0, 2.0, 3.0)
    patience = Patience(history, limit=1)
    assert patience.exhausted
    assert patience.exhausted
    assert history == _history(1.0, 2.0, 3.0)
