"""The table of rules: every parameter of every model has one, and what follows a parameter is split like it."""

import dataclasses
import logging

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from seqattn.models import (
    BucketBiases,
    CaptionerConfig,
    EncoderConfig,
    LanguageModelConfig,
    Learned,
    Patches,
    RelativeKeys,
    Seq2SeqConfig,
    TextLabels,
    TokenLabels,
    TransformerConfig,
)
from seqattn.models.parameter_rules import rule_of
from seqattn.nn import BlockConfig, Cell, MixtureConfig, Predictive, Score
from seqattn.nn.parameter_rule import Kind, ParameterRule
from train.checkpoints import run
from train.devices.sharding import AXES, shardings
from train.experiments import catalogue
from train.update.freezing import freeze
from train.update.optimizer import AdaGrad, AdamW, Muon, Optimizer
from train.update.parameters import paths
from train.update.step import TrainState

MESH = AbstractMesh((1, 2, 3, 1, 5), AXES)  # fsdp 2, tensor 3, expert 5
BLOCK = BlockConfig(8, 10, 2, gated=True, qk_norm=True, attention_bias=True, mixture=MixtureConfig(5))
FEW = {"num_encoder_layers": 1, "num_decoder_layers": 1}
OTHERS = {
    "biases": TransformerConfig(0, block=BLOCK, positions=BucketBiases(), share_embeddings=False, **FEW),
    "relative": LanguageModelConfig(0, block=BLOCK, positions=RelativeKeys(by_head=True), num_layers=1),
    "learned": TransformerConfig(0, block=dataclasses.replace(BLOCK, mixture=None), positions=Learned(19), **FEW),
    "logits_bias": TransformerConfig(0, block=BLOCK, logits_bias=True, **FEW),
    "concat": Seq2SeqConfig(0, attention=Score.CONCAT, local=Predictive(), cell=Cell.LSTM),
    "general": Seq2SeqConfig(0, attention=Score.GENERAL, cell=Cell.SIMPLE),
    "patches": CaptionerConfig(0, image=Patches(), decoder=TransformerConfig(0, block=BLOCK, **FEW)),
}


def sized(model):
    """The config of an experiment, with a number where it takes one from the data."""
    if isinstance(model, EncoderConfig) and isinstance(model.head, TokenLabels | TextLabels):
        model = dataclasses.replace(model, head=dataclasses.replace(model.head, num_labels=7))
    return dataclasses.replace(model, vocab_size=23)


def shapes(model):
    """The state of its parameters; nothing is computed."""
    return nnx.state(nnx.eval_shape(lambda: run.build(model, seed=0)), nnx.Param)


EVERY = {name: catalogue.named(name).model for name in catalogue.names()} | OTHERS


@pytest.mark.parametrize("name", EVERY)
def test_every_parameter_has_a_rule_with_no_more_dims_than_it_has(name):
    params = shapes(sized(EVERY[name]))
    for path, leaf in zip(jax.tree.leaves(paths(params)), jax.tree.leaves(params), strict=True):
        rule = rule_of(path)
        assert rule is not None, path
        assert len(rule.split) <= len(leaf.shape), path
        # One dim alone is never split: biases and gains are small.
        assert len(leaf.shape) > 1 or rule.split == P(), path


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        ("embedding/table", P("tensor", "fsdp")),
        ("decoder/source_embedding/table", P("tensor", "fsdp")),
        ("learned/table", P(None, "fsdp")),
        ("stack/blocks/0/attention/query/kernel", P("fsdp", "tensor")),
        ("stack/blocks/0/attention/output/kernel", P("tensor", "fsdp")),
        ("decoder/1/memory_attention/value/kernel", P("fsdp", "tensor")),
        ("decoder/1/memory_attention/value/bias", P()),
        ("encoder/0/feed_forward/hidden/kernel", P("fsdp", "tensor")),
        ("encoder/0/feed_forward/output/kernel", P("tensor", "fsdp")),
        ("encoder/0/feed_forward/experts/hidden/kernel", P("expert", "fsdp", "tensor")),
        ("encoder/0/feed_forward/experts/output/kernel", P("expert", "tensor", "fsdp")),
        ("encoder/0/feed_forward/experts/output/bias", P("expert")),
        ("encoder/layers/0/0/cell/dense_h/kernel", P("fsdp")),
        ("encoder/0/attention_residual/norm/scale", P()),
        ("output/kernel", P("fsdp", "tensor")),
        ("something/new", None),
    ],
)
def test_the_first_rule_that_matches_decides(path, spec):
    rule = rule_of(path)
    assert (None if rule is None else rule.split) == spec


