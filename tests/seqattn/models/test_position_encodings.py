"""How the order of tokens enters a model: what each choice sees of it, its tables, and what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.coordinates import Coordinates
from seqattn.models import (
    AttentionEncoder,
    BucketBiases,
    Captioner,
    CaptionerConfig,
    Encoder,
    EncoderConfig,
    LanguageModel,
    LanguageModelConfig,
    Learned,
    LinearBiases,
    RecurrentLanguageModel,
    RecurrentLanguageModelConfig,
    RelativeKeys,
    Rotary,
    Seq2Seq,
    Seq2SeqConfig,
    Sinusoidal,
    TokenLabels,
    Transformer,
    TransformerConfig,
)
from seqattn.models.position_encodings import PositionScores
from seqattn.nn import BlockConfig
from tests.parameters import drawn

V, B, T = 11, 2, 5
BLOCK = BlockConfig(model_dim=12, hidden_dim=5, num_heads=2)
TOKENS = jnp.asarray(np.random.default_rng(0).permutation(V)[: B * T].reshape(B, T))
AT = Coordinates.from_lengths([T, 4], T)
RELATIVE = {
    "rotary": Rotary(50.0),
    "linear_biases": LinearBiases(),
    "bucket_biases": BucketBiases(8, 5),
    "relative_keys": RelativeKeys(3),
    "relative_keys_by_head": RelativeKeys(3, by_head=True),
}
KINDS = {"sinusoidal": Sinusoidal(), "learned": Learned(23), **RELATIVE}


@functools.cache
def _encoder(positions, num_layers: int = 1) -> Encoder:
    config = EncoderConfig(V, num_layers, BLOCK, positions)
    return drawn(lambda: Encoder(config, rngs=nnx.Rngs(0)))


_encode = jax.jit(lambda model, tokens, at: model.encode(tokens, at))


@pytest.mark.parametrize("positions", KINDS.values(), ids=KINDS)
def test_order_counts_and_of_relative_kinds_distances_alone(positions):
    """The same tokens in another order, and the same order moved by 7 positions or stretched."""
    model, real = _encoder(positions), np.asarray(AT.segment) != 0
    expected = np.asarray(_encode(model, TOKENS, AT))
    order = np.array([2, 0, 3, 1, 4])
    permuted = np.asarray(_encode(model, TOKENS[:, order], AT))
    assert np.all(np.abs(permuted - expected[:, order])[:, [0, 1, 3]].max(axis=(1, 2)) > 1e-4)
    moved = np.asarray(_encode(model, TOKENS, Coordinates(AT.position + 7, AT.segment)))
    if positions in RELATIVE.values():
        np.testing.assert_allclose(moved[real], expected[real], atol=1e-5)
    else:
        assert np.abs(moved - expected)[real].max() > 1e-3
    stretched = np.asarray(_encode(model, TOKENS, Coordinates(3 * AT.position, AT.segment)))
    assert np.abs(stretched - expected)[real].max() > 1e-4
    # A text read backwards: no kind but that of unsigned distances takes it for the same.
    mirrored = np.asarray(_encode(model, TOKENS, Coordinates(T - 1 - AT.position, AT.segment)))
    same = np.allclose(mirrored[real], expected[real], atol=1e-5)
    assert same == isinstance(positions, LinearBiases)


def test_without_positions_a_text_is_a_set():
    model, order = _encoder(None), np.array([2, 0, 3, 1])
    given = jnp.asarray(np.concatenate([np.asarray(TOKENS)[:, order], np.asarray(TOKENS)[:, 4:]], axis=1))
    expected = np.asarray(_encode(model, TOKENS, AT))
    np.testing.assert_allclose(_encode(model, given, AT)[:, :4], expected[:, order], atol=1e-5)


def _shapes(module) -> dict:
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): leaf.shape for path, leaf in flat}


@pytest.mark.parametrize(
    ("positions", "shape"),
    [
        (None, None),
        (Sinusoidal(), None),
        (Rotary(), None),
        (LinearBiases(), None),
        (Learned(23), None),
        (BucketBiases(8, 5), (8, 2)),  # for all layers
        (RelativeKeys(3), (4, 7, 6)),
        (RelativeKeys(3, by_head=True), (4, 7, 2, 6)),
    ],
    ids=str,
)
def test_the_tables_of_a_stack(positions, shape):
    config = EncoderConfig(V, 4, BLOCK, positions)
    found = _shapes(nnx.eval_shape(lambda: Encoder(config, rngs=nnx.Rngs(0))))
    plain = _shapes(nnx.eval_shape(lambda: Encoder(dataclasses.replace(config, positions=None), rngs=nnx.Rngs(0))))
    name = "bias" if isinstance(positions, BucketBiases) else "tables"
    tables = {} if shape is None else {f"stack.scores.{name}": shape}
    tables |= {"learned.table": (23, 12)} if isinstance(positions, Learned) else {}
    assert found == plain | tables


def test_all_layers_share_the_biases_and_each_has_keys_of_its_own():
    for positions, shared in ((BucketBiases(8, 5), True), (RelativeKeys(3), False)):
        scores = _encoder(positions, num_layers=2).stack.scores
        first, second = (np.asarray(scores.of(layer).table) for layer in range(2))
        assert np.array_equal(first, second) == shared
    # Biases start at zero, so that a fresh model has none; fresh keys are small.
    sizes = {"num_heads": 2, "head_dim": 6, "bidirectional": True, "rngs": nnx.Rngs(0)}
    assert not np.any(PositionScores(BucketBiases(8, 5), 2, **sizes).bias[...])
    assert 0.01 < np.std(PositionScores(RelativeKeys(3), 2, **sizes).tables[...]) < 0.04


def test_an_encoder_tells_ahead_from_behind_in_its_buckets_and_a_decoder_has_all_behind():
    config = TransformerConfig(V, 1, 1, BLOCK, BucketBiases(8, 5))
    model = drawn(lambda: Transformer(config, rngs=nnx.Rngs(0)))
    assert (model.encoder_scores.of(0).bidirectional, model.decoder_scores.of(0).bidirectional) == (True, False)


MODELS = {
    "encoder": (Encoder, EncoderConfig(V, 1, BLOCK)),
    "language": (LanguageModel, LanguageModelConfig(V, 1, BLOCK)),
    "transformer": (Transformer, TransformerConfig(V, 1, 1, BLOCK)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    ("positions", "block", "message"),
    [
        (Sinusoidal(), {"model_dim": 5, "num_heads": 1}, r"model_dim \(5\) must be even for sinusoidal positions"),
        (Rotary(), {"model_dim": 6, "num_heads": 2}, r"dim \(3\) must be even"),
        (Learned(0), {}, r"max_length \(0\) must be an integer of at least 1"),
        (RelativeKeys(0), {}, r"max_distance \(0\) must be an integer of at least 1"),
        (BucketBiases(32, 8), {}, r"max_distance \(8\) must exceed (8|16), the number of distances with a bucket of"),
        (BucketBiases(1, 8), {}, r"num_buckets \(1\) must be (even and at least 4|at least 2)"),
    ],
    ids=str,
)
def test_what_cannot_be_is_refused_when_the_model_is_built(name, positions, block, message):
    model, config = MODELS[name]
    config = dataclasses.replace(config, positions=positions, block=dataclasses.replace(BLOCK, **block))
    with pytest.raises(ValueError, match=message):
        nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))


def test_an_odd_number_of_buckets_has_no_two_sides():
    def build(bidirectional):
        sizes = {"num_heads": 2, "head_dim": 6, "bidirectional": bidirectional}
        return nnx.eval_shape(lambda: PositionScores(BucketBiases(7, 8), 1, **sizes, rngs=nnx.Rngs(0)))

    assert build(False).bias.shape == (7, 2)
    with pytest.raises(ValueError, match=r"num_buckets \(7\) must be even and at least 4 in an encoder"):
        build(True)


SIZED = {"block": BlockConfig(model_dim=6, hidden_dim=5, num_heads=2), "positions": Learned(5)}
READER = AttentionEncoder(num_layers=1, num_heads=2, hidden_dim=5, positions=Learned(5))


@pytest.mark.parametrize(
    ("model", "config", "rooms"),
    [
        (Transformer, TransformerConfig(7, 1, 1, **SIZED), [5, 5, 0]),
        (LanguageModel, LanguageModelConfig(7, num_layers=1, **SIZED), [5, 0, -1]),
        (Encoder, EncoderConfig(7, num_layers=1, head=TokenLabels(2), **SIZED), [None, None, 0]),
        (Seq2Seq, Seq2SeqConfig(7, embedding_dim=6, hidden_dim=6, attention_encoder=READER), [None, None, 0]),
        (Seq2Seq, Seq2SeqConfig(7, embedding_dim=6, hidden_dim=6), [None, None, None]),
        (
            Captioner,
            CaptionerConfig(7, decoder=TransformerConfig(0, 0, 1, block=BLOCK, positions=Learned(5))),
            [5, 5, 5],
        ),
        (RecurrentLanguageModel, RecurrentLanguageModelConfig(7), [None, None, None]),
    ],
    ids=["transformer", "language", "encoder", "attention_encoder", "recurrent", "captioner", "recurrent_language"],
)
def test_learned_positions_leave_so_much_room(model, config, rooms):
    """Behind sources of 0, of 5 and of 6 tokens."""
    made = nnx.eval_shape(lambda: model(config, rngs=nnx.Rngs(0)))
    assert [made.room(length) for length in (0, 5, 6)] == rooms
