"""Blocks against their parts put together by hand, and a cached step against training."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.masks import Causal, SameSegment
from seqattn.nn import Activation, BlockConfig, DecoderBlock, EncoderBlock, MixtureConfig, Residual, Rotary, StaticCache
from tests.parameters import drawn

B, T, S, D = 2, 5, 3, 12
CONFIG = BlockConfig(
    model_dim=D, hidden_dim=7, num_heads=6, num_kv_heads=3, activation=Activation.SILU, gated=True, qk_norm=True
)
X, SOURCE = (np.random.default_rng(0).normal(size=(B, n, D)).astype(np.float32) for n in (T, S))
X_AT, SOURCE_AT = Coordinates.from_lengths([5, 3], T), Coordinates.from_lengths([2, 3], S)
norm_first_and_last = pytest.mark.parametrize("norm_first", [True, False], ids=["norm_first", "norm_last"])


@functools.cache
def _encoder(**changes) -> EncoderBlock:
    config = dataclasses.replace(CONFIG, **changes)
    return drawn(lambda: EncoderBlock(config, mask=SameSegment(), rngs=nnx.Rngs(0)))


@functools.cache
def _decoder(**changes) -> DecoderBlock:
    config, masks = dataclasses.replace(CONFIG, **changes), {"mask": Causal() & SameSegment()}
    return drawn(
        lambda: DecoderBlock(config, **masks, memory_mask=SameSegment(), rotary=Rotary(50.0), rngs=nnx.Rngs(0))
    )


_encode = jax.jit(lambda block, x, at, key=None: block(x, at, dropout_key=key))


@jax.jit
def _decode(block, x, at, source, source_at, key=None):
    return block(x, at, block.project(x, at), block.remember(source, source_at), dropout_key=key)


@jax.jit
def _weights(block, x, at, source, source_at):
    return block.weights(x, at, block.project(x, at), block.remember(source, source_at))


@jax.jit
def _self_attend(attention, inner):
    return attention(inner, X_AT, attention.project(inner, X_AT))


@jax.jit
def _look(attention, inner):
    memory = attention.project(jnp.asarray(SOURCE), SOURCE_AT)
    return attention(inner, X_AT, memory), attention.weights(inner, X_AT, memory)


_feed = jax.jit(lambda network, inner: network(inner))


def _normalised(norm: nnx.LayerNorm | None, x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    if norm is None:
        return x
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + norm.epsilon)
    scaled = scaled if norm.scale is None else scaled * np.asarray(norm.scale[...])
    return scaled if norm.bias is None else scaled + np.asarray(norm.bias[...])


def _around(residual: Residual, x: np.ndarray, sublayer) -> np.ndarray:
    """The two formulas of the paper titles: Xiong 2020 and Vaswani 2017."""

    def apply(inner):
        return np.asarray(sublayer(jnp.asarray(inner, jnp.float32)))

    past = x if residual.use_residual else 0.0
    if residual.norm_first:
        return past + apply(_normalised(residual.norm, x))
    return _normalised(residual.norm, past + apply(x))


@norm_first_and_last
def test_an_encoder_block_is_its_parts(norm_first):
    block = _encoder(norm_first=norm_first)
    expected = _around(block.attention_residual, X, lambda inner: _self_attend(block.attention, inner))
    expected = _around(block.feed_forward_residual, expected, lambda inner: _feed(block.feed_forward, inner))
    np.testing.assert_allclose(_encode(block, jnp.asarray(X), X_AT), expected, atol=1e-4)


ABLATIONS = {
    "no_norm": {"use_norm": False},
    "no_residual": {"use_residual": False, "norm_first": True},
    "no_residual_norm_last": {"use_residual": False},
    "no_gain": {"norm_gain": False},
    "no_bias": {"norm_bias": False, "norm_first": True},
    "nothing": {"use_norm": False, "use_residual": False, "norm_first": True},
}


@pytest.mark.parametrize("changes", ABLATIONS.values(), ids=ABLATIONS)
def test_what_is_left_out_of_a_block_is_not_there(changes):
    block, whole = _encoder(**changes), _encoder()
    expected = _around(block.attention_residual, X, lambda inner: _self_attend(block.attention, inner))
    expected = _around(block.feed_forward_residual, expected, lambda inner: _feed(block.feed_forward, inner))
    np.testing.assert_allclose(_encode(block, jnp.asarray(X), X_AT), expected, rtol=1e-4, atol=1e-4)
    # Two norms of a gain and a bias each.
    missing = 4 if not changes.get("use_norm", True) else 2 * ("norm_gain" in changes or "norm_bias" in changes)
    assert len(jax.tree.leaves(whole)) - len(jax.tree.leaves(block)) == missing
    assert (block.attention_residual.norm is None) == ("use_norm" in changes)


def test_a_mixture_of_one_expert_is_the_network_itself():
    mixture = MixtureConfig(1, 1, capacity_factor=None, noise=False)
    block, plain = (nnx.clone(_encoder(**changes)) for changes in ({"mixture": mixture}, {}))
    nnx.update(plain.feed_forward, jax.tree.map(lambda x: x[0], nnx.state(block.feed_forward.experts)))
    for name in ("attention", "attention_residual", "feed_forward_residual"):
        nnx.update(getattr(plain, name), nnx.state(getattr(block, name)))
    output, expected = (np.asarray(_encode(each, jnp.asarray(X), X_AT)) for each in (block, plain))
    real = np.asarray(X_AT.segment) != 0
    np.testing.assert_allclose(output[real], expected[real], atol=1e-5)


@norm_first_and_last
def test_a_decoder_block_is_its_parts(norm_first):
    block = _decoder(norm_first=norm_first)
    looked = []

    def look(inner):
        output, weights = _look(block.memory_attention, inner)
        looked.append(weights)
        return output

    expected = _around(block.attention_residual, X, lambda inner: _self_attend(block.attention, inner))
    expected = _around(block.memory_residual, expected, look)
    expected = _around(block.feed_forward_residual, expected, lambda inner: _feed(block.feed_forward, inner))
    given = jnp.asarray(X), X_AT, jnp.asarray(SOURCE), SOURCE_AT
    np.testing.assert_allclose(_decode(block, *given), expected, atol=1e-4)
    np.testing.assert_allclose(_weights(block, *given), looked[0], atol=1e-5)


@norm_first_and_last
def test_cached_steps_of_a_decoder_block_are_training(norm_first):
    block, x = _decoder(norm_first=norm_first), jnp.asarray(X)

    @jax.jit
    def steps(block, x, at, source, source_at):
        cache, memory = StaticCache.empty(B, T + 2, 3, 2), block.remember(source, source_at)
        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], (x, at))

        def step(cache, token):
            x, at = token
            cache, seen = cache.append(block.project(x, at))
            return cache, block(x, at, seen, memory)[:, 0]

        return jnp.moveaxis(jax.lax.scan(step, cache, tokens)[1], 0, 1)

    given = x, X_AT, jnp.asarray(SOURCE), SOURCE_AT
    np.testing.assert_allclose(steps(block, *given), _decode(block, *given), atol=1e-5)


def test_the_attention_to_the_memory_is_not_rotated():
    """Positions of source and target are not comparable: moving either text changes nothing."""
    block, given = _decoder(norm_first=True), (jnp.asarray(X), X_AT, jnp.asarray(SOURCE), SOURCE_AT)
    expected = _decode(block, *given)
    for moved in (X_AT, Coordinates(X_AT.position + 7, X_AT.segment)):
        source_at = Coordinates(SOURCE_AT.position * 5 + 2, SOURCE_AT.segment)
        np.testing.assert_allclose(_decode(block, given[0], moved, given[2], source_at), expected, atol=1e-5)
    stretched = Coordinates(3 * X_AT.position, X_AT.segment)
    assert np.abs(_decode(block, given[0], stretched, *given[2:]) - expected).max() > 1e-2


RATES = ("dropout_rate", "attention_dropout_rate", "hidden_dropout_rate")


@pytest.mark.parametrize("rate", RATES)
def test_each_rate_of_dropout_acts(rate):
    block, x = _encoder(**(dict.fromkeys(RATES, 0.0) | {rate: 0.5})), jnp.asarray(X)
    keys = jax.random.split(jax.random.key(0))
    first, again, other = (np.asarray(_encode(block, x, X_AT, key)) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2


def test_without_a_key_nothing_drops():
    rates = dict.fromkeys(RATES, 0.5)
    for norm_first in (True, False):
        with_rates = _encoder(norm_first=norm_first, **rates)
        np.testing.assert_array_equal(
            _encode(with_rates, jnp.asarray(X), X_AT), _encode(_encoder(norm_first=norm_first), jnp.asarray(X), X_AT)
        )


def test_no_two_sublayers_drop_by_the_same_key():
    rates, key = dict.fromkeys(RATES, 0.5), jax.random.key(0)
    given = jnp.asarray(X), X_AT, jnp.asarray(SOURCE), SOURCE_AT
    with jax.debug_key_reuse(True):
        jax.eval_shape(lambda key: _encoder(**rates)(*given[:2], dropout_key=key), key)
        jax.eval_shape(lambda key: _decode(_decoder(**rates), *given, key), key)


def test_the_base_sizes():
    block = nnx.eval_shape(lambda: EncoderBlock(BlockConfig(), mask=None, rngs=nnx.Rngs(0)))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(block, nnx.Param)))
    assert {name: layer["kernel"] for name, layer in shapes["attention"].items()} == dict.fromkeys(
        ("query", "key", "value", "output"), (512, 512)
    )
    assert {name: layer["kernel"] for name, layer in shapes["feed_forward"].items()} == {
        "hidden": (512, 2048),
        "output": (2048, 512),
    }


@pytest.mark.parametrize("rate", RATES)
def test_a27_a_rate_that_is_no_probability_is_refused(rate):
    config = dataclasses.replace(CONFIG, **{rate: 1.5})
    with pytest.raises(ValueError, match=r"dropout rate \(1.5\) must be in \[0, 1\)"):
        nnx.eval_shape(lambda: EncoderBlock(config, mask=None, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("epsilon", [-1e-6, math.inf, math.nan])
def test_an_epsilon_that_makes_no_norm_is_refused(epsilon):
    with pytest.raises(ValueError, match=rf"norm_epsilon \({epsilon}\) must be at least 0 and finite"):
        dataclasses.replace(CONFIG, norm_epsilon=epsilon)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_heads": 0}, r"num_heads \(0\) must be an integer of at least 1"),
        ({"model_dim": 0}, r"model_dim \(0\) must be an integer of at least 1"),
        ({"model_dim": 13, "num_heads": 3}, r"model_dim \(13\) must be a multiple of num_heads \(3\)"),
    ],
    ids=str,
)
def test_a28_heads_that_share_no_vector_have_no_size(sizes, message):
    with pytest.raises(ValueError, match=message):
        _ = dataclasses.replace(CONFIG, **sizes).head_dim


def test_a28_heads_that_do_not_divide_are_refused():
    config = dataclasses.replace(CONFIG, num_kv_heads=4)
    with pytest.raises(ValueError, match=r"num_heads \(6\) must be a multiple of num_kv_heads \(4\)"):
        nnx.eval_shape(lambda: EncoderBlock(config, mask=None, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm": True}, "norm_bias must be False with rms_norm"),
        ({"norm_outputs": True, "use_norm": False}, "use_norm must be True with norm_outputs"),
    ],
)
def test_norms_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)


def test_a_norm_of_the_embedding_needs_norms():
    config = dataclasses.replace(CONFIG, use_norm=False)
    with pytest.raises(ValueError, match="use_norm must be True with norm_embedding"):
        config.embedding_norm(jnp.float32, nnx.Rngs(0))
