"""Checks of what `generate` and `beam_search` are given, before anything is compiled."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int

from seqattn.decoding.processors import LogitsProcessor
from seqattn.static import check_integer


def check_limits(max_length: int, end_token: int, pad_token: int) -> None:
    """Raises ValueError unless a row can hold a token and its end can be told from padding."""
    check_integer("max_length", max_length, minimum=1)
    check_integer("end_token", end_token, minimum=0)
    if end_token == pad_token:
        raise ValueError(f"end_token and pad_token must differ, both are {end_token}")


def checked_first_token(first_token: Any) -> Int[Array, "B"]:
    """The first tokens as int32; ValueError or TypeError where they are not integers `[B]`."""
    if jnp.ndim(first_token) != 1:
        raise ValueError(f"first_token must be [B], one for each row, got the shape {jnp.shape(first_token)}")
    if not jnp.issubdtype(jnp.result_type(first_token), jnp.integer):
        raise TypeError(f"first_token must be integers, got {jnp.result_type(first_token)}")
    return jnp.asarray(first_token, jnp.int32)


def checked_processors(processors: Any) -> tuple[LogitsProcessor, ...]:
    """The processors as a tuple; TypeError where it is not a sequence of them."""
    if not isinstance(processors, Sequence) or not all(isinstance(each, LogitsProcessor) for each in processors):
        raise TypeError(f"processors must be a sequence of LogitsProcessor, got {processors!r}")
    return tuple(processors)


def check_logits(logits: Array, num_rows: int, end_token: int) -> None:
    """Raises ValueError unless a step gave `[R, V]` for R rows and the end token is one of V."""
    if logits.ndim != 2 or logits.shape[0] != num_rows:
        raise ValueError(f"a step must return logits [R, V] for {num_rows} hypotheses, got the shape {logits.shape}")
    if end_token >= logits.shape[-1]:
        raise ValueError(f"end_token ({end_token}) must be below the size of the vocabulary ({logits.shape[-1]})")
