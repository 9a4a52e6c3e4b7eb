"""The maker of a `BlockMask`: a mask whose tiles are found once and shared by many calls of `attend`."""

import math
from collections.abc import Sequence
from typing import Any

import jax

from seqattn.coordinates import Coordinates
from seqattn.kernels.block_mask import BlockMask, Visits
from seqattn.kernels.call import Call, Located, Shaped, locate
from seqattn.kernels.dispatch import call_of, find_visits
from seqattn.kernels.shared_keys import Folding
from seqattn.kernels.split import Split, repeats_keys
from seqattn.mask import Mask
from seqattn.score_mod import ScoreModLike


def block_mask(
    mask: Mask,
    query: Shaped,
    key: Shaped,
    value: Shaped,
    *,
    q_at: Coordinates | None = None,
    kv_at: Coordinates | None = None,
    score_mod: ScoreModLike = None,
    implementation: str | Sequence[str] | None = None,
    split: Split | None = None,
) -> BlockMask:
    """Returns a mask over coordinates with the tiles that a call of `attend` visits.

    A kernel skips the tiles that a mask does not reach. If coordinates are known only while the program runs, as those
    of packed documents, each call makes a list of tiles, and so does its backward pass. Layers with the same mask can
    share one list: make it before the layers, and pass it to `attend` as `mask`. The result of `attend` is the same.

    Args:
        mask: the mask.
        query: `[*batch, T, N, H]`, an array or a `jax.ShapeDtypeStruct`. Only shape and dtype are read, which with
            those of key and value decide the implementation and the size of its tiles.
        key: `[*batch, S, K, H]`, likewise.
        value: `[*batch, S, K, V]`, likewise.
        q_at: as in `attend`.
        kv_at: as in `attend`.
        score_mod: the score modification of the calls, if the choice of an implementation depends on it.
        implementation: as in `attend`.
        split: as in `attend`.

    Returns:
        A `BlockMask`. `print` shows the share of tiles that are visited, and a picture.

    Raises:
        TypeError: as `attend`, or `mask` is no `Mask`.
        ValueError: as `attend`.

    >>> import jax.numpy as jnp
    >>> from seqattn import attend
    >>> from seqattn.masks import Causal, SameSegment
    >>> packed = Coordinates.from_segments(jnp.array([1, 1, 1, 2, 2, 2, 2, 0]))
    >>> x = jnp.ones((8, 1, 4))
    >>> shared = block_mask(Causal() & SameSegment(), x, x, x, q_at=packed, kv_at=packed)
    >>> print(shared)
    And(first=Causal(), second=SameSegment()) visits 25.0% of the tiles of 1 queries and 1 keys
    #.......
    ##......
    ###.....
    ...#....
    ...##...
    ...###..
    ...####.
    ........
    >>> attend(x, x, x, mask=shared).shape
    (8, 1, 4)
    """
    if not isinstance(mask, Mask):
        raise TypeError(f"a BlockMask is made of a Mask, got {type(mask).__name__}")
    options: dict[str, Any] = {"mask": mask, "score_mod": score_mod, "q_at": q_at, "kv_at": kv_at}

    def make(*arrays: jax.Array) -> Call:
        return call_of(*arrays, **options, repeat=repeats_keys(split))

    arrays, visits = (query, key, value), Visits({}, None)
    if _has_lists(arrays, (mask, q_at, kv_at)):
        located = locate(query.shape, key.shape, mask, None, q_at, kv_at)
        visits = find_visits(implementation, make, arrays, _shapes(arrays, located), split)
    else:
        # For the errors of `attend`; nothing is computed.
        jax.eval_shape(lambda *arrays: make(*arrays).query, *arrays)
    at = {name: Coordinates.range(x.shape[-3]) for name, x in (("q_at", query), ("kv_at", key))}
    at |= {name: given for name, given in (("q_at", q_at), ("kv_at", kv_at)) if given is not None}
    return BlockMask(mask, **at, visits=visits)


def _has_lists(arrays: tuple[Shaped, ...], read: Any) -> bool:
    """Returns whether calls with these arrays, whose masks read these pytrees, can share lists of tiles."""
    # An empty call has no tiles. Rows that share their keys become queries of one row, which have other tiles.
    if any(0 in x.shape for x in arrays) or Folding.of(*arrays).shared:
        return False
    # Over Explicit mesh axes each operation on coordinates would need its result's sharding.
    given = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(read) if isinstance(x, jax.Array)]
    return not any(mesh.explicit_axes for mesh in (jax.sharding.get_abstract_mesh(), *given))


def _shapes(arrays: tuple[Shaped, ...], located: Located) -> Call:
    """Returns a call with one batch dim and the shapes of query, key and value in their place."""
    query, key, value = (jax.ShapeDtypeStruct((math.prod(x.shape[:-3]), *x.shape[-3:]), x.dtype) for x in arrays)
    return Call(query, key, value, **located, score_mod=None, rows=None, scale=1.0, dropout=None)
