"""Selects parameters by path, such as "encoder/0/attention/query/kernel", in any pytree of arrays."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from seqattn.models.parameter_rules import rule_of
from seqattn.nn.parameter_rule import Kind

_VECTORS = ("bias", "scale")
"""Endings of the paths of vectors, for models without parameter rules."""


def paths(params: Any) -> Any:
    """Returns the tree with every array replaced by its path: its keys, joined by "/".

    >>> import jax.numpy as jnp
    >>> paths({"query": [jnp.ones(2), {"bias": jnp.ones(3)}]})
    {'query': ['query/0', {'bias': 'query/1/bias'}]}
    """

    def name(path: tuple[Any, ...], leaf: Any) -> Any:
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        # Mapped, so that an nnx.Variable stays one and the result has the same structure as `params`.
        return jax.tree.map(lambda _: text, leaf)

    return jax.tree_util.tree_map_with_path(name, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def matching(params: Any, patterns: Sequence[str]) -> Any:
    """Returns the tree with True for every array whose path matches one of the patterns, and False for the others.

    Args:
        params: a pytree of arrays, such as the `nnx.State` of a model.
        patterns: glob patterns for whole paths. `*` matches any characters, including "/": "encoder/*" matches all
            parameters of the encoder, "*/bias" every bias below the top level.

    >>> import jax.numpy as jnp
    >>> matching({"query": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, ["*/bias"])
    {'query': {'bias': True, 'kernel': False}}
    """
    return jax.tree.map(lambda path: any(fnmatchcase(path, pattern) for pattern in patterns), paths(params))


def matrices(params: Any) -> Any:
    """Returns the tree with True for every matrix or stack of matrices, and False for the other arrays.

    A bias or scale is never a matrix, even if the layers of several experts are stacked and give it a second axis. The
    parameter rules decide (`seqattn.models.parameter_rules`); a parameter without a rule is judged by its name.

    >>> import jax.numpy as jnp
    >>> matrices({"norm": {"scale": jnp.ones(3)}, "experts": {"kernel": jnp.ones((5, 2, 3)), "bias": jnp.ones((5, 3))}})
    {'experts': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """

    def is_matrix(param: Any, path: str) -> bool:
        rule = rule_of(path)
        # The number of axes alone does not tell: stacked biases `[E, F]` have two.
        is_vector = path.endswith(_VECTORS) if rule is None else rule.kind in (Kind.VECTOR, Kind.STATISTIC)
        return param.ndim > 1 and not is_vector

    return jax.tree.map(is_matrix, params, paths(params))


def check_patterns(params: Any, patterns: Sequence[str], what: str = "parameter") -> None:
    """Checks that every pattern matches at least one path.

    Args:
        params: a pytree of arrays.
        patterns: glob patterns for whole paths, as in `matching`.
        what: what the arrays are, for the message.

    Raises:
        ValueError: a pattern matches no path; the message names it and the three most similar paths.
    """
    names = jax.tree.leaves(paths(params))
    for pattern in patterns:
        # A mistyped pattern would silently select nothing: parameters meant to be frozen would train.
        if not any(fnmatchcase(name, pattern) for name in names):
            # Without a cutoff some path is always close enough to name.
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0)
            raise ValueError(f"pattern {pattern!r} matches no {what}; the nearest are {', '.join(nearest)}")
