"""From an experiment to a run folder: train, evaluate, save, resume, and draw what came out."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from datasets import Dataset
from flax import nnx

from seqattn.models import Learned
from train import objectives, run
from train.batches import Batch, iterate, stream
from train.checkpoint import Checkpoints
from train.config import Experiment
from train.drawing import learning_curves
from train.freezing import freeze
from train.fresh import fresh
from train.log import MetricsFile, Progress, read_metrics, replace
from train.objectives import Objective, Scores
from train.parallel import data_parallel
from train.signals import Interrupts
from train.step import TrainState, make_update, start
from train.tokenizer import Tokenizer

_SAMPLES = 3


@dataclasses.dataclass
class Session:
    """What one process needs to train: the experiment brought to life.

    Attributes:
        experiment: the resolved experiment.
        objective: what it is about, with its tokenizer and labels.
        optimizer: how gradients become updates.
        splits: examples by split.
        texts: what checkpoints hold beside numbers: config, tokenizer, digest of the data.
        graph: the model's structure.
        state: parameters, optimizer and step, as far as they were trained.
        checkpoints: of the run, once its folder is known to be right.
    """

    experiment: Experiment
    objective: Objective
    optimizer: optax.GradientTransformation
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
    objective = _objective(experiment, splits["train"], saved)
    tokenizer, labels = objective.tokenizer, objective.labels
    experiment = run.resolve(experiment, tokenizer, labels)
    texts = {"config": run.to_text(experiment), "tokenizer": tokenizer.to_json(), "data": run.fingerprint(splits)}
    texts["labels"] = json.dumps(labels, ensure_ascii=False)
    if saved is not None:
        run.check_same(folder, saved["config"], experiment)
        if saved["data"] != texts["data"]:
            raise ValueError(f"the examples are not those that {folder} was trained on; give another folder with --run")
    optimizer = freeze(experiment.optimizer.make(experiment.steps), experiment.frozen)
    # A run that goes on takes everything from its checkpoint: what it began with need not be there any more.
    begun = fresh(experiment, tokenizer) if saved is None else run.build(experiment.model, seed=experiment.seed)
    graph, state = start(begun, optimizer)
    session = Session(experiment, objective, optimizer, splits, texts, graph, state, None)
    _check_lengths(session)
    folder.mkdir(parents=True, exist_ok=True)
    replace(folder / "tokenizer.json", texts["tokenizer"].encode())
    replace(folder / "config.json", texts["config"].encode())
    session.checkpoints = Checkpoints(folder / "checkpoints", keep=experiment.keep_checkpoints)
    if saved is not None:
        session.state = session.checkpoints.restore(state)
    return session


def _objective(experiment: Experiment, split: Dataset, saved: dict[str, str] | None) -> Objective:
    """What the experiment is about, with tokenizer and labels of the saved run, or of the split of a new one."""
    if saved is not None:
        labels = tuple(json.loads(saved.get("labels", "[]")))
        return objectives.make(experiment, Tokenizer.from_json(saved["tokenizer"]), labels)
    kind = objectives.kind(experiment)
    if experiment.start_from is not None:
        tokenizer = run.load(experiment.start_from).tokenizer
    else:
        tokenizer = Tokenizer.train(experiment.tokenizer, kind.texts(split))
    return objectives.make(experiment, tokenizer, kind.find_labels(split))


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
    """Raises ValueError where a text has more tokens than the model has learned positions, by the longest of them."""
    experiment, model = session.experiment, session.model
    limits = ", ".join(f"{flag} ({most})" for flag, most in _learned(experiment.model, "--model"))
    beyond: list[tuple[int, int, str]] = []
    for name, split in session.splits.items():
        for source, target in session.objective.examples(split) if limits else ():
            left_out = name == "train" and max(len(source), len(target)) > experiment.batches.max_length
            room, wanted = model.room(len(source)), max(1, len(target) - 1)
            if not left_out and room is not None and room < wanted:
                beyond.append((len(source), wanted, name))
    if beyond:
        source_length, target_length, name = max(beyond, key=lambda found: found[0] + found[1])
        raise ValueError(
            f"{len(beyond)} texts are longer than the learned positions, the longest in the {name} split: a source of "
            f"{source_length} and a target of {target_length} tokens; raise {limits}"
        )


def _learned(config: Any, flag: str) -> Iterator[tuple[str, int]]:
    """How many learned positions a config asks for, by the flags that say so."""
    if isinstance(config, Learned):
        yield f"{flag}.max-length", config.max_length
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from _learned(getattr(config, field.name), f"{flag}.{field.name.replace('_', '-')}")


def _train(session: Session, interrupts: Interrupts) -> None:
    experiment, first = session.experiment, int(session.state.step)
    missed = _missed_validation(session, first)
    if (first == experiment.steps and not missed) or _is_exhausted(session, print):
        return
    options: dict[str, Any] = {"seed": experiment.seed, "label_smoothing": experiment.label_smoothing}
    update = data_parallel(make_update(session.graph, session.optimizer, session.objective.loss, **options))
    rows = session.objective.examples(session.splits["train"])
    order = stream(experiment.batches, rows, seed=experiment.seed, multiple=jax.local_device_count())
    with (
        Progress(experiment.steps, initial_step=first) as progress,
        MetricsFile(experiment.run / "metrics.jsonl") as metrics,
        MetricsFile(experiment.run / "samples.jsonl") as samples,
    ):
        _greet(session, progress, len(rows))
        for file in (metrics, samples):
            file.truncate_after(first)
        if missed:
            _validate(session, first, metrics, samples, progress)
            if _is_exhausted(session, progress.print):
                return
        meter = _Meter(session, metrics, progress)
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
                if _is_exhausted(session, progress.print):
                    return
            if interrupts.received is not None:
                return


def _missed_validation(session: Session, step: int) -> bool:
    """Whether a run was stopped between the checkpoint of a step and its evaluation."""
    file = session.experiment.run / "metrics.jsonl"
    if not step or step % session.experiment.evaluate_every or not file.exists():
        return False
    return not any(row["kind"] == "validation" and row["step"] == step for row in read_metrics(file))


def _is_exhausted(session: Session, say: Callable[[str], None]) -> bool:
    """Whether patience is at its end; then the best checkpoint is the latest, and its state that of the session."""
    patience, file = session.experiment.patience, session.experiment.run / "metrics.jsonl"
    if patience is None or session.checkpoints is None or not file.exists():
        return False
    checks = [row for row in read_metrics(file) if row["kind"] == "validation"]
    best = min((row for row in checks if math.isfinite(row["loss"])), key=lambda row: row["loss"], default=None)
    if best is None:
        return False
    # An interrupted run saves more often than it evaluates, which would push the best one out.
    session.checkpoints.protect(best["step"])
    if len(checks) - 1 - checks.index(best) < patience:
        return False
    session.checkpoints.forget_after(best["step"])
    session.state = session.checkpoints.restore(session.state)
    say(f"stopped early: the validation loss is lowest after {best['step']} updates, {best['loss']:.4f}")
    return True


def _greet(session: Session, progress: Progress, count: int) -> None:
    leaves = jax.tree.leaves(session.state.params)
    progress.print(
        f"{session.experiment.run}: {sum(leaf.size for leaf in leaves):,} parameters, {count:,} training examples, "
        f"{session.objective.tokenizer.vocab_size:,} tokens, "
        f"{jax.local_device_count()} x {jax.devices()[0].device_kind}"
    )
    if int(session.state.step):
        progress.print(f"resuming after {int(session.state.step)} updates")


class _Meter:
    """Rows of training metrics; numbers leave the devices only when a row is due, so that steps do not wait."""

    def __init__(self, session: Session, metrics: MetricsFile, progress: Progress) -> None:
        experiment = self._experiment = session.experiment
        self._count, self._metrics, self._progress = session.objective.count, metrics, progress
        self._schedule = experiment.optimizer.schedule.schedule(experiment.steps)
        self.restart()

    def restart(self) -> None:
        """Begins to count tokens anew: what happened between two steps is not training time."""
        self._tokens, self._since = 0, time.monotonic()

    def add(self, step: int, batch: Batch, result: dict[str, jax.Array]) -> None:
        self._tokens += self._count(batch)
        if step % self._experiment.log_every and step != self._experiment.steps:
            return
        _check_finite(step, result)
        loss, norm = float(result["loss"]), float(result["gradient_norm"])
        rate = self._tokens / max(time.monotonic() - self._since, 1e-9)
        row = {"loss": loss, "gradient_norm": norm, "tokens_per_second": rate}
        row |= {name: float(result[name]) for name in ("dropped",) if name in result}
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
    scores = session.objective.evaluate(session.model, split)
    metrics.write({"step": step, "kind": "validation", **scores.numbers})
    progress.print(f"step {step}  validation  " + _described(scores))
    for index in np.random.default_rng(step).permutation(len(scores.outputs))[:_SAMPLES]:
        row = split[int(index)]
        samples.write({"step": step, **row, "output": scores.outputs[index]})
        progress.print(f"  {row['source']}\n    reference {row['target']}\n    output    {scores.outputs[index]}")


def _described(scores: Scores) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in scores.numbers.items())


def _finish(session: Session) -> None:
    """Scores on the test split, pictures, and where everything is."""
    folder, test = session.experiment.run, session.splits["test"]
    scores = session.objective.evaluate(session.model, test)
    results = {"split": "test", "examples": len(test), "steps": int(session.state.step), **scores.numbers}
    if scores.signature is not None:
        results["sacrebleu"] = scores.signature
    (folder / "results.json").write_text(json.dumps(results, indent=2), "utf-8")
    learning_curves(read_metrics(folder / "metrics.jsonl"), folder / "curves")
    session.objective.draw(session.model, test, folder / "attention")
    print(f"test  {_described(scores)}")
    if "exact_match" in scores.numbers:
        share = scores.numbers["exact_match"]
        print(f"test exact match {share:.2%} on {len(test)} examples that were never trained on")
    print(f"{folder}: " + ", ".join(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())))
