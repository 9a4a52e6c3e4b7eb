"""A mixture of experts against a NumPy float64 loop over tokens and experts with its own weights."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export

from seqattn.nn.feed_forward import Activation, FeedForward
from seqattn.nn.mixture import MixtureOfExperts, Routed, routings
from seqattn.nn.routing import MixtureConfig
from tests.parameters import drawn

B, T, D, F, E, K = 2, 11, 3, 7, 5, 2
X = np.random.default_rng(0).normal(size=(B, T, D)).astype(np.float32)
REAL = np.random.default_rng(1).random((B, T)) < 0.6
ALL = np.ones((B, T), bool)
TIGHT = MixtureConfig(E, K, capacity_factor=0.6)  # ceil(0.24 * 22) = 6 of 44 choices for each expert
QUIET = MixtureConfig(E, K, capacity_factor=0.6, noise=False)
KEY = jax.random.key(3)


@functools.cache
def _layer(config: MixtureConfig = TIGHT, **options) -> MixtureOfExperts:
    return drawn(lambda: MixtureOfExperts(D, F, config=config, **options, rngs=nnx.Rngs(0)))


@jax.jit
def _run(layer, x, real=None, key=None):
    return layer(x, real=real, dropout_key=key), layer.route(x, real=real, dropout_key=key)


class _Numpy:
    """Tokens in order, each through its experts, in training while these have room."""

    def __init__(self, layer, x, real=None, noise=None, training=False):
        exact = lambda param: np.asarray(param[...]).astype(np.float64)  # noqa: E731
        config, shape, x = layer.config, x.shape, np.asarray(x).astype(np.float64).reshape(-1, D)
        real = np.ones(len(x), bool) if real is None else np.asarray(real).reshape(-1)
        kernels = jax.tree.map(exact, nnx.to_pure_dict(nnx.state(layer.experts)), is_leaf=lambda x: hasattr(x, "shape"))
        factor = config.capacity_factor if training else config.num_experts / config.top_k
        room = math.ceil(round(factor * config.top_k * real.sum() / config.num_experts, 9))
        self.output, self.load, taken = np.zeros_like(x), np.zeros(config.num_experts, int), np.zeros(E, int)
        self.dropped, probabilities, squares = [], [], []
        for t in np.flatnonzero(real):
            logits = x[t] @ exact(layer.gate.kernel)
            if noise is not None:
                logits = logits + noise[t] * np.log1p(np.exp(x[t] @ exact(layer.noise.kernel)))
            chosen = np.argsort(-logits, kind="stable")[: config.top_k]
            for e, weight in zip(chosen, _softmax(logits[chosen]), strict=True):
                self.load[e] += 1
                if taken[e] == room:
                    self.dropped.append((t, e))
                else:
                    taken[e] += 1
                    self.output[t] += weight * self._expert(layer, kernels, e, x[t])
            probabilities.append(_softmax(logits))
            squares.append(np.log(np.exp(logits).sum()) ** 2)
        if probabilities:
            self.z_loss, shares = np.mean(squares), self.load / (config.top_k * real.sum())
            self.balance_loss = config.num_experts * (shares * np.mean(probabilities, axis=0)).sum()
        self.output = self.output.reshape(shape)

    def _expert(self, layer, kernels, e, x):
        linear = lambda name, x: x @ kernels[name]["kernel"][e] + kernels[name]["bias"][e]  # noqa: E731
        activation = {Activation.RELU: lambda x: np.maximum(x, 0), Activation.SILU: lambda x: x / (1 + np.exp(-x))}
        activate = activation[layer.experts.activation]
        hidden = linear("hidden", x)
        hidden = activate(hidden) if "gate" not in kernels else activate(linear("gate", x)) * hidden
        return linear("output", hidden)


def _softmax(x):
    weights = np.exp(x - x.max())
    return weights / weights.sum()


def _check(layer, found, expected, rtol=1e-5):
    output, routing = found
    np.testing.assert_allclose(output, expected.output, rtol=rtol, atol=2 * rtol)
    loss = layer.config.balance_weight * expected.balance_loss + layer.config.z_weight * expected.z_loss
    for name, value in (("balance_loss", expected.balance_loss), ("z_loss", expected.z_loss), ("loss", loss)):
        np.testing.assert_allclose(getattr(routing, name), value, rtol=rtol, err_msg=name)
    np.testing.assert_array_equal(routing.load, expected.load)
    assert routing.dropped == len(expected.dropped)


def test_without_a_key_it_is_a_loop_over_tokens_and_experts():
    layer = _layer()
    _check(layer, _run(layer, X, REAL), _Numpy(layer, X, REAL))


@pytest.mark.parametrize(("top_k", "factor"), [(1, 0.6), (3, 9.0)])
def test_in_training_the_earlier_tokens_win(top_k, factor):
    layer = _layer(MixtureConfig(E, top_k, factor, noise=False), gated=True, activation=Activation.SILU)
    expected = _Numpy(layer, X, training=True)
    _check(layer, _run(layer, X, ALL, KEY), expected)
    assert bool(expected.dropped) == (factor < 2)


def test_without_a_key_no_token_depends_on_another():
    layer, others = _layer(), X.copy()
    alone = _run(layer, X[1])[0]
    others[0], others[1, 4:] = 7.0, -7.0
    np.testing.assert_allclose(_run(layer, X, ALL)[0][1], alone, atol=1e-6)
    np.testing.assert_allclose(_run(layer, others, ALL)[0][1, :4], alone[:4], atol=1e-6)


def test_in_training_later_tokens_matter_by_their_number_alone():
    """In the order of all tokens of the call; with noise, dropout, padding, and too little room for all."""
    layer, flat, real = _layer(dropout_rate=0.3), X.reshape(-1, D), REAL.reshape(-1)
    expected, routing = _run(layer, flat, jnp.asarray(real), KEY)
    assert routing.dropped > 2
    expected = np.asarray(expected)
    random, changed = np.random.default_rng(5), 0
    for count in range(1, len(flat)):
        later = flat.copy()
        later[count:] = 3 * random.normal(size=later[count:].shape)
        found = np.asarray(_run(layer, later, jnp.asarray(real), KEY)[0])
        np.testing.assert_array_equal(found[:count], expected[:count])
        # Where their number is another, the room is.
        fewer = real & (np.arange(len(flat)) < count)
        changed += np.any(np.asarray(_run(layer, flat, jnp.asarray(fewer), KEY)[0])[:count] != expected[:count])
    assert changed > 2


def test_without_a_key_many_tokens_go_through_one_expert_after_the_other():
    layer, many = _layer(), np.resize(X, (4097, D))
    output, found = jax.jit(lambda layer, x: routings(lambda layer, x: layer(x), layer, x))(layer, many)
    expected, _ = _run(layer, X, ALL)
    np.testing.assert_allclose(output, np.resize(expected, (4097, D)), atol=1e-6)
    assert (found[0].tokens, found[0].dropped) == (4097, 0)
    together = lambda x: f"[{E},{len(x)},{D}]" in str(jax.make_jaxpr(layer)(x))  # noqa: E731
    assert together(many[1:])
    assert not together(many)


def test_the_room_of_an_expert():
    equal = jnp.zeros((128, D)).at[:, 0].set(1.0)  # all choose the same two
    # 1.1 * 2 * 100 / 5 is 44, and in floating point a little more.
    rooms = ((1.1, 100, 44), (1.1, 101, 45), (1.25, 11, 6), (0.01, 1, 1), (2.5, 7, 7), (4.0, 7, 7), (None, 7, 7))

    def dropped(factor, tokens):
        layer = _layer(MixtureConfig(E, K, factor, noise=False))
        routing = layer.route(equal, real=jnp.arange(128) < tokens, dropout_key=KEY)
        return routing.dropped, routing.tokens

    found = jax.jit(lambda: [dropped(factor, tokens) for factor, tokens, _ in rooms])()
    assert found == [(2 * (tokens - room), tokens) for _, tokens, room in rooms]


@pytest.mark.parametrize("key", [None, KEY], ids=["evaluation", "training"])
def test_one_expert_is_the_feed_forward_network(key):
    """Noise and room for a share of the tokens included."""
    layer = _layer(MixtureConfig(1, 1), gated=True)
    network = drawn(lambda: FeedForward(D, F, gated=True, rngs=nnx.Rngs(0)))
    nnx.update(network, jax.tree.map(lambda x: x[0], nnx.state(layer.experts)))
    run = jax.jit(lambda x, *modules: [module(x, dropout_key=key) for module in modules])
    output, expected = run(X, layer, network)
    np.testing.assert_allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("key", [None, KEY], ids=["evaluation", "training"])
def test_the_order_of_the_experts_changes_nothing(key):
    layer, order = _layer(QUIET if key is not None else TIGHT), np.random.default_rng(2).permutation(E)
    other = nnx.clone(layer)
    nnx.update(other.experts, jax.tree.map(lambda x: x[order], nnx.state(layer.experts)))
    other.gate.kernel[...] = layer.gate.kernel[...][:, order]
    (output, routing), (expected, as_before) = _run(other, X, ALL, key), _run(layer, X, ALL, key)
    np.testing.assert_allclose(output, expected, atol=1e-6)
    np.testing.assert_array_equal(routing.load, as_before.load[order])
    np.testing.assert_allclose(routing.loss, as_before.loss, rtol=1e-5)


def test_of_equal_logits_the_lower_expert():
    layer, x = nnx.clone(_layer()), np.abs(X)
    layer.gate.kernel[...] = jnp.zeros((D, E)).at[:, 3].set(1.0)
    output, routing = _run(layer, x, ALL)
    np.testing.assert_array_equal(routing.load, [B * T, 0, 0, B * T, 0])
    np.testing.assert_allclose(output, _Numpy(layer, x).output, atol=2e-5)


def test_equal_use_has_the_least_balance_loss():
    layer, x = nnx.clone(_layer(MixtureConfig(E, 1, None))), jnp.ones((128, D))
    loss = jax.jit(lambda layer, x: layer.route(x).balance_loss)
    layer.gate.kernel[...] = jnp.zeros((D, E))
    np.testing.assert_allclose(loss(layer, x), 1, rtol=1e-6)
    layer.gate.kernel[...] = jnp.zeros((D, E)).at[0, 2].set(50.0)
    np.testing.assert_allclose(loss(layer, x), E, rtol=1e-6)


def _total(layer, x, real=None, key=None):
    output, (routing,) = routings(lambda layer: layer(x, real=real, dropout_key=key), layer)
    return (output.astype(routing.loss.dtype) ** 2).sum() + routing.loss, (output, routing)


_update = jax.jit(jax.value_and_grad(_total, argnums=(0, 1), has_aux=True))


def test_training_with_noise_behind_padding_of_nan_to_the_last_digits():
    """Values are the oracle's, gradients those of finite differences; of nothing but padding all are zero."""
    with jax.enable_x64(True):
        layer = _layer(gated=True, activation=Activation.SILU, param_dtype=jnp.float64)
        given = (layer, jnp.where(REAL[..., None], X.astype(np.float64), np.nan))
        (_, found), gradients = _update(*given, REAL, KEY)
        noise = jax.random.normal(jax.random.split(KEY)[0], (B * T, E), jnp.float64)
        expected, random = _Numpy(layer, X, REAL, np.asarray(noise), training=True), np.random.default_rng(5)
        assert expected.dropped
        assert int(found[1].tokens) == REAL.sum() < B * T
        _check(layer, found, expected, rtol=1e-12)
        np.testing.assert_array_equal(np.asarray(found[0])[~REAL], 0)
        np.testing.assert_array_equal(np.asarray(gradients[1])[~REAL], 0)
        for path, gradient in jax.tree.leaves_with_path(gradients):
            direction = random.normal(size=gradient.shape)
            shifted = lambda step, path=path, direction=direction: jax.tree.map_with_path(  # noqa: E731
                lambda at, x: x + step * direction if at == path else x, given
            )
            ends = [_update(*shifted(step), REAL, KEY)[0][0] for step in (1e-6, -1e-6)]
            slope = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose((direction * gradient).sum(), slope, rtol=1e-5, err_msg=str(path))
            assert abs(slope) > 1e-4, path
        assert not any(np.any(leaf) for leaf in jax.tree.leaves(_update(*given, ~ALL, KEY)))


