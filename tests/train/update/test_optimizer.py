"""Algorithms against NumPy, and what decays and is clipped."""

import math
import re
from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.models import (
    Captioner,
    CaptionerConfig,
    Encoder,
    EncoderConfig,
    Patches,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    Seq2Seq,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import BlockConfig
from train.checkpoints.checkpoints import Checkpoints
from train.update.freezing import freeze
from train.update.optimizer import SGD, AdaGrad, Adam, AdamW, Algorithm, Momentum, Muon, Optimizer
from train.update.parameters import matrices, paths
from train.update.schedules import Constant, Cosine, InverseSquareRoot, Noam
from train.update.step import TrainState

STEPS = 50


def updated(optimizer, gradient):
    params = {"matrix": jnp.ones((2, 2)), "bias": jnp.ones(2), "experts": {"bias": jnp.ones((2, 2))}}
    transformation = optimizer.make(STEPS)
    gradients = jax.tree.map(lambda param: jnp.full_like(param, gradient), params)
    updates, _ = transformation.update(gradients, transformation.init(params), params)
    return optax.apply_updates(params, updates)


@pytest.mark.parametrize(
    "algorithm", [AdamW(weight_decay=0.5), Muon(weight_decay=0.5)], ids=lambda algorithm: type(algorithm).__name__
)
def test_weight_decay_spares_biases_and_norms(algorithm):
    decayed = updated(Optimizer(algorithm, Constant(rate=0.1)), 0.0)
    np.testing.assert_allclose(decayed["matrix"], 0.95)
    np.testing.assert_allclose(decayed["bias"], 1.0)
    np.testing.assert_allclose(decayed["experts"]["bias"], 1.0)


@pytest.mark.parametrize(
    "algorithm",
    [SGD(), Momentum(), AdaGrad(initial=0.0), Adam()],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_others_do_not_decay(algorithm):
    for leaf in jax.tree.leaves(updated(Optimizer(algorithm, Constant(rate=0.1)), 0.0)):
        np.testing.assert_array_equal(leaf, 1.0)


def test_gradients_are_clipped_by_their_common_norm():
    # With a huge epsilon Adam moves by gradient * rate / epsilon: the clipped gradient can be read off.
    adam = Adam(beta1=0.0, beta2=0.0, epsilon=1e6)
    moved = 1.0 - updated(Optimizer(adam, Constant(rate=1e6), clip_norm=0.3), 7.0)["matrix"]
    np.testing.assert_allclose(moved, 0.3 / math.sqrt(10), rtol=1e-2)


RATE = 0.125
RANDOM = np.random.default_rng(0)
START = {"kernel": RANDOM.normal(size=(5, 3)), "table": RANDOM.normal(size=(7, 2)), "bias": RANDOM.normal(size=3)}
GRADIENTS = [{name: RANDOM.normal(size=value.shape) for name, value in START.items()} for _ in range(3)]


def trained(algorithm, start=START, gradients=GRADIENTS):
    """Where three updates lead, in float64."""
    with jax.enable_x64(True):
        optimizer = Optimizer(algorithm, Constant(rate=RATE), clip_norm=None).make(STEPS)
        params = jax.tree.map(jnp.asarray, start)
        state, step = optimizer.init(params), jax.jit(optimizer.update)
        for gradient in gradients:
            updates, state = step(jax.tree.map(jnp.asarray, gradient), state, params)
            params = optax.apply_updates(params, updates)
        return jax.device_get(params)


def assert_trained(algorithm, step):
    """`step(name, value, gradient, state) -> value`, where the state is a dict that starts empty, is the oracle."""
    result = trained(algorithm)
    for name, value in START.items():
        state = {}
        for gradient in GRADIENTS:
            value = step(name, value, gradient[name], state)
        np.testing.assert_allclose(result[name], value, rtol=1e-6, err_msg=name)


def test_sgd_is_the_gradient():
    assert_trained(SGD(), lambda name, value, gradient, state: value - RATE * gradient)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_sums_gradients(nesterov):
    def step(name, value, gradient, state):
        state["sum"] = 0.75 * state.get("sum", 0.0) + gradient
        return value - RATE * (gradient + 0.75 * state["sum"] if nesterov else state["sum"])

    assert_trained(Momentum(momentum=0.75, nesterov=nesterov), step)


@pytest.mark.parametrize("initial", [0.0, 0.3])
def test_adagrad_divides_by_the_root_of_the_sum_of_squares(initial):
    def step(name, value, gradient, state):
        state["squares"] = state.get("squares", initial) + gradient**2
        return value - RATE * gradient / np.sqrt(state["squares"] + 1e-3)

    assert_trained(AdaGrad(initial=initial, epsilon=1e-3), step)


def adamw(value, gradient, state, weight_decay):
    state["count"] = count = state.get("count", 0) + 1
    state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * gradient
    state["square"] = 0.98 * state.get("square", 0.0) + 0.02 * gradient**2
    scaled = state["mean"] / (1 - 0.9**count) / (np.sqrt(state["square"] / (1 - 0.98**count)) + 1e-9)
    return value - RATE * (scaled + weight_decay * value)


def orthogonalized(matrix):
    """Newton and Schulz' iteration with Jordan's coefficients."""
    x = matrix / (np.linalg.norm(matrix) + 1e-8)
    for _ in range(5):
        a = x.T @ x
        x = 3.4445 * x + x @ (-4.7750 * a + 2.0315 * a @ a)
    return x


def test_adamw_decays_matrices():
    assert_trained(
        AdamW(weight_decay=0.25),
        lambda name, value, gradient, state: adamw(value, gradient, state, 0.0 if name == "bias" else 0.25),
    )


def test_muon_orthogonalizes_matrices_and_leaves_the_rest_to_adamw():
    def step(name, value, gradient, state):
        if name != "kernel":
            return adamw(value, gradient, state, 0.25 if name == "table" else 0.0)
        state["count"] = count = state.get("count", 0) + 1
        state["mean"] = 0.95 * state.get("mean", 0.0) + 0.05 * gradient
        ahead = 0.95 * state["mean"] / (1 - 0.95 ** (count + 1)) + 0.05 * gradient / (1 - 0.95**count)
        return value - RATE * (0.2 * math.sqrt(5) * orthogonalized(ahead) + 0.25 * value)

    assert_trained(Muon(weight_decay=0.25), step)


def test_muon_takes_each_expert_of_a_stack_alone():
    stack, slopes = RANDOM.normal(size=(2, 5, 3)), RANDOM.normal(size=(3, 2, 5, 3))
    together = trained(Muon(), {"experts": stack}, [{"experts": slope} for slope in slopes])["experts"]
    for index in range(2):
        alone = trained(Muon(), {"experts": stack[index]}, [{"experts": slope[index]} for slope in slopes])["experts"]
        np.testing.assert_allclose(together[index], alone, rtol=1e-9)


@pytest.mark.parametrize(
    "algorithm",
    [SGD(), Momentum(nesterov=True), AdaGrad(), Adam(), AdamW(), Muon()],
    ids=lambda algorithm: type(algorithm).__name__,
)
def test_a_quadratic_falls(algorithm):
    goal = jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), START)
    optimizer = Optimizer(algorithm, Constant(rate=0.1)).make(STEPS)

    def loss(params):
        return optax.tree.norm(optax.tree.sub(params, goal), squared=True)

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.zeros_like, goal)
    state, before = optimizer.init(params), loss(params)
    for _ in range(STEPS):
        params, state = step(params, state)
    assert loss(params) < 0.5 * before


