"""Checks of numbers. Each raises ValueError with a message that names the rule and the values.

In every check `name` is the name of the value in the message, and `hint` is appended to the rule, for example
", or None for all".
"""

import math
from typing import Any

import jax
import numpy as np

_Number = float | int


def check_integer(
    name: str,
    value: Any,
    minimum: int,
    maximum: int | None = None,
    *,
    maximum_name: str | None = None,
    hint: str = "",
) -> None:
    """Raises ValueError unless `value` is an integer of at least `minimum`, and at most `maximum` if given.

    >>> check_integer("num_heads", 0, minimum=1)
    Traceback (most recent call last):
    ValueError: num_heads (0) must be an integer of at least 1
    >>> check_integer("n_best", 3, minimum=1, maximum=2, maximum_name="beam_size")
    Traceback (most recent call last):
    ValueError: n_best (3) must be an integer from 1 to beam_size (2)
    """
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < minimum or (maximum is not None and value > maximum):
        most = maximum if maximum_name is None else f"{maximum_name} ({maximum})"
        rule = f"of at least {minimum}" if maximum is None else f"from {minimum} to {most}"
        raise ValueError(f"{name} ({value!r}) must be an integer {rule}{hint}")


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless every size is an integer of at least 1.

    >>> check_sizes(model_dim=4, num_heads=0)
    Traceback (most recent call last):
    ValueError: num_heads (0) must be an integer of at least 1
    """
    for name, value in sizes.items():
        check_integer(name, value, minimum=1)


def check_multiple(name: str, value: int, divisor: int, divisor_name: str, hint: str = "") -> None:
    """Raises ValueError unless `value` is a multiple of `divisor`, which is at least 1.

    >>> check_multiple("num_heads", 6, 4, "num_kv_heads")
    Traceback (most recent call last):
    ValueError: num_heads (6) must be a multiple of num_kv_heads (4)
    """
    if value % divisor:
        raise ValueError(f"{name} ({value}) must be a multiple of {divisor_name} ({divisor}){hint}")


def check_even(name: str, value: int, hint: str = "") -> None:
    """Raises ValueError unless `value` is even.

    >>> check_even("head_dim", 5, " to be rotated")
    Traceback (most recent call last):
    ValueError: head_dim (5) must be even to be rotated
    """
    if value % 2:
        raise ValueError(f"{name} ({value}) must be even{hint}")


def check_number(
    name: str,
    value: Any,
    *,
    minimum: _Number = -math.inf,
    maximum: _Number = math.inf,
    above: _Number = -math.inf,
    below: _Number = math.inf,
    finite: bool = True,
    hint: str = "",
) -> None:
    """Raises ValueError unless `value` is a number in a range with open or closed ends.

    Args:
        name: the name of the value in the message.
        value: a number or an array of one number, not traced.
        minimum: the smallest allowed value.
        maximum: the largest allowed value.
        above: an exclusive lower bound.
        below: an exclusive upper bound.
        finite: If True, infinity is refused. NaN is always refused.
        hint: appended to the rule.

    >>> check_number("label_smoothing", 1.0, minimum=0, below=1)
    Traceback (most recent call last):
    ValueError: label_smoothing (1.0) must be in [0, 1)
    >>> check_number("gain", 0.0, above=0)
    Traceback (most recent call last):
    ValueError: gain (0.0) must be positive and finite
    """
    is_number = isinstance(value, int | float | np.number | np.ndarray | jax.Array) and not isinstance(value, bool)
    beyond = is_number and ((above > -math.inf and value <= above) or (below < math.inf and value >= below))
    if not is_number or beyond or not minimum <= value <= maximum or (finite and not math.isfinite(value)):
        raise ValueError(f"{name} ({value}) must be {_rule(minimum, maximum, above, below, finite=finite)}{hint}")


def check_rate(rate: Any, name: str = "the dropout rate") -> None:
    """Raises ValueError unless `rate` is a probability below 1.

    >>> check_rate(1.0)
    Traceback (most recent call last):
    ValueError: the dropout rate (1.0) must be in [0, 1)
    """
    check_number(name, rate, minimum=0, below=1)


def check_seed(seed: Any) -> None:
    """Raises ValueError unless `seed` is an integer of 32 bits: JAX drops higher bits.

    >>> check_seed(-1)
    Traceback (most recent call last):
    ValueError: seed (-1) must be an integer from 0 to 4294967295
    """
    check_integer("seed", seed, 0, 2**32 - 1)


def check_range(
    name: str,
    value: Any,
    *,
    minimum: _Number = -math.inf,
    maximum: _Number = math.inf,
    above: _Number = -math.inf,
) -> None:
    """Like `check_number`, for a leaf of a pytree: checks every number of an array, and skips traced values.

    >>> check_range("penalty", np.array([1.0, 0.0]), above=0)
    Traceback (most recent call last):
    ValueError: penalty (0) must be positive and finite
    """
    if not is_known(value):
        return
    # In NumPy, because inside `jit` jax.numpy would trace even the minimum of a concrete array.
    values = np.asarray(value, np.float64)
    outside = values[~(np.isfinite(values) & (values >= minimum) & (values <= maximum) & (values > above))]
    if outside.size:
        raise ValueError(f"{name} ({outside.flat[0]:g}) must be {_rule(minimum, maximum, above)}")


def is_known(value: Any) -> bool:
    """Returns whether a leaf is a number or an array with known values: not traced, and no other kind of leaf."""
    if isinstance(value, (int, float, np.number)):
        return not isinstance(value, bool)
    return isinstance(value, (np.ndarray, jax.Array)) and not isinstance(value, jax.core.Tracer)


def _rule(minimum: _Number, maximum: _Number, above: _Number, below: _Number = math.inf, *, finite: bool = True) -> str:
    """Returns the text of a range."""
    low, high = max(minimum, above), min(maximum, below)
    left, right = "(" if above >= minimum else "[", ")" if below <= maximum else "]"
    if -math.inf < low and high < math.inf:
        return f"in {left}{low:g}, {high:g}{right}"
    rules = []
    if low > -math.inf:
        rules.append(f"at least {low:g}" if left == "[" else "positive" if low == 0 else f"above {low:g}")
    if high < math.inf:
        rules.append(f"at most {high:g}" if right == "]" else "negative" if high == 0 else f"below {high:g}")
    return " and ".join(rules + ["finite"] * finite) or "a number"
