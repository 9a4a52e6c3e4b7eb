"""A model as a folder that needs no checkpoint, no training code and no pickle to be read.

config.json         what it is: format, objective, labels, sizes and the model's config (`seqattn.interop.from_dict`)
model.safetensors   its parameters (`seqattn.interop.from_arrays`)
tokenizer.json      text to ids, in the format of the tokenizers package
forward.stablehlo   its logits as a program, where the user asked for it
README.md           the model card; people edit it, so it has no digest
SHA256SUMS          digests of all other files; `sha256sum -c SHA256SUMS` checks them, and so does `load`
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from seqattn.interop import ModelConfig, from_arrays, from_dict, to_arrays, to_dict
from seqattn.models import EncoderConfig, TextLabels, TokenLabels
from train import objectives
from train.checkpoints import run
from train.checkpoints.run import PARAMETERS, Run
from train.data.tokenizer import Tokenizer
from train.objectives import Objective

CONFIG, TOKENIZER = "config.json", "tokenizer.json"
FORWARD, CARD, SUMS = "forward.stablehlo", "README.md", "SHA256SUMS"
FORMAT, VERSION = "seqattn", 1

_LARGEST = {CONFIG: 2**24, TOKENIZER: 2**28, SUMS: 2**16}
"""Bytes: a file that is larger is not read."""
_SUM = re.compile(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)")
_PICKLES = frozenset(".bin .ckpt .dill .joblib .npy .npz .pickle .pkl .pt .pth".split())


@dataclasses.dataclass(frozen=True)
class Exported:
    """A model to be saved, or as it lies in an exported folder.

    Attributes:
        folder: the folder.
        model: the model; its `config` says what it is.
        tokenizer: its tokenizer.
        labels: the labels of a model that gives labels, in the order of their ids.
        objective: what the run was about: the name of a class of `train.objectives`.
        step: updates that the parameters have seen.
    """

    folder: Path
    model: Any
    tokenizer: Tokenizer
    labels: tuple[str, ...]
    objective: str
    step: int


def is_exported(folder: Path) -> bool:
    """Whether a folder holds an exported model, and not a run."""
    return (folder / PARAMETERS).exists()


def load_trained(folder: Path, *, average: int | None = None) -> Run | Exported:
    """The model of a run folder or of an exported folder; see `run.load` and `load` for what they refuse.

    Raises:
        ValueError: checkpoints of an exported folder are to be averaged, which has none.
    """
    if not is_exported(folder):
        return run.load(folder, average=average)
    if average not in (None, 1):
        raise ValueError(f"{folder} is an exported model and has no checkpoints to average: give average 1")
    return load(folder)


def check_serves(trained: Run | Exported, command: str, objective: type[Objective]) -> None:
    """Refuses a run that a command cannot serve.

    Args:
        trained: the run, or the exported model.
        command: the name of the module, "translate".
        objective: what the runs that it serves are about.

    Raises:
        ValueError: naming what the run is about, and the command that serves it.
    """
    found = (
        objectives.named(trained.objective) if isinstance(trained, Exported) else objectives.kind(trained.experiment)
    )
    if found is not objective:
        raise ValueError(
            f"train.{command} serves runs of the objective {objective.name}, and that of {trained.folder} is "
            f"{found.name}, which python -m train.{found.command} serves"
        )


def check_task(trained: Run | Exported, experiment: Path | None) -> None:
    """Refuses the file of an experiment whose task is another one than that of the run, of the same name.

    Args:
        trained: the run, or the exported model, which has no task.
        experiment: the file, if one was given.

    Raises:
        ValueError: the task that it defines gives other examples than those that the run was trained with.
    """
    if experiment is not None and isinstance(trained, Run):
        trained.splits()


def check_free(folder: Path) -> None:
    """Refuses a folder that nothing can be exported to.

    Raises:
        FileExistsError: it is a file, or holds something.
    """
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give a folder that is new or empty")
    if folder.is_dir() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: give a folder that is new or empty")


def save(exported: Exported, others: Mapping[str, bytes]) -> None:
    """Writes the folder, all of it or nothing: beside it first, where it is read back and compared bit by bit.

    Args:
        exported: the model.
        others: more files by name, such as the model card.

    Raises:
        FileExistsError: the folder holds something.
        ValueError: the model is none that can be read back, or the disk did not keep what was written.
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
        beside.rename(folder)  # onto an empty folder, too, but onto nothing else
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


