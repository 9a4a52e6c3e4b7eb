"""What a task is: a source of (source text, target text) examples in three splits."""

import abc
import importlib
import inspect
import pkgutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset

from seqattn.checks import check_integer

Pair = tuple[str, str]
"""One example: the source text and the target text."""


class Task(abc.ABC):
    """What can produce examples: a subclass is a frozen dataclass of settings.

    Attributes:
        objective: what a model that writes text learns from the examples: "SequenceToSequence", the target given the
            source, or "Continuation", the target alone, where sources are empty. The head of an encoder decides what
            that learns.
        scores: what is measured of written texts beside the loss, exact matches and, if asked for, BLEU: "rouge", which
            is ROUGE-L and the perplexity, for outputs of one line.
    """

    objective: ClassVar[Literal["SequenceToSequence", "Continuation"]] = "SequenceToSequence"
    scores: ClassVar[frozenset[Literal["rouge"]]] = frozenset()

    def encoder_objective(self) -> Literal["Masking", "Tagging", "Classification"] | None:
        """The only objective that the examples serve for an encoder; None where its head alone decides."""
        return None

    @abc.abstractmethod
    def load(self) -> dict[str, Dataset]:
        """The splits "train", "validation" and "test", each with the text columns "source" and "target", none empty."""


def every_task() -> tuple[type[Task], ...]:
    """The tasks that the files of `train/tasks/` define, in the order of the files' names."""
    package = importlib.import_module("train.tasks")
    names = sorted(f"train.tasks.{module.name}" for module in pkgutil.iter_modules(package.__path__))
    return tuple(kind for name in names for kind in _defined(name))


def _defined(module: str) -> Iterator[type[Task]]:
    kinds = [kind for kind in vars(importlib.import_module(module)).values() if isinstance(kind, type)]
    for kind in kinds:
        if kind.__module__ == module and issubclass(kind, Task) and not inspect.isabstract(kind):
            yield kind


def splits(train: Sequence[Pair], validation: Sequence[Pair], test: Sequence[Pair]) -> dict[str, Dataset]:
    """What `Task.load` returns, from lists of pairs.

    Raises ValueError, naming the counts, where a split is empty.

    >>> splits([("ab", "ba")], [("cd", "dc")], [("ef", "fe")])["test"][0]
    {'source': 'ef', 'target': 'fe'}
    """
    if not (train and validation and test):
        raise ValueError(
            "every split needs an example: "
            f"train has {len(train)}, validation has {len(validation)}, test has {len(test)}"
        )
    return {"train": _dataset(train), "validation": _dataset(validation), "test": _dataset(test)}


def normalized(pairs: Iterable[Pair]) -> list[Pair]:
    r"""The pairs in NFC, as tokenizers write; texts are compared, counted and split in this form alone.

    >>> normalized([("u\u0308ber", "over")])
    [('über', 'over')]
    """
    return [(unicodedata.normalize("NFC", source), unicodedata.normalize("NFC", target)) for source, target in pairs]


def _dataset(pairs: Sequence[Pair]) -> Dataset:
    """In NFC: else no output could equal a reference that was typed in another form."""
    source, target = zip(*normalized(pairs), strict=True)
    return Dataset.from_dict({"source": source, "target": target})


def generator(seed: int) -> np.random.Generator:
    """Random numbers for any integer, each with a stream of its own: NumPy itself refuses negative seeds."""
    return np.random.default_rng([int(seed < 0), abs(seed)])


@dataclass(frozen=True)
class DrawnTask(Task):
    """The settings of a task that makes its examples up; the same settings give the same examples."""

    train_examples: int = 50_000
    """examples to train on"""
    validation_examples: int = 1_000
    """examples that watch over the training"""
    test_examples: int = 1_000
    """examples that judge the trained model"""
    seed: int = 0
    """any integer; it decides which examples are drawn"""

    def __post_init__(self) -> None:
        for name in ("train_examples", "validation_examples", "test_examples"):
            check_integer(name, getattr(self, name), 1, hint=": every split needs an example")

    @property
    def examples(self) -> int:
        """How many examples the three splits hold together."""
        return self.train_examples + self.validation_examples + self.test_examples

    def cut(self, pairs: Sequence[Pair]) -> dict[str, Dataset]:
        """The splits from `examples` distinct pairs in random order: the test split first, the training split last.

        More training examples thus leave the other two splits as they were.
        """
        test, validation = self.test_examples, self.test_examples + self.validation_examples
        return splits(train=pairs[validation:], validation=pairs[test:validation], test=pairs[:test])
