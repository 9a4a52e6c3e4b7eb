"""One update, as a pure function of state and batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from seqattn import Coordinates, cross_entropy
from seqattn.models import EncoderDecoder

Metrics = dict[str, jax.Array]
"""Scalars: `loss` (mean over labels, nats), `tokens` (labels that counted), `gradient_norm` (before clipping)."""


@jax.tree_util.register_dataclass
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


def start(model: nnx.Module, optimizer: optax.GradientTransformation) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of a model, and the state before the first update."""
    graph, params = nnx.split(model, nnx.Param)
    return graph, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))


def loss(
    model: EncoderDecoder,
    batch: dict[str, jax.Array],
    *,
    label_smoothing: float = 0.0,
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses of all labels of a batch (see `train.batches.Batch`), in nats, and their number."""
    encode_key, decode_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
    inputs, labels = batch["target"][:, :-1], batch["target"][:, 1:]
    source_at = Coordinates.from_lengths(batch["source_length"], batch["source"].shape[1])
    target_at = Coordinates.from_lengths(batch["target_length"] - 1, inputs.shape[1])
    memory = model.encode(batch["source"], source_at, dropout_key=encode_key)
    logits = model.decode(inputs, target_at, memory, dropout_key=decode_key)
    return cross_entropy(logits, labels, weights=target_at.segment != 0, label_smoothing=label_smoothing)


def make_update(
    graph: nnx.GraphDef, optimizer: optax.GradientTransformation, *, seed: int, label_smoothing: float = 0.0
) -> Update:
    """The update of a model of this structure.

    The dropout of a step is a function of the seed and the step, so that a resumed run drops the same. Over an axis
    of devices losses and labels are summed before they are divided: every label weighs the same, wherever it is.
    """

    def update(
        state: TrainState, batch: dict[str, jax.Array], axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        key = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))

        def total_loss(params: Any) -> tuple[jax.Array, jax.Array]:
            return loss(nnx.merge(graph, params), batch, label_smoothing=label_smoothing, dropout_key=key)

        sums = jax.value_and_grad(total_loss, has_aux=True)(state.params)
        # pmap differentiates each device's own sum, so the gradients are added here; inside shard_map with its default
        # check_vma=True the same line would count them once for each device.
        (total, count), gradients = sums if axis_name is None else jax.lax.psum(sums, axis_name)
        labels = jnp.maximum(count, 1)
        gradients = jax.tree.map(lambda gradient: gradient / labels, gradients)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {"loss": total / labels, "tokens": count, "gradient_norm": optax.tree.norm(gradients)}
        return TrainState(state.step + 1, params, opt_state), metrics

    return update