def load(folder: Path, *, max_parameters: int = 1_000_000_000) -> Exported:
    """The model of an exported folder. Whoever made it, reading it runs no code of theirs.

    Args:
        folder: the folder.
        max_parameters: most parameters that the model may have.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        ValueError: naming the file and the rule: a digest that is not that of `SHA256SUMS`, a link that leaves the
            folder, or content that does not make a model.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder")
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _PICKLES:
            warnings.warn(f"{path} may hold a pickle, which can run code: it is not opened", stacklevel=2)
    check_digests(folder)
    with _naming(folder / CONFIG):
        header = _header(json.loads(_text(folder, CONFIG)))
        config = from_dict(header["model"], max_parameters=max_parameters)
        labels = _labels(header["labels"], config)
        _check_objective(header["objective"], config)
    with _naming(folder / TOKENIZER):
        tokenizer = Tokenizer.from_json(_text(folder, TOKENIZER))
        if tokenizer.vocab_size > config.vocab_size:
            raise ValueError(f"it has {tokenizer.vocab_size} tokens, and the model {config.vocab_size}")
    with _naming(folder / PARAMETERS):
        arrays = _read_arrays(_inside(folder, PARAMETERS))
        model = from_arrays(config, arrays)
        if (count := sum(array.size for array in arrays.values())) != header["parameters"]:
            raise ValueError(f"it has {count:,} parameters, and {CONFIG} says {header['parameters']:,}")
    return Exported(folder, model, tokenizer, labels, header["objective"], header["step"])


def check_digests(folder: Path) -> list[str]:
    """Compares every file that `SHA256SUMS` names with its digest there, and returns the names.

    Raises:
        FileNotFoundError: one of them is missing.
        ValueError: a digest is another one, a line is none, or a file that `load` reads is not named.
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
    # safetensors would let its owner alone read it.
    (folder / PARAMETERS).chmod((folder / CONFIG).stat().st_mode)
    for name, content in others.items():
        (folder / name).write_bytes(content)
    named = sorted(path.name for path in folder.iterdir() if path.name != CARD)
    (folder / SUMS).write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in named), "utf-8")


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as safetensors; those that are not contiguous too, which safetensors 0.8 alone writes wrongly."""
    safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, path)


def _compare(saved: Exported, exported: Exported, arrays: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError where what was read back is not what was to be written, to the bit."""
    again = to_arrays(saved.model)
    for name, array in arrays.items():
        if np.asarray(array, order="C").tobytes() != again[name].tobytes():
            raise ValueError(
                f"{PARAMETERS}: {name} was read back as other numbers than were written: is the disk sound?"
            )
    for name in ("labels", "objective", "step"):
        if getattr(saved, name) != getattr(exported, name):
            raise ValueError(f"{CONFIG}: {name} was read back as {getattr(saved, name)}, not {getattr(exported, name)}")
    if saved.model.config != exported.model.config or saved.tokenizer.to_json() != exported.tokenizer.to_json():
        raise ValueError("the config or the tokenizer was read back as another one than was written")


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
            raise ValueError(f"{name} must be of the type {kind.__name__}, and no number be negative")
    return header


def _labels(labels: list[Any], config: ModelConfig) -> tuple[str, ...]:
    head = config.head if isinstance(config, EncoderConfig) else None
    needed = head.num_labels if isinstance(head, TokenLabels | TextLabels) else 0
    if len(labels) != needed or len(set(map(str, labels))) != needed or not all(isinstance(x, str) for x in labels):
        raise ValueError(f"labels must be {needed} different texts, as many as the model has, got {len(labels)}")
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
    """A file of the folder, which is no link to somewhere else and no pipe."""
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing: the folder holds no whole model")
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"{path} is a link that leaves the folder: copy what it points to, or download with hf download NAME "
            "--local-dir FOLDER"
        )
    if not path.is_file():
        raise ValueError(f"{path} must be a file")
    return path


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors inside name the file, and are ValueErrors."""
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"{path}: it is nested too deeply") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
