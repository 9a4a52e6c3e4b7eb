"""Masks and score functions in two parts: together they compute what the whole does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings

from seqattn.coordinates import Coordinates
from seqattn.kernels import on_tile
from seqattn.kernels.call import Call
from seqattn.kernels.per_pair import QUERY, arguments_of, cut
from seqattn.kernels.traced import capture
from seqattn.mask import MaskMod
from seqattn.masks import Causal, Prefix
from seqattn.score_mod import ScoreFunction
from seqattn.score_mods import RelativeBuckets, RelativePositions
from tests.mask_trees import coordinates, mask_trees

T, S, N = 7, 5, 3


def _call(mask=None, score_mod=None, at=None, batch=1):
    q_at, kv_at = at or (Coordinates.range(T), Coordinates.range(S))
    query, key = jnp.ones((batch, T, N, 2)), jnp.ones((batch, S, N, 2))
    given = {"mask": mask, "score_mod": score_mod, "q_at": q_at, "kv_at": kv_at}
    call = Call.of(query, key, key, bias=None, scale=None, dropout=None, **given)
    return capture(call, like=call)


def _parts(call):
    mod = call.score_mod is not None
    program = (call.score_mod if mod else call.mask).program
    parts = cut(program, arguments_of(call.q_at, call.kv_at, mod=mod, rows=call.rows is not None))
    fields = [jax.tree.leaves(at) for at in (call.q_at, call.kv_at)]
    borders = parts.borders((*program.arrays, *program.fixed), *fields, call.query.shape[0], N)
    return parts, borders


def _pairs(parts, borders, row, head, score=()):
    """Evaluates both parts for all pairs of a row and a head."""
    given = []
    for border, x in zip(parts.late.borders, borders, strict=True):
        of_row = x[min(row, x.shape[0] - 1), min(head, x.shape[1] - 1)]
        if border.by_token:
            given.append(of_row[:, None] if QUERY in border.reads else of_row[None])
        else:
            given.append(list(of_row))
    return on_tile.evaluate(parts.late, given, score, (T, S), on_tile.TPU)


@settings(deadline=None, max_examples=40)
@given(mask_trees(), coordinates(T), coordinates(S))
def test_both_parts_of_a_mask_are_the_mask(mask, q_at, kv_at):
    try:
        parts, borders = _parts(_call(mask[0], at=(q_at, kv_at)))
    except NotImplementedError as reason:
        # A table of both positions has a row for each query.
        assume("from which pairs choose" not in str(reason))
        raise
    np.testing.assert_array_equal(_pairs(parts, borders, 0, 0), mask[0].dense(q_at, kv_at))


def test_what_depends_on_the_head_or_on_one_token_is_computed_before():
    """Only the comparison is left for each pair: a gather by position, a remainder and a table of heads are not."""
    document, window = jnp.arange(T) // 3, jnp.array([1, 2, 3])

    def near(query, key, document, window):
        same = document[query.position] == document[key.position % 4]
        return same & (query.position - key.position < window[query.head])

    call = _call(MaskMod(near, document, window))
    parts, borders = _parts(call)
    names = [equation.primitive.name for equation in parts.late.instructions.jaxpr.eqns]
    assert names == ["eq", "sub", "lt", "and"]
    for head in range(N):
        expected = MaskMod(near, document, window).dense(call.q_at, call.kv_at, N)[0, head]
        np.testing.assert_array_equal(_pairs(parts, borders, 0, head), expected)


def test_a_length_for_each_row_is_read_before():
    call = _call(Causal() | Prefix(jnp.array([1, 4])), batch=2)
    parts, borders = _parts(call)
    assert any(x.shape[0] == 2 for x in borders)
    for row, length in enumerate((1, 4)):
        expected = np.tri(T, S, dtype=bool) | (np.arange(S) < length)
        np.testing.assert_array_equal(_pairs(parts, borders, row, 0), expected)


def test_a_table_by_bucket_and_head_becomes_one_of_the_head():
    table = jnp.asarray(np.random.default_rng(0).normal(size=(8, N)).astype(np.float32))
    call = _call(score_mod=RelativeBuckets(table, max_distance=5))
    parts, borders = _parts(call)
    # The buckets are known at trace time, and the table of one head has 8 entries.
    assert sorted(border.entries for border in parts.late.borders)[:3] == [1, 1, 8]
    assert any(known is not None for known in parts.late.tables)
    score = jnp.zeros((T, S))
    for head in range(N):
        expected = call.score_mod.over(
            jnp.zeros((1, N, T, S)), call.q_at, call.kv_at, jnp.arange(N, dtype=jnp.int32), None
        )[0, head]
        np.testing.assert_array_equal(_pairs(parts, borders, 0, head, (score,)), expected)


FLAGS = jnp.asarray([True, False, False, True, True])


@jax.jit
def _of_a_jit(index):
    """A choice from an array that the nested program holds."""
    return FLAGS[index]


@pytest.mark.parametrize(
    "fn",
    [
        lambda query, key: _of_a_jit(query.position - key.position),
        lambda query, key: jnp.arange(1, 1 + N)[query.head] > query.position - key.position,
        lambda query, key: jnp.linspace(0.0, 3.0, T)[query.position] > jnp.zeros(S)[key.position] + 1,
        lambda query, key: jax.random.bernoulli(jax.random.fold_in(jax.random.key(3), query.position)),
    ],
    ids=["jit", "by_head", "by_token", "random_by_query"],
)
def test_arrays_that_the_function_makes_or_a_nested_program_holds(fn):
    call = _call(MaskMod(fn))
    parts, borders = _parts(call)
    expected = np.broadcast_to(MaskMod(fn).dense(call.q_at, call.kv_at, N), (1, N, T, S))
    for head in range(N):
        np.testing.assert_array_equal(_pairs(parts, borders, 0, head), expected[0, head])


def test_equal_functions_have_equal_parts_and_others_have_not():
    def late(step):
        return _parts(_call(MaskMod(lambda query, key: (query.position - key.position) % step == 0)))[0].late

    assert late(2) == late(2)
    assert hash(late(2)) == hash(late(2))
    assert late(2) != late(3)


def _key_of(number):
    return jax.random.fold_in(jax.random.key(3), number)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            {"score_mod": RelativePositions(jnp.ones((3, 2)))},
            "an array for each query and head, from which pairs choose",
        ),
        (
            {"mask": MaskMod(lambda query, key, table: table[query.position, key.position], jnp.ones((T, S), bool))},
            r"each query has an array \(1, 5\), from which pairs choose",
        ),
        (
            {"mask": MaskMod(lambda query, key, table: table[query.position - key.position], jnp.ones(999, bool))},
            "a table of 999 entries is indexed by the pair; a kernel searches at most 512",
        ),
        (
            {"mask": MaskMod(lambda query, key: (query.position - key.position).astype(jnp.int16) > 0)},
            "computes in int16 for each pair; kernels have 32 bits",
        ),
        (
            {"mask": MaskMod(lambda query, key: jax.random.bernoulli(_key_of(query.position - key.position)))},
            "computes in key<fry> for each pair",
        ),
    ],
    ids=["rows", "by_both", "large", "int16", "random"],
)
def test_what_cannot_be_cut_says_why(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        _parts(_call(**options))


def test_an_array_with_a_gradient_that_is_indexed_by_token_is_refused():
    def loss(slopes):
        mod = ScoreFunction(lambda score, query, key, head, slopes: score + slopes[query.position], slopes)
        return jnp.sum(_parts(_call(score_mod=mod))[1][0])

    with pytest.raises(NotImplementedError, match="an array with a gradient is indexed by the query"):
        jax.grad(loss)(jnp.ones(T))
