"""Exported models: a folder that can be read without checkpoints, training code or pickles.

The files of the folder:

- `config.json`: format, objective, labels, sizes and the config of the model (`seqattn.interop.from_dict`).
- `model.safetensors`: the parameters (`seqattn.interop.from_arrays`).
- `tokenizer.json`: the tokenizer, as its `to_json` writes it; our own are in the format of the tokenizers package.
- `forward.stablehlo`: optional; the logits as a program.
- `README.md`: the model card. It has no digest, because people edit it.
- `SHA256SUMS`: the digests of all other files, checked by `load` and by `sha256sum -c SHA256SUMS`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from seqattn.interop import ModelConfig, from_arrays, from_dict, to_arrays, to_dict
from seqattn.models import EncoderConfig, TextLabels, TokenLabels
from train import objectives
from train.checkpoints.run import PARAMETERS
from train.data import saved_tokenizer
from train.data.tokenizer import Tokenizer
from train.inference.decoding import Decoding

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
FORWARD, CARD, SUMS = "forward.stablehlo", "README.md", "SHA256SUMS"
FORMAT, VERSION = "seqattn", 1

_LARGEST = {CONFIG: 2**24, TOKENIZER: 2**28, SUMS: 2**16}
"""Maximum size in bytes; larger files are not read."""
_SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")
_PICKLES = frozenset(".bin .ckpt .dill .joblib .npy .npz .pickle .pkl .pt .pth".split())


@dataclasses.dataclass(frozen=True)
class Exported:
    """The content of an exported folder, before saving or after loading.

    Attributes:
        folder: path of the folder.
        model: the model, with its config as `model.config`.
        tokenizer: the tokenizer of the model.
        labels: for models that give labels, the labels in the order of their ids.
        objective: the objective of the training, by the name of a class of `train.objectives`; "" if there is none.
        step: number of updates of the parameters.
        decoding: how the model generates text by default.
    """

    folder: Path
    model: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    objective: str
    step: int
    decoding: Decoding = Decoding()


def is_exported(folder: Path) -> bool:
    """Whether a folder contains an exported model (and not a run)."""
    return (folder / PARAMETERS).exists()


def check_free(folder: Path) -> None:
    """Checks that a model can be exported to a folder.

    Raises:
        FileExistsError: the path is a file, or a folder that is not empty.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder that is new or empty")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a folder that is new or empty")


def save(exported: Exported, others: Mapping[str, bytes]) -> None:
    """Writes an exported model, completely or not at all.

    The files are written to a temporary folder beside the target, loaded again and compared bit by bit. Only then the
    folder is renamed.

    Args:
        exported: the model, with the path of the folder.
        others: content of further files by name, such as the model card.

    Raises:
        FileExistsError: the folder is not empty.
        ValueError: the model cannot be loaded again, or the data read back differ from the data written.
    """
    folder = exported.folder.resolve()
    check_free(folder)
    arrays = to_arrays(exported.model)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}-{os.getpid()}")
    beside.mkdir()
    try:
        _write(beside, exported, arrays, others)
        _compare(load(beside, max_parameters=sum(x.size for x in arrays.values())), exported, arrays)
        beside.rename(folder)  # atomic; also replaces an empty folder, and fails if the folder has files by now
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def load(
    folder: Path, *, max_parameters: int = 1_000_000_000, place: Callable[[str, Any], Any] | None = None
) -> Exported:
    """Loads an exported model. Loading runs no code from the folder, so the folder need not be trusted.

    Args:
        folder: the folder.
        max_parameters: maximum number of parameters of the model.
        place: as in `seqattn.interop.from_arrays`.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: a digest differs from `SHA256SUMS`, a link leaves the folder, or the content does not make a model.
            The message names the file and the rule.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not a folder")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            warnings.warn(f"{path} may hold a pickle, which can run code: it is not opened", stacklevel=2)
    # Digests first, so that no damaged file is parsed.
    check_digests(folder)
    header, config, tokenizer = _described(folder, max_parameters)
    with _naming(folder / PARAMETERS):
        arrays = _read_arrays(_inside(folder, PARAMETERS))
        model = from_arrays(config, arrays, place=place)
        if (count := sum(array.size for array in arrays.values())) != header["parameters"]:
            raise ValueError(f"it has {count:,} parameters, but {CONFIG} says {header['parameters']:,}")
    return Exported(folder, model, tokenizer, _labels(header["labels"], config), header["objective"], header["step"])


def describe(folder: Path, *, max_parameters: int = 1_000_000_000) -> tuple[ModelConfig, Tokenizer, tuple[str, ...]]:
    """Loads config, tokenizer and labels of an exported model; neither reads its arrays nor checks digests.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: the content of a file describes no model. The message names the file and the rule.
    """
    header, config, tokenizer = _described(folder, max_parameters)
    return config, tokenizer, _labels(header["labels"], config)


def _described(folder: Path, max_parameters: int) -> tuple[dict[str, Any], ModelConfig, Tokenizer]:
    with _naming(folder / CONFIG):
        header = _header(json.loads(_text(folder, CONFIG)))
        config = from_dict(header["model"], max_parameters=max_parameters)
        _labels(header["labels"], config)
        _check_objective(header["objective"], config)
    with _naming(folder / TOKENIZER):
        tokenizer = saved_tokenizer.from_json(_text(folder, TOKENIZER))
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"it has {tokenizer.vocab_size} tokens, but the model has only {config.vocab_size}")
    return header, config, tokenizer


def check_digests(folder: Path) -> list[str]:
    """Checks the digest of every file in `SHA256SUMS`, and returns the sorted names.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a digest differs, a line is malformed, or a file that `load` reads has no digest.
    """
    digests: dict[str, str] = {}
    for number, line in enumerate(_text(folder, SUMS).splitlines(), 1):
        found = _SUM.fullmatch(line)
        if found is None:
            raise ValueError(f"{folder / SUMS}, line {number}, must be a digest, two spaces and the name of a file")
        digests[found[2]] = found[1]
    for name in (CONFIG, PARAMETERS, TOKENIZER):
        if name not in digests:
            raise ValueError(f"{folder / SUMS} must have a digest of {name}")
    for name, digest in digests.items():
        if _digest(_inside(folder, name)) != digest:
            raise ValueError(f"{folder / name} is damaged or was changed: its SHA-256 is not that in {SUMS}")
    return sorted(digests)


def _write(folder: Path, exported: Exported, arrays: Mapping[str, np.ndarray], others: Mapping[str, bytes]) -> None:
    header = {
        "format": FORMAT,
        "version": VERSION,
        "objective": exported.objective,
        "step": exported.step,
        "parameters": sum(array.size for array in arrays.values()),
        "labels": list(exported.labels),
        "model": to_dict(exported.model.config),
    }
    (folder / CONFIG).write_text(json.dumps(header, indent=2, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    exported.tokenizer.save(folder / TOKENIZER)
    write_arrays(folder / PARAMETERS, arrays)
    # safetensors makes the file readable by its owner only.
    (folder / PARAMETERS).chmod((folder / CONFIG).stat().st_mode)
    for name, content in others.items():
        (folder / name).write_bytes(content)
    named = sorted(path.name for path in folder.iterdir() if path.name != CARD)
    (folder / SUMS).write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in named), "utf-8")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as safetensors, in C order: safetensors 0.8 writes non-contiguous arrays wrongly."""
    safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)


