"""A decoder-only model: source and target are one text, in rows of one pair or of several."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.losses import cross_entropy
from seqattn.models import (
    BucketBiases,
    Compressed,
    Full,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    LinearBiases,
    Local,
    RelativeKeys,
    Rotary,
    Sinusoidal,
    Window,
)
from seqattn.nn import BlockConfig, MixtureConfig, routings
from tests.parameters import drawn

V, B, S, T = 13, 3, 7, 5
BLOCK = BlockConfig(model_dim=6, hidden_dim=5, num_heads=1)
KINDS = {
    "none": (None, Local(4)),
    "sinusoidal": (Sinusoidal(), Full()),
    "learned": (Learned(S + T), Full()),
    "rotary": (Rotary(50.0), Compressed(2)),
    "linear_biases": (LinearBiases(), Compressed(2)),
    "bucket_biases": (BucketBiases(6, 5), Full()),
    "relative_keys": (RelativeKeys(2), Window(3)),
}
MIXED = (Local(4), Compressed(3))
RANDOM = np.random.default_rng(0)
SOURCE, TARGET = (RANDOM.integers(0, V, (B, n)).astype(np.int32) for n in (S, T))
LENGTHS = ((7, 4, 0), (5, 2, 3))
AT = tuple(Coordinates.from_lengths(lengths, n) for lengths, n in zip(LENGTHS, (S, T), strict=True))


@functools.cache
def _model(positions=None, pattern=MIXED, **options) -> LanguageModel:
    config = LanguageModelConfig(V, len(pattern), BlockConfig(**(vars(BLOCK) | options)), positions, pattern)
    return drawn(lambda: LanguageModel(config, rngs=nnx.Rngs(0)))


@jax.jit
def _decode(model, source, source_at, target, target_at):
    return model.decode(target, target_at, model.encode(source, source_at))


def _pairs(model) -> np.ndarray:
    return np.asarray(_decode(model, jnp.asarray(SOURCE), AT[0], jnp.asarray(TARGET), AT[1]))


@pytest.mark.parametrize(
    ("positions", "attention"),
    [
        pytest.param(*kind, id=name, marks=() if index % 3 == 0 else pytest.mark.slow)
        for index, (name, kind) in enumerate(KINDS.items())
    ],
)
def test_a_pair_is_one_text(positions, attention):
    """The target behind its source, and source and target of each row side by side behind a source of padding."""
    model, (source, target) = _model(positions, (attention,)), np.array(LENGTHS)
    behind, whole = np.zeros((2, B, S + T), np.int32)
    for row in range(B):
        behind[row, :T] = TARGET[row]
        whole[row, : source[row] + target[row]] = [*SOURCE[row, : source[row]], *TARGET[row, : target[row]]]
    at = Coordinates.from_lengths(target, S + T)
    found = _decode(model, jnp.asarray(SOURCE), AT[0], jnp.asarray(behind), at)
    empty, whole_at = Coordinates.from_lengths([0] * B, S), Coordinates.from_lengths(source + target, S + T)
    expected = _decode(model, jnp.asarray(SOURCE), empty, jnp.asarray(whole), whole_at)
    for row in range(B):
        wanted = expected[row, source[row] : source[row] + target[row]]
        np.testing.assert_allclose(found[row, : target[row]], wanted, atol=1e-5)


def test_an_empty_context_may_have_no_room_at_all():
    """Sources of length 0, as of a plain language model."""
    model, (target, at) = _model(), (jnp.asarray(TARGET), AT[1])
    nothing = jnp.zeros((B, 0), jnp.int32), Coordinates.from_lengths([0] * B, 0)
    padding = jnp.asarray(SOURCE), Coordinates.from_lengths([0] * B, S)
    real = np.asarray(at.segment) != 0
    found, expected = (np.asarray(_decode(model, *source, target, at)) for source in (nothing, padding))
    np.testing.assert_allclose(found[real], expected[real], atol=1e-5)


def test_packed_pairs_are_as_each_alone():
    """Three pairs in a row, of which one has no source; their targets in another order than their sources."""
    model = _model()
    sources = Coordinates.from_segments(jnp.asarray([[1, 1, 1, 0, 3, 3, 3], [0] * S, [0] * S]))
    targets = Coordinates.from_segments(jnp.asarray([[3, 2, 2, 1, 1], [0] * T, [0] * T]))
    given = [jnp.asarray(np.roll(tokens, 1, axis=0)) for tokens in (SOURCE, TARGET)]
    packed = np.asarray(_decode(model, given[0], sources, given[1], targets))
    alone = [np.zeros((B, n), np.int32) for n in (S, T)]
    lengths = np.zeros((2, B), int)
    for row, segment in enumerate((1, 2, 3)):
        for tokens, at, whole, length in zip(given, (sources, targets), alone, lengths, strict=True):
            text = np.asarray(tokens[0])[np.asarray(at.segment[0]) == segment]
            whole[row, : len(text)], length[row] = text, len(text)
    at = [Coordinates.from_lengths(length, n) for length, n in zip(lengths, (S, T), strict=True)]
    expected = _decode(model, jnp.asarray(alone[0]), at[0], jnp.asarray(alone[1]), at[1])
    for row, segment in enumerate((1, 2, 3)):
        mine = np.asarray(targets.segment[0]) == segment
        np.testing.assert_allclose(packed[0, mine], expected[row, : mine.sum()], atol=1e-5)


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary():
    """All rows of the table are equal, and so all logits of a token."""
    model = nnx.clone(_model())
    model.embedding.table[...] = jnp.broadcast_to(model.embedding.table[:1], (V, 6))
    total, count = cross_entropy(jnp.asarray(_pairs(model)), jnp.asarray(TARGET), weights=AT[1].segment != 0)
    assert count == sum(LENGTHS[1])
    np.testing.assert_allclose(np.exp(total / count), V, rtol=1e-5)


def test_the_table_learns_from_what_is_read_and_what_is_written():
    model, tokens = _model(), (jnp.arange(S)[None], jnp.arange(3)[None] + S)
    at = Coordinates.from_lengths([S], S), Coordinates.from_lengths([2], 3)

    def loss(model):
        logits = model.decode(tokens[1], at[1], model.encode(tokens[0], at[0]))
        return (logits[0, :2, 0] ** 2).sum()

    gradient = jax.jit(jax.grad(loss))(model).embedding.table[...]
    # Token 0 is also the logit; 7 and 8 are read; 9 is behind padding; from 10 on nothing is there.
    np.testing.assert_array_equal(np.abs(gradient).max(axis=-1) > 0, np.arange(V) < S + 2)


def test_the_order_of_the_experts_changes_nothing():
    options = {"mixture": MixtureConfig(3, 2, capacity_factor=None, noise=False)}
    model, order = _model(None, **options), np.array([2, 0, 1])
    expected, other = _pairs(model), nnx.clone(model)
    for block in other.stack.blocks:
        layer = block.feed_forward
        nnx.update(layer.experts, jax.tree.map(lambda x: x[order], nnx.state(layer.experts)))
        layer.gate.kernel[...] = layer.gate.kernel[...][:, order]
    real = np.asarray(AT[1].segment) != 0
    np.testing.assert_allclose(_pairs(other)[real], expected[real], atol=1e-5)
    # Without their gate they are not the same.
    for block, old in zip(other.stack.blocks, model.stack.blocks, strict=True):
        block.feed_forward.gate.kernel[...] = old.feed_forward.gate.kernel[...]
    assert np.abs(_pairs(other) - expected)[real].max() > 1e-2


def test_a_tight_capacity_does_not_reach_decoding():
    """Steps are full decoding, and no token depends on later ones or on other rows."""
    model = _model(None, (Local(4),), mixture=MixtureConfig(3, 2, capacity_factor=0.1))
    expected, later = _pairs(model), TARGET.copy()

    def step(state, tokens):
        logits, state = model.step(tokens, state)
        return state, logits

    @jax.jit
    def stepped(source, target):
        return jax.lax.scan(step, model.start(model.encode(source, AT[0]), T), target.T)[1]

    steps = stepped(SOURCE, TARGET)
    real = np.asarray(AT[1].segment) != 0
    np.testing.assert_allclose(np.asarray(steps).swapaxes(0, 1)[real], expected[real], atol=1e-5)
    later[0, 3:], later[1] = (later[0, 3:] + 1) % V, (later[1] + 1) % V
    found = np.asarray(_decode(model, jnp.asarray(SOURCE), AT[0], jnp.asarray(later), AT[1]))
    for row, kept in ((0, 3), (2, 3)):
        np.testing.assert_allclose(found[row, :kept], expected[row, :kept], atol=1e-6)


def test_in_training_experts_of_tight_capacity_tell_no_text_what_comes_after():
    """Neither what its own later tokens are, nor what the texts behind it in the batch are."""
    model = _model(None, (Local(4),), mixture=MixtureConfig(3, 2, capacity_factor=0.5), dropout_rate=0.3)

    def logits(model, target):
        keys = jax.random.split(jax.random.key(7))
        memory = model.encode(jnp.asarray(SOURCE), AT[0], dropout_key=keys[0])
        return model.decode(target, AT[1], memory, dropout_key=keys[1])

    @jax.jit
    def trained(target):
        found, shares = routings(logits, model, target)
        return found, sum(routing.dropped for routing in shares)

    (expected, dropped), later = trained(jnp.asarray(TARGET)), TARGET.copy()
    expected = np.asarray(expected)
    assert dropped > 3
    later[1, 1], later[2] = (later[1, 1] + 1) % V, (later[2] + 1) % V
    found = np.asarray(trained(jnp.asarray(later))[0])
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[1, :1], expected[1, :1])
    assert np.abs(found[1, 1] - expected[1, 1]).max() > 1e-3
    # What comes before decides who finds room.
    earlier = [trained(jnp.asarray((TARGET + np.array([[shift], [0], [0]])) % V))[0] for shift in range(1, V)]
    assert max(np.abs(np.asarray(found)[1:] - expected[1:]).max() for found in earlier) > 1e-3


def test_alignment_is_what_targets_see_of_their_source():
    model = _model()
    memory = model.encode(jnp.asarray(SOURCE), AT[0])
    found = np.asarray(jax.jit(lambda model: model.alignment(jnp.asarray(TARGET), AT[1], memory))(model))
    assert found.shape == (B, 1, T, S)
    # A target of the second text goes on in the second block of four, where the first has 7 tokens in two.
    for row, (source, target) in enumerate(zip(*LENGTHS, strict=True)):
        for t in range(T):
            seen = (np.arange(S) < source) & (np.arange(S) // 4 == (source + t) // 4) & (t < target)
            np.testing.assert_array_equal(found[row, 0, t] > 0, seen)


def test_a_model_has_a_block():
    with pytest.raises(ValueError, match=r"num_layers \(0\) must be an integer of at least 1"):
        LanguageModel(LanguageModelConfig(V, 0, BLOCK), rngs=nnx.Rngs(0))
