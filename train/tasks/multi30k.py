"""Multi30k: captions of pictures in English and German (Elliott 2016)."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from datasets import Dataset

from train.tasks.lines import ParallelLines
from train.tasks.translation import HubTranslation, TranslationTask

_FILES = {"train": "train", "validation": "val", "test": "test_2016_flickr"}


@dataclass(frozen=True)
class Multi30k(TranslationTask):
    """29,000 pairs of sentences for training, 1,014 for validation, and the 1,000 of the 2016 Flickr test."""

    data: Path | None = None
    """folder with the files train, val and test_2016_flickr, each as .en and .de, plain or .gz; None downloads from the
    Hugging Face hub"""
    source: Literal["en", "de"] = "en"
    """source language; the other one is the target language"""
    name: str = "bentrevett/multi30k"
    """name of the dataset on the Hugging Face hub"""
    revision: str | None = None
    """version on the hub: a commit, tag or branch; None is the latest"""

    def load(self) -> dict[str, Dataset]:
        """Reads the splits from `data`, or from the hub.

        Raises:
            FileNotFoundError: the folder or one of its files does not exist.
            ValueError: a file or the hub's dataset cannot be read, or `data` is combined with settings of the hub.
        """
        target = "de" if self.source == "en" else "en"
        if self.data is None:
            hub = HubTranslation(name=self.name, revision=self.revision)
            try:
                return dataclasses.replace(hub, source_column=self.source, target_column=target).load()
            except (ValueError, OSError) as error:
                raise ValueError(f"{error}; to use local files, set --task.data to their folder") from error
        if self.revision is not None or self.name != Multi30k.name:
            raise ValueError(
                f"--task.data ({self.data}) excludes --task.name ({self.name}) and --task.revision ({self.revision}), "
                "which select a dataset of the hub"
            )
        if not self.data.is_dir():
            raise FileNotFoundError(f"--task.data: there is no folder {self.data}")
        found = {
            split: ParallelLines(*(_file(self.data, f"{name}.{language}") for language in (self.source, target)))
            for split, name in _FILES.items()
        }
        return self.choose(found)


def _file(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"--task.data: {folder} contains neither {name}.gz nor {name}")