def test_no_tokens():
    output, routing = _run(_layer(), np.ones((0, T, D), np.float32))
    assert output.shape == (0, T, D)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(routing))


def test_in_bfloat16():
    layer, x = _layer(QUIET, param_dtype=jnp.bfloat16), jnp.asarray(X, jnp.bfloat16)
    (_, (output, _)), gradients = _update(layer, x, None, KEY)
    assert output.dtype == jax.eval_shape(layer, x).dtype == jnp.bfloat16
    expected = _Numpy(layer, x, training=True).output
    np.testing.assert_allclose(output.astype(jnp.float32), expected, atol=0.02 * np.abs(expected).max())
    assert {gradient.dtype for gradient in jax.tree.leaves(gradients)} == {jnp.dtype(jnp.bfloat16)}
    assert all(np.isfinite(gradient.astype(jnp.float32)).all() for gradient in jax.tree.leaves(gradients))


def test_vmap_is_each_alone_and_a_token_may_be_alone():
    layer = _layer(QUIET)
    output = jax.jit(jax.vmap(lambda x: layer(x, dropout_key=KEY)))(X)
    for row in range(B):
        np.testing.assert_allclose(output[row], _Numpy(layer, X[row], training=True).output, atol=2e-5)
    np.testing.assert_allclose(_run(layer, X[0, 0])[0], _Numpy(layer, X[0, 0]).output, atol=2e-5)


