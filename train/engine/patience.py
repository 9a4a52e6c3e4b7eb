"""Early stopping: what the evaluations of a run say about going on."""

import dataclasses
import math

from train.reports.metrics import Row


@dataclasses.dataclass(frozen=True)
class Patience:
    """How long a run waits for a lower validation loss, and what its evaluations found so far.

    Attributes:
        history: rows of all evaluations of the validation split, in order.
        limit: evaluations in a row without a new lowest loss that end the run; None for any number.

    >>> losses = [3.0, 1.0, float("nan"), 2.0]
    >>> patience = Patience([{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)], limit=2)
    >>> print(patience.waited, patience.exhausted, patience.best(2))
    2 True [20, 40]
    """

    history: list[Row]
    limit: int | None = None

    @property
    def exhausted(self) -> bool:
        """Whether it is at its end."""
        return self.limit is not None and self.waited >= self.limit

    @property
    def waited(self) -> int:
        """Evaluations since the lowest loss; 0 where no loss was finite."""
        ranked = self._ranked()
        return len(self.history) - 1 - self.history.index(ranked[0]) if ranked else 0

    def best(self, count: int | None = None) -> list[int]:
        """The steps of the lowest finite losses, the best first: `count` of them, or all."""
        return [row["step"] for row in self._ranked()[:count]]

    def loss(self, step: int) -> float | None:
        """What the evaluation after a step found, if there was one."""
        return next((row["loss"] for row in self._ranked() if row["step"] == step), None)

    def _ranked(self) -> list[Row]:
        return sorted((row for row in self.history if math.isfinite(row["loss"])), key=lambda row: row["loss"])
