"""Which implementation serves a call of attention: what there is, in which order it is tried, and why not another.

The order depends on the platform. Inside `jax.jit` that is the one which the program is compiled for, and no function
knows it while it is traced: where platforms would take different kernels, the program holds a choice between them, of
which compiling leaves one.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from seqattn.kernels import cached, chunked, cudnn, guard, reference, shared_keys, splash, xla
from seqattn.kernels.call import Call, Kernel, Result, Shaped, check_sinks, is_known
from seqattn.platforms import all_platforms, by_platform, platform_of
from seqattn.sizes import may_exceed


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A kernel, and what is to be known of it before it is called.

    Attributes:
        attend: the kernel; it raises NotImplementedError, with the reason, for a call that it cannot serve.
        refuse: raises the same without computing; where not given, `attend` is traced to know.
        note: given the call, a sentence on its cost for `explain`, or None where there is nothing to say.
        reads_columns: whether it takes keys and values as a cache keeps them.
    """

    attend: Kernel
    refuse: Callable[[Call], None] | None = None
    note: Callable[[Call], str | None] | None = None
    reads_columns: bool = False

    def __call__(self, call: Call) -> Result:
        """What the kernel returns for a call, whose keys are brought into rows where it reads no columns."""
        return self.attend(call if self.reads_columns else cached.in_rows(call))

    def check(self, call: Call) -> None:
        """Raises NotImplementedError, with the reason, for a call that it cannot serve."""
        if self.refuse is None:
            jax.eval_shape(lambda: self(call))
        else:
            self.refuse(call if self.reads_columns else cached.as_if_in_rows(call))


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.attend, reference.refuse),
    "cached": Implementation(cached.attend, cached.refuse, reads_columns=True),
    "chunked": Implementation(chunked.attend, chunked.refuse),
    "xla": Implementation(xla.attend, xla.refuse, xla.note),
    "cudnn": Implementation(cudnn.attend, cudnn.refuse, guard.lse_note),
    "splash": Implementation(splash.attend, splash.refuse, guard.lse_note),
}
"""What `implementation=` may name."""

# On the CPU, by `python -m benchmarks.attention --shapes cpu-t64,decode`: calls of so few pairs cost more to start than
# to compute, and so few queries less than bringing all keys into tiles. All their scores are no more than one tile's.
TINY_PAIRS, FEW_QUERIES = 64 * 64, 16

FEW_OF_CACHE = 64
"""So many queries read a cache as it lies and compute all their scores at once; more read it in tiles."""


def serve(implementation: str | Sequence[str] | None, call: Call) -> Result:
    """What the first implementation returns that does not refuse, of those named or of the platform's order.

    Raises:
        ValueError: a name is unknown.
        NotImplementedError: none of them can serve the call; each one's reason.
    """
    if (platform := platform_of(jax.tree.leaves(call))) is not None:
        return _first_able(names(implementation, platform, call), dataclasses.replace(call, platform=platform))
    able = {each: _able(implementation, dataclasses.replace(call, platform=each)) for each in all_platforms()}
    if not able[jax.default_backend()]:
        # The reasons are those of the platform at hand, though another might be compiled for.
        here = dataclasses.replace(call, platform=jax.default_backend())
        return _first_able(names(implementation, here.platform, call), here)
    platforms: dict[tuple[str, ...], list[str]] = {}
    for each, ordered in able.items():
        if ordered:
            platforms.setdefault(ordered, []).append(each)
    branches: dict[str, Callable[[], Result]] = {}
    for ordered, alike in platforms.items():
        branch = _Branch(ordered, dataclasses.replace(call, platform=alike[0] if len(alike) == 1 else None))
        branches |= dict.fromkeys(alike, branch)
    return by_platform(branches)


@dataclasses.dataclass(frozen=True, eq=False)
class _Branch:
    """The call on some platforms, as a function without arguments."""

    names: Sequence[str]
    call: Call

    def __call__(self) -> Result:
        return _first_able(self.names, self.call)