def test_dropout_is_inside_the_experts_and_decided_by_the_key():
    layer, keys = _layer(MixtureConfig(E, K, None, noise=False), dropout_rate=0.9), jax.random.split(KEY)
    first, again, other = (np.asarray(_run(layer, X, ALL, key)[0]) for key in (keys[0], keys[0], keys[1]))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    assert layer.noise is None
    with jax.debug_key_reuse(True):
        jax.eval_shape(lambda key: layer(jnp.asarray(X), dropout_key=key), KEY)


def test_parameters():
    layer = nnx.eval_shape(lambda: MixtureOfExperts(D, F, config=TIGHT, gated=True, rngs=nnx.Rngs(0)))
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(layer, nnx.Param)))
    both, gate = {"kernel": (E, D, F), "bias": (E, F)}, {"kernel": (D, E)}
    experts = {"hidden": both, "gate": both, "output": {"kernel": (E, F, D), "bias": (E, D)}}
    assert shapes == {"experts": experts, "gate": gate, "noise": gate}
    assert len(jax.tree.leaves(layer)) == 8


def test_every_expert_starts_as_a_feed_forward_network_of_its_own():
    layer = jax.jit(lambda: MixtureOfExperts(16, 32, config=MixtureConfig(3, 1), rngs=nnx.Rngs(0)))()
    kernels = np.asarray(layer.experts.hidden.kernel[...])
    np.testing.assert_allclose(kernels.std(axis=(1, 2)), math.sqrt(2 / (16 + 32)), rtol=0.1)  # Xavier
    assert np.abs(kernels[0] - kernels[1]).max() > 0.1
    assert not np.any(layer.noise.kernel[...])
    assert 0 < np.std(layer.gate.kernel[...]) < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 3, "num_experts": 2}, r"top_k \(3\) must be an integer from 1 to num_experts \(2\)"),
        ({"top_k": 0}, r"top_k \(0\) must be an integer from 1 to num_experts \(8\)"),
        ({"capacity_factor": 0.0}, r"capacity_factor \(0.0\) must be at least 0.01 and finite, or None"),
        ({"capacity_factor": math.nan}, r"capacity_factor \(nan\)"),
        ({"balance_weight": -1.0}, r"balance_weight \(-1.0\) must be at least 0"),
        ({"z_weight": math.inf}, r"z_weight \(inf\) must be at least 0 and finite"),
    ],
)
def test_a_config_that_means_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureConfig(**options)


