"""What a search refuses before anything is compiled."""

import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.decoding import (
    AverageLength,
    Banned,
    CoveragePenalty,
    DiverseGroups,
    MinLength,
    Temperature,
    beam_search,
    generate,
)

pytestmark = pytest.mark.usefixtures("as_users_call_it")

FIRST = jnp.array([3, 4])
GIVEN = {"max_length": 3, "end_token": 1}


def _step(tokens, state):
    return jnp.zeros((len(tokens), 5)), state


def _beam(step, state, first, **given):
    return beam_search(step, state, first, beam_size=2, **given)


@pytest.mark.parametrize("search", [generate, _beam])
@pytest.mark.parametrize(
    ("given", "error", "rule"),
    [
        ({"end_token": -1}, ValueError, r"end_token \(-1\) must be an integer of at least 0"),
        ({"end_token": 1.5}, ValueError, r"end_token \(1.5\) must be an integer of at least 0"),
        ({"end_token": 5}, ValueError, r"end_token \(5\) must be below the size of the vocabulary \(5\)"),
        ({"end_token": 0}, ValueError, "end_token and pad_token must differ, both are 0"),
        ({"max_length": 3.0}, ValueError, r"max_length \(3.0\) must be an integer of at least 1"),
        ({"processors": MinLength(2, 1)}, TypeError, "processors must be a sequence of LogitsProcessor, got MinLength"),
        ({"processors": (3,)}, TypeError, r"processors must be a sequence of LogitsProcessor, got \(3,\)"),
        ({"first": FIRST[None]}, ValueError, r"first_token must be \[B\], one for each row, got the shape \(1, 2\)"),
        ({"first": jnp.array(3)}, ValueError, r"first_token must be \[B\], one for each row, got the shape \(\)"),
        ({"first": jnp.array([3.0, 4.0])}, TypeError, "first_token must be integers, got float32"),
        ({"step": lambda tokens, state: (jnp.zeros(5), state)}, ValueError, r"a step must return logits \[R, V\]"),
    ],
)
def test_what_makes_no_sense_is_refused(search, given, error, rule):
    arguments = {"step": _step, "state": (), "first": FIRST} | GIVEN | given
    positional = [arguments.pop(name) for name in ("step", "state", "first")]
    with pytest.raises(error, match=rule):
        search(*positional, **arguments)


def test_a_beam_needs_a_state_of_its_rows():
    with pytest.raises(ValueError, match="its first axis must be 2 rows"):
        _beam(_step, jnp.zeros(3), FIRST, **GIVEN)


def test_a_filter_is_no_sampling():
    with pytest.raises(TypeError, match=r"sampling must be Greedy\(\) or Sample\(filters\), got Temperature"):
        generate(_step, (), FIRST, sampling=Temperature(0.5), **GIVEN)


@pytest.mark.parametrize(
    "given",
    [
        {"length_penalty": AverageLength(np.array([1.0, 2.0]))},
        {"groups": DiverseGroups(2, np.array([1.0, 2.0]))},
        {"alignment": lambda state: jnp.ones((4, 3)), "coverage": CoveragePenalty(np.array([0.0, 5.0]), present=True)},
    ],
    ids=["length", "groups", "coverage"],
)
def test_a_penalty_is_one_number(given):
    with pytest.raises(ValueError, match=r"give one number for all rows, got the shape \(2,\)"):
        _beam(_step, (), FIRST, **GIVEN, **given)


def test_an_alignment_is_weights():
    with pytest.raises(ValueError, match=r"alignment must give weights \[R, S\] for 4 hypotheses, got None"):
        _beam(_step, (), FIRST, **GIVEN, alignment=lambda state: None)


def test_numbers_of_tokens_are_whole():
    with pytest.raises(ValueError, match=r"length \(2.5\) must be an integer"):
        MinLength(2.5, 1)
    with pytest.raises(TypeError, match="tokens must be a tuple, got 5"):
        Banned(5)
