"""Text recognition: reads the string in a picture, character by character."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from flax import nnx

from seqattn import Coordinates, cross_entropy
from seqattn.decoding import generate
from seqattn.models import Captioner, CaptionerConfig
from train.data.batches import Batch, Example, collate, once
from train.data.tokenizer import Tokenizer
from train.devices.layout import TABLES, Layout, fetch
from train.inference.translator import FAILED
from train.objectives.objective import Arrays, Objective, Scores, Sums
from train.reports.overlay import attention_over_image
from train.tasks.rendered_text import render

_DRAWN = 4


class Reading(Objective):
    """The text of the "target" column, given the picture of the recipe in the "source" column."""

    name = "Reading"
    hub_task = "image-to-text"
    sentence = "It reads the text in an image."
    models = (CaptionerConfig,)
    given = ("target", "image")

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """Returns the targets."""
        return split["target"][:]

    def examples(self, split: Dataset) -> list[Example]:
        """Returns pairs of a picture, uint8 `[height, width]`, and target ids between start and end token."""
        start, end = self.tokenizer.start_id, self.tokenizer.end_id
        targets = self.tokenizer.encode_batch(split["target"][:])
        return [(render(recipe), [start, *ids, end]) for recipe, ids in zip(split["source"], targets, strict=True)]

    @staticmethod
    def loss(
        model: Captioner, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Computes the cross-entropy of every target token under teacher forcing; see `Objective.loss`."""
        encode_key, decode_key = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        inputs, labels = batch["target"][:, :-1], batch["target"][:, 1:]
        target_at = Coordinates.from_lengths(batch["target_length"] - 1, inputs.shape[1])
        memory = _encode(model, batch["source"], batch["source_length"], dropout_key=encode_key)
        logits = model.decode(inputs, target_at, memory, dropout_key=decode_key)
        return cross_entropy(logits, labels, weights=target_at.segment != 0, label_smoothing=label_smoothing)

    def evaluate(self, model: Captioner, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Measures `loss`, and of greedy outputs `exact_match` (0 to 1) and `cer`, the character error rate."""
        references = split["target"][:]
        outputs = self._read(model, self.examples(split), batch_size)
        matches = sum(output == reference for output, reference in zip(outputs, references, strict=True))
        numbers = {
            "loss": self.mean_loss(model, split, batch_size=batch_size),
            "exact_match": matches / len(references),
            "cer": character_error_rate(outputs, references),
        }
        return Scores(numbers, outputs)

    def draw(self, model: Captioner, split: Dataset, folder: Path) -> list[Path]:
        """Draws, for the first four pictures, the attention over the picture for each character of the output."""
        rows = self.examples(split.select(range(min(_DRAWN, len(split)))))
        paths: list[Path] = []
        for number, ((image, _), output) in enumerate(zip(rows, self._read(model, rows, _DRAWN), strict=True), 1):
            if output != FAILED:
                paths += _draw(model, self.tokenizer, np.asarray(image), output, folder / str(number))
        return paths

    def count(self, batch: Batch) -> int:
        """Returns the number of target tokens."""
        return int((batch["target_length"] - 1).sum())

    def _read(self, model: Captioner, rows: Sequence[Example], batch_size: int) -> list[str]:
        """Returns the greedy output for the picture of each example, in order."""
        tokenizer = self.tokenizer
        graph, params = nnx.split(model)
        layout = Layout.of(params)
        read = _compiled(graph, tokenizer.start_id, tokenizer.end_id, tokenizer.pad_id, layout)
        # No letter is narrower than two pixels, and one token is needed for the end.
        room = np.asarray(rows[0][0]).shape[1] // 2 + 1
        limit = model.room(len(rows[0][0]))
        room = room if limit is None else min(room, limit)
        outputs: dict[int, str] = {}
        for chosen, batch in once(rows, size=batch_size, multiple=layout.parts):
            pictures = layout.split((batch["source"], batch["source_length"]))
            found = fetch(read(params, *pictures, max_length=room))
            for index, tokens, length, failed in zip(chosen, *found, strict=False):
                outputs[index] = FAILED if failed else tokenizer.decode(tokens[:length].tolist())
        return [outputs[index] for index in range(len(rows))]


def character_error_rate(outputs: Sequence[str], references: Sequence[str]) -> float:
    """Computes the number of edits (insert, delete, replace) per character of the references; 0 is best.

    >>> character_error_rate(["kitten", "abc"], ["sitting", "abc"])
    0.3
    """
    edits = sum(_edits(output, reference) for output, reference in zip(outputs, references, strict=True))
    return edits / max(1, sum(map(len, references)))


def _edits(first: str, second: str) -> int:
    """Computes the edit distance of two texts (Levenshtein 1966)."""
    # One row of the table: row[column] is the distance from the first `count` characters to `second[:column]`.
    row = list(range(len(second) + 1))
    for count, letter in enumerate(first, 1):
        diagonal, row[0] = row[0], count
        for column, other in enumerate(second, 1):
            diagonal, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, diagonal + (letter != other))
    return row[-1]


def _encode(model: Captioner, source: jax.Array | np.ndarray, length: jax.Array | np.ndarray, **options: Any) -> Any:
    """Encodes pictures, uint8 `[B, height, width]`; pictures of length 0 only fill the batch and are masked."""
    rows, columns = model.grid(*source.shape[1:3])
    places = jnp.where(length > 0, rows * columns, 0)
    # Mean 0 and variance 1 make pale pictures as strong as others, and zero padding as bright as the mean. The epsilon
    # keeps uniform pictures finite.
    images = jax.nn.standardize(jnp.asarray(source, jnp.float32), axis=(1, 2), epsilon=1.0)
    images = images.astype(model.image.output.kernel[...].dtype)
    return model.encode(images, Coordinates.from_lengths(places, rows * columns), **options)


@cache
def _compiled(graph: nnx.GraphDef, start_id: int, end_id: int, pad_id: int, layout: Layout) -> Any:
    """Returns one compiled function for all models of a structure.

    It returns tokens `[B, L]`, their number `[B]`, and whether decoding failed `[B]`.
    """

    def read(params: nnx.State, source: jax.Array, length: jax.Array, *, max_length: int) -> tuple[jax.Array, ...]:
        model = layout.merged(graph, params, TABLES)
        state = model.start(_encode(model, source, length), max_length)
        first = jnp.full(len(source), start_id, jnp.int32)
        found = generate(model.step, state, first, max_length=max_length, end_token=end_id, pad_token=pad_id)
        return found.tokens, found.length, found.failed

    return jax.jit(read, static_argnames="max_length")


def _draw(model: Captioner, tokenizer: Tokenizer, image: np.ndarray, output: str, path_stem: Path) -> list[Path]:
    """Draws the mean over heads; nothing if the model has no attention."""
    target = [tokenizer.start_id, *tokenizer.encode(output), tokenizer.end_id]
    room = model.room(len(image))
    batch = collate([(image, target[: None if room is None else room + 1])])
    inputs = jnp.asarray(batch["target"][:, :-1])
    heads = fetch(_alignment(model, batch["source"], batch["source_length"], inputs))[0]
    if not len(heads):
        return []
    weights = heads.astype(np.float64).mean(axis=0).reshape(-1, *model.grid(*image.shape[:2]))
    path_stem.parent.mkdir(parents=True, exist_ok=True)
    labels = tokenizer.tokens(target[1 : len(weights) + 1])
    return [*attention_over_image(image, weights, labels, path_stem, title=f"read: {output}")]


# One program for each shape. Run one by one, the operations of a small model would be compiled for minutes.
@nnx.jit
def _alignment(
    model: Captioner, source: jax.Array | np.ndarray, length: jax.Array | np.ndarray, inputs: jax.Array
) -> jax.Array:
    """Returns the attention `[1, N, T, S]` of each token to the picture."""
    at = Coordinates.from_lengths([inputs.shape[1]], inputs.shape[1])
    return model.alignment(inputs, at, _encode(model, source, length))
