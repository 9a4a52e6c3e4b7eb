"""Addition, read and written digit by digit: a classic demonstration of sequence-to-sequence learning.

See Zaremba and Sutskever, "Learning to execute" (2014), and the `addition_rnn` example of Keras.
"""

from dataclasses import dataclass
from math import isqrt

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.task import DrawnTask, Pair, generator


@dataclass(frozen=True)
class Addition(DrawnTask):
    """Sums of two whole numbers: "512+89" to "601".

    Each pair of numbers occurs in one example, in one order. A sum in the test split therefore never occurs in
    training, in either order.
    """

    digits: int = 3
    """maximum number of digits of an operand, 1 to 9"""

    def load(self) -> dict[str, Dataset]:
        """Draws the splits.

        Raises:
            ValueError: `digits` is out of range, or gives fewer different sums than examples.

        >>> Addition(digits=2, train_examples=100, validation_examples=10, test_examples=10).load()["test"][0]
        {'source': '51+47', 'target': '98'}
        """
        check_integer("digits", self.digits, 1, 9)
        operands = 10**self.digits
        sums = operands * (operands + 1) // 2  # unordered pairs, so that no pair occurs in both orders
        if self.examples > sums:
            raise ValueError(f"digits ({self.digits}) gives {sums} different sums, fewer than {self.examples} examples")
        random = generator(self.seed)
        numbers = random.choice(sums, self.examples, replace=False).tolist()
        swaps = random.integers(2, size=self.examples).tolist()
        return self.cut([_example(number, swap) for number, swap in zip(numbers, swaps, strict=True)])


def _example(number: int, swap: bool) -> Pair:
    first, second = _operands(number)
    return (f"{second}+{first}" if swap else f"{first}+{second}"), str(first + second)


def _operands(number: int) -> tuple[int, int]:
    """Returns pair `number` of the sequence (0, 0), (1, 0), (1, 1), (2, 0), ...: distinct numbers, distinct pairs."""
    larger = (isqrt(8 * number + 1) - 1) // 2
    return larger, number - larger * (larger + 1) // 2
