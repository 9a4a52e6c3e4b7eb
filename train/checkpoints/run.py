"""Run folders: loading a trained model, and rules for resuming with other settings."""

import contextlib
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
from datasets import Dataset
from flax import nnx

from seqattn.checks import check_integer
from seqattn.interop import model_type
from seqattn.models import EncoderConfig, TextLabels, TokenLabels
from train.checkpoints import averaging
from train.checkpoints.checkpoints import Checkpoints, MissingStep
from train.config import FROM_DATA, FROM_TOKENIZER, Experiment, Model, decode, differences, encode
from train.data import saved_tokenizer
from train.data.texts import Texts
from train.data.tokenizer import Tokenizer
from train.devices.processes import Processes
from train.tasks.task import Task
from train.update.freezing import freeze
from train.update.step import TrainState, start_shapes, weights

PARAMETERS = "model.safetensors"
"""A file that only the folder of an exported model has, and no run folder."""

CONFIG = "config.json"
"""The file with the resolved config of a run."""

RESULTS = "results.json"
"""The file for the results of a finished run on the test split."""

_TRIES = 5

_SHOWN = (
    *("run", "log_every", "tensorboard", "wandb", "profile", "bleu", "average", "beam_size"),
    *("keep_best", "max_skipped", "parallel", "processes", "data_cache", "accept_changes"),
)
_FREE = (*_SHOWN, "evaluate_every", "evaluate_examples", "keep_checkpoints")
"""Fields that a resumed run may change freely: they affect what is shown and kept, not the parameters.

Another number of devices changes dropout and rounding, and the batches if their rows do not divide.
"""
_CHANGEABLE = (
    *("steps", "optimizer", "batches", "label_smoothing", "pieces", "compute_dtype", "seed"),
    *("patience", "keep_checkpoints", "evaluate_every", "evaluate_examples"),
)
"""Fields that a resumed run may change with `--accept-changes`. No single command can repeat such a run."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model loaded from a run folder.

    Attributes:
        folder: the run folder.
        experiment: the resolved config.
        tokenizer: the tokenizer of the run.
        labels: the labels of a classifier or tagger in the order of their ids; empty for other models.
        step: number of updates of the parameters.
        model: the model with the trained parameters.
        data: the digest of the examples, as from `fingerprint`.
        average: number of checkpoints in the mean of the parameters; 1 for the latest alone.
        source: the digest of the source of the task, as from `task_source`; "" if it is not known.
    """

    folder: Path
    experiment: Experiment
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    step: int
    model: Any
    data: str
    average: int = 1
    source: str = ""

    def splits(self) -> dict[str, Dataset]:
        """Loads the examples of the task, by split.

        Raises:
            ValueError: the data changed since training, so splits may leak: the model may have seen test examples.
        """
        splits = self.experiment.task.load()
        if fingerprint(splits) != self.data:
            raise ValueError(
                f"the data changed since {self.folder} was trained, so its test split may contain training examples; "
                "restore the data, give the --experiment that it was trained with, or train again in another folder"
            )
        return splits


def build(config: Model, *, seed: int) -> nnx.Module:
    """Builds the model of a config, with parameters drawn from the seed."""
    return model_type(config)(config, rngs=nnx.Rngs(params=seed))


def starting(experiment: Experiment) -> dict[str, Any]:
    """The settings of an experiment for `train.update.step.start`, as keyword arguments."""
    return {"average": experiment.ema is not None, "adapters": experiment.adapters, "seed": experiment.seed}


def resolve(experiment: Experiment, tokenizer: Tokenizer, labels: tuple[str, ...]) -> Experiment:
    """Fills in the size of the vocabulary and the number of labels.

    Args:
        experiment: the experiment; its model may have `FROM_TOKENIZER` and `FROM_DATA`.
        tokenizer: the tokenizer of the run.
        labels: the labels in the training split.

    Returns:
        The experiment with a model config of fixed sizes.

    Raises:
        ValueError: the model's `vocab_size` is below that of the tokenizer, or `num_labels` differs from the data.
    """
    model = experiment.model
    if model.vocab_size == FROM_TOKENIZER:
        model = dataclasses.replace(model, vocab_size=tokenizer.vocab_size)
    if model.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size of the model ({model.vocab_size}) is below that of the tokenizer ({tokenizer.vocab_size})"
        )
    if isinstance(model, EncoderConfig) and isinstance(head := model.head, TokenLabels | TextLabels):
        head = dataclasses.replace(head, num_labels=len(labels)) if head.num_labels == FROM_DATA else head
        if head.num_labels != len(labels):
            raise ValueError(f"num_labels of the model ({head.num_labels}) must be that of the data ({len(labels)})")
        model = dataclasses.replace(model, head=head)
    return dataclasses.replace(experiment, model=model)


