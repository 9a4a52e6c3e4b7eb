"""Parameters that training leaves as they are, chosen by the globs of their paths."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from train.update.parameters import check_patterns, matching


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """The tree of `params` with True for every array that is frozen, else False.

    Args:
        params: a tree of arrays, such as the `nnx.State` of a model.
        patterns: globs of whole paths, as in `train.update.parameters.matching`.

    Raises:
        ValueError: a pattern matches no path; the message names the paths most like it. Or all paths are matched.

    >>> params = {"encoder": {"kernel": jnp.ones((2, 3))}, "output": {"kernel": jnp.ones((3, 2))}}
    >>> frozen(params, ["encoder/*"])
    {'encoder': {'kernel': True}, 'output': {'kernel': False}}
    >>> frozen(params, ["encode/*"])
    Traceback (most recent call last):
    ValueError: pattern 'encode/*' matches no parameter; the nearest are encoder/kernel, output/kernel
    """
    check_patterns(params, patterns)
    found = matching(params, patterns)
    if all(jax.tree.leaves(found)):
        raise ValueError(f"frozen ({', '.join(patterns)}) matches every parameter: nothing would be trained")
    return found


def freeze(optimizer: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
    """An optimizer that sees only the parameters that are not frozen; the others stay bitwise as they are.

    Neither their gradients nor their values reach the optimizer: they do not decay, have no moments in its state, and
    do not count in the norm that it clips. Without patterns it is the optimizer itself, with the same state.

    Args:
        optimizer: what makes the updates of all others.
        patterns: globs of whole paths, as in `train.update.parameters.matching`.

    Raises (when the state is made):
        ValueError: a pattern matches no path, or all of them every path.

    >>> optimizer = freeze(optax.sgd(1.0), ["query/*"])
    >>> params = {"query": {"bias": jnp.ones(2)}, "bias": jnp.ones(2)}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'bias': Array([0., 0.], dtype=float32), 'query': {'bias': Array([1., 1.], dtype=float32)}}
    """

    if not patterns:
        return optimizer

    def labels(params: Any) -> Any:
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen(params, patterns))

    return optax.partition({"trained": optimizer, "frozen": _nothing()}, labels)


def _nothing() -> optax.GradientTransformation:
    """Updates that change no bit when they are added: -0.0, since -0.0 + 0.0 is 0.0."""
    return optax.stateless_with_tree_map(lambda update, _: jnp.full_like(update, -0.0))
