"""Packed rows hold every example once, whole, and say which tokens belong together."""

import itertools

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from grain.experimental import FirstFitPackIterDataset

from seqattn.models import LanguageModel, LanguageModelConfig, Transformer, TransformerConfig
from seqattn.nn import BlockConfig
from train.data import packing
from train.data.batches import Batches, collate, filled, iterate, measure, stream
from train.data.tokenizer import Characters, Tokenizer
from train.objectives import SequenceToSequence

RANDOM = np.random.default_rng(3)
PAIRS = [
    ([*RANDOM.integers(3, 13, RANDOM.integers(0, 9)), 2], [1, *RANDOM.integers(3, 13, RANDOM.integers(0, 6)), 2])
    for _ in range(101)
]
TEXTS = [([], target) for _, target in PAIRS]
CONFIG = Batches(tokens=90, max_length=17, packed=True)


def capacities(rows, longest):
    return packing.capacities(measure(rows), longest)


def pack(rows, source, target, *, seed):
    return packing.pack(rows, np.arange(len(rows)), measure(rows), source, target, seed=seed)


def texts(row):
    """The examples of a packed row, checked against its segments and positions."""
    found = []
    for segment in range(1, row["target_segment"].max() + 1):
        source, target = (row[f"{side}_segment"] == segment for side in ("source", "target"))
        for side, mine in (("source", source), ("target", target)):
            np.testing.assert_array_equal(row[f"{side}_position"][mine], np.arange(mine.sum()))
        inputs, labels = row["target"][target], row["label"][target]
        np.testing.assert_array_equal(inputs[1:], labels[:-1])
        found.append((row["source"][source].tolist(), [*inputs.tolist(), int(labels[-1])]))
    for side in ("source", "target"):
        assert not row[side][row[f"{side}_segment"] == 0].any()
    return found


@pytest.mark.parametrize("pairs", [PAIRS, TEXTS], ids=["pairs", "texts"])
def test_every_example_is_in_one_row(pairs):
    source, target = capacities(pairs, 17)
    rows = pack(pairs, source, target, seed=0)
    assert sorted(itertools.chain(*map(texts, rows))) == sorted(pairs)
    assert all(row["source"].shape == (source,) and row["target"].shape == (target,) for row in rows)
    assert all(array.dtype == np.int32 for row in rows for array in row.values())
    assert len(rows) < len(pairs) / 2


@pytest.mark.parametrize("pairs", [PAIRS * 41, TEXTS * 41, [([], [1])] * 5], ids=["pairs", "texts", "empty"])
def test_rows_are_those_of_the_packer_of_grain(pairs):
    source, target = capacities(pairs, 17)
    room = {"source": source, "target": target, "label": target}
    elements = [
        {name: np.array(ids, np.int32) for name, ids in zip(room, (source, ids[:-1], ids[1:]), strict=True)}
        for source, ids in pairs
    ]
    shuffled = grain.MapDataset.source(elements).seed(7).shuffle().to_iter_dataset(grain.ReadOptions(num_threads=0))
    packer = FirstFitPackIterDataset(shuffled, length_struct=room, num_packing_bins=64, shuffle_bins=False)
    theirs, ours = list(packer), pack(pairs, source, target, seed=7)
    assert len(ours) == len(theirs) > (len(pairs) > 1000) * 128  # rows are closed more than once
    for row, other in zip(ours, theirs, strict=True):
        for side in ("source", "target"):
            np.testing.assert_array_equal(row[side], other[side])
            np.testing.assert_array_equal(row[f"{side}_segment"], other[f"{side}_segment_ids"])
            np.testing.assert_array_equal(row[f"{side}_position"], other[f"{side}_positions"])
        np.testing.assert_array_equal(row["label"], other["label"])


def test_the_seed_decides_which_examples_meet():
    first, again, other = (pack(PAIRS, 17, 11, seed=seed) for seed in (5, 5, 6))
    assert list(map(texts, first)) == list(map(texts, again))
    assert list(map(texts, first)) != list(map(texts, other))


