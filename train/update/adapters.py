"""Low-rank adapters (Hu 2021): small matrices that are trained in place of the kernels of a model.

The parameters of the model stay as they are. A kernel `[in, out]` acts as `kernel + scale * a @ b`, with `a` `[in,
rank]`, `b` `[rank, out]` and `scale = alpha / rank`: equation 3, with kernels transposed as in JAX. The sum is made
before the model computes, so that modules, caches and decoding know nothing of adapters.
"""

import dataclasses
import zlib
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from seqattn.checks import check_integer, check_number
from seqattn.models.parameter_rules import rule_of
from seqattn.nn.initializers import normal
from seqattn.nn.parameter_rule import Kind
from seqattn.precision import widened
from seqattn.pytrees import pytree, static
from train.update.parameters import check_patterns, paths

Tuned = Mapping[str, Any]
"""What is trained, by the keys of its path: an `Adapter` for a kernel, an array for another parameter."""


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Low-rank adapters of some kernels (Hu 2021, section 4.1). All other parameters are frozen."""

    rank: int = 8
    """Rank of the change of a kernel: at least 1, and at most the smaller side of every adapted kernel."""
    alpha: float = 16.0
    """The change is multiplied by alpha / rank, so that another rank needs no other learning rate."""
    only: tuple[str, ...] = ("*attention/query/kernel", "*attention/value/kernel")
    """Kernels to adapt, as glob patterns of their paths; by default of queries and values (Hu 2021, section 5)."""
    train: tuple[str, ...] = ()
    """Parameters to train as they are, as glob patterns of their paths, such as `head/*` or `*norm*`."""

    def __post_init__(self) -> None:
        check_integer("rank", self.rank, 1)
        check_number("alpha", self.alpha, above=0)
        if not self.only:
            raise ValueError(f"only ({self.only}) must have a pattern of the kernels to adapt")


@pytree
@dataclasses.dataclass(frozen=True)
class Adapter:
    """The change of one kernel `[in, out]`.

    Attributes:
        a: normal at first, with a variance of 1 / in. The paper leaves the variance open; this one keeps that of the
            input.
        b: zeros at first, so that the first update starts at the exact kernel.
        scale: alpha / rank.
    """

    a: Float[Array, "in rank"]
    b: Float[Array, "rank out"]
    scale: float = static()


def drawn(params: Any, adapters: LowRank, *, seed: int) -> Tuned:
    """Returns what is trained before the first update.

    Args:
        params: the parameters of the model, an `nnx.State`.
        adapters: which kernels to adapt, and how.
        seed: the seed of the random matrices. They depend only on the seed and the path.

    Raises:
        ValueError: a pattern of `only` matches no kernel of two axes, or one of `train` no parameter; the rank exceeds
            a side of a kernel; `train` matches an adapted kernel or running statistics. The message names the path.
    """
    arrays = dict(zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True))
    kernels = _kernels(arrays, adapters)
    check_patterns(params, adapters.train)
    found: dict[str, Any] = {}
    for path, array in arrays.items():
        wanted = _matches(path, adapters.train)
        if wanted and (path in kernels or _kind(path) is Kind.STATISTIC):
            what = "is adapted" if path in kernels else "follows the batches anyway"
            raise ValueError(f"adapters.train ({', '.join(adapters.train)}) matches {path}, which {what}")
        if wanted:
            # A copy: an update is donated the buffers of both.
            found[path] = jnp.array(array)
        elif path in kernels:
            found[path] = _begun(path, array, adapters, seed)
    return _nested(found)


def merged(params: Any, tuned: Tuned) -> Any:
    """Returns the parameters that a model computes with: what is trained in place of what it was trained from.

    The sums are made in float32 or wider, on the devices of each kernel. Differentiable.

    Args:
        params: the parameters of the model.
        tuned: what is trained, as from `drawn`.

    >>> adapter = Adapter(jnp.ones((2, 1)), jnp.array([[1.0, 0.0, 2.0]]), scale=2.0)
    >>> merged({"query": {"kernel": jnp.ones((2, 3))}}, {"query": {"kernel": adapter}})["query"]["kernel"]
    Array([[3., 1., 5.],
           [3., 1., 5.]], dtype=float32)
    """
    is_adapter = lambda node: isinstance(node, Adapter)  # noqa: E731
    nodes, _ = jax.tree_util.tree_flatten_with_path(tuned, is_leaf=is_adapter)
    changed = {jax.tree_util.keystr(path, simple=True, separator="/"): node for path, node in nodes}

    def one(kernel: Array, path: str) -> Array:
        node = changed.get(path)
        if not isinstance(node, Adapter):
            return kernel if node is None else node.astype(kernel.dtype)
        place = None if isinstance(kernel, jax.core.Tracer) else getattr(kernel, "sharding", None)
        # Where a kernel is spread over devices, its change is computed there, and spread in the same way.
        add = _sum if place is None or len(place.device_set) == 1 else jax.jit(_sum, out_shardings=place)
        return add(kernel, node)

    return jax.tree.map(one, params, paths(params))


def _sum(kernel: Float[Array, "in out"], adapter: Adapter) -> Float[Array, "in out"]:
    # The default precision of accelerators would round the factors to bfloat16.
    change = jnp.matmul(adapter.a, adapter.b, precision=jax.lax.Precision.HIGHEST)
    return (widened(kernel) + adapter.scale * change).astype(kernel.dtype)


def _begun(path: str, kernel: Any, adapters: LowRank, seed: int) -> Adapter:
    rows, columns = kernel.shape
    dtype = jnp.promote_types(kernel.dtype, jnp.float32)
    # A checksum, since Python's hash of a string differs from process to process. A word of its own, since `redraw`
    # draws the kernel itself from the same seed and path.
    key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(f"adapter {path}".encode()))
    a = normal(rows**-0.5)(key, (rows, adapters.rank)).astype(dtype)
    return Adapter(a, jnp.zeros((adapters.rank, columns), dtype), scale=adapters.alpha / adapters.rank)


def _kernels(arrays: Mapping[str, Any], adapters: LowRank) -> set[str]:
    """The paths of the kernels to adapt."""
    able = {path: array for path, array in arrays.items() if array.ndim == 2 and _is_kernel(path)}
    check_patterns(able, adapters.only, "kernel of two axes")
    found = {path for path in able if _matches(path, adapters.only)}
    for path in sorted(found):
        if adapters.rank > min(shape := arrays[path].shape):
            raise ValueError(
                f"rank ({adapters.rank}) must be at most {min(shape)}, the smaller side of {path} {list(shape)}"
            )
    return found


def _is_kernel(path: str) -> bool:
    rule = rule_of(path)
    return rule is not None and rule.kind in (Kind.MATRIX, Kind.LOGITS) and rule.outputs == -1


def _kind(path: str) -> Kind | None:
    rule = rule_of(path)
    return None if rule is None else rule.kind


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in patterns)


def _nested(found: Mapping[str, Any]) -> dict[str, Any]:
    """Nests values by the keys of their paths: the names of a checkpoint must not hold "/"."""
    tree: dict[str, Any] = {}
    for path, value in found.items():
        *outer, last = path.split("/")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = value
    return tree
