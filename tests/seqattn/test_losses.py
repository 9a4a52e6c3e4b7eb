"""Cross entropy against NumPy float64: value, count and gradient."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from seqattn.losses import cross_entropy
from tests import oracle

B, T, V = 3, 5, 11
LOGITS = (4 * np.random.default_rng(0).normal(size=(B, T, V))).astype(np.float32)
LABELS = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = np.random.default_rng(2).choice([0.0, 0.5, 1.0, 2.0], (B, T)).astype(np.float32)


def _total(logits, labels, weights=None, label_smoothing=0.0):
    return cross_entropy(logits, labels, weights=weights, label_smoothing=label_smoothing)


_with_gradient = jax.jit(jax.value_and_grad(_total, has_aux=True), static_argnums=3)


def _agree(logits, labels, weights=None, label_smoothing=0.0, tolerance=1e-5):
    (total, count), gradient = _with_gradient(logits, labels, weights, label_smoothing)
    expected = oracle.cross_entropy(logits, labels, weights=weights, label_smoothing=label_smoothing)
    assert gradient.dtype == logits.dtype
    for actual, wanted in zip((total, count, gradient), expected, strict=True):
        np.testing.assert_allclose(np.asarray(actual).astype(np.float64), wanted, rtol=tolerance, atol=tolerance)
    return float(total), float(count), np.asarray(gradient)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weights", [None, WEIGHTS, WEIGHTS > 0.7], ids=["unweighted", "weighted", "boolean"])
def test_value_count_and_gradient_are_the_oracles(weights, label_smoothing):
    _agree(LOGITS, LABELS, weights, label_smoothing)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_small_dtypes_are_summed_in_float32(dtype):
    (total, count), _ = _with_gradient(LOGITS.astype(dtype), LABELS, WEIGHTS, 0.1)
    assert total.dtype == count.dtype == jnp.float32
    expected, _, gradient = oracle.cross_entropy(LOGITS.astype(dtype), LABELS, weights=WEIGHTS, label_smoothing=0.1)
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    _agree(LOGITS.astype(dtype), LABELS, WEIGHTS, 0.1, tolerance=2e-2)
    assert np.abs(gradient).max() > 0.5


def test_float64_stays_float64():
    with jax.enable_x64(True):
        (total, count), _ = _with_gradient(LOGITS.astype(np.float64), LABELS, None, 0.1)
        assert total.dtype == count.dtype == jnp.float64
        _agree(LOGITS.astype(np.float64), LABELS, WEIGHTS.astype(np.float64), 0.1, tolerance=1e-12)


def test_any_batch_dims():
    _agree(LOGITS[0, 0], LABELS[0, 0])
    _agree(LOGITS[:, :, None], LABELS[:, :, None], WEIGHTS[:, :, None], 0.1)
    total, count = cross_entropy(jnp.zeros((0, V)), jnp.zeros(0, jnp.int32))
    assert (float(total), float(count)) == (0, 0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_b4_when_every_label_is_masked_loss_and_gradient_are_zero(label_smoothing):
    nothing = np.zeros((B, T), np.float32)
    for labels, weights in ((LABELS, nothing), (np.full_like(LABELS, -100), None)):
        total, count, gradient = _agree(np.full_like(LOGITS, np.nan), labels, weights, label_smoothing)
        assert total == count == 0
        assert not gradient.any()


def test_b5_a_negative_label_counts_for_nothing_and_one_beyond_the_classes_is_an_error():
    for ignored in (-1, -100):
        labels = np.where(WEIGHTS == 0, ignored, LABELS)
        ours = _agree(LOGITS, labels)
        masked = _agree(LOGITS, LABELS, (WEIGHTS != 0).astype(np.float32))
        assert ours[:2] == masked[:2]
    beyond = LABELS.copy()
    beyond[1, 2] = V
    with pytest.raises(ValueError, match=r"a label \(11\) is not below the number of classes \(11\)"):
        cross_entropy(jnp.asarray(LOGITS), jnp.asarray(beyond))
    assert np.isnan(jax.jit(cross_entropy)(LOGITS, beyond)[0])


def test_b6_label_smoothing_leaves_padding_out():
    padding = WEIGHTS == 0
    assert padding.any()
    spoilt = np.where(padding[..., None], np.float32(1e4), LOGITS)
    total, count, gradient = _agree(spoilt, LABELS, WEIGHTS, label_smoothing=0.2)
    kept = _agree(LOGITS[~padding], LABELS[~padding], WEIGHTS[~padding], label_smoothing=0.2)
    np.testing.assert_allclose((total, count), kept[:2], rtol=1e-6)
    np.testing.assert_allclose(gradient[~padding], kept[2], atol=1e-6)
    assert not gradient[padding].any()


def test_nan_logits_of_weight_zero_leave_no_trace():
    spoilt = np.where((WEIGHTS == 0)[..., None], np.float32(np.nan), LOGITS)
    clean, ours = (_with_gradient(logits, LABELS, WEIGHTS, 0.1) for logits in (LOGITS, spoilt))
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(ours), strict=True):
        np.testing.assert_array_equal(a, b)


def test_nan_logits_that_count_are_not_hidden():
    spoilt = np.where((WEIGHTS == 2)[..., None], np.float32(np.nan), LOGITS)
    assert np.isnan(_with_gradient(spoilt, LABELS, WEIGHTS, 0.0)[0][0])


def test_a_label_that_does_not_count_may_be_anything():
    """Other libraries mark ignored labels by 255 or by the size of the vocabulary."""
    marked = np.where(WEIGHTS == 0, 255, LABELS)
    eager = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(marked), weights=jnp.asarray(WEIGHTS))
    jitted = _with_gradient(LOGITS, marked, WEIGHTS, 0.0)[0]
    expected = oracle.cross_entropy(LOGITS, LABELS, weights=WEIGHTS)[:2]
    np.testing.assert_allclose(eager, expected, rtol=1e-5)
    np.testing.assert_allclose(jitted, expected, rtol=1e-5)


def test_labels_of_few_bits_do_not_overflow():
    """In int8, 300 classes would be 44."""
    logits, labels = np.tile(LOGITS, 30)[:, 0, :300], np.array([5, 100, 127], np.int8)
    eager = cross_entropy(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_allclose(eager, oracle.cross_entropy(logits, labels)[:2], rtol=1e-5)
    _agree(logits, labels)


def test_impossible_classes_of_minus_infinity_cost_nothing():
    """Such as the unused rows of a vocabulary padded to a multiple of 128."""
    logits = LOGITS.copy()
    logits[..., 7:] = -np.inf
    total, _, gradient = _agree(logits, LABELS % 7, WEIGHTS)
    assert np.isfinite(total)
    assert not gradient[..., 7:].any()


def test_labels_from_outside_a_jitted_function():
    labels = jnp.asarray(LABELS)
    total, _ = jax.jit(lambda logits: cross_entropy(logits, labels))(LOGITS)
    np.testing.assert_allclose(total, oracle.cross_entropy(LOGITS, LABELS)[0], rtol=1e-5)


def test_large_logits_do_not_overflow():
    _agree(1e4 * LOGITS, LABELS, WEIGHTS, 0.1)


@pytest.mark.usefixtures("as_users_call_it")
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"labels": jnp.ones((B, T))}, TypeError, "labels must be integers, got float32"),
        ({"logits": jnp.ones((B, T, V), jnp.int32)}, TypeError, "logits must be floating, got int32"),
        ({"labels": jnp.ones(B, jnp.int32)}, ValueError, r"labels \(3,\) must have the shape of logits \(3, 5, 11\)"),
        ({"weights": jnp.ones(B)}, ValueError, r"weights \(3,\) must have the shape of labels \(3, 5\)"),
        ({"label_smoothing": 1.0}, ValueError, r"label_smoothing \(1.0\) must be in \[0, 1\)"),
        ({"label_smoothing": -0.1}, ValueError, r"label_smoothing \(-0.1\)"),
        ({"label_smoothing": float("nan")}, ValueError, r"label_smoothing \(nan\)"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(arguments, error, message):
    given = {"logits": jnp.asarray(LOGITS), "labels": jnp.asarray(LABELS)} | arguments
    with pytest.raises(error, match=message):
        cross_entropy(**given)
