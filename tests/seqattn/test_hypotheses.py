"""States of any form, widened to the hypotheses of a beam and reordered."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.hypotheses import Shared, branch, check_rows, select


def _state():
    arrays = {"a": jnp.arange(3.0), "b": (jnp.arange(6).reshape(3, 2), None)}
    return {**arrays, "shared": Shared({"memory": jnp.ones((3, 5)), "any": jnp.ones(7)}), "step": jnp.int32(4)}


def test_hypotheses_of_a_row_start_equal_and_side_by_side():
    wide = branch(_state(), 2)
    np.testing.assert_array_equal(wide["a"], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(wide["b"][0][:, 1], [1, 1, 3, 3, 5, 5])
    assert wide["step"] == 4


def test_each_hypothesis_goes_on_from_its_parent_in_its_own_row():
    parent = np.array([[1, 0], [0, 0], [1, 1]])
    rows = np.arange(6).reshape(3, 2)
    chosen = select({"x": jnp.arange(12).reshape(6, 2), "step": jnp.int32(4)}, jnp.asarray(parent))
    np.testing.assert_array_equal(chosen["x"][:, 0], 2 * np.take_along_axis(rows, parent, axis=1).reshape(-1))
    assert chosen["step"] == 4


def test_what_is_shared_is_never_copied():
    state = _state()
    wide = select(branch(state, 2), jnp.zeros((3, 2), jnp.int32))
    assert wide["shared"] is state["shared"]


def test_a_branch_of_one_changes_nothing():
    state = _state()
    wide = select(branch(state, 1), jnp.zeros((3, 1), jnp.int32))
    np.testing.assert_array_equal(wide["b"][0], state["b"][0])


def test_an_array_without_the_rows_is_refused():
    with pytest.raises(ValueError, match=r"the shape \(3, 2\): its first axis must be 2 rows of 2 hypotheses"):
        select({"x": jnp.zeros((3, 2))}, jnp.zeros((2, 2), jnp.int32))
    with pytest.raises(ValueError, match=r"the shape \(3,\): its first axis must be 5 rows"):
        check_rows(_state(), 5)
    check_rows(_state(), 3)
