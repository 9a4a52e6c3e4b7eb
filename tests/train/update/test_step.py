"""An update: every label weighs the same, on one device or several; dropout follows seed and step."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.models import Encoder, EncoderConfig, TokenLabels, Transformer, TransformerConfig
from seqattn.nn import BlockConfig, MixtureConfig, routings
from train.data.batches import collate
from train.devices.parallel import Replicated
from train.objectives import SequenceToSequence, Tagging
from train.update.step import make_update, start

BLOCK = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2, dropout_rate=0.0)
CONFIG = TransformerConfig(vocab_size=13, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK)
SGD, LOSS = optax.sgd(1.0), SequenceToSequence.loss


def rows(count):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 6, (count, 2))
    return [
        (generator.integers(4, 13, source).tolist(), [1, *generator.integers(4, 13, target).tolist(), 2])
        for source, target in lengths
    ]


def fresh(dropout_rate=0.0):
    config = dataclasses.replace(CONFIG, block=dataclasses.replace(BLOCK, dropout_rate=dropout_rate))
    return start(Transformer(config, rngs=nnx.Rngs(0)), SGD)


def mapped(update, count):
    """The update over some devices, as training makes it."""
    return Replicated().spread(update, jax.local_devices()[:count]).update


def closest(first, second):
    return max(float(abs(a - b).max()) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True))


@pytest.mark.parametrize("count", [2, 4])
def test_e5_several_devices_update_as_one_does(count):
    batch = collate(rows(8), (8, 6, 8))
    graph, state = fresh()
    update = make_update(graph, SGD, LOSS, seed=0)
    one, metrics = jax.jit(update)(state, batch)
    several, parallel = mapped(update, count)(state, batch)
    assert closest(one.params, several.params) < 1e-6
    assert float(metrics["loss"]) == pytest.approx(float(parallel["loss"]), rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(parallel["gradient_norm"]), rel=1e-5)


def test_e6_a_batch_that_does_not_divide_is_refused():
    graph, state = fresh()
    with pytest.raises(ValueError, match=r"3 rows .* must be a multiple of the 2 devices"):
        mapped(make_update(graph, SGD, LOSS, seed=0), 2)(state, collate(rows(3)))


def test_empty_rows_change_nothing():
    graph, state = fresh()
    update = jax.jit(make_update(graph, SGD, LOSS, seed=0))
    alone, metrics = update(state, collate(rows(3), (3, 6, 8)))
    filled, same = update(state, collate(rows(3), (5, 7, 9)))
    assert closest(alone.params, filled.params) < 1e-6
    assert metrics["tokens"] == same["tokens"] == sum(len(target) - 1 for _, target in rows(3))


def test_b4_a_batch_of_empty_rows_alone_leaves_the_parameters():
    graph, state = fresh()
    after, metrics = jax.jit(make_update(graph, SGD, LOSS, seed=0))(state, collate([], (2, 3, 4)))
    assert closest(state.params, after.params) == 0
    assert metrics["loss"] == 0
    assert metrics["tokens"] == 0


def test_the_update_is_the_gradient_of_the_mean_loss():
    batch = jax.tree.map(jax.numpy.asarray, collate(rows(3)))
    graph, state = fresh()
    after, metrics = jax.jit(make_update(graph, SGD, LOSS, seed=0, label_smoothing=0.1))(state, batch)

    def mean(params):
        total, count = LOSS(nnx.merge(graph, params), batch, label_smoothing=0.1)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(mean))(state.params)
    expected = jax.tree.map(lambda param, gradient: param - gradient, state.params, gradients)
    assert closest(after.params, expected) < 1e-6
    assert float(metrics["loss"]) == pytest.approx(float(value))
    assert int(after.step) == 1


def test_e7_dropout_follows_seed_and_step():
    batch = collate(rows(3))
    graph, state = fresh(dropout_rate=0.5)
    update = jax.jit(make_update(graph, SGD, LOSS, seed=0))
    later = dataclasses.replace(state, step=state.step + 1)
    losses = [float(update(s, batch)[1]["loss"]) for s in (state, state, later)]
    other = float(jax.jit(make_update(graph, SGD, LOSS, seed=1))(state, batch)[1]["loss"])
    assert losses[0] == losses[1]
    assert len({losses[0], losses[2], other}) == 3


def test_devices_drop_differently():
    """Two devices with the same rows: one dropout key for both would halve nothing but repeat it."""
    half = collate(rows(3))
    both = {name: np.concatenate([array, array]) for name, array in half.items()}
    graph, state = fresh(dropout_rate=0.5)
    update = make_update(graph, SGD, LOSS, seed=0)
    _, metrics = mapped(update, 2)(state, both)
    graph, state = fresh(dropout_rate=0.5)
    _, first = mapped(update, 1)(state, half)
    assert float(metrics["loss"]) != pytest.approx(float(first["loss"]), rel=1e-4)


@pytest.fixture(scope="module")
def experts():
    """A tagger with few places at its experts and a routing loss that is felt: graph, state and batch."""
    mixture = MixtureConfig(num_experts=3, top_k=2, capacity_factor=0.5, noise=False, balance_weight=3.0)
    block = dataclasses.replace(BLOCK, mixture=mixture)
    model = Encoder(EncoderConfig(13, num_layers=2, block=block, head=TokenLabels(5)), rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    lengths = [5, 3, 1, 4]
    examples = [(generator.integers(4, 13, n).tolist(), generator.integers(0, 5, n).tolist()) for n in lengths]
    return *start(model, SGD), collate(examples)


@pytest.mark.parametrize("devices", [1, 2])
def test_the_update_of_a_mixture_adds_the_loss_of_its_routing_on_each_device(experts, devices):
    graph, state, batch = experts
    size = len(batch["source"]) // devices
    parts = [{name: jax.numpy.asarray(leaf[i : i + size]) for name, leaf in batch.items()} for i in range(0, 4, size)]

    @jax.jit
    def by_hand(params, part):
        def total(params):
            (total, count), found = routings(
                Tagging.loss, nnx.merge(graph, params), part, dropout_key=jax.random.key(5)
            )
            assert len(found) == 2
            return total + count * (found[0].loss + found[1].loss), (total, count, found)

        return jax.value_and_grad(total, has_aux=True)(params)

    results = [by_hand(state.params, part) for part in parts]
    labels = sum(float(count) for (_, (_, count, _)), _ in results)
    gradients = jax.tree.map(lambda *leaves: sum(leaves) / labels, *[gradient for _, gradient in results])
    pure = sum(float(total) for (_, (total, _, _)), _ in results) / labels
    found = [routing for (_, (_, _, found)), _ in results for routing in found]
    dropped, choices = sum(int(each.dropped) for each in found), sum(int(each.load.sum()) for each in found)
    expected = jax.tree.map(lambda param, gradient: param - gradient, state.params, gradients)

    update = mapped(make_update(graph, SGD, Tagging.loss, seed=0), devices)
    after, metrics = update(jax.tree.map(jax.numpy.array, state), batch)
    assert closest(after.params, expected) < 1e-5
    assert float(metrics["loss"]) == pytest.approx(pure, rel=1e-5)
    assert float(metrics["tokens"]) == labels == 13
    assert 0 < dropped < choices == 2 * 2 * 13
    assert float(metrics["dropped"]) == pytest.approx(dropped / choices, rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(optax.tree.norm(gradients)), rel=1e-5)
    alone = np.abs(sum(float(each.loss) for each in found))
    assert alone > 1  # else the test could not tell


@pytest.mark.parametrize("devices", [1, 2])
def test_b7_pieces_of_a_batch_update_as_the_whole_does(devices):
    """The rows of a piece have other numbers of labels, so that a mean of means would be another update."""
    batch = collate(rows(12), (12, 6, 8))
    graph, state = fresh()
    whole, metrics = jax.jit(make_update(graph, SGD, LOSS, seed=0, label_smoothing=0.1))(state, batch)
    update = make_update(graph, SGD, LOSS, seed=0, label_smoothing=0.1, pieces=3)
    pieced, same = mapped(update, devices)(state, batch)
    assert closest(whole.params, pieced.params) < 1e-6
    assert float(metrics["tokens"]) == float(same["tokens"])
    assert float(metrics["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    assert float(metrics["gradient_norm"]) == pytest.approx(float(same["gradient_norm"]), rel=1e-5)


def test_pieces_of_a_mixture_update_as_devices_with_these_rows_do(experts):
    graph, state, batch = experts
    pieced, metrics = jax.jit(make_update(graph, SGD, Tagging.loss, seed=0, pieces=2))(state, batch)
    order = np.array([0, 2, 1, 3])  # a piece takes every second row, a device the first or the last half
    sorted_batch = {name: array[order] for name, array in batch.items()}
    update = mapped(make_update(graph, SGD, Tagging.loss, seed=0), 2)
    expected, same = update(jax.tree.map(jax.numpy.array, state), sorted_batch)
    assert closest(pieced.params, expected.params) < 1e-5
    assert metrics.keys() == same.keys()
    for name, value in metrics.items():
        assert float(value) == pytest.approx(float(same[name]), rel=1e-5)
    assert 0 < float(metrics["dropped"]) < 1


def test_pieces_drop_differently():
    half = collate(rows(3))
    both = {name: np.repeat(array, 2, axis=0) for name, array in half.items()}
    graph, state = fresh(dropout_rate=0.5)
    _, metrics = jax.jit(make_update(graph, SGD, LOSS, seed=0, pieces=2))(state, both)
    keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 0), 2)
    model, batch = nnx.merge(graph, state.params), jax.tree.map(jax.numpy.asarray, half)
    sums = [LOSS(model, batch, dropout_key=key) for key in keys]
    assert abs(float(sums[0][0]) - float(sums[1][0])) > 1e-3
    expected = sum(float(total) for total, _ in sums) / sum(float(count) for _, count in sums)
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-5)


def test_b8_no_piece_is_left_over_as_rows_that_do_not_divide_are_refused():
    graph, state = fresh()
    with pytest.raises(ValueError, match=r"3 rows .* must be a multiple of the 2 pieces"):
        jax.eval_shape(make_update(graph, SGD, LOSS, seed=0, pieces=2), state, collate(rows(3)))


def poisoned(model, batch, *, label_smoothing=0.0, dropout_key=None):
    """The loss, or NaN where the first target is as long as its row."""
    total, count = LOSS(model, batch, label_smoothing=label_smoothing, dropout_key=dropout_key)
    return jax.numpy.where(batch["target_length"][0] == batch["target"].shape[1], jax.numpy.nan, total), count


def unsound(batch):
    return batch | {"target_length": np.full_like(batch["target_length"], batch["target"].shape[1])}


def test_e3_an_update_that_is_not_finite_is_left_out_bit_by_bit():
    batch, adam = collate(rows(3), (3, 6, 8)), optax.adam(1e-2)
    graph, state = start(Transformer(CONFIG, rngs=nnx.Rngs(0)), adam, average=True)
    update = jax.jit(make_update(graph, adam, poisoned, seed=0, decay=0.5, patience=2))
    once, _ = update(state, batch)
    after, metrics = update(once, unsound(batch))
    assert np.isnan(metrics["loss"])
    for name in ("params", "opt_state", "average"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, name), getattr(once, name))
    assert [int(after.step), int(after.skipped), int(after.skipped_in_a_row)] == [2, 1, 1]
    again, _ = update(after, batch)
    assert [int(again.step), int(again.skipped), int(again.skipped_in_a_row)] == [3, 1, 0]
    assert closest(again.params, after.params) > 0
    expected, _ = update(once, batch)  # as if the bad batch had not been; without dropout the step decides nothing
    jax.tree.map(np.testing.assert_array_equal, again.params, expected.params)


def test_e3_after_so_many_updates_left_out_nothing_changes_any_more():
    batch = collate(rows(3), (3, 6, 8))
    graph, state = fresh()
    update = jax.jit(make_update(graph, SGD, poisoned, seed=0, patience=2))
    for _ in range(2):
        state, _ = update(state, unsound(batch))
    after, _ = update(state, batch)
    assert closest(after.params, state.params) == 0
    assert int(after.skipped_in_a_row) == int(after.skipped) == 3


def test_e4_an_infinite_gradient_is_no_update_though_it_could_be_clipped():
    """Infinity over its norm would be NaN."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))

    def steep(model, batch, **_):
        total, count = LOSS(model, batch)
        return total + jax.numpy.sqrt(model.embedding.table[...] * 0).sum(), count

    graph, state = start(Transformer(CONFIG, rngs=nnx.Rngs(0)), clipped)
    after, metrics = jax.jit(make_update(graph, clipped, steep, seed=0))(state, collate(rows(3)))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["gradient_norm"])
    assert closest(after.params, state.params) == 0


