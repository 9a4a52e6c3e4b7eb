"""How a folder of sentence-transformers makes one vector of a text: `modules.json` and the folders that it names."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from seqattn.checks import check_integer
from seqattn.interop.codec import shown
from seqattn.models import Pooling
from train.data.json_files import read_list, read_object

MODULES = "modules.json"
_TEXTS = "sentence_bert_config.json"
_POOLING = {"pooling_mode_mean_tokens": Pooling.MEAN, "pooling_mode_cls_token": Pooling.FIRST}
_NAMED = {"mean": Pooling.MEAN, "cls": Pooling.FIRST}


@dataclasses.dataclass(frozen=True)
class Settings:
    """How one vector is made of a text."""

    pooling: Pooling = Pooling.MEAN
    """Which vector stands for a text."""
    normalize: bool = True
    """Whether vectors have length 1."""
    max_length: int | None = None
    """Maximum number of tokens of a text; longer texts are cut."""


def settings_of(folder: Path) -> Settings:
    """Reads the settings of a folder; the defaults for one that has no `modules.json`.

    Raises:
        ValueError: a module or a kind of pooling is one that we lack. The message names the file and the value.
        FileNotFoundError: `modules.json` names a folder that does not exist.
    """
    path = folder / MODULES
    if not path.is_file():
        return Settings()
    modules = read_list(path)
    _check_neutral(folder)
    kinds = [str(module.get("type", "")).rpartition(".")[2] if isinstance(module, dict) else "" for module in modules]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise ValueError(f"{path}: modules must be Transformer, Pooling and perhaps Normalize, got {', '.join(kinds)}")
    inside = folder / str(modules[1].get("path", ""))
    if not inside.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{path}: the folder of Pooling must be inside {folder}, got {inside}")
    if modules[0].get("path") not in (None, "", "."):
        raise ValueError(f"{path}: the path of Transformer must be empty, got {shown(modules[0]['path'])}")
    length = folder / _TEXTS
    longest = read_object(length).get("max_seq_length") if length.is_file() else None
    if longest is not None:
        check_integer(f"{length}: max_seq_length", longest, 1)
    return Settings(_pooling(inside / "config.json"), "Normalize" in kinds, longest)


def _check_neutral(folder: Path) -> None:
    """Refuses what would change a text before it becomes ids."""
    for name, field in ((_TEXTS, "do_lower_case"), ("config_sentence_transformers.json", "default_prompt_name")):
        path = folder / name
        value = read_object(path).get(field) if path.is_file() else None
        if value not in (None, False):
            raise ValueError(f"{path}: {field} ({shown(value)}) is one that we lack: change the texts, and remove it")


def _pooling(path: Path) -> Pooling:
    fields: Mapping[str, Any] = read_object(path)
    if (name := fields.get("pooling_mode")) is not None:
        if not isinstance(name, str) or name not in _NAMED:
            raise ValueError(f"{path}: pooling_mode must be {' or '.join(_NAMED)}, got {shown(name)}")
        return _NAMED[name]
    chosen = [name for name, value in fields.items() if name.startswith("pooling_mode_") and value is True]
    if len(chosen) != 1 or chosen[0] not in _POOLING:
        raise ValueError(f"{path}: {' or '.join(_POOLING)} alone must be true, got {', '.join(chosen) or 'none'}")
    return _POOLING[chosen[0]]
