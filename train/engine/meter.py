"""Metrics of training: losses, throughput, model FLOPs utilization and waiting times."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from flax import nnx

from seqattn.nn import with_implementation
from train.config import Experiment
from train.data.batches import Batch, filled
from train.objectives import Objective
from train.reports.flops import peak, products
from train.reports.metrics import MetricsFile
from train.reports.progress import Progress
from train.update.step import TrainState


class Meter:
    """Writes rows of training metrics. Numbers leave the devices only when a row is due, so steps do not wait.

    A row has these numbers beside the metrics of the update (`train.update.step.Metrics`):

    - `tokens_per_second`: tokens without padding, over all processes.
    - `mfu`: model FLOPs utilization (Chowdhery 2022), `3 F U / (t P)`. F is the number of floating-point operations of
      all products in the loss per padded token; the factor 3 covers forward and backward pass. U is the number of
      tokens without padding in t seconds. P is the peak rate of the devices in FLOP/s (`train.reports.flops`). F is
      measured on the first batch with every attention score computed, in packed rows also scores between different
      texts. So the MFU of packed rows is not comparable with that of one text per row.
    - `data_wait`: share of the time in which the loop waited for a batch.
    - `padding`: share of the positions in the batches that hold no token.
    - `save_seconds`: seconds since the row before in which training waited for checkpoints: for the copy of the state,
      and for an earlier save still being written.
    - `learning_rate`, and `skipped`: the number of skipped updates so far.

    Args:
        experiment: the resolved experiment; sets `log_every` and the learning-rate schedule.
        objective: counts tokens and computes the loss.
        graph: the model's structure.
        metrics: the file for the rows.
        progress: the display for the rows.
        parts: number of parts into which processes split each batch; this process has one of them.
    """

    def __init__(
        self,
        experiment: Experiment,
        objective: Objective,
        graph: nnx.GraphDef,
        metrics: MetricsFile,
        progress: Progress,
        parts: int = 1,
    ) -> None:
        self._parts = parts
        self._experiment, self._objective, self._graph = experiment, objective, graph
        self._metrics, self._progress = metrics, progress
        self._schedule = experiment.optimizer.schedule.schedule(experiment.steps)
        self._operations: float | None = None
        device = jax.local_devices()[0]
        rate, source = peak(device)
        # Several JAX devices on one CPU, as in tests, share its cores, so they count as one.
        count = jax.process_count() if device.platform == "cpu" else jax.device_count()
        self._peak = rate * count
        self._saved = 0.0
        progress.print(f"mfu is relative to {count} x {source}")
        self.restart()

    def restart(self) -> None:
        """Restarts the clock and the token counts, so that time between two steps does not count as training."""
        self._tokens, self._places, self._waited, self._since = 0, 0, 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A context in which time counts as waiting for a batch."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextmanager
    def saving(self) -> Iterator[None]:
        """A context in which time counts as waiting for a checkpoint; the next row reports the seconds."""
        begun = time.monotonic()
        yield
        self._saved += time.monotonic() - begun

    def add(self, step: int, batch: Batch, state: TrainState, result: dict[str, jax.Array]) -> bool:
        """Counts an update, and writes a row if one is due.

        Args:
            step: the number of the update, from 1.
            batch: this process's part of the batch; the other parts are assumed to have as many tokens.
            state: the state after the update.
            result: the metrics of the update.

        Returns:
            True if a row was written.
        """
        # Extrapolated, since exact counts of other processes would need communication at every step.
        self._tokens += self._objective.count(batch) * self._parts
        self._places += self._objective.count(filled(batch)) * self._parts
        if self._operations is None:
            self._operations = self._of_a_token(state.params, batch)
        if step % self._experiment.log_every and step != self._experiment.steps:
            return False
        values = {name: float(value) for name, value in result.items() if name != "tokens"}  # waits for the devices
        # Read after the wait: the updates since the last row are complete only now.
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = {
            "tokens_per_second": self._tokens / seconds,
            "mfu": 3 * self._operations * self._tokens / seconds / self._peak,
            "data_wait": self._waited / seconds,
            "padding": 1 - self._tokens / max(1, self._places),
        }
        # The schedule counts only updates that were made; its first one is 0.
        skipped = int(state.skipped)
        row = {"step": step, "kind": "train", "learning_rate": float(self._schedule(max(0, step - 1 - skipped)))}
        self._metrics.write({**row, **values, **speed, "save_seconds": self._saved, "skipped": skipped})
        self._saved = 0.0
        self._progress.update(step, loss=values["loss"], **speed, **({"skipped": skipped} if skipped else {}))
        self.restart()
        return True

    def _of_a_token(self, params: Any, batch: Batch) -> float:
        """Floating-point operations of all products in the forward pass, per padded token."""

        def loss(params: Any, batch: Any) -> Any:
            # Other kernels loop over tiles; the number of iterations is not known at trace time, so cannot be counted.
            model = with_implementation(nnx.merge(self._graph, params), "reference")
            return self._objective.loss(model, batch, dropout_key=jax.random.key(0))

        return products(loss, params, batch) / max(1, self._objective.count(filled(batch)))
