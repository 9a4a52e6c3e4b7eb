"""Multi30k: captions of pictures and their translations (Elliott 2016), English and German."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset

from train.tasks.lines import read_pairs
from train.tasks.translation import HubTranslation, TranslationTask

_FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}


@dataclass(frozen=True)
class Multi30k(TranslationTask):
    """29,000 pairs of sentences to train on, 1,014 to watch over the training, and 1,000, of 2016, to judge it."""

    data: Path | None = None
    """folder of train, val and test_2016_flickr, each as .en and .de, plain or .gz; without it, from the hub"""
    source: Literal["en", "de"] = "en"
    """the language to translate from; the other one is translated to"""
    name: str = "bentrevett/multi30k"
    """the data set on the hub"""
    revision: str | None = None
    """its version on the hub"""

    def load(self) -> dict[str, Dataset]:
        """The splits; ValueError or FileNotFoundError, naming the flag and the file, where one is not there."""
        target = "de" if self.source == "en" else "en"
        if self.data is None:
            hub = HubTranslation(name=self.name, revision=self.revision)
            try:
                return dataclasses.replace(hub, source_column=self.source, target_column=target).load()
            except (ValueError, OSError) as error:
                raise ValueError(f"{error}; the folder of its files may be given by --task.data") from error
        if self.revision is not None or self.name != Multi30k.name:
            raise ValueError(
                f"--task.data ({self.data}) excludes --task.name ({self.name}) and --task.revision ({self.revision}), "
                "which are of the hub"
            )
        if not self.data.is_dir():
            raise FileNotFoundError(f"--task.data: there is no folder {self.data}")
        found = {
            split: read_pairs(*(_file(self.data, f"{name}.{language}") for language in (self.source, target)))
            for split, name in _FILES.items()
        }
        return self.choose(found)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"--task.data: {folder} holds neither {name}.gz nor {name}")
