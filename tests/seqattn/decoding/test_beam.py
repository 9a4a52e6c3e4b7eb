"""Beam search against all sequences there are, and against a beam search of lists and sorts."""

import functools
import itertools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.decoding import ForcedPrefix, MinLogProbability, PrefixCost, generate
from seqattn.decoding.beam import Beams, beam_search
from seqattn.decoding.candidates import DiverseGroups
from seqattn.decoding.penalties import GNMT, AverageLength, CoveragePenalty, NoPenalty
from seqattn.decoding.stopping import Stopping
from seqattn.hypotheses import Shared

V, END, PAD, S = 5, 3, 1, 3
FIRST = jnp.array([0, 2, 4])
PENALTIES = [NoPenalty(), AverageLength(1.0), AverageLength(2.0), AverageLength(-1.0), GNMT(0.6)]


def _step(tokens, state):
    """Logits and attention by the last two tokens; a row's tables are shared by its hypotheses."""
    logits, weights = state["tables"].value
    row = jnp.repeat(jnp.arange(len(logits)), len(tokens) // max(len(logits), 1))
    at = (row, state["before"], tokens)
    return logits[at], {"tables": state["tables"], "before": tokens, "weights": (weights[at], jnp.int32(7))}


def _state(logits, weights=None):
    rows = len(logits)
    if weights is None:
        weights = np.ones((*logits.shape[:3], S), np.float32)
    before, last = jnp.zeros(rows, jnp.int32), (jnp.zeros((rows, weights.shape[-1]), jnp.float32), jnp.int32(7))
    return {"tables": Shared((jnp.asarray(logits), jnp.asarray(weights))), "before": before, "weights": last}


def _tables(seed, rows=3, end=0.0, vocab=V):
    draw = np.random.default_rng(seed)
    logits = 2 * draw.normal(size=(rows, vocab, vocab, vocab)).astype(np.float32)
    logits[..., END % vocab] += end
    return logits, draw.uniform(size=(rows, vocab, vocab, S)).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("beam_size", "max_length", "n_best", "stopping", "aligned", "end"))
def _search(state, first, beam_size, max_length, n_best=1, aligned=False, end=END, **options) -> Beams:
    alignment = (lambda state: state["weights"][0]) if aligned else None
    sizes = {"beam_size": beam_size, "max_length": max_length, "n_best": n_best}
    return beam_search(_step, state, first, **sizes, end_token=end, pad_token=PAD, alignment=alignment, **options)


def _penalised(penalty, total, length):
    """In float64, from the formulas."""
    if isinstance(penalty, AverageLength):
        return total / float(length) ** float(penalty.power)
    return total / ((5 + length) / 6) ** float(penalty.alpha) if isinstance(penalty, GNMT) else total


def _covered(beta):
    return CoveragePenalty(beta, present=True)


def _coverage(beta, weights):
    return beta * np.log(np.minimum(np.sum(weights, axis=0), 1)).sum()


class _Model:
    """One row of the tables, in float64."""

    def __init__(self, logits, weights, first):
        logits = np.asarray(logits, np.float64)
        top = logits.max(-1, keepdims=True)
        self.log_probabilities = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
        self.weights, self.first = np.asarray(weights, np.float64), int(first)

    def at(self, tokens):
        before, last = ([0, self.first, *tokens])[-2:]
        return self.log_probabilities[before, last], self.weights[before, last]


def _all_sequences(model, max_length, penalty, beta):
    """(score, tokens) of every sequence that ends, or is cut, best first."""
    found = []

    def go_on(tokens, total, weights):
        gains, attended = model.at(tokens)
        for token, gain in enumerate(gains):
            longer = (*tokens, token), total + gain, [*weights, attended]
            if token == END or len(longer[0]) == max_length:
                score = _penalised(penalty, longer[1], len(longer[0])) + _coverage(beta, longer[2])
                found.append((score, longer[0]))
            else:
                go_on(*longer)

    go_on((), 0.0, [])
    return sorted(found, reverse=True)


