"""A model is exported once, for any number of rows and tokens: what `jax.export` calls symbolic dimensions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from seqattn.coordinates import Coordinates
from seqattn.decoding import Sample, Temperature, TopK, TopP, generate
from tests.every_model import (
    B,
    S,
    V,
    every_generating,
    every_labelling,
    model_of,
    padded,
    source_at,
    sources,
)

P, L = 3, 5
PROMPTS = np.array([2, 3, 1, 2], np.int32)
pytestmark = pytest.mark.usefixtures("as_users_call_it")  # an annotation says int where a size may be a symbol


def _batch(name: str) -> tuple[jax.Array, ...]:
    """Sources, prompts, first tokens, and the words of a key for each row."""
    random = np.random.default_rng(5)
    prompts = padded(random.integers(2, V, (B, P)), PROMPTS, random)
    words = jax.random.key_data(jax.random.split(jax.random.key(3), B))
    return *sources(name), prompts, jnp.asarray(PROMPTS), jnp.asarray(random.integers(2, V, B), jnp.int32), words


def _symbols(batch: tuple[jax.Array, ...]) -> list[jax.ShapeDtypeStruct]:
    """The shapes of a batch with symbols for its rows, for the tokens of sources and prompts, and for image sides."""
    rows, source, prompt, height, width = export.symbolic_shape("rows, source, prompt, height, width")
    sizes = [(rows, *x.shape[1:]) for x in batch]
    # In multiples of all patches.
    sizes[0] = (rows, source) if batch[0].ndim == 2 else (rows, 3 * height, 3 * width)
    sizes[2] = (rows, prompt)
    return [jax.ShapeDtypeStruct(size, x.dtype) for size, x in zip(sizes, batch, strict=True)]


def _read(model, source, lengths, prompt, prompt_lengths, first, words):
    """All that a model does with sources, prompts and first tokens; and the state behind the prompts."""
    memory = model.encode(source, source_at(model, source, lengths))
    at = Coordinates.from_lengths(prompt_lengths, prompt.shape[1])
    logits, weights = model.decode(prompt, at, memory), model.alignment(prompt, at, memory)
    prefilled, state = model.prefill(prompt, prompt_lengths, model.start(memory, prompt.shape[1] + L))
    bold = Sample((Temperature(2.0), TopK(7), TopP(0.9)))
    found = [
        generate(model.step, state, first, max_length=L, end_token=1, **options)
        for options in ({}, {"sampling": bold, "key": words})
    ]
    return (logits, prefilled, jnp.moveaxis(weights, 1, 2)), found, state


def _whole(model, *given):
    by_token, found, state = _read(model, *given)
    return by_token, found, model.step(given[-2], state)[0]


@every_generating
def test_a_model_is_exported_once_for_any_number_of_rows_and_tokens(name):
    model, batch = model_of(name), _batch(name)
    symbols = _symbols(batch)
    read = export.export(jax.jit(lambda *given: _read(model, *given)))(*symbols)
    state = jax.eval_shape(lambda *given: _read(model, *given)[-1], *symbols)
    # The symbols are known by the shapes of source and prompt, where a cache has room for half of both.
    step = export.export(jax.jit(lambda given, state: model.step(given[-2], state)[0]))(symbols, state)
    expected = jax.jit(_whole)(model, *batch)
    few = [x[1:2] for x in batch]
    few[0] = few[0][:, :4] if few[0].ndim == 2 else few[0]
    for given, rows in ((batch, slice(0, B)), (few, slice(1, 2))):
        by_token, found, state = read.call(*given)
        logits = step.call([*given], state)
        wanted, found_before, after = jax.tree.map(lambda x, rows=rows: x[rows], expected)
        real = np.arange(P) < PROMPTS[rows, None]
        for ours, theirs in zip(by_token, wanted, strict=True):
            theirs = theirs[real][..., : ours.shape[-1]]
            np.testing.assert_allclose(ours[real[:, : ours.shape[1]]], theirs, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(jax.tree.leaves((found, logits)), jax.tree.leaves((found_before, after)), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@every_labelling
def test_an_encoder_is_exported_once_for_any_number_of_rows_and_tokens(name):
    model, (tokens, lengths) = model_of(name), sources(name)
    rows, size = export.symbolic_shape("rows, size")
    shapes = jax.ShapeDtypeStruct((rows, size), jnp.int32), jax.ShapeDtypeStruct((rows,), jnp.int32)

    def labels(tokens, lengths):
        return model(tokens, source_at(model, tokens, lengths))

    program = export.export(jax.jit(labels))(*shapes)
    expected = np.asarray(jax.jit(labels)(tokens, lengths))
    for rows, size in ((slice(0, B), S), (slice(1, 2), 4)):
        logits = np.asarray(program.call(tokens[rows, :size], lengths[rows]))
        wanted = expected[rows] if logits.ndim == 2 else expected[rows, :size]
        real = np.ones(len(logits), bool) if logits.ndim == 2 else np.arange(size) < np.asarray(lengths)[rows, None]
        np.testing.assert_allclose(logits[real], wanted[real], rtol=1e-4, atol=1e-5)