def test_the_moving_average_follows_the_parameters():
    batch = collate(rows(3))
    graph, state = start(Transformer(CONFIG, rngs=nnx.Rngs(0)), SGD, average=True)
    update = jax.jit(make_update(graph, SGD, LOSS, seed=0, decay=0.3))
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    for decay in (1 / 10, 2 / 11, 3 / 12, 0.3, 0.3, 0.3):  # 4 / 13 would be more than 0.3
        state, _ = update(state, batch)
        expected = jax.tree.map(lambda old, new, d=decay: old + (1 - d) * (new - old), expected, state.params)
        assert closest(state.average, expected) < 1e-6


def test_bfloat16_computes_nearly_the_same_with_parameters_in_float32():
    batch = collate(rows(8))
    graph, state = fresh()
    whole, metrics = jax.jit(make_update(graph, SGD, LOSS, seed=0))(state, batch)
    half, mixed = jax.jit(make_update(graph, SGD, LOSS, seed=0, compute_dtype="bfloat16"))(state, batch)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype("float32")}
    assert 0 < abs(float(mixed["loss"]) - float(metrics["loss"])) < 0.03
    moved = jax.tree.map(lambda new, old: np.asarray(new - old).ravel(), whole.params, state.params)
    nearly = jax.tree.map(lambda new, old: np.asarray(new - old).ravel(), half.params, state.params)
    first, second = (np.concatenate(jax.tree.leaves(tree)) for tree in (moved, nearly))
    assert np.dot(first, second) / np.linalg.norm(first) / np.linalg.norm(second) > 0.99