def _plain_beam(model, beam_size, max_length, penalty, stopping, beta=0.0):
    """(score, tokens) of what ended, best first, by a list that is sorted in each step."""
    running, ended = [((), 0.0, [])], []
    for length in range(1, max_length + 1):
        longer = []
        for tokens, total, weights in running:
            gains, attended = model.at(tokens)
            longer += [((*tokens, t), total + g, [*weights, attended]) for t, g in enumerate(gains) if g > -np.inf]
        longer = sorted(longer, key=lambda h: -h[1])[: 2 * beam_size]
        is_last = length == max_length
        for tokens, total, weights in longer[:beam_size]:
            if tokens[-1] == END or is_last:
                ended.append((_penalised(penalty, total, length) + _coverage(beta, weights), tokens))
        ended = sorted(ended, key=lambda e: -e[0])[:beam_size]
        running = [h for h in longer if h[0][-1] != END][:beam_size]
        if len(ended) == beam_size and running and not is_last:
            present = max(_penalised(penalty, h[1], length) + _coverage(beta, h[2]) for h in running)
            best = max(_penalised(penalty, running[0][1], n) for n in range(length + 1, max_length + 1))
            bar = {Stopping.FIRST: -np.inf, Stopping.LIKELY: present, Stopping.EXACT: best}[stopping]
            if bar <= ended[-1][0]:
                break
    return ended


def _agree(found: Beams, row, expected, message=""):
    """Every sequence of a row of the result, and nothing behind what there is."""
    for place in range(found.tokens.shape[1]):
        score, tokens = expected[place] if place < len(expected) else (-np.inf, ())
        padded = [*tokens, *[PAD] * (found.tokens.shape[2] - len(tokens))]
        assert found.tokens[row, place].tolist() == padded, f"row {row} place {place} {message}"
        assert found.length[row, place] == len(tokens)
        assert found.ended[row, place] == (END in tokens)
        np.testing.assert_allclose(found.score[row, place], score, rtol=2e-5, atol=1e-5)
    assert found.failed[row] == (not expected)


@hypothesis.settings(max_examples=8)
@hypothesis.given(
    seed=st.integers(0, 2**32 - 1), penalty=st.sampled_from(PENALTIES[1:4]), beta=st.sampled_from([0.0, 0.3])
)
def test_b10_a_wide_beam_is_exhaustive_search(seed, penalty, beta):
    logits, weights = _tables(seed, end=1.0)
    # 4 * 4 hypotheses run into the third step and have 80 continuations.
    found = _search(
        _state(logits, weights), FIRST, 80, 3, 5, aligned=True, length_penalty=penalty, coverage=_covered(beta)
    )
    for row, first in enumerate(FIRST):
        model = _Model(logits[row], weights[row], first)
        _agree(found, row, _all_sequences(model, 3, penalty, beta)[:5], f"{penalty}")


@pytest.mark.parametrize("floor", [-2.0, np.array([-1.0, -6.0, -0.01], np.float32)], ids=str)
def test_hypotheses_below_a_floor_of_log_probability_are_dropped(floor):
    for seed in range(3):
        logits, weights = _tables(seed, end=2.0)
        found = _search(_state(logits, weights), FIRST, 80, 3, 9, length_penalty=NoPenalty(), min_log_probability=floor)
        for row, first in enumerate(FIRST):
            every = _all_sequences(_Model(logits[row], weights[row], first), 3, NoPenalty(), 0.0)
            least = np.broadcast_to(floor, 3)[row]
            _agree(found, row, [each for each in every if each[0] >= least][:9], f"seed {seed}")


def test_improbable_tokens_are_kept_out_of_all_hypotheses():
    logits, weights = _tables(3, end=1.0)
    processors = (MinLogProbability(np.array([-1.5, -0.5, -9.0], np.float32)),)
    found = _search(_state(logits, weights), FIRST, 80, 3, 9, processors=processors)
    for row, first in enumerate(FIRST):
        model = _Model(logits[row], weights[row], first)
        low = model.log_probabilities < processors[0].floor[row]
        model.log_probabilities[
            low & (model.log_probabilities < model.log_probabilities.max(-1, keepdims=True))
        ] = -np.inf
        every = [each for each in _all_sequences(model, 3, AverageLength(1.0), 0.0) if each[0] > -np.inf]
        _agree(found, row, every[:9])


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
def test_b10_only_exact_stopping_finds_the_best_whatever_the_penalty(penalty):
    logits, weights = _tables(3, end=2.0)
    found = _search(_state(logits, weights), FIRST, 80, 3, 5, length_penalty=penalty)
    for row, first in enumerate(FIRST):
        _agree(found, row, _all_sequences(_Model(logits[row], weights[row], first), 3, penalty, 0.0)[:5])


