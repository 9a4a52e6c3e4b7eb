"""The recurrent language model: one stream of tokens, whatever pieces it is read in."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.decoding import beam_search, generate
from seqattn.hypotheses import branch, select
from seqattn.losses import cross_entropy
from seqattn.models.recurrent_language_model import RecurrentLanguageModel, RecurrentLanguageModelConfig
from seqattn.nn import Cell
from tests.parameters import drawn

V, B, T, N, E, H = 13, 3, 7, 6, 5, 4
CONFIG = RecurrentLanguageModelConfig(V, embedding_dim=E, hidden_dim=H, num_layers=2, dropout_rate=0.5)
TEXT = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
LENGTHS = np.array([7, 4, 5])
AT = Coordinates.from_lengths(LENGTHS, T)
REAL = np.asarray(AT.segment) != 0
each_cell = pytest.mark.parametrize("cell", Cell)


@functools.cache
def _model(cell: Cell = Cell.GRU, **changes) -> RecurrentLanguageModel:
    config = dataclasses.replace(CONFIG, cell=cell, **changes)
    return drawn(lambda: RecurrentLanguageModel(config, rngs=nnx.Rngs(0)))


@jax.jit
def _decode(model, source, source_at, target, target_at):
    return model.decode(target, target_at, model.encode(source, source_at))


def _plain(model, text: np.ndarray, at: Coordinates) -> np.ndarray:
    """Logits without a context."""
    nothing = jnp.zeros((len(text), 0), jnp.int32), Coordinates.from_lengths([0] * len(text), 0)
    return np.asarray(_decode(model, *nothing, jnp.asarray(text), at))


@functools.cache
def _expected(cell: Cell = Cell.GRU) -> np.ndarray:
    return _plain(_model(cell), TEXT, AT)


def _cut(start: np.ndarray, stop: np.ndarray, length: int) -> jax.Array:
    """Tokens `start[i]` to `stop[i]` of each row's text, and -1 behind them: no token, must not be looked up."""
    piece = np.full((B, length), -1, np.int32)
    for row in range(B):
        piece[row, : stop[row] - start[row]] = TEXT[row, start[row] : stop[row]]
    return jnp.asarray(piece)


@each_cell
def test_context_and_rest_are_one_stream(cell):
    """Contexts of several lengths, also of none, and also one that leaves no rest."""
    split, zeros = np.array([3, 0, 5]), np.zeros(B, int)
    context, rest = _cut(zeros, split, N), _cut(split, LENGTHS, N)
    logits = _decode(
        _model(cell), context, Coordinates.from_lengths(split, N), rest, Coordinates.from_lengths(LENGTHS - split, N)
    )
    for row in range(B):
        wanted = _expected(cell)[row, split[row] : LENGTHS[row]]
        np.testing.assert_allclose(logits[row, : len(wanted)], wanted, atol=1e-6)


def test_where_padding_is_changes_nothing():
    """Padding on the left and between tokens, of the context as of the rest."""
    contexts = [[-7, *TEXT[0, :2], V, -1, TEXT[0, 2]], [*TEXT[1, :2], -1, -1, -1, -1], [99] * N]
    rests = [[TEXT[0, 3], 99, TEXT[0, 4], -1, *TEXT[0, 5:]], [V, V, *TEXT[1, 2:4], V, V], [*TEXT[2, :5], -1]]
    given = []
    for tokens in (np.array(contexts, np.int32), np.array(rests, np.int32)):
        given += [jnp.asarray(tokens), Coordinates.from_present(jnp.asarray((tokens >= 0) & (tokens < V)))]
    logits = _decode(_model(), *given)
    for row, places in enumerate([[0, 2, 4, 5], [2, 3], [0, 1, 2, 3, 4]]):
        wanted = _expected()[row, LENGTHS[row] - len(places) : LENGTHS[row]]
        np.testing.assert_allclose(logits[row, places], wanted, atol=1e-6)


def _alone(cell: Cell, *texts: np.ndarray) -> list[np.ndarray]:
    """Logits of up to B texts, each in a row of its own."""
    rows = np.zeros((B, T), np.int32)
    for row, text in zip(rows, texts, strict=False):
        row[: len(text)] = text
    lengths = [len(text) for text in texts] + [0] * (B - len(texts))
    logits = _plain(_model(cell), rows, Coordinates.from_lengths(lengths, T))
    return [row[:length] for row, length in zip(logits, lengths, strict=True)]


