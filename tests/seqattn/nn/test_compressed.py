"""Memory-compressed attention against a NumPy float64 loop over texts and their blocks, whole and in pieces."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from seqattn.coordinates import Coordinates
from seqattn.masks import Causal, SameSegment
from seqattn.nn import CompressedCache, KeyValue, MemoryCompressedAttention, MultiHeadAttention, Rotary, StaticCache
from tests import oracle
from tests.parameters import drawn

B, T, D, N, K, H, STRIDE = 3, 13, 7, 6, 2, 4, 3
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
# Texts in a row at odd offsets; padding before and between the texts; and padding between the tokens of one text.
SEGMENT = np.array(
    [
        [1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3],
        [0, 0, 1, 1, 1, 1, 0, 4, 4, 4, 0, 2, 2],
        [1, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 0, 1],
    ]
)
AT = Coordinates.from_segments(jnp.asarray(SEGMENT))
POSITION = np.asarray(AT.position)


@functools.cache
def _attention(stride: int = STRIDE, **options) -> MemoryCompressedAttention:
    options = {"num_heads": N, "num_kv_heads": K, "head_dim": H, "mask": Causal() & SameSegment()} | options
    return drawn(lambda: MemoryCompressedAttention(D, stride=stride, **options, rngs=nnx.Rngs(0)))


@jax.jit
def _attend(attention, x, at):
    return attention(x, at, attention.project(x, at))


@functools.cache
def _rotary() -> tuple[MemoryCompressedAttention, np.ndarray]:
    """Attention that knows positions, and what it gives for `X`."""
    attention = _attention(rotary=Rotary(50.0))
    return attention, np.asarray(_attend(attention, jnp.asarray(X), AT))


def _blocks(row: int, stride: int = STRIDE) -> list[list[int]]:
    """The tokens of each complete block of a row: text by text, counted from its start."""
    blocks = []
    for segment in sorted(set(SEGMENT[row]) - {0}):
        text = sorted(np.flatnonzero(SEGMENT[row] == segment), key=lambda token: POSITION[row, token])
        blocks += [text[start : start + stride] for start in range(0, len(text) // stride * stride, stride)]
    return blocks


def _seen(row: int, token: int) -> list[list[int]]:
    """The blocks of the token's text that end where it stands or before."""
    return [
        block
        for block in _blocks(row)
        if SEGMENT[row, block[0]] == SEGMENT[row, token] and POSITION[row, block[-1]] <= POSITION[row, token]
    ]


def _by_hand(attention: MemoryCompressedAttention, x: np.ndarray) -> np.ndarray:
    exact = lambda param: np.asarray(param[...]).astype(np.float64)  # noqa: E731
    heads = lambda name, x: (x @ exact(getattr(attention, name).kernel)).reshape(len(x), -1, H)  # noqa: E731
    output = np.zeros(x.shape)
    for row, token in np.argwhere(SEGMENT != 0):
        if not (blocks := _seen(row, token)):
            continue
        made = {}
        for name in ("key", "value"):
            weight, tokens = exact(getattr(attention, f"{name}_filter")), heads(name, x[row].astype(np.float64))
            made[name] = np.stack(
                [
                    np.stack([sum(tokens[t, k] @ weight[j, k] for j, t in enumerate(block)) for k in range(K)])
                    for block in blocks
                ]
            )
        query = _rotated(attention, heads("query", x[row, token][None].astype(np.float64)), POSITION[row, [token]])
        key = _rotated(attention, made["key"], POSITION[row, [block[-1] for block in blocks]])
        found = oracle.attention(query, key, made["value"]).output
        output[row, token] = found.reshape(-1) @ exact(attention.output.kernel)
    return output


