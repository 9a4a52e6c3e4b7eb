"""What `--start-from` names: a run folder, an exported model, or hf:FOLDER, a model of Hugging Face transformers."""

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optax
from flax import nnx

from seqattn.interop import ModelConfig
from seqattn.interop.codec import from_json
from seqattn.interop.huggingface import from_huggingface
from seqattn.models import EncoderConfig, TextLabels, TokenLabels
from train.checkpoints import run
from train.config import Experiment
from train.data import saved_tokenizer
from train.data.tokenizer import SavedTokenizer, Tokenizer, TokenizerConfig
from train.hub import exported, hf_folder
from train.hub.pretrained import load_config, opened
from train.update.step import TrainState, start_shapes

Shardings = Callable[[TrainState], Any]
"""Returns the sharding of each array of a state; see `train.checkpoints.run.load`."""


@dataclasses.dataclass(frozen=True)
class Origin:
    """A trained model to start from, whose arrays are not read yet.

    Attributes:
        name: what the user gave, for messages.
        config: the config of the model.
        tokenizer: the tokenizer of the model.
        tokenizer_config: the settings of that tokenizer.
        labels: the labels in the order of their ids; empty if the model gives none or they are not known.
        load: loads the model. Given shardings, no device holds the whole of it: its arrays are on the host, or where
            the shardings say.
    """

    name: str
    config: ModelConfig
    tokenizer: Tokenizer
    tokenizer_config: TokenizerConfig
    labels: tuple[str, ...]
    load: Callable[[Shardings | None], nnx.Module]


def read(start_from: Path) -> Origin:
    """Reads what a folder says about its model.

    Args:
        start_from: a run folder or the folder of an exported model, or "hf:" and a folder of transformers.

    Raises:
        FileNotFoundError: the folder or one of its files is missing, or a run has no checkpoint.
        ValueError: a file is damaged, or transformers has a model there that we lack. The message names the file.
    """
    name = str(start_from)
    if hf_folder.is_hf(start_from):
        return _transformers(start_from)
    if exported.is_exported(start_from):
        config, tokenizer, labels = exported.describe(start_from, max_parameters=sys.maxsize)
        saved = SavedTokenizer(start_from / exported.TOKENIZER)

        def load(shardings: Shardings | None) -> Any:
            place = None if shardings is None else _on_host
            return exported.load(start_from, max_parameters=sys.maxsize, place=place).model

        return Origin(name, config, tokenizer, saved, labels, load)
    experiment, tokenizer, labels = run.describe(start_from)

    def restore(shardings: Shardings | None) -> Any:
        return run.load(start_from, average=1, shardings=shardings).model

    return Origin(name, experiment.model, tokenizer, experiment.tokenizer, labels, restore)


def adopt(experiment: Experiment, start_from: Path, folder: Path) -> Experiment:
    """Gives an experiment the model of the folder to start from.

    Args:
        experiment: the experiment. If it trains an encoder with another kind of head than that model has, or with
            labels, its head or its number of labels stays.
        start_from: as in `read`.
        folder: the run folder of the experiment. If it holds a run that started there, its model is taken, and
            `start_from` is not read.

    Returns:
        The experiment with `start_from` and that model, or with its own model if there is no such folder.

    Raises:
        ValueError: as `read`.
    """
    experiment = dataclasses.replace(experiment, start_from=start_from)
    begun = _object(folder / run.CONFIG)
    origin = (begun.get("start_from") or {}).get("value")
    if origin == str(start_from):
        return dataclasses.replace(experiment, model=from_json(begun["model"], ModelConfig))
    if hf_folder.is_hf(start_from):
        config: Any = None
        # `read` says what is missing, once the run begins.
        with contextlib.suppress(FileNotFoundError):
            config = _transformers(start_from).config
    else:
        values = _object(start_from / run.CONFIG).get("model")
        config = None if values is None else from_json(values, ModelConfig)
    if config is None:
        return experiment
    return dataclasses.replace(experiment, model=_with_head(config, experiment.model))


def _with_head(config: Any, own: Any) -> Any:
    """The config with the head of another one, if that is for another task, or with its number of labels."""
    if not (isinstance(config, EncoderConfig) and isinstance(own, EncoderConfig)):
        return config
    head: Any = config.head if type(config.head) is type(own.head) else own.head
    if isinstance(own.head, TokenLabels | TextLabels):
        head = dataclasses.replace(head, num_labels=own.head.num_labels)
    return dataclasses.replace(config, head=head)


def _transformers(start_from: Path) -> Origin:
    folder = hf_folder.folder_of(start_from)
    try:
        config = load_config(folder)
    except NotImplementedError as error:
        raise ValueError(str(error)) from error
    tokenizer = saved_tokenizer.from_folder(folder, decodes=not isinstance(config, EncoderConfig))

    def load(shardings: Shardings | None) -> Any:
        def places(model: nnx.Module) -> Any:
            assert shardings is not None
            return shardings(start_shapes(model, optax.identity())[1]).params

        with opened(folder) as (fields, arrays):
            return from_huggingface(fields, arrays, shardings=None if shardings is None else places)

    labels = hf_folder.labels_of(folder, config)
    return Origin(str(start_from), config, tokenizer, SavedTokenizer(folder), labels, load)


def _on_host(path: str, array: Any) -> Any:
    """Leaves an array on the host: `Placed.draw` puts each where it belongs."""
    del path
    return array


def _object(file: Path) -> dict[str, Any]:
    """The content of a JSON file that this program wrote; empty if there is none."""
    if not file.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return found
