"""The recurrent encoder-decoder against its steps written out by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.hypotheses import branch, select
from seqattn.models import Seq2Seq, Seq2SeqConfig
from seqattn.models.attention_encoder import AttentionEncoder
from seqattn.nn import Cell, Direction, Score
from seqattn.nn.local_window import Monotonic, Predictive
from tests.parameters import drawn

V, B, S, T, E, H = 13, 3, 7, 5, 3, 4
CONFIG = Seq2SeqConfig(V, embedding_dim=E, hidden_dim=H, dropout_rate=0.5)
READER = AttentionEncoder(num_layers=1, num_heads=2, hidden_dim=5)
PLAIN = dataclasses.replace(CONFIG, attention=None, input_feeding=False)
SOURCE, TARGET = (np.random.default_rng(0).integers(0, V, (B, n)).astype(np.int32) for n in (S, T))
SOURCE_AT, TARGET_AT = Coordinates.from_lengths([7, 4, 0], S), Coordinates.from_lengths([5, 3, 4], T)
REAL = np.asarray(TARGET_AT.segment) != 0


@functools.cache
def _model(config: Seq2SeqConfig = CONFIG) -> Seq2Seq:
    return drawn(lambda: Seq2Seq(config, rngs=nnx.Rngs(0)))


@jax.jit
def _call(model, source, source_at, target, target_at):
    memory = model.encode(source, source_at)
    return memory, model.decode(target, target_at, memory), model.alignment(target, target_at, memory)


def _by_hand(model: Seq2Seq, memory) -> tuple[np.ndarray, np.ndarray]:
    """Logits and weights, one token after the other: Luong 2015, equations 5 and 6, and section 3.3."""
    logits, weights = np.zeros((B, T, V)), np.zeros((B, T, S))
    carries, fed = list(memory.carries), np.zeros((B, H), np.float32)
    cells = [jax.jit(lambda carry, x, layer=layer: layer.cell(carry, x)) for layer in model.layers]
    table, (combine, output) = np.asarray(model.embedding.table[...]), map(_linear, (model.combine, model.output))
    now = Coordinates(*[jnp.ones((B, 1), jnp.int32)] * 2)
    look = jax.jit(lambda x, t: model.attention(x[:, None], dataclasses.replace(now, position=t), memory.key_value))
    for t in range(T):
        x = E**0.5 * table[TARGET[:, t]]
        x = jnp.asarray(np.concatenate([x, fed], axis=-1) if model.config.input_feeding else x, jnp.float32)
        for index, cell in enumerate(cells):
            carries[index], x = cell(carries[index], x)
        features = np.asarray(x)
        if model.attention is not None:
            context, seen = look(x, jnp.full((B, 1), t))
            features = np.tanh(combine(np.concatenate([context[:, 0], features], axis=-1)))
            weights[:, t] = seen[:, 0]
        fed, logits[:, t] = features, output(features)
    return logits, weights


def _linear(layer: nnx.Linear | None):
    return lambda x: x @ np.asarray(layer.kernel[...]).astype(np.float64) + np.asarray(layer.bias[...])


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        dataclasses.replace(CONFIG, input_feeding=False, num_layers=2, cell=Cell.LSTM, attention=Score.SCALED_GENERAL),
        dataclasses.replace(PLAIN, cell=Cell.SIMPLE, direction=Direction.BACKWARD),
        dataclasses.replace(CONFIG, local=Monotonic(1), input_feeding=False),
        dataclasses.replace(CONFIG, local=Predictive(2), attention_encoder=READER, cell=Cell.LSTM, num_layers=2),
    ],
    ids=["gru_additive_feeding", "lstm_two_layers", "simple_no_attention", "monotonic", "predictive_attention_encoder"],
)
def test_the_decoder_is_its_steps_written_out(config):
    model = _model(config)
    memory, logits, alignment = _call(model, jnp.asarray(SOURCE), SOURCE_AT, jnp.asarray(TARGET), TARGET_AT)
    expected, weights = _by_hand(model, memory)
    np.testing.assert_allclose(np.asarray(logits)[REAL], expected[REAL], atol=1e-5)
    if config.attention is None:
        assert alignment.shape == (B, 0, T, 0)
        return
    assert alignment.shape == (B, 1, T, S)
    np.testing.assert_allclose(np.asarray(alignment)[:, 0][REAL], weights[REAL], atol=1e-6)
    if config.local is None:
        np.testing.assert_allclose(np.asarray(alignment).sum(axis=-1)[:2, 0], 1, atol=1e-6)
    assert not np.any(alignment[2])  # an empty source
    assert not np.any(alignment[1, ..., 4:])


def test_the_memory_is_what_the_encoder_says():
    model = _model()
    memory, *_ = _call(model, jnp.asarray(SOURCE), SOURCE_AT, jnp.asarray(TARGET), TARGET_AT)
    vectors = jnp.asarray(E**0.5 * np.asarray(model.embedding.table[...])[SOURCE], jnp.float32)
    outputs, carries = jax.jit(lambda encoder, x: encoder(x, SOURCE_AT))(model.encoder, vectors)
    np.testing.assert_allclose(memory.key_value.value[:, :, 0], outputs, atol=1e-6)
    np.testing.assert_allclose(memory.carries[0], carries[0], atol=1e-6)
    assert not np.any(memory.carries[0][2])


def test_without_attention_the_last_state_is_all_there_is():
    """Sutskever 2014: no state but the encoder's last one enters the decoder."""
    model = _model(dataclasses.replace(PLAIN, cell=Cell.LSTM, num_layers=2))
    memory, *_ = _call(model, jnp.asarray(SOURCE), SOURCE_AT, jnp.asarray(TARGET), TARGET_AT)
    assert memory.key_value is None
    assert [leaf.shape for leaf in jax.tree.leaves(memory)] == [(B, H)] * 4
    state = model.start(memory, 99)
    assert state.attentional is None
    assert state.weights is None
    assert [leaf.shape for leaf in jax.tree.leaves(state)] == [(B, H)] * 4 + [(B,)]


