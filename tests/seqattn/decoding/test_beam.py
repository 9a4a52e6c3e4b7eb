"""Beam search against all sequences there are, and against a beam search of lists and sorts."""

import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.decoding import generate
from seqattn.decoding.beam import beam_search
from seqattn.decoding.candidates import DiverseGroups
from seqattn.decoding.penalties import GNMT, AverageLength, CoveragePenalty, NoPenalty
from seqattn.decoding.stopping import Stopping
from tests.beam_oracle import (
    END,
    FIRST,
    PAD,
    S,
    TableModel,
    V,
    agree,
    all_sequences,
    covered,
    plain_beam,
    random_tables,
    search,
    table_state,
    table_step,
)

PENALTIES = [NoPenalty(), AverageLength(1.0), AverageLength(2.0), AverageLength(-1.0), GNMT(0.6)]


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), penalty=st.sampled_from(PENALTIES[1:4]), beta=st.sampled_from([0.0, 0.3])
)
def test_b10_a_wide_beam_is_exhaustive_search(seed, penalty, beta):
    logits, weights = random_tables(seed, end=1.0)
    # 4 * 4 hypotheses run into the third step and have 80 continuations.
    found = search(
        table_state(logits, weights), FIRST, 80, 3, 5, aligned=True, length_penalty=penalty, coverage=covered(beta)
    )
    for row, first in enumerate(FIRST):
        model = TableModel(logits[row], weights[row], first)
        agree(found, row, all_sequences(model, 3, penalty, beta)[:5], f"{penalty}")


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_b10_only_exact_stopping_finds_the_best_whatever_the_penalty(penalty):
    logits, weights = random_tables(3, end=2.0)
    found = search(table_state(logits, weights), FIRST, 80, 3, 5, length_penalty=penalty)
    for row, first in enumerate(FIRST):
        agree(found, row, all_sequences(TableModel(logits[row], weights[row], first), 3, penalty, 0.0)[:5])


@pytest.mark.parametrize("stopping", Stopping)
@pytest.mark.parametrize("power", [None, 0.0, 0.6, 1.0, 2.0, -0.5])
def test_a_narrow_beam_is_a_loop_over_sorted_lists(stopping, power):
    penalty = GNMT(1.5) if power is None else AverageLength(power)
    for seed in range(4):
        logits, weights = random_tables(seed, end=1.5 * (seed % 2))
        found = search(table_state(logits, weights), FIRST, 3, 7, 3, length_penalty=penalty, stopping=stopping)
        for row, first in enumerate(FIRST):
            model = TableModel(logits[row], weights[row], first)
            agree(found, row, plain_beam(model, 3, 7, penalty, stopping), f"seed {seed}")


def test_the_stoppings_of_this_file_differ():
    found = []
    for stopping in Stopping:
        logits, weights = random_tables(1, end=1.5)
        found.append(
            search(table_state(logits, weights), FIRST, 3, 7, 3, length_penalty=AverageLength(2.0), stopping=stopping)
        )
    for one, other in itertools.combinations(found, 2):
        assert not np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("stopping", Stopping)
def test_a_narrow_beam_with_a_coverage_penalty(stopping):
    for seed in range(3):
        logits, weights = random_tables(seed, end=1.0)
        options = {"length_penalty": AverageLength(1.0), "stopping": stopping, "coverage": covered(0.3)}
        found = search(table_state(logits, weights), FIRST, 3, 7, 3, aligned=True, **options)
        for row, first in enumerate(FIRST):
            model = TableModel(logits[row], weights[row], first)
            agree(found, row, plain_beam(model, 3, 7, AverageLength(1.0), stopping, 0.3), f"seed {seed}")


