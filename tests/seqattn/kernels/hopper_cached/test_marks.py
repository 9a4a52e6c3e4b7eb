"""The bits of the slots."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.kernels.call import Columns
from seqattn.kernels.hopper_cached.marks import WORD, marks_of

B, K, S = 2, 3, 5


def _columns(of_heads=False):
    finite = np.random.default_rng(0).random((B, K, S) if of_heads else (B, S)) < 0.7
    return Columns(None, jnp.zeros((B, K, S, 7)), jnp.asarray(finite))


@pytest.mark.parametrize("of_heads", [False, True], ids=["marks_of_tokens", "marks_of_heads"])
@pytest.mark.parametrize(("length", "group"), [(7, 1), (13, 5)], ids=["one word", "three words"])
def test_each_pair_has_its_bit(of_heads, length, group):
    visible = np.random.default_rng(1).random((B, K * group, length, S)) < 0.5
    columns = _columns(of_heads)
    marks = np.asarray(marks_of(jnp.asarray(visible), columns, K * group, length))
    words = -(-length * group // WORD)
    assert marks.shape == (B, K, words + 1, S)
    for row in range(length * group):
        bit = (marks[:, :, row // WORD].astype(np.uint32) >> np.uint32(row % WORD)) & 1
        np.testing.assert_array_equal(bit, visible[:, row // length :: group, row % length])
    finite = np.asarray(columns.finite)
    np.testing.assert_array_equal(marks[:, :, -1], np.broadcast_to(finite if of_heads else finite[:, None], (B, K, S)))


def test_queries_that_see_alike_share_a_word_of_all_heads():
    visible = np.random.default_rng(1).random((B, 1, 1, S)) < 0.5
    marks = marks_of(jnp.asarray(visible), _columns(), 6, 40)
    np.testing.assert_array_equal(marks[:, 0, 0], np.where(visible[:, 0, 0], -1, 0))
    assert marks.shape == (B, 1, 2, S)
    assert marks_of(None, _columns(), 6, 40).shape == (B, 1, 1, S), "no words without a mask"
