"""The one form in which kernels receive a call, whatever its leading dims were."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.kernels.call import flatten, locate
from seqattn.masks import Causal

BATCH, T, S, N, K = (3, 2), 5, 7, 4, 2


def _locate(batch, **options):
    options = {"mask": None, "bias": None, "q_at": None, "kv_at": None} | options
    return locate((*batch, T, N, 11), (*batch, S, K, 11), **options)


@pytest.mark.parametrize(
    ("batch", "shape", "flat"),
    [
        (BATCH, (T, S), (1, 1, T, S)),
        (BATCH, (1, 1, N, 1, S), (1, N, 1, S)),
        (BATCH, (3, 2, 1, T, S), (6, 1, T, S)),
        (BATCH, (3, 1, 1, T, 1), (6, 1, T, 1)),
        ((3,), (3, N, T, S), (3, N, T, S)),
        ((), (N, T, S), (1, N, T, S)),
    ],
    ids=str,
)
def test_masks_and_biases_have_four_dims_and_keep_their_place(batch, shape, flat):
    x = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    bias, mask = _locate(batch, bias=jnp.asarray(x))["bias"], _locate(batch, mask=jnp.asarray(x % 3 == 0))["mask"]
    assert bias.shape == mask.shape == flat
    full = np.broadcast_to(x, (*batch, N, T, S)).reshape(-1, N, T, S)
    np.testing.assert_array_equal(np.broadcast_to(bias, full.shape), full)
    np.testing.assert_array_equal(np.broadcast_to(mask, full.shape), full % 3 == 0)


def test_coordinates_have_one_batch_dim():
    segment = jnp.arange(3 * 2 * T).reshape(3, 2, T)
    located = _locate(BATCH, mask=Causal(), q_at=Coordinates(segment, segment), kv_at=Coordinates.range(S, start=2))
    np.testing.assert_array_equal(located["q_at"].segment, segment.reshape(6, T))
    np.testing.assert_array_equal(located["kv_at"].position, [np.arange(2, S + 2)])


def test_coordinates_may_share_one_field():
    """Positions of all rows and segments of each, as where left padding is the only difference."""
    at = Coordinates(jnp.arange(T), jnp.ones((*BATCH, T), jnp.int32))
    located = _locate(BATCH, mask=Causal(), q_at=at, kv_at=Coordinates.range(S))
    assert (located["q_at"].position.shape, located["q_at"].segment.shape) == ((1, T), (6, T))


@pytest.mark.parametrize("batch", [(), (3,), (3, 2), (0,), (2, 0)], ids=str)
def test_flatten_makes_one_batch_dim(batch):
    x = np.arange(np.prod(batch, dtype=int) * T).reshape(*batch, T)
    np.testing.assert_array_equal(jax.jit(lambda x: flatten(x, batch))(x), x.reshape(int(np.prod(batch)), T))


@pytest.mark.parametrize(
    ("mask", "words"),
    [(Causal, r"write Causal\(\.\.\.\)"), (lambda query, key: True, r"not a function: write MaskMod\(fn\)")],
)
def test_a_mask_that_is_a_class_or_a_function_is_named_before_the_coordinates_are_judged(mask, words):
    at = Coordinates.range(3)
    # The tests' own check of types would come first.
    unchecked = inspect.unwrap(locate)
    with pytest.raises(TypeError, match=words):
        unchecked((3, 1, 2), (3, 1, 2), mask, None, at, at)
