"""The maker of a `BlockMask`: a mask whose tiles are found once and shared by many calls of `attend`."""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from seqattn.coordinates import Coordinates
from seqattn.kernels.block_mask import BlockMask, Visits
from seqattn.kernels.call import Call, Located, Shaped, locate
from seqattn.kernels.dispatch import IMPLEMENTATIONS, call_of, choices, with_mesh
from seqattn.kernels.shared_keys import Folding
from seqattn.kernels.split import Split, find_in_shares, repeats_keys
from seqattn.mask import Mask
from seqattn.platforms import all_platforms, by_platform, platform_of
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
        visits = _find_visits(implementation, make, arrays, _shapes(arrays, located), split)
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


def _find_visits(
    implementation: str | Sequence[str] | None,
    make: Callable[..., Call],
    arrays: tuple[Shaped, ...],
    call: Call,
    split: Split | None = None,
) -> Visits:
    """Returns the tiles that a call visits, for the implementation that runs on each platform that it may run on.

    Args:
        implementation: as in `attend`.
        make: returns the call for query, key and value.
        arrays: query, key and value; shapes and dtypes suffice.
        call: the same call with the shapes and dtypes of query, key and value in their place.
        split: as in `attend`.
    """
    read = jax.tree.leaves((call.mask, call.q_at, call.kv_at))
    # Inside a trace this array is traced as well, and the platform unknown.
    here = platform_of([*read, lax.iota(jnp.int32, 1)])
    here = here if split is None or split.platform is None else split.platform
    chosen: dict[str, set[str]] = {}

    def look(*arrays: Array) -> None:
        made = make(*arrays)
        for platform in all_platforms() if here is None else (here,):
            for name in choices(implementation, dataclasses.replace(made, platform=platform), split)[:1]:
                chosen.setdefault(name, set()).add(platform)

    jax.eval_shape(look, *arrays)
    known = not any(isinstance(x, jax.Array) for x in read)
    found = {}
    for name, platforms in sorted(chosen.items()):
        if (of_kernel := IMPLEMENTATIONS[name].find) is not None:
            find = functools.partial(_find, of_kernel, call, split)
            found[name] = find() if known or here is not None else _find_on(platforms, find)
    by_name = {name: each for name, each in found.items() if each is not None}
    return Visits(by_name, None if split is None else with_mesh(split))


def _find(find: Callable[[Call], Any], call: Call, split: Split | None) -> Any:
    """Returns the tiles that a kernel visits for a call."""
    return find(call) if split is None else find_in_shares(find, call, split)


def _find_on(platforms: Collection[str], find: Callable[[], Any]) -> Any:
    """Returns the tiles that a kernel visits in programs for some platforms, and zeros in others, which read none."""
    structure: list[Any] = []

    def leaves() -> list[Any]:
        leaves, tree = jax.tree.flatten(find())
        structure.append(tree)
        return leaves

    types = jax.eval_shape(leaves)

    def nothing() -> Any:
        return jax.tree.unflatten(structure[0], [jnp.zeros(x.shape, x.dtype) for x in types])

    return by_platform({each: find if each in platforms else nothing for each in all_platforms()})
