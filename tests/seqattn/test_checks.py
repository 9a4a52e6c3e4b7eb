"""Checks of numbers: what passes, what is refused, and in which words."""

import pytest

from seqattn.checks import check_integer


@pytest.mark.parametrize("value", [0, -1, True])
def test_what_is_no_integer_of_at_least_the_minimum_is_refused(value):
    with pytest.raises(ValueError, match=r"size \(.*\) must be an integer of at least 1"):
        check_integer("size", value, 1)
