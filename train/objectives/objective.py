"""What a model is trained for: how texts become examples, what the loss is, and how good the model is on a split."""

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

Arrays = dict[str, jax.Array]
"""A batch (see `train.data.batches.Batch`) on a device."""

Sums = tuple[jax.Array, jax.Array]
"""The losses of all labels of a batch in nats, summed, and how many labels there are."""


@dataclasses.dataclass(frozen=True)
class Scores:
    """How good a model is on a split.

    Attributes:
        numbers: the figures by name; `loss` is the mean cross entropy of a label in nats, without label smoothing.
        outputs: what the model says of the first examples of the split, of as many as there are outputs.
        signatures: what sacrebleu says of how it computed each of its figures.
    """

    numbers: dict[str, float]
    outputs: list[str]
    signatures: dict[str, str] = dataclasses.field(default_factory=dict)


class Objective(abc.ABC):
    """What a run is about. A split has the text columns "source" and "target"; what they mean is said here.

    Args:
        tokenizer: of the texts that are read and written.
        labels: the labels of a model that gives labels, in the order of their ids.

    Attributes:
        name: what configs, tasks and exported models call it.
        hub_task: what the Hugging Face hub calls it.
        sentence: what a model of it does, for a model card.
        command: the command that shows what a run does, as in `python -m train.translate`.
        models: the configs of the models that it is for.
        head: the head of an encoder that it is for; None for models without one.
        given: what a model is given to compute logits under teacher forcing, of "source", "target" and "image".
        searches: outputs are texts that are searched for given a source, by a beam, too, and measured by BLEU.
    """

    name: ClassVar[str]
    hub_task: ClassVar[str]
    sentence: ClassVar[str]
    command: ClassVar[str] = "evaluate"
    models: ClassVar[tuple[type, ...]]
    head: ClassVar[type | None] = None
    given: ClassVar[tuple[str, ...]] = ("source",)
    searches: ClassVar[bool] = False

    def __init__(self, tokenizer: Tokenizer, labels: tuple[str, ...] = ()) -> None:
        self.tokenizer, self.labels = tokenizer, labels

    @classmethod
    def of_run(
        cls, tokenizer: Tokenizer, labels: tuple[str, ...], *, bleu: bool, rouge: bool, beam_size: int
    ) -> "Objective":
        """The objective of a run; how outputs are searched for and measured matters where it `searches`."""
        del bleu, rouge, beam_size
        return cls(tokenizer, labels)

    @classmethod
    def serves(cls, config: Any) -> bool:
        """Whether a model of this config can be trained for it."""
        has_head = cls.head is None or isinstance(getattr(config, "head", None), cls.head)
        return has_head and isinstance(config, cls.models)

    @staticmethod
    def texts(split: Dataset) -> list[str]:
        """The texts of a training split that the tokenizer is to know."""
        return [*split["source"], *split["target"]]

    @staticmethod
    def find_labels(split: Dataset) -> tuple[str, ...]:
        """The labels that a training split has; none where a model writes text."""
        return ()

    @abc.abstractmethod
    def examples(self, split: Dataset) -> list[Example]:
        """The examples of a split as ids."""

    @staticmethod
    @abc.abstractmethod
    def loss(model: Any, batch: Arrays, *, label_smoothing: float = 0.0, dropout_key: jax.Array | None = None) -> Sums:
        """The losses of a batch; without a dropout key nothing drops."""

    @abc.abstractmethod
    def evaluate(self, model: Any, split: Dataset, *, batch_size: int = 64) -> Scores:
        """How good the model is on a split."""

    @abc.abstractmethod
    def draw(self, model: Any, split: Dataset, folder: Path) -> list[Path]:
        """Pictures of what the model does with the first few examples of a split, into a folder."""

    def count(self, batch: Batch) -> int:
        """The tokens of a batch, without padding: of source and target."""
        if "label" in batch:  # packed
            return int(sum((batch[f"{side}_segment"] != 0).sum() for side in ("source", "target")))
        return int(batch["source_length"].sum() + (batch["target_length"] - 1).sum())

    def mean_loss(self, model: Any, split: Dataset, *, batch_size: int = 64) -> float:
        """Mean cross entropy of a label in nats, without dropout and label smoothing.

        Raises:
            ValueError: there is no label, as where a few short texts have no token that was hidden.
        """
        graph, params = nnx.split(model)
        compiled = _compiled(graph, type(self))
        sums = [compiled(params, batch) for _, batch in once(self.examples(split), size=batch_size)]
        labels = float(sum(count for _, count in sums))
        if not labels:
            raise ValueError(f"the split of {len(split)} examples has no label to judge by: give more examples")
        return float(sum(total for total, _ in sums)) / labels


def perplexity(loss: float) -> float:
    """How many equally probable labels are as hard to tell: the exponential of a loss in nats, or infinity.

    >>> perplexity(0.0), perplexity(1e4)
    (1.0, inf)
    """
    try:
        return math.exp(loss)
    except OverflowError:  # of a model that diverged, whose run goes on
        return math.inf


def bits_per_character(loss: float, tokens: int, texts: Sequence[str]) -> float:
    """A loss in nats a token, of so many tokens, as bits of each character of the texts: no tokenizer's unit."""
    return loss * tokens / math.log(2) / max(1, sum(map(len, texts)))


@cache
def _compiled(graph: nnx.GraphDef, objective: type[Objective]) -> Any:
    return jax.jit(lambda params, batch: objective.loss(nnx.merge(graph, params), batch))
