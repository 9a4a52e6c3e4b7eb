"""Checks of numbers: the messages name the rule and the values."""

import numpy as np


def check_integer(name: str, value: int | np.integer, minimum: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `minimum`.

    >>> check_integer("num_heads", 0, minimum=1)
    Traceback (most recent call last):
    ValueError: num_heads (0) must be an integer of at least 1
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least {minimum}")


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless every size is an integer of at least 1.

    >>> check_sizes(model_dim=4, num_heads=0)
    Traceback (most recent call last):
    ValueError: num_heads (0) must be an integer of at least 1
    """
    for name, value in sizes.items():
        check_integer(name, value, minimum=1)