def test_both_sides_have_room_for_the_longest_of_all():
    assert capacities([([5] * 9, [1, 2]), ([], [1] * 40)], 39) == (9, 39)
    assert capacities([([], [1, 6, 2])], 7) == (0, 7)
    assert len(pack([([5] * 9, [1, 2]), ([], [1] * 40)], 9, 39, seed=0)) == 2


def test_a_stream_is_packed_and_goes_on_where_it_was():
    order = stream(CONFIG, PAIRS, seed=3, multiple=2)
    assert {name: array.shape for name, array in order[0].items()} == {
        name: (2, 17 if name.startswith("source") else 14)
        for name in ("source", "source_segment", "source_position", "target_segment", "target_position")
    } | {"target": (2, 14), "label": (2, 14)}
    resumed = itertools.islice(iterate(stream(CONFIG, PAIRS, seed=3, multiple=2), start=7), 5)
    for step, batch in enumerate(resumed, 7):
        jax.tree.map(np.testing.assert_array_equal, batch, order[step])
    rows = len(pack(PAIRS, 17, 14, seed=3))
    seen = [example for step in range(rows // 2) for row in range(2) for example in texts(at(order[step], row))]
    assert len(seen) >= len(PAIRS) - 9  # a pass of an odd number of rows ends within a batch
    assert all(example in PAIRS for example in seen)
    parts = [stream(CONFIG, PAIRS, seed=3, part=(index, 2))[4] for index in (0, 1)]
    jax.tree.map(lambda a, b, whole: np.testing.assert_array_equal(np.concatenate([a, b]), whole), *parts, order[4])


def at(batch, row):
    return {name: array[row] for name, array in batch.items()}


def test_rows_of_a_mesh_that_splits_texts_have_lengths_that_divide():
    batch = stream(CONFIG, PAIRS, seed=3, lengths=4)[0]
    assert {array.shape[1] for array in batch.values()} == {20, 16}


def test_rows_that_do_not_fit_are_refused():
    with pytest.raises(
        ValueError, match=r"tokens \(90\) has no room for 4 rows of 17 and 14 tokens; give at least 124"
    ):
        stream(CONFIG, PAIRS, seed=3, multiple=4)


def model(kind):
    block = BlockConfig(model_dim=12, hidden_dim=17, num_heads=2)
    if kind == "transformer":
        config = TransformerConfig(13, num_encoder_layers=1, num_decoder_layers=1, block=block)
        return Transformer(config, rngs=nnx.Rngs(0))
    return LanguageModel(LanguageModelConfig(13, num_layers=1, block=block), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(("kind", "pairs"), [("transformer", PAIRS), ("language model", TEXTS), ("prefix", PAIRS)])
def test_the_loss_and_its_gradient_are_those_of_one_example_a_row(kind, pairs):
    graph, params = nnx.split(model(kind))

    @jax.jit
    def loss(params, batch):
        return jax.value_and_grad(
            lambda params: SequenceToSequence.loss(nnx.merge(graph, params), batch), has_aux=True
        )(params)

    rows = pack(pairs, *capacities(pairs, 17), seed=0)
    packed = {name: jnp.stack([row[name] for row in rows]) for name in rows[0]}
    found, expected = loss(params, packed), loss(params, jax.tree.map(jnp.asarray, collate(pairs)))
    assert found[0][1] == expected[0][1] == sum(len(target) - 1 for _, target in pairs)
    np.testing.assert_allclose(found[0][0], expected[0][0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3), found[1], expected[1])


def test_tokens_are_counted_without_padding():
    objective = SequenceToSequence(Tokenizer.train(Characters(), ["ab"]))
    tokens = sum(len(source) + len(target) - 1 for source, target in PAIRS)
    source, target = capacities(PAIRS, 17)
    rows = pack(PAIRS, source, target, seed=0)
    packed, bucketed = {name: np.stack([row[name] for row in rows]) for name in rows[0]}, collate(PAIRS)
    assert objective.count(packed) == objective.count(bucketed) == tokens
    assert objective.count(filled(packed)) == len(rows) * (source + target)
    assert objective.count(filled(bucketed)) == bucketed["source"].size + bucketed["target"][:, 1:].size
    assert objective.count(filled(packed)) < 0.8 * objective.count(filled(bucketed))
