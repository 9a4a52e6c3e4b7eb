"""JSON and CSV files as tables whose texts are exactly those in the file.

The package `datasets` infers types of columns instead: a column of ISO dates becomes timestamps, "05" becomes a number,
and "NA" becomes None.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import fsspec
from datasets import Dataset, DatasetBuilder, DownloadConfig, DownloadManager
from datasets.packaged_modules.csv.csv import Csv, CsvConfig
from datasets.packaged_modules.json.json import Json, JsonConfig

Row = tuple[int, Mapping[str, Any]]
"""The line on which a row begins, counted from 1, and the values of the row by column."""

_SPACE = re.compile(r"[ \t\r\n]*")
# Settings that select rows or columns are refused, as ignoring them would give other examples. Settings of type
# inference have no meaning here and are ignored.
_UNUSED = (
    *("index_col", "usecols", "prefix", "skiprows", "skip_blank_lines", "nrows", "skipfooter", "comment"),
    *("lineterminator", "dialect", "on_bad_lines", "error_bad_lines"),
)
_FORMAT = ("quotechar", "quoting", "escapechar", "doublequote", "skipinitialspace")


@dataclass(frozen=True)
class Table:
    """The rows of a split.

    Attributes:
        columns: the values of each column, by name.
        places: the file and line of each row, as "FILE:LINE"; empty if the rows are not from JSON or CSV.
    """

    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str] = ()


def tables(builder: DatasetBuilder, cache: str | None) -> dict[str, Callable[[], Table]]:
    """Returns a function for each split of a dataset, which reads its table.

    JSON and CSV files are read by this module. Other formats store types with their values, so `datasets` reads them.

    Args:
        builder: the dataset, as from `datasets.load_dataset_builder`.
        cache: a folder for downloaded files; None is the default folder of `datasets`.

    Returns:
        The functions by split. They raise ValueError, naming file and line, if a file is malformed.
    """
    if isinstance(builder, Json | Csv):
        # On the fly: an archive is read in place, so no file of it is written to disk.
        manager = DownloadManager(download_config=DownloadConfig(cache_dir=cache, extract_on_the_fly=True))
        files = builder.config.data_files or {}
        return {str(split): partial(_table, builder.config, names, manager) for split, names in files.items()}
    builder.download_and_prepare()
    return {str(split): partial(_typed_table, rows) for split, rows in builder.as_dataset().items()}


def _typed_table(rows: Dataset) -> Table:
    return Table({name: rows[name] for name in rows.column_names})


def json_rows(text: str, field: str | None = None) -> Iterator[Row]:
    r"""Yields the objects of a JSON text, which holds one per line, several in sequence, or a list of them.

    The line of a row in a list is the line on which the list begins.

    Args:
        text: the whole file.
        field: the field that holds the list, if the file is one object.

    Raises:
        ValueError: the text is not JSON, a row is not an object, or a row has one key twice. The message starts with
            the line number. An object inside a row that has one key twice is replaced with `Twice`.

    >>> list(json_rows('{"a": "05"}\n{"a": null}\n'))
    [(1, {'a': '05'}), (2, {'a': None})]
    """
    number = 0
    for line, value in _json_values(text):
        if field is not None and not isinstance(value, Twice):
            value = value.get(field) if isinstance(value, dict) else None
        for row in value if isinstance(value, list) else [value]:
            if isinstance(row, Twice):
                raise ValueError(f"{line}: {row!r}, in row {number}: keep one of the two")
            if not isinstance(row, dict):
                raise ValueError(f"{line}: expected an object, got {row!r:.60}, in row {number}")
            yield line, row
            number += 1


@dataclass(frozen=True, repr=False)
class Twice:
    """Replaces a JSON object that has one key twice, since the choice of one of the values would be a guess.

    Attributes:
        key: the first repeated key.
    """

    key: str

    def __repr__(self) -> str:
        return f"an object with the key {self.key!r} twice"


def _object(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any] | Twice:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            return Twice(key)
        found[key] = value
    return found


def _json_values(text: str) -> Iterator[tuple[int, Any]]:
    decoder, line, counted = json.JSONDecoder(object_pairs_hook=_object), 1, 0
    at = _after_space(text, 0)
    for number in itertools.count():
        if at == len(text):
            return
        # Count only the new part: counting from the start would be quadratic in the number of rows.
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            row = "" if number == 0 and text[at] == "[" else f" in row {number}"  # the row inside a list is not known
            raise ValueError(f"{error.lineno}: {error.msg} (column {error.colno}){row}") from error
        except (ValueError, RecursionError) as error:  # a number has too many digits, or the nesting is too deep
            raise ValueError(f"{line}: {error} in row {number}") from error
        yield line, value
        at = _after_space(text, end)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def csv_rows(text: str, config: CsvConfig) -> Iterator[Row]:
    r"""Yields the rows of a CSV text, without blank lines.

    Args:
        text: the whole file.
        config: separator, quotes, and names of the columns if the first line does not have them.

    Raises:
        ValueError: quotes are malformed, a row has more or fewer fields than there are columns, the columns have no
            names or equal ones, or `config` has a setting that is not supported. The message starts with the line
            number.

    >>> list(csv_rows("a,b\n05,NA\n", CsvConfig()))
    [(2, {'a': '05', 'b': 'NA'})]
    """
    rows = _csv_lines(text, config)
    names = config.names
    if config.header == 0 or (config.header == "infer" and names is None):
        _, written = next(rows, (1, []))
        names = written if names is None else names
    if names is None or config.header not in ("infer", 0, None):
        raise ValueError(f"1: the columns need names: header ({config.header}) must be 0, or give column_names")
    if len(set(names)) < len(names):
        raise ValueError(f"1: two columns have the same name: {', '.join(names)}")
    for line, values in rows:
        if len(values) != len(names):
            raise ValueError(f"{line}: {len(values)} fields, but there are {len(names)} columns")
        yield line, dict(zip(names, values, strict=True))


def _csv_lines(text: str, config: CsvConfig) -> Iterator[tuple[int, list[str]]]:
    default = CsvConfig()
    for name in _UNUSED:
        if getattr(config, name) != getattr(default, name):
            raise ValueError(f"1: {name} ({getattr(config, name)}) of the dataset's configuration is not supported")
    settings: dict[str, Any] = {name: getattr(config, name) for name in _FORMAT}
    limit, line = csv.field_size_limit(), 1
    try:
        # The default limit refuses long texts. It is global to the process, so it is restored below.
        csv.field_size_limit(max(limit, len(text)))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=config.sep, strict=True, **settings)
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1  # of the next row: a quoted field may span several lines
    except csv.Error as error:
        raise ValueError(f"{line}: {error}") from error
    finally:
        csv.field_size_limit(limit)


def _table(config: JsonConfig | CsvConfig, files: Sequence[str], manager: DownloadManager) -> Table:
    rows: list[Mapping[str, Any]] = []
    places: list[str] = []
    for file, path in _paths(files, manager):
        try:
            for line, row in _rows(_text(path, config.encoding or "utf-8", config.encoding_errors or "strict"), config):
                rows.append(row)
                places.append(f"{file}:{line}")
        except ValueError as error:  # the message starts with the line number
            raise ValueError(f"{file}:{error}") from error
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return Table({name: [row.get(name) for row in rows] for name in names}, places)


def _paths(files: Sequence[str], manager: DownloadManager) -> Iterator[tuple[str, str]]:
    """Yields the name of each file and the path to read it from; an archive gives the files inside."""
    for file in files:
        inner = list(manager.iter_files(manager.download_and_extract(file)))
        yield from ((file if len(inner) == 1 else path, path) for path in inner)


def _rows(text: str, config: JsonConfig | CsvConfig) -> Iterable[Row]:
    return csv_rows(text, config) if isinstance(config, CsvConfig) else json_rows(text, config.field)


def _text(path: str, encoding: str, errors: str) -> str:
    """Returns the decoded content of a file without a byte order mark; error messages start with the line number."""
    content = b""
    try:
        with fsspec.open(path, "rb") as file:
            content = file.read()
        return content.removeprefix(BOM_UTF8).decode(encoding, errors)
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"1: damaged gzip data: {error}") from error
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{line}: byte 0x{error.object[error.start]:02x} is not {encoding}: {error.reason}") from error
