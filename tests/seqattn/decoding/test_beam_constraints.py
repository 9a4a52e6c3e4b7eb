"""Beam search with floors of log probability, forced prefixes and groups that avoid each other."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.decoding import ForcedPrefix, MinLogProbability, PrefixCost, generate
from seqattn.decoding.beam import beam_search
from seqattn.decoding.candidates import DiverseGroups
from seqattn.decoding.penalties import AverageLength, NoPenalty
from tests.beam_oracle import (
    END,
    FIRST,
    PAD,
    TableModel,
    V,
    agree,
    all_sequences,
    random_tables,
    search,
    table_state,
    table_step,
)


@pytest.mark.parametrize("floor", [-2.0, np.array([-1.0, -6.0, -0.01], np.float32)], ids=str)
def test_hypotheses_below_a_floor_of_log_probability_are_dropped(floor):
    for seed in range(3):
        logits, weights = random_tables(seed, end=2.0)
        found = search(
            table_state(logits, weights), FIRST, 80, 3, 9, length_penalty=NoPenalty(), min_log_probability=floor
        )
        for row, first in enumerate(FIRST):
            every = all_sequences(TableModel(logits[row], weights[row], first), 3, NoPenalty(), 0.0)
            least = np.broadcast_to(floor, 3)[row]
            agree(found, row, [each for each in every if each[0] >= least][:9], f"seed {seed}")


def test_improbable_tokens_are_kept_out_of_all_hypotheses():
    logits, weights = random_tables(3, end=1.0)
    processors = (MinLogProbability(np.array([-1.5, -0.5, -9.0], np.float32)),)
    found = search(table_state(logits, weights), FIRST, 80, 3, 9, processors=processors)
    for row, first in enumerate(FIRST):
        model = TableModel(logits[row], weights[row], first)
        low = model.log_probabilities < processors[0].floor[row]
        model.log_probabilities[
            low & (model.log_probabilities < model.log_probabilities.max(-1, keepdims=True))
        ] = -np.inf
        every = [each for each in all_sequences(model, 3, AverageLength(1.0), 0.0) if each[0] > -np.inf]
        agree(found, row, every[:9])


def test_forced_prefixes_of_any_length_cost_what_the_model_says():
    logits, weights = random_tables(6)
    tokens, length = jnp.array([[4, 2, 0], [0, 0, 0], [2, END, 4]]), jnp.array([3, 0, 2])
    found = search(table_state(logits, weights), FIRST, 3, 7, 3, processors=(ForcedPrefix(tokens, length),))
    free = search(table_state(logits, weights), FIRST, 3, 7, 3)
    np.testing.assert_array_equal(found.tokens[0, :, :3], [[4, 2, 0]] * 3)
    np.testing.assert_array_equal(found.tokens[1], free.tokens[1])
    # A prefix that ends the sequence leaves this one alone.
    model = TableModel(logits[2], weights[2], FIRST[2])
    total = model.at([])[0][2] + model.at([2])[0][END]
    agree(found, 2, [(total / 2, (2, END))])
    for place in range(3):
        said = found.tokens[0, place, : found.length[0, place]].tolist()
        model = TableModel(logits[0], weights[0], FIRST[0])
        total = sum(model.at(said[:index])[0][token] for index, token in enumerate(said))
        np.testing.assert_allclose(found.log_probability[0, place], total, rtol=1e-5)


@pytest.mark.parametrize("cost", PrefixCost)
def test_forced_prefixes_cost_what_the_model_says_or_nothing(cost):
    logits, weights = random_tables(6)
    tokens, length = np.array([[4, 2, 0], [0, 0, 0], [2, END, 4]]), np.array([3, 0, 2])
    found = search(table_state(logits, weights), FIRST, 3, 7, 3, processors=(ForcedPrefix(tokens, length, cost),))
    for row, place in itertools.product(range(3), range(3)):
        said = found.tokens[row, place, : found.length[row, place]].tolist()
        assert said[: length[row]] == tokens[row, : length[row]].tolist() or not said
        model = TableModel(logits[row], weights[row], FIRST[row])
        free = length[row] if cost is PrefixCost.NOTHING else 0
        total = sum(model.at(said[:index])[0][token] for index, token in enumerate(said) if index >= free)
        if said:
            np.testing.assert_allclose(found.log_probability[row, place], total, rtol=1e-5)
            # The tokens of a prefix count in the length, whatever they cost.
            np.testing.assert_allclose(found.score[row, place], total / len(said), rtol=1e-5)
    greedy = generate(
        *(table_step, table_state(logits, weights), FIRST),
        **{"max_length": 7, "end_token": END, "pad_token": PAD, "processors": (ForcedPrefix(tokens, length, cost),)},
    )
    found = search(table_state(logits, weights), FIRST, 1, 7, processors=(ForcedPrefix(tokens, length, cost),))
    np.testing.assert_array_equal(found.tokens[:, 0], greedy.tokens)
    np.testing.assert_allclose(found.log_probability[:, 0], greedy.log_probability, rtol=1e-5, atol=1e-6)


def test_a_free_prefix_that_the_model_holds_for_impossible_fails_its_row():
    logits, weights = random_tables(6)
    logits[0, 0, 0, 4], logits[1, 0, 2, 4] = -np.inf, np.nan
    forced = ForcedPrefix(np.full((3, 1), 4), np.ones(3, np.int32), PrefixCost.NOTHING)
    found = search(table_state(logits, weights), FIRST, 3, 7, 3, processors=(forced,))
    np.testing.assert_array_equal(found.failed, [True, True, False])


def test_groups_without_strength_are_searches_of_their_own():
    logits, weights = random_tables(8)
    groups = search(table_state(logits, weights), FIRST, 6, 7, 6, groups=DiverseGroups(2, 0.0))
    alone = search(table_state(logits, weights), FIRST, 3, 7, 3)
    for group in range(2):
        np.testing.assert_array_equal(groups.tokens[:, group::2], alone.tokens)
        np.testing.assert_allclose(groups.score[:, group::2], alone.score, rtol=1e-6)


def test_a_strong_group_avoids_what_an_earlier_one_said():
    logits, weights = random_tables(9)
    logits[..., END] = -100
    found = search(table_state(logits, weights), FIRST, 3, 4, 3, groups=DiverseGroups(3, 1e4))
    for row in range(len(FIRST)):
        model = TableModel(logits[row], weights[row], FIRST[row])
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
