"""Schedules against their formulas, and what decays and is clipped."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from train.optimizer import Adam, AdamW, Constant, Cosine, InverseSquareRoot, InverseTime, Noam, Optimizer

STEPS = 50


def rates(schedule, count=STEPS):
    return np.asarray(jax.vmap(jax.jit(schedule.schedule(STEPS)))(jnp.arange(count)))


def test_noam_is_equation_3_of_vaswani():
    expected = [2 * 16**-0.5 * min(s**-0.5, s * 7**-1.5) for s in range(1, STEPS + 1)]
    np.testing.assert_allclose(rates(Noam(model_dim=16, warmup_steps=7, factor=2.0)), expected, rtol=1e-5)


def test_inverse_square_root_peaks_at_the_end_of_the_warm_up():
    expected = [0.5 * min(s / 7, math.sqrt(7 / s)) for s in range(1, STEPS + 1)]
    np.testing.assert_allclose(rates(InverseSquareRoot(peak=0.5, warmup_steps=7)), expected, rtol=1e-5)


def test_cosine_rises_and_falls_to_its_final_share():
    values = rates(Cosine(peak=0.5, warmup_steps=5, final=0.1), STEPS + 1)
    np.testing.assert_allclose(values[:5], 0.5 * np.arange(1, 6) / 5, rtol=1e-5)
    halfway = 5 + (STEPS - 5) // 2
    expected = 0.5 * (0.1 + 0.9 * (1 + math.cos(math.pi * (halfway - 5) / (STEPS - 5))) / 2)
    np.testing.assert_allclose(values[[halfway, STEPS]], [expected, 0.05], rtol=1e-5)


def test_cosine_shorter_than_its_warm_up_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps \(50\) must be fewer than steps \(50\)"):
        Cosine(warmup_steps=50).schedule(STEPS)


def test_inverse_time_is_the_lecture_schedule():
    expected = [0.5 / (t + 1) for t in range(5) for _ in range(10)]
    np.testing.assert_allclose(rates(InverseTime(rate=0.5, every=10)), expected, rtol=1e-6)


def test_constant_after_its_warm_up():
    np.testing.assert_allclose(rates(Constant(rate=0.5, warmup_steps=4), 6), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5])


def updated(optimizer, gradient):
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    transformation = optimizer.make(STEPS)
    gradients = jax.tree.map(lambda param: jnp.full_like(param, gradient), params)
    updates, _ = transformation.update(gradients, transformation.init(params), params)
    return optax.apply_updates(params, updates)


def test_weight_decay_spares_biases_and_norms():
    decayed = updated(Optimizer(AdamW(weight_decay=0.5), Constant(rate=0.1)), 0.0)
    np.testing.assert_allclose(decayed["matrix"], 0.95)
    np.testing.assert_allclose(decayed["bias"], 1.0)


def test_adam_does_not_decay():
    np.testing.assert_allclose(updated(Optimizer(Adam(), Constant(rate=0.1)), 0.0)["matrix"], 1.0)


def test_gradients_are_clipped_by_their_common_norm():
    # With a huge epsilon Adam moves by gradient * rate / epsilon: the clipped gradient can be read off.
    adam = Adam(beta1=0.0, beta2=0.0, epsilon=1e6)
    moved = 1.0 - updated(Optimizer(adam, Constant(rate=1e6), clip_norm=0.3), 7.0)["matrix"]
    np.testing.assert_allclose(moved, 0.3 / math.sqrt(6), rtol=1e-2)
