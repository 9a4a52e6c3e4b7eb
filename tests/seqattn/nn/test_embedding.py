"""Tables of vectors: what is looked up, what logits they give, and what happens outside the table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.nn import PositionEmbedding, TokenEmbedding

V, D = 11, 5
IDS = np.array([[0, 10, 3], [7, 7, 1]], np.int32)
TABLES = {
    "tokens": lambda size, rngs: TokenEmbedding(size, D, rngs=rngs),
    "positions": lambda size, rngs: PositionEmbedding(size, D, rngs=rngs),
}
each_table = pytest.mark.parametrize("name", TABLES)

_look_up = jax.jit(lambda module, index: module(index))


def _module(name: str, size: int = V):
    return TABLES[name](size, nnx.Rngs(0))


def _table(module) -> np.ndarray:
    return np.asarray(module.table[...]).astype(np.float64)


@each_table
def test_a_row_for_each_index(name):
    module = _module(name)
    expected = _table(module)[IDS] * (D**0.5 if name == "tokens" else 1)
    for output in (_look_up(module, jnp.asarray(IDS)), module(jnp.asarray(IDS))):
        np.testing.assert_allclose(output, expected, rtol=1e-6)
    np.testing.assert_allclose(_look_up(module, jnp.array(7)), expected[1, 0], rtol=1e-6)


def test_logits_are_the_product_with_every_vector():
    module = _module("tokens")
    x = np.random.default_rng(0).normal(size=(2, 3, D)).astype(np.float32)
    np.testing.assert_allclose(jax.jit(TokenEmbedding.logits)(module, x), x @ _table(module).T, atol=1e-5)
    assert module.logits(jnp.ones((3, D), jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("shape", [(17,), (5, 7), (2, 3, 11)])
def test_gradients_of_logits(shape):
    module, random = _module("tokens", 13), np.random.default_rng(0)
    x, weights = (random.normal(size=(*shape, size)).astype(np.float32) for size in (D, 13))

    @jax.jit
    def loss(table, x):
        graph, params = nnx.split(module)
        params["table"] = params["table"].replace(table)
        return (nnx.merge(graph, params).logits(x) * weights).sum()

    table = module.table[...]
    by_table, by_x = jax.grad(loss, argnums=(0, 1))(table, x)
    wide, flat = x.astype(np.float64).reshape(-1, D), weights.astype(np.float64).reshape(-1, 13)
    np.testing.assert_allclose(by_table, flat.T @ wide, atol=1e-4)
    np.testing.assert_allclose(by_x, weights.astype(np.float64) @ _table(module), atol=1e-5)
    many = jax.vmap(jax.grad(loss), in_axes=(None, 0))(table, jnp.stack([x, 2 * x]))
    np.testing.assert_allclose(many, jnp.stack([by_table, 2 * by_table]), atol=2e-4)


def test_the_gradient_of_logits_is_not_transposed_on_a_lone_cpu(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    module, x = TokenEmbedding(1009, 128, rngs=nnx.Rngs(0)), jnp.ones((13, 41, 128))
    step = jax.jit(jax.value_and_grad(lambda module, x: jax.nn.logsumexp(module.logits(x), axis=-1).sum(), (0, 1)))
    assert "[533,1009]" in (compiled := step.lower(module, x).compile().as_text())
    assert "[1009,533]" not in compiled


def test_d23_tied_weights_are_one_leaf_that_both_uses_train():
    module, index = _module("tokens"), jnp.array([3, 3, 8])
    assert len(jax.tree.leaves(module)) == 1
    gradient = jax.jit(jax.grad(lambda module: module.logits(module(index)).sum()))(module)
    # sum_i sum_v sqrt(D) e_i . e_v: by e_v from the logits, by e_i from the look-up.
    table, scale = _table(module), D**0.5
    expected = np.tile(scale * table[np.asarray(index)].sum(axis=0), (V, 1))
    np.add.at(expected, np.asarray(index), scale * table.sum(axis=0))
    np.testing.assert_allclose(gradient.table[...], expected, atol=1e-4)


def test_the_first_values():
    tokens, positions = (TABLES[name](1009, nnx.Rngs(0)) for name in TABLES)
    assert abs(_table(tokens).std() * D**0.5 - 1) < 0.05  # so that what is looked up has variance 1
    assert abs(_table(positions).std() / 0.02 - 1) < 0.05
    assert tokens.table.dtype == positions.table.dtype == jnp.float32


@each_table
@pytest.mark.parametrize(("index", "shown"), [([0, V], "0 to 11"), ([-1, 3], "-1 to 3"), ([99], "99 to 99")], ids=str)
def test_a22_an_index_outside_the_table_is_an_error(name, index, shown):
    module, index = _module(name), jnp.array(index)
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 11\), got {shown}"):
        module(index)
    # What is known at trace time, such as an array from outside the jitted function, raises there, too.
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 11\), got {shown}"):
        jax.jit(lambda module: module(index))(module)


@each_table
def test_a22_inside_jit_an_index_outside_the_table_is_nan(name):
    index = np.array([0, V, 3, -1, V - 1, -V, 2**31 - 1, -(2**31)], np.int32)
    output = np.asarray(_look_up(_module(name), jnp.asarray(index)))
    inside = (index >= 0) & (index < V)
    np.testing.assert_array_equal(np.isnan(output).all(axis=-1), ~inside)
    np.testing.assert_array_equal(output[inside], _look_up(_module(name), jnp.asarray(index[inside])))


@pytest.mark.usefixtures("as_users_call_it")
@each_table
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32])
def test_a_table_longer_than_the_index_can_count(name, dtype):
    module = _module(name, 307)
    index = jnp.array([0, 127, 3], dtype)
    expected = module(index.astype(jnp.int32))
    np.testing.assert_array_equal(module(index), expected)
    np.testing.assert_array_equal(_look_up(module, index), expected)
    if jnp.issubdtype(dtype, jnp.signedinteger):
        assert np.isnan(_look_up(module, jnp.array([-1], dtype))).all()


@each_table
def test_an_index_from_outside_a_jitted_function(name):
    module, index = _module(name), jnp.asarray(IDS)
    np.testing.assert_array_equal(jax.jit(lambda module: module(index))(module), _look_up(module, index))


@each_table
def test_gradients_reach_the_rows_that_were_looked_up(name):
    def total(module, index):
        return (module(index) * jnp.arange(1.0, 4)[:, None]).sum()

    gradient = jax.jit(jax.grad(total))(_module(name), jnp.array([4, 2, 4])).table[...]
    expected = np.zeros((V, D))
    expected[4], expected[2] = 4, 2
    np.testing.assert_allclose(gradient, expected * (D**0.5 if name == "tokens" else 1), rtol=1e-6)


@each_table
def test_the_dtype_of_the_table_is_that_of_the_output(name):
    kind = TokenEmbedding if name == "tokens" else PositionEmbedding
    assert kind(V, D, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))(jnp.asarray(IDS)).dtype == jnp.bfloat16


@each_table
def test_no_index_gives_no_row(name):
    assert _module(name)(jnp.zeros((2, 0), jnp.int32)).shape == (2, 0, D)


@pytest.mark.parametrize("size", [0, -3])
def test_an_empty_table_is_refused(size):
    with pytest.raises(ValueError, match=rf"vocab_size \({size}\)"):
        TokenEmbedding(size, D, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=rf"max_length \({size}\)"):
        PositionEmbedding(size, D, rngs=nnx.Rngs(0))