def _compare(saved: Exported, exported: Exported, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError if the model read back differs in any bit from the model to write."""
    again = to_arrays(saved.model)
    for name, array in arrays.items():
        if np.asarray(array, order="C").tobytes() != again[name].tobytes():
            raise ValueError(
                f"{PARAMETERS}: the values of {name} read back differ from those written: is the disk damaged?"
            )
    for name in ("labels", "objective", "step"):
        if getattr(saved, name) != getattr(exported, name):
            raise ValueError(f"{CONFIG}: {name} was read back as {getattr(saved, name)}, not {getattr(exported, name)}")
    if saved.model.config != exported.model.config or saved.tokenizer.to_json() != exported.tokenizer.to_json():
        raise ValueError("the config or the tokenizer read back differs from the one written")


def _header(header: Any) -> dict[str, Any]:
    fields = {"format": str, "version": int, "objective": str, "step": int, "parameters": int}
    fields |= {"labels": list, "model": dict}
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(f"its format must be {FORMAT}")
    if header.get("version") != VERSION:
        raise ValueError(f"its version must be {VERSION}: another version of seqattn wrote it")
    if header.keys() != fields.keys():
        raise ValueError(f"it must have the fields {', '.join(fields)}, and no others")
    for name, kind in fields.items():
        if type(header[name]) is not kind or (kind is int and header[name] < 0):
            raise ValueError(f"{name} must be of type {kind.__name__}, and not negative if it is a number")
    return header


def _labels(labels: list[Any], config: ModelConfig) -> tuple[str, ...]:
    head = config.head if isinstance(config, EncoderConfig) else None
    needed = head.num_labels if isinstance(head, TokenLabels | TextLabels) else 0
    if len(labels) != needed or len(set(map(str, labels))) != needed or not all(isinstance(x, str) for x in labels):
        raise ValueError(f"labels must be {needed} different strings, one for each of the model, got {len(labels)}")
    return tuple(labels)


def _check_objective(objective: str, config: ModelConfig) -> None:
    served = [kind.name for kind in objectives.serving(config)]
    if objective not in served:
        raise ValueError(f"the objective of a {type(config).__name__} must be {' or '.join(served)}")


def _read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from error


def _text(folder: Path, name: str) -> str:
    path = _inside(folder, name)
    if path.stat().st_size > _LARGEST[name]:
        raise ValueError(f"{path} must have at most {_LARGEST[name]:,} bytes, got {path.stat().st_size:,}")
    with _naming(path):
        return path.read_text("utf-8")


def _inside(folder: Path, name: str) -> Path:
    """Returns the path of a file of the folder; refuses links that leave the folder, and pipes."""
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the folder does not contain a complete model")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link that leaves the folder: replace it with a copy of its target, or download with "
            "hf download NAME --local-dir FOLDER"
        )
    if not path.is_file():
        raise ValueError(f"{path} must be a file")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turns errors in its block into ValueErrors that name the file."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{path}: its content is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
