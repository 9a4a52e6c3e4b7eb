"""Low-rank adapters: what they add to a kernel, what they leave as it was, and what they cost."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.models import (
    Captioner,
    CaptionerConfig,
    Convolutional,
    Encoder,
    EncoderConfig,
    Seq2Seq,
    Seq2SeqConfig,
    TokenLabels,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import BlockConfig, OverBatch
from train.data.batches import collate
from train.devices.parallel import Replicated, Sharded
from train.objectives import SequenceToSequence
from train.update.adapters import Adapter, LowRank, drawn, merged
from train.update.optimizer import AdamW, Muon
from train.update.parameters import paths
from train.update.step import make_update, start, start_shapes, weights

BLOCK = BlockConfig(model_dim=12, hidden_dim=20, num_heads=2, dropout_rate=0.1)
CONFIG = TransformerConfig(vocab_size=13, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK)
LOW = LowRank(rank=3, alpha=5.0, train=("*norm*",))
LOSS = SequenceToSequence.loss
QUERIES = LowRank(only=("*query/kernel",))


def flat(params):
    return dict(zip(jax.tree.leaves(paths(params)), map(np.asarray, jax.tree.leaves(params)), strict=True))


def batch(count=8):
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 6, (count, 2))
    rows = [
        (generator.integers(4, 13, source).tolist(), [1, *generator.integers(4, 13, target).tolist(), 2])
        for source, target in lengths
    ]
    return collate(rows, (count, 6, 8))


def begun(optimizer, adapters=LOW, **settings):
    return start(Transformer(CONFIG, rngs=nnx.Rngs(0)), optimizer, adapters=adapters, seed=7, **settings)


def away(state):
    """The state with adapters that change something: at first their second factor is zero."""
    keys = iter(jax.random.split(jax.random.key(1), 99))
    return dataclasses.replace(
        state, tuned=jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(next(keys), leaf.shape), state.tuned)
    )


def adapted(tuned):
    """The adapters by the path of their kernel."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(tuned, is_leaf=lambda node: isinstance(node, Adapter))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): node
        for path, node in nodes
        if isinstance(node, Adapter)
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_merged_kernel_is_the_dense_formula(dtype):
    model = Transformer(CONFIG, param_dtype=dtype, rngs=nnx.Rngs(0))
    _, state = start(model, optax.sgd(1.0), adapters=LOW)
    state = away(state)
    before, after, changed = flat(state.params), flat(weights(state)), adapted(state.tuned)
    assert len(changed) == 6  # two in each of three attentions
    for path, adapter in changed.items():
        a, b = (np.asarray(factor, np.float64) for factor in (adapter.a, adapter.b))
        expected = before[path].astype(np.float64) + 5 / 3 * a @ b
        assert after[path].dtype == before[path].dtype
        tolerance = {"rtol": 1e-6, "atol": 1e-6} if dtype == jnp.float32 else {"rtol": 2**-8}
        np.testing.assert_allclose(after[path].astype(np.float64), expected, **tolerance)
        assert np.abs(after[path].astype(np.float64) - before[path].astype(np.float64)).max() > 0.01


def test_the_first_update_starts_at_the_exact_model_and_the_first_factor_is_normal():
    _, state = begun(optax.sgd(1.0))
    before, after = flat(state.params), flat(weights(state))
    for path, value in before.items():
        assert after[path].tobytes() == value.tobytes(), path
    update = jax.jit(make_update(*_graphs(), seed=0))
    (_, plain), (_, tuned) = (update(each, batch()) for each in (begun(optax.sgd(1.0), None)[1], state))
    assert plain["loss"] == tuned["loss"]
    wide = nnx.state(nnx.Dict(query=nnx.Linear(199, 211, rngs=nnx.Rngs(0))), nnx.Param)
    wide = {"attention": {"query": wide["query"], "value": wide["query"]}}
    factors = [adapter.a for adapter in adapted(drawn(wide, LowRank(rank=97), seed=3)).values()]
    for a in factors:
        assert float(a.std()) == pytest.approx(199**-0.5, rel=0.03)
        assert abs(float((a**4).mean() / a.var() ** 2) - 3) < 0.2  # a uniform distribution has 1.8
    assert abs(np.corrcoef(*(np.ravel(a) for a in factors))[0, 1]) < 0.05