def fingerprint(splits: Mapping[str, Dataset] | Mapping[str, Texts]) -> str:
    """Computes a SHA-256 digest of all texts of all splits, in order, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for column in ("source", "target"):
            for text in splits[name][column]:
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def task_source(task: Task) -> str:
    """Computes a SHA-256 digest of the files that define the class of a task, in hexadecimal.

    Args:
        task: the task.

    Returns:
        The digest of the class's name and of the files of the class and of its base classes below `Task`. "" if a class
        has no file, as in a notebook.
    """
    digest = hashlib.sha256(type(task).__qualname__.encode())
    for kind in type(task).__mro__:
        if issubclass(kind, Task) and kind is not Task:
            file = getattr(sys.modules.get(kind.__module__), "__file__", None)
            if file is None or not Path(file).is_file():
                return ""
            digest.update(Path(file).read_bytes())
    return digest.hexdigest()


def spread(shapes: TrainState, shardings: Any) -> TrainState:
    """Adds to the shapes of a state the sharding of each array, so that each device restores its own part."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )


def to_text(experiment: Experiment) -> str:
    """Converts a resolved config to JSON text."""
    return json.dumps(encode(experiment), indent=2, ensure_ascii=False)


def shared(experiment: Experiment) -> str:
    """The settings that all processes of a run must share, as JSON: all but `processes` and paths of files."""
    return json.dumps(_without_paths(encode(dataclasses.replace(experiment, processes=Processes())), "a path"))


def changes(folder: Path, saved: str, experiment: Experiment) -> list[str]:
    """Lists the changed settings that affect the parameters, compared with a saved config.

    The paths of a task's files do not count, since their texts have a digest.

    Args:
        folder: the run folder, for the message.
        saved: the config in the latest checkpoint, as JSON.
        experiment: the resolved experiment.

    Returns:
        A line for each change with both values; empty if there is none.

    Raises:
        ValueError: a setting changed that may not change, or changed settings lack `--accept-changes`.
    """
    # Decoded and encoded again, so that fields added since then have their defaults.
    before, now = encode(decode(json.loads(saved))), encode(experiment)
    before["task"], now["task"] = _without_paths(before["task"]), _without_paths(now["task"])
    # With patience, evaluations decide when training stops, so their settings affect the parameters.
    free = _FREE if experiment.patience is None else _SHOWN
    wrong = [line for line in differences(before, now) if re.split(r"[.:]", line)[0] not in free]
    others = [line for line in wrong if re.split(r"[.:]", line)[0] not in _CHANGEABLE]
    if wrong and (others or not experiment.accept_changes):
        changeable = "" if others else ", or --accept-changes True to resume with changed settings"
        raise ValueError(
            f"{folder} holds a run with other settings (there and here):\n  "
            + "\n  ".join(wrong)
            + f"\nGive the same flags to resume it, or another folder with --run{changeable}"
        )
    return wrong


def _without_paths(value: Any, instead: str | None = None) -> Any:
    """Replaces every path in an encoded config."""
    if isinstance(value, dict):
        inner = {name: _without_paths(item, instead) for name, item in value.items()}
        return instead if value.get("type") == "Path" else inner
    return [_without_paths(item, instead) for item in value] if isinstance(value, list) else value


def regular(steps: Iterable[int], experiment: Experiment) -> list[int]:
    """The steps that an uninterrupted run would have saved too."""
    return [step for step in steps if step % experiment.evaluate_every == 0 or step == experiment.steps]


