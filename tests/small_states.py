"""Training states that say which step they are of, for tests of checkpoints."""

import jax
import jax.numpy as jnp
import numpy as np

from train.update.step import TrainState


def small(step):
    """A state that says which step it is of."""
    return TrainState(jnp.asarray(step, jnp.int32), {"kernel": jnp.full((5, 3), step / 7)}, {"count": jnp.arange(step)})


def assert_same(first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    for before, after in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_array_equal(before, after)
        assert before.dtype == after.dtype


def names(folder):
    return sorted(path.name for path in folder.iterdir())
