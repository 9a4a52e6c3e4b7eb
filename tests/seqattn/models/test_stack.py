"""A stack of blocks: who is influenced by whom, through all its layers, whole and in pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import Compressed, Full, Local, RelativeKeys, Stack, Window
from seqattn.nn import BlockConfig, EncoderBlock
from tests.parameters import drawn

B, T, D, N = 2, 13, 6, 2
BLOCK = BlockConfig(model_dim=D, hidden_dim=5, num_heads=N, dropout_rate=0.5)
X = jnp.asarray(np.random.default_rng(0).normal(size=(B, T, D)), jnp.float32)
SEGMENT = np.array([[1] * 5 + [2] * 8, [0, 3, 3, 3, 0, 3, 3, 3, 3, 3, 1, 1, 0]])
AT = Coordinates.from_segments(jnp.asarray(SEGMENT))
POSITION = np.asarray(AT.position)
PATTERNS = {
    "full": (Full(),),
    "window": (Window(3),),
    "local": (Local(4),),
    "compressed": (Compressed(3),),
    "mixed": (Window(4), Compressed(3), Local(4)),
    "lmlml": (Local(4), Compressed(3), Local(4), Compressed(3), Local(4)),
}


@functools.cache
def _stack(name: str, causal: bool = True, positions=None) -> Stack:
    pattern, sizes = PATTERNS[name], {"causal": causal, "positions": positions}
    return drawn(lambda: Stack(BLOCK, len(pattern), pattern=pattern, **sizes, rngs=nnx.Rngs(0)))


_call = jax.jit(lambda stack, x, at: stack(x, at))


def _sees(attention, causal: bool, row: int, query: int, key: int) -> bool:
    """Whether a token has a say in what another finds in one layer."""
    if SEGMENT[row, query] != SEGMENT[row, key] or SEGMENT[row, key] == 0:
        return False
    here, there = POSITION[row, query], POSITION[row, key]
    if isinstance(attention, Compressed):
        return (there // attention.stride + 1) * attention.stride - 1 <= here
    if causal and there > here:
        return False
    if isinstance(attention, Window):
        return abs(here - there) < attention.size
    return isinstance(attention, Full) or here // attention.size == there // attention.size


def _influence(pattern, causal: bool) -> np.ndarray:
    """`[B, T, T]`: whether a token of the input has a say in one of the output, through the layers and past them."""
    influence = np.broadcast_to(np.eye(T, dtype=bool), (B, T, T))
    for attention in pattern:
        layer = np.eye(T, dtype=bool) | np.array(
            [[[_sees(attention, causal, row, q, k) for k in range(T)] for q in range(T)] for row in range(B)]
        )
        influence = np.einsum("bqk,bks->bqs", layer.astype(int), influence.astype(int)) > 0
    return influence


CASES = [(name, True) for name in PATTERNS if name != "mixed"] + [(name, False) for name in ("window", "local")]


@pytest.mark.parametrize(("name", "causal"), CASES, ids=lambda x: {True: "causal", False: "both"}.get(x, x))
def test_who_is_influenced_by_whom_by_gradients(name, causal):
    """No later token, no other text, no padding, nothing outside window or block; and all that should be."""
    stack, direction = _stack(name, causal), jnp.asarray(np.random.default_rng(1).normal(size=D), jnp.float32)
    slopes = jax.jit(jax.jacobian(lambda x: stack(x, AT) @ direction))(X)
    found, real = np.abs(slopes).max(axis=-1) > 0, SEGMENT != 0
    expected = np.zeros((B, T, B, T), bool)
    expected[np.arange(B), :, np.arange(B)] = _influence(PATTERNS[name], causal)
    np.testing.assert_array_equal(found[real], expected[real])
    if causal:
        future = (SEGMENT[:, :, None] == SEGMENT[:, None]) & (POSITION[:, None] > POSITION[:, :, None])
        assert not found[np.arange(B), :, np.arange(B)][future & real[..., None]].any()


# More than 64 tokens read a cache in tiles.
SIZES, LONG = (3, 67, 1), 71


@pytest.mark.parametrize("name", ["local", "compressed"])
def test_pieces_of_a_text_are_the_whole(name):
    """One text a row, as caches have them, with padding between its tokens."""
    stack, random = _stack(name), np.random.default_rng(2)
    x, real = jnp.asarray(random.normal(size=(B, LONG, D)), jnp.float32), random.random((B, LONG)) < 0.8

    @jax.jit
    def both(stack, x, at):
        caches, found, start = stack.start(B, LONG, x.dtype), [], 0
        for size in SIZES:
            piece, piece_at = jax.tree.map(lambda a, start=start, size=size: a[:, start : start + size], (x, at))
            output, caches = stack.extend(piece, piece_at, caches)
            found.append(output)
            start += size
        return jnp.concatenate(found, axis=1), stack(x, at)

    found, expected = both(stack, x, Coordinates.from_present(jnp.asarray(real)))
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


def test_steps_through_all_kinds_of_caches_are_the_whole():
    stack, at = _stack("lmlml"), Coordinates.from_present(jnp.asarray(SEGMENT != 0))

    @jax.jit
    def steps(stack, x, at):
        def step(caches, token):
            x, at = token
            output, caches = stack.extend(x, at, caches)
            return caches, output[:, 0]

        tokens = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0)[:, :, None], (x, at))
        return jnp.moveaxis(jax.lax.scan(step, stack.start(B, T, x.dtype), tokens)[1], 0, 1)

    real = SEGMENT != 0
    np.testing.assert_allclose(steps(stack, X, at)[real], _call(stack, X, at)[real], atol=1e-5)


def test_packed_texts_are_as_each_alone():
    stack = _stack("lmlml")
    expected = _call(stack, X, AT)
    for row, segment in ((0, 1), (0, 2), (1, 3), (1, 1)):
        text = SEGMENT[row] == segment
        alone = np.zeros((B, T, D), np.float32)
        alone[0, : text.sum()] = X[row, text]
        output = _call(stack, jnp.asarray(alone), Coordinates.from_lengths(np.array([text.sum(), 0]), T))
        np.testing.assert_allclose(output[0, : text.sum()], expected[row, text], atol=1e-5)


@functools.cache
def _trained():
    """Gradients by the parameters of a mixed stack, and its weights."""
    return jax.jit(jax.grad(lambda stack: ((stack(X, AT)[:, :, 0] ** 2).sum(), stack.weights(X, AT)), has_aux=True))(
        _stack("mixed", positions=RelativeKeys(2))
    )


def test_every_parameter_is_trained():
    gradients, _ = _trained()
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(gradient != 0), jax.tree_util.keystr(path)
        assert np.all(np.isfinite(gradient)), jax.tree_util.keystr(path)
    for layer in range(3):
        assert np.any(gradients.scores.tables[layer] != 0)


def test_weights_are_of_all_layers_but_the_compressed_ones():
    weights = np.asarray(_trained()[1])
    assert weights.shape == (B, 2 * N, T, T)
    for layer, attention in enumerate((Window(4), Local(4))):
        seen = np.array([[[_sees(attention, True, row, q, k) for k in range(T)] for q in range(T)] for row in range(B)])
        for head in (N * layer, N * layer + 1):
            np.testing.assert_array_equal(weights[:, head] > 0, seen)
            np.testing.assert_allclose(weights[:, head].sum(axis=-1), seen.any(axis=-1), atol=1e-6)
    assert jax.eval_shape(lambda stack: stack.weights(X, AT), _stack("compressed")).shape == (B, 0, T, T)


def test_every_layer_drops_by_a_key_of_its_own(monkeypatch):
    stack, found = _stack("lmlml"), []
    call = EncoderBlock.__call__

    def spy(block, x, at, **options):
        found.append(options["dropout_key"])
        return call(block, x, at, **options)

    monkeypatch.setattr(EncoderBlock, "__call__", spy)
    with jax.debug_key_reuse(True):
        jax.eval_shape(lambda key: stack(X, AT, dropout_key=key), jax.random.key(0))
    assert len({id(key) for key in found} - {id(None)}) == 5


def test_no_layers_change_nothing():
    stack = Stack(BLOCK, 0, causal=True, positions=None, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(stack(X, AT, dropout_key=jax.random.key(0)), X)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": ()}, r"pattern must name what at least one layer attends to, got \(\)"),
        ({"num_layers": 0, "block": BlockConfig(num_heads=0)}, r"num_heads \(0\) must be an integer of at least 1"),
        ({"num_layers": -1}, r"num_layers \(-1\) must be an integer of at least 0"),
        ({"causal": False, "pattern": (Full(), Compressed())}, "compressed attention needs causal=True"),
        ({"pattern": (Compressed(0),)}, r"stride \(0\) must be an integer of at least 1"),
        ({"pattern": (Local(0),)}, r"the size of a block \(0\) must be an integer of at least 1"),
        ({"pattern": (Window(0),)}, r"the size of a sliding window \(0\)"),
        ({"causal": False, "pattern": (Window(0),)}, r"the size of a sliding window \(0\)"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused(changes, message):
    options = {"block": BLOCK, "num_layers": 1, "causal": True, "positions": None} | changes
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Stack(**options, rngs=nnx.Rngs(0)))