def judged_by(folder: Path, step: int) -> tuple[int, int]:
    """The settings of a run's results on the test split.

    Args:
        folder: the run folder.
        step: the number of updates of its latest checkpoint.

    Returns:
        The number of averaged checkpoints and the number of hypotheses per text; `(1, 1)` if the run has no results
        for this step, because it was stopped or still trains.
    """
    file = folder / RESULTS
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return (found.get("average", 1), found.get("beam_size", 1)) if found.get("steps") == step else (1, 1)


def load(folder: Path, *, average: int | None = None, shardings: Callable[[TrainState], Any] | None = None) -> Run:
    """Loads the latest model of a run folder, even while the run is training.

    Args:
        folder: the run folder.
        average: the number of latest checkpoints to average. By default as many as for the run's results, or fewer if
            some of them are damaged; only the latest checkpoint if the run has no results yet.
        shardings: returns the sharding of each array of a state of shapes, for a model that no device holds whole. By
            default the model is on the default device.

    Returns:
        The model with config, tokenizer and labels.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: `average` is below 1 or above the number of valid checkpoints, or the folder is an exported model.
    """
    if average is not None:
        check_integer("average", average, 1)
    for _ in range(_TRIES - 1):
        # A run that is training may remove a checkpoint while it is read here. By then it has saved a newer one.
        with contextlib.suppress(MissingStep):
            return _load(folder, average, shardings)
    return _load(folder, average, shardings)


def describe(folder: Path) -> tuple[Experiment, Tokenizer, tuple[str, ...]]:
    """Loads config, tokenizer and labels of a run folder, without its arrays.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: the folder is an exported model.
    """
    checkpoints, latest = _opened(folder)
    with checkpoints:
        texts = checkpoints.texts(latest)
    labels = tuple(json.loads(texts.get("labels", "[]")))
    return decode(json.loads(texts["config"])), saved_tokenizer.from_json(texts["tokenizer"]), labels


def _opened(folder: Path) -> tuple[Checkpoints, int]:
    """The checkpoints of a run folder and the latest step."""
    if (folder / PARAMETERS).exists():
        raise ValueError(f"{folder} is an exported model and holds no checkpoints: give the folder of its run")
    checkpoints = Checkpoints(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    latest = None if checkpoints is None else checkpoints.latest
    if checkpoints is None or latest is None:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint; train it with python -m train EXPERIMENT --run {folder}"
        )
    return checkpoints, latest


def _load(folder: Path, average: int | None, shardings: Callable[[TrainState], Any] | None) -> Run:
    checkpoints, latest = _opened(folder)
    experiment: Experiment = decode(json.loads(checkpoints.texts(latest)["config"]))
    if average is None:
        wanted = judged_by(folder, latest)[0]
        # Checkpoints damaged since then are left out; a warning has named them.
        average = 1 if wanted == 1 else max(1, min(wanted, len(regular(checkpoints.steps, experiment))))
    steps = [latest] if average == 1 else regular(checkpoints.steps, experiment)[-average:]
    if len(steps) < average:
        raise ValueError(
            f"average ({average}) must be at most {len(steps)}, the number of checkpoints that {folder} holds; keep "
            "more with --keep-checkpoints"
        )
    texts = checkpoints.texts(steps[-1])
    optimizer = freeze(experiment.optimizer.make(experiment.steps), experiment.frozen)
    model = nnx.eval_shape(lambda: build(experiment.model, seed=0))
    graph, shapes = start_shapes(model, optimizer, **starting(experiment))
    like = shapes if shardings is None else spread(shapes, shardings(shapes))
    # A generator, so that only one state is in memory at a time.
    states = (checkpoints.restore(like, step) for step in steps)
    params = averaging.average(weights(state) for state in states)
    checkpoints.close()
    labels = tuple(json.loads(texts.get("labels", "[]")))
    tokenizer = saved_tokenizer.from_json(texts["tokenizer"])
    return Run(
        folder=folder,
        experiment=experiment,
        tokenizer=tokenizer,
        labels=labels,
        step=steps[-1],
        model=nnx.merge(graph, params),
        data=texts["data"],
        average=average,
        source=texts.get("source", ""),
    )