@each_cell
def test_packed_texts_are_texts_of_their_own(cell):
    segments, places = jnp.array([[1, 1, 2, 2, 2, 0, 7]] * B), ([0, 1], [2, 3, 4], [6])
    packed = _plain(_model(cell), TEXT, Coordinates.from_segments(segments))
    for row in range(B):
        for place, alone in zip(places, _alone(cell, *(TEXT[row, place] for place in places)), strict=True):
            np.testing.assert_allclose(packed[row, place], alone, atol=1e-6)


def test_a_target_goes_on_with_the_text_of_its_segment():
    """The last text of a context goes on, an earlier one does not."""
    context_at = Coordinates.from_segments(jnp.array([[1, 4, 4, 0, 0, 0]] * B))
    target_at = Coordinates.from_segments(jnp.array([[4, 4, 5, 5, 0, 0], [1, 1, 4, 4, 0, 0], [0] * N]))
    context, target = (jnp.asarray(np.tile(tokens, (B, 1))) for tokens in (TEXT[0, :N], TEXT[0, 1:]))
    logits = _decode(_model(), context, context_at, target, target_at)
    first, second = target[0, :2], target[0, 2:4]
    going_on, anew, other = _alone(Cell.GRU, np.concatenate([context[0, 1:3], first]), first, second)
    for row, wanted in enumerate([going_on[2:], anew]):
        np.testing.assert_allclose(logits[row, :2], wanted, atol=1e-6)
        np.testing.assert_allclose(logits[row, 2:4], other, atol=1e-6)


@each_cell
def test_pieces_and_steps_are_decode(cell):
    """A context, then two ragged pieces, then single tokens; the text of row 1 goes on in segment 3."""
    ends = np.array([[1, 0, 2], [3, 2, 2], [4, 2, 3]])

    @jax.jit
    def run(model, context, pieces, tokens):
        at = Coordinates.from_lengths(ends[0], 2)
        at = dataclasses.replace(at, segment=at.segment * jnp.array([[1], [1], [3]]))
        state, found = model.start(model.encode(context, at), 99), []
        for piece, lengths in pieces:
            logits, state = model.prefill(piece, lengths, state)
            found.append(logits)
        for token in tokens:
            logits, state = model.step(token, state)
            found.append(logits[:, None])
        return found

    pieces = [(_cut(a, b, 3), jnp.asarray(b - a)) for a, b in itertools.pairwise(ends)]
    tokens = [jnp.asarray(TEXT[np.arange(B), ends[-1] + step]) for step in range(2)]
    found = run(_model(cell), _cut(np.zeros(B, int), ends[0], 2), pieces, tokens)
    starts = [*ends, ends[-1] + 1]
    for logits, start, stop in zip(found, starts, [*starts[1:], ends[-1] + 2], strict=True):
        for row in range(B):
            wanted = _expected(cell)[row, start[row] : stop[row]]
            np.testing.assert_allclose(logits[row, : len(wanted)], wanted, atol=1e-6)


def test_hypotheses_part_and_take_each_others_place():
    parents, tokens, lengths = jnp.array([[1, 1], [0, 0], [1, 0]]), np.array([[2, 3], [4, 5], [6, 7]]), LENGTHS - 2

    @jax.jit
    def run(model):
        state = branch(model.encode(jnp.asarray(TEXT), Coordinates.from_lengths(lengths, T)), 2)
        _, state = model.step(jnp.asarray(tokens.reshape(-1)), state)
        return model.step(jnp.full(2 * B, 9), select(state, parents))[0]

    logits = np.asarray(run(_model())).reshape(B, 2, V)
    for beam in range(2):
        said = [tokens[row, parents[row, beam]] for row in range(B)]
        histories = [np.array([*TEXT[row, : lengths[row]], said[row], 9]) for row in range(B)]
        for row, wanted in enumerate(_alone(Cell.GRU, *histories)):
            np.testing.assert_allclose(logits[row, beam], wanted[-1], atol=1e-6)


def test_prefill_before_branching():
    def misuse(model):
        state = branch(model.encode(jnp.asarray(TEXT), AT), 2)
        return model.prefill(jnp.asarray(TEXT), jnp.asarray(LENGTHS), state)

    with pytest.raises(ValueError, match="prefill before branching: 3 rows of tokens, 6 hypotheses in the state"):
        jax.eval_shape(misuse, _model())


