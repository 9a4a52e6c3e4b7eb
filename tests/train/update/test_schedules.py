"""Schedules against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.update.schedules import Constant, Cosine, InverseSquareRoot, InverseTime, Noam

STEPS = 50


def rates(schedule, count=STEPS):
    return np.asarray(jax.vmap(jax.jit(schedule.schedule(STEPS)))(jnp.arange(count)))


def test_noam_is_equation_3_of_vaswani():
    expected = [2 * 16**-0.5 * min(s**-0.5, s * 7**-1.5) for s in range(1, STEPS + 1)]
    np.testing.assert_allclose(rates(Noam(model_dim=16, warmup_steps=7, factor=2.0)), expected, rtol=1e-5)


def test_inverse_square_root_peaks_at_the_end_of_the_warm_up():
    expected = [0.5 * min(s / 7, math.sqrt(7 / s)) for s in range(1, STEPS + 1)]
    np.testing.assert_allclose(rates(InverseSquareRoot(peak=0.5, warmup_steps=7)), expected, rtol=1e-5)


@pytest.mark.parametrize("warmup_steps", [0, 1, 5])
def test_cosine_is_its_formula_at_every_update(warmup_steps):
    def rate(step):
        if step < warmup_steps:
            return 0.5 * (step + 1) / warmup_steps
        share = min(1.0, (step - warmup_steps) / (STEPS - warmup_steps))
        return 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * share)) / 2)

    schedule = Cosine(peak=0.5, warmup_steps=warmup_steps, final=0.1)
    np.testing.assert_allclose(rates(schedule, STEPS + 9), [*map(rate, range(STEPS + 9))], rtol=1e-5)


def test_cosine_shorter_than_its_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps \(50\) must be fewer than steps \(50\)"):
        Cosine(warmup_steps=50).schedule(STEPS)


def test_inverse_time_is_the_lecture_schedule():
    expected = [0.5 / (t + 1) for t in range(5) for _ in range(10)]
    np.testing.assert_allclose(rates(InverseTime(rate=0.5, every=10)), expected, rtol=1e-6)


def test_constant_after_its_warm_up():
    np.testing.assert_allclose(rates(Constant(rate=0.5, warmup_steps=4), 6), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def test_noam_needs_a_warm_up():
    with pytest.raises(ValueError, match=r"warmup_steps \(0\) of Noam must be at least 1"):
        Noam(warmup_steps=0)
