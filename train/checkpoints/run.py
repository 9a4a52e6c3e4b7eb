"""A run folder: what training writes there, and what translating and evaluating read."""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from datasets import Dataset
from flax import nnx

from seqattn.checks import check_integer
from seqattn.interop import model_type
from seqattn.models import EncoderConfig, TextLabels, TokenLabels
from train.checkpoints import averaging
from train.checkpoints.checkpoints import Checkpoints, MissingStep
from train.config import FROM_DATA, FROM_TOKENIZER, Experiment, Model, decode, differences, encode
from train.data.tokenizer import Tokenizer
from train.devices.processes import Processes
from train.update.freezing import freeze
from train.update.step import start

PARAMETERS = "model.safetensors"
"""What the folder of an exported model holds, and no run folder."""

RESULTS = "results.json"
"""What a run that came to its end has found on the test split."""

_TRIES = 5

_SHOWN = (
    *("run", "log_every", "tensorboard", "wandb", "profile", "bleu", "average", "beam_size"),
    *("keep_best", "max_skipped", "parallel", "processes", "accept_changes"),
)
_FREE = (*_SHOWN, "evaluate_every", "evaluate_examples", "keep_checkpoints")
"""Fields in which a resumed run may differ: they change what is shown and kept, not the parameters.

On another number of devices dropout, rounding and, where their rows do not divide, batches are others.
"""
_CHANGEABLE = (
    *("steps", "optimizer", "batches", "label_smoothing", "pieces", "compute_dtype", "seed"),
    *("patience", "keep_checkpoints", "evaluate_every", "evaluate_examples"),
)
"""Those that may differ where the user says so, at the price of a run that no single command repeats."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A trained model as it lies in a run folder.

    Attributes:
        folder: the run folder.
        experiment: its resolved config.
        tokenizer: its tokenizer.
        labels: the labels of a model that gives labels, in the order of their ids.
        step: updates that the parameters have seen.
        model: the model with these parameters.
        data: the digest of the examples.
        average: of how many checkpoints its parameters are the mean.
    """

    folder: Path
    experiment: Experiment
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    step: int
    model: Any
    data: str
    average: int = 1

    def splits(self) -> dict[str, Dataset]:
        """The examples of its task, by split.

        Raises:
            ValueError: they are others than those of its training, by which it may have seen those of another split.
        """
        splits = self.experiment.task.load()
        if fingerprint(splits) != self.data:
            raise ValueError(
                f"the examples are not those that {self.folder} was trained with, so that no split is known to be "
                "unseen; bring back the data, or the --experiment that it was trained by, or train anew in another "
                "folder"
            )
        return splits


def build(config: Model, *, seed: int) -> nnx.Module:
    """The model of a config, with parameters drawn from the seed."""
    return model_type(config)(config, rngs=nnx.Rngs(params=seed))


