"""Models whose forward pass is exported, and how a program is read and compared with its model."""

import jax
import jax.numpy as jnp

from seqattn import Coordinates
from seqattn.models import (
    Captioner,
    CaptionerConfig,
    Encoder,
    EncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    Patches,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    Rotary,
    Seq2Seq,
    Seq2SeqConfig,
    TextLabels,
    Transformer,
    TransformerConfig,
)
from seqattn.nn import BlockConfig

BLOCK = BlockConfig(model_dim=12, hidden_dim=7, num_heads=2)
PROGRAMS = {
    "transformer": (Transformer, TransformerConfig(11, 1, 1, BLOCK, Learned(7)), "SequenceToSequence"),
    "language model": (LanguageModel, LanguageModelConfig(11, 1, BLOCK), "Continuation"),
    "recurrent": (RecurrentLanguageModel, RecurrentLanguageModelConfig(11, 5, 6), "SequenceToSequence"),
    "seq2seq": (Seq2Seq, Seq2SeqConfig(11, 5, 6), "SequenceToSequence"),
    "classifier": (Encoder, EncoderConfig(11, 1, BLOCK, Rotary(), head=TextLabels(3)), "Classification"),
    "captioner": (Captioner, CaptionerConfig(11, Patches((2, 3)), TransformerConfig(0, 0, 1, BLOCK)), "Reading"),
}


def logits(model, given):
    """The same by the model itself."""
    at = {
        side: Coordinates.from_lengths(given[f"{side}_length"], given[side].shape[1])
        for side in given
        if f"{side}_length" in given
    }
    if "target" not in given:
        return model(given["source"], at["source"])
    if "image" in given:
        source, source_at = given["image"], Coordinates.from_lengths([6, 6], 6)
    elif "source" in given:
        source, source_at = given["source"], at["source"]
    else:
        source = jnp.zeros((2, 0), jnp.int32)
        source_at = Coordinates(source, source)
    return model.decode(given["target"], at["target"], model.encode(source, source_at))


def deserialize(path):
    """As the model card says."""
    return jax.export.deserialize(bytearray(path.read_bytes()))


def shapes(program):
    return jax.tree.unflatten(program.in_tree, program.in_avals)[0][1]
