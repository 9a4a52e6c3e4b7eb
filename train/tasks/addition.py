"""Addition, read and written digit by digit: the classic demonstration of sequence to sequence learning.

Zaremba and Sutskever, "Learning to execute" (2014), and the `addition_rnn` example of Keras.
"""

from dataclasses import dataclass
from math import isqrt

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.task import DrawnTask, Pair, generator


@dataclass(frozen=True)
class Addition(DrawnTask):
    """Sums of two whole numbers: "512+89" to "601".

    Two numbers are asked for once, in one order: a sum of the test split occurs in training in neither order.
    """

    digits: int = 3
    """digits of the largest operand, 1 to 9"""

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError where there are fewer sums than examples.

        >>> Addition(digits=2, train_examples=100, validation_examples=10, test_examples=10).load()["test"][0]
        {'source': '51+47', 'target': '98'}
        """
        check_integer("digits", self.digits, 1, 9)
        operands = 10**self.digits
        sums = operands * (operands + 1) // 2
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
    """The unordered pairs (0, 0), (1, 0), (1, 1), (2, 0), ... by their number: drawing numbers draws distinct pairs."""
    larger = (isqrt(8 * number + 1) - 1) // 2
    return larger, number - larger * (larger + 1) // 2