BFLOAT16 = {"param_dtype": jax.numpy.bfloat16, "rngs": nnx.Rngs(0)}


def test_the_moving_average_of_bfloat16_parameters_is_float32():
    """Half of the last bit of a bfloat16 is a 512th of it: a thousandth of the way to new parameters would be lost."""
    graph, state = start(Transformer(CONFIG, **BFLOAT16), SGD, average=True)
    late = dataclasses.replace(state, step=jax.numpy.array(10**6, np.int32))
    after, _ = jax.jit(make_update(graph, SGD, LOSS, seed=0, decay=0.999))(late, collate(rows(3)))
    old, new = (jax.tree.map(lambda x: np.asarray(x, np.float64), each.params) for each in (state, after))
    expected = jax.tree.map(lambda old, new: old + 0.001 * (new - old), old, new)
    assert {leaf.dtype for leaf in jax.tree.leaves(after.average)} == {np.dtype(np.float32)}
    assert closest(after.average, expected) < 1e-6 < 0.001 * closest(new, old)


def test_gradients_of_bfloat16_parameters_are_summed_in_float32():
    """A bfloat16 sum of 256 pieces that are alike loses all that is below a 512th of it."""
    batch = jax.tree.map(lambda array: np.repeat(array, 256, axis=0), collate(rows(1)))
    graph, state = start(Transformer(CONFIG, **BFLOAT16), SGD)
    norms = [
        float(jax.jit(make_update(graph, SGD, LOSS, seed=0, pieces=pieces))(state, given)[1]["gradient_norm"])
        for pieces, given in ((256, batch), (1, collate(rows(1))))
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_model_without_experts_says_nothing_of_them():
    graph, state = fresh()
    _, metrics = jax.eval_shape(make_update(graph, SGD, LOSS, seed=0), state, collate(rows(3)))
    assert metrics.keys() == {"loss", "tokens", "gradient_norm"}
