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
from train.update.adapters import LowRank, drawn, merged

Metrics = dict[str, jax.Array]
"""Scalars: `loss` (mean per label, in nats), `tokens` (number of labels in it), `gradient_norm` (before clipping).

The norm covers the gradients of all parameters, including frozen ones, or of all that is trained beside adapters. The
optimizer clips without the frozen ones.
Models with mixtures of experts add `dropped`: the share of routing choices that exceeded an expert's capacity.
"""


@pytree
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that an update changes.

    Attributes:
        step: number of batches seen, including those of skipped updates; an int32 scalar.
        params: the model's parameters, an `nnx.State`. Without adapters, they are what is trained.
        opt_state: the state of the optax transformation, for what is trained.
        skipped: number of updates skipped so far, an int32 scalar.
        skipped_in_a_row: number of consecutive skipped updates up to now, an int32 scalar.
        average: the exponential moving average of what is trained, in float32 or wider; None if the run keeps none.
        tuned: low-rank adapters and other arrays that are trained in place of those in `params`, as from
            `train.update.adapters.drawn`; None if the run has no adapters.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    skipped: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    skipped_in_a_row: jax.Array = dataclasses.field(default_factory=lambda: jnp.zeros((), jnp.int32))
    average: Any = None
    tuned: Any = None

    @property
    def trained(self) -> Any:
        """What the optimizer updates: the adapters, or else the parameters."""
        return self.params if self.tuned is None else self.tuned


Update = Callable[..., tuple[TrainState, Metrics]]
"""`update(state, batch, axis_name=None, gathered=...) -> (state, metrics)`, see `make_update`."""


Loss = Callable[..., tuple[jax.Array, jax.Array]]
"""`loss(model, batch, label_smoothing=, dropout_key=) -> (sum, count)`, see `train.objectives`."""


@dataclasses.dataclass(frozen=True)
class _Settings:
    """The settings of `make_update`."""

    seed: int
    label_smoothing: float
    pieces: int
    compute_dtype: DTypeLike | None
    decay: float | None
    patience: int
    prepare: Callable[[nnx.Module], nnx.Module]
    gathered: Callable[[Any], Any]
    weights: Callable[[Any], Any]
    """Returns the parameters of the model for what is trained."""


def _as_they_are(tree: Any) -> Any:
    return tree


def weights(state: TrainState) -> Any:
    """Returns the parameters that evaluation, decoding and export use.

    They are the moving average if the state has one, and have the adapters merged in.
    """
    trained = state.trained if state.average is None else state.average
    return trained if state.tuned is None else merged(state.params, trained)