def _rotated(attention: MemoryCompressedAttention, heads: np.ndarray, position: np.ndarray) -> np.ndarray:
    if attention.rotary is None:
        return heads
    angle = position[:, None, None] * attention.rotary.base ** (-np.arange(H // 2) / (H // 2))
    turned = (heads[..., : H // 2] + 1j * heads[..., H // 2 :]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


@pytest.mark.parametrize("rotary", [None, Rotary(50.0)])
def test_it_is_a_loop_over_texts_and_blocks(rotary):
    attention = _attention(rotary=rotary)
    np.testing.assert_allclose(_attend(attention, jnp.asarray(X), AT), _by_hand(attention, X), atol=1e-5)


def test_in_float64_to_the_last_digits():
    with jax.enable_x64(True):
        attention = _attention(param_dtype=jnp.float64)
        output = _attend(attention, jnp.asarray(X, jnp.float64), AT)
    assert output.dtype == np.float64
    np.testing.assert_allclose(output, _by_hand(attention, X), rtol=1e-11, atol=1e-13)


def test_in_bfloat16():
    attention, x = _attention(param_dtype=jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)
    output, expected = _attend(attention, x, AT), _by_hand(attention, np.asarray(x))
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())


def test_a_key_lies_where_the_last_token_of_its_block_is():
    """Also to a rotation: it knows distances alone, so that all moved by whole blocks changes nothing."""
    attention, expected = _rotary()
    at = attention.project(jnp.asarray(X), AT).at
    for row in range(B):
        found = [(int(s), int(p)) for s, p in zip(at.segment[row], at.position[row], strict=True) if s != 0]
        assert sorted(found) == [(SEGMENT[row, block[-1]], POSITION[row, block[-1]]) for block in _blocks(row)]
    later = Coordinates(AT.position + 4 * STRIDE, AT.segment)
    np.testing.assert_allclose(_attend(attention, jnp.asarray(X), later), expected, atol=1e-5)


def test_no_future_leaks_and_every_complete_block_is_seen_by_gradients():
    attention, direction = _attention(), jnp.asarray(np.random.default_rng(1).normal(size=D), jnp.float32)
    slopes = jax.jit(jax.jacobian(lambda x: _attend(attention, x, AT) @ direction))(jnp.asarray(X))
    found = np.abs(slopes).max(axis=-1) > 0
    expected = np.zeros((B, T, B, T), bool)
    for row, token in np.argwhere(SEGMENT != 0):
        blocks = _seen(row, token)
        for block in blocks:
            expected[row, token, row, block] = True
        # A query chooses among keys: where there is but one, it changes nothing.
        expected[row, token, row, token] |= len(blocks) > 1
    np.testing.assert_array_equal(found, expected)


def test_packed_texts_are_as_each_alone():
    attention, expected = _rotary()
    for row, segment in ((0, 1), (0, 2), (1, 4), (1, 1), (2, 1)):
        text = SEGMENT[row] == segment
        alone = np.zeros((B, T, D), np.float32)
        alone[0, : text.sum()] = X[row, text]
        output = _attend(attention, jnp.asarray(alone), Coordinates.from_lengths(np.array([text.sum(), 0, 0]), T))
        np.testing.assert_allclose(output[0, : text.sum()], expected[row, text], atol=1e-5)


def test_padding_of_nan_changes_nothing_forward_or_backward():
    (attention, expected), real = _rotary(), jnp.asarray(SEGMENT != 0)[..., None]

    @jax.jit
    def gradients(attention, x):
        total = lambda x, filters: (_attend(nnx.merge(graph, filters, rest), x, AT) ** 2).sum()  # noqa: E731
        graph, filters, rest = nnx.split(attention, lambda path, _: path[-1] in ("key_filter", "value_filter"), ...)
        return jax.grad(total, argnums=(0, 1))(x, filters)

    spoilt = jnp.where(real, X, np.float32(np.nan))
    np.testing.assert_array_equal(_attend(attention, spoilt, AT), expected)
    for ours, clean in zip(*(jax.tree.leaves(gradients(attention, x)) for x in (spoilt, jnp.asarray(X))), strict=True):
        np.testing.assert_array_equal(ours, clean)
        assert np.any(ours != 0)


def test_where_a_token_is_not_finite_shows_in_what_sees_its_block():
    x = X.copy()
    x[0, 1] = np.nan
    output = np.asarray(_attend(_attention(), jnp.asarray(x), AT))
    # Token 1 is in the first block of the first text, which ends at token 2; its own query sees nothing yet.
    assert np.isnan(output[0, 2:7]).all()
    assert np.isfinite(np.delete(output[0], range(2, 7), axis=0)).all()
    assert np.isfinite(output[1:]).all()


def test_stride_one_with_filters_that_do_nothing_is_ordinary_attention():
    options = {"num_kv_heads": K, "head_dim": H, "rotary": Rotary(50.0)}
    attention = _attention(stride=1, rotary=Rotary(50.0))
    attention.key_filter[...] = attention.value_filter[...] = jnp.broadcast_to(jnp.eye(H), (1, K, H, H))
    plain = drawn(lambda: MultiHeadAttention(D, N, mask=attention.mask, **options, rngs=nnx.Rngs(0)))
    nnx.update(plain, {name: nnx.state(getattr(attention, name)) for name in ("query", "key", "value", "output")})
    x = jnp.asarray(X)
    np.testing.assert_allclose(_attend(attention, x, AT), _attend(plain, x, AT), atol=1e-5)


def test_a_fresh_convolution_is_the_mean_of_its_block():
    attention = jax.jit(lambda: MemoryCompressedAttention(D, N, head_dim=H, stride=STRIDE, rngs=nnx.Rngs(0)))()
    kv = jax.jit(lambda attention, x: attention.project(x, Coordinates.range(7)))(attention, jnp.asarray(X[0, :7]))
    for made, linear in ((kv.key, attention.key), (kv.value, attention.value)):
        tokens = (X[0, :6] @ np.asarray(linear.kernel[...])).reshape(2, STRIDE, N, H)
        np.testing.assert_allclose(made, tokens.mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("batch", [(), (1, 3, 1)], ids=str)
def test_any_number_of_leading_dims(batch):
    attention, expected = _rotary()
    shaped = jax.tree.map(lambda x: x.reshape(*batch, *x.shape[1:]) if batch else x[0], (jnp.asarray(X), AT))
    wanted = expected.reshape(*batch, T, D) if batch else expected[0]
    np.testing.assert_allclose(_attend(attention, *shaped), wanted, atol=1e-5)


@pytest.mark.parametrize(("rows", "length"), [(B, 2), (B, 0), (0, T)])
def test_a15_no_block_no_tokens_or_no_rows(rows, length):
    attention, x = _attention(), jnp.asarray(X[:rows, :length])
    at = Coordinates.from_lengths(jnp.full(rows, length), length)
    assert attention.project(x, at).key.shape == (rows, length // STRIDE, K, H)
    output = _attend(attention, x, at)
    assert output.shape == (rows, length, D)
    assert not np.any(output)


def _shapes(jaxpr) -> set[tuple[int, ...]]:
    """Of all arrays that a program makes, also in the programs inside it."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {tuple(getattr(variable.aval, "shape", ())) for variable in equation.outvars}
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(inner, "jaxpr", inner)
            found |= _shapes(inner) if hasattr(inner, "eqns") else set()
    return found


def test_there_are_as_many_keys_as_complete_blocks_at_most():
    shapes = _shapes(jax.make_jaxpr(_attend)(_attention(implementation="reference"), jnp.asarray(X), AT).jaxpr)
    assert any(shape.count(T) == 1 and T // STRIDE in shape for shape in shapes)
    assert not any(shape.count(T) > 1 for shape in shapes)


SIZES = (1, 4, 0, 2, 1, 5)


@functools.partial(jax.jit, static_argnames="room")
def _cached(attention, x, at, room=T):
    """Tokens in pieces of any size; padding lies where it lies."""
    cache = CompressedCache.empty(len(x), room, K, H, stride=attention.stride, dtype=x.dtype)
    outputs, start = [], 0
    for size in SIZES:
        piece, piece_at = jax.tree.map(lambda a, start=start, size=size: a[:, start : start + size], (x, at))
        cache, seen = attention.extend(cache, piece, piece_at)
        outputs.append(attention(piece, piece_at, seen))
        start += size
    return jnp.concatenate(outputs, axis=1), cache.overflowed


# One text a row: whole, with padding between its tokens, and one of two tokens.
ALONE = np.array([[1] * T, SEGMENT[2], [0] * 5 + [1, 1] + [0] * 6])
ALONE_AT = Coordinates.from_segments(jnp.asarray(ALONE))


def test_cached_in_pieces_of_any_size_is_at_once():
    attention, _ = _rotary()
    x = jnp.where(jnp.asarray(ALONE)[..., None] != 0, X, np.float32(np.nan))
    output, overflowed = _cached(attention, x, ALONE_AT)
    np.testing.assert_allclose(output, _attend(attention, x, ALONE_AT), atol=1e-5)
    assert not overflowed.any()


@pytest.mark.parametrize(("room", "lost"), [(11, [True, False, False]), (2, [True, True, False])])
def test_a_cache_that_is_too_small_shows_in_what_sees_its_blocks(room, lost):
    """Of 13, 8 and 2 tokens; there is room for 3 blocks, or for none."""
    (attention, _), x = _rotary(), jnp.asarray(X)
    expected = np.asarray(_attend(attention, x, ALONE_AT))
    output, overflowed = map(np.asarray, _cached(attention, x, ALONE_AT, room=room))
    np.testing.assert_array_equal(overflowed, lost)
    assert np.isnan(output[0, -1]).all()
    for row in np.flatnonzero(~overflowed):
        np.testing.assert_allclose(output[row], expected[row], atol=1e-5)
    wrong = np.abs(output - expected).max(axis=-1) > 1e-5
    assert not wrong.any(), "what is not right is NaN"


def test_a_cache_that_is_too_small_raises():
    compress, cache = jax.jit(_attention(stride=2).compress), CompressedCache.empty(B, 5, K, H, stride=2)
    tokens = jnp.ones((B, 1, K, H))
    for position in range(5):
        at = Coordinates(jnp.full((B, 1), position), jnp.array([[1], [0], [1]]))
        cache, _ = cache.add(KeyValue(tokens, tokens, at), compress)
    with pytest.raises(ValueError, match="more blocks than the 2 that the cache has room for"):
        cache.add(KeyValue(tokens, tokens, Coordinates(at.position + 1, at.segment)), compress)


BEAMS, STEPS = 2, 7
PARENTS = np.random.default_rng(4).integers(0, BEAMS, (STEPS, B, BEAMS))


def test_hypotheses_part_and_take_each_others_place():
    """After a prompt of two tokens, against each history attended as a whole."""
    attention = _attention(stride=2, rotary=Rotary(50.0))
    tokens = np.random.default_rng(5).normal(size=(STEPS, B, BEAMS, D)).astype(np.float32)

    @jax.jit
    def steps(attention, prompt, tokens, parents):
        def step(carry, given):
            (cache, position), (x, parent) = carry, given
            at = Coordinates(jnp.full((B, BEAMS), position), jnp.ones((B, BEAMS), jnp.int32))
            cache, seen = attention.extend(cache, x, at)
            return (cache.select(parent), position + 1), attention(x, at, seen)

        cache = CompressedCache.empty(B, STEPS + 2, K, H, stride=2)
        cache, _ = attention.extend(cache, prompt, Coordinates.from_lengths([2] * B, 2))
        return jax.lax.scan(step, (cache.branch(BEAMS), 2), (tokens, parents))[1]

    found = np.asarray(steps(attention, jnp.asarray(X[:, :2]), jnp.asarray(tokens), jnp.asarray(PARENTS)))
    history = np.zeros((B, BEAMS, STEPS + 2, D), np.float32)
    history[:, :, :2] = X[:, None, :2]
    histories = []
    for t in range(STEPS):
        history[:, :, t + 2] = tokens[t]
        histories.append(history)
        history = np.take_along_axis(history, PARENTS[t][:, :, None, None], axis=1)
    whole = np.asarray(_attend(attention, jnp.asarray(np.stack(histories)), Coordinates.range(STEPS + 2)))
    np.testing.assert_allclose(found, np.stack([whole[t, :, :, t + 2] for t in range(STEPS)]), atol=1e-5)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match=r"stride \(0\) must be an integer of at least 1"):
        MemoryCompressedAttention(D, N, head_dim=H, stride=0, rngs=nnx.Rngs(0))
    attention, x, at = _attention(), jnp.asarray(X[:, :1]), Coordinates.from_lengths([1] * B, 1)
    with pytest.raises(TypeError, match="needs a CompressedCache, got StaticCache"):
        attention.extend(StaticCache.empty(B, T, K, H), x, at)
    with pytest.raises(TypeError, match=r"grows by MemoryCompressedAttention\.extend, not by append"):
        CompressedCache.empty(B, T, K, H, stride=STRIDE).append(attention.project(x, at))
    cache = CompressedCache.empty(B, T, K, H, stride=STRIDE).branch(BEAMS)
    with pytest.raises(ValueError, match="the cache has 2 hypotheses per row"):
        cache.select(jnp.zeros((B, 3), jnp.int32))


def test_a_cache_of_a_symbolic_size_has_at_least_one_slot(as_users_call_it):
    (size,) = export.symbolic_shape("size")

    def slots(x):
        columns = CompressedCache.empty(B, x.shape[0] + 1, K, H, stride=STRIDE).columns
        return columns.finite

    program = export.export(jax.jit(slots))(jax.ShapeDtypeStruct((size,), jnp.float32))
    assert program.call(jnp.ones(1)).shape == (B, 1)
    assert program.call(jnp.ones(T)).shape[1] >= (T + 1) // STRIDE
