"""Shardings of a training state over a device mesh, from the parameter rules of the modules."""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P

from seqattn.models.parameter_rules import PARAMETER_RULES, rule_of
from seqattn.nn.parameter_rule import ParameterRule
from train.update.parameters import paths

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
"""The mesh axes. Three of them split parameters: `fsdp` to save memory, `tensor` to split the computation too, and
`expert` by the experts of a mixture."""
ROWS = ("data", "fsdp", "expert")
"""The axes that split the rows of a batch. Without `expert` its devices would all repeat the layers without experts."""

Made = TypeVar("Made")

log = logging.getLogger(__name__)


def shardings(state: Any, mesh: Mesh, rules: Sequence[ParameterRule] = PARAMETER_RULES) -> Any:
    """Returns the tree of `state` with a `NamedSharding` in place of every array.

    Other arrays follow the parameters: an array whose path ends with the path of a parameter of the same shape, such as
    a moment of Adam, has its sharding. Everything else is replicated on all devices.

    A dimension that its mesh axes do not divide is not split, and neither is a parameter without a rule. A warning
    names them.

    Args:
        state: a `TrainState`, or any pytree with `params`, of arrays or shapes.
        mesh: a mesh with the axes that the rules name.
        rules: the rules that split parameters.

    Raises:
        ValueError: a rule has more dimensions than a parameter.

    >>> import jax.numpy as jnp, optax
    >>> from train.update.step import TrainState
    >>> params, optimizer = {"embedding": {"table": jnp.ones((12, 6))}}, optax.sgd(0.1, momentum=0.9)
    >>> state = TrainState(jnp.zeros((), int), params, optimizer.init(params))
    >>> split = shardings(state, jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor")))
    >>> tuple(split.opt_state[0].trace["embedding"]["table"].spec)
    ('tensor', 'fsdp')
    """
    params = dict(zip(jax.tree.leaves(paths(state.params)), jax.tree.leaves(state.params), strict=True))
    specs, whole = {}, []
    for path, leaf in params.items():
        specs[path], reasons = _spec(path, leaf.shape, mesh, rules)
        whole += reasons
    if whole:
        log.warning("not split over the devices, but replicated: %s", "; ".join(whole))

    def sharding(leaf: Any, path: str) -> NamedSharding:
        owner = _owner(path, params)
        follows = owner is not None and params[owner].shape == leaf.shape
        return NamedSharding(mesh, specs[owner] if follows else P())

    return jax.tree.map(sharding, state, paths(state))


def put(leaf: Any, sharding: Sharding) -> jax.Array:
    """Puts an array on the devices of a sharding, possibly devices of other processes.

    Args:
        leaf: the array; the same in every process, unless it is spread over them already.
        sharding: where it goes. No device holds more than its part.
    """
    is_global = isinstance(leaf, jax.Array) and not leaf.is_fully_addressable
    if sharding.is_fully_addressable or is_global:
        return jax.device_put(leaf, sharding)
    # `jax.device_put` would send the whole array to all processes to compare it.
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def one_at_a_time(several: bool, made: Made) -> Made:
    """Waits for the results of a program on several CPU devices; returns at once on other backends.

    Programs queued on CPU devices occupy the threads that the first one needs for its all-reduce. XLA then aborts after
    40 seconds (jaxlib 0.10.2: 300 updates of eight devices on two cores, in three of four runs).
    """
    return jax.block_until_ready(made) if several and jax.default_backend() == "cpu" else made


def whole_over(axis: str, sharded: Any) -> Any:
    """Returns a tree of shardings in which no dimension is split over the given mesh axis.

    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    >>> tuple(whole_over("fsdp", NamedSharding(mesh, P("fsdp", "tensor"))).spec)
    (None, 'tensor')
    """

    def without(names: Any) -> Any:
        if isinstance(names, tuple):
            return tuple(name for name in names if name != axis)
        return None if names == axis else names

    return jax.tree.map(lambda each: NamedSharding(each.mesh, P(*map(without, each.spec))), sharded)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[ParameterRule]) -> tuple[P, list[str]]:
    """The mesh axes of each dimension, and the reasons for dimensions that are not split."""
    rule = rule_of(path, rules)
    if rule is None:
        # Without a mesh axis that splits parameters, a missing rule changes nothing.
        split = any(size > 1 for name, size in mesh.shape.items() if name in ("fsdp", "tensor", "expert"))
        return P(), [f"{path}: no rule"] * split
    if len(rule.split) > len(shape):
        raise ValueError(f"the rule {rule.glob!r} splits {len(rule.split)} dims, and {path} has the shape {shape}")
    axes, reasons = [], []
    for dim, (size, names) in enumerate(zip(shape, rule.split, strict=False)):
        parts = _size(mesh.shape, names)
        axes.append(names if size % parts == 0 else None)
        if size % parts:
            reasons.append(f"{path}: {size} of dim {dim} over {names} ({parts})")
    return P(*axes), reasons


def _size(mesh: Mapping[str, int], names: str | tuple[str, ...] | None) -> int:
    """The number of parts into which mesh axes split a dimension."""
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh[name] for name in names)


def _owner(path: str, params: Mapping[str, Any]) -> str | None:
    """The parameter whose path is the longest suffix of a path; None if there is none."""
    parts = path.split("/")
    tails = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((tail for tail in tails if tail in params), None)
