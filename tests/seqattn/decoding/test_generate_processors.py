"""Generation under constraints against a loop in Python; sampled generation against itself alone, and at its edges."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.decoding import (
    Banned,
    ForcedPrefix,
    Generated,
    Greedy,
    LogitsProcessor,
    MinLength,
    MinP,
    NoRepeatNgram,
    RepetitionPenalty,
    Sample,
    Temperature,
    TopK,
    TopP,
    generate,
)
from tests.logits_oracle import expected, probabilities

V, END, PAD, MAX_LENGTH = 7, 3, 5, 11
FIRST, GREEDY = np.array([0, 1, 2, 6, 4]), Greedy()
ROWS = len(FIRST)
PREFIX = ForcedPrefix(
    np.array([[1, 2, 0, 4], [6, END, 1, 1], [0, 0, 0, 0], [2, 2, 2, 99], [0, 1, 2, END]]), np.array([4, 4, 0, 3, 4])
)


def _table(seed: int) -> np.ndarray:
    table = 3 * np.random.default_rng(seed).normal(size=(V, V)).astype(np.float32)
    table[:, END] += 1
    return table


def _step(tokens, state):
    return state[0][tokens], state


@functools.partial(jax.jit, static_argnames=("step", "max_length"))
def _generate(
    state,
    first,
    processors=(),
    sampling=GREEDY,
    key=None,
    step=_step,
    max_length=MAX_LENGTH,
) -> Generated:
    return generate(
        step,
        state,
        first,
        max_length=max_length,
        end_token=END,
        pad_token=PAD,
        processors=processors,
        sampling=sampling,
        key=key,
    )


def _state(table, rows: int = ROWS):
    return (jnp.asarray(table), jnp.zeros((rows, 1)))


def _loop(table, row: int, processors) -> tuple[list[int], float, bool, bool]:
    """One row: its tokens, their log probability in the model, whether it ended and whether it failed."""
    said, total = [int(FIRST[row])], 0.0
    while len(said) <= MAX_LENGTH:
        model = logits = table[said[-1]].astype(np.float64)
        for processor in processors:
            logits = expected(processor, logits, said, row)
        if not np.isfinite(logits.max()):
            return said[1:], total, False, True
        said.append(int(np.argmax(logits)))
        total += np.log(probabilities(model)[said[-1]])
        if said[-1] == END:
            return said[1:], total, True, False
    return said[1:], total, False, False


CONSTRAINTS = {
    "penalty": (RepetitionPenalty(3.0),),
    "no bigram twice": (NoRepeatNgram(2),),
    "no token twice": (NoRepeatNgram(1),),
    "minimum": (MinLength(np.array([0, 1, 4, 11, 12]), END),),
    "prefix": (PREFIX,),
    "banned": (Banned((END, 1)),),
    "all": (Banned((4,)), NoRepeatNgram(3), MinLength(6, END), RepetitionPenalty(1.2)),
    "prefix against a minimum": (PREFIX, MinLength(4, END)),
}


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_it_is_a_loop_over_the_largest_allowed_logit(name):
    for seed in range(4):
        table = _table(seed)
        found = _generate(_state(table), FIRST, CONSTRAINTS[name])
        for row in range(ROWS):
            tokens, total, ended, failed = _loop(table, row, CONSTRAINTS[name])
            padded = tokens + [PAD] * (MAX_LENGTH - len(tokens))
            np.testing.assert_array_equal(found.tokens[row], padded, err_msg=f"seed {seed}, row {row}")
            assert (found.length[row], found.ended[row], found.failed[row]) == (len(tokens), ended, failed)
            np.testing.assert_allclose(found.log_probability[row], total, rtol=1e-5, atol=1e-6)


def test_uneven_prefixes_are_said_and_end_where_they_hold_the_end():
    found = _generate(_state(_table(0)), FIRST, (PREFIX,))
    for row, length in enumerate([4, 2, 0, 3, 4]):
        np.testing.assert_array_equal(found.tokens[row, :length], PREFIX.tokens[row, :length])
    np.testing.assert_array_equal(found.length[jnp.array([1, 4])], [2, 4])
    assert np.all(found.ended[jnp.array([1, 4])])


def test_a_prefix_longer_than_the_text_is_cut():
    found = _generate(_state(_table(0)), FIRST, (PREFIX,), max_length=2)
    np.testing.assert_array_equal(found.tokens[jnp.array([0, 3, 4])], [[1, 2], [2, 2], [0, 1]])


@pytest.mark.parametrize("length", [1, 2, MAX_LENGTH - 1, MAX_LENGTH, MAX_LENGTH + 1])
def test_b11_the_end_token_counts_as_one_of_the_tokens(length):
    """The model would end at once, so the shortest text that is allowed is what it says."""
    table = np.zeros((V, V), np.float32)
    table[:, END] = 5
    found = _generate(_state(table), FIRST, (MinLength(length, END),))
    np.testing.assert_array_equal(found.length, [min(length, MAX_LENGTH)] * ROWS)
    np.testing.assert_array_equal(found.ended, [length <= MAX_LENGTH] * ROWS)
    chance = np.log(probabilities(table[0].astype(np.float64)))
    forced = (length - 1) * chance[0] + chance[END] if length <= MAX_LENGTH else MAX_LENGTH * chance[0]
    np.testing.assert_allclose(found.log_probability, [forced] * ROWS, rtol=1e-5)


def test_b14_a_row_that_may_say_nothing_fails():
    table = np.zeros((V, V), np.float32)
    table[2, 1] = table[4, 1] = -np.inf  # the model holds what is forced for impossible
    forced = ForcedPrefix(np.full((ROWS, 2), 1), np.array([2, 2, 2, 0, 2]))
    found = _generate(_state(table), FIRST, (forced,), max_length=3)
    np.testing.assert_array_equal(found.failed, [False, False, True, False, True])
    np.testing.assert_array_equal(found.length, [3, 3, 0, 3, 0])
    np.testing.assert_array_equal(found.tokens[2], [PAD] * 3)
    everything = _generate(_state(table), FIRST, (Banned(tuple(range(V))),))
    assert np.all(everything.failed)
    np.testing.assert_array_equal(everything.length, [0] * ROWS)


@jax.tree_util.register_static
class _Blind(LogitsProcessor):
    """Of a user who takes NaN and inf for 0."""

    def __call__(self, logits, history):
        return jnp.where(jnp.isfinite(logits), logits, 0.0)


@pytest.mark.parametrize("spoilt", [np.nan, np.inf])
@pytest.mark.parametrize("sampling", [Greedy(), Sample(), Sample((Temperature(0),)), Sample((TopP(0.5),))], ids=str)
def test_b14_no_processor_and_no_sampling_hides_that_the_model_failed(spoilt, sampling):
    table = _table(0)
    table[2, 4] = spoilt
    found = _generate(_state(table), FIRST, (_Blind(),), sampling, jax.random.key(0))
    assert found.failed[2]
    assert found.length[2] == 0
    assert np.all(np.isfinite(found.log_probability))


def _equal(found: Generated, other: Generated) -> None:
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    "filters", [(TopK(1),), (TopP(0),), (Temperature(0),), (MinP(1),), (TopK(3), TopP(0.0))], ids=str
)
def test_b13_sampling_from_the_best_token_is_greedy(filters):
    greedy = _generate(_state(_table(1)), FIRST)
    _equal(_generate(_state(_table(1)), FIRST, (), Sample(filters), jax.random.key(0)), greedy)


@pytest.mark.parametrize("filters", [(TopK(V),), (TopK(V + 9),), (TopP(1),), (MinP(0),)], ids=str)
def test_b13_filters_that_keep_all_change_nothing(filters):
    free = _generate(_state(_table(1)), FIRST, (), Sample(), jax.random.key(2))
    _equal(_generate(_state(_table(1)), FIRST, (), Sample(filters), jax.random.key(2)), free)
    assert np.any(free.tokens != _generate(_state(_table(1)), FIRST).tokens)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("filters", [(TopK(1),), (TopP(0),), (Temperature(0),)], ids=str)
def test_b15_of_equal_logits_the_lowest_token_is_the_best(filters, dtype):
    table = np.array([[0, 2, 1, -1, 2, 2.001, 2]] * V).astype(dtype)
    found = _generate(_state(table), FIRST[:2], (), Sample(filters), jax.random.key(0), max_length=3)
    assert np.all(found.tokens == (1 if dtype == ml_dtypes.bfloat16 else 5))


def test_b12_nothing_but_padding_follows_the_one_end_token():
    found = _generate(_state(_table(1) / 4), FIRST, (), Sample(), jax.random.key(1))
    assert len(set(np.asarray(found.length).tolist())) > 2
    for tokens, length, ended in zip(*(np.asarray(x) for x in (found.tokens, found.length, found.ended)), strict=True):
        assert np.all(tokens[length:] == PAD)
        assert (tokens == END).sum() == ended
        assert not ended or tokens[length - 1] == END


def test_a_row_alone_says_what_it_says_in_a_batch():
    """With keys of their own, and with the ones that one key becomes."""
    key, table = jax.random.key(7), _table(2) / 4
    sampling = Sample((Temperature(0.8), TopP(0.9)))
    each = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, jnp.arange(ROWS))
    together = _generate(_state(table), FIRST, (), sampling, key)
    _equal(_generate(_state(table), FIRST, (), sampling, each), together)
    for row in range(ROWS):
        alone = _generate(_state(table, 1), FIRST[row : row + 1], (), sampling, each[row : row + 1])
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_array_equal(ours[row], theirs[0])
    _equal(_generate(_state(table), FIRST, (), sampling, jax.random.PRNGKey(7)), together)
    assert np.any(_generate(_state(table), FIRST, (), sampling, jax.random.key(8)).tokens != together.tokens)


def test_steps_draw_independently_and_their_log_probability_is_the_models():
    rows, table = 20011, np.zeros((V, V), np.float32)
    table[:, [END, 4, 5, 6]] = -np.inf
    table[:, :3] = [0.0, 1.0, -0.5]
    found = _generate(
        _state(table, rows), np.zeros(rows, int), (), Sample((Temperature(2.0),)), jax.random.key(1), max_length=2
    )
    chances = probabilities(table[0, :3].astype(np.float64) / 2)
    pairs = np.bincount(3 * found.tokens[:, 0] + found.tokens[:, 1], minlength=9)
    wanted = rows * np.ravel(chances[:, None] * chances)
    assert ((pairs - wanted) ** 2 / wanted).sum() < 26.12  # chi-square of 8 degrees: one of 1000 fair ones exceeds it
    model = np.log(probabilities(table[0].astype(np.float64))[:3])
    np.testing.assert_allclose(found.log_probability, model[np.asarray(found.tokens)].sum(axis=1), rtol=1e-5)


def _never(tokens, state):
    raise AssertionError("a refusal comes before the model is traced")


def test_a_missing_key_is_refused_before_anything_is_traced():
    with pytest.raises(ValueError, match=r"Sample needs a key: generate\(..., key=jax.random.key\(0\)\)"):
        _generate(_state(_table(0)), FIRST, (), Sample(), step=_never)


def test_keys_for_other_rows_are_refused_before_anything_is_traced():
    with pytest.raises(ValueError, match="one for each of 5 rows"):
        _generate(_state(_table(0)), FIRST, (), Sample(), jax.random.split(jax.random.key(0), 4), step=_never)


def test_greedy_needs_no_key_and_looks_at_none():
    _equal(_generate(_state(_table(0)), FIRST), _generate(_state(_table(0)), FIRST, key=jax.random.key(0)))


@pytest.mark.parametrize("end_token", [V, -1])
def test_b9_an_end_token_that_no_row_can_reach_is_refused(end_token):
    rule = rf"end_token \({end_token}\) must be (below the size of the vocabulary \(7\)|an integer of at least 0)"
    with pytest.raises(ValueError, match=rule):
        generate(_step, _state(_table(0)), jnp.asarray(FIRST), max_length=2, end_token=end_token)


@pytest.mark.parametrize("change", [lambda x: x[:, None], lambda x: x[:-1]], ids=["rank", "rows"])
def test_logits_of_another_shape_are_refused(change):
    with pytest.raises(ValueError, match=r"a step must return logits \[R, V\] for 5 hypotheses, got the shape \("):
        _generate(_state(_table(0)), FIRST, step=lambda tokens, state: (change(state[0][tokens]), state))


def test_other_values_and_keys_are_one_program():
    traced = []

    def step(tokens, state):
        traced.append(1)
        return _step(tokens, state)

    counts = []
    for seed in range(3):
        sampling = Sample((Temperature(0.5 + seed), TopP(0.4 + seed / 10)))
        _generate(
            _state(_table(seed)), FIRST, (RepetitionPenalty(1.0 + seed),), sampling, jax.random.key(seed), step=step
        )
        counts.append(len(traced))
    assert counts == [counts[0]] * 3


def test_vmap_over_keys_is_a_loop_over_them():
    keys = jax.random.split(jax.random.key(3), 4)

    def run(key):
        return jax.tree.leaves(_generate(_state(_table(2) / 4), FIRST, (NoRepeatNgram(2),), Sample((TopK(4),)), key))

    mapped = jax.vmap(run)(keys)
    for index, key in enumerate(keys):
        for ours, theirs in zip(mapped, run(key), strict=True):
            np.testing.assert_allclose(ours[index], theirs, rtol=1e-6)
