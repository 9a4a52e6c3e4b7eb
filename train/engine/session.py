"""What one process needs to train: an experiment brought to life, or refused before anything is compiled or written."""

import dataclasses
import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import numpy as np
import optax
from datasets import Dataset
from flax import nnx

from seqattn.models import Learned
from train import objectives
from train.checkpoints import lock, run
from train.checkpoints.checkpoints import Checkpoints
from train.checkpoints.disk_space import check_space
from train.checkpoints.durable import replace
from train.config import Experiment
from train.data.batches import Example, stream
from train.data.tokenizer import Tokenizer
from train.devices.parallel import Placed
from train.devices.processes import any_process, differing, is_first
from train.engine import without_effect
from train.engine.start import fresh
from train.hub import exported
from train.objectives import Objective
from train.update.freezing import freeze
from train.update.step import TrainState, make_update, start

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Session:
    """An experiment in this process.

    Attributes:
        experiment: the resolved experiment.
        objective: what it is about, with its tokenizer and labels.
        splits: examples by split.
        batches: those of all updates, in order.
        texts: what checkpoints hold beside numbers: config, tokenizer, digest of the data.
        graph: the model's structure.
        placed: the update, over the devices.
        state: parameters, optimizer and step, as far as they were trained.
        checkpoints: of the run.
        changed: it goes on with other settings than those of its latest checkpoint.
    """

    experiment: Experiment
    objective: Objective
    splits: dict[str, Dataset]
    batches: grain.MapDataset
    texts: dict[str, str]
    graph: nnx.GraphDef
    placed: Placed
    state: TrainState
    checkpoints: Checkpoints
    changed: bool

    @property
    def model(self) -> Any:
        """The model with the parameters of now, or with their moving average where the run keeps one.

        With several processes all of them must ask.
        """
        params = self.state.params if self.state.average is None else self.state.average
        return nnx.merge(self.graph, self.placed.gather(params))

    def save(self) -> None:
        """Writes a checkpoint of now; what kept the one before from being written is told, and may be over.

        Raises:
            OSError: this one cannot be written either, as far as that shows at once.
        """
        try:
            self.checkpoints.save(self.state, self.texts)
        except OSError as error:
            log.warning("%s", error)
            self.checkpoints.save(self.state, self.texts)

    def go_back_to(self, step: int) -> None:
        """Goes on from an earlier checkpoint, which becomes the latest: later ones are removed."""
        self.checkpoints.forget_after(step)
        self.state = self.placed.place(self.checkpoints.restore(self.state))


@dataclasses.dataclass(frozen=True)
class _Resolved:
    """What the flags, the examples and the latest checkpoint say, before there is a model.

    Attributes:
        experiment: the resolved experiment.
        objective: what it is about.
        splits: examples by split.
        texts: what checkpoints hold beside numbers.
        checkpoints: those that the folder has; None before there are any.
        saved: the texts of the latest checkpoint; None where the run begins.
        changes: the settings that are others than those of the latest checkpoint.
    """

    experiment: Experiment
    objective: Objective
    splits: dict[str, Dataset]
    texts: dict[str, str]
    checkpoints: Checkpoints | None
    saved: dict[str, str] | None
    changes: list[str]


@dataclasses.dataclass(frozen=True)
class _Begun:
    """The model and what it is trained with.

    Attributes:
        graph: the model's structure.
        state: parameters, optimizer and step, new or of the latest checkpoint.
        placed: the update, over the devices.
        batches: those of all updates, in order.
        rows: what the rows of a batch are a multiple of, in words.
    """

    graph: nnx.GraphDef
    state: TrainState
    placed: Placed
    batches: grain.MapDataset
    rows: str


def prepare(experiment: Experiment) -> Session:
    """Examples, tokenizer, model and state; from the latest checkpoint where the run folder holds one.

    Raises:
        ValueError: the run folder holds something else, the settings do not fit the data or the devices, or one of them
            would do nothing.
    """
    resolved = _resolve(experiment)
    begun = _restore_or_start(resolved)
    return _place(resolved, begun)


def _resolve(experiment: Experiment) -> _Resolved:
    """Reads the examples and the folder, and refuses what does not go together."""
    versions = json.dumps(_versions())
    # Before anything that one process may do and another not.
    _check_processes({"settings": run.shared(experiment), "versions": versions})
    check_folder(experiment.run)
    without_effect.check_settings(experiment)
    splits = experiment.task.load()
    # Process 0 decides: it may be ahead of another, or the only one that sees the folder.
    is_begun = any_process(is_first() and (experiment.run / "checkpoints").is_dir())
    checkpoints = _checkpoints(experiment) if is_begun else None
    saved = None if checkpoints is None else _saved(checkpoints)
    objective = _objective(experiment, splits["train"], saved)
    experiment = run.resolve(experiment, objective.tokenizer, objective.labels)
    texts = _texts(experiment, objective, splits) | {"versions": versions}
    _check_processes({name: texts[name] for name in ("tokenizer", "data", "labels")})
    changes: list[str] = []
    if checkpoints is not None and saved is not None:
        changes = run.changes(experiment.run, saved["config"], experiment)
        done = checkpoints.latest or 0
        _check_steps(done, experiment)
        texts["changes"] = _noted(saved.get("changes", ""), done, changes)
        if saved["data"] != texts["data"]:
            raise ValueError(
                f"the examples are not those that {experiment.run} was trained on; give another folder with --run"
            )
    return _Resolved(experiment, objective, splits, texts, checkpoints, saved, changes)


