"""Early stopping by the validation loss."""

import dataclasses
import math

from train.reports.metrics import Row


@dataclasses.dataclass(frozen=True)
class Patience:
    """The evaluations of a run so far, and how many of them it waits for a lower validation loss.

    Attributes:
        history: the rows of all evaluations of the validation split, oldest first. Each has `step` and `loss` (nats).
        limit: number of consecutive evaluations without a new lowest loss that ends the run; None for no limit.

    >>> losses = [3.0, 1.0, float("nan"), 2.0]
    >>> patience = Patience([{"step": 10 * (i + 1), "loss": loss} for i, loss in enumerate(losses)], limit=2)
    >>> print(patience.waited, patience.exhausted, patience.best(2))
    2 True [20, 40]
    """

    history: list[Row]
    limit: int | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the run should stop."""
        return self.limit is not None and self.waited >= self.limit

    @property
    def waited(self) -> int:
        """Number of evaluations since the lowest loss; 0 if no loss was finite."""
        ranked = self._ranked()
        return len(self.history) - 1 - self.history.index(ranked[0]) if ranked else 0

    def best(self, count: int | None = None) -> list[int]:
        """The steps of the `count` lowest finite losses, best first; all of them by default."""
        return [row["step"] for row in self._ranked()[:count]]

    def loss(self, step: int) -> float | None:
        """The validation loss after a step, in nats; None without an evaluation there or if it was not finite."""
        return next((row["loss"] for row in self._ranked() if row["step"] == step), None)

    def _ranked(self) -> list[Row]:
        # NaN compares false with everything, so it would end up anywhere in the order. The sort is stable: among equal
        # losses the earliest is the best, and an evaluation that only ties does not reset the wait.
        return sorted((row for row in self.history if math.isfinite(row["loss"])), key=lambda row: row["loss"])