def resolve(experiment: Experiment, tokenizer: Tokenizer, labels: tuple[str, ...]) -> Experiment:
    """The experiment with the size of the vocabulary and the number of labels filled in.

    Raises:
        ValueError: the model's table is smaller than the vocabulary, or its labels are not as many as there are.
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


def fingerprint(splits: Mapping[str, Dataset]) -> str:
    """A digest of every text of every split, in order."""
    digest = hashlib.sha256()
    for name in sorted(splits):
        for column in ("source", "target"):
            for text in splits[name][column]:
                digest.update(text.encode("utf-8", "surrogatepass") + b"\0")
    return digest.hexdigest()


def to_text(experiment: Experiment) -> str:
    """The resolved config as JSON."""
    return json.dumps(encode(experiment), indent=2, ensure_ascii=False)


def shared(experiment: Experiment) -> str:
    """As JSON what all processes of a run must have been given alike: all but who they are, and where files lie."""
    return json.dumps(_without_paths(encode(dataclasses.replace(experiment, processes=Processes())), "a path"))


def changes(folder: Path, saved: str, experiment: Experiment) -> list[str]:
    """What decides the parameters and is otherwise in the experiment than in a saved config, where that is accepted.

    Where the files of a task lie does not: their texts have a digest.

    Raises:
        ValueError: something is otherwise that is not accepted; the message names it.
    """
    # Decoded first: what was added since has its default there.
    before, now = encode(decode(json.loads(saved))), encode(experiment)
    before["task"], now["task"] = _without_paths(before["task"]), _without_paths(now["task"])
    # With patience it is the evaluations that decide where training stops.
    free = _FREE if experiment.patience is None else _SHOWN
    wrong = [line for line in differences(before, now) if re.split(r"[.:]", line)[0] not in free]
    others = [line for line in wrong if re.split(r"[.:]", line)[0] not in _CHANGEABLE]
    if wrong and (others or not experiment.accept_changes):
        changeable = "" if others else ", or --accept-changes True to go on otherwise"
        raise ValueError(
            f"{folder} holds a run with another configuration (there and here):\n  "
            + "\n  ".join(wrong)
            + f"\nGive the same flags to resume it, or another folder with --run{changeable}"
        )
    return wrong


def _without_paths(value: Any, instead: str | None = None) -> Any:
    """An encoded config with something else in place of every path."""
    if isinstance(value, dict):
        inner = {name: _without_paths(item, instead) for name, item in value.items()}
        return instead if value.get("type") == "Path" else inner
    return [_without_paths(item, instead) for item in value] if isinstance(value, list) else value


def regular(steps: Iterable[int], experiment: Experiment) -> list[int]:
    """Of saved steps those that a run saves that is never interrupted."""
    return [step for step in steps if step % experiment.evaluate_every == 0 or step == experiment.steps]


def judged_by(folder: Path, step: int) -> tuple[int, int]:
    """By the mean of how many checkpoints, and how many hypotheses, a run judged the test split after so many updates.

    1 and 1 where it did not: it goes on, or was stopped.
    """
    file = folder / RESULTS
    found = json.loads(file.read_text("utf-8")) if file.exists() else {}
    return (found.get("average", 1), found.get("beam_size", 1)) if found.get("steps") == step else (1, 1)


def load(folder: Path, *, average: int | None = None) -> Run:
    """The latest model of a run folder, also while it is being trained.

    Args:
        folder: the run folder.
        average: the parameters are the mean of those of so many of the latest checkpoints; by default of as many as the
            run's figures are of, so far as there are so many that verify, and the latest alone before it has figures.

    Raises:
        FileNotFoundError: the folder holds no checkpoint.
        ValueError: average is below 1, or the folder holds fewer checkpoints.
    """
    if average is not None:
        check_integer("average", average, 1)
    for _ in range(_TRIES - 1):
        # Training goes on meanwhile: what it has removed is followed by something newer.
        with contextlib.suppress(MissingStep):
            return _load(folder, average)
    return _load(folder, average)


def _load(folder: Path, average: int | None) -> Run:
    if (folder / PARAMETERS).exists():
        raise ValueError(f"{folder} is an exported model and holds no checkpoints: give the folder of its run")
    checkpoints = Checkpoints(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    latest = None if checkpoints is None else checkpoints.latest
    if checkpoints is None or latest is None:
        raise FileNotFoundError(
            f"{folder} holds no checkpoint; train it with python -m train EXPERIMENT --run {folder}"
        )
    experiment: Experiment = decode(json.loads(checkpoints.texts(latest)["config"]))
    if average is None:
        wanted = judged_by(folder, latest)[0]
        # What was damaged since is in no mean; a warning has named it.
        average = 1 if wanted == 1 else max(1, min(wanted, len(regular(checkpoints.steps, experiment))))
    steps = [latest] if average == 1 else regular(checkpoints.steps, experiment)[-average:]
    if len(steps) < average:
        raise ValueError(
            f"average ({average}) must be at most {len(steps)}, the number of checkpoints that {folder} holds; more of "
            "them stay with --keep-checkpoints"
        )
    texts = checkpoints.texts(steps[-1])
    optimizer = freeze(experiment.optimizer.make(experiment.steps), experiment.frozen)
    graph, fresh = start(build(experiment.model, seed=0), optimizer, average=experiment.ema is not None)
    states = (checkpoints.restore(fresh, step) for step in steps)
    params = averaging.average(state.params if state.average is None else state.average for state in states)
    checkpoints.close()
    labels = tuple(json.loads(texts.get("labels", "[]")))
    tokenizer = Tokenizer.from_json(texts["tokenizer"])
    return Run(folder, experiment, tokenizer, labels, steps[-1], nnx.merge(graph, params), texts["data"], average)
