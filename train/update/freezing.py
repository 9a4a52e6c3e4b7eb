"""Frozen parameters: training does not change parameters whose paths match a pattern."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from seqattn.nn import Statistic
from train.update.parameters import check_patterns, matching


def frozen(params: Any, patterns: Sequence[str]) -> Any:
    """Returns the tree of `params` with True for every frozen array and False for every other one.

    Args:
        params: a pytree of arrays, such as the `nnx.State` of a model.
        patterns: glob patterns for whole paths, as in `train.update.parameters.matching`.

    Raises:
        ValueError: a pattern matches no path (the message names the most similar paths), or the patterns match every
            path, apart from running statistics.

    >>> params = {"encoder": {"kernel": jnp.ones((2, 3))}, "output": {"kernel": jnp.ones((3, 2))}}
    >>> frozen(params, ["encoder/*"])
    {'encoder': {'kernel': True}, 'output': {'kernel': False}}
    >>> frozen(params, ["encode/*"])
    Traceback (most recent call last):
    ValueError: pattern 'encode/*' matches no parameter; the nearest are encoder/kernel, output/kernel
    """
    check_patterns(params, patterns)
    found = matching(params, patterns)
    # Running statistics follow the batches: they learn nothing, and no optimizer moves them.
    variables = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))
    learned = [not isinstance(variable, Statistic) for variable in variables]
    rows = zip(jax.tree.leaves(found), learned, strict=True)
    if all(is_frozen or not is_learned for is_frozen, is_learned in rows):
        others = "" if all(learned) else " except running statistics"
        raise ValueError(f"frozen ({', '.join(patterns)}) matches every parameter{others}: nothing would be trained")
    return found


def freeze(optimizer: optax.GradientTransformation, patterns: Sequence[str]) -> optax.GradientTransformation:
    """Wraps an optimizer so that it sees only trainable parameters; frozen ones stay bitwise the same.

    Neither gradients nor values of frozen parameters reach the optimizer. They do not decay, have no moments in its
    state, and do not count in the global norm for clipping. Without patterns, returns the optimizer itself.

    Args:
        optimizer: makes the updates of the trainable parameters.
        patterns: glob patterns for whole paths, as in `train.update.parameters.matching`.

    Raises:
        ValueError: by `init`, as `frozen`.

    >>> optimizer = freeze(optax.sgd(1.0), ["query/*"])
    >>> params = {"query": {"bias": jnp.ones(2)}, "bias": jnp.ones(2)}
    >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'bias': Array([0., 0.], dtype=float32), 'query': {'bias': Array([1., 1.], dtype=float32)}}
    """

    # A partition would wrap the state, and runs without frozen parameters could not resume with their checkpoints.
    if not patterns:
        return optimizer

    def labels(params: Any) -> Any:
        # A function, since the parameters are known only when optax creates the state.
        return jax.tree.map(lambda is_frozen: "frozen" if is_frozen else "trained", frozen(params, patterns))

    return optax.partition({"trained": optimizer, "frozen": _nothing()}, labels)


def _nothing() -> optax.GradientTransformation:
    """Makes updates that change no bit of a parameter."""
    # -0.0 is the additive identity: a parameter of -0.0 plus 0.0 would become 0.0.
    return optax.stateless_with_tree_map(lambda update, _: jnp.full_like(update, -0.0))
