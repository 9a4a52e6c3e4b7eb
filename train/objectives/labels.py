"""Tagging and classification: a label for each token, or for each text."""

from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from datasets import Dataset
from flax import nnx
from jaxtyping import Array

from seqattn import Coordinates, cross_entropy
from seqattn.models import Encoder, EncoderConfig, TextLabels, TokenLabels
from train.data.batches import Batch, Example, once
from train.devices.layout import Layout, fetch
from train.objectives.objective import Arrays, Objective, Scores, Sums
from train.objectives.pictures import draw_heads


class Tagging(Objective):
    """A label for each token: character n of the target text is the label of token n of the source."""

    name = "Tagging"
    hub_task = "token-classification"
    sentence = "It gives a label to each token of a text."
    models = (EncoderConfig,)
    head: ClassVar[type] = TokenLabels

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """Returns the sources; targets are labels and need no tokens."""
        return split["source"][:]

    @staticmethod
    def find_labels(split: Dataset) -> tuple[str, ...]:
        """Returns the different characters of the targets, sorted."""
        return tuple(sorted(set("".join(split["target"][:]))))

    def examples(self, split: Dataset) -> list[Example]:
        """Returns pairs of source ids and the label id of each source token.

        Raises:
            ValueError: a text has different numbers of tokens and labels, or a label that the training split lacks.
        """
        number = {label: index for index, label in enumerate(self.labels)}
        rows: list[Example] = []
        for ids, labels in zip(self.tokenizer.encode_batch(split["source"][:]), split["target"][:], strict=True):
            # Labels and tokens are aligned by position, which is right only if each character is one token.
            if len(ids) != len(labels):
                raise ValueError(
                    f"{len(labels)} labels for {len(ids)} tokens: use the tokenizer of characters, one token per label"
                )
            if unknown := sorted(set(labels) - number.keys()):
                raise ValueError(f"the labels {unknown} are not in the training split")
            rows.append((ids, [number[label] for label in labels]))
        return rows

    @staticmethod
    def loss(
        model: Encoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Computes the cross-entropy of the label of every token; see `Objective.loss`."""
        at = _at(batch)
        logits = model(batch["source"], at, dropout_key=dropout_key)
        # Sources and labels of a batch may be padded to different lengths. The weights below ignore the padding.
        length = logits.shape[1]
        labels = jnp.pad(batch["target"], ((0, 0), (0, max(0, length - batch["target"].shape[1]))))[:, :length]
        return cross_entropy(logits, labels, weights=at.segment != 0, label_smoothing=label_smoothing)

    def evaluate(self, model: Encoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Measures `loss` and `accuracy`, the fraction of tokens with the right label; outputs are label strings."""
        rows = self.examples(split)
        best = best_labels(model, rows, batch_size)
        pairs = [(np.array(labels), found[: len(labels)]) for (_, labels), found in zip(rows, best, strict=True)]
        right = sum(int((labels == found).sum()) for labels, found in pairs)
        total = sum(len(labels) for labels, _ in pairs)
        outputs = ["".join(self.labels[label] for label in found) for _, found in pairs]
        numbers = {"loss": self.mean_loss(model, split, batch_size=batch_size), "accuracy": right / max(1, total)}
        return Scores(numbers, outputs)

    def draw(self, model: Encoder, split: Dataset, folder: Path) -> list[Path]:
        """Draws the self-attention of the first texts, one picture for each text with all heads."""
        return draw_heads(model, self.tokenizer, split["source"], folder)

    def count(self, batch: Batch) -> int:
        """Returns the number of source tokens."""
        return int(batch["source_length"].sum())


class Classification(Tagging):
    """A label for each text: the target text is the label."""

    name = "Classification"
    hub_task = "text-classification"
    sentence = "It gives a label to a text."
    head = TextLabels

    @staticmethod
    def find_labels(split: Dataset) -> tuple[str, ...]:
        """Returns the different targets, sorted."""
        return tuple(sorted(set(split["target"][:])))

    def examples(self, split: Dataset) -> list[Example]:
        """Returns pairs of source ids and a list with the label id of the text.

        Raises:
            ValueError: a text has a label that the training split lacks.
        """
        number = {label: index for index, label in enumerate(self.labels)}
        if unknown := sorted(set(split["target"][:]) - number.keys()):
            raise ValueError(f"the labels {unknown} are not in the training split")
        sources = self.tokenizer.inputs(split["source"][:])
        return [(ids, [number[label]]) for ids, label in zip(sources, split["target"][:], strict=True)]

    @staticmethod
    def loss(
        model: Encoder, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None
    ) -> Sums:
        """Computes the cross-entropy of the label of every text; see `Objective.loss`."""
        logits = model(batch["source"], _at(batch), dropout_key=dropout_key)
        # Rows of length 0 only fill the batch.
        weights = batch["source_length"] > 0
        return cross_entropy(logits, batch["target"][:, 0], weights=weights, label_smoothing=label_smoothing)

    def evaluate(self, model: Encoder, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Measures `loss` and `accuracy`, the fraction of texts with the right label; outputs are labels."""
        best = [int(found) for found in best_labels(model, self.examples(split), batch_size)]
        outputs = [self.labels[label] for label in best]
        right = sum(output == label for output, label in zip(outputs, split["target"][:], strict=True))
        numbers = {"loss": self.mean_loss(model, split, batch_size=batch_size), "accuracy": right / len(outputs)}
        return Scores(numbers, outputs)


def best_labels(model: Encoder, rows: list[Example], batch_size: int) -> list[np.ndarray]:
    """Finds the most probable label id of each token, or of each text.

    Args:
        model: an encoder with a head for labels.
        rows: the examples.
        batch_size: maximum number of texts per batch.

    Returns:
        An array for each example, in order: `[T]` with T of its batch, padding included, or a scalar for text labels.
    """
    graph, params = nnx.split(model)
    layout = Layout.of(params)
    find = _compiled(graph, layout)
    found: dict[int, np.ndarray] = {}
    for chosen, batch in once(rows, size=batch_size, multiple=layout.parts):
        best = fetch(find(params, layout.split(batch)))
        found.update({index: best[row] for row, index in enumerate(chosen)})
    return [found[index] for index in range(len(rows))]


@cache
def _compiled(graph: nnx.GraphDef, layout: Layout) -> Any:
    """Returns one compiled function for all models of a structure, so that the evaluations of a run share it."""

    def best(params: nnx.State, batch: Arrays) -> Array:
        model = layout.merged(graph, params)
        return jnp.argmax(model(batch["source"], _at(batch)), axis=-1)

    return jax.jit(best)


def _at(batch: Arrays) -> Coordinates:
    return Coordinates.from_lengths(batch["source_length"], batch["source"].shape[1])