def _restore_or_start(resolved: _Resolved) -> _Begun:
    """The model as the latest checkpoint has it, or new; nothing is written, since what was changed may not fit."""
    experiment, objective = resolved.experiment, resolved.objective
    optimizer = freeze(experiment.optimizer.make(experiment.steps), experiment.frozen)
    model: nnx.Module
    if resolved.saved is None:
        model = fresh(experiment, objective.tokenizer)
        graph, state = start(model, optimizer, average=experiment.ema is not None)
        _check_processes({"what the model begins with": _digest(state.params)})
    else:
        # A run that goes on takes everything from its checkpoint: what it began with need not be there any more.
        model = nnx.eval_shape(lambda: run.build(experiment.model, seed=experiment.seed))
        graph, state = _shapes(model, optimizer, average=experiment.ema is not None)
    without_effect.check_parameters(experiment, state.params)
    examples = _examples(experiment, objective, resolved.splits, model)
    placed = _placed(experiment, objective, graph, optimizer)
    batches, rows = _batches(experiment, examples, placed), _rows(experiment, placed)
    if resolved.checkpoints is not None and resolved.saved is not None:
        _warn_of_differences(experiment.run, resolved.saved, rows)
        state = resolved.checkpoints.restore(_spread(state, placed))
    return _Begun(graph, state, placed, batches, rows)


def _place(resolved: _Resolved, begun: _Begun) -> Session:
    """The state on the devices, and the run in its folder."""
    experiment, texts = resolved.experiment, resolved.texts | {"rows": begun.rows}
    folder, state = experiment.run, begun.placed.place(begun.state)
    if is_first():
        folder.mkdir(parents=True, exist_ok=True)
        replace(folder / "tokenizer.json", texts["tokenizer"].encode())
        replace(folder / "config.json", texts["config"].encode())
        best = max(experiment.keep_best, experiment.patience is not None)
        check_space(folder / "checkpoints", state, experiment.keep_checkpoints + best)
    return Session(
        experiment=experiment,
        objective=resolved.objective,
        splits=resolved.splits,
        batches=begun.batches,
        texts=texts,
        graph=begun.graph,
        placed=begun.placed,
        state=state,
        checkpoints=_checkpoints(experiment) if resolved.checkpoints is None else resolved.checkpoints,
        changed=bool(resolved.changes),
    )


def _texts(experiment: Experiment, objective: Objective, splits: dict[str, Dataset]) -> dict[str, str]:
    """What checkpoints hold beside numbers, of a resolved experiment."""
    return {
        "config": run.to_text(experiment),
        "tokenizer": objective.tokenizer.to_json(),
        "data": run.fingerprint(splits),
        "labels": json.dumps(objective.labels, ensure_ascii=False),
    }


def _rows(experiment: Experiment, placed: Placed) -> str:
    """What the rows of a batch are a multiple of: other batches follow where that changes."""
    rows = str(placed.rows * placed.part[1] * experiment.pieces)
    return rows if placed.lengths == 1 else f"{rows} with lengths that are multiples of {placed.lengths}"


def _warn_of_differences(folder: Path, saved: dict[str, str], rows: str) -> None:
    """Says what may make a run that goes on compute other numbers than it would have."""
    if saved.get("rows", rows) != rows:
        log.warning(
            "%s: the rows of a batch, a multiple of %s, are one of %s here: other batches follow",
            *(folder, saved["rows"], rows),
        )
    if others := _other_versions(json.loads(saved.get("versions", "{}"))):
        log.warning("%s: %s: other versions may compute other numbers, or order examples otherwise", folder, others)


def _checkpoints(experiment: Experiment) -> Checkpoints:
    return Checkpoints(
        experiment.run / "checkpoints",
        keep=experiment.keep_checkpoints,
        is_regular=lambda step: bool(run.regular([step], experiment)),
    )


def _placed(
    experiment: Experiment, objective: Objective, graph: nnx.GraphDef, optimizer: optax.GradientTransformation
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
    )
    return experiment.parallel.spread(update)


