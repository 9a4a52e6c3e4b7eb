"""Optional trackers of metrics: TensorBoard and Weights & Biases.

A failing tracker never stops a run: it is logged once, and training continues without it. `metrics.jsonl` has all rows.
"""

import importlib
import logging
import math
import secrets
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from train.checkpoints.durable import replace

log = logging.getLogger(__name__)

Write = Callable[[dict[str, float], int], None]
"""A function of numbers by name, and of their step."""


class Trackers:
    """A context manager that passes rows of metrics to TensorBoard and Weights & Biases.

    Args:
        folder: the run folder; TensorBoard reads `folder/tensorboard`.
        tensorboard: if True, writes for TensorBoard with the package tensorboardX.
        wandb: the Weights & Biases project to log to, with the package wandb; None for none.
        config: the settings of the run, for Weights & Biases.
        first: the step of the next row. TensorBoard discards rows from this step on that a killed run wrote.
    """

    def __init__(
        self,
        folder: Path,
        *,
        tensorboard: bool = False,
        wandb: str | None = None,
        config: Mapping[str, Any] | None = None,
        first: int = 0,
    ) -> None:
        self._writes: dict[str, Write] = {}
        self._closes: dict[str, Callable[[], Any]] = {}
        if tensorboard:
            self._begin("TensorBoard", lambda: _tensorboard(folder, first))
        if wandb is not None:
            self._begin("Weights & Biases", lambda: _wandb(folder, wandb, dict(config or {})))

    def write(self, row: Mapping[str, Any]) -> None:
        """Passes on the finite numbers of a row, with names such as `train/loss` from its kind."""
        numbers = {
            f"{row['kind']}/{name}": float(value)
            for name, value in row.items()
            if name != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, write in list(self._writes.items()):
            try:
                write(numbers, int(row["step"]))
            except Exception as error:
                self._give_up(name, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        for name, close in list(self._closes.items()):
            try:
                close()
            except Exception as error:
                self._give_up(name, error)

    def _begin(self, name: str, begin: Callable[[], tuple[Write, Callable[[], Any]]]) -> None:
        try:
            self._writes[name], self._closes[name] = begin()
        except Exception as error:
            self._give_up(name, error)

    def _give_up(self, name: str, error: Exception) -> None:
        log.warning("%s gets no more rows (%s: %s); metrics.jsonl has them all", name, type(error).__name__, error)
        self._writes.pop(name, None)
        self._closes.pop(name, None)


def _tensorboard(folder: Path, first: int) -> tuple[Write, Callable[[], Any]]:
    writer = importlib.import_module("tensorboardX").SummaryWriter(str(folder / "tensorboard"), purge_step=first)

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return write, writer.close


def _wandb(folder: Path, project: str, config: dict[str, Any]) -> tuple[Write, Callable[[], Any]]:
    wandb = importlib.import_module("wandb")
    # A resumed run continues the same tracked run. A folder of the same name elsewhere is another run.
    known = folder / "wandb-id"
    if not known.exists():
        replace(known, secrets.token_hex(8).encode())
    # Training must not wait long for a server that is unreachable.
    settings = wandb.Settings(init_timeout=30)
    run = wandb.init(
        project=project,
        name=folder.name,
        id=known.read_text(),
        resume="allow",
        dir=str(folder),
        config=config,
        settings=settings,
    )

    def write(numbers: dict[str, float], step: int) -> None:
        run.log(numbers, step=step)

    return write, run.finish
