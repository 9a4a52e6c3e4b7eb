"""The faults of other libraries (rows A of the list of bad inputs), excluded for every implementation of `attend`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.coordinates import Coordinates
from seqattn.dropout import Dropout
from seqattn.masks import Causal, NotPadding, SameSegment, SlidingWindow
from seqattn.score_mod import ScoreFunction, compose
from seqattn.score_mods import Alibi, RelativePositions
from tests import contract, oracle
from tests.contract import (
    GROUPED,
    SQUARE,
    Shape,
    agrees_with_oracle,
    arrays,
    close,
    cotangents,
    equal,
    every_implementation,
    forward,
    random_pairs,
    spoil,
    with_gradients,
)

GARBAGE = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf}


def _without_a_row(pairs):
    """The random pairs in which the second query of every row sees nothing."""
    assert not pairs[..., 1, :].any()
    return np.delete(np.arange(GROUPED.T), 1)


@every_implementation
def test_a1_a_row_that_sees_nothing_is_zero_and_finite(implementation):
    (output, lse), gradients = with_gradients(
        implementation, arrays(GROUPED), cotangents(GROUPED), mask=random_pairs(GROUPED)
    )
    assert not output[:, 1].any()
    assert np.all(lse[:, 1] == -np.inf)
    assert not gradients["query"][:, 1].any()
    assert all(np.isfinite(gradient).all() for gradient in (output, *gradients.values()))


@every_implementation
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a2_gradients_are_those_of_a_run_without_the_empty_row(implementation, garbage):
    pairs = random_pairs(GROUPED)
    rest = _without_a_row(pairs)
    inputs, (d_output, d_lse) = arrays(GROUPED), cotangents(GROUPED)
    spoilt = spoil(inputs, (slice(None), 1), garbage, "query")
    _, gradients = with_gradients(implementation, spoilt, (d_output, d_lse), mask=pairs)
    without = inputs | {"query": inputs["query"][:, rest]}
    directions = d_output[:, rest], d_lse[:, rest]
    _, expected = with_gradients(implementation, without, directions, mask=pairs[:, :, rest])
    assert not gradients["query"][:, 1].any()
    close(gradients["query"][:, rest], expected["query"])
    close(gradients["key"], expected["key"])
    close(gradients["value"], expected["value"])


@every_implementation
def test_a3_an_empty_row_is_not_the_mean_of_the_padding(implementation):
    inputs = arrays(SQUARE)
    at = Coordinates.from_lengths(jnp.array([7, 0]), 7)
    output, lse = forward(implementation, inputs, mask=NotPadding(), q_at=at, kv_at=at)
    assert np.abs(inputs["value"][1].mean(axis=0)).max() > 0.1
    assert not output[1].any()
    assert np.all(lse[1] == -np.inf)
    close(output[0], oracle.attention(**{name: x[0] for name, x in inputs.items()}).output)


@every_implementation
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a4_nan_in_masked_value_leaves_no_trace(implementation, garbage):
    pairs = random_pairs(GROUPED)
    pairs[1, :, :, 4] = False
    clean = arrays(GROUPED)
    spoilt = spoil(clean, (1, 4), garbage, "value")
    runs = [with_gradients(implementation, x, cotangents(GROUPED), mask=pairs) for x in (clean, spoilt)]
    equal(runs[1], runs[0])
    assert not runs[1][1]["value"][1, 4].any()


@every_implementation
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a5_inf_in_masked_key_leaves_no_trace(implementation, garbage):
    at = Coordinates.from_lengths(jnp.array([7, 4]), 7)
    located = {"mask": Causal() & NotPadding(), "q_at": at, "kv_at": at}
    clean = arrays(SQUARE)
    spoilt = spoil(clean, (1, slice(4, None)), garbage, "query", "key", "value")
    runs = [with_gradients(implementation, x, cotangents(SQUARE), **located) for x in (clean, spoilt)]
    equal(runs[1], runs[0])
    assert all(np.isfinite(gradient).all() for gradient in runs[1][1].values())


def _squared(score, query, key, head, factor):
    """One function for all tests, so that they share a compiled program."""
    return factor[head] * (score * score)


@every_implementation
@pytest.mark.parametrize("garbage", [*GARBAGE.values(), 1e30], ids=[*GARBAGE, "huge"])
def test_a5_what_is_masked_leaves_no_trace_in_a_score_mod(implementation, garbage):
    """In none of its arrays, although the gradient of each is multiplied by a score, a query or a distance."""
    at = Coordinates.from_lengths(jnp.array([7, 4]), 7)
    located = {"mask": Causal() & NotPadding(), "q_at": at, "kv_at": at}
    learned = np.random.default_rng(5).normal(size=(5, 4, 3)).astype(np.float32)
    squared = ScoreFunction(_squared, learned[0, :, 0])
    clean = arrays(SQUARE) | {"score_mod": compose(Alibi(learned[0, :, 1]), squared, RelativePositions(learned))}
    spoilt = spoil(clean, (1, slice(4, None)), garbage, "query", "key", "value")
    runs = [with_gradients(implementation, x, cotangents(SQUARE), **located) for x in (clean, spoilt)]
    equal(runs[1], runs[0])
    leaves = jax.tree.leaves(runs[1][1])
    assert len(leaves) == 6
    assert all(np.isfinite(leaf).all() and leaf.any() for leaf in leaves)


@every_implementation
def test_a9_padding_and_causal_with_dropout(implementation):
    """One-hot values show what was dropped; the oracle with the same weights dropped gives values and gradients."""
    shape = Shape(T=7, S=7, N=4, K=2, H=3, V=7)
    at = Coordinates.from_lengths(jnp.array([7, 3]), 7)
    located = {"mask": Causal() & NotPadding(), "q_at": at, "kv_at": at}
    one_hot = np.broadcast_to(np.eye(7, dtype=np.float32)[:, None], (2, 7, 2, 7))

    def weights(dropout):
        inputs = arrays(shape) | {"value": one_hot}
        (output, _), _ = with_gradients(implementation, inputs, cotangents(shape), dropout=dropout, **located)
        return output.swapaxes(1, 2)

    dropout = Dropout(0.4, jax.random.key(0))
    pairs = oracle.pairs(lambda qp, qs, kp, ks: kp <= qp and qs and ks, at, at)[:, None]
    whole, dropped = oracle.attention(**arrays(shape), visible=pairs).weights, weights(dropout)
    kept = np.divide(dropped, whole, out=np.zeros_like(whole), where=whole != 0)
    np.testing.assert_allclose(kept[kept != 0], 1 / 0.6, rtol=1e-5)
    assert 0.25 < np.mean(kept[whole != 0] == 0) < 0.55
    assert not dropped[whole == 0].any()
    agrees_with_oracle(implementation, shape, pairs=pairs, kept=np.where(kept, 1 / 0.6, 0), dropout=dropout, **located)
    np.testing.assert_array_equal((kept != 0)[whole != 0], (contract.kept(dropout, shape) != 0)[whole != 0])
    np.testing.assert_array_equal(dropped, weights(Dropout(0.4, jax.random.key(0))))
    assert np.any(dropped != weights(Dropout(0.4, jax.random.key(1))))


@every_implementation
def test_a11_more_queries_than_keys_aligned_at_the_end_leave_the_top_rows_empty(implementation):
    shape = Shape(T=11, S=7, N=4, K=2, H=3, V=5)
    located = {"mask": Causal(), "q_at": Coordinates.range(11, start=-4), "kv_at": Coordinates.range(7)}
    (output, lse), _ = with_gradients(implementation, arrays(shape), cotangents(shape), **located)
    assert not output[:, :4].any()
    assert np.all(lse[:, :4] == -np.inf)
    agrees_with_oracle(implementation, shape, pairs=np.tril(np.ones((11, 7), bool), -4), **located)


@every_implementation
@pytest.mark.parametrize("dims", [{"S": 0}, {"T": 0}, {"batch": (0,)}, {"batch": (2, 0)}, {"T": 1, "S": 1}], ids=str)
def test_a15_no_keys_no_queries_no_rows_or_one_token(implementation, dims):
    shape = Shape(**{"T": 5, "S": 7, "N": 4, "K": 2, "H": 3, "V": 5} | dims)
    causal = np.tri(shape.T, shape.S, dtype=bool)
    located = {"q_at": Coordinates.range(shape.T), "kv_at": Coordinates.range(shape.S)}
    agrees_with_oracle(implementation, shape, pairs=causal, mask=causal)
    for options, pairs in (({"mask": Causal()} | located, causal), ({}, True)):
        output, lse = forward(implementation, arrays(shape), **options)
        expected = oracle.attention(**arrays(shape), visible=pairs)
        close(output, expected.output)
        close(lse, expected.lse)


@every_implementation
def test_a16_masked_logits_in_float16_are_no_number_to_add(implementation):
    """-1e9 is -inf in float16, and logits of 60,000 leave no room below them."""
    inputs = {name: x * np.float16(1 if name == "value" else 200) for name, x in arrays(GROUPED, "float16").items()}
    pairs, directions = random_pairs(GROUPED), cotangents(GROUPED, "float16")
    results, gradients = with_gradients(implementation, inputs, directions, mask=pairs)
    assert all(np.isfinite(x).all() for x in (results[0], *gradients.values()))
    expected = oracle.attention(**inputs, visible=pairs)
    assert np.abs(expected.lse[expected.lse > -np.inf]).max() > np.finfo(np.float16).max
    close(results[0], expected.output, "float16")


@every_implementation
def test_a17_masks_that_overlap_do_not_add_up(implementation):
    """Two additive masks of the lowest number would make -inf; and a bias of it beside a mask stays finite."""
    at = Coordinates.from_lengths(jnp.array([7, 2]), 7)
    located = {"mask": Causal() & NotPadding() & SlidingWindow(3) & SameSegment(), "q_at": at, "kv_at": at}
    pairs = oracle.pairs(lambda qp, qs, kp, ks: qs and ks and 0 <= qp - kp < 3, at, at)[:, None]
    lowest = np.where(np.triu(np.ones((7, 7), bool), 1), np.finfo(np.float32).min, np.float32(0))
    agrees_with_oracle(implementation, SQUARE, pairs=pairs, bias=lowest, **located)


@every_implementation
def test_a23_packed_texts_do_not_see_each_other(implementation):
    """Packed is separate, and a change of the first text leaves the second bitwise the same, forward and backward."""
    shape, first = Shape(batch=(1,), T=11, S=11, N=4, K=2, H=3, V=5), 4
    inputs, directions = arrays(shape), cotangents(shape)
    at = Coordinates.from_segments(jnp.array([[1] * first + [2] * first + [0] * 3]))
    located = {"mask": Causal() & SameSegment(), "q_at": at, "kv_at": at}
    results, gradients = with_gradients(implementation, inputs, directions, **located)
    for text in (slice(0, first), slice(first, 2 * first)):
        alone = {name: x[:, text] for name, x in inputs.items()}
        part = tuple(x[:, text] for x in directions)
        separate, separate_gradients = with_gradients(implementation, alone, part, mask=Causal())
        for actual, expected in zip(results, separate, strict=True):
            close(actual[:, text], expected)
        for name in inputs:
            close(gradients[name][:, text], separate_gradients[name], what=name)
    changed = {name: np.concatenate([x[:, :first] + 7, x[:, first:]], axis=1) for name, x in inputs.items()}
    again, again_gradients = with_gradients(implementation, changed, directions, **located)
    assert np.any(again[0][:, :first] != results[0][:, :first])
    for after, before in zip((*again, *again_gradients.values()), (*results, *gradients.values()), strict=True):
        np.testing.assert_array_equal(after[:, first:], before[:, first:])


@every_implementation
def test_a24_padding_on_the_left_on_the_right_and_none_are_the_same(implementation):
    single = arrays(Shape(batch=(1,), T=5, S=5, N=4, K=2, H=3, V=5))
    directions = cotangents(Shape(batch=(1,), T=5, S=5, N=4, K=2, H=3, V=5))
    mask = Causal() & SlidingWindow(3) & SameSegment()
    results, gradients = with_gradients(implementation, single, directions, mask=mask)
    for padding in (((0, 0), (2, 0)), ((0, 0), (0, 2))):
        text = slice(padding[1][0], padding[1][0] + 5)

        def pad(x, padding=padding):
            return np.pad(x, [*padding, *[(0, 0)] * (x.ndim - 2)], constant_values=9)

        at = Coordinates.from_present(jnp.asarray(np.pad(np.ones((1, 5), bool), padding)))
        located = {"mask": mask, "q_at": at, "kv_at": at}
        padded, padded_gradients = with_gradients(
            implementation, {name: pad(x) for name, x in single.items()}, tuple(map(pad, directions)), **located
        )
        for actual, expected in zip(padded, results, strict=True):
            close(actual[:, text], expected)
        for name in single:
            close(padded_gradients[name], np.pad(gradients[name], [*padding, (0, 0), (0, 0)]), what=name)


@every_implementation
@pytest.mark.parametrize("garbage", GARBAGE.values(), ids=GARBAGE)
def test_a_query_that_is_not_finite_sees_nothing_of_what_is_masked(implementation, garbage):
    """With -inf in the place of one feature and keys that are positive there, every score is -inf, hidden or not."""
    clean = arrays(SQUARE)
    clean["key"] = clean["key"].copy()
    clean["key"][..., 0] = np.abs(clean["key"][..., 0]) + 1
    query = clean["query"].copy()
    query[0, 3, 1, 0] = garbage
    at = {"q_at": Coordinates.range(7), "kv_at": Coordinates.range(7)}
    expected, expected_lse = (x.copy() for x in forward(implementation, clean, mask=Causal(), **at))
    output, lse = forward(implementation, clean | {"query": query}, mask=Causal(), **at)
    expected[0, 3, 1], expected_lse[0, 3, 1] = np.nan, np.nan
    close(output, expected)
    close(lse, expected_lse)