SLOW = {Momentum: {"momentum": 0.999}, Adam: {"beta2": 0.999}, AdamW: {"beta2": 0.999}}
SLOW |= {Muon: {"momentum": 0.999, "beta2": 0.999}}
ALGORITHMS = [kind(**SLOW.get(kind, {})) for kind in get_args(Algorithm)]


def moved(optimizer, gradients, dtype, param_dtype=None):
    """Parameters and state after updates by gradients of a dtype, one after the other."""

    def body(loop, gradient):
        params, state = loop
        updates, state = optimizer.update(jax.tree.map(lambda x: x.astype(dtype), gradient), state, params)
        assert {update.dtype for update in jax.tree.leaves(updates)} == {jnp.dtype(dtype)}
        return (optax.apply_updates(params, updates), state), None

    params = jax.tree.map(lambda x: jnp.asarray(x, param_dtype or dtype), START)
    return jax.jit(lambda given: jax.lax.scan(body, (params, optimizer.init(params)), given)[0])(gradients)


def rounded_gradients(count):
    """Large ones, then small ones: 1 and 1/16 of a normal number, each a number of bfloat16 too."""
    random = np.random.default_rng(7)
    large = np.where(np.arange(count) < count // 4, 1, 1 / 16)
    drawn = {name: random.normal(size=(count, *value.shape)) for name, value in START.items()}
    scaled = {name: large.reshape(-1, *[1] * (x.ndim - 1)) * x for name, x in drawn.items()}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16).astype(jnp.float32), scaled)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def test_moments_are_float32_whatever_the_parameters_are(algorithm, dtype):
    """In bfloat16 a decay of 0.999 is 1: nothing would be forgotten, and soon nothing added."""
    optimizer, gradients = Optimizer(algorithm, Constant(rate=1e-3)).make(STEPS), rounded_gradients(400)
    (params, small), (_, exact) = moved(optimizer, gradients, dtype), moved(optimizer, gradients, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(dtype)}
    assert not {leaf.dtype for leaf in jax.tree.leaves(small)} - {np.dtype(np.float32), np.dtype(np.int32)}
    for (path, ours), wanted in zip(jax.tree_util.tree_leaves_with_path(small), jax.tree.leaves(exact), strict=True):
        # Float16 has no small numbers: gradients below 6e-5 lose bits.
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-6, err_msg=jax.tree_util.keystr(path))


