"""Dispatch: which implementation serves a call of attention, in which order they are tried, and why others refuse.

The order depends on the platform. Inside `jax.jit` that is the platform that the program is compiled for, which is not
known at trace time. If platforms would take different kernels, the traced program holds a choice between them;
compilation keeps one branch.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jaxtyping import Array

from seqattn.kernels import (
    cached,
    chunked,
    cudnn,
    guard,
    hopper,
    hopper_cached,
    reference,
    shared_keys,
    splash,
    tokamax,
    tpu,
    tpu_cached,
    xla,
)
from seqattn.kernels.block_mask import Visits
from seqattn.kernels.call import Call, Kernel, Result, Shaped, check_sinks, is_known
from seqattn.kernels.split import Split, repeats_keys, spread
from seqattn.kernels.split import check as check_split
from seqattn.platforms import all_platforms, by_platform, platform_of
from seqattn.sizes import may_exceed


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A kernel with its properties for the dispatcher.

    Attributes:
        attend: the kernel. Raises NotImplementedError, with the reason, for a call that it cannot serve.
        refuse: raises the same without computing. If None, `attend` is traced instead.
        note: takes the call and returns a sentence on its cost for `explain`, or None.
        reads_columns: True if the kernel reads keys and values in the layout of a cache.
        in_shares: True if the compiler cannot split the kernel over a mesh, so that each device must run it on its own
            share of the call.
        typed: False if the kernel does not state to `jax.shard_map` over which mesh axes its results vary.
        rings: True if the ring replaces the kernel where a sequence is split.
        find: returns the tiles that the kernel visits for a call, of which it reads sizes, mask and coordinates: a
            pytree that the kernel then reads from `call.visits`. None for a kernel without such tiles.
    """

    attend: Kernel
    refuse: Callable[[Call], None] | None = None
    note: Callable[[Call], str | None] | None = None
    reads_columns: bool = False
    in_shares: bool = False
    typed: bool = True
    rings: bool = False
    find: Callable[[Call], Any] | None = None

    def __call__(self, call: Call) -> Result:
        """Runs the kernel. Converts the keys to rows first if the kernel reads no columns."""
        return self.attend(call if self.reads_columns else cached.in_rows(call))

    def check(self, call: Call, split: Split | None = None) -> None:
        """Raises NotImplementedError, with the reason, if the kernel cannot serve the call."""
        call = Visits.of_whole(call)
        rows = cached.as_if_in_rows(call)
        if split is not None and self.in_shares and not rows.is_empty:
            check_split(rows, split, rings=self.rings)
        if self.refuse is None:
            # A plug-in without `refuse` refuses while it is traced; tracing computes nothing.
            jax.eval_shape(lambda: self(call))
        else:
            self.refuse(call if self.reads_columns else rows)


IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.attend, reference.refuse),
    "cached": Implementation(cached.attend, cached.refuse, reads_columns=True),
    "tpu_cached": Implementation(tpu_cached.attend, tpu_cached.refuse, reads_columns=True, in_shares=True, typed=False),
    "hopper_cached": Implementation(
        hopper_cached.attend, hopper_cached.refuse, reads_columns=True, in_shares=True, typed=False
    ),
    "chunked": Implementation(
        chunked.attend, chunked.refuse, chunked.note, in_shares=True, rings=True, find=chunked.find
    ),
    "tpu": Implementation(tpu.attend, tpu.refuse, tpu.note, in_shares=True, typed=False, find=tpu.find),
    "hopper": Implementation(hopper.attend, hopper.refuse, hopper.note, in_shares=True, typed=False),
    "xla": Implementation(xla.attend, xla.refuse, xla.note),
    "cudnn": Implementation(cudnn.attend, cudnn.refuse, guard.lse_note, in_shares=True, typed=False),
    "splash": Implementation(splash.attend, splash.refuse, guard.lse_note, in_shares=True, typed=False),
    "tokamax": Implementation(tokamax.attend, tokamax.refuse, tokamax.note, in_shares=True, typed=False),
}
"""The names that `implementation` accepts."""

