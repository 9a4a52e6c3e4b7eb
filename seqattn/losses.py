"""Losses as a pair (sum, count), which adds up exactly over devices and micro-batches."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from seqattn.checks import check_rate
from seqattn.precision import accumulator


def cross_entropy(
    logits: Float[Array, "*batch V"],
    labels: Int[Array, "*batch"],
    *,
    weights: Shaped[Array, "*batch"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the weighted sum of the cross entropies in nats, and the sum of the weights.

    The mean is `total / jnp.maximum(count, 1)`. A label with weight 0 has no effect: its logits may be NaN, and its
    gradient is zero. A negative label, such as the -100 of other libraries, has weight 0.

    Args:
        logits: scores before the softmax, `[*batch, V]`, floating.
        labels: class indices `[*batch]`, below V.
        weights: a weight for each label `[*batch]`, boolean or floating. Defaults to 1.
        label_smoothing: epsilon of Szegedy 2016, equation 3. The target is `1 - epsilon` on the label plus `epsilon /
            V` on every class. Must be in `[0, 1)`.

    Returns:
        Two scalars, float32 or wider: the weighted sum and the sum of the weights.

    Raises:
        TypeError: labels are not integers, or logits are not floating.
        ValueError: shapes differ, `label_smoothing` is not in `[0, 1)`, or a label is at least V. Inside `jit` such a
            label makes the sum NaN.

    >>> total, count = cross_entropy(jnp.zeros((3, 4)), jnp.array([0, 3, -100]))
    >>> print((total / count).round(4), jnp.log(4).round(4), count)
    1.3863 1.3863 2.0
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    weights = None if weights is None else jnp.asarray(weights)
    _check(logits, labels, weights, label_smoothing)
    high = accumulator(logits.dtype)
    weights = jnp.ones(labels.shape, high) if weights is None else weights.astype(high)
    weights = jnp.where(labels < 0, jnp.zeros_like(weights), weights)
    counted = weights != 0
    labels = jnp.where(counted, labels, jnp.zeros_like(labels))
    _check_range(labels, logits.shape[-1])
    logits = jnp.where(counted[..., None], logits, jnp.zeros_like(logits)).astype(high)
    target = jnp.take_along_axis(logits, labels[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    normaliser = jax.nn.logsumexp(logits, axis=-1)
    losses = normaliser - (1 - label_smoothing) * target[..., 0]
    if label_smoothing:  # 0 times the mean would be NaN where an impossible class has a logit of -inf
        losses = losses - label_smoothing * logits.mean(axis=-1)
    return jnp.sum(jnp.where(counted, losses * weights, jnp.zeros_like(losses))), jnp.sum(weights)


def _check(logits: Array, labels: Array, weights: Array | None, label_smoothing: float) -> None:
    """Raises TypeError or ValueError unless the arguments fit each other."""
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"labels {labels.shape} must have the shape of logits {logits.shape} without its last axis")
    if weights is not None and weights.shape != labels.shape:
        raise ValueError(f"weights {weights.shape} must have the shape of labels {labels.shape}")
    check_rate(label_smoothing, "label_smoothing")


def _check_range(labels: Array, vocab_size: int) -> None:
    """Raises ValueError if a label is not below the number of classes. Traced labels are not checked."""
    if isinstance(labels, jax.core.Tracer):
        return
    largest = np.asarray(labels).max(initial=0)  # in NumPy: in the int8 of small labels 300 classes would be 44
    if largest >= vocab_size:
        raise ValueError(f"a label ({largest}) is not below the number of classes ({vocab_size})")
