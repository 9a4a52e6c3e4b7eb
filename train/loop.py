"""From an experiment to a run folder: train, evaluate, save, resume, and draw what came out."""

import dataclasses
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from datasets import Dataset
from flax import nnx

from train import plot, run
from train.batches import Batch, examples, iterate, stream
from train.checkpoint import Checkpoints
from train.config import Experiment
from train.evaluate import Scores, evaluate
from train.log import MetricsFile, Progress, replace
from train.parallel import data_parallel
from train.signals import Interrupts
from train.step import TrainState, make_update, start
from train.tokenizer import Tokenizer
from train.translator import longest

_SAMPLES = 3


@dataclasses.dataclass
class Session:
    """What one process needs to train: the experiment brought to life.

    Attributes:
        experiment: the resolved experiment.
        tokenizer: trained, or that of the run that is resumed.
        splits: examples by split.
        texts: what checkpoints hold beside numbers: config, tokenizer, digest of the data.
        graph: the model's structure.
        state: parameters, optimizer and step, as far as they were trained.
        checkpoints: of the run, once its folder is known to be right.
    """

    experiment: Experiment
    tokenizer: Tokenizer
    splits: dict[str, Dataset]
    texts: dict[str, str]
    graph: nnx.GraphDef
    state: TrainState
    checkpoints: Checkpoints | None

    @property
    def model(self) -> Any:
        """The model with the parameters of now."""
        return nnx.merge(self.graph, self.state.params)

    def save(self) -> None:
        """Writes a checkpoint of now."""
        if self.checkpoints is not None:
            self.checkpoints.save(self.state, self.texts)


def train(experiment: Experiment) -> int:
    """Trains, or goes on where the run folder stopped; returns the exit code of the process.

    Raises:
        ValueError: the run folder holds something else, or the settings do not fit the data or the devices.
    """
    session = prepare(experiment)
    with Interrupts() as interrupts:
        _train(session, interrupts)
    if interrupts.received is not None:
        step = int(session.state.step)
        print(f"stopped by {interrupts.received.name} after {step} updates; the same command resumes")
        return interrupts.exit_code()
    _finish(session)
    return 0


def prepare(experiment: Experiment) -> Session:
    """Examples, tokenizer, model and state; from the latest checkpoint where the run folder holds one."""
    folder = experiment.run
    _check_folder(folder)
    splits = experiment.task.load()
    saved = _saved(folder)
    if saved is None:
        tokenizer = Tokenizer.train(experiment.tokenizer, [*splits["train"]["source"], *splits["train"]["target"]])
    else:
        tokenizer = Tokenizer.from_json(saved["tokenizer"])
    experiment = run.resolve(experiment, tokenizer)
    texts = {"config": run.to_text(experiment), "tokenizer": tokenizer.to_json(), "data": run.fingerprint(splits)}
    if saved is not None:
        run.check_same(folder, saved["config"], experiment)
        if saved["data"] != texts["data"]:
            raise ValueError(f"the examples are not those that {folder} was trained on; give another folder with --run")
    graph, state = start(run.build(experiment.model, seed=experiment.seed), experiment.optimizer.make(experiment.steps))
    session = Session(experiment, tokenizer, splits, texts, graph, state, None)
    _check_lengths(session)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "tokenizer.json", texts["tokenizer"].encode())
    replace(folder / "config.json", texts["config"].encode())
    session.checkpoints = Checkpoints(folder / "checkpoints", keep=experiment.keep_checkpoints)
    if saved is not None:
        session.state = session.checkpoints.restore(state)
    return session


def _saved(folder: Path) -> dict[str, str] | None:
    """The texts of the latest checkpoint; None before the first, when nothing is lost by beginning anew."""
    if not (folder / "checkpoints").is_dir():
        return None
    checkpoints = Checkpoints(folder / "checkpoints")
    saved = None if checkpoints.latest is None else checkpoints.texts()
    checkpoints.close()
    return saved


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder with --run")
    ours = ("config.json", "tokenizer.json", "checkpoints")
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in ours):
        raise ValueError(f"{folder} holds files but no run; give an empty or new folder with --run")


def _check_lengths(session: Session) -> None:
    """Raises ValueError where a text has more tokens than the model has learned positions."""
    limit, longest_kept = longest(session.model), session.experiment.batches.max_length
    if limit is None:
        return
    for name, split in session.splits.items():
        lengths = [max(len(source), len(target) - 1) for source, target in examples(split, session.tokenizer)]
        most = max(length for length in lengths if name != "train" or length <= longest_kept)
        if most > limit:
            raise ValueError(
                f"the {name} split has a text of {most} tokens: --model.positions.max-length ({limit}) must be as many"
            )