# Measured on the CPU with `python -m benchmarks.attention --shapes cpu-t64,decode`. For so few pairs the start of the
# tile loop costs more than the computation; for so few queries, tiling the keys does. Their scores fit in one tile.
TINY_PAIRS, FEW_QUERIES = 64 * 64, 16

FEW_OF_CACHE = 64
"""Up to this many queries read a cache in its own layout, with all scores in memory; more queries use tiles."""


def serve(implementation: str | Sequence[str] | None, call: Call, split: Split | None = None) -> Result:
    """Runs the first implementation that does not refuse, among the named ones or in the platform's order.

    Over Explicit mesh axes the type of the queries states how the call is split; over Auto axes `split` does.

    Raises:
        ValueError: a name is unknown.
        NotImplementedError: none of them can serve the call. The message holds each one's reason.
    """
    split = Split.of(cached.as_if_in_rows(call), split)
    # A mesh of devices tells the platform, also of devices that this machine lacks.
    platform = platform_of(jax.tree.leaves(call)) if split is None or split.platform is None else split.platform
    if platform is not None:
        return _first_able(names(implementation, platform, call), dataclasses.replace(call, platform=platform), split)
    # Traced: the platform is unknown until the program is lowered, so each platform's choice is worked out now.
    able = {each: choices(implementation, dataclasses.replace(call, platform=each), split) for each in all_platforms()}
    if not able[jax.default_backend()]:
        # Report the reasons for the local platform, though the program may be compiled for another.
        here = dataclasses.replace(call, platform=jax.default_backend())
        return _first_able(names(implementation, here.platform, call), here, split)
    # Platforms with the same choice share one branch, which is traced once.
    platforms: dict[tuple[str, ...], list[str]] = {}
    for each, ordered in able.items():
        if ordered:
            platforms.setdefault(ordered, []).append(each)
    branches: dict[str, Callable[[], Result]] = {}
    for ordered, alike in platforms.items():
        # A shared branch knows no platform: its kernels must then make no assumption about one.
        branch = _Branch(ordered, dataclasses.replace(call, platform=alike[0] if len(alike) == 1 else None), split)
        branches |= dict.fromkeys(alike, branch)
    return by_platform(branches)


@dataclasses.dataclass(frozen=True, eq=False)
class _Branch:
    """The call on some platforms, as a function without arguments.

    Compared by identity, so that `by_platform` merges only the platforms that share this object.
    """

    names: Sequence[str]
    call: Call
    split: Split | None

    def __call__(self) -> Result:
        return _first_able(self.names, self.call, self.split)


def choices(implementation: str | Sequence[str] | None, call: Call, split: Split | None) -> tuple[str, ...]:
    """Returns the implementations to try on the call's platform, starting at the first that does not refuse."""
    ordered = names(implementation, call.platform, call)
    for i, name in enumerate(ordered):
        if _reason(name, call, split) is None:
            return ordered[i:]
    return ()


def _reason(name: str, call: Call, split: Split | None) -> str | None:
    """Returns why an implementation refuses a call, or None if it does not; nothing is computed."""
    try:
        IMPLEMENTATIONS[name].check(call, split)
    except NotImplementedError as reason:
        return str(reason)
    return None


def with_mesh(split: Split) -> Split:
    """Returns a split with its mesh. Without one it is over that of `jax.set_mesh`, which may change."""
    return dataclasses.replace(split, mesh=split.resolved())


