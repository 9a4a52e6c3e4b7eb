"""Your own labelled texts: one label for each text, or one for each character."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from datasets import Dataset

from train.tasks.lines import read_lines
from train.tasks.own_files import OwnFiles
from train.tasks.tables import json_rows
from train.tasks.task import Pair, splits

_JSON = tuple(f".{kind}{packed}" for kind in ("jsonl", "ndjson", "json") for packed in ("", ".gz"))
_SURROGATE = re.compile("[\ud800-\udfff]")
"""A lone surrogate: half a character, which JSON can write and UTF-8 cannot."""
_SHOWN = 5
"""Maximum number of names in a message."""


@dataclass(frozen=True)
class LabelledFiles(OwnFiles):
    """Labelled text from UTF-8 files, plain or .gz, for encoders that label texts or tokens.

    Each line is a text, a tab and a label. The last tab of the line separates them, and there is no header. Files that
    end in .jsonl, .ndjson or .json, or in one of these and .gz, hold JSON objects instead, one per line or in a list,
    with text and label in two columns. A repeated text is used once, with its first label, and is in one split only.

    The label of a text is one or more words; in JSON it may also be a whole number. The same label must not be written
    both as a string and as a number. Labels of characters are one string, as long as the text in Unicode's NFC: each
    character labels the character at the same place, as in "Ada lives in Rome", tab, "PPP..........LLLL". They need
    the tokenizer `characters`.
    """

    labels: Literal["text", "character"] = "text"
    """one label for each text (head `text-labels`) or for each character of a text (head `token-labels`)"""
    text_column: str = "text"
    """name of the text column; JSON files only"""
    label_column: str = "label"
    """name of the label column; JSON files only"""

    def encoder_objective(self) -> Literal["Tagging", "Classification"]:
        """Returns "Tagging" for labels of characters and "Classification" for labels of texts."""
        return "Tagging" if self.labels == "character" else "Classification"

    def load(self) -> dict[str, Dataset]:
        """Reads the files and divides them into splits.

        Raises:
            FileNotFoundError: a file or folder does not exist.
            ValueError: a line or row cannot be used (the message names file and line), training has fewer than two
                labels, or another split has a label without a training example.
        """
        divided = self.divide(self.found(partial(self._read, kinds={})))
        labels = {split: _labels(rows, self.labels) for split, rows in divided.items()}
        if len(labels["train"]) < 2:
            raise ValueError(f"training needs at least two different labels, but has {sorted(labels['train'])}")
        if unknown := (labels["validation"] | labels["test"]) - labels["train"]:
            raise ValueError(
                f"validation or test has the labels {_first(sorted(unknown))}, which have no training example: add "
                "training examples, or, if the split was held out of the training files, change --task.seed"
            )
        return splits(**divided)

    def _read(self, file: Path, kinds: dict[str, tuple[type, str]]) -> Iterator[Pair]:
        """Yields the examples of a file. `kinds` remembers the JSON type of each label and its first place."""
        rows = self._json(file, kinds) if file.name.lower().endswith(_JSON) else self._tabbed(file)
        for where, text, label in rows:
            yield text, self._checked(where, text, label)

    def _json(self, file: Path, kinds: dict[str, tuple[type, str]]) -> Iterator[tuple[str, str, str]]:
        text = "\n".join(read_lines(file))
        try:
            rows = list(json_rows(text))
        except ValueError as error:  # the message starts with the line number
            raise ValueError(f"{file}:{error}") from error
        # All rows of a JSON list have the line of the list, so those are named by their number, too.
        in_line = Counter(line for line, _ in rows)
        allowed = (str, int) if self.labels == "text" else (str,)
        for number, (line, row) in enumerate(rows):
            where = f"{file}:{line}" + (f", row {number} (from 0)" if in_line[line] > 1 else "")
            text, label = _value(row, self.text_column, where, (str,)), _value(row, self.label_column, where, allowed)
            _check_kind(label.strip(), type(row[self.label_column]), where, kinds)
            yield where, text, label

    def _tabbed(self, file: Path) -> Iterator[tuple[str, str, str]]:
        for name in ("text_column", "label_column"):
            if (given := getattr(self, name)) != getattr(LabelledFiles, name):
                raise ValueError(
                    f"{file}: --task.{name.replace('_', '-')} ({given}) names a JSON column, but this is a "
                    "tab-separated file: remove the flag, or, if the file holds JSON, rename it to end in .jsonl"
                )
        for number, line in enumerate(read_lines(file), 1):
            text, tab, label = line.rpartition("\t")
            if not tab and line.strip():
                raise ValueError(f"{file}:{number}: no tab between text and label in {line!r:.60}")
            if number == 1 and _is_header(text, label):
                raise ValueError(
                    f"{file}:1: {line!r:.60} looks like a header, but a tab-separated file has no header: delete the "
                    "line, or, if it is an example, move it to another line"
                )
            yield f"{file}:{number}", text, label

    def _checked(self, where: str, text: str, label: str) -> str:
        if not text.strip():
            return label
        if self.labels == "text":
            if not label.strip():
                raise ValueError(f"{where}: no label for the text {text!r:.60}")
            return label.strip()
        counts = [len(unicodedata.normalize("NFC", each)) for each in (label, text)]
        if counts[0] != counts[1]:
            raise ValueError(
                f"{where}: {counts[0]} labels for {counts[1]} characters (in NFC) of the text {text!r:.60}; for one "
                "label per text, set --task.labels text"
            )
        return label


def _labels(rows: list[Pair], of: Literal["text", "character"]) -> set[str]:
    return {each for _, label in rows for each in ([label] if of == "text" else label)}


def _is_header(text: str, label: str) -> bool:
    """Whether the first line names columns: "label" in the second column, or "label" and then "text"."""
    columns = text.strip().casefold(), label.strip().casefold()
    return columns[1] == "label" or columns == ("label", "text")


def _check_kind(label: str, kind: type, where: str, kinds: dict[str, tuple[type, str]]) -> None:
    """Raises ValueError if a JSON label is a string and an equal label before was a number, or the other way round."""
    before, there = kinds.setdefault(label, (kind, where))
    if kind is not before:
        names = {str: f'the string "{label}"', int: f"the number {label}"}
        raise ValueError(
            f"{where}: the label is {names[kind]}, but at {there} it is {names[before]}: use one type for both, or, "
            "if they are different labels, different names"
        )


def _first(names: Sequence[str]) -> str:
    """Formats the first few names as a list, with the number of the others."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{list(names[:_SHOWN])}{more}"


def _value(row: Mapping[str, Any], column: str, where: str, kinds: tuple[type, ...]) -> str:
    if column not in row:
        raise ValueError(f"{where}: no column {column!r}; the row has {_first(list(row))}")
    value = row[column]
    if not isinstance(value, kinds) or isinstance(value, bool) or _SURROGATE.search(str(value)):
        asked = "a valid string" if kinds == (str,) else "a valid string or a whole number"
        raise ValueError(f"{where}: {value!r:.60} in column {column!r} is not {asked}")
    return str(value)
