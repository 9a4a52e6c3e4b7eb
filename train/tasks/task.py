"""The interface of a task: a source of (source text, target text) examples in three splits."""

import abc
import importlib
import inspect
import pkgutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from datasets import Dataset

from seqattn.checks import check_integer
from train.data.texts import write_texts

Pair = tuple[str, str]
"""One example: the source text and the target text."""


class Task(abc.ABC):
    """A source of examples. A subclass is a frozen dataclass of settings and implements `load`.

    The docstrings of a subclass's fields are the help texts of its command-line flags.

    Attributes:
        objective: what a model that writes text learns from the examples. "SequenceToSequence" is the target given the
            source; "Continuation" is the target alone, for tasks with empty sources. For encoders the head decides
            instead.
        scores: further measures of the outputs, beside the loss, exact matches and optional BLEU. "rouge" adds ROUGE-L
            and the perplexity, for outputs of one line.
    """

    objective: ClassVar[Literal["SequenceToSequence", "Continuation"]] = "SequenceToSequence"
    scores: ClassVar[frozenset[Literal["rouge"]]] = frozenset()

    def encoder_objective(self) -> Literal["Masking", "Tagging", "Classification"] | None:
        """Returns the only objective that an encoder can learn from the examples; None if its head decides."""
        return None

    @abc.abstractmethod
    def load(self) -> dict[str, Dataset]:
        """Returns the splits "train", "validation" and "test", none empty, with the columns "source" and "target"."""

    def files(self) -> tuple[Path, ...]:
        """Returns the local files that, with the settings and the code of the task, decide all examples.

        Training caches the examples of large files (see `train.engine.examples`). A task without files is not cached.
        """
        return ()

    def write(self, folder: Path) -> None:
        """Writes the splits of `load` to train.arrow, validation.arrow and test.arrow in a folder that exists.

        A task that reads large files may override this, to hold few of their texts in memory at a time.
        """
        for split, rows in self.load().items():
            write_texts(zip(rows["source"], rows["target"], strict=True), folder / f"{split}.arrow")


def check_held_out(task: Task, given: Mapping[str, str], amount: str) -> None:
    """Checks that a task sets no amount, and no seed, for splits that are not held out of training.

    Args:
        task: a task with the fields `validation_AMOUNT`, `test_AMOUNT` and `seed`.
        given: by "validation" and "test", the flag that gives the split its own text; only splits that have one.
        amount: how the fields of the task call what is held out, such as "share".

    Raises:
        ValueError: an amount is set and its split has its own text, or the seed is set and both have. The message names
            the flag and the rule.
    """
    unused = {f"{split}_{amount}": flag for split, flag in given.items()}
    if len(given) == 2:
        unused["seed"] = " and ".join(given.values())
    for name, flags in unused.items():
        if (value := getattr(task, name)) != (default := getattr(type(task), name)):
            raise ValueError(
                f"--task.{name.replace('_', '-')} ({value}) has no effect with {flags}: it decides which training "
                f"texts are held out, and a split with a file holds out none; set it to its default ({default})"
            )


def every_task() -> tuple[type[Task], ...]:
    """Returns the task classes defined in the files of `train/tasks/`, in the order of the file names."""
    package = importlib.import_module("train.tasks")
    names = sorted(f"train.tasks.{module.name}" for module in pkgutil.iter_modules(package.__path__))
    return tuple(kind for name in names for kind in _defined(name))


def _defined(module: str) -> Iterator[type[Task]]:
    kinds = [kind for kind in vars(importlib.import_module(module)).values() if isinstance(kind, type)]
    for kind in kinds:
        if kind.__module__ == module and issubclass(kind, Task) and not inspect.isabstract(kind):
            yield kind


def splits(train: Sequence[Pair], validation: Sequence[Pair], test: Sequence[Pair]) -> dict[str, Dataset]:
    """Makes the splits that `Task.load` returns from lists of pairs, and brings all texts to NFC.

    Raises:
        ValueError: a split is empty; the message has the counts.

    >>> splits([("ab", "ba")], [("cd", "dc")], [("ef", "fe")])["test"][0]
    {'source': 'ef', 'target': 'fe'}
    """
    check_none_empty(len(train), len(validation), len(test))
    return {"train": _dataset(train), "validation": _dataset(validation), "test": _dataset(test)}


def check_none_empty(train: int, validation: int, test: int) -> None:
    """Raises ValueError if one of these numbers of examples is 0."""
    if not (train and validation and test):
        raise ValueError(
            f"every split needs an example: train has {train}, validation has {validation}, test has {test}"
        )


def normalized(pairs: Iterable[Pair]) -> Iterator[Pair]:
    r"""Yields pairs in NFC, the form that tokenizers write; texts are compared, counted and split in this form only.

    >>> list(normalized([("u\u0308ber", "over")]))
    [('über', 'over')]
    """
    for source, target in pairs:
        yield unicodedata.normalize("NFC", source), unicodedata.normalize("NFC", target)


def _dataset(pairs: Sequence[Pair]) -> Dataset:
    """Makes a dataset with texts in NFC, so that outputs can equal references that were typed in another form."""
    source, target = zip(*normalized(pairs), strict=True)
    return Dataset.from_dict({"source": source, "target": target})


def generator(seed: int) -> np.random.Generator:
    """Returns a random generator for any integer; NumPy itself refuses negative seeds."""
    return np.random.default_rng([int(seed < 0), abs(seed)])


@dataclass(frozen=True)
class DrawnTask(Task):
    """Settings of a task that generates its examples; equal settings give equal examples."""

    train_examples: int = 50_000
    """number of training examples"""
    validation_examples: int = 1_000
    """number of validation examples"""
    test_examples: int = 1_000
    """number of test examples"""
    seed: int = 0
    """any integer; decides which examples are drawn"""

    def __post_init__(self) -> None:
        for name in ("train_examples", "validation_examples", "test_examples"):
            check_integer(name, getattr(self, name), 1, hint=": every split needs an example")

    @property
    def examples(self) -> int:
        """The number of examples of all three splits together."""
        return self.train_examples + self.validation_examples + self.test_examples

    def cut(self, pairs: Sequence[Pair]) -> dict[str, Dataset]:
        """Divides `examples` distinct pairs in random order into splits.

        The test split comes first and the training split last, so more training examples do not change the other two.
        """
        test, validation = self.test_examples, self.test_examples + self.validation_examples
        return splits(train=pairs[validation:], validation=pairs[test:validation], test=pairs[:test])
