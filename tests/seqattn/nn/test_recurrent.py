"""Recurrent layers against a plain loop over flax's cells, token by token and row by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.nn import Cell, Direction, Recurrent, RecurrentEncoder
from tests.parameters import drawn

B, T, D, H = 5, 7, 3, 4
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
SEGMENT = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 1, 1, 0],  # padding on both sides and between
        [0, 0, 0, 0, 0, 0, 0],
        [2, 2, 0, 5, 5, 1, 1],  # three texts
    ],
    np.int32,
)
AT = Coordinates.from_segments(jnp.asarray(SEGMENT))
REAL = SEGMENT != 0
each_cell = pytest.mark.parametrize("cell", Cell)


@functools.cache
def _layer(cell: Cell = Cell.GRU, backward: bool = False) -> Recurrent:
    return drawn(lambda: Recurrent(D, H, cell=cell, backward=backward, rngs=nnx.Rngs(0)))


@functools.cache
def _encoder(direction: Direction, cell: Cell = Cell.GRU, num_layers: int = 2, dropout_rate: float = 0.0):
    options = {"cell": cell, "num_layers": num_layers, "direction": direction, "dropout_rate": dropout_rate}
    return drawn(lambda: RecurrentEncoder(D, H, **options, rngs=nnx.Rngs(0)))


_run = jax.jit(lambda layer, x, at, carry=None: layer(x, at, carry))
_encode = jax.jit(lambda encoder, x, at, key=None: encoder(x, at, dropout_key=key))
_step = jax.jit(lambda cell, carry, x: cell(carry, x))


def _loop(layer: Recurrent, x: np.ndarray, segment: np.ndarray, initial) -> tuple[np.ndarray, object]:
    """Outputs `[T, H]` and the last state of one row."""
    carry, last, outputs = initial, 0, np.zeros((len(x), H), np.float32)
    for t in reversed(range(len(x))) if layer.backward else range(len(x)):
        if segment[t] == 0:
            continue
        carry, output = _step(layer.cell, initial if last not in (0, segment[t]) else carry, jnp.asarray(x[t]))
        last, outputs[t] = segment[t], output
    return outputs, carry


def _initial(cell: Cell, value: float):
    state = jnp.full(H, value, jnp.float32)
    return (state, -state) if cell is Cell.LSTM else state


@each_cell
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_layer_is_a_loop_over_its_cell(cell, backward):
    layer = _layer(cell, backward)
    output, carry = _run(layer, jnp.asarray(X), AT)
    for row in range(B):
        expected, last = _loop(layer, X[row], SEGMENT[row], _initial(cell, 0.0))
        np.testing.assert_allclose(output[row], expected, atol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(carry), jax.tree.leaves(last), strict=True):
            np.testing.assert_allclose(ours[row], theirs, atol=1e-6)


@pytest.mark.parametrize("cell", [Cell.GRU, Cell.LSTM])
def test_b1_a_text_of_length_0_ends_in_the_initial_state(cell):
    layer = _layer(cell)
    for value in (0.0, 0.3):
        carry = jax.tree.map(lambda x: jnp.tile(x, (B, 1)), _initial(cell, value)) if value else None
        output, last = _run(layer, jnp.asarray(X), AT, carry)
        assert not np.any(output[3])
        for ours, initial in zip(jax.tree.leaves(last), jax.tree.leaves(_initial(cell, value)), strict=True):
            np.testing.assert_array_equal(ours[3], initial)
            assert np.any(np.asarray(ours[0]) != np.asarray(initial))
    nothing, last = layer(jnp.zeros((B, 0, D)), Coordinates.from_lengths([0] * B, 0), carry)
    assert nothing.shape == (B, 0, H)
    np.testing.assert_array_equal(jax.tree.leaves(last)[0], jax.tree.leaves(carry)[0])


def test_a_given_state_is_where_every_text_of_a_row_starts():
    layer, initial = _layer(Cell.LSTM), _initial(Cell.LSTM, 0.3)
    output, _ = _run(layer, jnp.asarray(X), AT, jax.tree.map(lambda x: jnp.tile(x, (B, 1)), initial))
    for row in range(B):
        np.testing.assert_allclose(output[row], _loop(layer, X[row], SEGMENT[row], initial)[0], atol=1e-6)


def test_b2_any_number_of_batch_dims():
    layer = _layer(Cell.LSTM, True)
    expected, carry = _run(layer, jnp.asarray(X), AT)
    one = jax.tree.map(lambda a: a[2], (jnp.asarray(X), AT, expected, carry))
    more = jax.tree.map(lambda a: a[None, :, None], (jnp.asarray(X), AT, expected, carry))
    for x, at, *wanted in (one, more):
        for ours, theirs in zip(jax.tree.leaves(_run(layer, x, at)), jax.tree.leaves(wanted), strict=True):
            assert ours.shape == theirs.shape
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_coordinates_of_one_row_serve_a_batch():
    one = jax.tree.map(lambda x: x[2], AT)
    rows = jax.tree.map(lambda x: jnp.tile(x, (B, 1)), one)
    for ours, theirs in zip(*(jax.tree.leaves(_run(_layer(), jnp.asarray(X), at)) for at in (one, rows)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_texts_inside_a_row_are_texts_of_their_own():
    for backward in (False, True):
        layer = _layer(Cell.GRU, backward)
        output, carry = _run(layer, jnp.asarray(X), AT)
        texts = [(0, 2), (3, 5), (5, 7)]
        alone = np.zeros((B, T, D), np.float32)
        for row, (start, stop) in enumerate(texts):
            alone[row, : stop - start] = X[4, start:stop]
        found, last = _run(layer, jnp.asarray(alone), Coordinates.from_lengths([2, 2, 2, 0, 0], T))
        for row, (start, stop) in enumerate(texts):
            np.testing.assert_allclose(output[4, start:stop], found[row, : stop - start], atol=1e-6)
        np.testing.assert_allclose(carry[4], last[0 if backward else 2], atol=1e-6)


@jax.jit
def _gradients(encoder, x, at):
    def total(encoder, x):
        output, carries = encoder(x, at)
        return jnp.sin(jnp.arange(1.0, output.size + 1) * output.ravel()).sum() + sum(jnp.sin(c).sum() for c in carries)

    return jax.value_and_grad(total, argnums=(0, 1))(encoder, x)


def test_b3_what_padding_holds_changes_nothing_also_nan_forward_and_backward():
    encoder = _encoder(Direction.BOTH)
    expected = jax.tree.leaves((_encode(encoder, jnp.asarray(X), AT), _gradients(encoder, jnp.asarray(X), AT)))
    for filling in (1e6, np.inf, np.nan):
        spoilt = jnp.asarray(np.where(REAL[..., None], X, np.float32(filling)))
        found = jax.tree.leaves((_encode(encoder, spoilt, AT), _gradients(encoder, spoilt, AT)))
        for ours, theirs in zip(found, expected, strict=True):
            assert np.all(np.isfinite(theirs))
            np.testing.assert_array_equal(ours, theirs)
    assert not np.any(np.asarray(expected[-1])[~REAL])
    assert np.all(np.abs(np.asarray(expected[-1])[REAL]).max(axis=-1) > 0)


def test_a24_where_the_padding_is_changes_nothing():
    """The two tokens of a text at every place of a row, whole or with a gap, read both ways by two layers."""
    encoder, places = _encoder(Direction.BOTH), [(0, 1), (5, 6), (2, 3), (0, 6), (1, 4)]
    x, present = np.zeros((B, T, D), np.float32), np.zeros((B, T), bool)
    for row, place in enumerate(places):
        x[row, list(place)], present[row, list(place)] = X[0, :2], True
    output, carries = _encode(encoder, jnp.asarray(x), Coordinates.from_present(jnp.asarray(present)))
    for row, place in enumerate(places):
        np.testing.assert_allclose(output[row, jnp.array(place)], output[0, :2], atol=1e-6)
        for carry in carries:
            np.testing.assert_allclose(carry[row], carry[0], atol=1e-6)


def test_reading_both_ways_is_two_layers_side_by_side():
    encoder = _encoder(Direction.BOTH, Cell.LSTM)
    x, expected_carries = jnp.asarray(X), []
    for forward, backward in encoder.layers:
        assert (forward.backward, backward.backward) == (False, True)
        halves = [_run(layer, x, AT) for layer in (forward, backward)]
        x = jnp.concatenate([output for output, _ in halves], axis=-1)
        expected_carries.append([np.concatenate(p, -1) for p in zip(*(jax.tree.leaves(c) for _, c in halves))])  # noqa: B905
    output, carries = _encode(encoder, jnp.asarray(X), AT)
    assert output.shape == (B, T, H)
    np.testing.assert_allclose(output, x, atol=1e-6)
    assert len(carries) == len(encoder.layers) == 2
    for carry, expected in zip(carries, expected_carries, strict=True):
        for ours, theirs in zip(jax.tree.leaves(carry), expected, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("direction", [Direction.FORWARD, Direction.BACKWARD])
def test_one_direction_is_one_layer_after_the_other(direction):
    encoder = _encoder(direction)
    x, carries = jnp.asarray(X), []
    for (layer,) in encoder.layers:
        assert layer.backward == (direction is Direction.BACKWARD)
        x, carry = _run(layer, x, AT)
        carries.append(carry)
    for ours, theirs in zip(jax.tree.leaves(_encode(encoder, jnp.asarray(X), AT)), [x, *carries], strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_dropout_acts_between_layers_and_is_decided_by_the_key():
    one, two = (_encoder(Direction.FORWARD, num_layers=n, dropout_rate=0.5) for n in (1, 2))
    keys, x = jax.random.split(jax.random.key(0)), jnp.asarray(X)
    np.testing.assert_array_equal(_encode(one, x, AT, keys[0])[0], _encode(one, x, AT)[0])
    first, again, other = (np.asarray(_encode(two, x, AT, key)[0]) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2


def test_eager_is_jitted():
    layer = _layer()
    np.testing.assert_allclose(layer(jnp.asarray(X), AT)[0], _run(layer, jnp.asarray(X), AT)[0], atol=1e-6)


@each_cell
def test_any_dtype_of_parameters(cell):
    half = Recurrent(D, H, cell=cell, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    output = _run(half, jnp.asarray(X, jnp.bfloat16), AT)
    assert {leaf.dtype for leaf in jax.tree.leaves((half, output))} == {jnp.dtype(jnp.bfloat16)}


def test_parameters_cast_after_the_first_draw():
    with jax.enable_x64(True):
        double = jax.tree.map(lambda x: x.astype(jnp.float64), _layer(Cell.LSTM))
        output, _ = _run(double, jnp.asarray(X, jnp.float64), AT)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, _run(_layer(Cell.LSTM), jnp.asarray(X), AT)[0], atol=1e-6)


def test_tokens_of_a_larger_dtype_than_the_parameters_keep_it():
    with jax.numpy_dtype_promotion("standard"):
        half = Recurrent(D, H, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        assert _run(half, jnp.asarray(X), AT)[0].dtype == jnp.float32


def test_recurrent_weights_start_orthogonal():
    for dtype, tolerance in ((jnp.float32, 1e-6), (jnp.bfloat16, 2e-2)):
        kernel = Recurrent(D, H, cell=Cell.SIMPLE, param_dtype=dtype, rngs=nnx.Rngs(0)).cell.dense_h.kernel[...]
        kernel = np.asarray(kernel.astype(jnp.float32))
        np.testing.assert_allclose(kernel @ kernel.T, np.eye(H), atol=tolerance)


def test_the_gru_has_a_bias_inside_its_reset_gate():
    """It is zero at first, and nothing else is drawn than without it; `n = tanh(W_in x + b_in + r (W_hn h + b_hn))`."""
    fresh = Recurrent(D, H, rngs=nnx.Rngs(0))
    assert not np.any(fresh.cell.hidden_bias[...])
    plain = nnx.GRUCell(D, H, rngs=nnx.Rngs(0))
    for name in ("dense_i", "dense_h"):
        np.testing.assert_array_equal(getattr(fresh.cell, name).kernel[...], getattr(plain, name).kernel[...])
    x, state = jnp.asarray(X[:, 0]), jnp.asarray(X[:, 1, :1] + np.arange(H, dtype=np.float32))
    np.testing.assert_array_equal(_step(fresh.cell, state, x)[0], _step(plain, state, x)[0])
    cell = _layer().cell
    with jax.enable_x64(True):
        i, h = (np.asarray(dense(y), np.float64) for dense, y in ((cell.dense_i, x), (cell.dense_h, state)))
    r, z = (1 / (1 + np.exp(-(i + h)[:, part * H : (part + 1) * H])) for part in (0, 1))
    n = np.tanh(i[:, 2 * H :] + r * (h[:, 2 * H :] + np.asarray(cell.hidden_bias[...], np.float64)))
    np.testing.assert_allclose(_step(cell, state, x)[0], (1 - z) * n + z * np.asarray(state), atol=1e-5)


def test_no_random_state_is_stored():
    for cell in Cell:
        assert not jax.tree.leaves(nnx.state(_encoder(Direction.BOTH, cell), nnx.Not(nnx.Param)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_dim": 5, "direction": Direction.BOTH}, r"hidden_dim \(5\) must be even to be shared by two"),
        ({"num_layers": 0}, r"num_layers \(0\) must be an integer of at least 1"),
        ({"dropout_rate": 1.5}, r"dropout rate \(1.5\) must be in \[0, 1\)"),
        ({"dropout_rate": -0.1}, r"dropout rate \(-0.1\)"),
        ({"dropout_rate": float("nan")}, r"dropout rate \(nan\)"),
    ],
    ids=str,
)
def test_wrong_sizes_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        RecurrentEncoder(**({"input_dim": D, "hidden_dim": H} | options), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("name", ["input_dim", "hidden_dim"])
@pytest.mark.parametrize("size", [0, -1])
def test_sizes_below_1_are_refused_by_name(name, size):
    with pytest.raises(ValueError, match=rf"{name} \({size}\) must be an integer of at least 1"):
        Recurrent(**{"input_dim": D, "hidden_dim": H, name: size}, rngs=nnx.Rngs(0))
