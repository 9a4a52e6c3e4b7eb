"""Prepares a training run in one process: checks it, loads data, and builds or restores model and optimizer.

Mistakes in the settings are reported before anything is compiled or written.
"""

import dataclasses
import json
import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import grain
import optax
from datasets import Dataset
from flax import nnx

from train import objectives
from train.checkpoints import lock, run
from train.checkpoints.checkpoints import Checkpoints
from train.checkpoints.disk_space import check_space
from train.checkpoints.durable import replace
from train.config import Experiment
from train.data import saved_tokenizer
from train.data.batches import Example, stream
from train.data.sequence_order import zigzagged
from train.devices.parallel import Placed
from train.devices.processes import any_process, check_same, is_first
from train.engine import examples, versions, without_effect
from train.engine.examples import Examples
from train.engine.start import check_origin, drawn, sharded
from train.hub import exported, origin
from train.hub.origin import Origin
from train.objectives import Objective
from train.update.freezing import freeze
from train.update.step import TrainState, make_update, start_shapes, weights

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Session:
    """A training run in this process.

    Attributes:
        experiment: the resolved experiment.
        objective: the objective of the run, with its tokenizer and labels.
        splits: the texts by split: "validation" and "test", and "train" if it is in memory.
        training_examples: number of training examples.
        batches: the batches of all updates, in order.
        texts: the texts in each checkpoint beside the arrays: config, tokenizer, digests of data and task, labels,
            versions.
        graph: the model's structure.
        placed: the update, compiled for the devices.
        state: the current state: parameters, optimizer state and step.
        checkpoints: the checkpoints of the run.
        changed: True if the settings differ from those of the latest checkpoint.
    """

    experiment: Experiment
    objective: Objective
    splits: dict[str, Dataset]
    training_examples: int
    batches: grain.MapDataset
    texts: dict[str, str]
    graph: nnx.GraphDef
    placed: Placed
    state: TrainState
    checkpoints: Checkpoints
    changed: bool

    @property
    def model(self) -> Any:
        """The model with the current parameters, or with their moving average if the run keeps one.

        On a mesh it is sharded, and with several processes all of them must use it together.
        """
        # The weights are what the run reports and exports, so evaluations must use them too.
        return nnx.merge(self.graph, self.placed.for_evaluation(weights(self.state)))

    def averaged(self, count: int) -> Any:
        """The model with the mean of the parameters of the latest checkpoints, where `model` is.

        With several processes, all of them must call it.

        Args:
            count: the number of checkpoints.
        """
        return run.load(self.experiment.run, average=count, shardings=sharded(self.experiment, self.placed)).model

    def save(self) -> None:
        """Saves a checkpoint of the current state; logs a failed earlier save and retries.

        Returns when the state is copied. The file is written in the background.

        Raises:
            OSError: this checkpoint cannot be written either, as far as that is known at once.
        """
        try:
            self.checkpoints.save(self.state, self.texts)
        except OSError as error:
            # The error is that of the save before, which ran in the background. Its cause may be gone, such as a full
            # disk.
            log.warning("%s", error)
            self.checkpoints.save(self.state, self.texts)

    def go_back_to(self, step: int) -> None:
        """Restores an earlier checkpoint and removes the later ones, so that it becomes the latest.

        Raises:
            MissingStep: the checkpoint is missing or damaged. Nothing is removed.
            OSError: the checkpoint cannot be read. Nothing is removed.
        """
        # Later ones go last: if this one cannot be read, they are all that is left. A run that is killed in between
        # comes back here when it resumes.
        self.state = self.placed.place(self.checkpoints.restore(self.state, step))
        self.checkpoints.forget_after(step)


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """The settings, examples and latest checkpoint of a run, before the model is built.

    Attributes:
        experiment: the resolved experiment.
        objective: the objective of the run.
        examples: the examples.
        origin: the model that a new run starts from; None if its parameters are drawn or restored.
        texts: the texts in each checkpoint beside the arrays.
        checkpoints: the checkpoints of the run folder; None for a new run.
        saved: the texts of the latest checkpoint; None for a new run.
        changes: the settings that differ from those of the latest checkpoint, with both values.
    """

    experiment: Experiment
    objective: Objective
    examples: Examples
    origin: Origin | None
    texts: dict[str, str]
    checkpoints: Checkpoints | None
    saved: dict[str, str] | None
    changes: list[str]


@dataclasses.dataclass(frozen=True)
class _Begun:
    """The model, its update and its batches.

    Attributes:
        graph: the model's structure.
        state: parameters, optimizer state and step, initial or from the latest checkpoint.
        placed: the update, compiled for the devices.
        batches: the batches of all updates, in order.
        rows: the divisor of the number of rows in a batch, in words.
    """

    graph: nnx.GraphDef
    state: TrainState
    placed: Placed
    batches: grain.MapDataset
    rows: str


