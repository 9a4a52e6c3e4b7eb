"""Gradients to updates: an algorithm over a schedule, gradients clipped by their global norm."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from seqattn.checks import check_number
from seqattn.precision import widened
from train.update.parameters import matching, matrices


class _Checked:
    """Settings of which each number follows the rule of its name."""

    def __post_init__(self) -> None:
        for name, limits in _LIMITS.items():
            if hasattr(self, name):
                check_number(name, getattr(self, name), **limits)


_LIMITS: dict[str, dict[str, Any]] = {
    name: limits
    for names, limits in (
        (("rate", "peak", "factor", "weight_decay", "initial", "warmup_steps"), {"minimum": 0}),
        (("beta1", "beta2", "momentum"), {"minimum": 0, "below": 1}),
        (("epsilon", "root_mean_square"), {"above": 0}),
        (("final",), {"minimum": 0, "maximum": 1}),
        (("model_dim", "every"), {"minimum": 1}),
    )
    for name in names
}
"""What a number must be, by its name."""


@dataclasses.dataclass(frozen=True)
class Constant(_Checked):
    """One rate after a linear warm-up."""

    rate: float = 1e-3
    """Learning rate."""
    warmup_steps: int = 0
    """Updates over which the rate rises from 0."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update, counted from 0."""
        del steps
        return lambda step: self.rate * _warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Noam(_Checked):
    """`factor * model_dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)` (Vaswani 2017, equation 3)."""

    model_dim: int = 512
    """D of the equation."""
    warmup_steps: int = 4000
    """Updates until the peak."""
    factor: float = 1.0
    """Multiplies the whole."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) of Noam must be at least 1")

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update; the first update is step 1 of the equation."""
        del steps

        def rate(step: jax.Array) -> jax.Array:
            count = jnp.asarray(step, jnp.float32) + 1
            return self.factor * self.model_dim**-0.5 * jnp.minimum(count**-0.5, count * self.warmup_steps**-1.5)

        return rate


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot(_Checked):
    """Linear warm-up to a peak, then `peak * (warmup_steps / step)**0.5` (fairseq's inverse_sqrt)."""

    peak: float = 5e-4
    """Highest learning rate."""
    warmup_steps: int = 4000
    """Updates until the peak."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update; the first update is step 1."""
        del steps
        start = max(1, self.warmup_steps)

        def rate(step: jax.Array) -> jax.Array:
            count = jnp.asarray(step, jnp.float32) + 1
            return self.peak * jnp.minimum(count / start, (start / count) ** 0.5)

        return rate


@dataclasses.dataclass(frozen=True)
class Cosine(_Checked):
    """Linear warm-up to a peak, then half a cosine down to a share of it (Loshchilov 2017)."""

    peak: float = 1e-3
    """Highest learning rate."""
    warmup_steps: int = 100
    """Updates until the peak."""
    final: float = 0.0
    """Share of the peak at the last update."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update of `steps` in all."""
        if self.warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({steps}); "
                "set --optimizer.schedule.warmup-steps"
            )
        decay = optax.cosine_decay_schedule(self.peak, steps - self.warmup_steps, alpha=self.final)
        # Not `optax.warmup_cosine_decay_schedule`: its first update has the rate 0.
        return optax.join_schedules(
            [lambda step: self.peak * _warmup(step, self.warmup_steps), decay], [self.warmup_steps]
        )