@pytest.mark.parametrize("stopping", Stopping)
@pytest.mark.parametrize("power", [None, 0.0, 0.6, 1.0, 2.0, -0.5])
def test_a_narrow_beam_is_a_loop_over_sorted_lists(stopping, power):
    penalty = GNMT(1.5) if power is None else AverageLength(power)
    for seed in range(4):
        logits, weights = _tables(seed, end=1.5 * (seed % 2))
        found = _search(_state(logits, weights), FIRST, 3, 7, 3, length_penalty=penalty, stopping=stopping)
        for row, first in enumerate(FIRST):
            model = _Model(logits[row], weights[row], first)
            _agree(found, row, _plain_beam(model, 3, 7, penalty, stopping), f"seed {seed}")


def test_the_stoppings_of_this_file_differ():
    found = []
    for stopping in Stopping:
        logits, weights = _tables(1, end=1.5)
        found.append(
            _search(_state(logits, weights), FIRST, 3, 7, 3, length_penalty=AverageLength(2.0), stopping=stopping)
        )
    for one, other in itertools.combinations(found, 2):
        assert not np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("stopping", Stopping)
def test_a_narrow_beam_with_a_coverage_penalty(stopping):
    for seed in range(3):
        logits, weights = _tables(seed, end=1.0)
        options = {"length_penalty": AverageLength(1.0), "stopping": stopping, "coverage": _covered(0.3)}
        found = _search(_state(logits, weights), FIRST, 3, 7, 3, aligned=True, **options)
        for row, first in enumerate(FIRST):
            model = _Model(logits[row], weights[row], first)
            _agree(found, row, _plain_beam(model, 3, 7, AverageLength(1.0), stopping, 0.3), f"seed {seed}")


def test_a_coverage_penalty_does_not_depend_on_how_far_the_batch_is_padded():
    logits, weights = _tables(2, end=1.0)
    lengths, padded = np.array([3, 2, 1]), 5
    present = np.arange(padded) < lengths[:, None]
    # What a model attends to behind the end of a source must not matter, even if that is garbage.
    wide = np.concatenate([weights, np.full((*weights.shape[:-1], padded - S), np.nan, np.float32)], axis=-1)
    wide[:, ..., 1:S] = np.where(present[:, None, None, 1:S], wide[..., 1:S], np.nan)
    options = {"aligned": True, "n_best": 3}
    together = _search(_state(logits, wide), FIRST, 3, 7, coverage=CoveragePenalty(0.3, present), **options)
    for row, length in enumerate(lengths):
        one = slice(row, row + 1)
        alone = _state(logits[one], weights[one, ..., :length])
        found = _search(alone, FIRST[one], 3, 7, coverage=CoveragePenalty(0.3, present[one, :length]), **options)
        np.testing.assert_array_equal(together.tokens[row], found.tokens[0])
        np.testing.assert_allclose(together.score[row], found.score[0], rtol=1e-5)


def test_alignments_are_those_of_the_tokens():
    logits, weights = _tables(5)
    found = _search(_state(logits, weights), FIRST, 3, 7, 3, aligned=True)
    for row, place in itertools.product(range(len(FIRST)), range(3)):
        model = _Model(logits[row], weights[row], FIRST[row])
        tokens = found.tokens[row, place, : found.length[row, place]].tolist()
        expected = np.zeros((7, S))
        for index in range(len(tokens)):
            expected[index] = model.at(tokens[:index])[1]
        np.testing.assert_allclose(found.alignment[row, place], expected, rtol=1e-6)