def test_a_coverage_penalty_does_not_depend_on_how_far_the_batch_is_padded():
    logits, weights = random_tables(2, end=1.0)
    lengths, padded = np.array([3, 2, 1]), 5
    present = np.arange(padded) < lengths[:, None]
    # What a model attends to behind the end of a source must not matter, even if that is garbage.
    wide = np.concatenate([weights, np.full((*weights.shape[:-1], padded - S), np.nan, np.float32)], axis=-1)
    wide[:, ..., 1:S] = np.where(present[:, None, None, 1:S], wide[..., 1:S], np.nan)
    options = {"aligned": True, "n_best": 3}
    together = search(table_state(logits, wide), FIRST, 3, 7, coverage=CoveragePenalty(0.3, present), **options)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = table_state(logits[one], weights[one, ..., :length])
        found = search(alone, FIRST[one], 3, 7, coverage=CoveragePenalty(0.3, present[one, :length]), **options)
        np.testing.assert_array_equal(together.tokens[row], found.tokens[0])
        np.testing.assert_allclose(together.score[row], found.score[0], rtol=1e-5)


def test_alignments_are_those_of_the_tokens():
    logits, weights = random_tables(5)
    found = search(table_state(logits, weights), FIRST, 3, 7, 3, aligned=True)
    for row, place in itertools.product(range(len(FIRST)), range(3)):
        model = TableModel(logits[row], weights[row], FIRST[row])
        tokens = found.tokens[row, place, : found.length[row, place]].tolist()
        expected = np.zeros((7, S))
        for index in range(len(tokens)):
            expected[index] = model.at(tokens[:index])[1]
        np.testing.assert_allclose(found.alignment[row, place], expected, rtol=1e-6)


@pytest.mark.parametrize("stopping", Stopping)
def test_b13_a_beam_of_one_is_greedy(stopping):
    for seed in range(4):
        logits, weights = random_tables(seed, end=1.0)
        state = table_state(logits, weights)
        found = search(state, FIRST, 1, 7, stopping=stopping)
        greedy = generate(table_step, state, FIRST, max_length=7, end_token=END, pad_token=PAD)
        np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
        np.testing.assert_array_equal(found.length[:, 0], greedy.length)
        np.testing.assert_array_equal(found.ended[:, 0], greedy.ended)
        np.testing.assert_allclose(found.log_probability[:, 0], greedy.log_probability, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 2])
def test_b13_a_beam_wider_than_the_vocabulary(vocab):
    logits, weights = random_tables(2, vocab=2)
    logits, weights = logits[:, :vocab, :vocab, :vocab], weights[:, :vocab, :vocab]
    found = search(table_state(logits, weights), FIRST * 0, 11, 3, 11, end=0)
    # Where all that is not the end is one token there is one sequence of each length, and the one that is cut.
    count = 4 if vocab == 2 else 1
    np.testing.assert_array_equal((found.length > 0).sum(axis=1), count)
    assert np.all(np.isfinite(found.score[:, :count]))
    assert np.all(found.score[:, count:] == -np.inf)
    np.testing.assert_array_equal(found.tokens[:, count:], PAD)


def test_b11_the_length_counts_the_end_token():
    logits = np.full((1, V, V, V), -20.0, np.float32)
    logits[0, :, 0, 2] = logits[0, :, 2, END] = 0  # 2, end
    found = search(table_state(logits), FIRST[:1], 3, 7, length_penalty=AverageLength(1.0))
    assert (found.length[0, 0], found.tokens[0, 0, :3].tolist()) == (2, [2, END, PAD])
    np.testing.assert_allclose(found.score[0, 0], found.log_probability[0, 0] / 2)


def test_b12_nothing_but_padding_follows_the_one_end_token():
    found = search(table_state(*random_tables(1, end=1.5)), FIRST, 3, 7, 3)
    for tokens, length, ended in zip(
        *(np.asarray(x).reshape(9, -1) for x in (found.tokens, found.length, found.ended)), strict=True
    ):
        assert np.all(tokens[length[0] :] == PAD)
        assert (tokens[: length[0]] == END).sum() == ended
        assert not ended or tokens[length[0] - 1] == END
    assert np.all(np.diff(found.score) <= 0)


