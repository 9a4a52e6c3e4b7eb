"""Learning-rate schedules: the rate of each update."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from train.update.limits import Checked


@dataclasses.dataclass(frozen=True)
class Constant(Checked):
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
class Noam(Checked):
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
class InverseSquareRoot(Checked):
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
class Cosine(Checked):
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
class InverseTime(Checked):
    """`rate / (t + 1)`, where t counts periods of `every` updates (the lecture's schedule, a period an epoch)."""

    rate: float = 1e-3
    """Learning rate of the first period."""
    every: int = 1000
    """Updates in a period."""

    def schedule(self, steps: int) -> optax.Schedule:
        """The rate of each update."""
        del steps
        return lambda step: self.rate / (1.0 + jnp.asarray(step) // self.every)


def _warmup(step: jax.Array, steps: int) -> jax.Array:
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1) / max(1, steps))
