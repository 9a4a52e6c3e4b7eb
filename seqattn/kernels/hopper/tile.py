"""The arithmetic of a tile of 64 queries: logits, and the online softmax (Milakov 2018; Dao 2023, algorithm 1).

The kernel for the device, its interpreted form and the tests call these functions. What differs between them, such as
the layout of registers, is a `Units`.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from seqattn.kernels import on_tile
from seqattn.kernels.hopper.units import Units
from seqattn.kernels.log_total import EMPTY
from seqattn.kernels.per_pair import QUERY, Border, Late
from seqattn.precision import lowest

LOG2_E = math.log2(math.e)
"""Exponentials are powers of 2, which is what the hardware computes."""

_LOWEST = lowest(np.dtype(np.float32))


def _sqrt(x: Array, **_: Any) -> Array:
    """Returns the square root as x / sqrt(x), and 0 for 0."""
    return jnp.where(x == 0, jnp.zeros_like(x), x * lax.rsqrt(x))


def _floor(x: Array, **_: Any) -> Array:
    """Returns the largest integer that is not above x. Numbers of 2^23 and more are integers."""
    whole = x.astype(jnp.int32).astype(x.dtype)
    whole = jnp.where(whole > x, whole - 1, whole)
    return jnp.where(jnp.abs(x) < 2.0**23, whole, x)


def _tanh(x: Array, **_: Any) -> Array:
    """Returns tanh(x) = (1 - t) / (1 + t) with t = exp(-2 |x|): the instruction for tanh has 11 bits."""
    t = jnp.exp2(jnp.abs(x) * (-2 * LOG2_E))
    size = (1 - t) / (1 + t)
    return jnp.where(x < 0, -size, size)


def _logistic(x: Array, **_: Any) -> Array:
    """Returns 1 / (1 + exp(-x))."""
    return 1 / (1 + jnp.exp2(x * -LOG2_E))


def _pow(x: Array, y: Array, **_: Any) -> Array:
    """Returns x to the power of y, for x >= 0."""
    if not jnp.issubdtype(y.dtype, jnp.floating):
        raise NotImplementedError("the Hopper kernel has no power with an exponent that differs by pair")
    return jnp.exp2(y * jnp.log2(x))


def _log1p(x: Array, **_: Any) -> Array:
    """Returns log(1 + x); near 0 the quotient (Kahan) undoes the rounding of 1 + x."""
    near = 1 + x
    rest = near - 1
    exact = jnp.log(near) * (x / jnp.where(rest == 0, jnp.ones_like(rest), rest))
    return jnp.where(rest == 0, x, exact)


_PLAIN = (
    "add sub mul div rem neg abs max min integer_pow square eq ne lt le gt ge and or not xor shift_left "
    "shift_right_logical shift_right_arithmetic exp exp2 log rsqrt sin cos erf sign convert_element_type"
)

HOPPER = on_tile.Device(
    "the Hopper kernel",
    frozenset(_PLAIN.split()),
    {
        "sqrt": _sqrt,
        "floor": _floor,
        "tanh": _tanh,
        "logistic": _logistic,
        "pow": _pow,
        "log1p": _log1p,
        "stop_gradient": lambda x, **_: x,
        "copy": lambda x, **_: x,
    },
)
"""What Pallas Mosaic GPU accepts (jax 0.10.2, compiled for H200), and what is rewritten for it."""


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
        peak: the largest score so far, `[queries]`: in powers of 2, or in powers of e behind a score modification.
        total: the sums of weights, `[queries]`.
    """

    output: Array
    peak: Array
    total: Array


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """The functions of a call.

    Attributes:
        units: what differs between the device and the interpreter.
        size: S without padding.
        mask: the operations of the mask for each pair, or None.
        score_mod: the operations of the score modification for each pair, or None.
        scale: what products are multiplied by, a positive scalar.
        borders: the arrays of mask and score modification in global memory, `[B or 1, N or 1, L]`.
    """

    units: Units
    size: int
    mask: Late | None
    score_mod: Late | None
    scale: Any
    borders: tuple[Sequence[Any], Sequence[Any]]

    def start(self, queries: int, dim: int) -> Sums:
        """Returns the state before any key."""
        # The maximum starts at the lowest finite number instead of -inf: -inf - -inf would be NaN.
        rows = self.units.rows
        return Sums(self.units.tile(0.0, (queries, dim)), rows(_LOWEST, queries), rows(0.0, queries))

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
        scores = products if self.score_mod is None else self._modified(products * self.scale, place)
        if partial:
            visible = self._visible(place, scores.shape)
            scores = scores if visible is None else jnp.where(visible, scores, -jnp.inf)
        spread = self.units.spread
        # The maximum is never -inf, so a row that is masked so far gives exp(-inf - finite) = 0 and no NaN.
        if self.score_mod is None:
            # One multiplication with addition for each score, as in FlashAttention-3.
            unit = self.scale * jnp.float32(LOG2_E)
            peak = jnp.maximum(sums.peak, scores.max(axis=1) * unit)
            weights, shrink = jnp.exp2(scores * unit - spread(peak, scores.shape)), jnp.exp2(sums.peak - peak)
        else:
            # A modification may return any number, also one that overflows in powers of 2: the difference comes first.
            peak = jnp.maximum(sums.peak, scores.max(axis=1))
            weights = jnp.exp2((scores - spread(peak, scores.shape)) * jnp.float32(LOG2_E))
            shrink = jnp.exp2((sums.peak - peak) * jnp.float32(LOG2_E))
        output = sums.output * spread(shrink, sums.output.shape)
        return weights, Sums(output, peak, sums.total * shrink + weights.sum(axis=1))

    def finish(self, sums: Sums) -> tuple[Array, Array, Array]:
        """Returns the output, the largest logit of each query and the log of its total, as `log_total` says."""
        # The largest score of a row adds exp(0) = 1, so only fully masked rows have a total of 0. They get zeros.
        empty = sums.total == 0
        total = jnp.where(empty, jnp.ones_like(sums.total), sums.total)
        peak = sums.peak if self.score_mod is not None else sums.peak * jnp.float32(1 / LOG2_E)
        output = sums.output * self.units.spread(1 / total, sums.output.shape)
        return output, jnp.where(empty, jnp.float32(_LOWEST), peak), jnp.where(empty, EMPTY, jnp.log(total))

    def _modified(self, scores: Float[Array, "Q K"], place: Place) -> Float[Array, "Q K"]:
        """Returns the scores after the modification.

        The scores of queries and keys that are not finite are NaN. The modification sees 0 there, and the result is NaN
        unless it masks the pair with -inf.
        """
        finite = jnp.where(scores == scores, scores, jnp.zeros_like(scores))
        after = self._evaluate(self.score_mod, self.borders[1], (finite,), place, scores.shape)
        return jnp.where((scores == scores) | (after == -jnp.inf), after, jnp.nan)

    def _visible(self, place: Place, shape: tuple[int, int]) -> Array | None:
        """Returns the visible pairs of a partial tile, or None if there are no others."""
        visible = None if self.mask is None else self._evaluate(self.mask, self.borders[0], (), place, shape)
        if self.size % shape[1]:
            # Keys past the end are masked. Queries past the end are cut off in the results.
            real = self.units.index(shape, 1) + place.key < self.size
            visible = real if visible is None else visible & real
        return visible

    def _evaluate(
        self, late: Late | None, borders: Sequence[Any], scores: tuple[Array, ...], place: Place, shape: tuple[int, int]
    ) -> Array:
        assert late is not None
        known = zip(late.borders, late.tables, strict=True)
        kept = iter(borders)
        given = [
            None if table is not None else self._border(border, next(kept), place, shape) for border, table in known
        ]
        return on_tile.evaluate(late, given, scores, shape, HOPPER)

    def _border(self, border: Border, array: Any, place: Place, shape: tuple[int, int]) -> Any:
        """Returns a border as a tile, or as a list of scalars."""
        row = place.batch if array.shape[0] > 1 else 0
        head = place.head if array.shape[1] > 1 else 0
        if not on_tile.tokens(border.reads):
            return [_typed(array[row, head, i], border) for i in range(border.entries)]
        axis = 0 if QUERY in border.reads else 1
        first = place.query if axis == 0 else place.key
        return _typed(self.units.vector(array, (row, head), first, axis, shape), border)


def _typed(x: Array, border: Border) -> Array:
    """Returns a border in its own dtype: booleans are read as integers."""
    return x != 0 if border.dtype == jnp.bool_ else x
