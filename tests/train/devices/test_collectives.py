"""What the devices of an update send to each other, in the program that XLA compiles for eight of them."""

import re

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from seqattn.models import Transformer, TransformerConfig
from seqattn.nn import BlockConfig, MixtureConfig
from train.devices.parallel import Sharded
from train.objectives import SequenceToSequence
from train.update.step import make_update, start_shapes

LENGTH, ROWS = 11, 16
BLOCK = BlockConfig(model_dim=64, hidden_dim=128, num_heads=8, dropout_rate=0.1)
MIXED = BlockConfig(model_dim=64, hidden_dim=128, num_heads=8, mixture=MixtureConfig(num_experts=8))
_KINDS = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
_COLLECTIVE = re.compile(rf"= (.*?) ({_KINDS})(?:-start)?\(")
_ARRAY = re.compile(r"(?:f32|s32|u32|pred)\[([\d,]*)\]")


@pytest.fixture
def uncached():
    """A program from the cache would print no warning."""
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    yield
    jax.config.update("jax_enable_compilation_cache", True)
    compilation_cache.reset_cache()


def sent(choice, block):
    """The number of elements in the results of each kind of collective, and the shapes of the state's parameters."""
    config = TransformerConfig(240, num_encoder_layers=1, num_decoder_layers=1, block=block)
    model = nnx.eval_shape(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    graph, state = start_shapes(model, optimizer)
    update = make_update(graph, optimizer, SequenceToSequence.loss, seed=0, label_smoothing=0.1)
    ids, lengths = jax.ShapeDtypeStruct((ROWS, LENGTH), np.int32), jax.ShapeDtypeStruct((ROWS,), np.int32)
    batch = {"source": ids, "target": ids, "source_length": lengths, "target_length": lengths}
    text = choice.spread(update, model=model).lower(state, batch).compile().as_text()
    found = {}
    for result, kind in _COLLECTIVE.findall(text):
        sizes = [[int(size) for size in shape.split(",") if size] for shape in _ARRAY.findall(result)]
        found[kind] = found.get(kind, 0) + elements(sizes)
    return found, [leaf.shape for leaf in jax.tree.leaves(state.params)]


def elements(shapes):
    return sum(map(int, map(np.prod, shapes)))


SCALARS = 10_000
"""More than the sums of losses, checks for NaN and norms hold; less than any matrix of activations."""


@pytest.mark.parametrize("axis", ["data", "fsdp", "tensor", pytest.param("expert", marks=pytest.mark.slow)])
def test_e7_an_axis_sends_what_its_layout_needs(axis, uncached, capfd):
    choice = Sharded() if axis == "data" else Sharded(**{axis: 8})
    found, shapes = sent(choice, MIXED if axis == "expert" else BLOCK)
    assert "rematerialization" not in capfd.readouterr().err
    params, kernels = elements(shapes), elements([shape for shape in shapes if len(shape) > 1])
    # The table has three gradients, of both look-ups and of the logits, which are added over the rows one by one.
    gradients = params + 2 * elements([(240, 64)])
    if axis == "data":
        assert found.keys() == {"all-reduce"}
        assert gradients <= found["all-reduce"] <= gradients + SCALARS
    elif axis == "fsdp":  # each kernel gathered once, and the gradients
        assert found.keys() == {"all-gather", "all-reduce"}
        assert kernels <= found["all-gather"] <= kernels + SCALARS
        assert params <= found["all-reduce"] <= gradients + SCALARS
    elif axis == "tensor":  # activations after each row of products; of the parameters only split biases are gathered
        assert found.keys() == {"all-gather", "all-reduce"}
        assert found["all-gather"] <= elements([shape for shape in shapes if len(shape) == 1])
        # Forward: a sum after each attention, feed-forward network and look-up. Backward: one for each product that
        # reads the activations of a layer, so at most three for an attention.
        activations = ROWS * LENGTH * 64
        assert 7 * activations * 0.9 <= found["all-reduce"] <= 24 * activations
    else:  # tokens to the experts and back, and the gradients
        assert found.keys() == {"all-gather", "all-reduce"}


@pytest.mark.slow
def test_e7_axes_together_need_no_array_made_anew(uncached, capfd):
    sent(Sharded(fsdp=2, tensor=2, expert=2), MIXED)
    assert "rematerialization" not in capfd.readouterr().err