@pytest.mark.parametrize("algorithm", [Adam(beta2=0.999), AdamW(beta2=0.999)], ids=["Adam", "AdamW"])
def test_the_second_moment_of_bfloat16_parameters_is_that_of_numpy(algorithm):
    optimizer, gradients = Optimizer(algorithm, Constant(rate=1e-3), clip_norm=None).make(STEPS), rounded_gradients(400)
    _, state = moved(optimizer, gradients, jnp.bfloat16)
    for name, given in gradients.items():
        square = np.zeros(given.shape[1:])
        for gradient in np.asarray(given, np.float64):
            square = 0.999 * square + 0.001 * gradient**2
        np.testing.assert_allclose(optax.tree.get(state, "nu")[name], square, rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("algorithm", ALGORITHMS, ids=lambda algorithm: type(algorithm).__name__)
def test_float32_updates_and_state_are_those_of_optax_bitwise(algorithm):
    """Saved runs go on: the state has the same leaves, names and numbers."""
    optimizer, gradients = Optimizer(algorithm, Constant(rate=1e-3)).make(STEPS), rounded_gradients(3)
    plain = optax.chain(optax.clip_by_global_norm(1.0), algorithm.transformation(Constant(rate=1e-3).schedule(STEPS)))
    ours, theirs = (moved(each, gradients, jnp.float32) for each in (optimizer, plain))
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize("algorithm", [Muon(), AdaGrad(), Momentum()], ids=lambda algorithm: type(algorithm).__name__)
def test_a_restored_run_goes_on_bitwise(algorithm, tmp_path):
    optimizer = freeze(Optimizer(algorithm, Constant()).make(STEPS), ["encoder/*"])

    def fresh():
        layers = {name: jax.tree.map(lambda value: jnp.asarray(value, jnp.float32), START) for name in ("0", "1")}
        params = {"encoder": layers["0"], "decoder": layers["1"]}
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params))

    @jax.jit
    def update(state):
        updates, opt_state = optimizer.update(jax.tree.map(jnp.sin, state.params), state.opt_state, state.params)
        return TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

    saved = update(update(fresh()))
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(saved, {})
    restored = checkpoints.restore(fresh())
    assert jax.tree.structure(restored) == jax.tree.structure(saved)
    jax.tree.map(np.testing.assert_array_equal, (restored, update(restored)), (saved, update(saved)))
    checkpoints.close()


@pytest.mark.parametrize("algorithm", [Momentum, Muon])
def test_momentum_that_never_fades_is_refused(algorithm):
    with pytest.raises(ValueError, match=r"momentum \(1.0\) must be in \[0, 1\)"):
        algorithm(momentum=1.0)


def test_a_negative_sum_of_squares_is_refused():
    with pytest.raises(ValueError, match=r"initial \(-0.5\) must be at least 0"):
        AdaGrad(initial=-0.5)


BLOCK = BlockConfig(model_dim=6, hidden_dim=5, num_heads=2)
RECURRENT = Seq2SeqConfig(11, embedding_dim=4, hidden_dim=6)


@pytest.mark.parametrize(
    ("model", "config", "adam"),
    [
        (Seq2Seq, RECURRENT, {"embedding/table", "output/kernel"}),
        (RecurrentLanguageModel, RecurrentLanguageModelConfig(11, 4, 6), {"embedding/table", "output/kernel"}),
        (Encoder, EncoderConfig(11, 1, BLOCK, head=TokenLabels(3)), {"embedding/table", "head/output/kernel"}),
        (Encoder, EncoderConfig(11, 1, BLOCK, head=TextLabels(3)), {"embedding/table", "head/output/kernel"}),
        (
            Captioner,
            CaptionerConfig(11, Patches((3, 2)), RECURRENT),
            {"decoder/embedding/table", "decoder/output/kernel"},
        ),
        (
            Transformer,
            TransformerConfig(11, 1, 1, BLOCK, share_embeddings=False),
            {"embedding/table", "source_embedding/table"},
        ),
    ],
    ids=["Seq2Seq", "RecurrentLanguageModel", "TokenLabels", "TextLabels", "Captioner", "Transformer"],
)
def test_muon_leaves_tables_and_logits_to_adamw(model, config, adam):
    params = nnx.eval_shape(lambda: nnx.state(model(config, rngs=nnx.Rngs(0)), nnx.Param))
    labels = dict(zip(jax.tree.leaves(paths(params)), jax.tree.leaves(Muon()._labels(params)), strict=True))
    is_matrix = dict(zip(labels, jax.tree.leaves(matrices(params)), strict=True))
    assert {path for path, label in labels.items() if label == "adam" and is_matrix[path]} == adam


@pytest.mark.parametrize(
    ("make", "name", "value"),
    [
        (Constant, "rate", -1e-3),
        (Cosine, "peak", float("nan")),
        (Cosine, "final", 1.5),
        (InverseSquareRoot, "warmup_steps", -1),
        (Adam, "beta1", 1.0),
        (AdamW, "epsilon", 0.0),
        (AdamW, "weight_decay", -0.1),
        (Muon, "root_mean_square", float("inf")),
        (Noam, "model_dim", 0),
    ],
)
def test_numbers_by_which_nothing_is_learned_are_refused(make, name, value):
    with pytest.raises(ValueError, match=rf"{name} \({re.escape(str(value))}\) must be "):
        make(**{name: value})