def tree():
    """Divisible by the mesh, a size of its own for each dim."""
    kernel = {"kernel": jnp.ones((4, 9)), "bias": jnp.ones(9)}
    return {"embedding": {"table": jnp.ones((12, 8))}, "hidden": kernel}


def specs(sharded):
    return jax.tree.map(lambda sharding: sharding.spec, sharded)


SPECS = {"embedding": {"table": P("tensor", "fsdp")}, "hidden": {"kernel": P("fsdp", "tensor"), "bias": P()}}


def placed(optimizer, params):
    zero = jnp.zeros((), jnp.int32)
    return shardings(TrainState(zero, params, optimizer.init(params)), MESH)


def test_the_optimizer_follows_its_parameters():
    state = placed(optax.adam(0.1), tree())
    assert specs(state.params) == SPECS
    assert specs(state.opt_state[0].mu) == specs(state.opt_state[0].nu) == SPECS
    assert state.step.spec == state.opt_state[0].count.spec == P()


@pytest.mark.parametrize("algorithm", [AdaGrad(), AdamW(), Muon(adam=("embedding/*",))], ids=lambda x: type(x).__name__)
def test_every_algorithm_follows_frozen_ones_too(algorithm):
    """Where some parameters have no moments, the tree of moments has holes."""
    optimizer = freeze(Optimizer(algorithm=algorithm).make(1000), ("hidden/bias",))
    state = placed(optimizer, tree())
    found = {}
    for path, sharding in zip(jax.tree.leaves(paths(state.opt_state)), jax.tree.leaves(state.opt_state), strict=True):
        name = path.rpartition("/")[2]
        found.setdefault(name, set()).add(sharding.spec)
    assert found["table"] == {P("tensor", "fsdp")}
    assert found["kernel"] == {P("fsdp", "tensor")}
    assert "bias" not in found


def test_of_two_parameters_the_longer_path_is_followed():
    params = {"output": {"kernel": jnp.ones((4, 9))}, "attention": {"output": {"kernel": jnp.ones((9, 4))}}}
    state = placed(optax.sgd(0.1, momentum=0.9), params)
    expected = {"output": {"kernel": P("fsdp", "tensor")}, "attention": {"output": {"kernel": P("tensor", "fsdp")}}}
    assert specs(state.opt_state[0].trace) == expected


def test_what_has_another_shape_than_its_parameter_is_whole():
    params = {"hidden": {"kernel": jnp.ones((4, 9))}}
    state = TrainState(jnp.zeros((), jnp.int32), params, {"row": {"hidden": {"kernel": jnp.ones(4)}}})
    assert specs(shardings(state, MESH).opt_state) == {"row": {"hidden": {"kernel": P()}}}


def test_a_dim_that_does_not_divide_is_whole_and_named(caplog):
    params = {"embedding": {"table": jnp.ones((10, 8))}, "new": jnp.ones((2, 3))}
    with caplog.at_level(logging.WARNING, logger="train.devices.sharding"):
        state = placed(optax.adam(0.1), params)
    assert specs(state.params) == {"embedding": {"table": P(None, "fsdp")}, "new": P()}
    (message,) = caplog.messages
    assert "embedding/table: 10 of dim 0 over tensor (3); new: no rule" in message


def test_other_rules_may_be_given():
    params, rules = (
        {"hidden": {"kernel": jnp.ones((4, 6))}},
        (ParameterRule("*kernel", Kind.MATRIX, P(None, ("fsdp", "tensor"))),),
    )
    state = TrainState(jnp.zeros((), jnp.int32), params, ())
    assert specs(shardings(state, MESH, rules).params) == {"hidden": {"kernel": P(None, ("fsdp", "tensor"))}}


def test_a_rule_of_too_many_dims_is_refused():
    state = TrainState(jnp.zeros((), jnp.int32), {"hidden": {"kernel": jnp.ones(4)}}, ())
    with pytest.raises(ValueError, match=r"'\*hidden/kernel' splits 2 dims, and hidden/kernel has the shape \(4,\)"):
        shardings(state, MESH)