@pytest.mark.parametrize("spoilt", [[0, np.nan], [1, np.inf], [-np.nan, -np.inf], [-np.inf] * V], ids=str)
def test_b14_a_hypothesis_whose_logits_say_nothing_dies(spoilt):
    logits, weights = random_tables(4)
    logits[0, 0, 0, : len(spoilt)] = spoilt  # the first row at its first step: nothing is left
    logits[1, 2, 4, : len(spoilt)] = spoilt  # the second after token 4, which is the best
    logits[1, 0, 2] = [0, 0, 0, -9, 5]
    found = search(table_state(logits, weights), FIRST, 3, 7, 3)
    np.testing.assert_array_equal(found.failed, [True, False, False])
    agree(found, 0, [])
    logits[1, 2, 4] = -np.inf
    with np.errstate(invalid="ignore"):
        model = TableModel(logits[1], weights[1], FIRST[1])
    model.log_probabilities[2, 4] = -np.inf
    agree(found, 1, plain_beam(model, 3, 7, AverageLength(1.0), Stopping.EXACT))


def test_b14_what_had_ended_before_all_others_died_is_found():
    logits = np.full((1, V, V, V), np.nan, np.float32)
    logits[0, 0, 0] = [-np.inf, 0, 0, 0, 0]  # all but the end lead to NaN
    found = search(table_state(logits), FIRST[:1], 5, 7, 5)
    agree(found, 0, [(np.log(1 / 4), (END,))])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_b15_of_equal_scores_the_first_hypothesis_and_the_lowest_token_come_first(dtype):
    logits = np.zeros((1, V, V, V), dtype)
    logits[..., END] = -100
    found = search(table_state(logits), FIRST[:1], 3, 2, 3, length_penalty=NoPenalty())
    np.testing.assert_array_equal(found.tokens[0], [[0, 0], [0, 1], [0, 2]])
    assert found.score.dtype == jnp.float32


def test_b9_end_and_padding_must_differ():
    with pytest.raises(ValueError, match="end_token and pad_token must differ, both are 3"):
        beam_search(table_step, (), FIRST, beam_size=2, max_length=2, end_token=3, pad_token=3)


def test_what_the_limit_cut_competes_with_what_ended_by_its_score_alone():
    """t5x would return the sequence that ended, although another scores more."""
    logits = np.log(np.array([0.5, 0.05, 0.03, 0.4, 0.02], np.float32))
    found = search(table_state(np.broadcast_to(logits, (1, V, V, V))), FIRST[:1], 3, 2, 3, length_penalty=NoPenalty())
    # The end at once with 0.4; 0 and 0 with 0.25, cut; and 0 and the end with 0.2.
    np.testing.assert_array_equal(found.tokens[0], [[END, PAD], [0, 0], [0, END]])
    np.testing.assert_array_equal(found.ended[0], [True, False, True])
    np.testing.assert_allclose(np.exp(found.score[0]), [0.4, 0.25, 0.2], rtol=1e-5)


def test_a_limit_of_one_token_gives_the_best_tokens():
    logits, weights = random_tables(7)
    found = search(table_state(logits, weights), FIRST, 3, 1, 3)
    for row, first in enumerate(FIRST):
        best = np.argsort(-logits[row, 0, first])[:3]
        np.testing.assert_array_equal(found.tokens[row, :, 0], best)
        np.testing.assert_array_equal(found.ended[row], best == END)


def _two_lengths(short, long):
    """After 0: 2 and then the end, with probability `short`; or 4 0 4 and the end, with `long`; the rest is spread."""
    probabilities = np.full((1, V, V, V), 1e-4)
    probabilities[0, 0, 0, [2, 4]] = short, long
    probabilities[0, 0, 2, END] = probabilities[0, 0, 4, 0] = 1
    probabilities[0, 4, 0, 4] = probabilities[0, 0, 4, END] = 1
    probabilities[0, 0, 4, 0] = 0.5
    probabilities[0, 0, 4, END] = 0.5
    return np.log(probabilities).astype(np.float32)


