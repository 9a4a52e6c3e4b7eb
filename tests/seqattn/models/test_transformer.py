"""The Transformer: the sizes of the paper, packed texts, positions, and the end of its cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.decoding import generate
from seqattn.models import Learned, Rotary, Sinusoidal, Transformer, TransformerConfig
from seqattn.nn import BlockConfig
from seqattn.positions import sinusoidal
from tests.parameters import drawn

V, S, T = 13, 7, 5
BLOCK = BlockConfig(model_dim=12, hidden_dim=5, num_heads=2)
CONFIG = TransformerConfig(V, num_encoder_layers=1, num_decoder_layers=2, block=BLOCK)
POSITIONS = {"sinusoidal": Sinusoidal(), "learned": Learned(11), "rotary": Rotary(50.0)}
SOURCE, TARGET = (np.random.default_rng(0).integers(0, V, (2, n)).astype(np.int32) for n in (S, T))


@functools.cache
def _model(positions: str = "sinusoidal", **changes) -> Transformer:
    config = dataclasses.replace(CONFIG, positions=POSITIONS[positions], **changes)
    return drawn(lambda: Transformer(config, rngs=nnx.Rngs(0)))


@jax.jit
def _decode(model, source, source_at, target, target_at):
    return model.decode(target, target_at, model.encode(source, source_at))


_step = jax.jit(lambda model, tokens, state: model.step(tokens, state))
_start = jax.jit(
    lambda model, source, source_at, max_length: model.start(model.encode(source, source_at), max_length),
    static_argnames="max_length",
)


def _count(config: TransformerConfig) -> int:
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@pytest.mark.parametrize(
    ("preset", "count", "in_the_paper"),
    [(TransformerConfig.base, 63_045_632, 65e6), (TransformerConfig.big, 214_171_648, 213e6)],
    ids=["base", "big"],
)
def test_the_presets_have_the_sizes_of_the_paper(preset, count, in_the_paper):
    """Vaswani 2017, table 3, with the 37,000 tokens of section 5.1."""
    found = _count(preset(37_000))
    assert found == count
    assert abs(found / in_the_paper - 1) < 0.04


def test_parameters_of_each_choice():
    small = _count(CONFIG)
    own_tables = _count(dataclasses.replace(CONFIG, share_embeddings=False))
    assert own_tables - small == V * 12
    assert _count(dataclasses.replace(CONFIG, positions=Learned(11))) - small == 2 * 11 * 12
    assert _count(dataclasses.replace(CONFIG, positions=Rotary())) == small
    # Five attentions of two matrices each for keys and values, halved; two norms after the last blocks.
    fewer = dataclasses.replace(CONFIG, block=dataclasses.replace(BLOCK, num_kv_heads=1, norm_first=True))
    assert _count(fewer) - small == -5 * 2 * 12 * 6 + 2 * 2 * 12


def test_d23_a_shared_table_is_one_leaf_through_jit_split_and_merge():
    model = _model()
    graph, params = nnx.split(model)
    jitted = jax.jit(lambda model: model)(model)
    for other in (jitted, nnx.merge(graph, params), jax.jit(lambda params: nnx.merge(graph, params))(params)):
        tables = [leaf for leaf in jax.tree.leaves(other) if leaf.shape == (V, 12)]
        assert len(tables) == 1
        assert jax.tree.structure(other) == jax.tree.structure(model)


def _packed() -> list:
    """Two rows of two pairs of texts each: sources of 4 and 3 tokens, targets of 2 and 3."""
    source_segment, target_segment = (jnp.tile(jnp.array(x), (2, 1)) for x in ([1] * 4 + [2] * 3, [1] * 2 + [2] * 3))
    at = Coordinates.from_segments(source_segment), Coordinates.from_segments(target_segment)
    return [jnp.asarray(SOURCE), at[0], jnp.asarray(TARGET), at[1]]


def _separate() -> list:
    """The two pairs of the first of these rows, a row each."""
    source, target = np.zeros((2, S), np.int32), np.zeros((2, T), np.int32)
    source[0, :4], source[1, :3] = SOURCE[0, :4], SOURCE[0, 4:]
    target[0, :2], target[1, :3] = TARGET[0, :2], TARGET[0, 2:]
    at = Coordinates.from_lengths([4, 3], S), Coordinates.from_lengths([2, 3], T)
    return [jnp.asarray(source), at[0], jnp.asarray(target), at[1]]


@pytest.mark.parametrize("positions", POSITIONS)
def test_a23_packed_pairs_are_separate_pairs(positions):
    found, expected = _decode(_model(positions), *_packed()), _decode(_model(positions), *_separate())
    np.testing.assert_allclose(found[0, :2], expected[0, :2], atol=1e-5)
    np.testing.assert_allclose(found[0, 2:], expected[1, :3], atol=1e-5)


def test_a23_changing_one_text_leaves_the_other_bitwise_the_same():
    packed = _packed()
    expected = np.asarray(_decode(_model(), *packed))
    changed = [packed[0].at[0, 1].add(1) % V, packed[1], packed[2].at[0, 0].add(1) % V, packed[3]]
    found = np.asarray(_decode(_model(), *changed))
    np.testing.assert_array_equal(found[0, 2:], expected[0, 2:])
    assert np.all(found[0, :2] != expected[0, :2])


def test_a_text_of_another_segment_number_is_the_same_text():
    at, target_at = Coordinates.from_lengths([7, 4], S), Coordinates.from_lengths([5, 3], T)
    renumbered = [Coordinates(x.position, x.segment * jnp.array([[-2], [6]])) for x in (at, target_at)]
    expected = _decode(_model(), jnp.asarray(SOURCE), at, jnp.asarray(TARGET), target_at)
    found = _decode(_model(), jnp.asarray(SOURCE), renumbered[0], jnp.asarray(TARGET), renumbered[1])
    np.testing.assert_array_equal(found, expected)
    state = _start(_model(), jnp.asarray(SOURCE), renumbered[0], T)
    logits, _ = _step(_model(), jnp.asarray(TARGET[:, 0]), state)
    np.testing.assert_allclose(logits, expected[:, 0], atol=1e-5)


@pytest.mark.parametrize("positions", POSITIONS)
def test_the_order_of_tokens_matters_by_their_positions_alone(positions):
    """Tokens in another order with their own positions are the same text; at other positions they are not."""
    model, order = _model(positions), np.array([3, 0, 6, 1, 5, 2, 4])
    at, target_at = Coordinates.from_lengths([S, S], S), Coordinates.from_lengths([T, T], T)
    rest = jnp.asarray(TARGET), target_at
    expected = _decode(model, jnp.asarray(SOURCE), at, *rest)
    moved = jax.tree.map(lambda x: x[:, order], at)
    np.testing.assert_allclose(_decode(model, jnp.asarray(SOURCE[:, order]), moved, *rest), expected, atol=1e-5)
    assert np.abs(_decode(model, jnp.asarray(SOURCE[:, order]), at, *rest) - expected).max() > 1e-3


def test_only_differences_of_positions_matter_to_rotary():
    at, target_at = Coordinates.from_lengths([7, 4], S), Coordinates.from_lengths([5, 3], T)
    given = jnp.asarray(SOURCE), at, jnp.asarray(TARGET), target_at
    later = [Coordinates(x.position + start, x.segment) for x, start in ((at, 3), (target_at, 17))]
    expected = _decode(_model("rotary"), *given)
    np.testing.assert_allclose(_decode(_model("rotary"), given[0], later[0], given[2], later[1]), expected, atol=1e-4)


def test_token_vectors_and_sines_are_added():
    """Where sublayers give nothing the logits are those of the sum `sqrt(D) e + PE`, normalised, by the tied table."""
    config = dataclasses.replace(CONFIG, block=dataclasses.replace(BLOCK, norm_first=True))
    model = drawn(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    model.decoder = jax.tree.map(jnp.zeros_like, model.decoder)
    target_at = Coordinates.from_lengths([5, 3], T)
    table = np.asarray(model.embedding.table[...]).astype(np.float64)
    x = 12**0.5 * table[TARGET] + np.asarray(sinusoidal(target_at.position, 12))
    x = (x - x.mean(axis=-1, keepdims=True)) / x.std(axis=-1, keepdims=True)
    x = x * np.asarray(model.decoder_norm.scale[...]) + np.asarray(model.decoder_norm.bias[...])
    found = _decode(model, jnp.asarray(SOURCE), Coordinates.from_lengths([7, 4], S), jnp.asarray(TARGET), target_at)
    real = np.asarray(target_at.segment) != 0
    np.testing.assert_allclose(np.asarray(found)[real], (x @ table.T)[real], atol=1e-4)


def test_the_sum_of_token_and_position_vectors_is_dropped():
    """A vector has no gradient where it was dropped."""
    block, one = dataclasses.replace(BLOCK, dropout_rate=0.5), Coordinates.from_lengths([1], 1)
    model = _model("learned", block=block, num_decoder_layers=1)

    def number(model, key):
        keys = jax.random.split(key)
        memory = model.encode(jnp.array([[3]]), one, dropout_key=keys[0])
        return model.decode(jnp.array([[7]]), one, memory, dropout_key=keys[1]).sum()

    gradients = jax.jit(jax.vmap(jax.grad(number), (None, 0)))(model, jax.random.split(jax.random.key(0), 64))
    for positions in (gradients.source_positions, gradients.target_positions):
        assert 0.35 < np.mean(np.asarray(positions.table[...])[:, 0] == 0) < 0.65


def test_alignment_is_where_the_decoder_looked():
    model, source_at, target_at = _model(), Coordinates.from_lengths([7, 4], S), Coordinates.from_lengths([5, 3], T)

    @jax.jit
    def both(model, source, target):
        memory = model.encode(source, source_at)
        key_value = memory.key_values[1]
        blind = dataclasses.replace(key_value, value=jnp.zeros_like(key_value.value).at[:, 2].set(1.0))
        other = dataclasses.replace(memory, key_values=(memory.key_values[0], blind))
        return [(model.alignment(target, target_at, m), model.decode(target, target_at, m)) for m in (memory, other)]

    (weights, logits), (same, different) = both(model, jnp.asarray(SOURCE), jnp.asarray(TARGET))
    assert weights.shape == (2, 4, T, S)
    real = np.asarray(target_at.segment) != 0
    np.testing.assert_allclose(np.asarray(weights).sum(axis=-1).transpose(0, 2, 1)[real], 1, atol=1e-6)
    assert not np.any(weights[1, ..., 4:])
    # Another value in the last block changes what is found there, not where anybody looked.
    np.testing.assert_array_equal(weights, same)
    assert np.abs(logits - different).max() > 1e-3
    # The two blocks and their heads look differently.
    assert np.abs(weights[:, :, None] - weights[:, None])[0, :, :, 0].max(axis=-1)[~np.eye(4, dtype=bool)].min() > 1e-4


def test_a14_a_step_beyond_the_cache_is_an_error_and_inside_jit_nan():
    model, at = _model(), Coordinates.from_lengths([7, 4], S)
    state, tokens = _start(model, jnp.asarray(SOURCE), at, T), jnp.array([3, 5])
    for _ in range(T):
        logits, state = _step(model, tokens, state)
        assert np.all(np.isfinite(logits))
    with pytest.raises(ValueError, match="1 tokens do not fit at slot 5 into a cache of 5"):
        model.step(tokens, state)
    assert np.all(np.isnan(_step(model, tokens, state)[0]))


def test_a14_generating_more_than_the_cache_holds_is_a_failure():
    @jax.jit
    def decode(model, state, first):
        return generate(model.step, state, first, max_length=T + 2, end_token=V - 1, pad_token=V - 2)

    model = _model()
    state = _start(model, jnp.asarray(SOURCE), Coordinates.from_lengths([7, 4], S), T)
    found = decode(model, state, jnp.array([3, 5]))
    np.testing.assert_array_equal(found.failed, ~found.ended)
    assert np.any(found.failed)
    assert np.all(found.length <= T)


def test_a22_a_position_beyond_the_table_is_an_error_and_inside_jit_nan():
    model, length = _model("learned"), 13
    source, at = jnp.zeros((1, length), jnp.int32), Coordinates.from_lengths([length], length)
    with pytest.raises(ValueError, match=r"positions must be in \[0, 11\), got 0 to 12"):
        model.encode(source, at)
    given = jnp.zeros((1, 2), jnp.int32), Coordinates.from_lengths([2], 2)
    assert np.all(np.isnan(_decode(model, source, at, *given)))
    # Padding has no position, so a row may be padded to any length.
    assert np.all(np.isfinite(_decode(model, source, Coordinates.from_lengths([11], length), *given)))


def test_coordinates_of_one_row_serve_a_batch():
    model = _model("learned")
    at = [Coordinates.from_lengths([4, 4], S), Coordinates.from_lengths([3, 3], T)]
    one = [jax.tree.map(lambda x: x[0], x) for x in at]
    expected = _decode(model, jnp.asarray(SOURCE), at[0], jnp.asarray(TARGET), at[1])
    np.testing.assert_allclose(
        _decode(model, jnp.asarray(SOURCE), one[0], jnp.asarray(TARGET), one[1])[:, :3], expected[:, :3], atol=1e-6
    )
    assert _shapes_of_start(model, one[0]) == _shapes_of_start(model, at[0])


def _shapes_of_start(model, at) -> list[jax.ShapeDtypeStruct]:
    def leaves(model):
        return jax.tree.leaves(model.start(model.encode(jnp.asarray(SOURCE), at), T))

    return jax.eval_shape(leaves, model)


def test_in_bfloat16():
    model = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _model())
    at = Coordinates.from_lengths([7, 4], S), Coordinates.from_lengths([5, 3], T)
    with jax.numpy_dtype_promotion("standard"):  # inside flax's norm
        found = _decode(model, jnp.asarray(SOURCE), at[0], jnp.asarray(TARGET), at[1])
        state = _shapes_of_start(model, at[0])
    assert {leaf.dtype for leaf in state} == {jnp.dtype(x) for x in (jnp.bfloat16, jnp.int32, bool)}
    assert found.dtype == jnp.bfloat16
    expected = _decode(_model(), jnp.asarray(SOURCE), at[0], jnp.asarray(TARGET), at[1])
    np.testing.assert_allclose(found.astype(jnp.float32), expected, atol=0.1 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": BlockConfig(model_dim=7, num_heads=7)}, r"model_dim \(7\) must be even for sinusoidal"),
        ({"block": BlockConfig(model_dim=6, num_heads=2), "positions": Rotary()}, r"dim \(3\) must be even"),
        ({"block": BlockConfig(model_dim=12, num_heads=5)}, r"model_dim \(12\) must be a multiple of num_heads \(5\)"),
        ({"block": BlockConfig(model_dim=12, num_heads=6, num_kv_heads=4)}, r"num_heads \(6\).*num_kv_heads \(4\)"),
        ({"block": dataclasses.replace(BLOCK, dropout_rate=1.0)}, r"dropout rate \(1.0\) must be in \[0, 1\)"),
        ({"vocab_size": 0}, r"vocab_size \(0\)"),
        ({"num_encoder_layers": -1}, r"num_encoder_layers \(-1\)"),
        ({"num_decoder_layers": 0}, r"num_decoder_layers \(0\)"),
        ({"block": dataclasses.replace(BLOCK, hidden_dim=0)}, r"hidden_dim \(0\)"),
        ({"positions": Learned(0)}, r"max_length \(0\)"),
        ({"positions": Rotary(0.0)}, r"base \(0.0\) must be positive"),
    ],
    ids=str,
)
def test_a21_a28_sizes_that_do_not_fit_are_refused(changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
