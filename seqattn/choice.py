"""Which implementation serves a call of attention: what there is, in which order it is tried, and why not another."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from seqattn.kernels import cached, chunked, reference, shared_keys, vendor
from seqattn.kernels.call import Call, Kernel, Result, Shaped, check_sinks, is_known
from seqattn.sizes import may_exceed


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A kernel, and what is to be known of its cost.

    Attributes:
        attend: the kernel; it raises NotImplementedError, with the reason, for a call that it cannot serve.
        note: given the call, a sentence for `explain`, or None where there is nothing to say.
        reads_columns: whether it takes keys and values as a cache keeps them.
    """

    attend: Kernel
    note: Callable[[Call], str | None] | None = None
    reads_columns: bool = False

    def __call__(self, call: Call) -> Result:
        """What the kernel returns for a call, whose keys are brought into rows where it reads no columns."""
        return self.attend(call if self.reads_columns else cached.in_rows(call))


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.attend),
    "cached": Implementation(cached.attend, reads_columns=True),
    "chunked": Implementation(chunked.attend),
    "xla": Implementation(vendor.xla, vendor.xla_note),
    "cudnn": Implementation(vendor.cudnn, vendor.lse_note),
    "splash": Implementation(vendor.splash, vendor.lse_note),
}
"""What `implementation=` may name."""

# On the CPU, by `python -m benchmarks.attention --shapes cpu-t64,decode`: calls of so few pairs cost more to start than
# to compute, and so few queries less than bringing all keys into tiles.
TINY_PAIRS, FEW_QUERIES = 64 * 64, 16

FEW_OF_CACHE = 64
"""So many queries read a cache as it lies and compute all their scores at once; more read it in tiles."""


def to_try(
    implementation: str | Sequence[str] | None, query: Shaped, key: Shaped, *, columns: bool = False
) -> list[str]:
    """The implementations to try, in order; `columns` says that keys lie as a cache keeps them."""
    if implementation is None:
        ordered = order(vendor.platform(query), query, key)
        if columns:
            ordered = (*ordered, "cached") if may_exceed(query.shape[-3], FEW_OF_CACHE) else ("cached", *ordered)
        return [name for name in ordered if name in IMPLEMENTATIONS]
    names = [implementation] if isinstance(implementation, str) else list(implementation)
    if not names:
        raise ValueError(f"implementation is empty; give one or more of {', '.join(IMPLEMENTATIONS)}, or None")
    unknown = [name for name in names if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"implementation {unknown[0]!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    return names


def order(platform: str, query: Shaped, key: Shaped) -> tuple[str, ...]:
    """Names in the order in which `None` tries them; a name that is not there is passed over."""
    if not is_known(query.shape, key.shape):
        return ("xla", "reference")
    if platform in ("gpu", "cuda", "rocm"):
        return ("cudnn", "chunked", "xla", "reference")
    if platform == "tpu":
        return ("splash", "chunked", "xla", "reference")
    tiny = query.shape[-3] < FEW_QUERIES or query.shape[-3] * key.shape[-3] <= TINY_PAIRS
    return ("xla", "reference", "chunked") if tiny else ("chunked", "xla", "reference")


def first_able(names: Sequence[str], call: Call) -> Result:
    """What the first of the named implementations returns that does not refuse."""
    reasons: dict[str, NotImplementedError] = {}
    for name in names:
        try:
            return _without_explicit_axes(IMPLEMENTATIONS[name], call)
        except NotImplementedError as reason:
            reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no implementation can serve this call: {told}") from next(iter(reasons.values()), None)


def _without_explicit_axes(kernel: Kernel, call: Call) -> Result:
    """What the kernel returns, split over a mesh as the query is.

    Over the axes of a mesh that are Explicit each operation would have to be told how its result is split, so inside
    the compiler decides, as it does over Auto axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return kernel(call)
    batch, length, heads, _ = (*jax.typeof(call.query).sharding.spec, *[None] * 4)[:4]
    split = jax.sharding.PartitionSpec(batch, length, heads, None), jax.sharding.PartitionSpec(batch, length, heads)
    leaves, tree = jax.tree.flatten(call)
    arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def run(*values: Array) -> Result:
        known = dict(zip(arrays, values, strict=True))
        return kernel(jax.tree.unflatten(tree, [known.get(i, x) for i, x in enumerate(leaves)]))

    here = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=split)
    return here(*(leaves[i] for i in arrays))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which implementation a call of `attend` takes, and what the others say; printed as a table.

    Attributes:
        chosen: its name, or None where all that may be chosen refuse.
        refusals: for each implementation its reason to refuse the call, or None where it would run.
        notes: what is to be known of the cost of those that would run, where there is something.
    """

    chosen: str | None
    refusals: dict[str, str | None]
    notes: dict[str, str]

    def __str__(self) -> str:
        return "\n".join(map(self._line, self.refusals))

    def _line(self, name: str) -> str:
        width = max(map(len, self.refusals))
        mark, reason = "->" if name == self.chosen else "  ", self.refusals[name]
        said = f"refuses: {reason}" if reason is not None else "would run"
        note = f" ({self.notes[name]})" if name in self.notes else ""
        return f"{mark} {name:{width}}  {said}{note}"


def explain(
    query: Shaped,
    key: Shaped,
    value: Shaped,
    *,
    implementation: str | Sequence[str] | None = None,
    **arguments: Any,
) -> Explanation:
    """Which implementation `attend` takes for the same arguments, and why not another. Nothing is computed.

    Args:
        query, key, value: as for `attend`, or their shapes and dtypes.
        implementation: as for `attend`.
        **arguments: all others of `attend`.

    Raises:
        TypeError, ValueError: those of `attend`, for a call that no implementation would be asked to serve.

    >>> import jax.numpy as jnp
    >>> from seqattn.masks import Causal
    >>> states = jnp.zeros((5, 1, 2))
    >>> told = explain(states, states, states, mask=Causal(), implementation="reference")
    >>> print(str(told).splitlines()[0])
    -> reference  would run
    """
    check_sinks(arguments.pop("sinks", None), query)
    arguments.pop("return_lse", None)  # what becomes of the output is no matter of a kernel
    optional = ("mask", "bias", "score_mod", "q_at", "kv_at", "scale", "dropout")
    if unknown := arguments.keys() - set(optional):
        raise TypeError(f"explain takes the arguments of attend, and {', '.join(sorted(unknown))} is none of them")
    options: dict[str, Any] = {**dict.fromkeys(optional), **arguments}
    refusals: dict[str, str | None] = {}
    notes: dict[str, str] = {}

    def probe(name: str, *arrays: Array) -> Result:
        folded, key, value, rest = shared_keys.fold(arrays[0], arrays[1], arrays[2], options)
        call, kernel = Call.of(folded, key, value, **rest), IMPLEMENTATIONS[name]
        note = None if kernel.note is None else kernel.note(call)
        result = kernel(call)
        notes.update({} if note is None else {name: note})
        return result

    for name in IMPLEMENTATIONS:
        try:
            jax.eval_shape(functools.partial(probe, name), query, key, value)
            refusals[name] = None
        except NotImplementedError as reason:
            refusals[name] = str(reason)
    able = (name for name in to_try(implementation, query, key) if refusals[name] is None)
    return Explanation(next(able, None), refusals, notes)
