"""Layers that are computed again, or in one loop, compute what plain ones do."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn import Coordinates, cross_entropy
from seqattn.models import (
    BucketBiases,
    Full,
    LanguageModel,
    LanguageModelConfig,
    Local,
    RelativeKeys,
    Transformer,
    TransformerConfig,
)
from seqattn.models.layer_loop import run_layers
from seqattn.nn import BlockConfig, MixtureConfig

BLOCK = BlockConfig(model_dim=6, hidden_dim=7, num_heads=2, dropout_rate=0.3, attention_dropout_rate=0.2)
CONFIGS = {
    "transformer": TransformerConfig(11, num_encoder_layers=2, num_decoder_layers=3, block=BLOCK),
    "norm_first": TransformerConfig(
        11,
        num_encoder_layers=2,
        num_decoder_layers=2,
        block=dataclasses.replace(BLOCK, norm_first=True),
        positions=BucketBiases(4, 8),
    ),
    "language_model": LanguageModelConfig(11, num_layers=3, block=BLOCK, positions=RelativeKeys(3)),
}
CHOICES = {"remat": (True, False), "scan": (False, True), "both": (True, True)}


def value_and_gradients(config):
    model = (Transformer if isinstance(config, TransformerConfig) else LanguageModel)(config, rngs=nnx.Rngs(0))
    generator = np.random.default_rng(0)
    source, target = generator.integers(0, 11, (3, 5)), generator.integers(0, 11, (3, 7))
    source_at, target_at = Coordinates.from_lengths([5, 0, 2], 5), Coordinates.from_lengths([7, 2, 4], 7)
    graph, params = nnx.split(model)

    def loss(params):
        model, keys = nnx.merge(graph, params), jax.random.split(jax.random.key(5))
        memory = model.encode(jnp.asarray(source), source_at, dropout_key=keys[0])
        logits = model.decode(jnp.asarray(target), target_at, memory, dropout_key=keys[1])
        return cross_entropy(logits, jnp.asarray(target), weights=target_at.segment != 0)[0]

    return loss, params


@pytest.fixture(scope="module")
def plain():
    return {name: _computed(config) for name, config in CONFIGS.items()}


def _computed(config):
    loss, params = value_and_gradients(config)
    return jax.jit(jax.value_and_grad(loss))(params)


@pytest.mark.parametrize(
    ("name", "choice"),
    [
        pytest.param(name, choice, marks=[pytest.mark.slow] * (choice != "both"))
        for name in CONFIGS
        for choice in CHOICES
    ],
)
def test_value_and_gradients_are_those_of_plain_layers(name, choice, plain):
    remat, scan = CHOICES[choice]
    block = dataclasses.replace(CONFIGS[name].block, remat=remat, scan_layers=scan)
    value, gradients = _computed(dataclasses.replace(CONFIGS[name], block=block))
    expected, wanted = plain[name]
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert jax.tree.structure(gradients) == jax.tree.structure(wanted)  # parameters keep their paths
    for found, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(found, other, rtol=1e-4, atol=1e-5)


def test_what_is_computed_again_is_not_kept():
    def kept(remat):
        layers = [(jnp.ones((64, 64)),)] * 8

        def loss(x):
            return run_layers(lambda x, w: jnp.sin(jnp.sin(jnp.sin(x @ w))), x, layers, remat=remat).sum()

        return sum(
            leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda x: jax.vjp(loss, x)[1], jnp.ones((64, 64))))
        )

    assert kept(remat=True) < 0.6 * kept(remat=False)


def test_a_loop_holds_one_layer():
    def count(layers):
        config = dataclasses.replace(
            CONFIGS["language_model"], num_layers=layers, block=dataclasses.replace(BLOCK, scan_layers=True)
        )
        loss, params = value_and_gradients(config)
        jaxpr = jax.make_jaxpr(loss)(params)
        return str(jaxpr).count("dot_general")

    assert count(2) == count(5) > 0


def test_layers_of_two_kinds_are_refused_in_a_loop():
    config = LanguageModelConfig(
        11, num_layers=2, block=dataclasses.replace(BLOCK, scan_layers=True), pattern=(Full(), Local(3))
    )
    loss, params = value_and_gradients(config)
    with pytest.raises(ValueError, match="layer 1 is not like layer 0: it computes something else"):
        jax.eval_shape(loss, params)
    with pytest.raises(ValueError, match=r"\[0\] is \(3,\) there and \(5,\) here"):
        run_layers(lambda x, w: x, jnp.ones(()), [(jnp.ones(3),), (jnp.ones(5),)], scan=True)


@pytest.mark.parametrize("field", ["remat", "scan_layers"])
def test_experts_are_refused(field):
    with pytest.raises(ValueError, match=rf"{field} \(True\).* must be False where blocks have experts"):
        BlockConfig(mixture=MixtureConfig(), **{field: True})