def test_monotonic_attention_follows_the_steps_of_each_hypothesis():
    """Where a step looks says how many tokens its row has seen: in ragged pieces, after branching and choosing."""
    model, lengths = _model(dataclasses.replace(CONFIG, local=Monotonic(0))), jnp.array([3, 0, 2])
    source_at = Coordinates.from_present(jnp.array([[True] * S, [False, True, True] + [True] * 4, [True] * S]))

    @jax.jit
    def weights(model):
        state = model.start(model.encode(jnp.asarray(SOURCE), source_at), T)
        _, state = model.prefill(jnp.asarray(TARGET), lengths, state)
        state = select(branch(state, 2), jnp.array([[1, 0], [1, 1], [0, 1]]))
        return [(state := model.step(jnp.zeros(2 * B, jnp.int32), state)[1]).weights for _ in range(2)]

    for steps, found in enumerate(weights(model)):
        np.testing.assert_array_equal(np.argmax(found, axis=1)[::2], np.array([3, 1, 2]) + steps)
        np.testing.assert_array_equal(np.sort(found, axis=1), np.eye(S)[[S - 1] * 2 * B])
        np.testing.assert_array_equal(found[::2], found[1::2])


def test_a_monotonic_window_as_wide_as_all_is_global():
    at = jnp.asarray(SOURCE), SOURCE_AT, jnp.asarray(TARGET), TARGET_AT
    _, expected, _ = _call(_model(), *at)
    _, logits, _ = _call(_model(dataclasses.replace(CONFIG, local=Monotonic(S))), *at)
    np.testing.assert_array_equal(np.asarray(logits)[REAL], np.asarray(expected)[REAL])


def test_every_parameter_of_a_local_decoder_is_trained():
    model = _model(dataclasses.replace(CONFIG, local=Predictive(3)))

    @jax.jit
    @jax.grad
    def gradient(model):
        memory = model.encode(jnp.asarray(SOURCE), SOURCE_AT)
        return (model.decode(jnp.asarray(TARGET), TARGET_AT, memory)[0] ** 2).sum()

    window = gradient(model).attention.window
    assert np.all(np.asarray(window.projection[...]) != 0)
    assert np.all(np.asarray(window.weight[...]) != 0)


def test_every_dropout_acts():
    """A parameter has no gradient where what it is multiplied by was dropped: each place drops half of it."""
    model = _model(dataclasses.replace(PLAIN, num_layers=2))
    one, direction = Coordinates.from_lengths([1], 1), jnp.asarray(np.random.default_rng(2).normal(size=V), jnp.float32)

    def number(model, key):
        keys = jax.random.split(key)
        memory = model.encode(jnp.array([[3]]), one, dropout_key=keys[0])
        return (model.decode(jnp.array([[7]]), one, memory, dropout_key=keys[1]) @ direction).sum()

    gradients = jax.jit(jax.vmap(jax.grad(number), (None, 0)))(model, jax.random.split(jax.random.key(0), 128))
    places = {
        "vectors of source tokens": gradients.embedding.table[...][:, 3],
        "input of the encoder's second layer": gradients.encoder.layers[1][0].cell.dense_i.kernel[...].sum(axis=-1),
        "vectors of target tokens": gradients.embedding.table[...][:, 7],
        "input of the decoder's second layer": gradients.layers[1].cell.dense_i.kernel[...].sum(axis=-1),
        "vector before the logits": gradients.output.kernel[...].sum(axis=-1),
    }
    dropped = {place: float(np.mean(np.asarray(gradient) == 0)) for place, gradient in places.items()}
    assert all(0.35 < share < 0.7 for share in dropped.values()), dropped


def test_parameters_may_be_cast():
    at = jnp.asarray(SOURCE), SOURCE_AT, jnp.asarray(TARGET), TARGET_AT
    _, expected, _ = _call(_model(), *at)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), _model())
    memory, logits, _ = _call(half, *at)
    assert {x.dtype for x in jax.tree.leaves((memory.carries, memory.key_value.value, logits))} == {
        jnp.dtype(jnp.bfloat16)
    }
    np.testing.assert_allclose(logits.astype(jnp.float32), expected, atol=0.05 * np.abs(expected).max())


def test_param_dtype_reaches_every_parameter():
    model = nnx.eval_shape(lambda: Seq2Seq(CONFIG, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.bfloat16)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention": None}, "input_feeding feeds the attentional vector: it needs an attention, got attention=None"),
        (
            {"attention": None, "input_feeding": False, "local": Monotonic(3)},
            r"local narrows an attention: it needs one, got attention=None and local=Monotonic\(radius=3\)",
        ),
        ({"hidden_dim": 5}, r"hidden_dim \(5\) must be even to be shared by two directions"),
        ({"num_layers": 0}, r"num_layers \(0\) must be an integer of at least 1"),
        ({"vocab_size": 0}, r"vocab_size \(0\)"),
        ({"dropout_rate": 1.5}, r"dropout rate \(1.5\) must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    config = dataclasses.replace(CONFIG, **changes)
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: Seq2Seq(config, rngs=nnx.Rngs(0)))
