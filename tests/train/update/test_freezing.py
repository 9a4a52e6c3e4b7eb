"""What is frozen changes in no bit and costs no state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.nn import BatchNorm
from train.update.freezing import freeze, frozen
from train.update.optimizer import AdamW, Muon
from train.update.parameters import paths


class Model(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 5, rngs=rngs)])
        self.output = nnx.Linear(5, 7, rngs=rngs)


@pytest.fixture(scope="module")
def params():
    state = nnx.state(Model(nnx.Rngs(0)), nnx.Param)
    # What adding 0.0 would change, and what decay would spread.
    bias = state["encoder"][0]["bias"]
    bias[...] = jnp.array([-0.0, jnp.nan, 2.0])
    return state


def steps(optimizer, params, count=3):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for _ in range(count):
        updates, state = update(jax.tree.map(lambda param: jnp.cos(param) + 1.0, params), state, params)
        # Not in one program with the update: XLA would not add a zero that it knows.
        params = optax.apply_updates(params, updates)
    return params, state


def bits(params):
    return {
        name: np.asarray(leaf).view(np.uint32)
        for name, leaf in zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True)
    }


@pytest.mark.parametrize("algorithm", [AdamW(weight_decay=0.5), Muon(weight_decay=0.5)], ids=repr)
def test_frozen_parameters_keep_every_bit_and_the_others_learn(params, algorithm):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), algorithm.transformation(lambda step: 0.1))
    after, state = steps(freeze(optimizer, ["encoder/*"]), params)
    before, after = bits(params), bits(after)
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert np.array_equal(value, after[name]) == name.startswith("encoder/"), name
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim and leaf.shape != (3,)]
    assert moments
    assert set(moments) <= {(5, 7), (7,)}


def test_the_others_learn_as_if_they_were_alone(params):
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    together, _ = steps(freeze(optimizer, ["encoder/*"]), params)
    alone, _ = steps(optimizer, params["output"])
    for a, b in zip(jax.tree.leaves(together["output"]), jax.tree.leaves(alone), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_pattern_that_matches_nothing_is_refused_before_a_step(params):
    with pytest.raises(ValueError, match=r"'encoder/2/\*' matches no parameter; the nearest are encoder/"):
        freeze(optax.sgd(0.1), ["encoder/2/*"]).init(params)


@pytest.mark.parametrize("patterns", [["*"], ["encoder/*", "output/*"]])
def test_patterns_that_freeze_everything_are_refused_before_a_step(patterns, params):
    with pytest.raises(ValueError, match=r"frozen \(.*\*\) matches every parameter: nothing would be trained"):
        freeze(optax.sgd(0.1), patterns).init(params)


def test_patterns_that_freeze_all_but_running_statistics_are_refused_before_a_step():
    params = nnx.state(nnx.List([BatchNorm(3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(0))]), nnx.Param)
    patterns = ["*/scale", "*/shift", "*/kernel", "*/bias"]
    with pytest.raises(ValueError, match="matches every parameter except running statistics: nothing would be trained"):
        freeze(optax.sgd(0.1), patterns).init(params)
    freeze(optax.sgd(0.1), patterns[1:]).init(params)


def test_the_mask_has_the_structure_of_the_parameters(params):
    mask = frozen(params, ["*/bias"])
    assert jax.tree.structure(mask) == jax.tree.structure(params)
    assert sum(jax.tree.leaves(mask)) == 3


def test_nothing_frozen_is_the_optimizer_itself():
    optimizer = optax.sgd(0.1)
    assert freeze(optimizer, ()) is optimizer