def test_generation_goes_on_with_a_text():
    """Primed as the docstring says: greedy is the largest logit of the stream, and the scores of beams are right."""
    options = {"max_length": 4, "end_token": 1}

    @jax.jit
    def found(model, text):
        state = model.start(model.encode(text[:, :-1], Coordinates.from_lengths([T - 1] * B, T - 1)), 4)
        beams = beam_search(model.step, state, text[:, -1], beam_size=3, n_best=2, **options)
        return generate(model.step, state, text[:, -1], **options), beams

    greedy, beams = found(_model(), jnp.asarray(TEXT))
    rows = [greedy.tokens, *jnp.moveaxis(beams.tokens, 1, 0)]
    lengths = [greedy.length, *beams.length.T]
    scores = [greedy.log_probability, *beams.log_probability.T]
    whole = np.concatenate([np.concatenate([TEXT, row], axis=1) for row in rows])
    logits = jax.nn.log_softmax(_plain(_model(), whole, Coordinates.from_lengths([T + 4] * len(whole), T + 4)))
    for row, (length, score) in enumerate(zip(np.concatenate(lengths), np.concatenate(scores), strict=True)):
        steps, tokens = np.asarray(logits[row, T - 1 : T - 1 + length]), whole[row, T : T + length]
        np.testing.assert_allclose(steps[np.arange(length), tokens].sum(), score, atol=1e-4)
        if row < B:
            np.testing.assert_array_equal(steps.argmax(axis=-1), tokens)
    assert not np.any(greedy.failed)


@jax.jit
def _slopes(model, segments):
    """How the logits at each place change with the vector of each token; the text is the tokens 0 to T - 1."""
    direction = jnp.asarray(np.random.default_rng(3).normal(size=V), jnp.float32)

    def numbers(model):
        nothing = model.encode(jnp.zeros((1, 0), jnp.int32), Coordinates.range(0))
        return (model.decode(jnp.arange(T)[None], Coordinates.from_segments(segments[None]), nothing) @ direction)[0]

    return jax.jacobian(numbers)(model).embedding.table[...]


@pytest.mark.parametrize("segments", [[1] * T, [1, 1, 2, 2, 2, 0, 2]], ids=["one text", "packed"])
def test_causality_by_gradients(segments):
    """A logit depends on a token where that is of the same text and not later."""
    segments = np.array(segments, np.int32)
    seen = np.abs(_slopes(_model(), jnp.asarray(segments))).max(axis=-1)[:, :T] > 0
    same, real = segments[:, None] == segments, segments != 0
    np.testing.assert_array_equal(seen[real], (np.tri(T, dtype=bool) & same)[real])


def test_what_padding_holds_leaves_no_trace_forward_or_backward():
    """Tokens outside the table, which would be NaN; the loss counts real tokens only."""

    @jax.jit
    @jax.value_and_grad
    def loss(model, text):
        memory = model.encode(text, AT)
        total, count = cross_entropy(model.decode(text, AT, memory), jnp.full((B, T), 3), weights=jnp.asarray(REAL))
        return total / count

    expected = jax.tree.leaves(loss(_model(), jnp.asarray(TEXT)))
    found = jax.tree.leaves(loss(_model(), jnp.where(REAL, TEXT, 10**6)))
    for ours, theirs in zip(found, expected, strict=True):
        assert np.all(np.isfinite(theirs))
        np.testing.assert_array_equal(ours, theirs)
    assert all(np.any(x) for x in expected)


@pytest.mark.parametrize("tie", [False, True], ids=["own", "tied"])
def test_the_loss_of_a_simple_network_is_numpys(tie):
    """Mikolov 2010: `h = tanh(W x + U h)`, softmax of `V h`; float64."""
    size = H if tie else E
    with jax.enable_x64(True):
        model = _model(Cell.SIMPLE, num_layers=1, tie_embeddings=tie, embedding_dim=size)
        model = jax.tree.map(lambda x: x.astype(jnp.float64), model)
        logits = _plain(model, TEXT[:, :-1], Coordinates.range(T - 1))
        total, count = cross_entropy(jnp.asarray(logits), jnp.asarray(TEXT[:, 1:]))
    assert logits.dtype == np.float64
    weights = {path: np.asarray(x) for path, x in nnx.to_flat_state(nnx.state(model))}
    cell, table = ("layers", 0, "cell"), weights["embedding", "table"]
    read, bias = (weights[*cell, "dense_i", name] for name in ("kernel", "bias"))
    recur = weights[*cell, "dense_h", "kernel"]
    expected, state = 0.0, np.zeros((B, H))
    for t in range(T - 1):
        x = size**0.5 * table[TEXT[:, t]]
        state = np.tanh(x @ read + bias + state @ recur)
        scores = state @ table.T if tie else state @ weights["output", "kernel"] + weights["output", "bias"]
        expected -= (scores[np.arange(B), TEXT[:, t + 1]] - np.log(np.exp(scores).sum(axis=-1))).sum()
    np.testing.assert_allclose([total, count], [expected, B * (T - 1)], rtol=1e-10)


