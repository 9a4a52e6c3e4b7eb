"""What every model of the protocol keeps, whatever it is made of."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.decoding import beam_search, generate
from seqattn.hypotheses import branch, select
from seqattn.models import (
    AttentionEncoder,
    BucketBiases,
    Compressed,
    EncoderDecoder,
    Full,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    LinearBiases,
    Local,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    RelativeKeys,
    Rotary,
    Seq2Seq,
    Seq2SeqConfig,
    Transformer,
    TransformerConfig,
    Window,
)
from seqattn.nn import (
    Activation,
    BlockConfig,
    Cell,
    Direction,
    MixtureConfig,
    Monotonic,
    Predictive,
    Score,
    TokenEmbedding,
)
from tests.parameters import drawn

V, B, S, T = 13, 4, 7, 5
BLOCK = BlockConfig(model_dim=12, hidden_dim=5, num_heads=2, dropout_rate=0.5)
RICH = dataclasses.replace(
    BLOCK, num_heads=6, num_kv_heads=3, activation=Activation.GELU, gated=True, norm_first=True, qk_norm=True
)
MIXED = dataclasses.replace(BLOCK, mixture=MixtureConfig(num_experts=3, top_k=2, capacity_factor=0.1))
TRANSFORMER = TransformerConfig(V, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK)
LANGUAGE = LanguageModelConfig(V, num_layers=2, block=BLOCK)
SEQ2SEQ = Seq2SeqConfig(V, embedding_dim=5, hidden_dim=6, dropout_rate=0.5)
CONFIGS = {
    "transformer": TRANSFORMER,
    "transformer_learned_own_tables": dataclasses.replace(TRANSFORMER, positions=Learned(11), share_embeddings=False),
    "transformer_rotary_grouped_norm_first": dataclasses.replace(
        TRANSFORMER, positions=Rotary(50.0), block=RICH, num_decoder_layers=2
    ),
    "transformer_window": dataclasses.replace(TRANSFORMER, decoder_window=2, num_decoder_layers=2),
    "transformer_alibi_window": dataclasses.replace(TRANSFORMER, positions=LinearBiases(), decoder_window=3),
    "transformer_buckets": dataclasses.replace(TRANSFORMER, positions=BucketBiases(8, 6)),
    "transformer_relative": dataclasses.replace(TRANSFORMER, positions=RelativeKeys(3), num_decoder_layers=2),
    "language_learned_norm_first": dataclasses.replace(LANGUAGE, positions=Learned(23), block=RICH),
    "language_local_compressed_rotary": dataclasses.replace(
        LANGUAGE, positions=Rotary(50.0), pattern=(Local(5), Compressed(2), Window(4)), num_layers=3
    ),
    "language_mixture": dataclasses.replace(LANGUAGE, positions=Rotary(50.0), block=MIXED, pattern=(Local(5), Full())),
    "language_music": dataclasses.replace(
        LANGUAGE, positions=RelativeKeys(4, by_head=True), pattern=(Full(), Window(3))
    ),
    "seq2seq_gru_both_additive_feeding": SEQ2SEQ,
    "seq2seq_lstm_backward_no_attention": dataclasses.replace(
        SEQ2SEQ, cell=Cell.LSTM, direction=Direction.BACKWARD, num_layers=2, attention=None, input_feeding=False
    ),
    "seq2seq_lstm_both_general": dataclasses.replace(
        SEQ2SEQ, cell=Cell.LSTM, num_layers=2, attention=Score.GENERAL, input_feeding=False
    ),
    "seq2seq_simple_forward_dot_feeding": dataclasses.replace(
        SEQ2SEQ, cell=Cell.SIMPLE, direction=Direction.FORWARD, attention=Score.SCALED_DOT
    ),
}
CONFIGS |= {
    "seq2seq_local_monotonic": dataclasses.replace(SEQ2SEQ, local=Monotonic(1)),
    "seq2seq_local_predictive_attention_encoder": dataclasses.replace(
        SEQ2SEQ,
        cell=Cell.LSTM,
        num_layers=2,
        local=Predictive(2),
        input_feeding=False,
        attention_encoder=AttentionEncoder(1, 2, 5),
    ),
    "recurrent_language_tied": RecurrentLanguageModelConfig(
        V, embedding_dim=6, hidden_dim=6, num_layers=2, tie_embeddings=True, dropout_rate=0.5
    ),
    "recurrent_language_lstm": RecurrentLanguageModelConfig(
        V, embedding_dim=5, hidden_dim=6, cell=Cell.LSTM, dropout_rate=0.5
    ),
}
MODELS = {
    LanguageModelConfig: LanguageModel,
    RecurrentLanguageModelConfig: RecurrentLanguageModel,
    Seq2SeqConfig: Seq2Seq,
    TransformerConfig: Transformer,
}
# The relations that a model keeps by its parts, and not by their combination, in full by `make test-all`.
_SELDOM = {
    *("transformer_window", "transformer_alibi_window", "transformer_buckets", "language_music"),
    *("seq2seq_lstm_both_general", "seq2seq_simple_forward_dot_feeding", "seq2seq_local_monotonic"),
    *("transformer_relative", "language_learned_norm_first", "language_mixture", "recurrent_language_lstm"),
    "seq2seq_local_predictive_attention_encoder",
    *("recurrent_language_tied", "transformer_learned_own_tables", "seq2seq_lstm_backward_no_attention"),
}
_CACHED = {"transformer_window", "language_music", "seq2seq_local_monotonic", "recurrent_language_lstm"}
"""Of these the caches that the usual ones do not have."""
most_models = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in _SELDOM else ()) for name in CONFIGS]
)
# Its many lengths are many programs; of each kind of cache there is a test of its own.
few_models = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in _SELDOM or "compressed" in name else ()) for name in CONFIGS],
)
# Of the others, some for what steps and caches share, and all for what a model must never do.
cached_models = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in _SELDOM and name not in _CACHED else ()) for name in CONFIGS],
)
ONE_OF_EACH = [
    "transformer_learned_own_tables",
    "language_local_compressed_rotary",
    "seq2seq_gru_both_additive_feeding",
]
one_of_each = pytest.mark.parametrize("name", ONE_OF_EACH)
one_of_two = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.startswith("language")) for name in ONE_OF_EACH]
)
with_an_encoder = pytest.mark.parametrize("name", [name for name in ONE_OF_EACH if not name.startswith("language")])

SOURCE, TARGET = (np.random.default_rng(0).integers(0, V, (B, n)).astype(np.int32) for n in (S, T))
SOURCE_AT, TARGET_AT = Coordinates.from_lengths([7, 4, 0, 2], S), Coordinates.from_lengths([5, 3, 4, 1], T)
REAL = np.asarray(TARGET_AT.segment) != 0
BATCH = (jnp.asarray(SOURCE), SOURCE_AT, jnp.asarray(TARGET), TARGET_AT)


def _build(name: str) -> EncoderDecoder:
    config = CONFIGS[name]
    return MODELS[type(config)](config, rngs=nnx.Rngs(0))


@functools.cache
def _model(name: str) -> EncoderDecoder:
    return drawn(lambda: _build(name))


@jax.jit
def _decode(model, source, source_at, target, target_at):
    return model.decode(target, target_at, model.encode(source, source_at))


@functools.cache
def _expected(name: str) -> np.ndarray:
    return np.asarray(_decode(_model(name), *BATCH))


@jax.jit
def _steps(model, source, source_at, tokens):
    """Logits `[T, B, V]` of tokens `[T, B]` step by step."""

    def step(state, tokens):
        logits, state = model.step(tokens, state)
        return state, logits

    return jax.lax.scan(step, model.start(model.encode(source, source_at), T), tokens)[1]


@cached_models
def test_cached_steps_are_decode(name):
    logits = _steps(_model(name), *BATCH[:2], BATCH[2].T)
    np.testing.assert_allclose(np.asarray(logits).swapaxes(0, 1)[REAL], _expected(name)[REAL], atol=1e-5)


@jax.jit
def _prefilled(model, source, source_at, pieces):
    """Logits of the tokens of each (tokens, lengths), one call each, and then of one token 7 for all rows."""
    state, found = model.start(model.encode(source, source_at), 3 * T), []
    for tokens, lengths in pieces:
        logits, state = model.prefill(tokens, lengths, state)
        found.append(logits)
    return found, model.step(jnp.full(len(source), 7), state)[0]


@few_models
def test_a_target_comes_in_ragged_pieces_of_any_size(name):
    """Row by row what `decode` gives, though the pieces leave padding of their own between the tokens of a row."""
    lengths = [np.array([2, 1, 4, 0]), np.array([1, 2, 0, 1]), np.array([2, 0, 0, 0])]
    starts = np.cumsum([np.zeros(B, int), *lengths], axis=0)
    pieces = []
    for count, start in zip(lengths, starts, strict=False):
        piece = np.full((B, count.max()), -1, np.int32)  # -1: no token, must not be looked up
        for row in range(B):
            piece[row, : count[row]] = TARGET[row, start[row] : start[row] + count[row]]
        pieces.append((jnp.asarray(piece), jnp.asarray(count)))
    found, last = _prefilled(_model(name), *BATCH[:2], pieces)
    for logits, count, start in zip(found, lengths, starts, strict=False):
        for row in range(B):
            wanted = _expected(name)[row, start[row] : start[row] + count[row]]
            np.testing.assert_allclose(logits[row, : count[row]], wanted, atol=1e-5)
    whole = np.full((B, T + 1), 7, np.int32)
    for row in range(B):
        whole[row, : starts[-1][row]] = TARGET[row, : starts[-1][row]]
    wanted = _decode(_model(name), *BATCH[:2], jnp.asarray(whole), Coordinates.from_lengths([T + 1] * B, T + 1))
    np.testing.assert_allclose(last, wanted[np.arange(B), starts[-1]], atol=1e-5)


BEAMS = 2
PARENTS = np.random.default_rng(4).integers(0, BEAMS, (T, B, BEAMS))


@jax.jit
def _hypotheses(model, source, source_at, tokens, parents):
    """Logits `[T, B * beams, V]` of tokens `[T, B * beams]`; after each step hypotheses go on from their parents."""

    def step(state, given):
        tokens, parent = given
        logits, state = model.step(tokens, state)
        return select(state, parent), logits

    state = branch(model.start(model.encode(source, source_at), T), BEAMS)
    return jax.lax.scan(step, state, (tokens, parents))[1]


@most_models
def test_hypotheses_of_a_row_part_and_take_each_others_place(name):
    """As in a beam search, against each history decoded as a whole."""
    tokens = np.random.default_rng(5).integers(0, V, (T, B, BEAMS)).astype(np.int32)
    logits = _hypotheses(_model(name), *BATCH[:2], jnp.asarray(tokens.reshape(T, -1)), jnp.asarray(PARENTS))
    history, histories = np.zeros((B, BEAMS, T), np.int32), []
    for t in range(T):
        history[:, :, t] = tokens[t]
        histories.append(history.reshape(-1, T).copy())
        history = np.take_along_axis(history, PARENTS[t][:, :, None], axis=1)
    source, at = (jax.tree.map(lambda x: np.tile(np.repeat(x, BEAMS, axis=0), (T, 1)), x) for x in BATCH[:2])
    target_at = Coordinates.from_lengths([T] * len(source), T)
    whole = _decode(_model(name), jnp.asarray(source), at, jnp.asarray(np.concatenate(histories)), target_at)
    wanted = np.asarray(whole).reshape(T, B * BEAMS, T, V)[np.arange(T), :, np.arange(T)]
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


@one_of_two
def test_a_state_says_how_many_hypotheses_it_has(name):
    model = _model(name)

    def misuse(call):
        state = branch(model.start(model.encode(*BATCH[:2]), T), BEAMS)
        return jax.eval_shape(lambda: call(state))

    with pytest.raises(ValueError, match="prefill before branching"):
        misuse(lambda state: model.prefill(BATCH[2], jnp.full(B, T), state))
    if isinstance(model, Transformer):
        with pytest.raises(ValueError, match=f"the state has {B} rows of {BEAMS} hypotheses, got {B} tokens"):
            misuse(lambda state: model.step(jnp.zeros(B, jnp.int32), state))


@most_models
def test_a15_a_beam_of_no_rows(name):
    def search(model):
        at = Coordinates(jnp.zeros((0, 3), jnp.int32), jnp.ones((0, 3), jnp.int32))
        state, first = model.start(model.encode(jnp.zeros((0, 3), jnp.int32), at), 4), jnp.zeros(0, jnp.int32)
        return beam_search(model.step, state, first, beam_size=3, max_length=4, end_token=1).tokens

    assert jax.eval_shape(search, _model(name)).shape == (0, 1, 4)


@most_models
def test_what_padding_holds_changes_nothing(name):
    random = np.random.default_rng(1)
    spoilt = [
        jnp.where(at.segment != 0, tokens, random.integers(-999, 999, tokens.shape).astype(np.int32))
        for tokens, at in ((BATCH[0], SOURCE_AT), (BATCH[2], TARGET_AT))
    ]
    logits = np.asarray(_decode(_model(name), spoilt[0], SOURCE_AT, spoilt[1], TARGET_AT))
    assert np.all(np.isfinite(logits))
    np.testing.assert_array_equal(logits[REAL], _expected(name)[REAL])


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
    logits, real = np.asarray(_decode(_model(name), *moved)), np.take_along_axis(REAL, target_order, axis=1)
    expected = np.take_along_axis(_expected(name), target_order[..., None], axis=1)
    np.testing.assert_allclose(logits[real], expected[real], atol=1e-5)


@one_of_each
def test_how_much_padding_there_is_changes_nothing(name):
    """One row as it is, without any padding."""
    alone = jnp.asarray(SOURCE[1:2, :4]), Coordinates.from_lengths([4], 4), jnp.asarray(TARGET[1:2, :3])
    logits = _decode(_model(name), *alone, Coordinates.from_lengths([3], 3))
    np.testing.assert_allclose(logits[0], _expected(name)[1, :3], atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_token_sees_a_later_one_or_another_row(name):
    target = TARGET.copy()
    target[0, 2] += 1 if target[0, 2] < V - 1 else -1
    logits, expected = np.asarray(_decode(_model(name), *BATCH[:2], jnp.asarray(target), TARGET_AT)), _expected(name)
    np.testing.assert_array_equal(logits[0, :2], expected[0, :2])
    np.testing.assert_array_equal(logits[1:][REAL[1:]], expected[1:][REAL[1:]])
    assert np.all(np.abs(logits[0, 2:] - expected[0, 2:]).max(axis=-1) > 1e-6)


@most_models
def test_every_token_sees_the_whole_source(name):
    for place in (0, 3):
        source = SOURCE.copy()
        source[1, place] += 1 if source[1, place] < V - 1 else -1
        logits = np.asarray(_decode(_model(name), jnp.asarray(source), SOURCE_AT, *BATCH[2:]))
        different = np.abs(logits - _expected(name)).max(axis=-1) > 1e-7
        np.testing.assert_array_equal(different[REAL], (REAL & (np.arange(B) == 1)[:, None])[REAL])


@most_models
def test_an_empty_source_gives_finite_logits_that_depend_on_the_target_alone(name):
    assert np.all(np.isfinite(_expected(name)))
    source = jnp.asarray((SOURCE + 1) % V)
    logits = np.asarray(_decode(_model(name), source, SOURCE_AT, *BATCH[2:]))
    np.testing.assert_array_equal(logits[2][REAL[2]], _expected(name)[2][REAL[2]])


@one_of_each
@pytest.mark.parametrize(("rows", "source", "target"), [(0, 3, 2), (2, 0, 2), (2, 3, 0)])
def test_a15_no_rows_no_source_or_no_target(name, rows, source, target):
    def call(model):
        tokens = [jnp.zeros((rows, length), jnp.int32) for length in (source, target)]
        at = [Coordinates.from_lengths(jnp.full(rows, length), length) for length in (source, target)]
        memory = model.encode(tokens[0], at[0])
        state = model.start(memory, 2)
        return model.decode(tokens[1], at[1], memory), model.step(jnp.zeros(rows, jnp.int32), state)[0]

    decoded, stepped = jax.eval_shape(call, _model(name))
    assert (decoded.shape, stepped.shape) == ((rows, target, V), (rows, V))


@functools.cache
def _slopes(name: str):
    """Gradients by the model of a number for each token of one target, whose tokens the source does not hold."""
    source, target = jnp.arange(T, T + S)[None], jnp.arange(T)[None]
    direction = jnp.asarray(np.random.default_rng(3).normal(size=V), jnp.float32)

    def numbers(model):
        memory = model.encode(source, Coordinates.from_lengths([S], S))
        return (model.decode(target, Coordinates.from_lengths([T], T), memory) @ direction)[0]

    return jax.jit(jax.jacobian(numbers))(_model(name))


@pytest.mark.parametrize(
    ("name", "stepwise"),
    [
        *((name, False) for name in CONFIGS if name in _SELDOM and name not in _CACHED),
        *(
            pytest.param(name, True, marks=pytest.mark.slow if name in _SELDOM and name not in _CACHED else ())
            for name in CONFIGS
        ),
    ],
)
def test_causality_by_gradients(name, stepwise):
    """By what is added to the vector of each target token where it is read: of whole texts, packs, steps and pieces."""
    model, read = _model(name), TokenEmbedding.__call__
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

    assert {leaf.shape[0] for leaf in jax.eval_shape(both, _model(name)) if leaf.ndim} == {B}


@most_models
def test_a_model_is_its_parameters(name):
    """No random state and nothing else that a plain `jax.jit` would lose or a checkpoint would not hold."""
    model = nnx.eval_shape(lambda: _build(name))
    assert not jax.tree.leaves(nnx.state(model, nnx.Not(nnx.Param)))
    assert not jax.tree.leaves(nnx.state(model, nnx.RngState))
    nnx.split(model, nnx.Param)


@one_of_each
@pytest.mark.parametrize("graph_mode", [True, False], ids=["graph", "tree"])
def test_both_modes_of_nnx(name, graph_mode):
    with nnx.set_graph_mode(graph_mode):
        graph, params = nnx.split(_model(name), nnx.Param)
        merged = jax.jit(lambda params: nnx.merge(graph, params))(params)
        np.testing.assert_array_equal(_decode(merged, *BATCH), _expected(name))
        built = nnx.eval_shape(lambda: _build(name))
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
        jax.eval_shape(call, _model(name), jax.random.key(0))


@with_an_encoder
def test_dropout_is_decided_by_the_keys(name):
    @jax.jit
    def call(model, encode_key, decode_key):
        memory = model.encode(BATCH[0], SOURCE_AT, dropout_key=encode_key)
        return model.decode(BATCH[2], TARGET_AT, memory, dropout_key=decode_key)

    model, keys = _model(name), jax.random.split(jax.random.key(0), 4)
    first, again, encoded, decoded = (
        np.asarray(call(model, *pair))[REAL]
        for pair in ((keys[0], keys[1]), (keys[0], keys[1]), (keys[2], keys[1]), (keys[0], keys[3]))
    )
    np.testing.assert_array_equal(first, again)
    for other in (encoded, decoded, _expected(name)[REAL]):
        assert np.abs(first - other).max() > 1e-2


@one_of_each
def test_greedy_generation_takes_the_largest_logit_of_decode(name):
    end, pad = 1, 0

    @jax.jit
    def found(model, source, source_at, first):
        state = model.start(model.encode(source, source_at), T)
        return generate(model.step, state, first, max_length=T, end_token=end, pad_token=pad)

    result = found(_model(name), *BATCH[:2], BATCH[2][:, 0])
    fed = jnp.concatenate([BATCH[2][:, :1], result.tokens[:, :-1]], axis=1)
    logits = np.asarray(_decode(_model(name), *BATCH[:2], fed, Coordinates.from_lengths(result.length, T)))
    total = np.zeros(B)
    for row, length in enumerate(np.asarray(result.length)):
        np.testing.assert_array_equal(result.tokens[row, :length], logits[row, :length].argmax(axis=-1))
        total[row] = np.asarray(jax.nn.log_softmax(logits[row, :length])).max(axis=-1).sum()
    np.testing.assert_allclose(result.log_probability, total, rtol=1e-4, atol=1e-4)
    assert not np.any(result.failed)
