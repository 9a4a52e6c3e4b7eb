"""The examples of a run: in memory, or in a cache of Arrow files if the files of the task are large.

The cache has a folder for each set of files, with these folders in it:

- `texts`: the texts of all splits.
- `tokens-KEY`: the token ids of the training split, and the texts of the other splits. A resumed run needs no more.

A set of files is recognized by the settings and the code of the task, and by path, size and times of each file. A
change that keeps all of these is not noticed; as the time of the last change of a file's record (ctime) is one of them,
such a change must set back the clock, or write to the disk directly.
"""

import abc
import contextlib
import dataclasses
import filecmp
import hashlib
import importlib.metadata
import json
import os
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset

from seqattn.models import Learned
from train import objectives
from train.checkpoints import run
from train.checkpoints.disk_space import check_room
from train.checkpoints.durable import replace
from train.config import Experiment, encode
from train.data import tokenized
from train.data.batches import Example
from train.data.cache_folder import CacheFolder, default_folder
from train.data.texts import Texts
from train.data.tokenized import measure
from train.devices.processes import is_first
from train.objectives import Objective
from train.reports.progress import Progress
from train.tasks.task import Task

_VERSION = 1
"""Version of the files of the cache. Raise it when code outside of tasks changes which examples files give."""
_HELD_OUT, _SUMMARY = ("validation", "test"), "summary.json"


class Examples(abc.ABC):
    """The examples of a run, as texts and as token ids."""

    @property
    @abc.abstractmethod
    def count(self) -> int:
        """The number of training examples."""

    @property
    @abc.abstractmethod
    def digest(self) -> str:
        """The digest of all texts, as from `train.checkpoints.run.fingerprint`."""

    @property
    @abc.abstractmethod
    def splits(self) -> dict[str, Dataset]:
        """The splits in memory: "validation" and "test", and "train" unless it is in the cache."""

    @abc.abstractmethod
    def texts(self, kind: type[Objective]) -> Iterable[str]:
        """Returns the texts of the training split that a tokenizer is trained on."""

    @abc.abstractmethod
    def labels(self, kind: type[Objective]) -> tuple[str, ...]:
        """Returns the labels of the training split."""

    @abc.abstractmethod
    def use(self, objective: Objective) -> None:
        """Takes the objective, whose tokenizer decides the ids. Must be called before `rows`."""

    def rows(self, objective: Objective, split: str) -> Sequence[Example]:
        """Returns the examples of a split, as token ids."""
        return objective.examples(self.splits[split])


def find(experiment: Experiment) -> Examples:
    """Finds the examples of an experiment. Reads them, unless their files are large enough for the cache.

    Raises:
        ValueError: the examples cannot be read.
        FileNotFoundError: a file does not exist.
    """
    task, cache = experiment.task, experiment.data_cache
    # Pictures are drawn from recipes: there are no ids to store.
    files = () if "image" in objectives.kind(experiment).given else task.files()
    if not files or sum(file.stat().st_size for file in files) < cache.min_megabytes * 1_000_000:
        return InMemory(task.load())
    return Cached(task, files, default_folder() if cache.folder is None else cache.folder)


class InMemory(Examples):
    """Examples whose texts and token ids are in memory.

    Args:
        splits: the splits of a task, as from `Task.load`.
    """

    def __init__(self, splits: dict[str, Dataset]) -> None:
        self._splits = splits

    @property
    def count(self) -> int:
        """The number of training examples."""
        return len(self._splits["train"])

    @cached_property
    def digest(self) -> str:
        """The digest of all texts."""
        return run.fingerprint(self._splits)

    @property
    def splits(self) -> dict[str, Dataset]:
        """All splits."""
        return self._splits

    def texts(self, kind: type[Objective]) -> Iterable[str]:
        """Returns the texts that a tokenizer is trained on."""
        return kind.texts(self._splits["train"])

    def labels(self, kind: type[Objective]) -> tuple[str, ...]:
        """Returns the labels of the training split."""
        return kind.find_labels(self._splits["train"])

    def use(self, objective: Objective) -> None:
        """Does nothing: each call of `rows` encodes the texts."""


