"""One update, as a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from seqattn.nn import MixtureOfExperts, Routing, routings
from seqattn.static import pytree

Metrics = dict[str, jax.Array]
"""Scalars: `loss` (mean over labels, nats), `tokens` (labels that counted), `gradient_norm` (before clipping).

The norm is of the gradients of all parameters, also of those that are frozen, which the optimizer's clip does not see.
With mixtures of experts also `dropped`, the share of choices for which an expert had no room.
"""


@pytree
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes.

    Attributes:
        step: how many updates were made, an int32 scalar.
        params: the model's parameters, an `nnx.State`.
        opt_state: the state of the optax transformation.
    """

    step: jax.Array
    params: Any
    opt_state: Any


Update = Callable[..., tuple[TrainState, Metrics]]
"""`update(state, batch, axis_name=None) -> (state, metrics)`."""


Loss = Callable[..., tuple[jax.Array, jax.Array]]
"""`loss(model, batch, label_smoothing=, dropout_key=) -> (sum, count)`, see `train.objectives`."""


def start(model: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of a model, and the state before the first update."""
    graph, params = nnx.split(model, nnx.Param)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def make_update(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    seed: int,
    label_smoothing: float = 0.0,
) -> Update:
    """The update of a model of this structure by the gradient of the mean loss.

    The dropout of a step is a function of the seed and the step, so that a resumed run drops the same. Over an axis
    of devices losses and labels are summed before they are divided: every label weighs the same, wherever it is.
    """

    def update(
        state: TrainState, batch: dict[str, jax.Array], axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def total_loss(params: Any) -> tuple[jax.Array, tuple[jax.Array, jax.Array, list[Routing]]]:
            model = nnx.merge(graph, params)
            options: dict[str, Any] = {"label_smoothing": label_smoothing, "dropout_key": key}
            if any(isinstance(module, MixtureOfExperts) for _, module in nnx.iter_modules(model)):
                (total, count), found = routings(loss, model, batch, **options)
            else:
                (total, count), found = loss(model, batch, **options), []
            # The loss of a routing is a mean over tokens, and is divided by the number of labels below.
            return total + count * sum(routing.loss for routing in found), (total, count, found)

        (_, (total, count, found)), gradients = jax.value_and_grad(total_loss, has_aux=True)(state.params)
        sums = {"total": total, "count": count}
        if found:
            sums["dropped"] = sum(routing.dropped for routing in found)
            sums["choices"] = sum(routing.load.sum() for routing in found)
        # pmap differentiates each device's own sum, so the gradients are added here; inside shard_map with its default
        # check_vma=True the same line would count them once for each device.
        sums, gradients = (sums, gradients) if axis_name is None else jax.lax.psum((sums, gradients), axis_name)
        labels = jnp.maximum(sums["count"], 1)
        gradients = jax.tree.map(lambda gradient: gradient / labels, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": sums["total"] / labels, "tokens": sums["count"], "gradient_norm": optax.tree.norm(gradients)}
        if found:
            metrics["dropped"] = sums["dropped"] / jnp.maximum(sums["choices"], 1)
        return TrainState(state.step + 1, params, opt_state), metrics

    return update