def _graphs():
    graph, _ = begun(optax.sgd(1.0))
    return graph, optax.sgd(1.0), LOSS


def test_gradients_are_those_of_the_merged_model_by_the_chain_rule():
    _, state = begun(optax.sgd(1.0))
    state = away(state)
    graph, sgd, _ = _graphs()
    whole = dataclasses.replace(state, params=weights(state), tuned=None, opt_state=sgd.init(state.params))
    update = jax.jit(make_update(graph, sgd, LOSS, seed=0))
    (after, metrics), (dense, same) = update(state, batch()), update(whole, batch())
    assert float(metrics["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    slope = {path: flat(whole.params)[path] - value for path, value in flat(dense.params).items()}
    for path, adapter in adapted(state.tuned).items():
        moved = adapted(after.tuned)[path]
        a, b = (np.asarray(factor, np.float64) for factor in (adapter.a, adapter.b))
        for found, expected in (
            (adapter.a - moved.a, 5 / 3 * slope[path] @ b.T),
            (adapter.b - moved.b, 5 / 3 * a.T @ slope[path]),
        ):
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=2e-6)
            assert np.abs(expected).max() > 1e-3
    norms = {path: value for path, value in flat(state.tuned).items() if "norm" in path}
    assert len(norms) == 5 * 2
    for path, value in norms.items():
        np.testing.assert_allclose(flat(after.tuned)[path], value - slope[path], atol=1e-6)


@pytest.mark.parametrize("algorithm", [AdamW(weight_decay=0.5), Muon(weight_decay=0.5)], ids=repr)
def test_what_is_not_tuned_stays_bitwise_and_costs_no_state(algorithm):
    optimizer = algorithm.transformation(lambda step: 0.05)
    graph, state = begun(optimizer, average=True)
    update = jax.jit(make_update(graph, optimizer, LOSS, seed=0, decay=0.5))
    after, _ = update(state, batch())
    for _ in range(2):
        after, _ = update(after, batch())
    for path, value in flat(state.params).items():
        assert flat(after.params)[path].tobytes() == value.tobytes(), path
    for path, value in flat(weights(state)).items():
        tuned = path in adapted(state.tuned) or "norm" in path
        assert np.array_equal(flat(weights(after))[path], value) != tuned, path
    # Of the moving average of what is trained, not of its last values.
    last, path = dataclasses.replace(after, average=None), "encoder/0/attention/query/kernel"
    assert not np.array_equal(flat(weights(last))[path], flat(weights(after))[path])
    # Muon keeps three coefficients.
    allowed = {leaf.shape for leaf in jax.tree.leaves(state.tuned)}
    assert {leaf.shape for leaf in jax.tree.leaves((state.opt_state, state.average)) if leaf.ndim} <= allowed | {(3,)}


def test_a_base_model_trains_less_than_a_fiftieth():
    config = TransformerConfig(vocab_size=37_000, block=BlockConfig(model_dim=512, hidden_dim=2048, num_heads=8))
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    _, state = start_shapes(model, AdamW().transformation(lambda step: 0.1), adapters=LowRank(rank=8))
    count, trained, held = (
        sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, state.trained, state.opt_state)
    )
    assert trained == 18 * 2 * 8 * (512 + 512)
    assert trained < 0.02 * count
    assert held <= 2 * trained + 2