def test_tied_embeddings_are_one_parameter():
    shapes = [x.shape for x in jax.tree.leaves(_model(tie_embeddings=True, embedding_dim=H))]
    assert [shape for shape in shapes if V in shape] == [(V, H)]
    assert len([x for x in jax.tree.leaves(_model()) if V in x.shape]) == 3


def test_every_dropout_acts_and_no_state_is_dropped():
    """A parameter has no gradient where what it is multiplied by was dropped: each place drops half of it."""
    direction = jnp.asarray(np.random.default_rng(2).normal(size=V), jnp.float32)

    def number(model, key):
        keys = jax.random.split(key)
        memory = model.encode(jnp.array([[3]]), Coordinates.range(1), dropout_key=keys[0])
        return (model.decode(jnp.array([[7]]), Coordinates.range(1), memory, dropout_key=keys[1]) @ direction).sum()

    gradients = jax.jit(jax.vmap(jax.grad(number), (None, 0)))(_model(), jax.random.split(jax.random.key(0), 128))
    places = {
        "vectors of the context": gradients.embedding.table[...][:, 3],
        "vectors of the rest": gradients.embedding.table[...][:, 7],
        "vector before the logits": gradients.output.kernel[...].sum(axis=-1),
    }
    dropped = {place: float(np.mean(np.asarray(gradient) == 0)) for place, gradient in places.items()}
    assert all(0.35 < share < 0.7 for share in dropped.values()), dropped
    # Both tokens reach it, so that it has no gradient where both dropped the same.
    between = gradients.layers[1].cell.dense_i.kernel[...].sum(axis=-1)
    assert 0.15 < float(np.mean(np.asarray(between) == 0)) < 0.35
    states = gradients.layers[0].cell.dense_h.kernel[...].sum(axis=-1)
    assert float(np.mean(np.asarray(states) == 0)) < 0.25


def test_no_two_dropouts_share_a_key():
    def call(model, key):
        keys = jax.random.split(key)
        memory = model.encode(jnp.asarray(TEXT), AT, dropout_key=keys[0])
        return model.decode(jnp.asarray(TEXT), AT, memory, dropout_key=keys[1])

    with jax.debug_key_reuse(True):
        jax.eval_shape(call, _model(), jax.random.key(0))


@pytest.mark.parametrize(("rows", "source", "target"), [(0, 3, 2), (2, 0, 2), (2, 3, 0), (2, 0, 0)])
def test_no_rows_no_context_or_no_rest(rows, source, target):
    def call(model):
        tokens = [jnp.zeros((rows, length), jnp.int32) for length in (source, target)]
        at = [Coordinates.from_lengths(jnp.full(rows, length), length) for length in (source, target)]
        memory = model.encode(tokens[0], at[0])
        alignment = model.alignment(tokens[1], at[1], memory)
        return model.decode(tokens[1], at[1], memory), model.step(jnp.zeros(rows, jnp.int32), memory)[0], alignment

    shapes = [x.shape for x in jax.eval_shape(call, _model())]
    assert shapes == [(rows, target, V), (rows, V), (rows, 0, target, 0)]


@each_cell
def test_param_dtype_reaches_every_parameter_and_state(cell):
    def build():
        config = dataclasses.replace(CONFIG, cell=cell)
        model = RecurrentLanguageModel(config, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        memory = model.encode(jnp.asarray(TEXT), AT)
        return nnx.state(model, nnx.Param), memory.carries, model.decode(jnp.asarray(TEXT), AT, memory)

    assert {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(build))} == {jnp.dtype(jnp.bfloat16)}


def test_a_model_is_its_parameters():
    assert not jax.tree.leaves(nnx.state(_model(), nnx.Not(nnx.Param)))
    for graph_mode in (True, False):
        with nnx.set_graph_mode(graph_mode):
            graph, params = nnx.split(_model(), nnx.Param)
            np.testing.assert_array_equal(_plain(nnx.merge(graph, params), TEXT, AT), _expected())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tie_embeddings": True}, r"tie_embeddings needs embedding_dim \(5\) equal to hidden_dim \(4\)"),
        ({"num_layers": 0}, r"num_layers \(0\) must be an integer of at least 1"),
        ({"vocab_size": 0}, r"vocab_size \(0\)"),
        ({"dropout_rate": 1.5}, r"dropout rate \(1.5\) must be in \[0, 1\)"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: RecurrentLanguageModel(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0)))