class _Deep(nnx.Module):
    """Two layers, of which one is called twice."""

    def __init__(self):
        self.layers = nnx.List([_made() for _ in range(2)])

    def __call__(self, x):
        for layer in (*self.layers, self.layers[0]):
            x = x + layer(x)
        return x


def _made():
    return MixtureOfExperts(D, F, config=TIGHT, rngs=nnx.Rngs(0))


@functools.cache
def _deep():
    """A model, `[B, T, D]`, and the loads `[B, 3, E]` and losses of its calls on each row of `X`, layer by layer."""
    model = drawn(_Deep)
    loads, losses = [], []
    for row in X:
        output, first = _run(model.layers[0], row)
        output, second = _run(model.layers[1], row := row + np.asarray(output))
        found = [first, _run(model.layers[0], row + np.asarray(output))[1], second]
        loads.append([np.asarray(routing.load) for routing in found])
        losses.append(sum(float(routing.loss) for routing in found))
    return model, np.array(loads), np.array(losses)


@pytest.mark.parametrize(("mapped", "graph_mode"), [(jax.vmap, True), (jax.pmap, False)], ids=["graph", "tree"])
def test_routings_leave_a_model_under_any_transformation(graph_mode, mapped):
    model, loads, losses = _deep()
    with nnx.set_graph_mode(graph_mode):
        graph, params = nnx.split(model, nnx.Param)

        def loss(params, x):
            output, found = routings(lambda model, x: model(x), nnx.merge(graph, params), x)
            return sum(routing.loss for routing in found), (output, found)

        update = mapped(jax.value_and_grad(loss, has_aux=True), in_axes=(None, 0))
        (value, (output, found)), gradients = jax.jit(update)(params, jnp.asarray(X))
    np.testing.assert_allclose(value, losses, rtol=1e-5)
    np.testing.assert_array_equal(np.stack([routing.load for routing in found], axis=1), loads)
    for row in range(B):
        np.testing.assert_allclose(output[row], _forward(model, jnp.asarray(X[row])), atol=1e-5)
    for layer in gradients["layers"].values():
        assert np.abs(layer["gate"]["kernel"][...]).max() > 1e-6