def _able(implementation: str | Sequence[str] | None, call: Call) -> tuple[str, ...]:
    """The implementations to try on the call's platform, from the first one on that does not refuse."""
    ordered = names(implementation, call.platform, call)
    for i, name in enumerate(ordered):
        if _reason(name, call) is None:
            return ordered[i:]
    return ()


def _reason(name: str, call: Call) -> str | None:
    """Why an implementation refuses a call, of what is known before it runs."""
    try:
        IMPLEMENTATIONS[name].check(call)
    except NotImplementedError as reason:
        return str(reason)
    return None


def names(implementation: str | Sequence[str] | None, platform: str, call: Call) -> tuple[str, ...]:
    """The implementations to try on a platform, in order."""
    if implementation is None:
        ordered = order(platform, call.query, cached.as_if_in_rows(call).key)
        if call.columns is not None:
            many = may_exceed(call.query.shape[-3], FEW_OF_CACHE)
            ordered = (*ordered, "cached") if many else ("cached", *ordered)
        return tuple(name for name in ordered if name in IMPLEMENTATIONS)
    given = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not given:
        raise ValueError(f"implementation is empty; give one or more of {', '.join(IMPLEMENTATIONS)}, or None")
    unknown = [name for name in given if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"implementation {unknown[0]!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    return given


def order(platform: str, query: Shaped, key: Shaped) -> tuple[str, ...]:
    """Names in the order in which `None` tries them; a name that is not there is passed over."""
    if not is_known(query.shape, key.shape):
        return ("xla", "reference")
    own = {"gpu": ("cudnn",), "tpu": ("splash",)}.get(platform, ())
    tiny = query.shape[-3] < FEW_QUERIES or query.shape[-3] * key.shape[-3] <= TINY_PAIRS
    return own + (("xla", "reference", "chunked") if tiny else ("chunked", "xla", "reference"))


def _first_able(ordered: Sequence[str], call: Call) -> Result:
    """What the first of the named implementations returns that does not refuse."""
    reasons: dict[str, NotImplementedError] = {}
    for name in ordered:
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
    platform: str | None = None,
    **arguments: Any,
) -> Explanation:
    """Which implementation `attend` takes for the same arguments, and why not another. Nothing is computed.

    Args:
        query, key, value: as for `attend`, or their shapes and dtypes.
        implementation: as for `attend`.
        platform: "cpu", "gpu" or "tpu", for what is compiled for another machine; where not given, the one where the
            query lies, or JAX's default.
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
    if unknown := arguments.keys() - set(_OPTIONS):
        raise TypeError(f"explain takes the arguments of attend, and {', '.join(sorted(unknown))} is none of them")
    make = functools.partial(call_of, **arguments)
    return explain_call(implementation, make, (query, key, value), platform=platform)


_OPTIONS = tuple(x.name for x in inspect.signature(Call.of).parameters.values() if x.kind is x.KEYWORD_ONLY)


def call_of(query: Array, key: Array, value: Array, **options: Any) -> Call:
    """The call that `attend` makes of these arguments."""
    query, key, value, options = shared_keys.fold(query, key, value, dict.fromkeys(_OPTIONS) | options)
    return Call.of(query, key, value, **options)


def explain_call(
    implementation: str | Sequence[str] | None,
    make: Callable[..., Call],
    arrays: tuple[Any, ...],
    *,
    platform: str | None = None,
) -> Explanation:
    """`explain` for the call that `make` makes of arrays, or of their shapes and dtypes."""
    platform = platform_of(jax.tree.leaves(arrays)) if platform is None else platform
    here = jax.default_backend() if platform is None else platform
    refusals: dict[str, str | None] = {}
    notes: dict[str, str] = {}
    tried: list[str] = []

    def look(*arrays: Array) -> None:
        call = dataclasses.replace(make(*arrays), platform=here)
        tried.extend(names(implementation, here, call))
        for name, each in IMPLEMENTATIONS.items():
            refusals[name] = _reason(name, call)
            note = None if each.note is None or refusals[name] is not None else each.note(cached.in_rows(call))
            notes.update({} if note is None else {name: note})

    jax.eval_shape(look, *arrays)
    return Explanation(next((name for name in tried if refusals[name] is None), None), refusals, notes)
