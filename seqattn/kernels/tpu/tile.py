"""The logits of one tile inside the kernel, their gradients, and dropout."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array

from seqattn.dropout import kept
from seqattn.kernels.on_tile import TPU, evaluate
from seqattn.kernels.per_pair import QUERY, Border, Late
from seqattn.kernels.tpu.inputs import Place
from seqattn.kernels.tpu.plan import Plan


@dataclasses.dataclass(frozen=True)
class Tile:
    """A tile of pairs: queries as rows and keys as columns, or the other way round if transposed.

    Attributes:
        place: where the blocks of the step are.
        refs: references to the blocks, by name.
        ids: the indices of the step in the grid.
        partial: whether a pair in the tile may be masked.
    """

    place: Place
    refs: dict[str, Any]
    ids: tuple[Any, ...]
    partial: bool

    @property
    def plan(self) -> Plan:
        """The static part of the call."""
        return self.place.plan

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the tile."""
        tiles = self.plan.tiles
        return (tiles.keys, tiles.queries) if self.place.transposed else (tiles.queries, tiles.keys)

    @property
    def lists(self) -> tuple[Any, ...]:
        """The lists of steps."""
        return tuple(self.refs[name] for name in ("row", "outer", "inner", "flags"))

    def indices(self, *, of_query: bool) -> Array:
        """Returns the index of the query or of the key of each pair."""
        tiles = self.plan.tiles
        tile = self.place.query_tile(self.ids, self.lists) if of_query else self.place.key_tile(self.ids, self.lists)
        axis = 1 if of_query == self.place.transposed else 0
        return lax.broadcasted_iota(jnp.int32, self.shape, axis) + tile * (tiles.queries if of_query else tiles.keys)

    def vector(self, name: str, *, of_query: bool) -> Array:
        """Returns a vector over queries or keys, which broadcasts to the tile."""
        row = self.refs[name][...]
        return row if of_query == self.place.transposed else row.T

    def scalar(self, name: str, index: Any) -> Any:
        """Returns one of the scalars of an input."""
        return self.refs[name][0, index]

    def product(self) -> Array:
        """Returns the products of queries and keys, scaled, in float32."""
        query, key = self.refs["query"][...], self.refs["key"][...]
        left, right = (key, query) if self.place.transposed else (query, key)
        return dot(left, right, 1, 1) * self.scalar("scale", 0)

    def real(self) -> Array:
        """Returns the pairs that are no padding."""
        length, size = self.plan.sizes[3:5]
        return (self.indices(of_query=True) < length) & (self.indices(of_query=False) < size)

    def allowed(self) -> Array | None:
        """Returns the pairs that the mask shows, or None without a mask. Padding repeats the last query or key."""
        if (late := self.plan.mask) is not None:
            return evaluate(late, self._borders("mask", late), (), self.shape, TPU)
        # A boolean array, with an entry for each pair, query or key.
        for name, of_query in (("visible_query", True), ("visible_key", False)):
            if name in self.refs:
                return jnp.broadcast_to(self.vector(name, of_query=of_query) != 0, self.shape)
        if "pairs" not in self.refs:
            return None
        pairs = self.refs["pairs"][...].astype(jnp.int32)
        return (pairs.T if self.place.transposed else pairs) != 0

    def logits(self, *, gradients: bool) -> tuple[Array, Array | None, Callable[[Array], Any] | None]:
        """Returns the logits, where they are visible (None: everywhere), and what pulls gradients back.

        The latter takes the gradient of the logits and returns those of the products and of the scalars that the score
        modification reads; None without one.
        """
        scores, late = self.product(), self.plan.score_mod
        allowed = self.allowed() if self.partial else None
        visible = None if not self.partial else self.real() if allowed is None else self.real() & allowed
        pull = None
        if late is not None:
            # The order of the contract: a score modification receives a score of 0 for a masked pair. It receives the
            # score of the pair that padding repeats: its derivative may be infinite at 0, and 0 times that is NaN.
            shown = scores if allowed is None else jnp.where(allowed, scores, 0.0)
            borders = self._borders("mod", late)
            scalars = [borders[i] for i, _ in self.plan.trained]

            def modify(scores: Array, scalars: Sequence[Any]) -> Array:
                given = dict(zip((i for i, _ in self.plan.trained), scalars, strict=True))
                values = [given.get(i, x) for i, x in enumerate(borders)]
                return evaluate(late, values, (scores,), self.shape, TPU)

            if gradients:
                scores, pull = jax.vjp(modify, shown, scalars)
            else:
                scores = modify(shown, scalars)
            if not gradients:
                # NaN is added after the modification, and only to visible scores: see `operands` of the tiled kernel.
                bad = self.vector("bad_query", of_query=True) + self.vector("bad_key", of_query=False)
                scores = jnp.where(scores == -jnp.inf, scores, scores + bad)
        if visible is not None:
            scores = jnp.where(visible, scores, -jnp.inf)
        # A modification may mask pairs of its own.
        return scores, visible if late is None else scores != -jnp.inf, pull

    def dropped(self, x: Array) -> Array:
        """Applies dropout to the weights of the tile: kept ones are divided by the keep probability."""
        plan = self.plan
        if plan.dropout_rate == 0:
            return x
        index = self.place.row(self.ids, self.lists) * plan.sizes[1] + self.place.head(self.ids)
        row = self.indices(of_query=True) + self.scalar("base", 2 * index)
        column = self.indices(of_query=False) + self.scalar("base", 2 * index + 1)
        words = [self.scalar("words", i) for i in range(2)]
        keep = kept(words, plan.dropout_rate, row.astype(jnp.uint32), column.astype(jnp.uint32))
        return jnp.where(keep, x / (1 - plan.dropout_rate), 0.0)

    def _borders(self, prefix: str, late: Late) -> list[Any]:
        """Returns the borders of a program: vectors, or scalars of this row and head."""
        return [self._border(f"{prefix}{i}", each, late.tables[i]) for i, each in enumerate(late.borders)]

    def _border(self, name: str, border: Border, table: bytes | None) -> Any:
        if table is not None:
            return None
        if border.by_token:
            return _typed(self.vector(name, of_query=QUERY in border.reads), border)
        batch, num_heads = self.plan.sizes[:2]
        by_head = num_heads if "head" in border.reads else 1
        by_row = batch if self.refs[name].shape[1] > by_head * border.entries else 1
        row = self.place.row(self.ids, self.lists) if by_row > 1 else 0
        head = self.place.head(self.ids) if by_head > 1 else 0
        first = (row * by_head + head) * border.entries
        return [_typed(self.scalar(name, first + i), border) for i in range(border.entries)]


def _typed(x: Array, border: Border) -> Array:
    """Returns a border in its own dtype: booleans are read as integers."""
    return x != 0 if border.dtype == jnp.bool_ else x


def dot(left: Array, right: Array, left_axis: int, right_axis: int) -> Array:
    """Returns the product over an axis of each operand: in full precision for float32, summed in float32."""
    precision = lax.Precision.HIGHEST if left.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, dims, precision=precision, preferred_element_type=jnp.float32)


def ids(number: int) -> tuple[Any, ...]:
    """Returns the indices of the present step in a grid of `number` dims."""
    return tuple(pl.program_id(axis) for axis in range(number))