def _train(session: Session, interrupts: Interrupts) -> None:
    experiment, first = session.experiment, int(session.state.step)
    if first == experiment.steps:
        return
    optimizer = experiment.optimizer.make(experiment.steps)
    update = data_parallel(
        make_update(session.graph, optimizer, seed=experiment.seed, label_smoothing=experiment.label_smoothing)
    )
    rows = examples(session.splits["train"], session.tokenizer)
    order = stream(experiment.batches, rows, seed=experiment.seed, multiple=jax.local_device_count())
    with (
        Progress(experiment.steps, initial_step=first) as progress,
        MetricsFile(experiment.run / "metrics.jsonl") as metrics,
        MetricsFile(experiment.run / "samples.jsonl") as samples,
    ):
        _greet(session, progress, len(rows))
        for file in (metrics, samples):
            file.truncate_after(first)
        meter = _Meter(experiment, metrics, progress)
        batches = itertools.islice(iterate(order, start=first), experiment.steps - first)
        for step, batch in enumerate(batches, first + 1):
            session.state, result = update(session.state, batch)
            meter.add(step, batch, result)
            due, stopped = step % experiment.evaluate_every == 0, interrupts.received is not None
            # Saved before it is evaluated: an evaluation that fails loses no update.
            if due or stopped or step == experiment.steps:
                _check_finite(step, result)
                session.save()
            if due and not stopped:
                _validate(session, step, metrics, samples, progress)
                meter.restart()
            if interrupts.received is not None:
                return


def _greet(session: Session, progress: Progress, count: int) -> None:
    leaves = jax.tree.leaves(session.state.params)
    progress.print(
        f"{session.experiment.run}: {sum(leaf.size for leaf in leaves):,} parameters, {count:,} training examples, "
        f"{session.tokenizer.vocab_size:,} tokens, {jax.local_device_count()} x {jax.devices()[0].device_kind}"
    )
    if int(session.state.step):
        progress.print(f"resuming after {int(session.state.step)} updates")


class _Meter:
    """Rows of training metrics; numbers leave the devices only when a row is due, so that steps do not wait."""

    def __init__(self, experiment: Experiment, metrics: MetricsFile, progress: Progress) -> None:
        self._experiment, self._metrics, self._progress = experiment, metrics, progress
        self._schedule = experiment.optimizer.schedule.schedule(experiment.steps)
        self.restart()

    def restart(self) -> None:
        """Begins to count tokens anew: what happened between two steps is not training time."""
        self._tokens, self._since = 0, time.monotonic()

    def add(self, step: int, batch: Batch, result: dict[str, jax.Array]) -> None:
        self._tokens += int(batch["source_length"].sum() + (batch["target_length"] - 1).sum())
        if step % self._experiment.log_every and step != self._experiment.steps:
            return
        _check_finite(step, result)
        loss, norm = float(result["loss"]), float(result["gradient_norm"])
        rate = self._tokens / max(time.monotonic() - self._since, 1e-9)
        row = {"loss": loss, "gradient_norm": norm, "tokens_per_second": rate}
        self._metrics.write({"step": step, "kind": "train", "learning_rate": float(self._schedule(step - 1)), **row})
        self._progress.update(step, loss=loss, tokens_per_second=rate)
        self.restart()


def _check_finite(step: int, result: dict[str, jax.Array]) -> None:
    """Raises ValueError for a loss or gradient that is not finite, before it reaches a checkpoint."""
    loss, norm = float(result["loss"]), float(result["gradient_norm"])
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise ValueError(
            f"step {step}: loss {loss}, gradient norm {norm}; the last checkpoint stays, and a lower learning rate "
            "may help"
        )


def _validate(session: Session, step: int, metrics: MetricsFile, samples: MetricsFile, progress: Progress) -> None:
    experiment = session.experiment
    split = session.splits["validation"]
    split = split.select(range(min(len(split), experiment.evaluate_examples)))
    scores = evaluate(session.model, session.tokenizer, split, bleu=experiment.bleu)
    metrics.write({"step": step, "kind": "validation", **scores.numbers()})
    progress.print(f"step {step}  validation  " + _described(scores))
    for index in np.random.default_rng(step).permutation(len(split))[:_SAMPLES]:
        row = split[int(index)]
        samples.write({"step": step, **row, "output": scores.outputs[index]})
        progress.print(f"  {row['source']}\n    reference {row['target']}\n    output    {scores.outputs[index]}")


def _described(scores: Scores) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.numbers().items())


def _finish(session: Session) -> None:
    """Scores on the test split, pictures, and where everything is."""
    experiment, folder = session.experiment, session.experiment.run
    scores = evaluate(session.model, session.tokenizer, session.splits["test"], bleu=experiment.bleu)
    results = {"split": "test", "examples": len(session.splits["test"]), "steps": experiment.steps, **scores.numbers()}
    if scores.signature is not None:
        results["sacrebleu"] = scores.signature
    (folder / "results.json").write_text(json.dumps(results, indent=2), "utf-8")
    trained = run.Run(folder, experiment, session.tokenizer, experiment.steps, session.model)
    plot.draw(trained, plot.examples_to_draw(session.splits["test"]))
    print(f"test  {_described(scores)}")
    print(f"test exact match {scores.exact_match:.2%} on {results['examples']} examples that were never trained on")
    print(f"{folder}: " + ", ".join(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())))
