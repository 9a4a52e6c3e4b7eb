"""One update, as a pure function of state and batch."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from seqattn.nn import BatchNorm, BatchSums, MixtureOfExperts, Routing, Statistic, move_statistics
from seqattn.nn.capture import captured
from seqattn.nn.mixture import Routed, routings_among
from seqattn.nn.normalization import Measured, measurements_among
from seqattn.precision import widened
from seqattn.pytrees import pytree

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
        step: how many batches were seen, an int32 scalar.
        params: the model's parameters, an `nnx.State`.
        opt_state: the state of the optax transformation.
        skipped: how many of the updates were left out, an int32 scalar.
        skipped_in_a_row: how many of the latest ones, an int32 scalar.
        average: the exponential moving average of the parameters, float32 at least; None in a run without.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    skipped_in_a_row: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    average: Any = None


Update = Callable[..., tuple[TrainState, Metrics]]
"""`update(state, batch, axis_name=None) -> (state, metrics)`."""


Loss = Callable[..., tuple[jax.Array, jax.Array]]
"""`loss(model, batch, label_smoothing=, dropout_key=) -> (sum, count)`, see `train.objectives`."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    """What `make_update` was told."""

    seed: int
    label_smoothing: float
    pieces: int
    compute_dtype: DTypeLike | None
    decay: float | None
    patience: int


def start(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, average: bool = False
) -> tuple[nnx.GraphDef, TrainState]:
    """The structure of a model, and the state before the first update; with an average of the parameters if asked."""
    graph, params = nnx.split(model, nnx.Param)
    # Wide, since in bfloat16 what a step adds to an average is lost.
    copy = jax.tree.map(jnp.array, widened(params)) if average else None
    return graph, TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average=copy)


def make_update(
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    loss: Loss,
    *,
    seed: int,
    label_smoothing: float = 0.0,
    pieces: int = 1,
    compute_dtype: DTypeLike | None = None,
    decay: float | None = None,
    patience: int = 10,
) -> Update:
    """The update of a model of this structure by the gradient of the mean loss.

    The dropout of a step is a function of the seed and the step, so that a resumed run drops the same. Over an axis
    of devices, and over the pieces of a batch, losses and labels are summed before they are divided: every label weighs
    the same, wherever it is.

    An update whose loss or gradient is not finite is left out: parameters, optimizer and average stay, bit by bit.

    Args:
        graph: the model's structure.
        optimizer: how gradients become updates.
        loss: of a model and a batch.
        seed: of dropout.
        label_smoothing: epsilon of Szegedy 2016.
        pieces: the batch is computed in so many pieces, one after the other: less memory, the same update.
        compute_dtype: what the loss computes in; parameters stay what they are, and gradients, their sums and their
            norm are float32 at least.
        decay: of the exponential moving average of the parameters (Polyak 1992), at most: after n updates it is
            (1 + n) / (10 + n) where that is less; None where the state has no average.
        patience: after so many updates in a row that were left out, no other is made.
    """
    settings = _Settings(seed, label_smoothing, pieces, compute_dtype, decay, patience)

    def update(
        state: TrainState, batch: dict[str, jax.Array], axis_name: str | None = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        key = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        sums, gradients = _add_pieces(graph, loss, settings, state.params, batch, key)
        # pmap differentiates each device's own sum, so the gradients are added here; inside shard_map with its default
        # check_vma=True the same line would count them once for each device.
        sums, gradients = (sums, gradients) if axis_name is None else jax.lax.psum((sums, gradients), axis_name)
        labels = jnp.maximum(sums["count"], 1)
        gradients = jax.tree.map(lambda gradient: gradient / labels, gradients)
        metrics = {"loss": sums["total"] / labels, "tokens": sums["count"], "gradient_norm": optax.tree.norm(gradients)}
        if "dropped" in sums:
            metrics["dropped"] = sums["dropped"] / jnp.maximum(sums["choices"], 1)
        move = partial(_moved, graph, sums["measured"], state.params)
        return _applied(optimizer, settings, state, gradients, metrics, move), metrics

    return update


def _add_pieces(
    graph: nnx.GraphDef, loss: Loss, settings: _Settings, params: Any, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[dict[str, Any], Any]:
    """Sums of losses and labels, and the gradient of the former, added over the pieces of a batch."""
    pieces = settings.pieces
    if pieces == 1:
        return _sums_and_gradients(graph, loss, settings, params, batch, key)

    def add(total: Any, piece: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, _sums_and_gradients(graph, loss, settings, params, *piece)), None

    # Every so many rows, so that short and long texts are spread over the pieces.
    split = {name: _pieces(name, array, pieces) for name, array in batch.items()}
    keys = jax.random.split(key, pieces)
    first = jax.eval_shape(lambda: _sums_and_gradients(graph, loss, settings, params, _first(split), keys[0]))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    total, _ = jax.lax.scan(add, zeros, (split, keys))
    return total


def _pieces(name: str, array: jax.Array, pieces: int) -> jax.Array:
    """`[B, ...]` as `[pieces, B / pieces, ...]`."""
    if len(array) % pieces:
        raise ValueError(
            f"the batch's {len(array)} rows ({name}) must be a multiple of the {pieces} pieces of an update"
        )
    return jnp.swapaxes(array.reshape(len(array) // pieces, pieces, *array.shape[1:]), 0, 1)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _sums_and_gradients(
    graph: nnx.GraphDef, loss: Loss, settings: _Settings, params: Any, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[dict[str, Any], Any]:
    """What a batch adds to the sums of an update, and the gradient of its summed loss."""

    def total_loss(params: Any) -> tuple[jax.Array, dict[str, Any]]:
        model = nnx.merge(graph, _cast(params, settings.compute_dtype))
        given = _cast(batch, settings.compute_dtype)
        options: dict[str, Any] = {"label_smoothing": settings.label_smoothing, "dropout_key": key}
        (total, count), found, measured = _told(loss, model, given, **options)
        sums: dict[str, Any] = {"total": total, "count": count, "measured": measured}
        if not found:
            return total, sums
        sums["dropped"] = jnp.sum(jnp.stack([routing.dropped for routing in found]))
        sums["choices"] = jnp.sum(jnp.stack([routing.load.sum() for routing in found]))
        # The loss of a routing is a mean over tokens, and is divided by the number of labels later.
        return total + count * sum(routing.loss for routing in found), sums

    (_, sums), gradients = jax.value_and_grad(total_loss, has_aux=True)(params)
    # Sums over pieces and devices and the norm are wide, also where the parameters are not.
    return sums, widened(gradients)


def _told(loss: Loss, model: nnx.Module, *args: Any, **options: Any) -> tuple[Any, list[Routing], list[BatchSums]]:
    """A loss, and what mixtures of experts and batch norms tell beside it."""
    if not any(isinstance(module, MixtureOfExperts | BatchNorm) for _, module in nnx.iter_modules(model)):
        return loss(model, *args, **options), [], []
    losses, (routed, measured) = captured(loss, (Routed, Measured), model, *args, **options)
    return losses, routings_among(routed, model), measurements_among(measured, model)


def _cast(tree: Any, dtype: DTypeLike | None) -> Any:
    """The tree in a dtype, but for statistics: what is measured is told as the distance from them."""

    def cast(leaf: Any) -> Any:
        wanted = not isinstance(leaf, Statistic) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.tree.map(lambda array: array.astype(dtype), leaf) if wanted else leaf

    return tree if dtype is None else jax.tree.map(cast, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _moved(graph: nnx.GraphDef, measured: Sequence[BatchSums], before: Any, params: Any) -> Any:
    """The parameters, with running statistics moved from where they were before, whatever an optimizer did."""
    if not measured:
        return params
    merged = jax.tree.map(
        lambda old, new: old if isinstance(old, Statistic) else new,
        before,
        params,
        is_leaf=lambda leaf: isinstance(leaf, nnx.Variable),
    )
    return nnx.split(move_statistics(nnx.merge(graph, merged), measured), nnx.Param)[1]


def _applied(
    optimizer: optax.GradientTransformation,
    settings: _Settings,
    state: TrainState,
    gradients: Any,
    metrics: Metrics,
    move: Callable[[Any], Any],
) -> TrainState:
    """The state after a batch: updated, or left as it is where something is not finite."""
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params, average = move(optax.apply_updates(state.params, updates)), state.average
    if settings.decay is not None:
        # Else what the parameters were drawn as would be a part of the average for thousands of updates.
        made = (state.step - state.skipped).astype(jnp.float32)
        decay = jnp.minimum(settings.decay, (1 + made) / (10 + made))
        average = optax.incremental_update(widened(params), average, 1 - decay)
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
    # Once patience is at its end nothing changes, until the host sees it: when it looks decides nothing.
    sound = finite & (state.skipped_in_a_row < settings.patience)
    old = (state.params, state.opt_state, state.average)
    params, opt_state, average = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), (params, opt_state, average), old
    )
    left_out = 1 - sound.astype(jnp.int32)
    in_a_row = jnp.where(sound, 0, state.skipped_in_a_row + left_out)
    return TrainState(state.step + 1, params, opt_state, state.skipped + left_out, in_a_row, average)