class Cached(Examples):
    """Examples in the cache. The files of the task are read only if the cache lacks what is asked for.

    Args:
        task: the task.
        files: its files.
        folder: the folder of the cache.
    """

    def __init__(self, task: Task, files: Sequence[Path], folder: Path) -> None:
        self._task, self._files, self._stamp = task, files, _stamp(task, files)
        self._folder = folder / _key(self._stamp)
        self._tokens: CacheFolder | None = None
        self._has_tokens = False

    @property
    def count(self) -> int:
        """The number of training examples."""
        return self._summary["count"]

    @property
    def digest(self) -> str:
        """The digest of all texts."""
        return self._summary["digest"]

    @cached_property
    def splits(self) -> dict[str, Dataset]:
        """The validation and the test split."""
        held_out = {split: Texts(self._whole / f"{split}.arrow") for split in _HELD_OUT}
        return {split: texts.piece(0, len(texts)) for split, texts in held_out.items()}

    def texts(self, kind: type[Objective]) -> Iterable[str]:
        """Yields the texts that a tokenizer is trained on, a piece of the split at a time."""
        return (text for piece in self._train.pieces() for text in kind.texts(piece))

    def labels(self, kind: type[Objective]) -> tuple[str, ...]:
        """Returns the labels of the training split."""
        return tuple(sorted(set().union(*(kind.find_labels(piece) for piece in self._train.pieces()))))

    def use(self, objective: Objective) -> None:
        """Looks for the token ids of this objective in the cache, and checks them."""
        facts = {
            "data": self._stamp,
            "objective": objective.name,
            "shard": [tokenized.SHARD, tokenized.SHARDS],
            "labels": list(objective.labels),
            "tokenizer": hashlib.sha256(objective.tokenizer.to_json().encode()).hexdigest(),
            # Another version may give other ids to the same texts.
            "tokenizers": importlib.metadata.version("tokenizers"),
        }
        self._tokens = CacheFolder(self._folder / f"tokens-{_key(facts)}", facts)
        with self._tokens.writing("the tokens"):
            self._has_tokens = self._tokens.is_whole()
        # Read now: another process may find damage later, and replace the folder.
        self._summary, self.splits  # noqa: B018

    def rows(self, objective: Objective, split: str) -> Sequence[Example]:
        """Returns the examples of a split; those for training are memory-mapped, and tokenized if they were not yet."""
        if split != "train":
            return super().rows(objective, split)
        assert self._tokens is not None
        if not self._has_tokens:
            with self._tokens.writing("the tokens"):
                self._tokenize(objective, self._tokens)
            self._has_tokens = True
        return tokenized.read(self._tokens, self.count)

    def _tokenize(self, objective: Objective, folder: CacheFolder) -> None:
        folder.begin()
        with folder.claim("held-out"):
            for name in (*(f"{split}.arrow" for split in _HELD_OUT), _SUMMARY):
                whole, there = self._text_folder / name, folder.path / name
                # Compared: what an interrupted process left may have been damaged since.
                if not (there.exists() and filecmp.cmp(whole, there, shallow=False)):
                    folder.add(Path(shutil.copyfile(whole, folder.work / name)), name)
        train = self._train
        split = tokenized.Split(
            len(train),
            lambda first, last: objective.examples(train.piece(first, last)),
            max(objective.tokenizer.vocab_size, len(objective.labels)),
            tokenized.shard_size(len(train)),
        )
        with contextlib.ExitStack() as opened:
            silent = None if is_first() else opened.enter_context(open(os.devnull, "w", encoding="utf-8"))
            progress = opened.enter_context(Progress(len(train), what="tokenized", stream=silent))
            progress.print(f"{folder.path}: tokenizing {len(train):,} training examples")
            tokenized.write(folder, split, progress.update)
        folder.finish()

    @cached_property
    def _summary(self) -> dict[str, Any]:
        return json.loads((self._whole / _SUMMARY).read_text("utf-8"))

    @property
    def _whole(self) -> Path:
        """A whole folder with the held-out splits."""
        return self._tokens.path if self._tokens is not None and self._has_tokens else self._text_folder

    @property
    def _train(self) -> Texts:
        return Texts(self._text_folder / "train.arrow")

    @cached_property
    def _text_folder(self) -> Path:
        """The folder of the texts, which is made if it is not whole."""
        folder = CacheFolder(self._folder / "texts", self._stamp)
        with folder.writing("the texts"):
            # One process reads the files, and the others wait for it.
            for wait in () if folder.is_whole() else (False, True):
                if wait and is_first():
                    print(f"{folder.path}: waiting for another process that reads the texts", flush=True)
                with folder.claim("texts", wait=wait) as mine:
                    if mine and not folder.is_whole():
                        self._read(folder)
                if mine:
                    break
        return folder.path

    def _read(self, folder: CacheFolder) -> None:
        """Reads the files of the task into a folder."""
        size = sum(file.stat().st_size for file in self._files) / 1e6
        if is_first():
            print(f"{folder.path}: reading {size:,.0f} MB of text", flush=True)
        folder.begin()
        fresh = {split: folder.work / f"{split}.arrow" for split in ("train", *_HELD_OUT)}
        try:
            for file in fresh.values():
                file.unlink(missing_ok=True)  # what a killed process left fills the disk
            check_room(folder.path, round(size * 1e6), "the texts", "give another folder with --data-cache.folder")
            self._task.write(folder.work)
            if _stamp(self._task, self._files) != self._stamp:
                raise ValueError(f"the files of {type(self._task).__name__} changed while they were read; run it again")
            texts = {split: Texts(file) for split, file in fresh.items()}
            summary = {"count": len(texts["train"]), "digest": run.fingerprint(texts)}
            for file in fresh.values():
                folder.add(file, file.name)
        finally:
            for file in fresh.values():
                file.unlink(missing_ok=True)
        replace(folder.path / _SUMMARY, json.dumps(summary).encode())
        folder.finish()


