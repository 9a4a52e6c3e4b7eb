"""Learning-rate schedules.

Each schedule is a frozen dataclass of settings. `schedule(steps)` returns a function of optax: from the number of
updates already made (0 for the first update) to the learning rate, a float32 scalar.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from train.update.limits import Checked


@dataclasses.dataclass(frozen=True)
class Constant(Checked):
    """A constant rate after a linear warm-up."""

    rate: float = 1e-3
    """Learning rate after the warm-up."""
    warmup_steps: int = 0
    """Updates of linear warm-up; update n of them has the rate rate * n / warmup_steps. 0 for no warm-up."""

    def schedule(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the update, counted from 0; `steps` is ignored."""
        del steps
        return lambda step: self.rate * _warmup(step, self.warmup_steps)


@dataclasses.dataclass(frozen=True)
class Noam(Checked):
    """`factor * model_dim**-0.5 * min(step**-0.5, step * warmup_steps**-1.5)` (Vaswani 2017, equation 3)."""

    model_dim: int = 512
    """d_model in the equation; usually the model's dimension."""
    warmup_steps: int = 4000
    """Updates of linear warm-up; the rate is highest at the last of them. At least 1."""
    factor: float = 1.0
    """Factor that multiplies the equation."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The shared check allows 0, for which the equation divides by zero.
        if self.warmup_steps < 1:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) of Noam must be at least 1")

    def schedule(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the update; the first update is step 1 of the equation."""
        del steps

        def rate(step: jax.Array) -> jax.Array:
            # Optax counts from 0, the paper from 1, where step 0 would divide by zero.
            count = jnp.asarray(step, jnp.float32) + 1
            return self.factor * self.model_dim**-0.5 * jnp.minimum(count**-0.5, count * self.warmup_steps**-1.5)

        return rate


@dataclasses.dataclass(frozen=True)
class InverseSquareRoot(Checked):
    """Linear warm-up to a peak, then `peak * (warmup_steps / step)**0.5` (inverse_sqrt of fairseq, Ott 2019)."""

    peak: float = 5e-4
    """Highest learning rate."""
    warmup_steps: int = 4000
    """Updates of linear warm-up to the peak; 0 starts at the peak."""

    def schedule(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the update; the first update is step 1."""
        del steps
        # The decay needs a step to start from, also without a warm-up.
        start = max(1, self.warmup_steps)

        def rate(step: jax.Array) -> jax.Array:
            # The two curves cross at the last step of the warm-up, so the minimum joins them.
            count = jnp.asarray(step, jnp.float32) + 1
            return self.peak * jnp.minimum(count / start, (start / count) ** 0.5)

        return rate


@dataclasses.dataclass(frozen=True)
class Cosine(Checked):
    """Linear warm-up to a peak, then half a cosine to `final * peak` (Loshchilov 2017, equation 5, no restarts)."""

    peak: float = 1e-3
    """Highest learning rate."""
    warmup_steps: int = 100
    """Updates of linear warm-up to the peak; must be fewer than the updates of the run. 0 starts at the peak."""
    final: float = 0.0
    """Learning rate at the end of the run, as a share of the peak: 0 to 1."""

    def schedule(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the update, for a run of `steps` updates.

        Raises:
            ValueError: the warm-up is not shorter than the run.
        """
        # Without an update after the warm-up the cosine would have no length.
        if self.warmup_steps >= steps:
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be fewer than steps ({steps}); "
                "set --optimizer.schedule.warmup-steps"
            )
        decay = optax.cosine_decay_schedule(self.peak, steps - self.warmup_steps, alpha=self.final)
        # Not `optax.warmup_cosine_decay_schedule`: its first update has the rate 0 and changes nothing.
        return optax.join_schedules(
            [lambda step: self.peak * _warmup(step, self.warmup_steps), decay], [self.warmup_steps]
        )


@dataclasses.dataclass(frozen=True)
class InverseTime(Checked):
    """`rate / (t + 1)`, where t is the number of completed periods of `every` updates.

    This is the schedule of the lecture, where a period is an epoch.
    """

    rate: float = 1e-3
    """Learning rate in the first period."""
    every: int = 1000
    """Updates per period; the rate falls once per period."""

    def schedule(self, steps: int) -> optax.Schedule:
        """Returns the learning rate as a function of the update; `steps` is ignored."""
        del steps
        # The integer division keeps the rate constant within a period.
        return lambda step: self.rate / (1.0 + jnp.asarray(step) // self.every)


def _warmup(step: jax.Array, steps: int) -> jax.Array:
    # Plus 1, so that the first update already has a positive rate and the last one of the warm-up has the full rate.
    return jnp.minimum(1.0, (jnp.asarray(step, jnp.float32) + 1) / max(1, steps))
