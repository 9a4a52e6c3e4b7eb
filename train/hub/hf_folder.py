"""Folders of Hugging Face transformers as trained models: `hf:FOLDER`, or `hf:NAME` of the hub."""

from pathlib import Path

import huggingface_hub
import jax.numpy as jnp
from jax.typing import DTypeLike

from seqattn.interop import ModelConfig
from seqattn.interop.codec import shown
from seqattn.models import EncoderConfig, LanguageModelConfig, TextLabels, TokenLabels
from train import objectives
from train.data import saved_tokenizer
from train.data.json_files import read_object
from train.hub.exported import Exported
from train.hub.generation_config import decoding_of
from train.hub.pretrained import load_pretrained
from train.inference.decoding import Decoding

PREFIX = "hf:"
_FILES = ("*.json", "*.safetensors", "*.spm")


def is_hf(folder: Path | str) -> bool:
    """Whether a path names a folder of transformers, with `hf:` before it."""
    return str(folder).startswith(PREFIX)


def folder_of(path: Path | str) -> Path:
    """Returns the folder of `hf:FOLDER`, or downloads `hf:NAME` from the hub.

    Downloads are kept by huggingface_hub, so that the next call needs no network.

    Raises:
        FileNotFoundError: there is no such folder, and none on the hub that can be reached.
    """
    name = str(path).removeprefix(PREFIX)
    if name and Path(name).is_dir():
        return Path(name)
    try:
        huggingface_hub.utils.validate_repo_id(name)
        if name.count("/") != 1:
            raise ValueError(f"{name} is no name of a model of the hub")
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_FILES)))
    except (OSError, ValueError, huggingface_hub.errors.HTTPError) as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(f"{name} is not a folder, and the hub gives no model of this name: {reason}") from error


def load(path: Path | str, *, param_dtype: DTypeLike = jnp.float32) -> Exported:
    """Loads model, tokenizer, labels and defaults of decoding of a folder of transformers.

    Args:
        path: `hf:FOLDER`, or `hf:NAME` of the hub.
        param_dtype: dtype of the parameters.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: the family or a choice is one that we lack, a file is damaged, or files do not fit together. The
            message names the file.
    """
    folder = folder_of(path)
    try:
        model = load_pretrained(folder, param_dtype=param_dtype)
    except NotImplementedError as error:
        raise ValueError(str(error)) from error
    config = model.config
    decodes = not isinstance(config, EncoderConfig)
    tokenizer = saved_tokenizer.from_folder(folder, decodes=decodes)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: it has {tokenizer.vocab_size} tokens, but the model has only "
            f"{config.vocab_size}"
        )
    decoder_only = isinstance(config, LanguageModelConfig)
    decoding = decoding_of(folder, decoder_only=decoder_only) if decodes else Decoding()
    if decoding.banned and max(decoding.banned) >= config.vocab_size:
        raise ValueError(
            f"{folder}: suppress_tokens and bad_words_ids must be below the vocabulary size ({config.vocab_size}), got "
            f"{max(decoding.banned)}"
        )
    labels = labels_of(folder, config)
    return Exported(folder, model, tokenizer, labels, _objective(config), step=0, decoding=decoding)


def _objective(config: ModelConfig) -> str:
    """The name of the objective: language models continue texts."""
    if isinstance(config, LanguageModelConfig):
        return objectives.Continuation.name
    served = objectives.serving(config)
    return served[0].name if served else ""


def labels_of(folder: Path, config: ModelConfig) -> tuple[str, ...]:
    """Reads the labels in the order of their ids, as `id2label` says; numbers if it says nothing.

    Args:
        folder: the folder.
        config: the config of its model; only one that gives labels has any.

    Raises:
        ValueError: there are other labels than the model has, or one is named twice.
    """
    head = config.head if isinstance(config, EncoderConfig) else None
    if not isinstance(head, TokenLabels | TextLabels):
        return ()
    path = folder / "config.json"
    named = read_object(path).get("id2label") or {str(n): str(n) for n in range(head.num_labels)}
    if not isinstance(named, dict) or not all(isinstance(label, str | int) for label in named.values()):
        raise ValueError(f"{path}: id2label must map ids to labels, got {shown(named)}")
    labels = tuple(str(named.get(str(number))) for number in range(head.num_labels))
    if len(named) != head.num_labels or len(set(labels)) != head.num_labels:
        raise ValueError(f"{path}: id2label must name {head.num_labels} different labels, got {named}")
    return labels