def names(implementation: str | Sequence[str] | None, platform: str, call: Call) -> tuple[str, ...]:
    """Returns the names of the implementations to try on a platform, in order.

    Raises:
        ValueError: `implementation` is empty or holds an unknown name.
    """
    if implementation is None:
        ordered = order(platform, call.query, cached.as_if_in_rows(call).key)
        if call.columns is not None:
            # A symbolic number of queries may exceed the limit, so it counts as many.
            many = may_exceed(call.query.shape[-3], FEW_OF_CACHE)
            # `hopper_cached` runs by name only, as `hopper` does: see `order`.
            first = ("tpu_cached", "cached") if platform == "tpu" else ("cached",)
            ordered = (*ordered, "cached") if many else (*first, *ordered)
        return tuple(name for name in ordered if name in IMPLEMENTATIONS)
    given = (implementation,) if isinstance(implementation, str) else tuple(implementation)
    if not given:
        raise ValueError(f"implementation is empty; give one or more of {', '.join(IMPLEMENTATIONS)}, or None")
    unknown = [name for name in given if name not in IMPLEMENTATIONS]
    if unknown:
        raise ValueError(f"implementation {unknown[0]!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    return given


def order(platform: str, query: Shaped, key: Shaped) -> tuple[str, ...]:
    """Returns the names in the order in which `None` tries them. Names without an implementation are skipped."""
    # Tiles need numbers: with symbolic sizes only the kernels that keep all scores remain.
    if not is_known(query.shape, key.shape):
        return ("xla", "reference")
    tiny = query.shape[-3] < FEW_QUERIES or query.shape[-3] * key.shape[-3] <= TINY_PAIRS
    # A kernel for the device comes first there, in an order that has not been measured yet. Both kernels for TPUs have
    # been compiled for v5e, v5p and v6e; `tpu` has larger tiles than `splash` and skips those that are empty at run
    # time. Few pairs fill no tile of it.
    # `hopper` runs by name only, until a GPU has shown that it is right: its products were only compiled. So does
    # `tokamax`: nothing of it has been measured on a device.
    own = {"gpu": ("cudnn",), "tpu": () if tiny else ("tpu", "splash")}.get(platform, ())
    return own + (("xla", "reference", "chunked") if tiny else ("chunked", "xla", "reference"))


def _first_able(ordered: Sequence[str], call: Call, split: Split | None) -> Result:
    """Returns the result of the first named implementation that does not refuse."""
    reasons: dict[str, NotImplementedError] = {}
    for name in ordered:
        # A kernel may still refuse at this point, if its reason only shows while it is traced.
        try:
            return _in_shares(IMPLEMENTATIONS[name], call, split)
        except NotImplementedError as reason:
            reasons[name] = reason
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    raise NotImplementedError(f"no implementation can serve this call: {told}") from next(iter(reasons.values()), None)


def _in_shares(implementation: Implementation, call: Call, split: Split | None) -> Result:
    """Runs an implementation on each device's share of the call, or on the whole call if the compiler can split it."""
    if split is None or not implementation.in_shares or cached.as_if_in_rows(call).is_empty:
        # The compiler splits such a kernel by itself.
        return _without_explicit_axes(implementation, Visits.of_whole(call))
    call = call if implementation.reads_columns else cached.in_rows(call)
    if call.visits is not None and call.visits.split != with_mesh(split):
        call = dataclasses.replace(call, visits=None)
    check_split(cached.as_if_in_rows(call), split, rings=implementation.rings)
    return spread(implementation, call, split, typed=implementation.typed)


def _without_explicit_axes(kernel: Kernel, call: Call) -> Result:
    """Runs the kernel under automatic sharding and returns results sharded as the query is.

    Over Explicit mesh axes each operation would need its result's sharding. Inside this function the compiler decides,
    as it does over Auto axes.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.explicit_axes:
        return kernel(call)
    # The output and the log-sum-exp have one entry for each query and head, so they take over the query's sharding.
    batch, length, heads, _ = (*jax.typeof(call.query).sharding.spec, *[None] * 4)[:4]
    split = jax.sharding.PartitionSpec(batch, length, heads, None), jax.sharding.PartitionSpec(batch, length, heads)
    leaves, tree = jax.tree.flatten(call)
    # `auto_axes` converts arrays only. All other leaves (numbers, NumPy coordinates) stay known at trace time.
    arrays = [i for i, x in enumerate(leaves) if isinstance(x, jax.Array)]

    def run(*values: Array) -> Result:
        known = dict(zip(arrays, values, strict=True))
        return kernel(jax.tree.unflatten(tree, [known.get(i, x) for i, x in enumerate(leaves)]))

    here = jax.sharding.auto_axes(run, axes=mesh.explicit_axes, out_sharding=split)
    return here(*(leaves[i] for i in arrays))


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The implementation that a call of `attend` uses, and why the others would not run; prints as a table.

    Attributes:
        chosen: the name of the chosen implementation, or None if all candidates refuse.
        refusals: for each implementation, its reason to refuse the call, or None if it would run.
        notes: remarks on the cost of the implementations that would run, by name.
    """

    chosen: str | None
    refusals: dict[str, str | None]
    notes: dict[str, str]

    def __str__(self) -> str:
        """Returns one line for each implementation, with an arrow at the chosen one."""
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
    """Explains which implementation `attend` would use for these arguments, and why others would not run.

    Computes nothing: shapes and dtypes suffice.

    Args:
        query: `[*batch, T, N, H]`, an array or a `jax.ShapeDtypeStruct`.
        key: `[*batch, S, K, H]`, an array or a `jax.ShapeDtypeStruct`.
        value: `[*batch, S, K, V]`, an array or a `jax.ShapeDtypeStruct`.
        implementation: as in `attend`.
        platform: "cpu", "gpu" or "tpu", to explain a call that is compiled for another machine. Defaults to the
            platform of the query, or JAX's default.
        **arguments: all other arguments of `attend`.

    Returns:
        An `Explanation`: `chosen` is a name or None, `refusals` holds the reasons, and `print` shows a table.

    Raises:
        TypeError: as `attend`, or an argument is none of `attend`.
        ValueError: as `attend`, or the platform is unknown.

    >>> import jax.numpy as jnp
    >>> from seqattn.masks import Causal
    >>> states = jnp.zeros((5, 1, 2))
    >>> told = explain(states, states, states, mask=Causal(), implementation="reference")
    >>> print(str(told).splitlines()[0])
    -> reference   would run
    """
    check_sinks(arguments.pop("sinks", None), query)
    arguments.pop("return_lse", None)  # kernels ignore it: they always return both
    split = arguments.pop("split", None)
    if unknown := arguments.keys() - set(_OPTIONS):
        raise TypeError(f"explain takes the arguments of attend, which has no {', '.join(sorted(unknown))}")
    make = functools.partial(call_of, **arguments, repeat=repeats_keys(split))
    return explain_call(implementation, make, (query, key, value), platform=platform, split=split)


_OPTIONS = tuple(x.name for x in inspect.signature(Call.of).parameters.values() if x.kind is x.KEYWORD_ONLY)


def call_of(query: Array, key: Array, value: Array, *, repeat: bool = False, **options: Any) -> Call:
    """Returns the call that `attend` makes of these arguments. With `repeat`, rows share no keys."""
    query, key, value, options = shared_keys.fold(query, key, value, dict.fromkeys(_OPTIONS) | options, repeat=repeat)
    return Call.of(query, key, value, **options)


def explain_call(
    implementation: str | Sequence[str] | None,
    make: Callable[..., Call],
    arrays: tuple[Any, ...],
    *,
    platform: str | None = None,
    split: Split | None = None,
) -> Explanation:
    """Explains the call that `make` returns for arrays, or for their shapes and dtypes."""
    if platform is not None and platform not in all_platforms():
        raise ValueError(f"platform ({platform!r}) must be one of {', '.join(all_platforms())}")
    platform = platform if split is None or platform is not None else split.platform
    platform = platform_of(jax.tree.leaves(arrays)) if platform is None else platform
    here = jax.default_backend() if platform is None else platform
    refusals: dict[str, str | None] = {}
    notes: dict[str, str] = {}
    tried: list[str] = []

    def look(*arrays: Array) -> None:
        # Notes are on the whole call, not on a device's share.
        call = Visits.of_whole(dataclasses.replace(make(*arrays), platform=here))
        whole = Split.of(cached.as_if_in_rows(call), split)
        tried.extend(names(implementation, here, call))
        for name, each in IMPLEMENTATIONS.items():
            refusals[name] = _reason(name, call, whole)
            note = None if each.note is None or refusals[name] is not None else each.note(cached.in_rows(call))
            notes.update({} if note is None else {name: note})

    # Under `eval_shape` even real arrays are traced, so that no kernel's check computes anything.
    jax.eval_shape(look, *arrays)
    return Explanation(next((name for name in tried if refusals[name] is None), None), refusals, notes)
