"""One update, however it is spread over devices: the loss curve and the parameters of one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn import Coordinates, attend
from seqattn.dropout import Dropout
from seqattn.masks import Causal, SameSegment
from seqattn.models import Encoder, EncoderConfig, Rotary, TokenLabels, Transformer, TransformerConfig
from seqattn.nn import BlockConfig, MixtureConfig
from train.data.batches import collate
from train.devices.layout import fetch
from train.devices.parallel import Replicated, Sharded
from train.objectives import SequenceToSequence, Tagging
from train.update.step import TrainState, make_update, start

# Sizes that eight devices can share.
BLOCK = BlockConfig(model_dim=40, hidden_dim=56, num_heads=4, dropout_rate=0.0)
CONFIG = TransformerConfig(24, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK, positions=Rotary())
UPDATES, SOURCE, TARGET = 5, 8, 16
# Sums over devices are added in another order, in float32.
LOSS_TOLERANCE, PARAMETER_TOLERANCE = 2e-6, 1e-5


def batches(rows=16, updates=UPDATES):
    generator = np.random.default_rng(0)

    def text(longest):
        return generator.integers(4, 24, generator.integers(1, longest + 1)).tolist()

    examples = [[(text(SOURCE), [1, *text(TARGET - 2), 2]) for _ in range(rows)] for _ in range(updates)]
    return [collate(each, (rows, SOURCE, TARGET)) for each in examples]


def translator(dropout_rate=0.0):
    """The update of a small Transformer, and its state as NumPy arrays, which no update takes away."""
    config = dataclasses.replace(CONFIG, block=dataclasses.replace(BLOCK, dropout_rate=dropout_rate))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2, eps=1e-4))
    graph, state = start(Transformer(config, rngs=nnx.Rngs(0)), optimizer)
    return make_update(graph, optimizer, SequenceToSequence.loss, seed=0), jax.device_get(state)


def trained(placed, state, given):
    """The loss of each update, the parameters after the last, and the state as it lies on the devices."""
    losses = []
    for batch in given:
        state, metrics = placed.update(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, fetch(state.params), state


@pytest.fixture(scope="module")
def plain():
    """Update and state of a Transformer, and the losses and parameters that one device, without any mesh, comes to."""
    update, state = translator()
    losses, params = alone(update, state)
    assert losses[-1] < 0.9 * losses[0]  # else nothing was learned that could differ
    return update, state, losses, params


@pytest.fixture(scope="module")
def dropped():
    update, state = translator(dropout_rate=0.5)
    return update, state, *alone(update, state)


def alone(update, state):
    losses, compiled = [], jax.jit(update)
    for batch in batches():
        state, metrics = compiled(state, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(state.params)


def assert_close(first, second, tolerance=PARAMETER_TOLERANCE):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance, rtol=0), first, second)


def spread(choice, update, devices):
    return choice.spread(update, jax.devices()[:devices])


def label(value):
    """`Sharded(fsdp=2, tensor=2)` as "fsdp-2-tensor-2"."""
    if isinstance(value, int):
        return str(value)
    sizes = dataclasses.asdict(value)
    return "-".join(f"{name}-{size}" for name, size in sizes.items() if size > 1) or type(value).__name__.lower()


@pytest.mark.parametrize(
    ("choice", "devices"),
    [pytest.param(Sharded(), 8, marks=pytest.mark.slow), (Sharded(fsdp=2, tensor=2, sequence=2), 8)],
    ids=label,
)
def test_e5_a_mesh_computes_and_drops_what_one_device_does(choice, devices, dropped):
    update, state, losses, params = dropped
    curve, after, _ = trained(spread(choice, update, devices), state, batches())
    np.testing.assert_allclose(curve, losses, rtol=LOSS_TOLERANCE)
    assert_close(after, params)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("choice", "devices"),
    [
        *((Replicated(), devices) for devices in (1, 2, 8)),
        *((Sharded(), devices) for devices in (1, 2)),
        *((Sharded(**{axis: size}), size) for axis in ("fsdp", "tensor", "sequence") for size in (2, 8)),
        (Sharded(expert=8), 8),
        (Sharded(fsdp=2, tensor=2), 8),
    ],
    ids=label,
)
def test_e5_the_curve_is_that_of_one_device(choice, devices, plain):
    update, state, losses, params = plain
    curve, after, _ = trained(spread(choice, update, devices), state, batches())
    np.testing.assert_allclose(curve, losses, rtol=LOSS_TOLERANCE)
    assert_close(after, params)


@pytest.mark.parametrize(
    ("choice", "devices"),
    [(Sharded(expert=2), 2), pytest.param(Sharded(data=2, expert=4), 8, marks=pytest.mark.slow)],
    ids=label,
)
def test_a_mixture_over_the_expert_axis_is_that_of_one_device(choice, devices):
    """With dropout, so that capacity holds, and tokens are left out, over the whole batch."""
    mixture = MixtureConfig(num_experts=4, top_k=2, capacity_factor=0.5, noise=False)
    block = dataclasses.replace(BLOCK, num_heads=2, mixture=mixture, dropout_rate=0.1)
    optimizer = optax.adam(1e-2, eps=1e-4)
    config = EncoderConfig(24, num_layers=1, block=block, head=TokenLabels(5))
    graph, state = start(Encoder(config, rngs=nnx.Rngs(0)), optimizer)
    update, state = make_update(graph, optimizer, Tagging.loss, seed=0), jax.device_get(state)
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, 8, 8)
    rows = [(generator.integers(4, 24, n).tolist(), generator.integers(0, 5, n).tolist()) for n in lengths]
    given = [collate(rows, (8, 8, 8))] * 3

    losses, params, _ = trained(spread(Sharded(), update, 1), state, given)
    curve, after, last = trained(spread(choice, update, devices), state, given)
    np.testing.assert_allclose(curve, losses, rtol=LOSS_TOLERANCE)
    assert_close(after, params)
    kernel = last.params["stack"]["blocks"][0]["feed_forward"]["experts"]["hidden"]["kernel"][...]
    assert kernel.addressable_data(0).shape == (4 // choice.expert, 40, 56)


# What is left is about arrays, not about models, and a model of two matrices is compiled in no time.
ADAM = optax.adam(1e-2)


def small_update(state, batch, axis_name=None, gathered=lambda params: params):
    def total(params):
        params = gathered(params)
        x = params["embedding"]["table"][batch["source"]].mean(axis=1) @ params["hidden"]["kernel"]
        return ((x + params["hidden"]["bias"][None]) ** 2).sum() / len(x)

    loss, gradients = jax.value_and_grad(total)(state.params)
    loss, gradients = (loss, gradients) if axis_name is None else jax.lax.pmean((loss, gradients), axis_name)
    updates, opt_state = ADAM.update(gradients, state.opt_state)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(state, step=state.step + 1, params=params, opt_state=opt_state), {"loss": loss}


def small():
    keys = jax.random.split(jax.random.key(0), 3)
    table, kernel = jax.random.normal(keys[0], (24, 40)), jax.random.normal(keys[1], (40, 56))
    params = {"embedding": {"table": table}, "hidden": {"kernel": kernel, "bias": jnp.ones(56)}}
    return TrainState(jnp.zeros((), jnp.int32), params, ADAM.init(params))


def test_a_mesh_splits_parameters_and_their_moments():
    placed = spread(Sharded(fsdp=2, tensor=2), small_update, 8)
    splits = placed.shardings(jax.eval_shape(small))
    before = placed.place(small())
    assert jax.tree.map(lambda leaf: leaf.sharding, before) == splits
    _, _, after = trained(placed, before, batches(updates=3))
    assert jax.tree.map(lambda leaf: leaf.sharding, after) == splits
    for tree in (after.params, after.opt_state[0].mu, after.opt_state[0].nu):
        shapes = jax.tree.map(lambda leaf: leaf.addressable_data(0).shape, tree)
        assert shapes == {"embedding": {"table": (12, 20)}, "hidden": {"kernel": (20, 28), "bias": (56,)}}
    assert after.step.sharding.is_fully_replicated


def test_a_mesh_compiles_once_for_each_shape():
    placed = spread(Sharded(fsdp=2, tensor=2), small_update, 8)
    _, _, state = trained(placed, small(), batches(updates=3))
    assert placed._compiled._cache_size() == 1
    _, _, state = trained(placed, state, batches(rows=32, updates=2))
    assert placed._compiled._cache_size() == 2
    trained(placed, jax.device_get(state), batches(updates=1))
    assert placed._compiled._cache_size() == 2


def test_replicas_are_evaluated_on_one_device_and_a_mesh_as_it_is():
    state = jax.device_get(small())
    for choice, devices in ((Replicated(), 1), (Sharded(fsdp=2), 4)):
        placed = spread(choice, small_update, 4)
        params = placed.for_evaluation(placed.place(state).params)
        assert {len(leaf.devices()) for leaf in jax.tree.leaves(params)} == {devices}
        assert_close(jax.device_get(params), state.params, tolerance=0)


@pytest.mark.parametrize("choice", [Replicated(), Sharded(fsdp=2)], ids=["pmap", "mesh"])
def test_the_old_state_is_donated(choice):
    placed = spread(choice, small_update, 2)
    before = placed.place(small())
    placed.update(before, batches(updates=1)[0])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))


@pytest.mark.parametrize("choice", [Replicated(), Sharded()], ids=["pmap", "mesh"])
def test_on_the_cpu_one_update_is_made_after_the_other(choice):
    made = spread(choice, small_update, 8).update(small(), batches(updates=1)[0])
    assert all(leaf.is_ready() for leaf in jax.tree.leaves(made))


SIZES = [
    (Replicated(), 8, 1),
    (Sharded(fsdp=2, sequence=2), 4, 4),
    (Sharded(tensor=8), 1, 1),
    (Sharded(expert=2), 8, 1),
]


@pytest.mark.parametrize(("choice", "rows", "lengths"), SIZES, ids=label)
def test_of_what_a_batch_must_be_a_multiple(choice, rows, lengths):
    placed = spread(choice, small_update, 8)
    assert (placed.rows, placed.lengths, placed.part) == (rows, lengths, (0, 1))


def test_e6_a_batch_that_does_not_divide_is_refused():
    batch, state = batches(rows=6, updates=1)[0], small()
    with pytest.raises(ValueError, match=r"6 rows \(source\) must be a multiple of the 4 devices"):
        spread(Replicated(), small_update, 4).update(state, batch)
    with pytest.raises(ValueError, match=r"6 rows \(source\) must be a multiple of 4, that is data \(2\) x fsdp \(2\)"):
        spread(Sharded(fsdp=2), small_update, 4).update(state, batch)
    with pytest.raises(ValueError, match=r"length 8 \(source\) must be a multiple of sequence \(3\)"):
        spread(Sharded(sequence=3), small_update, 3).update(state, batch)


def test_images_are_not_split_inside():
    batch = {"source": np.ones((4, 5, 7), np.float32), "target": np.ones((4, 6), np.int32)}
    placed = spread(Sharded(sequence=2), small_update, 4)
    assert placed._global("source", batch["source"]).addressable_data(0).shape == (2, 5, 7)
    assert placed._global("target", batch["target"]).addressable_data(0).shape == (2, 3)


@pytest.mark.parametrize(
    ("axes", "said"),
    [
        ({"tensor": 3}, r"tensor \(3\) x .* = 3 must divide the number of devices \(8\)"),
        ({"data": 2, "fsdp": 2}, r"data \(2\) x fsdp \(2\) .* = 4 must be the number of devices \(8\)"),
        ({"fsdp": 16}, r"= 16 must divide the number of devices \(8\)"),
    ],
)
def test_axes_that_do_not_fit_the_devices_are_refused(axes, said):
    with pytest.raises(ValueError, match=said):
        Sharded(**axes).mesh()


@pytest.mark.parametrize(("axes", "said"), [({"fsdp": 0}, r"fsdp \(0\)"), ({"data": -1}, r"data \(-1\)")])
def test_sizes_below_one_are_refused(axes, said):
    with pytest.raises(ValueError, match=said):
        Sharded(**axes)


SLOWER = (pytest.param(name, marks=pytest.mark.slow) for name in ("xla", "reference"))


@pytest.mark.parametrize("implementation", ["chunked", *SLOWER])
def test_attention_over_a_mesh_is_that_of_one_device(implementation):
    """Rows, heads and lengths are split at once, forward and backward; the tiles of the kernel do not fit the parts."""
    rows, length, heads, dim = 2, 74, 4, 3
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(key, (rows, length, heads, dim)) for key in keys[:3]]
    at = Coordinates.from_lengths(jnp.array([length, 31]), length)
    dropout = None if implementation == "xla" else Dropout(0.25, keys[3])

    @jax.jit
    def of_all(query, key, value, at):
        options = {"mask": Causal() & SameSegment(), "q_at": at, "kv_at": at, "dropout": dropout}

        def total(query, key, value):
            output = attend(query, key, value, **options, implementation=implementation)
            return (output * jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)).sum(), output

        return jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)(query, key, value)

    mesh = Sharded(sequence=2, tensor=2).mesh()
    spread_at = jax.device_put(at, NamedSharding(mesh, P("data", "sequence")))
    expected = of_all(*arrays, at)
    result = of_all(*jax.device_put(arrays, NamedSharding(mesh, P("data", "sequence", "tensor"))), spread_at)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6, rtol=3e-6), expected, result)


def test_shapes_are_lowered_to_the_program_of_arrays(plain):
    update, state, losses, _ = plain
    (batch,) = batches(updates=1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (state, batch))
    placed = spread(Sharded(fsdp=2), update, 4)
    compiled = placed.lower(*shapes).compile()
    assert compiled.input_shardings[0][0].params == placed.shardings(state).params
    _, rows = compiled.input_shardings[0]
    given = jax.tree.map(jax.device_put, batch, rows)
    _, metrics = compiled(placed.place(state), given)
    assert float(metrics["loss"]) == pytest.approx(losses[0], abs=LOSS_TOLERANCE)


def test_replicas_have_no_program_of_shapes(plain):
    with pytest.raises(NotImplementedError, match="cannot lower an update without arrays"):
        spread(Replicated(), plain[0], 2).lower(plain[1], {})
