"""The bits of the slots, and the rows that see a key which is not finite."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.kernels.call import Columns
from seqattn.kernels.hopper_cached.marks import WORD, sees_lost, words_of

B, K, S = 2, 3, 5


@pytest.mark.parametrize("rows", [7, 65], ids=["one word", "three words"])
def test_each_pair_has_its_bit(rows):
    visible = np.random.default_rng(1).random((B, K, rows, S)) < 0.5
    words = np.asarray(words_of(jnp.asarray(visible)))
    assert words.shape == (B, K, -(-rows // WORD), S)
    for row in range(rows):
        bit = (words[:, :, row // WORD].astype(np.uint32) >> np.uint32(row % WORD)) & 1
        np.testing.assert_array_equal(bit, visible[:, :, row])


def test_rows_that_see_alike_share_a_word():
    visible = np.random.default_rng(1).random((B, 1, 1, S)) < 0.5
    np.testing.assert_array_equal(words_of(jnp.asarray(visible)), np.where(visible, -1, 0))


@pytest.mark.parametrize("of_heads", [False, True], ids=["marks_of_tokens", "marks_of_heads"])
@pytest.mark.parametrize("rows", [1, 7])
def test_rows_that_see_a_lost_key(of_heads, rows):
    random = np.random.default_rng(0)
    finite = random.random((B, K, S) if of_heads else (B, 1, S)) < 0.7
    columns = Columns(None, None, jnp.asarray(finite if of_heads else finite[:, 0]))
    visible = random.random((1, K, rows, S)) < 0.4
    expected = np.array(
        [[[any(seen & ~finite[b, k if of_heads else 0]) for seen in visible[0, k]] for k in range(K)] for b in range(B)]
    )
    assert 0 < expected.sum() < expected.size
    np.testing.assert_array_equal(sees_lost(jnp.asarray(visible), columns), expected)
    np.testing.assert_array_equal(sees_lost(None, columns), ~finite.all(axis=-1)[..., None])
