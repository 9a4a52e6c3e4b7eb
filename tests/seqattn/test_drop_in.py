"""The drop-in for jax.nn, wherever jax.nn is right: rows that see something, finite inputs."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.drop_in import dot_product_attention
from seqattn.kernels import reference
from seqattn.kernels.dispatch import IMPLEMENTATIONS, Implementation
from seqattn.mask import Mask
from tests import oracle
from tests.contract import SHAPES, Shape, arrays, close

SHAPE = SHAPES["grouped"]
B, T, S, N, K, H, V = *SHAPE.batch, SHAPE.T, SHAPE.S, SHAPE.N, SHAPE.K, SHAPE.H, SHAPE.V


EVEN = Shape(batch=(3,), T=7, S=11, N=6, K=2, H=5, V=5)
LENGTHS = {"query_seq_lengths": np.array([7, 3, 5], np.int32), "key_value_seq_lengths": np.array([2, 11, 5], np.int32)}
BIAS = np.random.default_rng(9).normal(size=(3, 6, 7, 11)).astype(np.float32)
MASK = np.random.default_rng(9).random((3, 1, 7, 11)) < 0.7


def _lengths(b, t, s):
    return t < LENGTHS["query_seq_lengths"][b] and s < LENGTHS["key_value_seq_lengths"][b]


DROP_IN = {
    "plain": ({}, lambda b, t, s: True),
    "scale": ({"scale": 0.1}, lambda b, t, s: True),
    "causal": ({"is_causal": True}, lambda b, t, s: s <= t),
    "window": ({"local_window_size": 2}, lambda b, t, s: abs(t - s) <= 2),
    "sides": ({"local_window_size": (3, 1)}, lambda b, t, s: t - 3 <= s <= t + 1),
    "key lengths": (
        {"key_value_seq_lengths": LENGTHS["key_value_seq_lengths"]},
        lambda b, t, s: s < LENGTHS["key_value_seq_lengths"][b],
    ),
    "lengths": (LENGTHS, _lengths),
    "mask": ({"mask": MASK}, lambda b, t, s: MASK[b, 0, t, s]),
    "bias": ({"bias": BIAS}, lambda b, t, s: True),
    "plane": ({"mask": MASK[1, 0], "bias": BIAS[1, 2], "is_causal": True}, lambda b, t, s: MASK[1, 0, t, s] and s <= t),
    "plane and lengths": ({"mask": MASK[1, 0]} | LENGTHS, lambda b, t, s: MASK[1, 0, t, s] and _lengths(b, t, s)),
    "padding": ({"mask": MASK[:, :, :1], "is_causal": True}, lambda b, t, s: MASK[b, 0, 0, s] and s <= t),
    "padding and lengths": (
        {"mask": MASK[1:2, :, :1], "bias": BIAS} | LENGTHS,
        lambda b, t, s: MASK[1, 0, 0, s] and _lengths(b, t, s),
    ),
    "all": (
        {"bias": BIAS[:1], "mask": MASK, "is_causal": True, "local_window_size": (4, 9), "scale": 0.5} | LENGTHS,
        lambda b, t, s: MASK[b, 0, t, s] and s <= t and t - s <= 4 and _lengths(b, t, s),
    ),
}


@pytest.mark.parametrize("name", DROP_IN)
def test_dot_product_attention_is_that_of_jax(name):
    options, predicate = DROP_IN[name]
    inputs, traced = arrays(EVEN), {key: x for key, x in options.items() if isinstance(x, np.ndarray)}
    static = {key: x for key, x in options.items() if key not in traced} | {"return_residual": True}
    ours = jax.jit(functools.partial(dot_product_attention, **static))(**inputs, **traced)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, **static))(**inputs, **traced)
    pairs = np.array([[[[predicate(b, t, s) for s in range(11)] for t in range(7)]] for b in range(3)])
    expected = oracle.attention(
        **inputs, visible=pairs, bias=options.get("bias", 0.0), scale=options.get("scale", EVEN.H**-0.5)
    )
    sees = np.broadcast_to(pairs.any(axis=-1).swapaxes(1, 2), ours[1].shape)
    close(ours[0], expected.output)
    close(ours[1], expected.lse)
    close(np.asarray(theirs[0])[sees], np.asarray(ours[0])[sees], what="output of jax")
    close(np.asarray(theirs[1])[sees], np.asarray(ours[1])[sees], what="residual of jax")


def test_dot_product_attention_without_a_batch_is_that_of_jax():
    inputs = arrays(Shape(batch=(), T=7, S=11, N=6, K=2, H=5, V=5))
    options = {"bias": BIAS[0], "mask": MASK[0], "key_value_seq_lengths": np.array([9], np.int32)}
    ours = jax.jit(functools.partial(dot_product_attention, is_causal=True))(**inputs, **options)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        theirs = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))(**inputs, **options)
    pairs = MASK[0] & np.tri(7, 11, dtype=bool) & (np.arange(11) < 9)
    sees = pairs.any(axis=-1)[0]
    close(np.asarray(ours)[sees], np.asarray(theirs)[sees])
    close(ours, oracle.attention(**inputs, bias=BIAS[0], visible=pairs).output)


@pytest.mark.parametrize("batch", [(), (3,)])
def test_a_mask_of_keys_alone_is_padding_and_hides_no_structure(batch, monkeypatch):
    """Kernels get a Mask, of which they can skip tiles, and no array of pairs."""
    given = []

    def spy(call):
        given.append((call.mask, call.kv_at))
        return reference.attend(call)

    monkeypatch.setitem(IMPLEMENTATIONS, "spy", Implementation(spy, reference.refuse))
    inputs = arrays(Shape(batch=batch, T=7, S=11, N=6, K=2, H=5, V=5))
    mask = MASK[:, :, :1] if batch else MASK[1, :, :1]
    call = functools.partial(dot_product_attention, local_window_size=4, implementation="spy")
    output = jax.jit(call)(**inputs, mask=mask)
    near = np.abs(np.arange(7)[:, None] - np.arange(11)) <= 4
    close(output, oracle.attention(**inputs, visible=mask & near).output)
    ((seen, kv_at),) = given
    assert isinstance(seen, Mask)
    assert kv_at.shape == (*batch, 11) if batch else (1, 11)


def test_dot_product_attention_takes_the_arguments_of_jax():
    ours, theirs = (inspect.signature(f).parameters for f in (dot_product_attention, jax.nn.dot_product_attention))
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(11,), (7, 11), (1, 11), (1, 7, 11), (1, 1, 11)], ids=str)
def test_masks_and_biases_of_fewer_dims_where_nothing_is_ambiguous(shape, causal):
    """As jax.nn broadcasts them; jax's own tests give `(1, 1, S)` beside 4 dims."""
    inputs = {name: jnp.asarray(x) for name, x in arrays(Shape(batch=(2,), T=7, S=11, N=6, K=2, H=5, V=5)).items()}
    random = np.random.default_rng(0)
    mask, bias = jnp.asarray(random.random(shape) < 0.6), jnp.asarray(random.normal(size=shape), jnp.float32)
    pairs = np.broadcast_to(mask, (2, 6, 7, 11)) & (np.tri(7, 11, dtype=bool) if causal else True)
    close(
        dot_product_attention(**inputs, mask=mask, is_causal=causal), oracle.attention(**inputs, visible=pairs).output
    )
    allowed = np.broadcast_to(np.tri(7, 11, dtype=bool) if causal else np.True_, (2, 6, 7, 11))
    whole = np.broadcast_to(bias, (2, 6, 7, 11))
    expected = oracle.attention(**inputs, bias=whole, visible=allowed).output
    close(dot_product_attention(**inputs, bias=bias, is_causal=causal), expected)


@pytest.mark.parametrize("shape", [(2, 7, 11), (6, 7, 11), (6, 1, 1)], ids=str)
def test_a_mask_of_3_dims_that_may_be_of_rows_or_heads_is_refused(shape):
    inputs = {name: jnp.asarray(x) for name, x in arrays(Shape(batch=(2,), T=7, S=11, N=6, K=2, H=5, V=5)).items()}
    with pytest.raises(ValueError, match="must be"):
        dot_product_attention(**inputs, mask=jnp.ones(shape, bool))
