"""Gradients to updates: Adam or AdamW over a schedule, gradients clipped by their global norm."""

import dataclasses

import jax
import jax.numpy as jnp
import optax


@dataclasses.dataclass(frozen=True)
class Constant:
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
class Noam:
    """`factor * model_dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)` (Vaswani 2017, equation 3)."""

    model_dim: int = 512
    """D of the equation."""
    warmup_steps: int = 4000
    """Updates until the peak."""
    factor: float = 1.0
    """Multiplies the whole."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update; the first update is step 1 of the equation."""
        del steps

        def rate(step: jax.Array) -> jax.Array:
            count = jnp.asarray(step, jnp.float32) + 1
            return self.factor * self.model_dim**-0.5 * jnp.minimum(count**-0.5, count * self.warmup_steps**-1.5)

        return rate


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot:
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
class Cosine:
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
        return lambda step: jnp.where(
            step < self.warmup_steps,
            self.peak * _warmup(step, self.warmup_steps),
            decay(jnp.maximum(step - self.warmup_steps, 0)),
        )


@dataclasses.dataclass(frozen=True)
class InverseTime:
    """`rate / (t + 1)`, where t counts periods of `every` updates (the lecture's schedule, a period an epoch)."""

    rate: float = 1e-3
    """Learning rate of the first period."""
    every: int = 1000
    """Updates in a period."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update."""
        del steps
        if self.every < 1:
            raise ValueError(f"every ({self.every}) must be at least 1")
        return lambda step: self.rate / (1.0 + jnp.asarray(step) // self.every)


@dataclasses.dataclass(frozen=True)
class Adam:
    """Adam (Kingma 2015)."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay on matrices, not on norms and biases (Loshchilov 2019)."""

    beta1: float = 0.9
    """Decay of the mean of gradients."""
    beta2: float = 0.98
    """Decay of the mean of squared gradients."""
    epsilon: float = 1e-9
    """Added to the root of the latter."""
    weight_decay: float = 0.01
    """Share of each weight taken away in an update, times the learning rate."""


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """How gradients become updates."""

    algorithm: Adam | AdamW = AdamW()
    """How steps are scaled."""
    schedule: Constant | Noam | InverseSquareRoot | Cosine | InverseTime = Cosine()
    """The learning rate over time."""
    clip_norm: float | None = 1.0
    """Most that the norm of all gradients together may be; None for no limit."""

    def make(self, steps: int) -> optax.GradientTransformation:
        """The optax transformation for a run of `steps` updates."""
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm ({self.clip_norm}) must be positive, or None for no limit")
        rate, algorithm = self.schedule.schedule(steps), self.algorithm
        betas = {"b1": algorithm.beta1, "b2": algorithm.beta2, "eps": algorithm.epsilon}
        if isinstance(algorithm, AdamW):
            update = optax.adamw(rate, **betas, weight_decay=algorithm.weight_decay, mask=_matrices)
        else:
            update = optax.adam(rate, **betas)
        return update if self.clip_norm is None else optax.chain(optax.clip_by_global_norm(self.clip_norm), update)


def _matrices(params: optax.Params) -> optax.Params:
    return jax.tree.map(lambda param: param.ndim > 1, params)


def _warmup(step: jax.Array, steps: int) -> jax.Array:
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1) / max(1, steps))
