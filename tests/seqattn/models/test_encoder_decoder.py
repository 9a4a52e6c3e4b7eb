"""What every model of the protocol keeps, whatever it is made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import LanguageModel, Transformer
from seqattn.nn import TokenEmbedding
from tests.encoder_decoders import (
    BATCH,
    CONFIGS,
    ONE_OF_EACH,
    REAL,
    SOURCE,
    SOURCE_AT,
    TARGET,
    TARGET_AT,
    B,
    S,
    T,
    V,
    build,
    decode,
    logits_of,
    model_of,
    most_models,
    one_of_each,
)

with_an_encoder = pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if not name.startswith("language")])


@most_models
def test_what_padding_holds_changes_nothing(name):
    random = np.random.default_rng(1)
    spoilt = [
        jnp.where(at.segment != 0, tokens, random.integers(-999, 999, tokens.shape).astype(np.int32))
        for tokens, at in ((BATCH[0], SOURCE_AT), (BATCH[2], TARGET_AT))
    ]
    logits = np.asarray(decode(model_of(name), spoilt[0], SOURCE_AT, spoilt[1], TARGET_AT))
    assert np.all(np.isfinite(logits))
    np.testing.assert_array_equal(logits[REAL], logits_of(name)[REAL])


@most_models
def test_a24_where_padding_is_changes_nothing(name):
    """Sources and targets moved to the right, or with padding between their tokens."""
    source_order, target_order = np.tile(np.arange(S), (B, 1)), np.tile(np.arange(T), (B, 1))
    source_order[1], source_order[3] = [4, 0, 5, 1, 2, 6, 3], [6, 5, 4, 3, 2, 0, 1]
    target_order[1], target_order[2], target_order[3] = [0, 3, 1, 4, 2], [4, 0, 1, 2, 3], [1, 2, 3, 0, 4]
    moved = []
    for tokens, at, order in ((SOURCE, SOURCE_AT, source_order), (TARGET, TARGET_AT, target_order)):
        present = np.take_along_axis(np.asarray(at.segment) != 0, order, axis=1)
        moved += [
            jnp.asarray(np.take_along_axis(tokens, order, axis=1)),
            Coordinates.from_present(jnp.asarray(present)),
        ]
    logits, real = np.asarray(decode(model_of(name), *moved)), np.take_along_axis(REAL, target_order, axis=1)
    expected = np.take_along_axis(logits_of(name), target_order[..., None], axis=1)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)


@one_of_each
def test_how_much_padding_there_is_changes_nothing(name):
    """One row as it is, without any padding."""
    alone = jnp.asarray(SOURCE[1:2, :4]), Coordinates.from_lengths([4], 4), jnp.asarray(TARGET[1:2, :3])
    logits = decode(model_of(name), *alone, Coordinates.from_lengths([3], 3))
    np.testing.assert_allclose(logits[0], logits_of(name)[1, :3], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_a_later_one_or_another_row(name):
    target = TARGET.copy()
    target[0, 2] += 1 if target[0, 2] < V - 1 else -1
    logits, expected = np.asarray(decode(model_of(name), *BATCH[:2], jnp.asarray(target), TARGET_AT)), logits_of(name)
    np.testing.assert_array_equal(logits[0, :2], expected[0, :2])
    np.testing.assert_array_equal(logits[1:][REAL[1:]], expected[1:][REAL[1:]])
    assert np.all(np.abs(logits[0, 2:] - expected[0, 2:]).max(axis=-1) > 1e-6)


@most_models
def test_every_token_sees_the_whole_source(name):
    for place in (0, 3):
        source = SOURCE.copy()
        source[1, place] += 1 if source[1, place] < V - 1 else -1
        logits = np.asarray(decode(model_of(name), jnp.asarray(source), SOURCE_AT, *BATCH[2:]))
        different = np.abs(logits - logits_of(name)).max(axis=-1) > 1e-7
        np.testing.assert_array_equal(different[REAL], (REAL & (np.arange(B) == 1)[:, None])[REAL])


@most_models
def test_an_empty_source_gives_finite_logits_that_depend_on_the_target_alone(name):
    assert np.all(np.isfinite(logits_of(name)))
    source = jnp.asarray((SOURCE + 1) % V)
    logits = np.asarray(decode(model_of(name), source, SOURCE_AT, *BATCH[2:]))
    np.testing.assert_array_equal(logits[2][REAL[2]], logits_of(name)[2][REAL[2]])


@one_of_each
@pytest.mark.parametrize(("rows", "source", "target"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_a15_no_rows_no_source_or_no_target(name, rows, source, target):
    def call(model):
        tokens = [jnp.zeros((rows, length), jnp.int32) for length in (source, target)]
        at = [Coordinates.from_lengths(jnp.full(rows, length), length) for length in (source, target)]
        memory = model.encode(tokens[0], at[0])
        state = model.start(memory, 2)
        return model.decode(tokens[1], at[1], memory), model.step(jnp.zeros(rows, jnp.int32), state)[0]

    decoded, stepped = jax.eval_shape(call, model_of(name))
    assert (decoded.shape, stepped.shape) == ((rows, target, V), (rows, V))


@functools.cache
def _slopes(name: str):
    """Gradients by the model of a number for each token of one target, whose tokens the source does not hold."""
    source, target = jnp.arange(T, T + S)[None], jnp.arange(T)[None]
    direction = jnp.asarray(np.random.default_rng(3).normal(size=V), jnp.float32)

    def numbers(model):
        memory = model.encode(source, Coordinates.from_lengths([S], S))
        return (model.decode(target, Coordinates.from_lengths([T], T), memory) @ direction)[0]

    return jax.jit(jax.jacobian(numbers))(model_of(name))


BY_GRADIENTS = (
    *("transformer_rotary_grouped_norm_first", "language_local_compressed_rotary"),
    *("seq2seq_gru_both_additive_feeding", "recurrent_language_tied"),
)
STEPPED = ("transformer_window", "recurrent_language_lstm")


@pytest.mark.parametrize(
    ("name", "stepwise"),
    [
        *((name, False) for name in BY_GRADIENTS),
        # With the steps a Jacobian takes several times as long to compile; other tests compare steps with `decode`.
        *(pytest.param(name, True, marks=() if name in STEPPED else pytest.mark.slow) for name in CONFIGS),
    ],
)
def test_causality_by_gradients(name, stepwise):
    """By what is added to the vector of each target token where it is read: of whole texts, packs, steps and pieces."""
    model, read = model_of(name), TokenEmbedding.__call__
    source, target = jnp.arange(T, T + S)[None], jnp.arange(T)[None]
    direction = jnp.asarray(np.random.default_rng(3).normal(size=V), jnp.float32)
    packs = [Coordinates.from_segments(jnp.asarray([segment])) for segment in ([1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2])]

    def step(state, token):
        logits, state = model.step(token, state)
        return state, logits[0]

    def numbers(shift):
        with pytest.MonkeyPatch.context() as patch:
            # The same table also makes the logits.
            patch.setattr(TokenEmbedding, "__call__", lambda self, tokens: read(self, tokens) + shift[tokens])
            memory = model.encode(source, Coordinates.from_lengths([S], S))
            state = model.start(memory, T)
            first, begun = model.prefill(target[:, :2], jnp.array([2]), state)
            found = {
                "decode": model.decode(target, Coordinates.from_lengths([T], T), memory)[0],
                "pieces": jnp.concatenate([first, model.prefill(target[:, 2:], jnp.array([3]), begun)[0]], axis=1)[0],
            }
            if stepwise:
                found["steps"] = jax.lax.scan(step, state, target.T)[1]
            if isinstance(model, Transformer | LanguageModel):
                found["packed"] = model.decode(target, packs[1], model.encode(source, packs[0]))[0]
        return jax.tree.map(lambda logits: logits @ direction, found)

    slopes = jax.jit(jax.jacobian(numbers))(jnp.zeros(model.embedding.table.shape))
    seen = jax.tree.map(lambda slope: np.abs(slope[:, :T]).max(axis=-1) > 0, slopes)
    past, same = np.tri(T, dtype=bool), np.asarray(packs[1].segment[0])
    narrow = "window" in name or "local_compressed" in name
    for form, found in seen.items():
        allowed = past & (same[:, None] == same) if form == "packed" else past
        np.testing.assert_array_equal(found, found & allowed if narrow else allowed, form)
        assert found.diagonal().all(), form
        if form != "packed":
            np.testing.assert_array_equal(found, seen["decode"], form)


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "transformer_rotary_grouped_norm_first"])
def test_every_parameter_is_trained(name):
    for path, gradient in jax.tree_util.tree_leaves_with_path(_slopes(name)):
        assert np.any(gradient != 0), jax.tree_util.keystr(path)
        assert np.all(np.isfinite(gradient)), jax.tree_util.keystr(path)


@most_models
def test_every_leaf_of_memory_and_state_has_the_batch_first(name):
    def both(model):
        memory = model.encode(BATCH[0], SOURCE_AT)
        return jax.tree.leaves((memory, model.start(memory, 3)))

    assert {leaf.shape[0] for leaf in jax.eval_shape(both, model_of(name)) if leaf.ndim} == {B}


@most_models
def test_a_model_is_its_parameters(name):
    """No random state and nothing else that a plain `jax.jit` would lose or a checkpoint would not hold."""
    model = nnx.eval_shape(lambda: build(name))
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    nnx.split(model, nnx.Param)


@one_of_each
@pytest.mark.parametrize("graph_mode", [True, False], ids=["graph", "tree"])
def test_both_modes_of_nnx(name, graph_mode):
    with nnx.set_graph_mode(graph_mode):
        graph, params = nnx.split(model_of(name), nnx.Param)
        merged = jax.jit(lambda params: nnx.merge(graph, params))(params)
        np.testing.assert_array_equal(decode(merged, *BATCH), logits_of(name))
        built = nnx.eval_shape(lambda: build(name))
        assert jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(built))) == jax.tree.map(
            jnp.shape, nnx.to_pure_dict(params)
        )


@most_models
def test_no_two_dropouts_share_a_key(name):
    def call(model, key):
        keys = jax.random.split(key)
        memory = model.encode(BATCH[0], SOURCE_AT, dropout_key=keys[0])
        return model.decode(BATCH[2], TARGET_AT, memory, dropout_key=keys[1])

    with jax.debug_key_reuse(True):
        jax.eval_shape(call, model_of(name), jax.random.key(0))


@with_an_encoder
def test_dropout_is_decided_by_the_keys(name):
    @jax.jit
    def call(model, encode_key, decode_key):
        memory = model.encode(BATCH[0], SOURCE_AT, dropout_key=encode_key)
        return model.decode(BATCH[2], TARGET_AT, memory, dropout_key=decode_key)

    model, keys = model_of(name), jax.random.split(jax.random.key(0), 4)
    first, again, encoded, decoded = (
        np.asarray(call(model, *pair))[REAL]
        for pair in ((keys[0], keys[1]), (keys[0], keys[1]), (keys[2], keys[1]), (keys[0], keys[3]))
    )
    np.testing.assert_array_equal(first, again)
    for other in (encoded, decoded, logits_of(name)[REAL]):
        assert np.abs(first - other).max() > 1e-2
