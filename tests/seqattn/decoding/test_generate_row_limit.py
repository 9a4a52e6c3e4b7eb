"""A length limit for each row: what a row finds alone with that limit, by every search."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.decoding import (
    AverageLength,
    CoveragePenalty,
    DiverseGroups,
    ForcedPrefix,
    Greedy,
    MinLength,
    NoRepeatNgram,
    RepetitionPenalty,
    Sample,
    Shared,
    Stopping,
    Temperature,
    beam_search,
    generate,
)

V, END, PAD, MAX_LENGTH, S = 7, 3, 5, 7, 3
LIMITS = np.array([5, 1, 7])
ROWS = len(LIMITS)
PENALTIES = np.linspace(0.6, 2, ROWS).astype(np.float32)
PREFIX = np.array([[1, 2], [0, 6], [6, 4]]), np.array([2, 1, 0])


def _tables(seed):
    draw = np.random.default_rng(seed)
    logits = 2 * draw.normal(size=(ROWS, V, V)).astype(np.float32)
    logits[..., END] += seed % 3
    return jnp.asarray(logits), jnp.asarray(draw.uniform(size=(ROWS, V, S)).astype(np.float32))


def _step(tokens, state):
    logits, weights = state["tables"].value
    row = jnp.repeat(jnp.arange(len(logits)), len(tokens) // len(logits))
    return logits[row, tokens], {"tables": state["tables"], "weights": weights[row, tokens]}


def _processors(rows):
    return (
        ForcedPrefix(PREFIX[0][rows], PREFIX[1][rows]),
        NoRepeatNgram(3),
        RepetitionPenalty(PENALTIES[rows]),
        MinLength(np.arange(ROWS)[rows], END),
    )


def _greedy(rows):
    return generate, {"sampling": Greedy()}


def _sampled(rows):
    keys = jax.random.split(jax.random.key(7), ROWS)[rows]
    return generate, {"sampling": Sample((Temperature(0.9),)), "key": keys, "processors": _processors(rows)}


def _beams(rows):
    return beam_search, {"beam_size": 3, "n_best": 3, "length_penalty": AverageLength(2.0)}


def _early_beams(rows):
    return beam_search, _beams(rows)[1] | {"stopping": Stopping.LIKELY, "processors": _processors(rows)}


def _groups(rows):
    present = np.arange(S)[None] < np.arange(1, ROWS + 1)[:, None]
    coverage = {"coverage": CoveragePenalty(0.2, present[rows]), "alignment": lambda state: state["weights"]}
    return beam_search, {
        "beam_size": 4,
        "n_best": 4,
        "groups": DiverseGroups(2, 3.0),
        "length_penalty": AverageLength(2.0),
        **coverage,
    }


SEARCHES = [_greedy, _sampled, _beams, _early_beams, _groups]


def _find(search, rows, tables, max_length, row_limit=None):
    """Jitted, with a traced limit."""
    find, options = search(rows)

    @jax.jit
    def run(tables, row_limit):
        tables = tuple(leaf[rows] for leaf in tables)
        state = {"tables": Shared(tables), "weights": jnp.zeros((len(tables[0]), S))}
        sizes = {"max_length": max_length, "end_token": END, "pad_token": PAD, "row_limit": row_limit}
        return find(_step, state, jnp.arange(ROWS)[rows], **sizes, **options)

    return [run(each, row_limit) for each in tables]


@pytest.mark.parametrize("search", SEARCHES)
def test_a_row_with_a_length_limit_finds_what_it_finds_alone_with_it(search):
    tables = [_tables(seed) for seed in range(4)]
    limited = _find(search, slice(None), tables, MAX_LENGTH, jnp.asarray(LIMITS))
    for row, limit in enumerate(LIMITS.tolist()):
        for together, alone in zip(limited, _find(search, slice(row, row + 1), tables, limit), strict=True):
            np.testing.assert_array_equal(together.tokens[row, ..., :limit], alone.tokens[0])
            np.testing.assert_array_equal(together.tokens[row, ..., limit:], PAD)
            for name in ("length", "ended", "failed"):
                np.testing.assert_array_equal(getattr(together, name)[row], getattr(alone, name)[0], err_msg=name)
            np.testing.assert_allclose(together.log_probability[row], alone.log_probability[0], rtol=1e-5)
            if search not in (_greedy, _sampled):
                np.testing.assert_allclose(together.score[row], alone.score[0], rtol=1e-5)


def test_a_group_is_done_when_it_would_be_with_that_limit_alone():
    """A group that is done no longer steers the others: of 401 rows a few would find something else."""
    rows, draw = 401, np.random.default_rng(0)
    table = 2 * draw.normal(size=(rows, V, V)).astype(np.float32)
    table[..., END] += 2

    def run(max_length, row_limit):
        sizes = {"max_length": max_length, "end_token": END, "pad_token": PAD, "beam_size": 4, "n_best": 4}

        @jax.jit
        def search(table, row_limit):
            def step(tokens, state):
                return table[state, tokens], state

            first = jnp.zeros(rows, jnp.int32)
            return beam_search(
                step, jnp.arange(rows), first, row_limit=row_limit, groups=DiverseGroups(2, 2.0), **sizes
            )

        return search(table, row_limit)

    np.testing.assert_array_equal(run(7, 5).tokens[..., :5], run(5, None).tokens)


def _reach(find, row_limit, **options):
    """The lengths of rows that never end, and how often a step was called."""
    calls = []

    def step(tokens, state):
        jax.debug.callback(calls.append, tokens, ordered=True)
        return jnp.broadcast_to(jax.nn.one_hot(jnp.array([0]), V) * 99, (len(tokens), V)), state

    sizes = {"max_length": 9, "end_token": END, "pad_token": PAD}
    found = jax.jit(lambda limit: find(step, (), jnp.array([0, 0]), row_limit=limit, **sizes, **options))(row_limit)
    jax.effects_barrier()
    return found.length.reshape(-1).tolist(), len(calls)


@pytest.mark.parametrize(("find", "options"), [(generate, {}), (beam_search, {"beam_size": 2})])
@pytest.mark.parametrize(
    ("row_limit", "lengths"),
    [
        (np.array([4, 2]), [4, 2]),
        (np.array([4, 2], np.uint8), [4, 2]),
        (5, [5, 5]),
        (np.array([-3, 99]), [1, 9]),  # traced, they are not known to be no limits
        (np.array([0, 255], np.uint8), [1, 9]),
        (None, [9, 9]),
    ],
)
def test_a_search_ends_with_the_longest_limit(find, options, row_limit, lengths):
    assert _reach(find, row_limit, **options) == (lengths, max(lengths))


@pytest.mark.parametrize(("find", "options"), [(generate, {}), (beam_search, {"beam_size": 2})])
def test_what_a_model_says_behind_the_limit_of_a_row_is_not_looked_at(find, options):
    def step(tokens, state):
        return jnp.where((tokens == PAD)[:, None], jnp.nan, jax.nn.one_hot(0 * tokens, V)), state

    sizes = {"max_length": 4, "end_token": END, "pad_token": PAD, "row_limit": np.array([1, 4])}
    found = find(step, (), jnp.array([0, 0]), **sizes, **options)
    assert not np.any(found.failed)
    assert np.all(np.isfinite(found.log_probability))
    assert found.length.reshape(-1).tolist() == [1, 4]


def test_vmap_over_limits_is_a_loop_over_them():
    logits = _tables(4)[0][0]

    @jax.jit
    @jax.vmap
    def run(limit):
        sizes = {"max_length": MAX_LENGTH, "end_token": END, "pad_token": PAD, "row_limit": limit, "beam_size": 2}
        return beam_search(lambda tokens, state: (logits[tokens], state), (), jnp.array([0, 1]), **sizes).tokens

    mapped = run(jnp.array([[1, 7], [4, 2]]))
    for index, limits in enumerate([[1, 7], [4, 2]]):
        np.testing.assert_array_equal(mapped[index], run(jnp.array([limits]))[0])


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(("find", "options"), [(generate, {}), (beam_search, {"beam_size": 2})])
@pytest.mark.parametrize(
    ("row_limit", "error", "rule"),
    [
        (0, ValueError, r"row_limit \(0\) must be in \[1, 9\]"),
        (np.array([3, 10]), ValueError, r"row_limit \(10\) must be in \[1, 9\]"),
        (np.array([3.0, 4.0]), TypeError, "row_limit must be integers, got float"),
        (True, TypeError, "row_limit must be integers, got bool"),
        (np.array([3]), ValueError, r"row_limit must be one number or \[B\] for 2 rows, got \(1,\)"),
        (np.array([[3, 3]]), ValueError, r"row_limit must be one number or \[B\] for 2 rows, got \(1, 2\)"),
    ],
)
def test_what_is_no_limit_is_refused(find, options, row_limit, error, rule):
    def never(tokens, state):
        raise AssertionError("a refusal comes before the model is traced")

    with pytest.raises(error, match=rule):
        find(never, (), jnp.array([0, 0]), max_length=9, end_token=END, row_limit=row_limit, **options)
