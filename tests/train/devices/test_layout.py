"""Evaluation and decoding beside parameters on a mesh: the results of one device, from sharded arguments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from datasets import Dataset
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from seqattn.decoding import Greedy
from seqattn.models import LanguageModel, LanguageModelConfig, Rotary, Transformer, TransformerConfig
from seqattn.nn import BlockConfig
from train.data.tokenizer import Characters, Tokenizer
from train.devices import layout
from train.devices.layout import Layout, fetch
from train.devices.parallel import Sharded
from train.devices.sharding import ROWS, put, shardings
from train.inference.completer import Completer
from train.inference.translator import Beam, Translator
from train.objectives import SequenceToSequence, objective
from train.update.step import TrainState

WORDS = Tokenizer.train(Characters(), ["abcdefgh"])
BLOCK = BlockConfig(model_dim=32, hidden_dim=1024, num_heads=2)
CONFIG = TransformerConfig(WORDS.vocab_size, 1, 1, BLOCK, Rotary())
# Five texts, so that rows fill the batch of four parts.
SPLIT = Dataset.from_dict({"source": ["abc", "hg", "fedcba", "a", "bcd"], "target": ["cba", "gh", "abcdef", "a", "dc"]})


def on_mesh(model, choice):
    """The model with its parameters spread over a mesh."""
    graph, params = nnx.split(model)
    where = shardings(TrainState(np.zeros((), int), params, ()), choice.mesh()).params
    return nnx.merge(graph, jax.tree.map(put, params, where))


@pytest.fixture(scope="module")
def models():
    """A Transformer on one device, and over a mesh of four parts of the rows."""
    model = Transformer(CONFIG, rngs=nnx.Rngs(0))
    return model, on_mesh(model, Sharded(fsdp=4, tensor=2))


def test_on_one_device_nothing_is_placed():
    place = Layout.of(nnx.state(Transformer(CONFIG, rngs=nnx.Rngs(0))))
    rows = {"source": np.ones((3, 2))}
    assert (place, place.parts) == (Layout(), 1)
    assert place.split(rows) is place.copied(rows) is place.gathered(rows, "*") is rows


def test_e5_the_loss_on_a_mesh_is_that_of_one_device(models):
    words = SequenceToSequence(WORDS)
    alone, spread = (words.mean_loss(model, SPLIT, batch_size=3) for model in models)
    assert spread == pytest.approx(alone, rel=1e-5)


def test_e5_evaluation_of_a_large_model_gathers_one_layer_of_a_scan_at_a_time(monkeypatch):
    """Each further layer takes no more memory than a device's part of it."""
    monkeypatch.setattr(layout, "_AT_ONCE", 0)
    scanned, grown = dataclasses.replace(BLOCK, scan_layers=True), []
    ids, lengths = np.full((8, 8), 5, np.int32), np.full(8, 8, np.int32)
    batch = {"source": ids, "target": ids, "source_length": lengths, "target_length": lengths}
    for layers in (2, 4):
        model = LanguageModel(LanguageModelConfig(WORDS.vocab_size, layers, scanned, Rotary()), rngs=nnx.Rngs(0))
        graph, params = nnx.split(on_mesh(model, Sharded(fsdp=8)))
        place = Layout.of(params)
        find = objective._compiled(graph, SequenceToSequence, place)
        memory = find.lower(params, place.split(batch)).compile().memory_analysis()
        grown.append((memory.temp_size_in_bytes, memory.argument_size_in_bytes))
    temporaries, arguments = (after - before for before, after in zip(*grown, strict=True))
    assert temporaries <= arguments
    losses = find(params, place.split(batch)), SequenceToSequence.loss(model, jax.tree.map(jnp.asarray, batch))
    np.testing.assert_allclose(*(float(total / count) for total, count in losses), rtol=1e-5)


def sharded_arguments(find, seen):
    """Runs `find`, and notes how its parameters and its rows lie."""

    def call(params, *rows, **options):
        given = [getattr(leaf, "sharding", None) for leaf in (*jax.tree.leaves(params), *jax.tree.leaves(rows[:2]))]
        compiled = find.lower(params, *rows, **options).compile()
        seen.append((given, compiled.input_shardings[0], compiled.memory_analysis()))
        return find(params, *rows, **options)

    return call


@pytest.mark.parametrize("search", [Greedy(), pytest.param(Beam(2), marks=pytest.mark.slow)], ids=["greedy", "beam"])
def test_e5_decoding_on_a_mesh_finds_what_one_device_finds_in_parts(search, models):
    texts, seen = SPLIT["source"], []
    alone, spread = (Translator(model, WORDS, batch_size=3, search=search, max_length=7) for model in models)
    # The tests' check of types refuses what `lower` puts in place of the penalty of a beam.
    if isinstance(search, Greedy):
        spread._find = sharded_arguments(spread._find, seen)
    expected, found = ([outputs[0] for outputs in each.stream([texts])] for each in (alone, spread))
    assert [output.text for output in found] == [output.text for output in expected]
    np.testing.assert_allclose(*([output.score for output in each] for each in (found, expected)), rtol=1e-5)
    params = jax.tree.leaves(nnx.state(models[1]))
    assert bool(seen) == isinstance(search, Greedy)
    for given, _, memory in seen:
        assert [place.spec for place in given[: len(params)]] == [leaf.sharding.spec for leaf in params]
        assert [place.spec for place in given[len(params) :]] == [P(ROWS), P(ROWS)]
        held = sum(leaf.addressable_data(0).nbytes for leaf in params)
        assert memory.argument_size_in_bytes < held + 1024  # the rows
        # XLA for CPUs may gather all layers before the loop over tokens: then a device keeps the half that `tensor`
        # leaves, beside activations and caches.
        assert memory.temp_size_in_bytes < 0.55 * sum(leaf.nbytes for leaf in params)


@pytest.mark.slow
def test_e5_completion_on_a_mesh_adds_what_one_device_adds():
    model = LanguageModel(LanguageModelConfig(WORDS.vocab_size, 1, BLOCK, Rotary()), rngs=nnx.Rngs(0))
    both = model, on_mesh(model, Sharded(tensor=2))
    alone, spread = (Completer(each, WORDS, length=5, seed=3)(["abc", "hg", "f"]) for each in both)
    assert spread == alone


def test_what_is_fetched_is_whole_and_on_the_host():
    place = NamedSharding(Sharded().mesh(), P(ROWS))
    found = fetch({"rows": put(np.arange(16), place)})["rows"]
    assert isinstance(found, np.ndarray)
    np.testing.assert_array_equal(found, np.arange(16))
