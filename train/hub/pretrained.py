"""Folders of Hugging Face transformers, read and written: `config.json` and `model.safetensors`, whole or in shards.

Nothing of a folder is executed. Pickles, such as `pytorch_model.bin`, are not opened.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax.typing import DTypeLike

from seqattn.interop import ModelConfig
from seqattn.interop.codec import shown
from seqattn.interop.huggingface import from_huggingface, huggingface_config, to_huggingface
from seqattn.interop.huggingface.convert import Place
from seqattn.interop.huggingface.fields import TEXTS
from train.hub.exported import check_free

CONFIG, PARAMETERS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("added_tokens.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "target_vocab.json", "chat_template.jinja", "chat_template.json"),
)
"""Files that `save_pretrained` copies: tokenizers and defaults of decoding."""
_LARGEST = 2**26
"""Maximum size of a JSON file in bytes."""


def load_pretrained(folder: Path | str, *, param_dtype: DTypeLike = jnp.float32, place: Place | None = None) -> Any:
    """Loads a model that transformers saved, as a model of this library.

    Arrays are read one at a time, so beside the model there is never more than one of them in memory.

    Args:
        folder: the folder, with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and shards.
        param_dtype: dtype of the parameters.
        place: as in `from_huggingface`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        NotImplementedError: the family or one of its choices is one that we lack.
        ValueError: a file is damaged, there is only a pickle, or files do not fit together. The message names the file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing: the folder does not contain a model of transformers")
    fields = _object(config)
    with _Stored(folder) as arrays:
        try:
            return from_huggingface(fields, arrays, param_dtype=param_dtype, place=place)
        except (NotImplementedError, ValueError) as error:
            raise type(error)(f"{folder}: {error}") from error


def save_pretrained(model: Any, family: str, folder: Path | str, *, like: Path | str | None = None) -> None:
    """Saves a model as a folder that transformers loads, completely or not at all.

    Args:
        model: a model of this library.
        family: the name of the family, such as "t5".
        folder: the folder, which must be new or empty.
        like: a folder of transformers whose tokenizer, defaults of decoding and numbers of special tokens are copied.

    Raises:
        FileExistsError: the folder is a file or is not empty.
        ValueError: the family has no model like this one, or `like` has numbers of tokens or labels of another model.
    """
    folder = Path(folder).resolve()
    check_free(folder)
    fields, arrays = to_huggingface(model, family)
    if like is not None:
        fields = _as_in(Path(like) / CONFIG, fields, model.config)
    fields["dtype"] = next(iter(arrays.values())).dtype.name
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    beside.mkdir()
    try:
        (beside / CONFIG).write_text(json.dumps(fields, indent=2, sort_keys=True, allow_nan=False) + "\n", "utf-8")
        # transformers reads only files that say for which library they are.
        safetensors.numpy.save_file(arrays, beside / PARAMETERS, metadata={"format": "pt"})
        # safetensors makes the file readable by its owner only.
        (beside / PARAMETERS).chmod((beside / CONFIG).stat().st_mode)
        for name in _BESIDE if like is not None else ():
            if (source := Path(like or "") / name).is_file():
                shutil.copyfile(source, beside / name)
        beside.rename(folder)  # atomic; fails if the folder has files by now
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _as_in(path: Path, fields: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns fields with those of another config for labels, tokens and decoding."""
    given = _object(path)
    taken = fields | {name: given[name] for name in given.keys() & TEXTS}
    # In some families a number of labels or of the padding token does change the model.
    try:
        fits, reason = huggingface_config(taken) == config, "they give another config"
    except (NotImplementedError, ValueError) as error:
        fits, reason = False, str(error)
    if not fits:
        raise ValueError(f"{path} has numbers of tokens or labels that do not fit the model: {reason}")
    return taken


class _Stored(Mapping[str, np.ndarray]):
    """The arrays of a folder by name. Each is read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, contextlib.ExitStack()
        self._opened: dict[str, Any] = {}
        self._file_of = _files(folder)

    def __enter__(self) -> Self:
        try:
            for name in dict.fromkeys(self._file_of.values()) or (PARAMETERS,):
                self._opened[name] = self._files.enter_context(_open(self._folder / name))
            # Without an index, all arrays are in one file.
            self._file_of = self._file_of or dict.fromkeys(self._opened[PARAMETERS].keys(), PARAMETERS)
            self._check()
        except BaseException:
            self._files.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._files.close()

    def __getitem__(self, name: str) -> np.ndarray:
        array: np.ndarray = self._opened[self._file_of[name]].get_tensor(name)
        return array

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)

    def _check(self) -> None:
        """Checks that every array is where the index says, before any is read."""
        held = {file: set(opened.keys()) for file, opened in self._opened.items()}
        for name, file in self._file_of.items():
            if name not in held[file]:
                raise ValueError(f"{self._folder / file} must hold {name}, as {INDEX} says")


def _files(folder: Path) -> dict[str, str]:
    """Returns the file of each array, as the index says. Empty if all arrays are in one file.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: there is only a pickle, or the index is damaged.
    """
    if (folder / PARAMETERS).is_file():
        return {}
    index = folder / INDEX
    if not index.is_file():
        pickles = sorted(path.name for path in folder.glob("pytorch_model*.bin"))
        if pickles:
            raise ValueError(
                f"{folder / pickles[0]} is a pickle, which can run code, and is not opened: convert it where "
                'transformers is installed, with AutoModel.from_pretrained("FOLDER").save_pretrained("NEW_FOLDER"), '
                "with the class that its config names in place of AutoModel"
            )
        raise FileNotFoundError(f"{folder / PARAMETERS} is missing, and {INDEX} too")
    named = _object(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index}: weight_map must name the file of each array")
    for name, file in named.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: the file of {name} must be the name of a safetensors file, got {shown(file)}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing: it holds {name}, as {INDEX} says")
    return named


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Any]:
    try:
        opened = safetensors.safe_open(path, framework="np")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is damaged, or no safetensors file: {error}") from error
    with opened as file:
        yield file


def _object(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} must have at most {_LARGEST:,} bytes, got {path.stat().st_size:,}")
    try:
        found = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(found).__name__}")
    return found
