"""Checks of the arguments of `generate` and `beam_search`, at trace time."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from seqattn.checks import check_integer, check_multiple, check_range
from seqattn.decoding.candidates import DiverseGroups
from seqattn.decoding.processors import LogitsProcessor, Number


def check_limits(max_length: int, end_token: int, pad_token: int) -> None:
    """Raises ValueError unless a row can hold a token and the end token differs from padding."""
    check_integer("max_length", max_length, minimum=1)
    check_integer("end_token", end_token, minimum=0)
    # If they were equal, the result could not show whether a row ended or was merely padded.
    if end_token == pad_token:
        raise ValueError(f"end_token and pad_token must differ, both are {end_token}")


def check_sizes(beam_size: int, n_best: int, groups: DiverseGroups | None, alignment: Any, coverage: Any) -> None:
    """Raises ValueError unless the sizes of a beam fit together and a coverage penalty has its alignment."""
    check_integer("beam_size", beam_size, minimum=1)
    # No more than `beam_size` finished sequences are kept per row.
    check_integer("n_best", n_best, 1, beam_size, maximum_name="beam_size")
    if groups is not None:
        # Groups of unequal sizes would need arrays of unequal shapes.
        check_multiple("beam_size", beam_size, groups.count, "the count of groups")
    if coverage is not None and alignment is None:
        raise ValueError("a coverage penalty needs alignment, a function that returns the attention weights of a step")


def checked_row_limit(row_limit: Number | None, max_length: int, num_rows: int) -> Int[Array, "num_rows"]:
    """Returns the maximum number of tokens of each row; `max_length` if there is no limit.

    Raises:
        TypeError: the limit is not of integers.
        ValueError: the limit is neither one number nor one per row, or it is known and not from 1 to `max_length`.
    """
    if row_limit is None:
        return jnp.full(num_rows, max_length, jnp.int32)
    if not jnp.issubdtype(jnp.result_type(row_limit), jnp.integer):
        raise TypeError(f"row_limit must be integers, got {jnp.result_type(row_limit)}")
    if jnp.shape(row_limit) not in ((), (num_rows,)):
        raise ValueError(f"row_limit must be one number or [B] for {num_rows} rows, got {jnp.shape(row_limit)}")
    check_range("row_limit", row_limit, minimum=1, maximum=max_length)
    # Traced values escape the check above. Out of range they would index past the result, so they are clipped.
    limit = jnp.asarray(row_limit)
    limit = jnp.clip(limit, 1, min(max_length, jnp.iinfo(limit.dtype).max)).astype(jnp.int32)
    return jnp.broadcast_to(limit, (num_rows,))


def checked_floor(floor: Number | None, num_rows: int) -> Float[Array, "#num_rows"] | None:
    """Returns the lowest log probability as `[1]` or `[B]`; ValueError for other shapes and non-finite values."""
    if floor is None:
        return None
    check_range("min_log_probability", floor)
    if jnp.shape(floor) not in ((), (num_rows,)):
        raise ValueError(f"min_log_probability must be one number or [B] for {num_rows} rows, got {jnp.shape(floor)}")
    return jnp.asarray(floor, jnp.float32).reshape(-1)


def checked_first_token(first_token: Any) -> Int[Array, "B"]:
    """Returns the first tokens as int32; raises ValueError or TypeError unless they are integers `[B]`."""
    # The first token defines B: with a wrong shape, later checks would blame the state or the step function.
    if jnp.ndim(first_token) != 1:
        raise ValueError(f"first_token must be [B], one for each row, got the shape {jnp.shape(first_token)}")
    if not jnp.issubdtype(jnp.result_type(first_token), jnp.integer):
        raise TypeError(f"first_token must be integers, got {jnp.result_type(first_token)}")
    return jnp.asarray(first_token, jnp.int32)


def checked_processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    """Returns the processors as a tuple; raises TypeError unless they are a sequence of processors."""
    # Passing a single processor instead of a tuple is an easy mistake, which would fail obscurely in the loop.
    if not isinstance(processors, Sequence) or not all(isinstance(each, LogitsProcessor) for each in processors):
        raise TypeError(f"processors must be a sequence of LogitsProcessor, got {processors!r}")
    return tuple(processors)


def check_logits(logits: Array, num_rows: int, end_token: int) -> None:
    """Raises ValueError unless a step returned `[R, V]` for R rows and the end token is below V."""
    if logits.ndim != 2 or logits.shape[0] != num_rows:
        raise ValueError(f"a step must return logits [R, V] for {num_rows} hypotheses, got the shape {logits.shape}")
    # No token of the vocabulary would equal it, so no row would ever end.
    if end_token >= logits.shape[-1]:
        raise ValueError(f"end_token ({end_token}) must be below the size of the vocabulary ({logits.shape[-1]})")
