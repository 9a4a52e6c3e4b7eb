"""The arithmetic of a tile of 64 queries: logits, and the online softmax (Milakov 2018; Dao 2023, algorithm 1).

The kernel for the device, its interpreted form and the tests call these functions. What differs between them, such as
the layout of registers, is a `Units`.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from seqattn.kernels import on_tile
from seqattn.kernels.hopper.operations import HOPPER, LOG2_E, kept
from seqattn.kernels.hopper.plan import Operands, Plan
from seqattn.kernels.hopper.rule import Rule
from seqattn.kernels.hopper.units import Units
from seqattn.kernels.log_total import SEES_NOTHING
from seqattn.kernels.per_pair import QUERY, Border
from seqattn.precision import lowest

_LOWEST = lowest(np.dtype(np.float32))


class Place(NamedTuple):
    """Where a tile of pairs is: the batch row, the query head, and the indices of its first query and key."""

    batch: Any
    head: Any
    query: Any
    key: Any


class Sums(NamedTuple):
    """The state of the online softmax.

    Attributes:
        output: the weighted sums of values, `[queries, V]`.
        peak: the largest score so far, `[queries]`; the largest product if nothing but the scale makes scores of them.
        total: the sums of weights, `[queries]`.
    """

    output: Array
    peak: Array
    total: Array


def start(units: Units, queries: int, dim: int) -> Sums:
    """Returns the state before any key."""
    # The maximum starts at the lowest finite number instead of -inf: -inf - -inf would be NaN.
    return Sums(units.tile(0.0, (queries, dim)), units.rows(_LOWEST, queries), units.rows(0.0, queries))


def add(units: Units, scores: Float[Array, "Q K"], sums: Sums, unit: Any) -> tuple[Float[Array, "Q K"], Sums]:
    """Returns the weights of a tile under the new maximum, and the sums of earlier tiles rescaled to it.

    Args:
        units: what differs between the device and the interpreter.
        scores: the scores, -inf where a pair is masked.
        sums: the state after the earlier tiles.
        unit: the power of 2 in a score of 1.
    """
    # The maximum is never -inf, so a row that is masked so far gives exp(-inf - finite) = 0 and no NaN.
    peak = jnp.maximum(sums.peak, scores.max(axis=1))
    # The difference comes first, and is exact near the maximum. FlashAttention-3 multiplies and subtracts in one
    # instruction, but it is the exponential that takes the time: the GPU computes eight times as many differences.
    weights = jnp.exp2((scores - units.spread(peak, scores.shape)) * unit)
    shrink = jnp.exp2((sums.peak - peak) * unit)
    output = sums.output * units.spread(shrink, sums.output.shape)
    return weights, Sums(output, peak, sums.total * shrink + weights.sum(axis=1))


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The functions of a call.

    Attributes:
        units: what differs between the device and the interpreter.
        plan: the static part of the call.
        scale: what products are multiplied by, a positive scalar.
        given: references to the arrays in global memory, or the arrays themselves.
        transposed: whether tiles have keys as rows and queries as columns.
    """

    units: Units
    plan: Plan
    scale: Any
    given: Operands
    transposed: bool = False

    def start(self, queries: int, dim: int) -> Sums:
        """Returns the state before any key."""
        return start(self.units, queries, dim)

    def weights(
        self, products: Float[Array, "Q K"], sums: Sums, place: Place, *, partial: bool
    ) -> tuple[Float[Array, "Q K"], Sums]:
        """Returns the weights of a tile under the new maximum, and the sums of earlier tiles rescaled to it.

        Args:
            products: the products of queries and keys.
            sums: the state after the earlier tiles.
            place: where the tile is.
            partial: whether a pair in the tile may be masked. A full tile evaluates no mask.
        """
        scores = self._scores(products, place) if self.is_natural else products
        if partial:
            visible = self._visible(place, scores.shape)
            scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
        weights, sums = add(self.units, scores, sums, self._unit)
        # Dropout acts on the weights after the softmax: the total keeps the dropped ones.
        return self.dropped(weights, place), sums

    def dropped(self, weights: Float[Array, "Q K"], place: Place) -> Float[Array, "Q K"]:
        """Applies dropout to the weights of a tile: kept ones are divided by the keep probability."""
        rate = self.plan.dropout_rate
        if rate == 0:
            return weights
        (words,), (base,) = self.given.words, self.given.base
        # The row and the column of a weight are the counter of the random generator: see `seqattn.dropout.kept`.
        row, column = (
            self._index(of_query, place, weights.shape, base[place.batch, place.head, i]).astype(jnp.uint32)
            for i, of_query in enumerate((True, False))
        )
        keep = kept([words[0], words[1]], rate, row, column)
        # `weights * 0` keeps a NaN row NaN in the dropped places as well.
        return jnp.where(keep, weights * jnp.float32(1 / (1 - rate)), weights * jnp.float32(0))

    def finish(self, sums: Sums) -> tuple[Array, Array, Array]:
        """Returns the output, the largest logit of each query and the log of its total, as `log_total` says."""
        # The largest score of a row adds exp(0) = 1, so only fully masked rows have a total of 0. They get zeros.
        empty = sums.total == 0
        total = jnp.where(empty, jnp.ones_like(sums.total), sums.total)
        peak = sums.peak if self.is_natural else sums.peak * self.scale
        output = sums.output * self.units.spread(1 / total, sums.output.shape)
        return output, jnp.where(empty, jnp.float32(_LOWEST), peak), jnp.where(empty, SEES_NOTHING, jnp.log(total))

    @property
    def is_natural(self) -> bool:
        """Whether scores are more than scaled products. They are then not multiplied by the scale a second time."""
        return self.plan.score_mod is not None or len(self.given.bias) > 0

    @property
    def _unit(self) -> Array:
        """The power of 2 in a score of 1; with the scale, if nothing but the scale makes scores of products."""
        return jnp.float32(LOG2_E) * (jnp.float32(1) if self.is_natural else self.scale)

    def _scores(self, products: Float[Array, "Q K"], place: Place) -> Float[Array, "Q K"]:
        """Returns the scaled products after bias and score modification.

        The products of queries and keys that are not finite are NaN. The modification sees 0 there, and the result is
        NaN unless bias or modification mask the pair with -inf.
        """
        seen = products == products
        scores = jnp.where(seen, products, jnp.zeros_like(products)) * self.scale
        for each in self.given.bias:
            # A bias of -inf masks its pair, whatever the modification makes of it.
            bias = self._pairs(each, place, products.shape).astype(jnp.float32)
            scores, hidden = scores + jnp.where(bias == -jnp.inf, jnp.zeros_like(bias), bias), bias == -jnp.inf
        if self.plan.score_mod is not None:
            (scores,) = self._evaluate(self.plan.score_mod, self.given.mod, (scores,), place, scores.shape)
        if self.given.bias:
            scores = jnp.where(hidden, -jnp.inf, scores)
        return jnp.where(seen | (scores == -jnp.inf), scores, jnp.nan)

    def _pairs(self, array: Any, place: Place, shape: tuple[int, ...]) -> Array:
        """Returns a tile of an array of pairs: `[B or 1, N or 1, T, S]` in the order of the tile, or with one query."""
        at = self._row_and_head(array, place)
        if array.shape[2] == 1:
            return self.units.vector(array, (*at, 0), place.key, self._axis(of_query=False), shape)
        first = (place.key, place.query) if self.transposed else (place.query, place.key)
        return self.units.pairs(array, at, first, shape)

    def _visible(self, place: Place, shape: tuple[int, ...]) -> Array | None:
        """Returns the visible pairs of a partial tile, or None if there are no others."""
        mask, visible = self.plan.mask, None
        if mask is not None:
            (visible,) = self._evaluate(mask, self.given.mask, (), place, shape)
        for each in self.given.shown:
            visible = self._pairs(each, place, shape) != 0
        length, size = self.plan.sizes[3:5]
        # Columns past the end are masked. Rows past the end are cut off in the results.
        if (length if self.transposed else size) % shape[1]:
            real = self._index(self.transposed, place, shape) < (length if self.transposed else size)
            visible = real if visible is None else visible & real
        return visible

    def _axis(self, *, of_query: bool) -> int:
        """Returns the axis of a tile along which queries or keys differ."""
        return int(of_query == self.transposed)

    def _index(self, of_query: bool, place: Place, shape: tuple[int, ...], first: Any = 0) -> Array:
        """Returns the index of the query or of the key of each pair, counted from `first`."""
        start = place.query if of_query else place.key
        return self.units.index(shape, self._axis(of_query=of_query)) + (start + first)

    def _evaluate(
        self,
        rule: Rule,
        arrays: Sequence[Any],
        scores: tuple[Array, ...],
        place: Place,
        shape: tuple[int, ...],
    ) -> list[Array]:
        """Returns the results of a mask or score modification for each pair of a tile."""
        given, borders = iter(arrays), []
        for border, first, read in rule.sources():
            if read:
                borders.append(self._border(border, next(given), place, shape))
            elif first is not None:
                borders.append(self._index(QUERY in border.reads, place, shape, first))
            else:
                borders.append(None)
        return on_tile.evaluate_all(rule.late, borders, scores, (shape[0], shape[1]), HOPPER)

    def _row_and_head(self, array: Any, place: Place) -> tuple[Any, Any]:
        """Returns the indices of the first two axes of an array, which has size 1 where rows or heads share it."""
        return place.batch if array.shape[0] > 1 else 0, place.head if array.shape[1] > 1 else 0

    def _border(self, border: Border, array: Any, place: Place, shape: tuple[int, ...]) -> Any:
        """Returns a border as a tile, or as a list of scalars."""
        row, head = self._row_and_head(array, place)
        if not border.by_token:
            return [_typed(array[row, head, i], border) for i in range(border.entries)]
        of_query = QUERY in border.reads
        first = place.query if of_query else place.key
        return _typed(self.units.vector(array, (row, head), first, self._axis(of_query=of_query), shape), border)


def _typed(x: Array, border: Border) -> Array:
    """Returns a border in its own dtype: booleans are read as integers."""
    return x != 0 if border.dtype == jnp.bool_ else x
