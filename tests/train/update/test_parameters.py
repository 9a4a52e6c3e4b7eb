"""Paths, and what counts as a matrix, in models as well as in their states."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from seqattn.interop import model_type
from seqattn.models import (
    BucketBiases,
    Captioner,
    CaptionerConfig,
    Compressed,
    Encoder,
    EncoderConfig,
    Full,
    LanguageModel,
    LanguageModelConfig,
    MaskedTokens,
    RelativeKeys,
    Seq2Seq,
    Seq2SeqConfig,
    TransformerConfig,
)
from seqattn.models.parameter_rules import rule_of
from seqattn.nn import BatchNorm, BlockConfig, MixtureConfig
from seqattn.nn.parameter_rule import Kind
from tests.every_model import GENERATING, LABELLING
from train.update.optimizer import Muon
from train.update.parameters import check_patterns, matching, matrices, paths


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(2, 3, rngs=rngs), nnx.Linear(3, 2, rngs=rngs)])
        self.norm = nnx.LayerNorm(2, rngs=rngs)


NAMES = ["layers/0/bias", "layers/0/kernel", "layers/1/bias", "layers/1/kernel", "norm/bias", "norm/scale"]


@pytest.fixture
def state():
    return nnx.eval_shape(lambda: nnx.state(Model(), nnx.Param))


def chosen(tree, mask):
    return [name for name, is_chosen in zip(NAMES, jax.tree.leaves(mask(tree)), strict=True) if is_chosen]


def test_model_and_state_have_the_same_paths(state):
    assert jax.tree.leaves(paths(state)) == jax.tree.leaves(paths(nnx.eval_shape(Model))) == NAMES
    assert jax.tree.structure(paths(state)) == jax.tree.structure(state)


@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        (["layers/0/*"], NAMES[:2]),
        (["*/kernel", "norm/scale"], [NAMES[1], NAMES[3], NAMES[5]]),
        (["layers/?/b*"], [NAMES[0], NAMES[2]]),
        (["kernel", "layers"], []),
        (["*"], NAMES),
    ],
)
def test_globs_match_whole_paths(state, patterns, names):
    assert chosen(state, lambda tree: matching(tree, patterns)) == names


def test_matrices_are_no_vectors(state):
    assert chosen(state, matrices) == [NAMES[1], NAMES[3]]


def test_what_is_a_matrix_in_a_model():
    """What weight decay takes hold of: no norm, no bias, those of scores, experts and logits included."""
    block = BlockConfig(model_dim=4, hidden_dim=3, num_heads=2, qk_norm=True, gated=True)
    mixed = dataclasses.replace(block, mixture=MixtureConfig(num_experts=3, top_k=2))
    models = {
        "language": lambda rngs: LanguageModel(
            LanguageModelConfig(7, 2, mixed, BucketBiases(4, 3), (Full(), Compressed(2))), rngs=rngs
        ),
        "encoder": lambda rngs: Encoder(EncoderConfig(7, 1, block, RelativeKeys(2), head=MaskedTokens()), rngs=rngs),
        "recurrent": lambda rngs: Seq2Seq(Seq2SeqConfig(7, embedding_dim=4, hidden_dim=6), rngs=rngs),
        "reader": lambda rngs: Captioner(CaptionerConfig(7, decoder=TransformerConfig(0, 0, 1, block)), rngs=rngs),
        "batch": lambda rngs: BatchNorm(5, rngs=rngs),
    }
    vectors = set()
    for make in models.values():
        state = nnx.eval_shape(lambda make=make: nnx.state(make(nnx.Rngs(0)), nnx.Param))
        names, are_matrices = (jax.tree.leaves(tree) for tree in (paths(state), matrices(state)))
        for name, is_matrix in zip(names, are_matrices, strict=True):
            last = name.rpartition("/")[-1]
            assert not (is_matrix and last.endswith(("bias", "scale", "shift", "projection"))), name
            vectors |= set() if is_matrix else {last}
    assert vectors == {"bias", "hidden_bias", "scale", "shift", "projection", "mean", "variance"}
    language = nnx.eval_shape(lambda: nnx.state(models["language"](nnx.Rngs(0)), nnx.Param))
    chosen = dict(zip(jax.tree.leaves(paths(language)), jax.tree.leaves(matrices(language)), strict=True))
    assert chosen["stack/scores/bias"] is False
    assert chosen["stack/blocks/0/feed_forward/experts/hidden/kernel"] is True


def test_stacked_biases_are_no_matrices():
    def linear(key):
        return nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(key)), nnx.Param)

    stacked = jax.eval_shape(jax.vmap(linear), jax.random.split(jax.random.key(0), 5))
    assert [leaf.shape for leaf in jax.tree.leaves(stacked)] == [(5, 3), (5, 2, 3)]
    assert jax.tree.leaves(matrices(stacked)) == [False, True]


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest():
    params = {"encoder": {"0": jnp.ones(2), "1": jnp.ones(3)}, "output": jnp.ones(5)}
    check_patterns(params, ["encoder/*", "output"])
    with pytest.raises(
        ValueError, match=r"pattern 'encoder/2' matches no parameter; the nearest are encoder/[01], enc"
    ):
        check_patterns(params, ["output", "encoder/2"])


@pytest.mark.parametrize("name", GENERATING | LABELLING)
def test_the_kinds_of_parameters_say_what_decays_and_what_muon_takes(name):
    config = (GENERATING | LABELLING)[name]
    kind = model_type(config)
    params = nnx.state(nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0))), nnx.Param)
    kinds = [rule_of(path).kind for path in jax.tree.leaves(paths(params))]
    assert jax.tree.leaves(matrices(params)) == [each not in (Kind.VECTOR, Kind.STATISTIC) for each in kinds]
    taken = jax.tree.leaves(Muon()._labels(params))
    assert taken == ["muon" if each is Kind.MATRIX else "adam" for each in kinds]


def test_a_model_of_ones_own_is_judged_by_shapes_and_names():
    params = {"mine": {"map": jax.ShapeDtypeStruct((2, 3), "float32"), "gain": jax.ShapeDtypeStruct((3,), "float32")}}
    assert matrices(params) == {"mine": {"map": True, "gain": False}}
