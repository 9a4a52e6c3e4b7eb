"""A run of adapters: it starts at another model, resumes to the same bits without it, and loads as a plain model."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest
from flax import nnx

from train.checkpoints import run
from train.engine import loop, session
from train.update.adapters import Adapter, LowRank
from train.update.parameters import paths


@pytest.fixture(scope="module")
def tuning(tagging, tmp_path_factory):
    """A tagger of adapters, with dropout, a moving average and a copy of the model that it starts from."""
    folder = tmp_path_factory.mktemp("tuning")
    shutil.copytree(tagging.start_from, folder / "masked")
    adapters = LowRank(rank=2, train=("head/*",))
    return dataclasses.replace(
        tagging, run=folder / "tuned", start_from=folder / "masked", frozen=(), adapters=adapters, keep_checkpoints=2
    )


def flat(tree):
    return dict(zip(jax.tree.leaves(paths(tree)), map(np.asarray, jax.tree.leaves(tree)), strict=True))


def state_of(experiment):
    made = session.prepare(experiment)
    with made.checkpoints:
        return made.state


def test_a_run_of_adapters_is_one_of_a_plain_model(tuning, masked, interrupted, compiled_once, capsys):
    whole = dataclasses.replace(tuning, run=tuning.run.with_name("whole"))
    with compiled_once():
        assert loop.train(whole) == 0
        shown = capsys.readouterr().out
        interrupted(tuning, 3)
        shutil.rmtree(tuning.start_from)
        assert loop.train(tuning) == 0
    # It resumes to the same bits, without the folder that it started from.
    state, same = state_of(tuning), state_of(whole)
    for path, value in flat(state).items():
        assert value.tobytes() == flat(same)[path].tobytes(), path
    trained, count = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.tuned, state.params))
    assert f"{count:,} parameters ({trained:,} trained beside them, {trained / count:.2%}), " in shown
    # The model that it started from is in its checkpoint, bit by bit.
    begun, held = flat(nnx.state(run.load(masked).model, nnx.Param)), flat(state.params)
    for path in held:
        assert path.startswith("head/") or held[path].tobytes() == begun[path].tobytes(), path
    # What is loaded has the sum in place of each kernel, and no adapters.
    loaded = flat(nnx.state(run.load(tuning.run).model, nnx.Param))
    assert loaded.keys() == held.keys()
    layer = state.tuned["stack"]["blocks"]["0"]["attention"]
    for name, kinds in (("query", Adapter), ("value", Adapter)):
        path, adapter = f"stack/blocks/0/attention/{name}/kernel", layer[name]["kernel"]
        assert isinstance(adapter, kinds)
        change = 8.0 * np.asarray(adapter.a, np.float64) @ np.asarray(adapter.b, np.float64)
        assert np.abs(change).max() > 1e-3
        np.testing.assert_allclose(loaded[path], held[path] + change, rtol=1e-6, atol=1e-6)
    changed = {path for path, value in held.items() if not np.array_equal(value, loaded[path])}
    assert {path for path in changed if not path.startswith("head/")} == {
        f"stack/blocks/0/attention/{name}/kernel" for name in ("query", "value")
    }
    assert {"head/output/kernel", "head/output/bias"} <= changed
    # A mean of checkpoints is one of sums, not of their factors.
    mean = flat(nnx.state(run.load(whole.run, average=2).model, nnx.Param))
    with session.prepare(whole).checkpoints as checkpoints:
        states = [checkpoints.restore(state, step) for step in checkpoints.steps[-2:]]
    path = "stack/blocks/0/attention/query/kernel"
    each = [
        np.asarray(one.params["stack"]["blocks"][0]["attention"]["query"]["kernel"][...], np.float64)
        + 8.0 * np.asarray(node.a, np.float64) @ np.asarray(node.b, np.float64)
        for one in states
        for node in [one.tuned["stack"]["blocks"]["0"]["attention"]["query"]["kernel"]]
    ]
    np.testing.assert_allclose(mean[path], sum(each) / 2, rtol=1e-6, atol=1e-6)


def test_a_head_that_is_drawn_must_be_trained(tuning, masked):
    experiment = dataclasses.replace(tuning, run=tuning.run.with_name("new"), start_from=masked, adapters=LowRank(2))
    with pytest.raises(ValueError, match=r"it is drawn, and beside adapters it would stay so: give --adapters.train"):
        loop.train(experiment)
    assert not experiment.run.exists()