@pytest.mark.parametrize("stopping", Stopping)
def test_b13_a_beam_of_one_is_greedy(stopping):
    for seed in range(4):
        logits, weights = _tables(seed, end=1.0)
        state = _state(logits, weights)
        found = _search(state, FIRST, 1, 7, stopping=stopping)
        greedy = generate(_step, state, FIRST, max_length=7, end_token=END, pad_token=PAD)
        np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
        np.testing.assert_array_equal(found.length[:, 0], greedy.length)
        np.testing.assert_array_equal(found.ended[:, 0], greedy.ended)
        np.testing.assert_allclose(found.log_probability[:, 0], greedy.log_probability, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vocab", [1, 2])
def test_b13_a_beam_wider_than_the_vocabulary(vocab):
    logits, weights = _tables(2, vocab=2)
    logits, weights = logits[:, :vocab, :vocab, :vocab], weights[:, :vocab, :vocab]
    found = _search(_state(logits, weights), FIRST * 0, 11, 3, 11, end=0)
    # Where all that is not the end is one token there is one sequence of each length, and the one that is cut.
    count = 4 if vocab == 2 else 1
    np.testing.assert_array_equal((found.length > 0).sum(axis=1), count)
    assert np.all(np.isfinite(found.score[:, :count]))
    assert np.all(found.score[:, count:] == -np.inf)
    np.testing.assert_array_equal(found.tokens[:, count:], PAD)


def test_b11_the_length_counts_the_end_token():
    logits = np.full((1, V, V, V), -20.0, np.float32)
    logits[0, :, 0, 2] = logits[0, :, 2, END] = 0  # 2, end
    found = _search(_state(logits), FIRST[:1], 3, 7, length_penalty=AverageLength(1.0))
    assert (found.length[0, 0], found.tokens[0, 0, :3].tolist()) == (2, [2, END, PAD])
    np.testing.assert_allclose(found.score[0, 0], found.log_probability[0, 0] / 2)


def test_b12_nothing_but_padding_follows_the_one_end_token():
    found = _search(_state(*_tables(1, end=1.5)), FIRST, 3, 7, 3)
    for tokens, length, ended in zip(
        *(np.asarray(x).reshape(9, -1) for x in (found.tokens, found.length, found.ended)), strict=True
    ):
        assert np.all(tokens[length[0] :] == PAD)
        assert (tokens[: length[0]] == END).sum() == ended
        assert not ended or tokens[length[0] - 1] == END
    assert np.all(np.diff(found.score) <= 0)


@pytest.mark.parametrize("spoilt", [[0, np.nan], [1, np.inf], [-np.nan, -np.inf], [-np.inf] * V], ids=str)
def test_b14_a_hypothesis_whose_logits_say_nothing_dies(spoilt):
    logits, weights = _tables(4)
    logits[0, 0, 0, : len(spoilt)] = spoilt  # the first row at its first step: nothing is left
    logits[1, 2, 4, : len(spoilt)] = spoilt  # the second after token 4, which is the best
    logits[1, 0, 2] = [0, 0, 0, -9, 5]
    found = _search(_state(logits, weights), FIRST, 3, 7, 3)
    np.testing.assert_array_equal(found.failed, [True, False, False])
    _agree(found, 0, [])
    logits[1, 2, 4] = -np.inf
    with np.errstate(invalid="ignore"):
        model = _Model(logits[1], weights[1], FIRST[1])
    model.log_probabilities[2, 4] = -np.inf
    _agree(found, 1, _plain_beam(model, 3, 7, AverageLength(1.0), Stopping.EXACT))


def test_b14_what_had_ended_before_all_others_died_is_found():
    logits = np.full((1, V, V, V), np.nan, np.float32)
    logits[0, 0, 0] = [-np.inf, 0, 0, 0, 0]  # all but the end lead to NaN
    found = _search(_state(logits), FIRST[:1], 5, 7, 5)
    _agree(found, 0, [(np.log(1 / 4), (END,))])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_b15_of_equal_scores_the_first_hypothesis_and_the_lowest_token_come_first(dtype):
    logits = np.zeros((1, V, V, V), dtype)
    logits[..., END] = -100
    found = _search(_state(logits), FIRST[:1], 3, 2, 3, length_penalty=NoPenalty())
    np.testing.assert_array_equal(found.tokens[0], [[0, 0], [0, 1], [0, 2]])
    assert found.score.dtype == jnp.float32


def test_b9_end_and_padding_must_differ():
    with pytest.raises(ValueError, match="end_token and pad_token must differ, both are 3"):
        beam_search(_step, (), FIRST, beam_size=2, max_length=2, end_token=3, pad_token=3)


def test_forced_prefixes_of_any_length_cost_what_the_model_says():
    logits, weights = _tables(6)
    tokens, length = jnp.array([[4, 2, 0], [0, 0, 0], [2, END, 4]]), jnp.array([3, 0, 2])
    found = _search(_state(logits, weights), FIRST, 3, 7, 3, processors=(ForcedPrefix(tokens, length),))
    free = _search(_state(logits, weights), FIRST, 3, 7, 3)
    np.testing.assert_array_equal(found.tokens[0, :, :3], [[4, 2, 0]] * 3)
    np.testing.assert_array_equal(found.tokens[1], free.tokens[1])
    # A prefix that ends the sequence leaves this one alone.
    model = _Model(logits[2], weights[2], FIRST[2])
    total = model.at([])[0][2] + model.at([2])[0][END]
    _agree(found, 2, [(total / 2, (2, END))])
    for place in range(3):
        said = found.tokens[0, place, : found.length[0, place]].tolist()
        model = _Model(logits[0], weights[0], FIRST[0])
        total = sum(model.at(said[:index])[0][token] for index, token in enumerate(said))
        np.testing.assert_allclose(found.log_probability[0, place], total, rtol=1e-5)


def test_what_the_limit_cut_competes_with_what_ended_by_its_score_alone():
    """t5x would return the sequence that ended, although another scores more."""
    logits = np.log(np.array([0.5, 0.05, 0.03, 0.4, 0.02], np.float32))
    found = _search(_state(np.broadcast_to(logits, (1, V, V, V))), FIRST[:1], 3, 2, 3, length_penalty=NoPenalty())
    # The end at once with 0.4; 0 and 0 with 0.25, cut; and 0 and the end with 0.2.
    np.testing.assert_array_equal(found.tokens[0], [[END, PAD], [0, 0], [0, END]])
    np.testing.assert_array_equal(found.ended[0], [True, False, True])
    np.testing.assert_allclose(np.exp(found.score[0]), [0.4, 0.25, 0.2], rtol=1e-5)


@pytest.mark.parametrize("cost", PrefixCost)
def test_forced_prefixes_cost_what_the_model_says_or_nothing(cost):
    logits, weights = _tables(6)
    tokens, length = np.array([[4, 2, 0], [0, 0, 0], [2, END, 4]]), np.array([3, 0, 2])
    found = _search(_state(logits, weights), FIRST, 3, 7, 3, processors=(ForcedPrefix(tokens, length, cost),))
    for row, place in itertools.product(range(3), range(3)):
        said = found.tokens[row, place, : found.length[row, place]].tolist()
        assert said[: length[row]] == tokens[row, : length[row]].tolist() or not said
        model = _Model(logits[row], weights[row], FIRST[row])
        free = length[row] if cost is PrefixCost.NOTHING else 0
        total = sum(model.at(said[:index])[0][token] for index, token in enumerate(said) if index >= free)
        if said:
            np.testing.assert_allclose(found.log_probability[row, place], total, rtol=1e-5)
            # The tokens of a prefix count in the length, whatever they cost.
            np.testing.assert_allclose(found.score[row, place], total / len(said), rtol=1e-5)
    greedy = generate(
        *(_step, _state(logits, weights), FIRST),
        **{"max_length": 7, "end_token": END, "pad_token": PAD, "processors": (ForcedPrefix(tokens, length, cost),)},
    )
    found = _search(_state(logits, weights), FIRST, 1, 7, processors=(ForcedPrefix(tokens, length, cost),))
    np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(found.log_probability[:, 0], greedy.log_probability, rtol=1e-5, atol=1e-6)


def test_a_free_prefix_that_the_model_holds_for_impossible_fails_its_row():
    logits, weights = _tables(6)
    logits[0, 0, 0, 4], logits[1, 0, 2, 4] = -np.inf, np.nan
    forced = ForcedPrefix(np.full((3, 1), 4), np.ones(3, np.int32), PrefixCost.NOTHING)
    found = _search(_state(logits, weights), FIRST, 3, 7, 3, processors=(forced,))
    np.testing.assert_array_equal(found.failed, [True, True, False])


def test_a_limit_of_one_token_gives_the_best_tokens():
    logits, weights = _tables(7)
    found = _search(_state(logits, weights), FIRST, 3, 1, 3)
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
    found = _search(_state(_two_lengths(0.8, 0.2)), FIRST[:1], 2, 4, 2, length_penalty=AverageLength(power))
    assert found.length[0, 0] == length


def test_a_chain_with_two_best_paths_finds_both():
    """t5x's case: two paths through A and B that are equally good, found by two beams."""
    prefer = np.array([[1, -1, -9], [-1, 1, -9]], np.float32)
    logits = np.full((4, V, V, V), -1e9, np.float32)
    logits[:, 0, 0, [2, 4]] = 0
    for index, (before, last) in enumerate(itertools.product([0, 2, 4], [2, 4])):
        logits[:, before, last, [2, 4]] = prefer[index % 2][:2]
        logits[:, before, last, END] = -1
    found = _search(_state(logits[:1]), FIRST[:1], 2, 3, 2, length_penalty=NoPenalty())
    assert sorted(found.tokens[0].tolist()) == [[2, 2, 2], [4, 4, 4]]
    np.testing.assert_allclose(found.score[0, 0], found.score[0, 1], rtol=1e-6)


def test_rows_do_not_depend_on_their_neighbours():
    logits, weights = _tables(1, end=2.0)
    options = {"length_penalty": AverageLength(2.0), "stopping": Stopping.LIKELY}
    together = _search(_state(logits, weights), FIRST, 3, 7, 3, **options)
    for row in range(len(FIRST)):
        alone = _search(_state(logits[row : row + 1], weights[row : row + 1]), FIRST[row : row + 1], 3, 7, 3, **options)
        for ours, theirs in zip(jax.tree.leaves(together), jax.tree.leaves(alone), strict=True):
            np.testing.assert_allclose(ours[row], theirs[0], rtol=1e-6)


def test_groups_without_strength_are_searches_of_their_own():
    logits, weights = _tables(8)
    groups = _search(_state(logits, weights), FIRST, 6, 7, 6, groups=DiverseGroups(2, 0.0))
    alone = _search(_state(logits, weights), FIRST, 3, 7, 3)
    for group in range(2):
        np.testing.assert_array_equal(groups.tokens[:, group::2], alone.tokens)
        np.testing.assert_allclose(groups.score[:, group::2], alone.score, rtol=1e-6)


def test_a_strong_group_avoids_what_an_earlier_one_said():
    logits, weights = _tables(9)
    logits[..., END] = -100
    found = _search(_state(logits, weights), FIRST, 3, 4, 3, groups=DiverseGroups(3, 1e4))
    for row in range(len(FIRST)):
        model = _Model(logits[row], weights[row], FIRST[row])
        taken = [set() for _ in range(4)]
        expected = []
        for _ in range(3):
            said: list[int] = []
            for index in range(4):
                gains = model.at(said)[0]
                said.append(max((t for t in range(V) if t not in taken[index]), key=lambda t, g=gains: g[t]))
            for index, token in enumerate(said):
                taken[index].add(token)
            total = sum(model.at(said[:index])[0][token] for index, token in enumerate(said))
            expected.append((total / 4, tuple(said)))
        # The last step is a cut: its tokens went on nowhere, so it is not avoided; compare what comes before.
        expected = sorted(tokens[:3] for _, tokens in expected)
        assert sorted(tuple(t) for t in found.tokens[row, :, :3].tolist()) == expected


def test_many_batches_are_one_program_and_vmap_works():
    states = [_state(*_tables(seed)) for seed in range(3)]
    before = _search._cache_size()
    found = [_search(state, FIRST, 2, 6, 2, length_penalty=AverageLength(0.5 + i)) for i, state in enumerate(states)]
    assert _search._cache_size() == before + 1
    together = jax.vmap(lambda state, power: _search(state, FIRST, 2, 6, 2, length_penalty=AverageLength(power)))(
        jax.tree.map(lambda *leaves: jnp.stack(leaves), *states), jnp.array([0.5, 1.5, 2.5])
    )
    for index, one in enumerate(found):
        np.testing.assert_array_equal(together.tokens[index], one.tokens)
        np.testing.assert_allclose(together.score[index], one.score, rtol=1e-5)


def test_a_batch_of_nothing():
    found = _search(_state(*_tables(0, rows=0)), FIRST[:0], 2, 6, 2)
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
    state = options.pop("state", _state(*_tables(0)))
    with pytest.raises(ValueError, match=message):
        beam_search(
            _step, state, FIRST, **{"beam_size": 2, "max_length": 2, "end_token": END, "pad_token": PAD} | options
        )


def test_a_group_that_is_done_steers_no_other():
    """What a model says after padding must not count: nobody else ever says or hears the padding token."""
    size, end, pad = 7, 3, 1

    @jax.jit
    def search(table):
        sizes = {"beam_size": 2, "n_best": 2, "max_length": 6, "end_token": end, "pad_token": pad}
        first = jnp.array([0, 2, 4, 5, 6, 0])

        def step(tokens, state):
            return table[state, tokens], state

        return beam_search(step, jnp.arange(6), first, groups=DiverseGroups(2, 2.0), **sizes)

    table = np.random.default_rng(5).normal(size=(6, size, size)).astype(np.float32)
    table[..., pad] = -99
    first = search(table)
    table[:, pad] = 5 * np.random.default_rng(7).normal(size=(6, size))
    for one, other in zip(jax.tree.leaves(first), jax.tree.leaves(search(table)), strict=True):
        np.testing.assert_array_equal(one, other)