def prepare(experiment: Experiment) -> Session:
    """Prepares a run: examples, tokenizer, model and state, from the latest checkpoint if the run folder has one.

    Raises:
        ValueError: the run folder holds something else, the settings do not fit the data, the devices or the
            checkpoint, or a setting would have no effect.
    """
    resolved = _resolve(experiment)
    begun = _restore_or_start(resolved)
    return _place(resolved, begun)


def _resolve(experiment: Experiment) -> _Resolved:
    """Reads the examples and the run folder, and checks that they fit together."""
    installed = json.dumps(versions.installed())
    # Before any branch that depends on the settings: processes in different branches would wait for each other.
    check_same({"settings": run.shared(experiment), "versions": installed})
    check_folder(experiment.run)
    without_effect.check_settings(experiment)
    # Before the examples: reading large files takes minutes.
    experiment.parallel.check(experiment.model)
    experiment.optimizer.make(experiment.steps)
    # Process 0 decides: it may have created the folder already, or be the only one that sees it.
    is_begun = any_process(is_first() and (experiment.run / "checkpoints").is_dir())
    checkpoints = _checkpoints(experiment) if is_begun else None
    saved = None if checkpoints is None else _saved(checkpoints)
    # A resumed run has all parameters in its checkpoint: the folder that it started from may be gone by now.
    begun = None if saved is not None or experiment.start_from is None else origin.read(experiment.start_from)
    found = examples.find(experiment)
    # The tokenizer comes before the model: its vocabulary sets the size of the embedding.
    objective = _objective(experiment, found, saved, begun)
    experiment = run.resolve(experiment, objective.tokenizer, objective.labels)
    changes: list[str] = []
    noted = ""
    if checkpoints is not None and saved is not None:
        # Before the examples: a refused run must not tokenize large files first.
        changes = run.changes(experiment.run, saved["config"], experiment)
        done = checkpoints.latest or 0
        _check_steps(done, experiment)
        noted = _noted(saved.get("changes", ""), done, changes)
    if begun is not None:
        check_origin(experiment, begun, objective.labels)
    found.use(objective)
    texts = _texts(experiment, objective, found) | {"versions": installed}
    # Each process has read its own files, which may differ.
    check_same({name: texts[name] for name in ("tokenizer", "data", "labels")})
    if saved is not None:
        # Recorded in every later checkpoint: the config alone no longer reproduces the run.
        texts["changes"] = noted
        # Other data may have other splits, so the model may have trained on the new test examples.
        if saved["data"] != texts["data"]:
            raise ValueError(f"the data changed since {experiment.run} was trained; give another folder with --run")
    return _Resolved(experiment, objective, found, begun, texts, checkpoints, saved, changes)


def _restore_or_start(resolved: _Resolved) -> _Begun:
    """Restores the model from the latest checkpoint, or builds a new one.

    Nothing is written yet, since changed settings may not fit the checkpoint.
    """
    experiment, objective = resolved.experiment, resolved.objective
    optimizer = freeze(experiment.optimizer.make(experiment.steps), experiment.frozen)
    # Only shapes: nothing is computed before all checks, and a model may fit on no single device.
    model = nnx.eval_shape(lambda: run.build(experiment.model, seed=experiment.seed))
    graph, shapes = start_shapes(model, optimizer, **run.starting(experiment))
    without_effect.check_parameters(experiment, shapes)
    # Before the examples, which take longer to check.
    placed = _placed(experiment, objective, graph, optimizer, model)
    rows_of = examples.training_rows(experiment, objective, resolved.examples, model)
    batches, rows = _batches(experiment, objective, rows_of, placed), _rows(experiment, placed)
    if resolved.checkpoints is not None and resolved.saved is not None:
        _warn_of_differences(experiment.run, resolved.saved, rows)
        # With shardings, each device reads its own part, and no device holds more than its share.
        state = resolved.checkpoints.restore(run.spread(shapes, placed.shardings(shapes)))
    else:
        state = drawn(experiment, objective, optimizer, placed, resolved.origin)
    return _Begun(graph, state, placed, batches, rows)


def _place(resolved: _Resolved, begun: _Begun) -> Session:
    """Places the state on the devices, and writes config and tokenizer to the run folder."""
    experiment, texts = resolved.experiment, resolved.texts | {"rows": begun.rows}
    folder, state = experiment.run, begun.placed.place(begun.state)
    # Only now, after all checks: a refused run leaves its folder as it was.
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "tokenizer.json", texts["tokenizer"].encode())
        replace(folder / run.CONFIG, texts["config"].encode())
        best = max(experiment.keep_best, experiment.patience is not None)
        check_space(folder / "checkpoints", state, experiment.keep_checkpoints + best)
    return Session(
        experiment=experiment,
        objective=resolved.objective,
        splits=resolved.examples.splits,
        training_examples=resolved.examples.count,
        batches=begun.batches,
        texts=texts,
        graph=begun.graph,
        placed=begun.placed,
        state=state,
        checkpoints=_checkpoints(experiment) if resolved.checkpoints is None else resolved.checkpoints,
        changed=bool(resolved.changes),
    )


