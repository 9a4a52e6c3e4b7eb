"""The one form in which kernels receive a call, whatever its leading dims were."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.kernels.call import Call, Columns, flatten, locate
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


def _of_columns(query=(3, T, N, 11), key=(3, K, 11, S), value=(3, K, S, 13), finite=(3, S), dtypes=()):
    shapes = {"query": query, "key": key, "value": value, "finite": finite}
    dtypes = dict.fromkeys(shapes, jnp.float32) | {"finite": bool} | dict(dtypes)
    given = {name: jnp.zeros(shape, dtypes[name]) for name, shape in shapes.items()}
    unused = dict.fromkeys(("mask", "score_mod", "q_at", "kv_at", "dropout"))
    return Call.of_columns(given.pop("query"), Columns(**given), **unused)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"query": (2, T, N, 11)}, ValueError, r"batch rows must agree, got query \(2, .* columns.key \(3, "),
        ({"query": (3, T, N, 7)}, ValueError, r"head_dim of query \(7\) and columns.key \(11\) must be equal"),
        ({"query": (3, N, 11)}, ValueError, r"query must have 4 dims, got \(3, 4, 11\)"),
        ({"query": (3, T, 3, 11)}, ValueError, r"num_heads \(3\) must be a multiple of num_kv_heads \(2\)"),
        ({"value": (3, K, 17, 13)}, ValueError, r"columns.value \(3, 2, 17, 13\) must be \[B, K, S, V\]"),
        ({"value": (3, N, S, 13)}, ValueError, r"columns.value \(3, 4, 7, 13\) must be"),
        ({"finite": (3, 5)}, ValueError, r"columns.finite \(3, 5\) must be \[B, S\] or \[B, K, S\]"),
        ({"finite": (3, N, S)}, ValueError, r"columns.finite \(3, 4, 7\) must be"),
        ({"dtypes": {"finite": jnp.float32}}, TypeError, "columns.finite must be boolean, got float32"),
        ({"dtypes": {"query": jnp.int32}}, TypeError, "query must be floating, got int32"),
    ],
    ids=["batch", "dim", "dims", "heads", "slots", "kv-heads", "marks", "marks-of-heads", "marks-dtype", "dtype"],
)
def test_a_cache_that_does_not_fit_the_queries_is_refused(given, error, words):
    """A kernel reads tiles by the first sizes that it knows, and would not notice."""
    with pytest.raises(error, match=words):
        _of_columns(**given)


def test_marks_of_a_cache_may_belong_to_heads_and_its_dtype_may_differ():
    assert _of_columns(finite=(3, K, S), dtypes={"key": jnp.bfloat16}).columns.finite.shape == (3, K, S)
