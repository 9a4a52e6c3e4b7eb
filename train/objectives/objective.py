"""The interface of an objective: how texts become examples, the loss, and the evaluation on a split."""

import abc
import dataclasses
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import jax
from datasets import Dataset
from flax import nnx

from train.data.batches import Batch, Example, once
from train.data.tokenizer import Tokenizer
from train.devices.layout import Layout

Arrays = dict[str, jax.Array]
"""A batch (see `train.data.batches.Batch`) on a device."""

Sums = tuple[jax.Array, jax.Array]
"""The sum of the losses of all labels of a batch in nats, and the number of labels; both are scalars."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of a model on a split.

    Attributes:
        numbers: the measures by name; `loss` is the mean cross-entropy per label in nats, without label smoothing.
        outputs: the model's outputs for the first examples of the split, perhaps for all.
        signatures: sacrebleu's description of how it computed each of its measures, by name.
    """

    numbers: dict[str, float]
    outputs: list[str]
    signatures: dict[str, str] = dataclasses.field(default_factory=dict)


class Objective(abc.ABC):
    """A training objective. It defines the meaning of the text columns "source" and "target" of a split.

    Args:
        tokenizer: the tokenizer of all texts that the model reads or writes.
        labels: for models that give labels, the labels in the order of their ids.

    Attributes:
        name: the name of the objective in configs, tasks and exported models.
        hub_task: the name of this kind of task on the Hugging Face hub.
        sentence: one sentence for the model card about what such a model does.
        command: the command that applies a trained model, as in `python -m train.translate`.
        models: the classes of the configs of its models.
        head: the class of the encoder's head; None for models without a head.
        given: the inputs of a model under teacher forcing, among "source", "target" and "image".
        searches: if True, outputs are texts generated from a source text, by beam search if asked for, and BLEU can
            measure them.
        by_coordinates: if True, `loss` reads the coordinates of a packed batch, so that tokens may be in any order.
    """

    name: ClassVar[str]
    hub_task: ClassVar[str]
    sentence: ClassVar[str]
    command: ClassVar[str] = "evaluate"
    models: ClassVar[tuple[type, ...]]
    head: ClassVar[type | None] = None
    given: ClassVar[tuple[str, ...]] = ("source",)
    searches: ClassVar[bool] = False
    by_coordinates: ClassVar[bool] = False

    def __init__(self, tokenizer: Tokenizer, labels: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.labels = tokenizer, labels

    @classmethod
    def of_run(
        cls, tokenizer: Tokenizer, labels: tuple[str, ...], *, bleu: bool, rouge: bool, beam_size: int
    ) -> "Objective":
        """Makes the objective of a run. The keyword arguments have an effect only if the objective `searches`."""
        del bleu, rouge, beam_size
        return cls(tokenizer, labels)

    @classmethod
    def serves(cls, config: Any) -> bool:
        """Whether a model of this config can be trained for this objective."""
        has_head = cls.head is None or isinstance(getattr(config, "head", None), cls.head)
        return has_head and isinstance(config, cls.models)

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """Returns the texts of a training split that the tokenizer is trained on."""
        return [*split["source"][:], *split["target"][:]]

    @staticmethod
    def find_labels(split: Dataset) -> tuple[str, ...]:
        """Returns the labels of a training split in the order of their ids; none if the model generates text."""
        return ()

    @abc.abstractmethod
    def examples(self, split: Dataset) -> list[Example]:
        """Returns the examples of a split as pairs of source and target ids, in order."""

    @staticmethod
    @abc.abstractmethod
    def loss(model: Any, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None) -> Sums:
        """Computes the sum of the losses of a batch.

        Args:
            model: the model.
            batch: the batch; see `train.data.batches.Batch`.
            label_smoothing: the probability that is spread evenly over all labels, in [0, 1).
            dropout_key: a random key; without one there is no dropout.

        Returns:
            The sum of the losses in nats and the number of labels.
        """

    @abc.abstractmethod
    def evaluate(self, model: Any, split: Dataset, *, batch_size: int = 64) -> Scores:
        """Evaluates the model on a split, with batches of at most `batch_size` rows."""

    @abc.abstractmethod
    def draw(self, model: Any, split: Dataset, folder: Path) -> list[Path]:
        """Draws the attention of the model for the first examples of a split, and returns the paths of the files."""

    def count(self, batch: Batch) -> int:
        """Returns the number of source and target tokens of a batch, without padding and start tokens."""
        if "label" in batch:  # packed
            return int(sum((batch[f"{side}_segment"] != 0).sum() for side in ("source", "target")))
        return int(batch["source_length"].sum() + (batch["target_length"] - 1).sum())

    def mean_loss(self, model: Any, split: Dataset, *, batch_size: int = 64) -> float:
        """Computes the mean cross-entropy per label in nats, without dropout and label smoothing.

        Raises:
            ValueError: the split has no label, as when no token of a few short texts was hidden.
        """
        graph, params = nnx.split(model)
        layout = Layout.of(params)
        compiled = _compiled(graph, type(self), layout)
        batches = once(self.examples(split), size=batch_size, multiple=layout.parts)
        sums = [layout.waited(compiled(params, layout.split(batch))) for _, batch in batches]
        labels = float(sum(count for _, count in sums))
        if not labels:
            raise ValueError(f"the split of {len(split)} examples has no label to measure: give more examples")
        return float(sum(total for total, _ in sums)) / labels


def perplexity(loss: float) -> float:
    """Returns the exponential of a loss in nats, or infinity if it overflows.

    The perplexity is the number of equally probable labels that would be as hard to predict.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:  # the model diverged; its run continues
        return math.inf


def bits_per_character(loss: float, tokens: int, texts: Sequence[str]) -> float:
    """Converts a loss in nats per token to bits per character, which can be compared between tokenizers.

    Args:
        loss: mean loss per token in nats.
        tokens: number of tokens.
        texts: the texts of these tokens.
    """
    return loss * tokens / math.log(2) / max(1, sum(map(len, texts)))


@cache
def _compiled(graph: nnx.GraphDef, objective: type[Objective], layout: Layout) -> Any:
    return jax.jit(lambda params, batch: objective.loss(layout.merged(graph, params), batch))