def _texts(experiment: Experiment, objective: Objective, found: Examples) -> dict[str, str]:
    """The texts in each checkpoint beside the arrays, for a resolved experiment."""
    return {
        "config": run.to_text(experiment),
        "tokenizer": objective.tokenizer.to_json(),
        "data": found.digest,
        "source": run.task_source(experiment.task),
        "labels": json.dumps(objective.labels, ensure_ascii=False),
    }


def _rows(experiment: Experiment, placed: Placed) -> str:
    """The divisor of the number of rows in a batch, in words. A resumed run sees other batches if it changes."""
    rows = str(placed.rows * placed.part[1] * experiment.pieces)
    return rows if placed.lengths == 1 else f"{rows} with lengths that are multiples of {placed.lengths}"


def _warn_of_differences(folder: Path, saved: dict[str, str], rows: str) -> None:
    """Warns of differences that may keep a resumed run from repeating the original one bit by bit."""
    if saved.get("rows", rows) != rows:
        log.warning(
            "%s: the number of rows in a batch was a multiple of %s and is now a multiple of %s: the batches change",
            *(folder, saved["rows"], rows),
        )
    if others := versions.changed(json.loads(saved.get("versions", "{}"))):
        log.warning("%s: %s: another version may change numbers or the order of examples", folder, others)


def _checkpoints(experiment: Experiment) -> Checkpoints:
    return Checkpoints(
        experiment.run / "checkpoints",
        keep=experiment.keep_checkpoints,
        is_regular=lambda step: bool(run.regular([step], experiment)),
    )


def _placed(
    experiment: Experiment,
    objective: Objective,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformation,
    model: nnx.Module,
) -> Placed:
    update = make_update(
        graph,
        optimizer,
        objective.loss,
        seed=experiment.seed,
        label_smoothing=experiment.label_smoothing,
        pieces=experiment.pieces,
        compute_dtype=None if experiment.compute_dtype == "float32" else experiment.compute_dtype,
        decay=experiment.ema,
        patience=experiment.max_skipped,
        prepare=experiment.parallel.prepare,
    )
    return experiment.parallel.spread(update, model=model)


def _objective(
    experiment: Experiment, found: Examples, saved: dict[str, str] | None, begun: Origin | None
) -> Objective:
    """The objective, with tokenizer and labels from the checkpoint, or for a new run from the training split."""
    # Not trained again: another version of the tokenizers library could give other ids to the same texts.
    if saved is not None:
        labels = tuple(json.loads(saved.get("labels", "[]")))
        return objectives.make(experiment, saved_tokenizer.from_json(saved["tokenizer"]), labels)
    kind = objectives.kind(experiment)
    if begun is not None:
        without_effect.check_tokenizer(experiment, begun)
        # Embeddings only make sense with the tokenizer that they were trained with.
        return objectives.make(experiment, begun.tokenizer, found.labels(kind))
    tokenizer = saved_tokenizer.make(experiment.tokenizer, found.texts(kind))
    return objectives.make(experiment, tokenizer, found.labels(kind))


def _saved(checkpoints: Checkpoints) -> dict[str, str] | None:
    """The texts of the latest checkpoint; None if there is none yet."""
    if checkpoints.latest is not None:
        return checkpoints.texts()
    # Damaged checkpoints are not overwritten by a new run without the user's knowledge.
    if any(path.name.isdecimal() for path in checkpoints.folder.iterdir()):
        raise ValueError(
            f"every checkpoint in {checkpoints.folder} is damaged; give another folder with --run, or remove them to "
            "start again"
        )
    return None


def check_folder(folder: Path) -> None:
    """Raises ValueError if a path cannot be a run folder: a file, an exported model, or a folder with other files."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder with --run")
    if exported.is_exported(folder):
        raise ValueError(f"{folder} holds an exported model; give another folder with --run")
    ours = ("checkpoints", lock.NAME)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in ours):
        raise ValueError(f"{folder} holds files but no run; give an empty or new folder with --run")


def _noted(before: str, done: int, changes: list[str]) -> str:
    """The history of changed settings, one per line; also logs the new ones."""
    if changes:
        log.warning("resuming with changed settings (before and now): %s", "; ".join(changes))
    return before + "".join(f"after {done} updates: {change}\n" for change in changes)


def _check_steps(latest: int, experiment: Experiment) -> None:
    if latest > experiment.steps:
        raise ValueError(f"steps ({experiment.steps}) must be at least the {latest} updates that {experiment.run} has")


def _batches(experiment: Experiment, objective: Objective, rows: Sequence[Example], placed: Placed) -> grain.MapDataset:
    batches = stream(
        experiment.batches,
        rows,
        seed=experiment.seed,
        multiple=placed.rows * experiment.pieces,
        lengths=placed.lengths,
        part=placed.part,
    )
    # Only attention over coordinates may read the tokens of a text in any order. Experts with limited room take tokens
    # in the order of the row, so that no token depends on later ones.
    block: Any = getattr(experiment.model, "block", None)
    if placed.lengths == 1 or not objective.by_coordinates or block.mixture is not None:
        return batches
    return batches.map(partial(zigzagged, devices=placed.lengths // 2))
