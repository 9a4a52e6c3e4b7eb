"""The state of a step function for several hypotheses in each batch row: any pytree, batch first."""

import abc
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from seqattn.pytrees import pytree


class Branching(abc.ABC):
    """A part of a state that branches and selects hypotheses itself, instead of copying every array.

    Subclass it with a dataclass that is a pytree. Examples are a memory that all hypotheses of a row read, and a cache
    that moves entries of a page table instead of keys.
    """

    @abc.abstractmethod
    def branch(self, beam_size: int) -> "Branching":
        """Returns the state of `beam_size` equal hypotheses for each of the B rows."""

    @abc.abstractmethod
    def select(self, parent: Int[Array, "B beams"]) -> "Branching":
        """Returns the state in which hypothesis j of row b continues hypothesis `parent[b, j]` of row b."""


@pytree
@dataclasses.dataclass(frozen=True)
class Shared(Branching):
    """A value shared by all hypotheses of a row and never copied, such as the memory of an encoder.

    Attributes:
        value: any pytree, with the B rows first.
    """

    value: Any

    def branch(self, beam_size: int) -> "Shared":
        return self

    def select(self, parent: Int[Array, "B beams"]) -> "Shared":
        return self


def branch(state: Any, beam_size: int) -> Any:
    """Repeats a state for `beam_size` hypotheses of each row.

    Arrays `[B, ...]` become `[B * beam_size, ...]`, row by row. Arrays without axes belong to all rows and stay as they
    are.

    >>> print(branch({"count": jnp.array([1, 2]), "step": 0}, 3))
    {'count': Array([1, 1, 1, 2, 2, 2], dtype=int32), 'step': 0}
    """

    def widen(leaf: Any) -> Any:
        if isinstance(leaf, Branching):
            return leaf.branch(beam_size)
        return leaf if jnp.ndim(leaf) == 0 else jnp.repeat(jnp.asarray(leaf), beam_size, axis=0)

    return jax.tree.map(widen, state, is_leaf=_is_branching)


def select(state: Any, parent: Int[Array, "B beams"]) -> Any:
    """Returns the state in which hypothesis j of row b continues hypothesis `parent[b, j]` of row b.

    Raises:
        ValueError: the first axis of an array is not the B * beams hypotheses.

    >>> print(select({"count": jnp.array([1, 2, 3, 4]), "step": 0}, jnp.array([[1, 1], [0, 1]])))
    {'count': Array([2, 2, 3, 4], dtype=int32), 'step': 0}
    """
    rows, beams = parent.shape
    flat = (jnp.arange(rows, dtype=parent.dtype)[:, None] * beams + parent).reshape(-1)

    def take(leaf: Any) -> Any:
        if isinstance(leaf, Branching):
            return leaf.select(parent)
        if jnp.ndim(leaf) == 0:
            return leaf
        _check_first_axis(leaf, rows * beams, f"{rows} rows of {beams} hypotheses")
        return jnp.asarray(leaf).at[flat].get(mode="promise_in_bounds")

    return jax.tree.map(take, state, is_leaf=_is_branching)


def check_rows(state: Any, rows: int) -> None:
    """Checks that the first axis of every array of a state is the rows.

    Raises:
        ValueError: the first axis of an array has another size.
    """
    for leaf in jax.tree.leaves(state, is_leaf=_is_branching):
        if not isinstance(leaf, Branching) and jnp.ndim(leaf) > 0:
            _check_first_axis(leaf, rows, f"{rows} rows")


def _is_branching(node: Any) -> bool:
    return isinstance(node, Branching)


def _check_first_axis(leaf: Any, size: int, meaning: str) -> None:
    if jnp.shape(leaf)[0] != size:
        raise ValueError(f"an array of the state has the shape {jnp.shape(leaf)}: its first axis must be {meaning}")
