"""Attention inside an update that a mesh splits by rows, heads and texts: the update is that of one device."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from seqattn.models import (
    CaptionerConfig,
    Compressed,
    Full,
    LanguageModel,
    LanguageModelConfig,
    Local,
    RecurrentLanguageModelConfig,
    Seq2SeqConfig,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import BlockConfig, with_implementation
from train.data.batches import collate
from train.data.packing import pack
from train.data.sequence_order import zigzagged
from train.devices.parallel import Replicated, Sharded
from train.objectives import Continuation, SequenceToSequence
from train.update.step import make_update, start

BLOCK = BlockConfig(model_dim=24, hidden_dim=28, num_heads=4, dropout_rate=0.0)
ROWS, SOURCE, TARGET = 4, 8, 16


def rows():
    generator = np.random.default_rng(0)

    def text(longest):
        return generator.integers(4, 24, generator.integers(1, longest + 1)).tolist()

    return [(text(SOURCE), [1, *text(TARGET - 2), 2]) for _ in range(ROWS)]


def translator():
    config = TransformerConfig(24, num_encoder_layers=1, num_decoder_layers=1, block=BLOCK)
    return Transformer(config, rngs=nnx.Rngs(0)), SequenceToSequence.loss


def stream(*pattern):
    config = LanguageModelConfig(24, num_layers=len(pattern), block=BLOCK, pattern=pattern)
    return LanguageModel(config, rngs=nnx.Rngs(0)), Continuation.loss


def plain():
    return collate(rows(), (ROWS, SOURCE, TARGET))


def packed():
    """Two texts in a row."""
    room = pack(rows() * 4, 2 * SOURCE, 2 * TARGET, seed=0)[:ROWS]
    assert len(room) == ROWS
    assert max(row["target_segment"].max() for row in room) > 1
    return {name: np.stack([row[name] for row in room]) for name in room[0]}


def updated(model, loss, batch, parallel=None, devices=1):
    """Loss and gradient norm of one update, and the parameters after it."""
    optimizer = optax.sgd(0.5)
    graph, state = start(model, optimizer)

    def prepare(model):
        # Small texts would run on XLA, which the compiler splits by itself.
        return with_implementation(model if parallel is None else parallel.prepare(model), "chunked")

    update = make_update(graph, optimizer, loss, seed=0, prepare=prepare)
    if parallel is None:
        state, metrics = jax.jit(update)(state, batch)
    else:
        placed = parallel.spread(update, jax.devices()[:devices])
        state, metrics = placed.update(jax.device_get(state), batch)
    return jax.device_get((metrics["loss"], metrics["gradient_norm"], state.params))


CASES = {
    "all axes": (Sharded(fsdp=2, tensor=2, sequence=2), 8, translator, plain),
    "packed": (Sharded(sequence=2), 2, translator, packed),
    "decoder-only": (Sharded(data=2, sequence=4), 8, functools.partial(stream, Full()), plain),
    "windows and summaries": (Sharded(sequence=2), 2, functools.partial(stream, Local(4), Compressed(3)), plain),
}


@pytest.mark.parametrize("name", CASES)
def test_a_split_update_is_that_of_one_device(name):
    parallel, devices, make, given = CASES[name]
    model, loss = make()
    ordered = zigzagged(given(), devices=parallel.sequence)
    expected = updated(model, loss, given())
    found = updated(model, loss, ordered, parallel, devices)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), found, expected)


@pytest.mark.parametrize("config", [Seq2SeqConfig(11), RecurrentLanguageModelConfig(11), CaptionerConfig(11)], ids=type)
def test_a_model_that_reads_from_end_to_end_is_refused(config):
    with pytest.raises(ValueError, match=rf"sequence \(2\) splits each text .* a {type(config).__name__} reads it"):
        Sharded(sequence=2).check(config)
    Sharded(tensor=2).check(config)
    Replicated().check(config)