@dataclasses.dataclass(frozen=True)
class InverseTime(_Checked):
    """`rate / (t + 1)`, where t counts periods of `every` updates (the lecture's schedule, a period an epoch)."""

    rate: float = 1e-3
    """Learning rate of the first period."""
    every: int = 1000
    """Updates in a period."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update."""
        del steps
        return lambda step: self.rate / (1.0 + jnp.asarray(step) // self.every)


@dataclasses.dataclass(frozen=True)
class SGD:
    """Stochastic gradient descent: the gradient times the learning rate (Robbins 1951)."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.sgd(rate)


@dataclasses.dataclass(frozen=True)
class Momentum(_Checked):
    """A running sum of gradients times the learning rate (Polyak 1964; Sutskever 2013, equations 1 to 4)."""

    momentum: float = 0.9
    """Decay of the sum of gradients."""
    nesterov: bool = False
    """Look ahead: add the gradient once more to the sum after it decayed once more (Nesterov 1983)."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.sgd(rate, momentum=self.momentum, nesterov=self.nesterov)


@dataclasses.dataclass(frozen=True)
class AdaGrad(_Checked):
    """Gradients over the root of the sum of all squared gradients so far (Duchi 2011)."""

    initial: float = 0.1
    """What the sum starts from; 0 makes the first update of every weight as large as the learning rate."""
    epsilon: float = 1e-7
    """Added to the sum under the root."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.adagrad(rate, initial_accumulator_value=self.initial, eps=self.epsilon)


@dataclasses.dataclass(frozen=True)
class Adam(_Checked):
    """Adam (Kingma 2015)."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        return optax.adam(rate, b1=self.beta1, b2=self.beta2, eps=self.epsilon)


@dataclasses.dataclass(frozen=True)
class AdamW(_Checked):
    """Adam with decoupled weight decay on matrices, not on norms and biases (Loshchilov 2019)."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""
    weight_decay: float = 0.01
    """Share of each weight taken away in an update, times the learning rate."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        betas = {"b1": self.beta1, "b2": self.beta2, "eps": self.epsilon}
        return optax.adamw(rate, **betas, weight_decay=self.weight_decay, mask=matrices)


@dataclasses.dataclass(frozen=True)
class Muon(_Checked):
    """Momentum of matrices, orthogonalised (Jordan 2024); everything else, tables and logits too, by AdamW.

    An orthogonal matrix has the root mean square 1 / sqrt(its longer side); the update is scaled to a fixed one, so
    that learning rate and weight decay of AdamW serve both (Liu 2025, equation 4). Of an array with more than two
    axes, as of the weights of experts, the last two are a matrix.
    """

    momentum: float = 0.95
    """Decay of the mean of gradients of matrices."""
    root_mean_square: float = 0.2
    """That of an update of a matrix, times the learning rate; 0.2 is about that of Adam."""
    weight_decay: float = 0.01
    """Share of each weight of a matrix taken away in an update, times the learning rate."""
    adam: tuple[str, ...] = ("*table*", "output/kernel", "head/output/kernel", "decoder/output/kernel")
    """Matrices that are left to AdamW, by globs of their paths: tables of vectors, and layers that give logits."""
    beta1: float = 0.9
    """AdamW's decay of the mean of gradients."""
    beta2: float = 0.98
    """AdamW's decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""

    def transformation(self, rate: optax.Schedule) -> optax.GradientTransformation:
        """Gradients to updates."""
        muon = optax.chain(
            optax.contrib.scale_by_muon(beta=self.momentum, weight_dimension_numbers=_last_two_axes),
            optax.stateless_with_tree_map(lambda update, _: self._scale(update.shape) * update),
            optax.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(rate),
        )
        adam = AdamW(self.beta1, self.beta2, self.epsilon, self.weight_decay).transformation(rate)
        return optax.partition({"muon": muon, "adam": adam}, self._labels)

    def _scale(self, shape: tuple[int, ...]) -> float:
        return self.root_mean_square * max(shape[-2:]) ** 0.5

    def _labels(self, params: optax.Params) -> optax.Params:
        by_muon = jax.tree.map(
            lambda is_matrix, to_adam: is_matrix and not to_adam, matrices(params), matching(params, self.adam)
        )
        return jax.tree.map(lambda muon: "muon" if muon else "adam", by_muon)


Algorithm = SGD | Momentum | AdaGrad | Adam | AdamW | Muon
"""How steps are scaled: `transformation(rate)` makes the optax transformation."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates."""

    algorithm: Algorithm = AdamW()
    """How steps are scaled."""
    schedule: Constant | Noam | InverseSquareRoot | Cosine | InverseTime = Cosine()
    """The learning rate over time."""
    clip_norm: float | None = 1.0
    """Most that the norm of all gradients together may be; None for no limit."""

    def make(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates.

        Its state is float32 at least, whatever the dtype of the parameters; updates have that of the gradients.
        """
        if self.clip_norm is not None:
            check_number("clip_norm", self.clip_norm, above=0, finite=False, hint=", or None for no limit")
        update = self.algorithm.transformation(self.schedule.schedule(steps))
        # With a limit or without one, the state has the same leaves: a run may go on with the other.
        limit = optax.identity() if self.clip_norm is None else optax.clip_by_global_norm(self.clip_norm)
        return _wide(optax.chain(limit, update))


def _wide(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same with gradients, parameters and so its own state in float32 at least.

    Optax keeps second moments in the dtype of the parameters. In bfloat16 a decay of 0.999 is 1, so that they never
    fall, and what one step adds to them is soon less than half of their last bit.
    """

    def init(params: optax.Params) -> optax.OptState:
        return transformation.init(widened(params))

    def update(
        gradients: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = transformation.update(widened(gradients), state, widened(params))
        return jax.tree.map(lambda update, gradient: update.astype(gradient.dtype), updates, gradients), state

    return optax.GradientTransformation(init, update)


def _last_two_axes(params: optax.Params) -> optax.Params:
    """What Muon orthogonalises of each array; all axes but the last two count matrices."""
    return jax.tree.map(lambda _: optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1), params)


def _warmup(step: jax.Array, steps: int) -> jax.Array:
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1) / max(1, steps))