def _stamp(task: Task, files: Sequence[Path]) -> dict[str, Any]:
    """What decides the texts of a task, as JSON values. Cheap: no file of the task is read."""
    found = [(file.absolute(), file.stat()) for file in files]
    return {
        "version": _VERSION,
        "task": encode(task),
        "code": run.task_source(task),
        "unicode": unicodedata.unidata_version,  # decides the normal form of texts
        "files": [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in found],
    }


def _key(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def training_rows(experiment: Experiment, objective: Objective, found: Examples, model: Any) -> Sequence[Example]:
    """Returns the examples of the training split, as token ids, and checks those of all splits.

    Raises:
        ValueError: a text of any split has an unknown label, or more tokens than the model has learned positions.
    """
    limits = ", ".join(f"{flag} ({most})" for flag, most in _learned(experiment.model, "--model"))
    # Other splits are only needed to find unknown labels and texts beyond the learned positions.
    names = ("train", *(_HELD_OUT if limits or objective.labels else ()))
    rows = {name: found.rows(objective, name) for name in names}
    beyond: list[tuple[int, int, int, str]] = []
    for name in rows if limits else ():
        for source, target, count in _different(measure(rows[name])):
            # Batches leave out training texts over their own limit, so the model never sees those.
            left_out = name == "train" and max(source, target) > experiment.batches.max_length
            room, wanted = model.room(source), max(1, target - 1)
            if not left_out and room is not None and room < wanted:
                beyond.append((source, wanted, count, name))
    if beyond:
        source, wanted, _, name = max(beyond, key=lambda one: one[0] + one[1])
        raise ValueError(
            f"{sum(count for _, _, count, _ in beyond)} texts are longer than the learned positions, the longest in "
            f"the {name} split: a source of {source} and a target of {wanted} tokens; raise {limits}"
        )
    return rows["train"]


def _different(lengths: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """The different pairs of lengths, each with its number of examples."""
    # As one number for each pair: sorting rows of a matrix is ten times slower.
    both = lengths.astype(np.int64) @ np.array([2**32, 1])
    for pair, count in zip(*(found.tolist() for found in np.unique(both, return_counts=True)), strict=True):
        yield pair >> 32, pair & (2**32 - 1), count


def _learned(config: Any, flag: str) -> Iterator[tuple[str, int]]:
    """The learned positions in a config: the command-line flag and the number of positions of each."""
    if isinstance(config, Learned):
        yield f"{flag}.max-length", config.max_length
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            yield from _learned(getattr(config, field.name), f"{flag}.{field.name.replace('_', '-')}")
