"""A row of a padded batch gives what it gives alone, whatever the padding holds: greedy, at random, by beam search."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from seqattn import models
from seqattn.decoding import Sample, Temperature, TopP, beam_search, generate, row_keys
from tests.every_model import (
    CLASSES,
    GENERATING,
    LABELLING,
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

P, L, BEAMS = 3, 5, 2
PROMPTS = np.array([2, 3, 1, 0], np.int32)
KEYS = row_keys(jax.random.key(3), B)


def test_no_public_class_of_models_is_forgotten():
    public = {each for each in vars(models).values() if isinstance(each, type) and issubclass(each, nnx.Module)}
    public.remove(models.Stack)  # a part of others, which takes vectors
    assert set(CLASSES.values()) == public
    for cases, generates in ((GENERATING, True), (LABELLING, False)):
        wanted = {each for each in public if hasattr(each, "step") == generates}
        assert {CLASSES[type(config)] for config in cases.values()} == wanted


def _batch(name: str, seed: int) -> tuple[jax.Array, ...]:
    """Sources, prompts and first tokens, and the key of each row; `seed` draws what padding holds."""
    random = np.random.default_rng(5)
    prompts = padded(random.integers(2, V, (B, P)), PROMPTS, np.random.default_rng(seed))
    first = jnp.asarray(random.integers(2, V, B), jnp.int32)
    return *sources(name, seed), prompts, jnp.asarray(PROMPTS), first, KEYS


@jax.jit
def _found(model, source, lengths, prompt, prompt_lengths, first, keys):
    """What greedy generation, sampling and a beam search find behind the sources and prompts of a batch."""
    memory = model.encode(source, source_at(model, source, lengths))
    _, state = model.prefill(prompt, prompt_lengths, model.start(memory, P + L))
    limits = {"max_length": L, "end_token": 1}
    bold = Sample((Temperature(2.0), TopP(0.9)))
    looks = getattr(state, "weights", None) is not None
    alignment = (lambda state: state.weights) if looks else None
    return (
        generate(model.step, state, first, **limits),
        generate(model.step, state, first, **limits, sampling=bold, key=keys),
        beam_search(model.step, state, first, **limits, beam_size=BEAMS, n_best=BEAMS, alignment=alignment),
    )


def _check(alone, together, row):
    for ours, theirs in zip(jax.tree.leaves(alone), jax.tree.leaves(together), strict=True):
        ours, theirs = np.asarray(ours)[0], np.asarray(theirs)[row]
        if np.issubdtype(ours.dtype, np.floating):
            if ours.shape != theirs.shape:  # weights of a source that is not padded
                assert not theirs[..., ours.shape[-1] :].any()
                theirs = theirs[..., : ours.shape[-1]]
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_array_equal(ours, theirs)


@every_generating
def test_a_row_of_a_batch_gives_what_it_gives_alone(name, as_users_call_it):
    model = model_of(name)
    together, again = _found(model, *_batch(name, 1)), _batch(name, 2)
    assert not np.asarray(together[0].failed).any()
    for row in range(B):
        _check(_found(model, *(x[row : row + 1] for x in again)), together, row)
    # Without any padding.
    source, lengths, prompt, *others = (x[1:2] for x in again)
    source = source[:, : lengths[0]] if source.ndim == 2 else source
    _check(_found(model, source, lengths, prompt[:, : PROMPTS[1]], *others), together, 1)


@jax.jit
def _labels(model, tokens, lengths):
    return model(tokens, source_at(model, tokens, lengths))


@every_labelling
def test_a_text_of_a_batch_is_read_as_it_is_alone(name):
    model, (tokens, lengths), (again, _) = model_of(name), sources(name, 1), sources(name, 2)
    together = np.asarray(_labels(model, tokens, lengths))
    for row in range(B):
        for size in (S, 4) if row == 1 else (S,):
            alone = np.asarray(_labels(model, again[row : row + 1, :size], lengths[row : row + 1]))[0]
            real = slice(int(lengths[row])) if alone.ndim == 2 else slice(None)
            np.testing.assert_allclose(alone[real], together[row][real], rtol=1e-4, atol=1e-5)
