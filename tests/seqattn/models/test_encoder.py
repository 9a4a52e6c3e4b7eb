"""An encoder and its heads: what they give, what they ignore, and what they share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import (
    Encoder,
    EncoderConfig,
    Local,
    MaskedTokens,
    Pooling,
    TextLabels,
    TokenLabels,
    TokenVectors,
    Window,
)
from seqattn.nn import Activation, BlockConfig
from tests.parameters import drawn

V, B, T, D, C = 13, 3, 7, 6, 5
BLOCK = BlockConfig(model_dim=D, hidden_dim=11, num_heads=2, dropout_rate=0.5)
HEADS = {"token": TokenLabels(C), "text": TextLabels(C), "masked": MaskedTokens()}
TOKENS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
AT = Coordinates.from_lengths([7, 4, 0], T)
REAL = np.asarray(AT.segment) != 0
every_head = pytest.mark.parametrize("name", HEADS)


@functools.cache
def _encoder(name: str, **options) -> Encoder:
    config = EncoderConfig(V, 2, BLOCK, head=HEADS[name], **options)
    return drawn(lambda: Encoder(config, rngs=nnx.Rngs(0)))


@jax.jit
def _call(model, tokens, at):
    return model(tokens, at), model.encode(tokens, at)


@functools.cache
def _expected(name: str) -> tuple[np.ndarray, np.ndarray]:
    return tuple(map(np.asarray, _call(_encoder(name), jnp.asarray(TOKENS), AT)))


def _exact(param) -> np.ndarray:
    return np.asarray(param[...]).astype(np.float64)


def _linear(layer: nnx.Linear, x: np.ndarray) -> np.ndarray:
    return x @ _exact(layer.kernel) + _exact(layer.bias)


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _by_hand(model: Encoder, name: str, x: np.ndarray) -> np.ndarray:
    """The head in NumPy float64, over vectors `[B, T, D]`."""
    head = model.head
    if name == "token":
        return _linear(head.output, x)
    if name == "text":
        means = [x[row, REAL[row]].mean(axis=0) if REAL[row].any() else np.zeros(D) for row in range(B)]
        return _linear(head.output, np.tanh(_linear(head.hidden, np.stack(means))))
    hidden = _gelu(_linear(head.hidden, x))
    centred = hidden - hidden.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + head.norm.epsilon)
    normal = normal * _exact(head.norm.scale) + _exact(head.norm.bias)
    return normal @ _exact(model.embedding.table).T + _exact(head.bias)


@every_head
def test_each_head_is_its_formula(name):
    logits, x = _expected(name)
    assert logits.shape == {"token": (B, T, C), "text": (B, C), "masked": (B, T, V)}[name]
    np.testing.assert_allclose(logits, _by_hand(_encoder(name), name, x.astype(np.float64)), atol=1e-4)


@every_head
def test_padding_changes_nothing_whatever_it_holds_and_wherever_it_is(name):
    """Tokens out of range too, whose vectors would be NaN."""
    model, (expected, _) = _encoder(name), _expected(name)
    spoilt = np.where(REAL, TOKENS, np.random.default_rng(1).choice([-7, V, 999], (B, T))).astype(np.int32)
    order = np.tile(np.arange(T), (B, 1))
    order[1] = [4, 0, 5, 1, 2, 6, 3]
    moved, real = (np.take_along_axis(x, order, axis=1) for x in (spoilt, REAL))
    for tokens, present, index in ((spoilt, REAL, np.arange(T) + 0 * order), (moved, real, order)):
        logits = np.asarray(_call(model, jnp.asarray(tokens), Coordinates.from_present(jnp.asarray(present)))[0])
        if name == "text":
            np.testing.assert_allclose(logits, expected, atol=1e-5)
        else:
            np.testing.assert_allclose(
                logits[present], np.take_along_axis(expected, index[..., None], axis=1)[present], atol=1e-5
            )
        assert np.all(np.isfinite(logits))


def test_the_label_of_a_text_without_positions_is_that_of_a_set():
    model, order = _encoder("text", positions=None), np.array([2, 0, 3, 1, 4, 6, 5])
    expected = np.asarray(_call(model, jnp.asarray(TOKENS), AT)[0])
    permuted = np.asarray(_call(model, jnp.asarray(TOKENS[:, order]), AT)[0])
    np.testing.assert_allclose(permuted, expected, atol=1e-5)
    with_order = _call(_encoder("text"), jnp.asarray(TOKENS[:, order]), AT)[0]
    assert np.abs(with_order - _expected("text")[0])[:2].max() > 1e-3


def test_all_parameters_but_the_heads_are_those_of_every_encoder():
    found = []
    for name in HEADS:
        flat = nnx.to_flat_state(nnx.state(_encoder(name), nnx.Param))
        found.append({path: leaf.shape for path, leaf in flat if path[0] != "head"})
        assert len(flat) > len(found[-1])
    assert found[0] == found[1] == found[2]
    # So what one has learnt another can begin with.
    tagger, masked = nnx.clone(_encoder("token")), drawn(lambda: _fresh(MaskedTokens()), seed=2)
    nnx.update(tagger, {name: nnx.state(getattr(masked, name)) for name in ("embedding", "stack")})
    given = jnp.asarray(TOKENS), AT
    np.testing.assert_array_equal(_call(tagger, *given)[1], _call(masked, *given)[1])


def _fresh(head) -> Encoder:
    return Encoder(EncoderConfig(V, 2, BLOCK, head=head), rngs=nnx.Rngs(0))


def test_attention_is_where_real_tokens_look():
    model = _encoder("token", pattern=(Window(2), Local(3)))
    weights = np.asarray(jax.jit(lambda model: model.attention(jnp.asarray(TOKENS), AT))(model))
    assert weights.shape == (B, 4, T, T)
    index, real = np.arange(T), REAL[:, :, None] & REAL[:, None]
    window, block = np.abs(index[:, None] - index) < 2, index[:, None] // 3 == index // 3
    for head, seen in enumerate((window, window, block, block)):
        np.testing.assert_array_equal(weights[:, head] > 0, real & seen)
    np.testing.assert_allclose(weights.sum(axis=-1), np.repeat(REAL[:, None], 4, axis=1), atol=1e-6)


@every_head
def test_every_dropout_has_a_key_of_its_own(name):
    model, given = _encoder(name), (jnp.asarray(TOKENS), AT)
    with jax.debug_key_reuse(True):
        jax.eval_shape(lambda key: model(*given, dropout_key=key), jax.random.key(0))


@pytest.mark.parametrize(("rows", "length"), [(0, T), (B, 0)])
@every_head
def test_a15_no_rows_or_no_tokens(name, rows, length):
    at = Coordinates.from_lengths(jnp.zeros(rows, jnp.int32), length)
    logits = jax.eval_shape(lambda model: model(jnp.zeros((rows, length), jnp.int32), at), _encoder(name))
    assert logits.shape == {"token": (rows, length, C), "text": (rows, C), "masked": (rows, length, V)}[name]


@pytest.mark.parametrize("head", [TokenLabels(0), TextLabels(0)])
def test_a_head_has_labels(head):
    with pytest.raises(ValueError, match=r"num_labels \(0\) must be an integer of at least 1"):
        nnx.eval_shape(lambda: _fresh(head))


@pytest.mark.parametrize(
    ("head", "activation"),
    [
        (TextLabels(C, Pooling.FIRST), np.tanh),
        (TextLabels(C, Pooling.FIRST, Activation.RELU), lambda x: np.maximum(x, 0)),
    ],
)
def test_the_vector_of_the_first_real_token_may_stand_for_a_text(head, activation):
    model = drawn(lambda: Encoder(EncoderConfig(V, 1, BLOCK, head=head), rngs=nnx.Rngs(0)))
    # The first text starts after padding, and the last has no token.
    at = Coordinates.from_segments(jnp.asarray([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [0] * 7]))
    logits, vectors = _call(model, jnp.asarray(TOKENS), at)
    first = np.stack([vectors[0, 2], vectors[1, 0], np.zeros(D)]).astype(np.float64)
    expected = _linear(model.head.output, activation(_linear(model.head.hidden, first)))
    np.testing.assert_allclose(logits, expected, atol=2e-5)


def test_without_a_head_the_vectors_are_the_result():
    model = drawn(lambda: Encoder(EncoderConfig(V, 1, BLOCK, head=TokenVectors()), rngs=nnx.Rngs(0)))
    result, vectors = _call(model, jnp.asarray(TOKENS), AT)
    np.testing.assert_array_equal(result, vectors)


def test_types_of_tokens_have_vectors_and_those_of_padding_are_not_looked_up():
    config = EncoderConfig(V, 1, BLOCK, head=TokenVectors(), num_types=2, embedding_scale=1.0, norm_embedding=True)
    model = drawn(lambda: Encoder(config, rngs=nnx.Rngs(0)))
    tokens, types = jnp.asarray(TOKENS), jnp.asarray(np.where(REAL, TOKENS % 2, 99))
    found = np.asarray(model(tokens, AT, types=types))
    # A table of tokens and types as one.
    both = nnx.clone(model)
    joined = model.embedding.table[...][:, None] + model.types.table[...][None]
    both.embedding.table = nnx.Param(joined.reshape(-1, D))
    both.types.table = nnx.Param(jnp.zeros((2, D)))
    expected = np.asarray(both(tokens * 2 + jnp.where(jnp.asarray(REAL), types, 0), AT))
    np.testing.assert_allclose(found[REAL], expected[REAL], atol=2e-5)
    np.testing.assert_array_equal(model(tokens, AT), model(tokens, AT, types=jnp.zeros_like(tokens)))
    with pytest.raises(ValueError, match="num_types is 0"):
        _encoder("token")(tokens, AT, types=types)
