"""Folders of Hugging Face transformers, read and written: `config.json` and `model.safetensors`, whole or in shards.

Nothing of a folder is executed. Pickles, such as `pytorch_model.bin`, are not opened.
"""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh
from jax.typing import DTypeLike

from seqattn.interop import ModelConfig
from seqattn.interop.codec import shown
from seqattn.interop.huggingface import from_huggingface, huggingface_config, to_huggingface
from seqattn.interop.huggingface.fields import TEXTS
from train.data.json_files import read_object
from train.devices.fit import parameter_shardings
from train.hub.exported import check_free
from train.hub.mapped import Mapped

CONFIG, PARAMETERS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json"),
    *("added_tokens.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("source.spm", "target.spm", "target_vocab.json", "chat_template.jinja", "chat_template.json"),
)
"""Files that `save_pretrained` copies: tokenizers and defaults of decoding."""


def load_pretrained(folder: Path | str, *, param_dtype: DTypeLike = jnp.float32, mesh: Mesh | None = None) -> Any:
    """Loads a model that transformers saved, as a model of this library.

    Arrays are views of the file, and each is copied once, to where it stays. Over a mesh, each process reads the parts
    of its own devices only.

    Args:
        folder: the folder, with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and shards.
        param_dtype: dtype of the parameters.
        mesh: a mesh as from `train.devices.parallel.Sharded.mesh`. The parameters are split over it as in training;
            see `train.devices.layout` for decoding. If None, all are on the default device.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        NotImplementedError: the family or one of its choices is one that we lack.
        ValueError: a file is damaged, there is only a pickle, or files do not fit together. The message names the file.
            Or the mesh has other axes, or axes that do not divide the heads of the model.
    """
    shardings = None if mesh is None else partial(parameter_shardings, mesh=mesh)
    with opened(Path(folder)) as (fields, arrays):
        return from_huggingface(fields, arrays, param_dtype=param_dtype, shardings=shardings)


def load_config(folder: Path | str) -> ModelConfig:
    """Loads the config of a model that transformers saved; reads at most two of its arrays.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        NotImplementedError: the family or one of its choices is one that we lack.
        ValueError: a file is damaged, or there is only a pickle. The message names the file.
    """
    with opened(Path(folder)) as (fields, arrays):
        return huggingface_config(fields, arrays)


@contextlib.contextmanager
def opened(folder: Path) -> Iterator[tuple[dict[str, Any], Mapping[str, np.ndarray]]]:
    """Gives the fields of a folder's config and its arrays, each of which is a view of a file.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a file is damaged, or there is only a pickle. Errors in the block name the folder, too.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    config = folder / CONFIG
    if not config.is_file():
        raise FileNotFoundError(f"{config} is missing: the folder does not contain a model of transformers")
    fields = read_object(config)
    arrays = _Stored(folder)
    try:
        yield fields, arrays
    except (NotImplementedError, ValueError) as error:
        raise type(error)(f"{folder}: {error}") from error


def save_pretrained(
    model: Any,
    family: str,
    folder: Path | str,
    *,
    like: Path | str | None = None,
    others: Mapping[str, str] = MappingProxyType({}),
) -> None:
    """Saves a model as a folder that transformers loads, completely or not at all.

    Args:
        model: a model of this library.
        family: the name of the family, such as "t5".
        folder: the folder, which must be new or empty.
        like: a folder of transformers whose tokenizer, defaults of decoding and numbers of special tokens are copied.
        others: content of further files by name, such as those of `train.hub.hf_export.files_of`.

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
        for name, text in others.items():
            (beside / name).write_text(text, "utf-8")
        beside.rename(folder)  # atomic; fails if the folder has files by now
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def _as_in(path: Path, fields: dict[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Returns fields with those of another config for labels, tokens and decoding."""
    given = read_object(path)
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
    """The arrays of a folder by name. Each is mapped into memory when it is asked for."""

    def __init__(self, folder: Path) -> None:
        files = _files(folder)
        opened = {name: Mapped(folder / name) for name in dict.fromkeys(files.values()) or (PARAMETERS,)}
        # Without an index, all arrays are in one file.
        files = files or dict.fromkeys(opened[PARAMETERS], PARAMETERS)
        # Checked before any array is read.
        for name, file in files.items():
            if name not in opened[file]:
                raise ValueError(f"{folder / file} must hold {name}, as {INDEX} says")
        self._file_of = {name: opened[file] for name, file in files.items()}

    def __getitem__(self, name: str) -> np.ndarray:
        return self._file_of[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


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
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict) or not named:
        raise ValueError(f"{index}: weight_map must name the file of each array")
    for name, file in named.items():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise ValueError(f"{index}: the file of {name} must be the name of a safetensors file, got {shown(file)}")
        if not (folder / file).is_file():
            raise FileNotFoundError(f"{folder / file} is missing: it holds {name}, as {INDEX} says")
    return named
