"""Which array of a state is split over which axes of a mesh: a table of rules from paths to axes."""

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.update.parameters import paths

AXES = ("data", "fsdp", "tensor", "sequence", "expert")
"""The axes of a mesh. Parameters know three of them: `fsdp` splits them to save memory, `tensor` for what is computed
with them, and `expert` by the experts of a mixture."""

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Rule:
    """How the parameters of some paths are split.

    Attributes:
        glob: of whole paths, as in `train.update.parameters.matching`.
        spec: the mesh axes of each dim, from the first one on; dims beyond it are not split.
    """

    glob: str
    spec: P


_NOT = P()
_INTO, _OUT_OF = P("fsdp", "tensor"), P("tensor", "fsdp")

RULES = (
    # Small, or read whole at every step.
    Rule("*/experts/*/bias", P("expert")),
    Rule("*bias", _NOT),
    Rule("*scale", _NOT),
    Rule("*shift", _NOT),
    Rule("*norms/*/mean", _NOT),
    Rule("*norms/*/variance", _NOT),
    Rule("*scores/tables", _NOT),
    Rule("*_filter", _NOT),
    Rule("*projection", _NOT),
    Rule("*convolutions/*/kernel", _NOT),
    # `[E, D, F]` and `[E, F, D]`.
    Rule("*/experts/output/kernel", P("expert", *_OUT_OF)),
    Rule("*/experts/*/kernel", P("expert", *_INTO)),
    # `[V, D]`: a table's rows are also the columns of the logits. Learned positions have few rows.
    Rule("*embedding/table", P("tensor", "fsdp")),
    Rule("*table", P(None, "fsdp")),
    # Heads `[D, N * H]` and hidden layers `[D, F]` are split, and come together again in what follows them.
    Rule("*attention/output/kernel", _OUT_OF),
    Rule("*attention/*/kernel", _INTO),
    Rule("*feed_forward/output/kernel", _OUT_OF),
    Rule("*feed_forward/noise/kernel", P("fsdp")),
    Rule("*feed_forward/*/kernel", _INTO),
    # `[F, D]` of scores that are no dot product.
    Rule("*attention/*weight", P(None, "fsdp")),
    # Split over `tensor`, the gates of one token would have to be collected before the next token is read.
    Rule("*/cell/*/kernel", P("fsdp")),
    # Logits, and other linear layers.
    Rule("*output/kernel", _INTO),
    Rule("*hidden/kernel", _INTO),
    Rule("*input/kernel", _INTO),
    Rule("*combine/kernel", _INTO),
    Rule("*starts/*/kernel", _INTO),
)
"""The first rule that matches a path decides. A parameter that none matches is not split."""


def rule_for(path: str, rules: Sequence[Rule] = RULES) -> Rule | None:
    """The rule that decides about the parameter of a path; None where no rule matches.

    >>> tuple(rule_for("encoder/0/feed_forward/hidden/kernel").spec)
    ('fsdp', 'tensor')
    """
    return next((rule for rule in rules if fnmatchcase(path, rule.glob)), None)


def shardings(state: Any, mesh: Mesh, rules: Sequence[Rule] = RULES) -> Any:
    """The tree of `state` with a `NamedSharding` in place of every array.

    What the state holds beside `params` follows them: an array whose path ends in that of a parameter of the same
    shape, such as a moment of Adam, is split like it; everything else lies whole on every device.

    A dim that its axes do not divide is not split, and neither is a parameter without a rule; a warning names them.

    Args:
        state: a `TrainState`, or anything with `params`, of arrays or of their shapes.
        mesh: with the axes that the rules name.
        rules: how parameters are split.

    Raises:
        ValueError: a rule names more dims than a parameter has.

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
        log.warning("not split over the devices, but whole on each: %s", "; ".join(whole))

    def sharding(leaf: Any, path: str) -> NamedSharding:
        owner = _owner(path, params)
        follows = owner is not None and params[owner].shape == leaf.shape
        return NamedSharding(mesh, specs[owner] if follows else P())

    return jax.tree.map(sharding, state, paths(state))


def whole_over(axis: str, sharded: Any) -> Any:
    """The same tree of shardings, in which no dim is split over an axis.

    >>> mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tensor"))
    >>> tuple(whole_over("fsdp", NamedSharding(mesh, P("fsdp", "tensor"))).spec)
    (None, 'tensor')
    """

    def without(names: Any) -> Any:
        if isinstance(names, tuple):
            return tuple(name for name in names if name != axis)
        return None if names == axis else names

    return jax.tree.map(lambda each: NamedSharding(each.mesh, P(*map(without, each.spec))), sharded)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh, rules: Sequence[Rule]) -> tuple[P, list[str]]:
    """The axes of each dim, and what the rule wanted to split and could not."""
    rule = rule_for(path, rules)
    if rule is None:
        # Where no axis of parameters splits anything, nothing is missing.
        split = any(size > 1 for name, size in mesh.shape.items() if name in ("fsdp", "tensor", "expert"))
        return P(), [f"{path}: no rule"] * split
    if len(rule.spec) > len(shape):
        raise ValueError(f"the rule {rule.glob!r} splits {len(rule.spec)} dims, and {path} has the shape {shape}")
    axes, reasons = [], []
    for dim, (size, names) in enumerate(zip(shape, rule.spec, strict=False)):
        parts = _size(mesh.shape, names)
        axes.append(names if size % parts == 0 else None)
        if size % parts:
            reasons.append(f"{path}: {size} of dim {dim} over {names} ({parts})")
    return P(*axes), reasons


def _size(mesh: Mapping[str, int], names: str | tuple[str, ...] | None) -> int:
    """Into how many parts axes split a dim."""
    names = (names,) if isinstance(names, str) else names or ()
    return math.prod(mesh[name] for name in names)


def _owner(path: str, params: Mapping[str, Any]) -> str | None:
    """The parameter whose path a path ends in: of several the longest."""
    parts = path.split("/")
    tails = ("/".join(parts[first:]) for first in range(len(parts)))
    return next((tail for tail in tails if tail in params), None)