def test_micro_batches_and_devices_update_as_one_does():
    sgd = optax.sgd(1.0)
    block = dataclasses.replace(BLOCK, dropout_rate=0.0)
    model = Transformer(dataclasses.replace(CONFIG, block=block), rngs=nnx.Rngs(0))
    graph, state = start(model, sgd, adapters=LOW)
    state = away(state)
    alone, _ = jax.jit(make_update(graph, sgd, LOSS, seed=0))(state, batch())
    expected, before = flat(weights(alone)), flat(state.params)
    pieces, _ = jax.jit(make_update(graph, sgd, LOSS, seed=0, pieces=2))(state, batch())
    found = {"pieces": pieces}
    for parallel, devices in ((Replicated(), 2), (Sharded(data=1, fsdp=2, tensor=2), 4)):
        update = make_update(graph, sgd, LOSS, seed=0, prepare=parallel.prepare)
        placed = parallel.spread(update, jax.local_devices()[:devices], model=model)
        copy = placed.place(jax.tree.map(jnp.array, state))
        found[type(parallel).__name__], _ = placed.update(copy, batch())
    for name, after in found.items():
        for path, value in flat(weights(after)).items():
            np.testing.assert_allclose(value, expected[path], rtol=1e-4, atol=1e-5, err_msg=f"{name}, {path}")
        for path, value in flat(after.params).items():
            assert value.tobytes() == before[path].tobytes(), f"{name}, {path}"
    # A kernel with its change lies where the kernel lay.
    split = found["Sharded"].params, weights(found["Sharded"])
    places = [[leaf.sharding for leaf in jax.tree.leaves(params)] for params in split]
    assert places[0] == places[1]
    assert not all(place.is_fully_replicated for place in places[0])


def test_kernels_of_recurrent_cells_are_adapted_too():
    config = Seq2SeqConfig(13, embedding_dim=6, hidden_dim=10)
    model = Seq2Seq(config, rngs=nnx.Rngs(0))
    graph, state = start(model, optax.sgd(1.0), adapters=LowRank(rank=2, only=("*/cell/*/kernel",)))
    assert len(adapted(state.tuned)) > 3
    after, _ = jax.jit(make_update(graph, optax.sgd(1.0), LOSS, seed=0))(away(state), batch())
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(np.isfinite(leaf).all() for leaf in flat(weights(after)).values())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rank": 0}, r"rank \(0\) must be an integer of at least 1"),
        ({"alpha": 0.0}, r"alpha \(0\.0\) must be "),
        ({"only": ()}, r"only \(\(\)\) must have a pattern"),
        (
            {"rank": 13},
            r"rank \(13\) must be at most 12, the smaller side of \S+/query/kernel \[12, 12\]",
        ),
        ({"only": ("*querry*",)}, r"'\*querry\*' matches no kernel of two axes; the nearest are .*query/kernel"),
        ({"only": ("embedding/table",)}, r"'embedding/table' matches no kernel of two axes"),
        ({"train": ("*norn*",)}, r"'\*norn\*' matches no parameter; the nearest are "),
        (
            {"train": ("encoder/*",)},
            r"train \(encoder/\*\) matches encoder/0/attention/\w+/kernel, which is adapted",
        ),
    ],
)
def test_adapters_that_do_not_fit_are_refused_in_one_sentence(settings, words):
    with pytest.raises(ValueError, match=words):
        begun(optax.sgd(1.0), LowRank(**{"rank": 2} | settings))


def test_running_statistics_are_not_trained_beside_adapters():
    image = Convolutional((3,), norm=OverBatch())
    config = CaptionerConfig(13, image, CONFIG)
    model = nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"matches image/norms/0/mean, which follows the batches anyway"):
        start_shapes(model, optax.sgd(1.0), adapters=LowRank(rank=2, train=("image/norms/*",)))


def test_the_matrices_depend_on_seed_and_path_alone():
    params = nnx.state(Encoder(EncoderConfig(7, 2, BLOCK, head=TokenLabels(3)), rngs=nnx.Rngs(0)), nnx.Param)
    some, more, other = (
        adapted(drawn(params, adapters, seed=seed))
        for adapters, seed in ((QUERIES, 3), (LowRank(only=("*attention*",)), 3), (QUERIES, 4))
    )
    assert some.keys() < more.keys()
    assert len(some) == 2
    for path, adapter in some.items():
        np.testing.assert_array_equal(adapter.a, more[path].a)
        assert not np.array_equal(adapter.a, other[path].a)
    # Under jit too, as a mesh draws them.
    traced = adapted(jax.jit(lambda params: drawn(params, QUERIES, seed=3))(params))
    assert all(np.array_equal(traced[path].a, adapter.a) for path, adapter in some.items())
    for path, value in flat(merged(params, {})).items():
        np.testing.assert_array_equal(value, flat(params)[path])