def start(
    model: nnx.Module,
    optimizer: optax.GradientTransformation,
    *,
    average: bool = False,
    adapters: LowRank | None = None,
    seed: int = 0,
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns the structure of a model and the state before the first update.

    Args:
        model: the model with its initial parameters.
        optimizer: the optimizer; its state is created here.
        average: if True, the state also keeps an exponential moving average of what is trained.
        adapters: the adapters to train in place of the parameters; None to train the parameters.
        seed: the seed of the adapters.

    Returns:
        The graph definition of the model, and a `TrainState` at step 0.

    Raises:
        ValueError: the adapters do not fit the model; see `train.update.adapters.drawn`.
    """
    graph, params = nnx.split(model, nnx.Param)
    tuned = None if adapters is None else drawn(params, adapters, seed=seed)
    state = TrainState(jnp.zeros((), jnp.int32), params, (), tuned=tuned)
    # The average is kept in float32: the increment of one update is below the precision of bfloat16.
    copy = jax.tree.map(jnp.array, widened(state.trained)) if average else None
    return graph, dataclasses.replace(state, opt_state=optimizer.init(state.trained), average=copy)


def start_shapes(
    model: nnx.Module, optimizer: optax.GradientTransformation, **settings: Any
) -> tuple[nnx.GraphDef, TrainState]:
    """`start` for a model of shapes, as from `nnx.eval_shape`: a state of `jax.ShapeDtypeStruct`, without arrays."""
    graph, params = nnx.split(model, nnx.Param)
    return graph, jax.eval_shape(lambda params: start(nnx.merge(graph, params), optimizer, **settings)[1], params)


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
    prepare: Callable[[nnx.Module], nnx.Module] = _as_they_are,
) -> Update:
    """Makes the function that computes one update from the gradient of the mean loss.

    Dropout masks depend only on seed, step and device, so a resumed run drops the same units. Losses and label
    counts are summed over micro-batches and devices before the division, so every label has the same weight.

    If the loss or the gradient norm is not finite, the update is skipped: parameters, optimizer state and average stay
    bitwise the same.

    Args:
        graph: the model's structure, as from `start`.
        optimizer: turns gradients into updates.
        loss: returns the summed loss and the number of labels of a batch; see `Loss`.
        seed: the seed of dropout.
        label_smoothing: epsilon of label smoothing (Szegedy 2016, section 7), in [0, 1).
        pieces: number of micro-batches. They are computed one after the other and their gradients are added, which
            needs less memory and gives the same update.
        compute_dtype: the dtype of the forward and backward pass; None for the dtype of the parameters. Parameters keep
            their dtype. Gradients, their sums and their norm are float32 or wider.
        decay: the upper limit of the decay of the moving average (Polyak 1992). After n updates the decay is
            `min(decay, (1 + n) / (10 + n))`. None if the state has no average.
        patience: the number of consecutive skipped updates after which every further update is skipped too.
        prepare: changes the model before it computes, such as `Sharded.prepare`; parameters stay as they are.

    Returns:
        A pure function `update(state, batch, axis_name=None, gathered=...) -> (state, metrics)`. With `axis_name`,
        losses and gradients are summed over that axis of `jax.pmap`. `gathered` is applied to the parameters, in the
        dtype of the computation, where they are used; it is differentiated too.

    Raises:
        ValueError: by `update` at trace time, if the rows of the batch are not a multiple of `pieces`.
    """
    given = (seed, label_smoothing, pieces, compute_dtype, decay, patience, prepare)
    settings = _Settings(*given, gathered=_as_they_are, weights=_as_they_are)

    def update(
        state: TrainState,
        batch: dict[str, jax.Array],
        axis_name: str | None = None,
        gathered: Callable[[Any], Any] = _as_they_are,
    ) -> tuple[TrainState, Metrics]:
        # The key follows from the step, not from a key in the state: a resumed run repeats the dropout of this step.
        key = jax.random.fold_in(jax.random.key(settings.seed), state.step)
        # Devices see different rows, so they must not share a dropout mask.
        key = key if axis_name is None else jax.random.fold_in(key, jax.lax.axis_index(axis_name))
        whole = _as_they_are if state.tuned is None else partial(merged, state.params)
        told = dataclasses.replace(settings, gathered=gathered, weights=whole)
        sums, gradients = _add_pieces(graph, loss, told, state.trained, batch, key)
        # pmap differentiates each device's own sum, so the gradients are added here; inside shard_map with its default
        # check_vma=True the same line would count them once for each device.
        sums, gradients = (sums, gradients) if axis_name is None else jax.lax.psum((sums, gradients), axis_name)
        # Divided once, by the labels of all devices: a mean of the devices' means would give more weight to labels on a
        # device with fewer of them. The maximum avoids 0 / 0 for a batch without labels.
        labels = jnp.maximum(sums["count"], 1)
        gradients = jax.tree.map(lambda gradient: gradient / labels, gradients)
        metrics = {"loss": sums["total"] / labels, "tokens": sums["count"], "gradient_norm": optax.tree.norm(gradients)}
        if "dropped" in sums:
            metrics["dropped"] = sums["dropped"] / jnp.maximum(sums["choices"], 1)
        # Running statistics follow the whole batch, so they move after the sums over micro-batches and devices.
        move = partial(_moved, graph, sums["measured"], state.params)
        return _applied(optimizer, settings, state, gradients, metrics, move), metrics

    return update


def _add_pieces(
    graph: nnx.GraphDef, loss: Loss, settings: _Settings, trained: Any, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[dict[str, Any], Any]:
    """Sums of losses and labels, and the gradient of the summed loss, added over the micro-batches."""
    pieces = settings.pieces
    # A scan of one step would keep an accumulator of the size of the gradients for nothing.
    if pieces == 1:
        return _sums_and_gradients(graph, loss, settings, trained, batch, key)

    def add(total: Any, piece: tuple[dict[str, jax.Array], jax.Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, _sums_and_gradients(graph, loss, settings, trained, *piece)), None

    # Micro-batch i takes rows i, i + pieces, ...: every micro-batch has the same number of rows.
    split = {name: _pieces(name, array, pieces) for name, array in batch.items()}
    keys = jax.random.split(key, pieces)
    # The accumulator has the dtypes of the sums: float32 or wider, also for bfloat16 parameters.
    first = jax.eval_shape(lambda: _sums_and_gradients(graph, loss, settings, trained, _first(split), keys[0]))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), first)
    # A scan runs the micro-batches one after the other, so the activations of only one are in memory.
    total, _ = jax.lax.scan(add, zeros, (split, keys))
    return total


def _pieces(name: str, array: jax.Array, pieces: int) -> jax.Array:
    """Reshapes `[B, ...]` to `[pieces, B / pieces, ...]`, one micro-batch for each index of the first axis."""
    if len(array) % pieces:
        raise ValueError(
            f"the batch's {len(array)} rows ({name}) must be a multiple of the {pieces} pieces of an update"
        )
    return jnp.swapaxes(array.reshape(len(array) // pieces, pieces, *array.shape[1:]), 0, 1)


def _first(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _sums_and_gradients(
    graph: nnx.GraphDef, loss: Loss, settings: _Settings, trained: Any, batch: dict[str, jax.Array], key: jax.Array
) -> tuple[dict[str, Any], Any]:
    """The sums of one micro-batch, and the gradient of its summed loss."""

    def total_loss(trained: Any) -> tuple[jax.Array, dict[str, Any]]:
        # The cast is inside the differentiated function, so gradients have the dtype of the parameters.
        # Adapters are added before the cast, as in the model that is loaded later. Cast before the gathering: devices
        # then send each other the narrower numbers.
        cast = _cast(settings.weights(trained), settings.compute_dtype)
        model = settings.prepare(nnx.merge(graph, settings.gathered(cast)))
        given = _cast(batch, settings.compute_dtype)
        options: dict[str, Any] = {"label_smoothing": settings.label_smoothing, "dropout_key": key}
        (total, count), found, measured = _told(loss, model, given, **options)
        sums: dict[str, Any] = {"total": total, "count": count, "measured": measured}
        if not found:
            return total, sums
        sums["dropped"] = jnp.sum(jnp.stack([routing.dropped for routing in found]))
        sums["choices"] = jnp.sum(jnp.stack([routing.load.sum() for routing in found]))
        # The balancing loss is a mean over tokens. The update divides by the number of labels later, so multiply by it.
        return total + count * sum(routing.loss for routing in found), sums

    (_, sums), gradients = jax.value_and_grad(total_loss, has_aux=True)(trained)
    # Widened before they are added: sums in bfloat16 would lose the gradients of later micro-batches.
    return sums, widened(gradients)


def _told(loss: Loss, model: nnx.Module, *args: Any, **options: Any) -> tuple[Any, list[Routing], list[BatchSums]]:
    """The loss, the routings of mixtures of experts, and the sums that batch norms measured."""
    # Capturing intermediate values costs trace time, so models without these modules skip it.
    if not any(isinstance(module, MixtureOfExperts | BatchNorm) for _, module in nnx.iter_modules(model)):
        return loss(model, *args, **options), [], []
    losses, (routed, measured) = captured(loss, (Routed, Measured), model, *args, **options)
    return losses, routings_among(routed, model), measurements_among(measured, model)


def _cast(tree: Any, dtype: DTypeLike | None) -> Any:
    """Casts the floating-point leaves of a tree, except running statistics.

    Batch norms report their measurements as distances from the running statistics, which must stay exact.
    """

    def cast(leaf: Any) -> Any:
        wanted = not isinstance(leaf, Statistic) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return jax.tree.map(lambda array: array.astype(dtype), leaf) if wanted else leaf

    return tree if dtype is None else jax.tree.map(cast, tree, is_leaf=lambda leaf: isinstance(leaf, nnx.Variable))


def _moved(graph: nnx.GraphDef, measured: Sequence[BatchSums], before: Any, params: Any) -> Any:
    """The updated parameters, with running statistics moved from their values before the update."""
    if not measured:
        return params
    # Statistics have no gradient, but weight decay or momentum may have changed them: take the old values.
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
    """The state after a batch: updated, or unchanged except for the counters if the loss or gradient is not finite."""
    # Clipping is the first part of the optimizer (`Optimizer.make`), so the metrics have the norm before clipping.
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.trained)
    trained, average = optax.apply_updates(state.trained, updates), state.average
    changed = {"params": move(trained)} if state.tuned is None else {"params": move(state.params), "tuned": trained}
    after = dataclasses.replace(state, **changed)
    if settings.decay is not None:
        # A fixed decay near 1 would keep the initial parameters in the average for thousands of updates. Updates that
        # were skipped do not count, since they left the average as it was.
        made = (state.step - state.skipped).astype(jnp.float32)
        decay = jnp.minimum(settings.decay, (1 + made) / (10 + made))
        average = optax.incremental_update(widened(after.trained), average, 1 - decay)
    # The norm is finite only if every gradient is, so two scalars cover all parameters.
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(metrics["gradient_norm"])
    # The host reads the counter only now and then. The state stops changing here, so the result does not depend on when
    # the host reads it.
    sound = finite & (state.skipped_in_a_row < settings.patience)
    old = (state.params, state.opt_state, state.average, state.tuned)
    # Selected on the devices, so that no step waits for the host. NaN in the values not taken does not spread.
    params, opt_state, average, others = jax.tree.map(
        lambda new, old: jnp.where(sound, new, old), (after.params, opt_state, average, after.tuned), old
    )
    # The step counts skipped batches too: it selects the next batch and the dropout key.
    left_out = 1 - sound.astype(jnp.int32)
    in_a_row = jnp.where(sound, 0, state.skipped_in_a_row + left_out)
    return TrainState(state.step + 1, params, opt_state, state.skipped + left_out, in_a_row, average, others)
