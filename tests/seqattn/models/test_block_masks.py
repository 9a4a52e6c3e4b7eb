"""Layers with equal masks share one block mask, and compute the same with it."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import Compressed, Full, LanguageModel, LanguageModelConfig, Transformer, TransformerConfig, Window
from seqattn.models.block_masks import BlockMasks
from seqattn.nn import BlockConfig, MultiHeadAttention
from tests.contract import close, small_tiles

BLOCK = BlockConfig(model_dim=8, hidden_dim=5, num_heads=2, dropout_rate=0.0)
V, B, T = 11, 2, 13
TOKENS = jnp.asarray(np.random.default_rng(0).integers(1, V, (B, T)))
SEGMENT = jnp.asarray([[1] * 5 + [2] * 8, [1] * 4 + [2] * 3 + [3] * 4 + [0] * 2])


@pytest.fixture(autouse=True)
def tiled(monkeypatch):
    """Calls as short as these are tiled, in many tiles."""
    small_tiles(monkeypatch)
    monkeypatch.setattr("seqattn.kernels.dispatch.TINY_PAIRS", 0)
    monkeypatch.setattr("seqattn.kernels.dispatch.FEW_QUERIES", 0)


def _decoder_only(pattern):
    config = LanguageModelConfig(V, len(pattern), BLOCK, pattern=pattern)
    return LanguageModel(config, rngs=nnx.Rngs(0))


def _language_model(model, tokens, at):
    empty = jnp.zeros((B, 0), tokens.dtype)
    return model.decode(tokens, at, model.encode(empty, Coordinates.from_lengths([0, 0], 0)))


def _translator(model, tokens, at):
    return model.decode(tokens, at, model.encode(tokens[:, ::-1], jax.tree.map(lambda x: x[:, ::-1], at)))


def _transformer():
    return Transformer(TransformerConfig(V, num_encoder_layers=2, num_decoder_layers=3, block=BLOCK), rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("make", "call", "lists"),
    [
        (lambda: _decoder_only((Full(),) * 3), _language_model, 1),
        (lambda: _decoder_only((Full(), Window(3), Compressed(3), Full(), Window(3))), _language_model, 2),
        (lambda: _decoder_only((Full(), Window(3), Compressed(3))), _language_model, 0),
        (_transformer, _translator, 3),
    ],
    ids=["one kind", "two kinds", "one layer of each kind", "encoder, decoder and between"],
)
def test_layers_that_share_a_block_mask_compute_the_same(make, call, lists):
    model = make()

    def loss(model, segment):
        return jnp.sin(call(model, TOKENS, Coordinates.from_segments(segment))).sum()

    made = MultiHeadAttention.block_mask
    with mock.patch.object(MultiHeadAttention, "block_mask", autospec=True, side_effect=made) as block_mask:
        found = nnx.jit(nnx.value_and_grad(loss))(model, SEGMENT)
        assert block_mask.call_count == lists
    with mock.patch.object(BlockMasks, "get", return_value=None):
        expected = nnx.jit(nnx.value_and_grad(loss))(model, SEGMENT)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        close(a, b, "float32")


@pytest.mark.parametrize("scan", [False, True])
def test_layers_read_the_lists(scan):
    """With lists that visit nothing, no layer sees another token: attention adds zeros."""
    block = BlockConfig(model_dim=8, hidden_dim=5, num_heads=2, dropout_rate=0.0, remat=scan, scan_layers=scan)
    model = LanguageModel(LanguageModelConfig(V, 2, block), rngs=nnx.Rngs(0))
    made, at = MultiHeadAttention.block_mask, Coordinates.from_segments(SEGMENT)

    def blind(self, *arguments, **options):
        shared = made(self, *arguments, **options)
        return type(shared)(shared.mask, shared.q_at, shared.kv_at, jax.tree.map(jnp.zeros_like, shared.visits))

    others = TOKENS.at[:, 0].set(TOKENS[:, 0] % (V - 1) + 1)
    run = jax.jit(lambda model, tokens, at: _language_model(model, tokens, at)[:, 1:5])
    assert not jnp.allclose(run(model, TOKENS, at), run(model, others, at), atol=1e-3)
    with mock.patch.object(MultiHeadAttention, "block_mask", blind):
        jax.clear_caches()
        close(run(model, TOKENS, at), run(model, others, at), "float32")
    jax.clear_caches()


def test_texts_that_share_a_source():
    """A memory of one row is that of all rows of the target."""
    model, target = _transformer(), jnp.concatenate([TOKENS, TOKENS[:, ::-1]])
    source, at = TOKENS[:1], Coordinates.from_lengths(jnp.array([T - 2]), T)
    target_at = Coordinates.from_lengths(jnp.array([T, 3, 5, 1]), T)
    found = model.decode(target, target_at, model.encode(source, at))
    rows = [jnp.repeat(source, 4, axis=0), jax.tree.map(lambda x: jnp.broadcast_to(x, (4, T)), at)]
    close(found, model.decode(target, target_at, model.encode(*rows)), "float32")
