"""Gradients of a loss are those of transformers, parameter by parameter under its names.

transformers and PyTorch are no part of the `test` extra: `make test-hf` runs this file.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn import cross_entropy
from seqattn.interop.huggingface import from_huggingface, to_huggingface
from seqattn.models import EncoderConfig, TransformerConfig
from tests.huggingface_models import (
    CONFIGS,
    LENGTHS,
    SOURCE_LENGTH,
    arrays_of,
    decoder_logits,
    encoder_logits,
    peer_of,
    seq2seq_logits,
    tokens_of,
)

pytestmark = pytest.mark.slow

NAMES = ["bart", "t5", "t5 1.1", "gpt2", "llama", "gemma2", "bert, masked"]
SHORTEST = min(LENGTHS)


@nnx.jit
def gradients_of(model, source, target, labels):
    def loss(model):
        if isinstance(model.config, EncoderConfig):
            logits = encoder_logits(model, source)
        elif isinstance(model.config, TransformerConfig):
            logits = seq2seq_logits(model, source, target)
        else:
            logits = decoder_logits(model, source)
        total, count = cross_entropy(logits, labels)
        return total / count

    return nnx.grad(loss)(model)


def peer_gradients(peer, source, target, labels):
    import torch

    source, target, labels = (torch.from_numpy(np.asarray(x)) for x in (source, target, labels))
    mask = (torch.arange(SOURCE_LENGTH) < torch.tensor(LENGTHS)[:, None]).long()
    if peer.config.is_encoder_decoder:
        logits = peer(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    elif "Bert" in type(peer).__name__:
        logits = peer(input_ids=source, attention_mask=mask).logits[:, :SHORTEST]
    else:
        logits = peer(input_ids=source).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten().long()).backward()
    return {name: x.grad.numpy() for name, x in peer.named_parameters() if x.grad is not None}


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_transformers(name):
    pytest.importorskip("torch", reason="PyTorch is not installed: see above how to run this")
    pytest.importorskip("transformers", reason="transformers is not installed: see above how to run this")
    fields, arrays = CONFIGS[name], arrays_of(CONFIGS[name])
    source, target = tokens_of(name)
    model = from_huggingface(fields, arrays)
    shape = {EncoderConfig: (2, SHORTEST), TransformerConfig: target.shape}.get(type(model.config), source.shape)
    labels = np.random.default_rng(5).integers(0, 11, shape)
    expected = peer_gradients(peer_of(fields, arrays), source, target, labels)

    graph = nnx.split(model)[0]
    found = gradients_of(model, *map(jnp.asarray, (source, target, labels)))
    # A layout is linear but for a constant (Gemma stores gains minus one), so gradients are written as a model is.
    written, constant = (
        to_huggingface(nnx.merge(graph, state), fields["model_type"])[1]
        for state in (found, jax.tree.map(jnp.zeros_like, found))
    )
    named = {name: written[name] - constant[name] for name in written}
    largest = max(np.abs(x).max() for x in expected.values())
    compared = named.keys() & expected.keys()
    assert len(compared) > 0.9 * len(named)
    assert largest > 1e-3
    for each in compared:
        np.testing.assert_allclose(named[each], expected[each], atol=2e-5 * largest, rtol=1e-3, err_msg=each)
