"""Checks of numbers: what passes, what is refused, and in which words."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from seqattn.checks import check_integer, check_number, check_range


@pytest.mark.parametrize("value", [0, -1, True])
def test_what_is_no_integer_of_at_least_the_minimum_is_refused(value):
    with pytest.raises(ValueError, match=r"size \(.*\) must be an integer of at least 1"):
        check_integer("size", value, 1)


@pytest.mark.parametrize("value", [np.int64(1), 2, 2**40])
def test_integers_of_numpy_and_of_any_size_pass(value):
    check_integer("size", value, 1)


RANGES = {
    "in [0, 1)": ({"minimum": 0, "below": 1}, [0, 0.5], [-0.1, 1, 1.0, math.nan]),
    "in [0, 1]": ({"minimum": 0, "maximum": 1}, [0, 1], [1.5, math.inf]),
    "in (0, 1)": ({"above": 0, "below": 1}, [1e-9], [0, 1.0]),
    "positive and finite": ({"above": 0}, [1e-9, 1e9], [0.0, -1.0, math.inf, math.nan]),
    "at least 0 and finite": ({"minimum": 0}, [0, 1e9], [-1e-9, math.inf, math.nan]),
    "at most 0 and finite": ({"maximum": 0}, [0, -1e9], [1e-9, -math.inf]),
    "below 3 and finite": ({"below": 3}, [2.9], [3, -math.inf]),
    "positive": ({"above": 0, "finite": False}, [math.inf], [0.0, math.nan]),
    "finite": ({}, [-1.0, 1e300], [math.inf, math.nan]),
}


@pytest.mark.parametrize("rule", RANGES)
def test_one_check_of_numbers_has_one_message(rule):
    limits, good, bad = RANGES[rule]
    for value in good:
        check_number("x", value, **limits)
    for value in bad:
        with pytest.raises(ValueError, match=rf"x \({re.escape(str(value))}\) must be {re.escape(rule)}, or None$"):
            check_number("x", value, **limits, hint=", or None")


def test_a_leaf_is_asked_wherever_it_is_known():
    check_range("x", np.array([1.0, 2.0]), minimum=1)
    jax.jit(lambda x: check_range("x", x, minimum=1))(0.0)
    check_range("x", object(), minimum=1)
    for value in (np.array([2.0, 0.5]), jnp.array(0.5), 0.5):
        with pytest.raises(ValueError, match=r"x \(0.5\) must be at least 1 and finite"):
            check_range("x", value, minimum=1)
