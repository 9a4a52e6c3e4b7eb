"""Parameters by their paths, "encoder/0/attention/query/kernel", in a model, its state or any tree of arrays."""

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

import jax
from flax import nnx

from seqattn.models.parameter_rules import rule_of
from seqattn.nn.parameter_rule import Kind

_VECTORS = ("bias", "scale")
"""What the vectors of a model are called whose parameters have no rules."""


def paths(params: Any) -> Any:
    """The same tree, with its path in place of every array.

    >>> import jax.numpy as jnp
    >>> paths({"query": [jnp.ones(2), {"bias": jnp.ones(3)}]})
    {'query': ['query/0', {'bias': 'query/1/bias'}]}
    """

    def name(path: tuple[Any, ...], leaf: Any) -> Any:
        text = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.tree.map(lambda _: text, leaf)  # an nnx.Variable stays one

    return jax.tree_util.tree_map_with_path(name, params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def matching(params: Any, patterns: Sequence[str]) -> Any:
    """The same tree, with True in place of every array whose path matches one of the patterns, else False.

    Args:
        params: a tree of arrays, such as the `nnx.State` of a model.
        patterns: globs of whole paths, in which `*` stands for any characters, "/" too: "encoder/*" is all that the
            encoder has, "*/bias" every bias that is not the model's own.

    >>> import jax.numpy as jnp
    >>> matching({"query": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}, ["*/bias"])
    {'query': {'bias': True, 'kernel': False}}
    """
    return jax.tree.map(lambda path: any(fnmatchcase(path, pattern) for pattern in patterns), paths(params))


def matrices(params: Any) -> Any:
    """The same tree, with True in place of every array that is a matrix or a stack of them, else False.

    A bias or scale is none even where the layers of several experts are stacked, which gives it a second axis. The
    rules beside the modules say so (`seqattn.models.parameter_rules`), and of any other parameter its name.

    >>> import jax.numpy as jnp
    >>> matrices({"norm": {"scale": jnp.ones(3)}, "experts": {"kernel": jnp.ones((5, 2, 3)), "bias": jnp.ones((5, 3))}})
    {'experts': {'bias': False, 'kernel': True}, 'norm': {'scale': False}}
    """

    def is_matrix(param: Any, path: str) -> bool:
        rule = rule_of(path)
        is_vector = path.endswith(_VECTORS) if rule is None else rule.kind in (Kind.VECTOR, Kind.STATISTIC)
        return param.ndim > 1 and not is_vector

    return jax.tree.map(is_matrix, params, paths(params))


def check_patterns(params: Any, patterns: Sequence[str]) -> None:
    """Refuses a pattern that matches no path.

    Raises:
        ValueError: naming the pattern and the paths most like it.
    """
    names = jax.tree.leaves(paths(params))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0)
            raise ValueError(f"pattern {pattern!r} matches no parameter; the nearest are {', '.join(nearest)}")
