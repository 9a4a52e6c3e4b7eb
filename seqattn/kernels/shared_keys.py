"""Keys and values of batch 1 with queries of a larger batch: many rows read one memory, without copies of it.

Rows that share their keys differ only in their queries, so they are computed as additional queries of one row.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.kernels.block_mask import opened
from seqattn.kernels.call import Call, Shaped
from seqattn.mask import Mask, reads
from seqattn.precision import accumulator
from seqattn.score_mod import ScoreMod
from seqattn.sizes import Size


@dataclasses.dataclass(frozen=True)
class Folding:
    """The batch dims that keys and values share, and how they are moved into the queries.

    Attributes:
        batch: the batch dims of the queries.
        shared: the indices of the batch dims in which keys and values have size 1.
        length: T, the queries of a row.
    """

    batch: tuple[Size, ...]
    shared: tuple[int, ...]
    length: Size

    @staticmethod
    def of(query: Shaped, key: Shaped, value: Shaped) -> "Folding":
        """Returns the folding of arrays `[*batch, length, heads, dim]`. Later checks refuse keys that do not fit."""
        batch, keys = query.shape[:-3], key.shape[:-3]
        alike = len(batch) == len(keys) and keys == value.shape[:-3]
        shared = tuple(i for i, n in enumerate(batch) if keys[i] == 1 and n != 1) if alike else ()
        return Folding(batch, shared, query.shape[-3] if shared else 0)

    def fold(self, x: Array) -> Array:
        """Moves the shared dims of `[*batch, T, ...]` into T: `[*batch, shared * T, ...]`, with each shared dim 1."""
        count = len(self.batch)
        kept = [i for i in range(count) if i not in self.shared]
        # Shared dims directly before T: then the reshape merges them, with T as the fastest dim.
        moved = x.transpose(*kept, *self.shared, *range(count, x.ndim))
        rows = (1 if i in self.shared else n for i, n in enumerate(x.shape[:count]))
        folded = math.prod(x.shape[i] for i in (*self.shared, count))
        return moved.reshape(*rows, folded, *x.shape[count + 1 :])

    def repeat(self, x: Array | np.ndarray, dims: int) -> Array:
        """Broadcasts keys, values or their coordinates `[*batch, ...]` to the rows of the queries.

        `dims` is the number of dims after the batch.
        """
        return jnp.broadcast_to(x, (*self.batch, *x.shape[x.ndim - dims :]))

    def unfold(self, x: Array) -> Array:
        """Inverts `fold`."""
        count = len(self.batch)
        kept = [i for i in range(count) if i not in self.shared]
        shared = [self.batch[i] for i in self.shared]
        length = self.length
        apart = x.reshape(*(self.batch[i] for i in kept), *shared, length, *x.shape[count + 1 :])
        order = np.argsort([*kept, *self.shared])
        return apart.transpose(*order, *range(count, apart.ndim))

    def coordinates(self, at: Coordinates | None, length: Size) -> Coordinates:
        """Returns the folded coordinates of queries `[T]` or `[*batch, T]`. Defaults to one text from position 0."""
        # Without coordinates each row counts from 0. This must be fixed before folding: the folded T would count
        # through.
        at = Coordinates.range(length) if at is None else at
        return jax.tree.map(lambda x: self.fold(jnp.broadcast_to(x, (*self.batch, length))), at)

    def pairs(self, x: Array | None, length: Size) -> Array | None:
        """Returns a folded mask or bias, `[T, S]` or `[*batch, N, T, S]` with any dim 1."""
        # A mask or bias without a query dim, equal for all shared rows, broadcasts over the folded queries as it is.
        if x is None or (x.ndim > 2 and x.shape[-2] == 1 and all(x.shape[i] == 1 for i in self.shared)):
            return x
        full = x.reshape((1,) * (len(self.batch) + 3 - x.ndim) + x.shape)
        rows = (self.batch[i] if i in self.shared else n for i, n in enumerate(full.shape[: len(self.batch)]))
        full = jnp.broadcast_to(full, (*rows, full.shape[-3], length, full.shape[-1]))
        return self.fold(full.swapaxes(-3, -2)).swapaxes(-3, -2)


def fold(
    query: Array, key: Array, value: Array, options: dict[str, Any], *, repeat: bool = False
) -> tuple[Array, Array, Array, dict[str, Any]]:
    """Returns the arguments of `seqattn.attend` with queries that share their keys as additional queries of one row.

    If rows differ in more than their queries (dropout, coordinates of keys by row, a mask or a score modification that
    reads `query.batch`), or with `repeat`, keys and values are repeated instead.

    Raises:
        TypeError: as the same call with repeated keys.
        ValueError: as the same call with repeated keys. After folding, an array that fits no row could fit the folded
            one.
    """
    folding = Folding.of(query, key, value)
    if not folding.shared:
        return query, key, value, options
    # The lists of a `BlockMask` are not those of the folded call.
    mask, q_at, kv_at, _ = opened(options["mask"], options["q_at"], options["kv_at"])
    options = options | {"mask": mask, "q_at": q_at, "kv_at": kv_at}
    # Checked on the call as the user wrote it, so that messages name the user's shapes; nothing is computed.
    jax.eval_shape(functools.partial(_check, folding, options), query, key, value)
    if repeat or _must_repeat(query, key, options):
        return query, *_repeated(folding, key, value, options)
    length, size, mask = query.shape[-3], key.shape[-3], options["mask"]
    bias = None if options["bias"] is None else folding.pairs(jnp.asarray(options["bias"]), length)
    if mask is not None and not isinstance(mask, Mask):
        mask = folding.pairs(jnp.asarray(mask), length)
    folded = options | {"mask": mask, "bias": bias}
    # Implicit coordinates must become explicit: after folding, T no longer equals the length of a row.
    if _is_located(options):
        kv_at = Coordinates.range(size) if options["kv_at"] is None else options["kv_at"]
        folded |= {"q_at": folding.coordinates(options["q_at"], length), "kv_at": kv_at}
    return folding.fold(query), key, value, folded


def _check(folding: Folding, options: dict[str, Any], query: Array, key: Array, value: Array) -> None:
    """Raises the errors of the call with repeated keys."""
    key, value, options = _repeated(folding, key, value, options)
    Call.of(query, key, value, **options)


def _repeated(
    folding: Folding, key: Array, value: Array, options: dict[str, Any]
) -> tuple[Array, Array, dict[str, Any]]:
    """Returns keys, values and options with the keys and their coordinates repeated for each row of the queries."""
    kv_at, own = options["kv_at"], (*key.shape[:-3], key.shape[-3])
    if kv_at is not None:
        kv_at = jax.tree.map(lambda x: folding.repeat(x, 1) if x.shape == own else x, kv_at)
    return folding.repeat(key, 3), folding.repeat(value, 3), options | {"kv_at": kv_at}


def _is_located(options: dict[str, Any]) -> bool:
    """Returns whether the positions of queries and keys matter."""
    mod = options["score_mod"]
    return isinstance(options["mask"], Mask) or (mod is not None and ScoreMod.of(mod).uses_coordinates)


def _must_repeat(query: Array, key: Array, options: dict[str, Any]) -> bool:
    """Returns whether rows differ in more than their queries."""
    q_at, kv_at, mod = options["q_at"], options["kv_at"], options["score_mod"]
    # Dropout counts rows of the batch: folded, the same weight would have another index.
    if options["dropout"] is not None:
        return True
    if not _is_located(options):
        return False
    if kv_at is not None and any(x.shape[:-1] not in ((), key.shape[:-3]) for x in jax.tree.leaves(kv_at)):
        return True
    at = tuple(Coordinates.range(1) if x is None else x for x in (q_at, kv_at))
    # A trace tells whether a mask or a score modification reads the row's index, which folding changes.
    predicates = [options["mask"]] if isinstance(options["mask"], Mask) else []
    if mod is not None:
        flat = query.reshape(-1, *query.shape[-3:])
        predicates.append(_Modified(ScoreMod.of(mod).prepare(flat, *at), accumulator(query.dtype)))
    return any(reads(each, *at).batch for each in predicates)


@dataclasses.dataclass(frozen=True)
class _Modified(Mask):
    """A predicate that reads what a score modification reads, so that `reads` applies to it."""

    mod: ScoreMod
    dtype: Any

    def __call__(self, query: Coordinates, key: Coordinates) -> Array:
        row = jnp.zeros(self.mod.row_size, self.dtype) if self.mod.row_size else None
        return self.mod(jnp.zeros((), self.dtype), query, key, jnp.asarray(query.head), row) > 0
