"""What is static in a mask or a score modification: sizes that are compiled in, checked where they are given."""

import dataclasses
from typing import Any

import numpy as np


def static(**options: Any) -> Any:
    """A field that is no leaf of its dataclass but part of its structure; `options` are as of `dataclasses.field`."""
    return dataclasses.field(metadata={"static": True}, **options)


def check_integer(name: str, value: int, minimum: int) -> None:
    """Raises ValueError unless `value` is an integer of at least `minimum`.

    >>> check_integer("num_heads", 0, minimum=1)
    Traceback (most recent call last):
    ValueError: num_heads (0) must be an integer of at least 1
    """
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} ({value!r}) must be an integer of at least {minimum}")
