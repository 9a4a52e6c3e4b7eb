"""Self attention that reads the source for a recurrent decoder: order, sets and where the decoder starts."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import Learned, Seq2Seq, Seq2SeqConfig, Sinusoidal
from seqattn.models.attention_encoder import AttentionEncoder, SelfAttentionEncoder
from seqattn.nn import Cell
from tests.parameters import drawn

V, B, S, T, E, H = 13, 4, 7, 3, 5, 6
READER = AttentionEncoder(num_layers=1, num_heads=3, hidden_dim=11, positions=None)
X = np.random.default_rng(0).normal(size=(B, S, E)).astype(np.float32)
PRESENT = np.array([[True] * S, [False, True, True, False, True, False, False], [False] * S, [True] + [False] * 6])
AT = Coordinates.from_present(jnp.asarray(PRESENT))


@functools.cache
def _encoder(config: AttentionEncoder = READER, cell: Cell = Cell.GRU) -> SelfAttentionEncoder:
    sizes = {"num_layers": 2, "cell": cell, "dropout_rate": 0.5}
    return drawn(lambda: SelfAttentionEncoder(config, E, H, **sizes, rngs=nnx.Rngs(0)))


_read = jax.jit(lambda encoder, x, at, key=None: encoder(x, at, dropout_key=key))


@pytest.mark.parametrize("cell", [Cell.GRU, Cell.LSTM])
def test_the_decoder_starts_from_the_mean_of_real_states(cell):
    encoder = _encoder(cell=cell)
    states, starts = _read(encoder, jnp.asarray(X), AT)
    mean = np.stack([np.asarray(states[row], np.float64)[PRESENT[row]].sum(axis=0) for row in range(B)])
    mean /= np.maximum(PRESENT.sum(axis=1, keepdims=True), 1)
    assert len(starts) == 2
    for layer, start in zip(encoder.starts, starts, strict=True):
        found = np.concatenate(start, axis=-1) if cell is Cell.LSTM else np.asarray(start)
        np.testing.assert_allclose(found, mean @ np.asarray(layer.kernel[...], np.float64), atol=1e-5)
        assert not np.any(found[2])  # an empty source
        assert np.all(np.any(found[[0, 1, 3]], axis=1))
    assert len(jax.tree.leaves(starts)) == (4 if cell is Cell.LSTM else 2)


def _logits(positions, source: np.ndarray) -> np.ndarray:
    """Logits of a decoder after each of three tokens, for one source without padding."""
    config = Seq2SeqConfig(
        V, embedding_dim=E, hidden_dim=H, attention_encoder=dataclasses.replace(READER, positions=positions)
    )

    @jax.jit
    def decode(model, source):
        memory = model.encode(source, Coordinates.range(S))
        return model.decode(jnp.array([[1, 5, 2]]), Coordinates.range(T), memory)

    return np.asarray(decode(drawn(lambda: Seq2Seq(config, rngs=nnx.Rngs(0))), jnp.asarray(source)[None]))


@pytest.mark.parametrize("positions", [None, Sinusoidal()], ids=str)
def test_without_positions_a_source_is_a_set(positions):
    source = np.random.default_rng(1).permutation(V)[:S].astype(np.int32)
    difference = np.abs(_logits(positions, source) - _logits(positions, source[[3, 0, 6, 1, 2, 5, 4]])).max()
    assert difference < 1e-6 if positions is None else difference > 1e-3


def test_states_of_a_set_move_with_their_tokens():
    order = np.random.default_rng(2).permutation(S)
    at = Coordinates.from_lengths([S] * B, S)
    expected, starts = _read(_encoder(), jnp.asarray(X), at)
    moved, moved_starts = _read(_encoder(), jnp.asarray(X[:, order]), at)
    np.testing.assert_allclose(moved, np.asarray(expected)[:, order], atol=1e-5)
    np.testing.assert_allclose(moved_starts[0], starts[0], atol=1e-5)


def test_padding_leaves_no_trace_forward_or_backward():
    """NaN vectors at positions that no table holds; and padding anywhere is as good as none."""
    encoder = _encoder(dataclasses.replace(READER, positions=Learned(S)))

    @jax.jit
    def found(encoder, x, at):
        def number(encoder, x):
            states, starts = encoder(x, at)
            states = jnp.where(at.segment[..., None] != 0, states, 0.0)
            return (states**2).sum() + sum(jnp.sin(start).sum() for start in starts), (states, starts)

        return jax.grad(number, argnums=(0, 1), has_aux=True)(encoder, x)

    expected = found(encoder, jnp.asarray(X), AT)
    spoilt = jnp.where(PRESENT[..., None], X, np.float32(np.nan))
    at = Coordinates(jnp.where(PRESENT, AT.position, 999), AT.segment)
    for ours, theirs in zip(jax.tree.leaves(found(encoder, spoilt, at)), jax.tree.leaves(expected), strict=True):
        assert np.all(np.isfinite(theirs))
        np.testing.assert_array_equal(ours, theirs)
    alone, starts = _read(encoder, jnp.asarray(X[1, PRESENT[1]]), Coordinates.range(3))
    np.testing.assert_allclose(expected[1][0][1, PRESENT[1]], alone, atol=1e-5)
    np.testing.assert_allclose(expected[1][1][1][1], starts[1], atol=1e-5)


def test_texts_inside_a_row_do_not_see_each_other():
    at = Coordinates.from_segments(jnp.array([[1, 1, 1, 2, 2, 0, 2]] * B))
    expected, _ = _read(_encoder(), jnp.asarray(X), at)
    changed, _ = _read(_encoder(), jnp.asarray(X).at[:, 0].add(1.0), at)
    different = np.any(np.abs(np.asarray(changed) - np.asarray(expected)) > 1e-6, axis=-1)
    np.testing.assert_array_equal(different, [[True] * 3 + [False] * 4] * B)


def test_dropout_acts_and_no_length_is_refused():
    first, again, other = (
        np.asarray(_read(_encoder(), jnp.asarray(X), AT, jax.random.key(seed))[0]) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other)[PRESENT].max() > 1e-2
    states, starts = jax.eval_shape(_encoder(), jnp.zeros((B, 0, E)), Coordinates.from_lengths([0] * B, 0))
    assert (states.shape, starts[0].shape) == ((B, 0, H), (B, H))


def test_param_dtype_reaches_every_parameter_and_state():
    def states():
        options = {"num_layers": 1, "cell": Cell.LSTM, "dropout_rate": 0.0, "param_dtype": jnp.bfloat16}
        encoder = SelfAttentionEncoder(READER, E, H, **options, rngs=nnx.Rngs(0))
        with jax.numpy_dtype_promotion("standard"):  # flax's norms in bfloat16
            return nnx.state(encoder, nnx.Param), encoder(jnp.asarray(X, jnp.bfloat16), AT)

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(states))} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_dim": 5}, r"hidden_dim \(5\) must be even for sinusoidal positions"),
        ({"hidden_dim": 8}, r"model_dim \(8\) must be a multiple of num_heads \(3\)"),
        ({"num_layers": 0}, r"num_layers \(0\) must be an integer of at least 1"),
        ({"dropout_rate": 1.5}, r"dropout rate \(1.5\) must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    reader = dataclasses.replace(READER, positions=Sinusoidal())
    config = dataclasses.replace(Seq2SeqConfig(V, embedding_dim=E, hidden_dim=H, attention_encoder=reader), **changes)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Seq2Seq(config, rngs=nnx.Rngs(0)))
