"""Batch norm while it trains: its running statistics are a part of the state, and follow the batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.models import Captioner, CaptionerConfig, Convolutional, Seq2SeqConfig, TransformerConfig
from seqattn.nn import BlockConfig, MixtureConfig, OverBatch, Statistic
from train.checkpoints.checkpoints import Checkpoints
from train.data.batches import collate
from train.devices.parallel import Replicated, Sharded
from train.objectives import Reading
from train.update.step import make_update, start

HEIGHT, WIDTH = 8, 7
CONFIG = CaptionerConfig(13, Convolutional((3, 5), norm=OverBatch(momentum=0.75)), Seq2SeqConfig(0, 8, 6))
SGD = optax.sgd(0.1)
MEAN, VARIANCE = ("image", "norms", 0, "mean"), ("image", "norms", 0, "variance")


def rows(count):
    generator = np.random.default_rng(0)
    return [
        (generator.integers(0, 255, (HEIGHT, WIDTH), np.uint8), [1, *generator.integers(4, 13, 3).tolist(), 2])
        for _ in range(count)
    ]


BATCH = collate(rows(6), (8, HEIGHT, 5))  # two rows only fill it


def fresh(*, average=False, optimizer=SGD):
    return start(Captioner(CONFIG, rngs=nnx.Rngs(0)), optimizer, average=average)


def updated(graph, state, batch=BATCH, **settings):
    return jax.jit(make_update(graph, SGD, Reading.loss, seed=0, **settings))(state, batch)[0]


def statistics(params):
    return {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(params) if isinstance(leaf, Statistic)}


def assert_close(first, second, **tolerance):
    assert first.keys() == second.keys()
    for path, value in first.items():
        np.testing.assert_allclose(value, second[path], **tolerance, err_msg=str(path))


def measured(graph, params):
    """Mean and variance of what the first convolution makes of the pictures of the batch, in float64."""
    images = BATCH["source"][:6].astype(np.float64)
    images -= images.mean(axis=(1, 2), keepdims=True)
    images /= np.sqrt((images**2).mean(axis=(1, 2), keepdims=True) + 1)
    convolution = nnx.merge(graph, params).image.convolutions[0]
    made = np.asarray(convolution(jnp.asarray(images[..., None], jnp.float32)), np.float64)
    return made.mean(axis=(0, 1, 2)), made.var(axis=(0, 1, 2))


def test_running_statistics_follow_the_real_pictures_of_each_batch():
    graph, state = fresh()
    expected = {MEAN: np.zeros(3), VARIANCE: np.ones(3)}
    for _ in range(3):
        for path, value in zip((MEAN, VARIANCE), measured(graph, state.params), strict=True):
            expected[path] = 0.75 * expected[path] + 0.25 * value
        state = updated(graph, state)
        found = statistics(state.params)
        assert_close({path: found[path] for path in expected}, expected, atol=1e-5)


def test_rows_that_fill_a_batch_count_in_no_statistic():
    graph, state = fresh()
    filled, exact = (updated(graph, state, collate(rows(6), (size, HEIGHT, 5))) for size in (8, 6))
    assert_close(statistics(filled.params), statistics(exact.params), atol=1e-6)


@pytest.mark.parametrize("pieces", [1, 2])
def test_devices_and_pieces_measure_the_whole_batch(pieces):
    """The first norm sees the same pictures however they are shared out, though not equally many everywhere."""
    graph, state = fresh()
    whole = statistics(updated(graph, state).params)
    update = make_update(graph, SGD, Reading.loss, seed=0, pieces=pieces)
    several, _ = Replicated().spread(update, jax.local_devices()[:2]).update(state, BATCH)
    found = statistics(several.params)
    for path in (MEAN, VARIANCE):
        np.testing.assert_allclose(found[path], whole[path], atol=1e-6)


def test_over_a_mesh_the_update_is_that_of_one_device():
    graph, state = fresh()
    whole = updated(graph, state)
    update = make_update(graph, SGD, Reading.loss, seed=0)
    several, _ = Sharded(data=2).spread(update, jax.local_devices()[:2]).update(state, BATCH)
    for ours, theirs in zip(jax.tree.leaves(several.params), jax.tree.leaves(whole.params), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_no_optimizer_moves_statistics():
    """They are what batches say, however the rest is trained."""
    adam = optax.adamw(0.1, weight_decay=0.5)
    graph, state = fresh(optimizer=adam)
    other, _ = jax.jit(make_update(graph, adam, Reading.loss, seed=0))(state, BATCH)
    graph, state = fresh()
    assert_close(statistics(other.params), statistics(updated(graph, state).params), rtol=1e-6)


def test_an_update_that_is_left_out_leaves_statistics_bit_by_bit():
    def poisoned(*args, **options):
        total, count = Reading.loss(*args, **options)
        return total * jnp.nan, count

    graph, state = fresh()
    after, _ = jax.jit(make_update(graph, SGD, poisoned, seed=0))(state, BATCH)
    for path, value in statistics(after.params).items():
        np.testing.assert_array_equal(value, statistics(state.params)[path])


def test_experts_tell_their_routing_beside_batch_norms():
    block = BlockConfig(model_dim=8, hidden_dim=5, num_heads=2, mixture=MixtureConfig(num_experts=3))
    config = dataclasses.replace(CONFIG, decoder=TransformerConfig(0, 0, 1, block))
    for image in (CONFIG.image, Convolutional((3, 5))):
        graph, state = start(Captioner(dataclasses.replace(config, image=image), rngs=nnx.Rngs(0)), SGD)
        after, metrics = jax.jit(make_update(graph, SGD, Reading.loss, seed=0))(state, BATCH)
        assert np.isfinite(metrics["loss"])
        assert metrics["dropped"] < 1
        moved, before = statistics(after.params), statistics(state.params)
        assert len(moved) == (4 if image is CONFIG.image else 0)
        assert not any(np.array_equal(value, before[path]) for path, value in moved.items())


def test_a_moving_average_has_averaged_statistics():
    graph, state = fresh(average=True)
    after = updated(graph, state, decay=0.05)
    expected = {path: 0.05 * x + 0.95 * statistics(after.params)[path] for path, x in statistics(state.params).items()}
    assert_close(statistics(after.average), expected, atol=1e-6)


def test_statistics_are_float32_where_the_loss_computes_in_bfloat16():
    graph, state = fresh()
    whole, half = (statistics(updated(graph, state, compute_dtype=x).params) for x in (None, "bfloat16"))
    assert {value.dtype for value in half.values()} == {np.dtype("float32")}
    assert_close(half, whole, atol=0.02)


def test_evaluation_uses_running_statistics_and_training_those_of_the_batch():
    graph, state = fresh()
    loss = jax.jit(lambda params, batch, key=None: Reading.loss(nnx.merge(graph, params), batch, dropout_key=key)[0])
    params = updated(graph, state).params
    given, key = rows(6), jax.random.key(0)
    one, others = collate(given[:1]), [collate([given[0], other]) for other in given[1:3]]
    alone = [float(loss(params, collate([other]))) for other in given[1:3]]
    for both, rest in zip(others, alone, strict=True):
        assert float(loss(params, both)) == pytest.approx(float(loss(params, one)) + rest, rel=1e-5)
    assert abs(float(loss(params, others[0], key) - loss(params, others[0]))) > 1e-3
    moved = updated(graph, state, collate(given[2:])).params
    assert float(loss(moved, one)) != float(loss(params, one))


def test_a_checkpoint_keeps_statistics_bit_by_bit_and_training_goes_on_from_them(tmp_path):
    graph, state = fresh()
    first = updated(graph, state)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.save(first, {})
        checkpoints.wait()
        again = checkpoints.restore(state)
    assert {path for path, _ in nnx.to_flat_state(again.params)} > statistics(first.params).keys()
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(first), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    again = dataclasses.replace(first, params=again.params)
    for ours, theirs in zip(
        jax.tree.leaves(updated(graph, again).params), jax.tree.leaves(updated(graph, first).params), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)