@pytest.mark.parametrize(("power", "length"), [(-1.0, 2), (0.0, 2), (0.3, 2), (5.0, 4)])
def test_a_penalty_chooses_between_short_and_long(power, length):
    """As in the cases of fairseq: an exponent of 5 turns the order over, one of 0.6 or less does not."""
    found = search(table_state(_two_lengths(0.8, 0.2)), FIRST[:1], 2, 4, 2, length_penalty=AverageLength(power))
    assert found.length[0, 0] == length


def test_a_chain_with_two_best_paths_finds_both():
    """t5x's case: two paths through A and B that are equally good, found by two beams."""
    prefer = np.array([[1, -1, -9], [-1, 1, -9]], np.float32)
    logits = np.full((4, V, V, V), -1e9, np.float32)
    logits[:, 0, 0, [2, 4]] = 0
    for index, (before, last) in enumerate(itertools.product([0, 2, 4], [2, 4])):
        logits[:, before, last, [2, 4]] = prefer[index % 2][:2]
        logits[:, before, last, END] = -1
    found = search(table_state(logits[:1]), FIRST[:1], 2, 3, 2, length_penalty=NoPenalty())
    assert sorted(found.tokens[0].tolist()) == [[2, 2, 2], [4, 4, 4]]
    np.testing.assert_allclose(found.score[0, 0], found.score[0, 1], rtol=1e-6)


def test_rows_do_not_depend_on_their_neighbours():
    logits, weights = random_tables(1, end=2.0)
    options = {"length_penalty": AverageLength(2.0), "stopping": Stopping.LIKELY}
    together = search(table_state(logits, weights), FIRST, 3, 7, 3, **options)
    for row in range(len(FIRST)):
        alone = search(
            table_state(logits[row : row + 1], weights[row : row + 1]), FIRST[row : row + 1], 3, 7, 3, **options
        )
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-6)


def test_many_batches_are_one_program_and_vmap_works():
    states = [table_state(*random_tables(seed)) for seed in range(3)]
    before = search._cache_size()
    found = [search(state, FIRST, 2, 6, 2, length_penalty=AverageLength(0.5 + i)) for i, state in enumerate(states)]
    assert search._cache_size() == before + 1
    together = jax.vmap(lambda state, power: search(state, FIRST, 2, 6, 2, length_penalty=AverageLength(power)))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jnp.array([0.5, 1.5, 2.5])
    )
    for index, one in enumerate(found):
        np.testing.assert_array_equal(together.tokens[index], one.tokens)
        np.testing.assert_allclose(together.score[index], one.score, rtol=1e-5)


def test_a_batch_of_nothing():
    found = search(table_state(*random_tables(0, rows=0)), FIRST[:0], 2, 6, 2)
    assert (found.tokens.shape, found.failed.shape) == ((0, 2, 6), (0,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beam_size": 0}, r"beam_size \(0\) must be an integer of at least 1"),
        ({"max_length": 0}, r"max_length \(0\) must be an integer of at least 1"),
        ({"min_log_probability": -np.inf}, r"min_log_probability \(-inf\) must be finite"),
        (
            {"min_log_probability": np.zeros(2)},
            r"min_log_probability must be one number or \[B\] for 3 rows, got \(2,\)",
        ),
        ({"n_best": 3}, r"n_best \(3\) must be an integer from 1 to beam_size \(2\)"),
        ({"groups": DiverseGroups(3)}, r"beam_size \(2\) must be a multiple of the count of groups \(3\)"),
        ({"coverage": CoveragePenalty()}, "needs alignment"),
        ({"end_token": V}, rf"end_token \({V}\) must be below the size of the vocabulary \({V}\)"),
        ({"state": {"x": jnp.zeros((2, 3))}}, r"the shape \(2, 3\): its first axis must be 3 rows"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_cannot_be_searched_is_refused(options, message):
    state = options.pop("state", table_state(*random_tables(0)))
    with pytest.raises(ValueError, match=message):
        beam_search(
            table_step, state, FIRST, **{"beam_size": 2, "max_length": 2, "end_token": END, "pad_token": PAD} | options
        )
