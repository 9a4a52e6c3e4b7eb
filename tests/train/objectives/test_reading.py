"""Reading: pictures in batches, a loss that only real characters enter, outputs, error rates and pictures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from seqattn.models import Captioner, CaptionerConfig, Convolutional, Learned, Seq2SeqConfig, TransformerConfig
from seqattn.nn import BlockConfig
from train.data.batches import Batches, collate, once, stream
from train.data.tokenizer import Characters, Tokenizer
from train.objectives.reading import Reading, character_error_rate
from train.tasks.rendered_text import RenderedText, render

TASK = RenderedText(
    train_examples=13, validation_examples=1, test_examples=5, min_length=1, max_length=3, height=12, width=16
)
SPLITS = TASK.load()
OBJECTIVE = Reading(Tokenizer.train(Characters(), [TASK.alphabet]))
DECODERS = {
    "recurrent": Seq2SeqConfig(0, embedding_dim=8, hidden_dim=6),
    "transformer": TransformerConfig(
        0,
        num_encoder_layers=0,
        num_decoder_layers=1,
        block=BlockConfig(model_dim=8, hidden_dim=5, num_heads=2),
        positions=Learned(4),
    ),
}
each_decoder = pytest.mark.parametrize("name", ["recurrent", pytest.param("transformer", marks=pytest.mark.slow)])


@functools.cache
def _model(name: str) -> Captioner:
    config = CaptionerConfig(OBJECTIVE.tokenizer.vocab_size, Convolutional((3, 5)), DECODERS[name])
    return Captioner(config, rngs=nnx.Rngs(0))


_loss = jax.jit(lambda model, batch: Reading.loss(model, batch))


@pytest.mark.parametrize("name", ["recurrent", "transformer"])
def test_a_reader_computes_in_the_dtype_of_its_parameters(name):
    model = _model(name)
    graph, params = nnx.split(model)
    half = nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16), params))
    batch = jax.tree.map(jnp.asarray, collate(OBJECTIVE.examples(SPLITS["test"])))
    seen = []

    class Seen(type(half.decoder)):
        def encode_vectors(self, vectors, *given, **options):
            seen.append(vectors.dtype)
            return super().encode_vectors(vectors, *given, **options)

    half.decoder.__class__ = Seen
    total, count = Reading.loss(half, batch)
    assert seen == [jnp.bfloat16]
    expected, _ = Reading.loss(model, batch)
    np.testing.assert_allclose(total / count, expected / count, rtol=0.03)


def test_examples_are_pictures_and_the_text_between_start_and_end():
    split = SPLITS["test"]
    for (image, target), row in zip(OBJECTIVE.examples(split), split, strict=True):
        np.testing.assert_array_equal(image, render(row["source"]))
        assert (target[0], target[-1]) == (OBJECTIVE.tokenizer.start_id, OBJECTIVE.tokenizer.end_id)
        assert OBJECTIVE.tokenizer.decode(target[1:-1]) == row["target"]
    assert Reading.texts(split) == split["target"][:]


def test_batches_hold_pictures_as_they_are():
    rows = OBJECTIVE.examples(SPLITS["train"])
    batch = stream(Batches(tokens=51, max_length=16, buckets=1), rows, seed=0)[0]
    assert (batch["source"].shape, batch["source"].dtype) == ((3, 12, 16), np.uint8)
    for source, length, target in zip(batch["source"], batch["source_length"], batch["target"], strict=True):
        text = OBJECTIVE.tokenizer.decode([token for token in target.tolist() if token > 3])
        (expected,) = (image for image, ids in rows if OBJECTIVE.tokenizer.decode(ids[1:-1]) == text)
        np.testing.assert_array_equal(source, expected)
        assert length == 12
    (_, last) = list(once(rows[:5], size=3))[-1]
    assert last["source_length"].tolist() == [12, 12, 0]
    assert not np.any(last["source"][2])
    assert OBJECTIVE.count(batch) == (batch["target_length"] - 1).sum()


def test_rows_that_fill_a_batch_have_no_loss():
    rows = OBJECTIVE.examples(SPLITS["test"])
    target = max(len(ids) for _, ids in rows)
    total, count = _loss(_model("recurrent"), collate(rows, (5, 12, target)))
    filled, same = _loss(_model("recurrent"), collate(rows, (7, 12, target)))
    assert count == same == sum(len(ids) - 1 for _, ids in rows)
    np.testing.assert_allclose(filled, total, rtol=1e-5)


def test_the_loss_depends_on_the_picture_and_not_on_its_contrast():
    rows = OBJECTIVE.examples(SPLITS["test"])
    batch = collate(rows)
    total, _ = _loss(_model("recurrent"), batch)
    pale = batch | {"source": np.uint8(np.rint(64 + batch["source"] / 2.0))}
    np.testing.assert_allclose(_loss(_model("recurrent"), pale)[0], total, rtol=5e-3)
    other = batch | {"source": np.roll(batch["source"], 1, axis=0)}
    assert abs(float(_loss(_model("recurrent"), other)[0] - total)) > 1e-3


@each_decoder
def test_scores(name):
    model = _model(name)
    scores = OBJECTIVE.evaluate(model, SPLITS["test"], batch_size=3)
    assert set(scores.numbers) == {"loss", "exact_match", "cer"}
    assert len(scores.outputs) == 5
    assert scores.numbers["cer"] == character_error_rate(scores.outputs, SPLITS["test"]["target"][:])
    assert scores.numbers["loss"] == pytest.approx(OBJECTIVE.mean_loss(model, SPLITS["test"]))


def test_pictures(tmp_path):
    paths = OBJECTIVE.draw(_model("recurrent"), SPLITS["test"].select([0]), tmp_path / "attention")
    assert [path.name for path in paths] == ["1.png", "1.svg"]
    assert all(path.stat().st_size > 1000 for path in paths)


def test_an_output_is_what_the_model_finds_most_probable():
    """A model whose logits come from biases alone: it always says the same, and stops at the end token."""
    model = nnx.clone(_model("recurrent"))
    tokenizer, output = OBJECTIVE.tokenizer, model.decoder.output
    output.kernel[...] = jnp.zeros_like(output.kernel[...])
    output.bias[...] = jax.nn.one_hot(tokenizer.end_id, tokenizer.vocab_size)
    assert OBJECTIVE.evaluate(model, SPLITS["test"]).outputs == [""] * 5
    output.bias[...] = jax.nn.one_hot(tokenizer.encode("k")[0], tokenizer.vocab_size)
    assert OBJECTIVE.evaluate(model, SPLITS["test"]).outputs == ["k" * 9] * 5


@pytest.mark.parametrize(
    ("output", "reference", "edits"),
    [("", "", 0), ("abc", "", 3), ("", "abc", 3), ("abc", "abc", 0), ("abc", "axc", 1), ("bcd", "abc", 2)],
)
def test_character_error_rate(output, reference, edits):
    assert character_error_rate([output, "ab"], [reference, "ab"]) == edits / (len(reference) + 2)
