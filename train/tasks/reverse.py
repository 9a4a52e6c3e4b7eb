"""Strings of letters to their reverse: attention must learn the anti-diagonal."""

from dataclasses import dataclass
from string import ascii_lowercase

from datasets import Dataset
from numpy.random import Generator

from seqattn.checks import check_integer
from train.tasks.task import DrawnTask, generator


@dataclass(frozen=True)
class Reverse(DrawnTask):
    """Random strings of the letters a to z to their reverse, as "abc" to "cba"; all lengths are equally likely.

    No string occurs twice, in one split or in two.
    """

    min_length: int = 1
    """minimum number of letters of a string"""
    max_length: int = 16
    """maximum number of letters of a string"""

    def load(self) -> dict[str, Dataset]:
        """Draws the splits.

        Raises:
            ValueError: the lengths are not 1 <= min_length <= max_length, or there are fewer strings than examples.

        >>> Reverse(max_length=5, train_examples=100, validation_examples=10, test_examples=10).load()["test"][0]
        {'source': 'qnhib', 'target': 'bihnq'}
        """
        check_integer("min_length", self.min_length, 1, self.max_length, maximum_name="max_length")
        strings = sum(len(ascii_lowercase) ** length for length in range(self.min_length, self.max_length + 1))
        if self.examples > strings:
            raise ValueError(
                f"lengths {self.min_length} to {self.max_length} give {strings} strings, "
                f"fewer than {self.examples} examples"
            )
        random = generator(self.seed)
        distinct: dict[str, str] = {}
        while len(distinct) < self.examples:
            text = self._text(random)
            distinct[text] = text[::-1]
        return self.cut(list(distinct.items()))

    def _text(self, random: Generator) -> str:
        length = random.integers(self.min_length, self.max_length, endpoint=True)
        return "".join(ascii_lowercase[letter] for letter in random.integers(len(ascii_lowercase), size=length))
