"""What training says of itself: rows of metrics, and the shares of time that go into products and into waiting."""

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
    """Rows of training metrics; numbers leave the devices only when a row is due, so that steps do not wait.

    `mfu`, model FLOPs utilisation, is 3 F U / (t P): F floating-point operations of all products that the loss of a
    padded token makes, three times for forward and backward, U tokens without padding in t seconds, and P, what the
    devices could do (`train.reports.flops`). F is that of the first batch, with every score of attention computed, in
    packed rows those between different texts too: their MFU is not to be compared with that of one text a row.

    `data_wait` is the share of the time in which the loop waited for a batch, and `padding` that of the places in the
    batches which hold none. `save_seconds` are those in which training waited for checkpoints since the row before: for
    the copy of the state, and for a save that was still being written.

    Args:
        experiment: says when a row is due, and the learning rate.
        objective: counts tokens, and has the loss.
        graph: the model's structure.
        metrics: where rows go.
        progress: what is shown.
        parts: of how many parts of a batch this process has one.
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
        # The devices of a CPU, of which tests and trials have several, share its cores.
        count = jax.process_count() if device.platform == "cpu" else jax.device_count()
        self._peak = rate * count
        self._saved = 0.0
        progress.print(f"mfu is of {count} x {source}")
        self.restart()

    def restart(self) -> None:
        """Begins to count tokens anew: what happened between two steps is not training time."""
        self._tokens, self._places, self._waited, self._since = 0, 0, 0.0, time.monotonic()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What happens within is waiting for a batch."""
        begun = time.monotonic()
        yield
        self._waited += time.monotonic() - begun

    @contextmanager
    def saving(self) -> Iterator[None]:
        """What happens within is waiting for a checkpoint, between two steps; the next row has its seconds."""
        begun = time.monotonic()
        yield
        self._saved += time.monotonic() - begun

    def add(self, step: int, batch: Batch, state: TrainState, result: dict[str, jax.Array]) -> bool:
        """Counts a batch, of which each part has as many tokens, more or less, as that here; whether a row was due."""
        self._tokens += self._objective.count(batch) * self._parts
        self._places += self._objective.count(filled(batch)) * self._parts
        if self._operations is None:
            self._operations = self._of_a_token(state.params, batch)
        if step % self._experiment.log_every and step != self._experiment.steps:
            return False
        values = {name: float(value) for name, value in result.items() if name != "tokens"}  # waits for the devices
        seconds = max(time.monotonic() - self._since, 1e-9)
        speed = {
            "tokens_per_second": self._tokens / seconds,
            "mfu": 3 * self._operations * self._tokens / seconds / self._peak,
            "data_wait": self._waited / seconds,
            "padding": 1 - self._tokens / max(1, self._places),
        }
        skipped = int(state.skipped)
        row = {"step": step, "kind": "train", "learning_rate": float(self._schedule(max(0, step - 1 - skipped)))}
        self._metrics.write({**row, **values, **speed, "save_seconds": self._saved, "skipped": skipped})
        self._saved = 0.0
        self._progress.update(step, loss=values["loss"], **speed, **({"skipped": skipped} if skipped else {}))
        self.restart()
        return True

    def _of_a_token(self, params: Any, batch: Batch) -> float:
        """The operations of the products of one padded token, forward."""

        def loss(params: Any, batch: Any) -> Any:
            # The tiles of others are a loop of a length that is not known.
            model = with_implementation(nnx.merge(self._graph, params), "reference")
            return self._objective.loss(model, batch, dropout_key=jax.random.key(0))

        return products(loss, params, batch) / max(1, self._objective.count(filled(batch)))
