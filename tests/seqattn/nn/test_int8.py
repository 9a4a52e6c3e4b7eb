"""Weights in int8: their error, their products, and decoding with them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn import Coordinates
from seqattn.decoding import beam_search, generate
from seqattn.interop import to_arrays
from seqattn.interop.huggingface import to_huggingface
from seqattn.models import (
    LanguageModel,
    LanguageModelConfig,
    Rotary,
    Seq2Seq,
    Seq2SeqConfig,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import (
    BlockConfig,
    Cell,
    MixtureConfig,
    MixtureOfExperts,
    Quantized,
    QuantizedEmbedding,
    QuantizedLinear,
    TokenEmbedding,
    quantization_errors,
    quantized,
)
from seqattn.nn.int8 import _at_once, _by_tiles, to_int8
from seqattn.nn.linear import Linear

V = 23
BLOCK = BlockConfig(model_dim=12, hidden_dim=14, num_heads=3)
MODELS = {
    "transformer": lambda: Transformer(TransformerConfig(V, 1, 1, BLOCK), rngs=nnx.Rngs(0)),
    "language model": lambda: LanguageModel(
        LanguageModelConfig(V, 2, BLOCK, Rotary(), tie_logits=False), rngs=nnx.Rngs(1)
    ),
    "recurrent": lambda: Seq2Seq(Seq2SeqConfig(V, 10, 12, cell=Cell.LSTM), rngs=nnx.Rngs(2)),
    "experts": lambda: LanguageModel(
        LanguageModelConfig(V, 1, BlockConfig(12, 14, 3, mixture=MixtureConfig(3))), rngs=nnx.Rngs(3)
    ),
}


def in_floats(model: nnx.Module) -> nnx.Module:
    """The model with the dequantized kernels of its quantized copy, as floats."""
    copy, small = nnx.clone(model), dict(nnx.iter_modules(quantized(model, tables=True)))
    for path, module in nnx.iter_modules(copy):
        if isinstance(small[path], QuantizedLinear):
            module.kernel[...] = small[path].kernel
        elif isinstance(small[path], QuantizedEmbedding):
            module.table[...] = small[path].table
    return copy


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_no_value_is_further_from_its_weight_than_half_a_scale(dtype, axis):
    weights = np.random.default_rng(0).normal(size=(7, 5)) * 10.0 ** np.arange(-2, 3)
    weights[:, 2], weights[3] = 0, 0
    weights = jnp.asarray(weights, dtype)
    values, scale = jax.jit(to_int8, static_argnums=1)(weights, axis)
    assert (values.dtype, scale.dtype) == (jnp.int8, dtype)
    wide, scale = np.asarray(weights).astype(np.float64), np.expand_dims(np.asarray(scale).astype(np.float64), axis)
    assert (np.abs(np.asarray(values) * scale - wide) <= scale / 2).all()
    largest = np.abs(np.asarray(values)).max(axis)
    np.testing.assert_array_equal(largest, np.where(np.abs(wide).max(axis) > 0, 127, 0))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_layer_is_the_product_with_its_dequantized_kernel(dtype):
    layer = Linear(7, 5, param_dtype=dtype, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
    small = quantized(nnx.List([layer]))[0]
    x = jax.random.normal(jax.random.key(0), (2, 3, 7), dtype)
    kernel = np.asarray(small.values[...]) * np.asarray(small.scale[...]).astype(np.float64)
    expected = np.asarray(x).astype(np.float64) @ kernel + np.asarray(layer.bias[...]).astype(np.float64)
    error = 0.02 if dtype == jnp.bfloat16 else 1e-5
    for found in (small(x), jax.jit(lambda m, x: m(x))(small, x), jax.vmap(small)(x)):
        assert found.dtype == dtype
        np.testing.assert_allclose(np.asarray(found).astype(np.float64), expected, atol=error * np.abs(expected).max())
    gradient = jax.grad(lambda x: small(x).astype(jnp.float32).sum())(x)
    wanted = np.broadcast_to(kernel.sum(axis=1), x.shape)
    np.testing.assert_allclose(np.asarray(gradient).astype(np.float64), wanted, atol=error * np.abs(wanted).max())


@pytest.mark.parametrize("columns", [1, 5, 6, 7, 13])
def test_tiles_give_the_product_at_once(columns, monkeypatch):
    monkeypatch.setitem(_by_tiles.__globals__, "_TILE", 3 * 11)
    x = jax.random.normal(jax.random.key(0), (2, 11))
    values = jnp.asarray(np.random.default_rng(0).integers(-127, 128, (11, columns)), jnp.int8)
    np.testing.assert_allclose(_by_tiles(x, values), _at_once(x, values), rtol=1e-6, atol=1e-4)
    given, wanted = (jax.grad(lambda x, form=form: (form(x, values) ** 2).sum())(x) for form in (_by_tiles, _at_once))
    np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=1e-2)


def test_a_tied_table_gives_vectors_and_logits():
    embedding = TokenEmbedding(V, 6, rngs=nnx.Rngs(0))
    small = quantized(nnx.List([embedding]), tables=True)[0]
    full = in_floats(nnx.List([embedding]))[0]
    tokens, x = jnp.array([[5, 22, 0]]), jnp.ones((2, 6))
    np.testing.assert_allclose(small(tokens), full(tokens), rtol=1e-6)
    np.testing.assert_allclose(small.logits(x), full.logits(x), atol=1e-5)
    assert np.isnan(jax.jit(lambda m, t: m(t))(small, jnp.array([-1, V]))).all()
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 23\)"):
        small(jnp.array([V]))


@pytest.mark.parametrize("name", MODELS)
def test_searches_find_what_the_dequantized_model_finds(name):
    model = MODELS[name]()
    small, full = quantized(model, tables=True), in_floats(model)

    def found(model: nnx.Module) -> list[jax.Array]:
        source = jnp.array([[5, 8, 9, 0], [7, 6, 4, 3]])
        memory = model.encode(source, Coordinates.from_lengths([3, 4], 4))
        first, ends = jnp.ones(2, jnp.int32), {"max_length": 7, "end_token": 2}
        one = generate(model.step, model.start(memory, 8), first, **ends)
        beams = beam_search(model.step, model.start(memory, 8), first, beam_size=3, n_best=2, **ends)
        return [one.tokens, beams.tokens, beams.score]

    *tokens, score = jax.jit(found)(small)
    *wanted, expected = jax.jit(found)(full)
    for a, b in zip(tokens, wanted, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(score, expected, rtol=1e-4)


def test_only_weights_of_products_change_and_they_are_no_parameters():
    model = MODELS["experts"]()
    small = quantized(model)
    mixture = small.stack.blocks[0].feed_forward
    assert isinstance(mixture, MixtureOfExperts)
    assert isinstance(mixture.experts.hidden, QuantizedLinear)
    assert isinstance(mixture.gate, nnx.Linear)
    assert type(small.embedding) is TokenEmbedding
    assert small.embedding.table is model.embedding.table
    assert isinstance(model.stack.blocks[0].attention.query, Linear)
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(small, nnx.Param))}
    assert dtypes == {jnp.dtype(jnp.float32)}
    kinds = {leaf.dtype for leaf in jax.tree.leaves(nnx.state(small, Quantized))}
    assert kinds == {jnp.dtype(jnp.int8), jnp.dtype(jnp.float32)}


def test_errors_are_relative_to_the_weights_of_an_output():
    layer = Linear(7, 3, rngs=nnx.Rngs(0))
    layer.kernel[...] = layer.kernel[...].at[0, 1].set(1e3)
    kernel = np.asarray(layer.kernel[...]).astype(np.float64)
    small = quantized(nnx.List([layer]))[0]
    change = np.asarray(small.values[...]) * np.asarray(small.scale[...]).astype(np.float64) - kernel
    expected = (np.linalg.norm(change, axis=0) / np.linalg.norm(kernel, axis=0)).max()
    assert quantization_errors(nnx.List([layer])) == {"0.kernel": pytest.approx(expected)}


def test_models_that_cannot_be_quantized_are_refused():
    layers = nnx.List([Linear(3, 5, rngs=nnx.Rngs(0))])
    with pytest.raises(ValueError, match="0 has int8 weights: a quantized model cannot be quantized again"):
        quantized(quantized(layers))
    with pytest.raises(ValueError, match=r"0\.kernel must be concrete"):
        jax.jit(quantized)(layers)
    with pytest.raises(ValueError, match="must have a linear layer"):
        quantized(TokenEmbedding(V, 6, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"0\.kernel: a layer with a product of its own"):
        quantized(nnx.List([nnx.Linear(3, 5, precision="highest", rngs=nnx.Rngs(0))]))
    for number in (jnp.nan, -jnp.inf):
        layers[0].kernel[...] = layers[0].kernel[...].at[1, 2].set(number)
        with pytest.raises(ValueError, match=r"0\.kernel must be finite"):
            quantized(layers)


def test_a_quantized_model_is_not_saved_as_another_one():
    small = quantized(MODELS["language model"]())
    for save in (to_arrays, lambda model: to_huggingface(model, "llama")):
        with pytest.raises(ValueError, match=r"^output has int8 weights: .*; save the model that it was made"):
            save(small)
