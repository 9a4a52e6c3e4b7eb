"""Greedy and beam search give the tokens of transformers for every family, with its own `generate`.

transformers and PyTorch are no part of the `test` extra: `make test-hf` runs this file.
"""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.decoding import (
    AverageLength,
    ForcedPrefix,
    LogitsProcessor,
    MinLength,
    NoRepeatNgram,
    PrefixCost,
    Stopping,
    beam_search,
    generate,
)
from seqattn.interop.huggingface import from_huggingface
from seqattn.models import TransformerConfig
from tests.huggingface_models import CONFIGS, LENGTHS, SOURCE_LENGTH, arrays_of, peer_of, tokens_of

pytestmark = pytest.mark.slow

START, END, PAD, FORCED, MAX_LENGTH = 2, 3, 0, 7, 9
FIRST = {fields["model_type"]: name for name, fields in reversed(CONFIGS.items())}
SEARCHES: dict[str, tuple[dict, tuple[LogitsProcessor, ...]]] = {
    "plain": ({}, ()),
    "no repeated 2-gram": ({"no_repeat_ngram_size": 2}, (NoRepeatNgram(2),)),
    # transformers counts the tokens before the end token.
    "at least 5 tokens": ({"min_new_tokens": 4}, (MinLength(5, END),)),
    "forced first token": (
        {"forced_bos_token_id": FORCED},
        (ForcedPrefix(np.full((2, 1), FORCED), np.array([1, 1]), PrefixCost.NOTHING),),
    ),
}


@functools.cache
def both(name: str):
    """The model of transformers, and ours."""
    pytest.importorskip("torch", reason="PyTorch is not installed: see above how to run this")
    pytest.importorskip("transformers", reason="transformers is not installed: see above how to run this")
    # GPT-2 learns a vector for each position, and the config has too few for a prompt and its continuation.
    fields = CONFIGS[name] | ({"n_positions": SOURCE_LENGTH + MAX_LENGTH} if name == "gpt2" else {})
    arrays = arrays_of(fields)
    return peer_of(fields, arrays), from_huggingface(fields, arrays)


def by_transformers(peer, name: str, **choices) -> np.ndarray:
    """New tokens `[2, MAX_LENGTH]`, padded."""
    import torch

    source, _ = (torch.from_numpy(x) for x in tokens_of(name))
    mask, start = torch.ones_like(source), source.shape[1]
    if peer.config.is_encoder_decoder:
        mask, start = (torch.arange(SOURCE_LENGTH) < torch.tensor(LENGTHS)[:, None]).long(), 1
        choices["decoder_start_token_id"] = START
    # What a config of BART adds by itself.
    peer.generation_config.forced_eos_token_id = None
    numbers = {"eos_token_id": END, "pad_token_id": PAD, "max_new_tokens": MAX_LENGTH}
    found = peer.generate(source, attention_mask=mask, do_sample=False, **numbers, **choices).numpy()[:, start:]
    padded = np.pad(found, ((0, 0), (0, MAX_LENGTH - found.shape[1])), constant_values=PAD)
    # Behind the end token, its beam search fills with end tokens if padding is token 0.
    ended = np.cumsum(padded == END, axis=1) - (padded == END) > 0
    return np.where(ended, PAD, padded)


def start_of(model, source):
    """The state and the first token of our search."""
    if isinstance(model.config, TransformerConfig):
        memory = model.encode(source, Coordinates.from_lengths(LENGTHS, SOURCE_LENGTH))
        return model.start(memory, MAX_LENGTH), jnp.full(2, START)
    nothing = jnp.zeros((2, 0), jnp.int32)
    state = model.start(model.encode(nothing, Coordinates(nothing, nothing)), SOURCE_LENGTH + MAX_LENGTH)
    _, state = model.prefill(source[:, :-1], jnp.full(2, SOURCE_LENGTH - 1), state)
    return state, source[:, -1]


@functools.partial(nnx.jit, static_argnames=("what", "beam_size", "power"))
def ours_by(model, source, what: str, beam_size: int, power: float):
    state, first = start_of(model, source)
    limits = {"max_length": MAX_LENGTH, "end_token": END, "pad_token": PAD, "processors": SEARCHES[what][1]}
    if beam_size == 1:
        return generate(model.step, state, first, **limits).tokens
    choices = {"length_penalty": AverageLength(power), "stopping": Stopping.LIKELY}
    return beam_search(model.step, state, first, beam_size=beam_size, **limits, **choices).tokens[:, 0]


@pytest.mark.parametrize("name", [name for kind, name in FIRST.items() if "bert" not in kind])
def test_searches_give_the_tokens_of_transformers(name):
    peer, model = both(name)
    source = jnp.asarray(tokens_of(name)[0])
    for what, (choices, _) in SEARCHES.items():
        # In transformers, a prompt is part of the text that n-grams are counted in, and a first token follows it.
        if not peer.config.is_encoder_decoder and what in ("no repeated 2-gram", "forced first token"):
            continue
        for beam_size, power in ((1, 1.0), (4, 0.6), (4, 1.0)):
            asked = {"num_beams": beam_size} | ({"length_penalty": power} if beam_size > 1 else {})
            expected = by_transformers(peer, name, **choices, **asked)
            found = ours_by(model, source, what, beam_size, power)
            np.testing.assert_array_equal(found, expected, err_msg=f"{what}, {asked}")