def _objective(experiment: Experiment, split: Dataset, saved: dict[str, str] | None) -> Objective:
    """What the experiment is about, with tokenizer and labels of the saved run, or of the split of a new one."""
    if saved is not None:
        labels = tuple(json.loads(saved.get("labels", "[]")))
        return objectives.make(experiment, Tokenizer.from_json(saved["tokenizer"]), labels)
    kind = objectives.kind(experiment)
    if experiment.start_from is not None:
        origin = run.load(experiment.start_from, average=1)
        without_effect.warn_of_tokenizer(experiment, origin.experiment.tokenizer)
        tokenizer = origin.tokenizer
    else:
        tokenizer = Tokenizer.train(experiment.tokenizer, kind.texts(split))
    return objectives.make(experiment, tokenizer, kind.find_labels(split))


def _saved(checkpoints: Checkpoints) -> dict[str, str] | None:
    """The texts of the latest checkpoint; None before the first, when nothing is lost by beginning anew."""
    if checkpoints.latest is not None:
        return checkpoints.texts()
    if any(path.name.isdecimal() for path in checkpoints.folder.iterdir()):
        raise ValueError(
            f"no checkpoint in {checkpoints.folder} is as it was written; give another folder with --run, or remove "
            "them to begin anew"
        )
    return None


def check_folder(folder: Path) -> None:
    """Raises ValueError where a path is no place for a run: a file, or a folder that holds something else."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder with --run")
    if exported.is_exported(folder):
        raise ValueError(f"{folder} holds an exported model; give another folder with --run")
    ours = ("checkpoints", lock.NAME)
    if folder.is_dir() and any(folder.iterdir()) and not any((folder / name).exists() for name in ours):
        raise ValueError(f"{folder} holds files but no run; give an empty or new folder with --run")


def _check_processes(texts: dict[str, str]) -> None:
    """Raises ValueError, in all processes, where one of them trains something else: they would mix their gradients."""
    if others := differing(texts):
        raise ValueError(
            f"the processes do not train the same: they differ in {', '.join(others)}; give all of them the same "
            "flags, files and versions"
        )


def _digest(params: Any) -> str:
    """A digest of parameters, where there are processes to compare."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(params) if jax.process_count() > 1 else ():
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def _shapes(
    model: nnx.Module, optimizer: optax.GradientTransformation, *, average: bool
) -> tuple[nnx.GraphDef, TrainState]:
    """`start` of a model of shapes: none of its arrays is made."""
    graph, params = nnx.split(model, nnx.Param)
    return graph, jax.eval_shape(lambda params: start(nnx.merge(graph, params), optimizer, average=average)[1], params)


def _spread(shapes: TrainState, placed: Placed) -> TrainState:
    """The shapes of a state with where each array is to lie, so that no device has to hold more than its share."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        shapes,
        placed.shardings(shapes),
    )


def _noted(before: str, done: int, changes: list[str]) -> str:
    """What was changed on the way, a line each."""
    if changes:
        log.warning("goes on otherwise than before (there and here): %s", "; ".join(changes))
    return before + "".join(f"after {done} updates: {change}\n" for change in changes)


def _check_steps(latest: int, experiment: Experiment) -> None:
    if latest > experiment.steps:
        raise ValueError(f"steps ({experiment.steps}) must be at least the {latest} updates that {experiment.run} has")


def _batches(experiment: Experiment, rows: list[Example], placed: Placed) -> grain.MapDataset:
    return stream(
        experiment.batches,
        rows,
        seed=experiment.seed,
        multiple=placed.rows * experiment.pieces,
        lengths=placed.lengths,
        part=placed.part,
    )


_VERSIONED = ("jax", "jaxlib", "flax", "optax", "grain", "numpy", "tokenizers")
"""Packages that decide what is computed, or in which order."""


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in _VERSIONED}


def _other_versions(saved: dict[str, str]) -> str:
    """What is not as it was, in words."""
    others = {name: now for name, now in _versions().items() if saved.get(name, now) != now}
    return ", ".join(f"{name} {saved[name]}, now {now}" for name, now in others.items())


def _examples(experiment: Experiment, objective: Objective, splits: dict[str, Dataset], model: Any) -> list[Example]:
    """The examples of the training split.

    Raises:
        ValueError: a text of any split has a label that is not known, or more tokens than the model has learned
            positions, by the longest of them.
    """
    limits = ", ".join(f"{flag} ({most})" for flag, most in _learned(experiment.model, "--model"))
    beyond: list[tuple[int, int, str]] = []
    rows = {name: objective.examples(splits[name]) for name in splits if name == "train" or limits or objective.labels}
    for name, examples in rows.items():
        for source, target in examples if limits else ():
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
    return rows["train"]


def _learned(config: Any, flag: str) -> Iterator[tuple[str, int]]:
    """How many learned positions a config asks for, by the flags that say so."""
    if isinstance(config, Learned):
        yield f"{flag}.max-length", config.max_length
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from _learned(getattr(config, field.name), f"{flag}.{field.name.replace('_', '-')}")
