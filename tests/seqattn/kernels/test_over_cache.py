"""What the kernels over a cache share: rows of queries, visible rows, the tiles that a query sees."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.kernels.blocks import EMPTY, PARTIAL
from seqattn.kernels.over_cache import in_rows, kinds_of_tiles, of_queries, visible_rows

B, T, K, GROUP, S = 2, 3, 5, 7, 11


def test_results_of_rows_go_back_to_the_queries_that_they_belong_to():
    query = jnp.arange(B * T * K * GROUP * 2.0).reshape(B, T, K * GROUP, 2)
    rows = in_rows(query, K, 24)
    assert rows.shape == (B, K, 24, 2)
    assert not rows[:, :, T * GROUP :].any()
    np.testing.assert_array_equal(rows[1, 3, 2 * T + 1], query[1, 1, 3 * GROUP + 2])
    np.testing.assert_array_equal(of_queries(rows, K * GROUP, T), query)
    np.testing.assert_array_equal(of_queries(rows[..., 0], K * GROUP, T), query[..., 0])


@pytest.mark.parametrize("shape", [(B, K * GROUP, T, S), (1, 1, T, S), (B, K * GROUP, 1, 1)])
def test_visible_rows_have_the_order_of_rows(shape):
    visible = np.random.default_rng(0).random(shape) < 0.5
    found = visible_rows(jnp.asarray(visible), K, GROUP, T)
    assert found.shape[1] == (1 if shape[1] == 1 else K)
    whole = np.broadcast_to(visible, (shape[0], K * GROUP, T, shape[3]))
    expected = whole.reshape(shape[0], K, GROUP * T, shape[3])
    np.testing.assert_array_equal(np.broadcast_to(found, expected.shape), expected)


def test_a_mask_that_all_queries_share_has_one_row():
    assert visible_rows(jnp.ones((B, 1, 1, S), bool), K, GROUP, T).shape == (B, 1, 1, S)


def test_a_tile_is_visited_if_a_query_of_its_row_sees_a_slot():
    visible = np.zeros((2, 3, 2, S), bool)
    visible[0, 1, 0, 4] = visible[1, 2, 1, 10] = True
    kinds = kinds_of_tiles(jnp.asarray(visible), 2, S, 4)
    np.testing.assert_array_equal(kinds, [[[EMPTY, PARTIAL, EMPTY]], [[EMPTY, EMPTY, PARTIAL]]])
    np.testing.assert_array_equal(kinds_of_tiles(None, 2, S, 4), np.full((2, 1, 3), PARTIAL))