_forward = jax.jit(lambda model, x: model(x))


def test_a_model_is_the_same_after_a_call_and_after_an_error_in_it():
    model, x = _deep()[0], jnp.asarray(X[0])
    before = jax.tree.structure(model)

    def fail(model, x):
        raise RuntimeError(f"{len(routings(_Deep.__call__, model, x)[1])} were found")

    with pytest.raises(RuntimeError, match="3 were found"):
        jax.eval_shape(lambda x: routings(fail, model, x), x)
    assert jax.tree.structure(model) == before
    jax.eval_shape(model, x)
    assert jax.tree.structure(model) == before


def test_routings_that_are_lost_are_an_error():
    model, x = _deep()[0], jnp.asarray(X[0])
    for lossy in (jax.jit, jax.checkpoint):
        with pytest.raises(ValueError, match="none of the 2 mixture layers gave its routing"):
            jax.eval_shape(lambda x, lossy=lossy: routings(lossy(_Deep.__call__), model, x), x)
    assert routings(lambda network, x: x, nnx.List([]), 7) == (7, [])


def test_a_transformation_may_close_over_the_model():
    model = _deep()[0]
    found = jax.eval_shape(lambda x: jnp.zeros(len(routings(_Deep.__call__, model, x)[1])), jnp.asarray(X[0]))
    assert found.shape == (3,)


def test_rematerialised_layers_keep_their_routings_in_tree_mode():
    def forward(model, x):
        for layer in (*model.layers, model.layers[0]):
            x = x + nnx.remat(lambda layer, x: layer(x))(layer, x)
        return x

    with nnx.set_graph_mode(False):
        loss = lambda model, x: sum(routing.loss for routing in routings(forward, model, x)[1])  # noqa: E731
        value = jax.jit(loss)(_deep()[0], jnp.asarray(X[0]))
    np.testing.assert_allclose(value, _deep()[2][0], rtol=1e-5)


@pytest.mark.parametrize(("kind", "count"), [(nnx.Intermediate, 0), (Routed, 3 * 6)])
def test_other_captures_see_no_routing(kind, count):
    found, capture = [], nnx.capture(_Deep.__call__, kind)
    jax.eval_shape(lambda *args: found.extend(jax.tree.leaves(capture(*args)[1])), _deep()[0], jnp.asarray(X[0]))
    assert len(found) == count


@pytest.mark.parametrize("key", [None, KEY], ids=["evaluation", "training"])
def test_a_layer_is_exported_once_for_any_number_of_tokens(key, as_users_call_it):
    """With a capacity by their number in training, and one expert after the other where they may be many."""
    layer, shape = _layer(), export.symbolic_shape("rows, length")
    given = jax.ShapeDtypeStruct((*shape, D), jnp.float32), jax.ShapeDtypeStruct(shape, bool)
    program = export.export(jax.jit(lambda x, real: _run(layer, x, real, key)))(*given)
    for part in ((slice(None), slice(None)), (slice(1), slice(7))):
        x, real = jnp.asarray(X[part]), jnp.asarray(REAL[part])
        for ours, theirs in zip(
            jax.tree.leaves(program.call(x, real)), jax.tree.leaves(_run(layer, x, real, key)), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
