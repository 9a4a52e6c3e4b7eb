"""Tables of JSON and CSV whose texts are as they stand in the file.

`datasets` infers types of columns: texts that are all ISO dates become timestamps, "05" a number, and "NA" nothing.
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
"""The line of a file on which a row begins, from 1, and its values by column."""

_SPACE = re.compile(r"[ \t\r\n]*")
# Which rows and columns there are; what says how values are inferred has no meaning here.
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
        places: the file and line where each row begins; none where the rows are not from text.
    """

    columns: Mapping[str, Sequence[Any]]
    places: Sequence[str] = ()


def tables(builder: DatasetBuilder, cache: str | None) -> dict[str, Callable[[], Table]]:
    """How to read each split of a data set. JSON and CSV are read here; other formats have types of their own.

    Args:
        builder: the data set, as of `datasets.load_dataset_builder`.
        cache: a folder for files that are downloaded; None for the usual one.

    Raises (when a split is read):
        ValueError: naming file and line, where a file is not what it should be.
    """
    if isinstance(builder, Json | Csv):
        # Read within archives, so that nothing is written out of them.
        manager = DownloadManager(download_config=DownloadConfig(cache_dir=cache, extract_on_the_fly=True))
        files = builder.config.data_files or {}
        return {str(split): partial(_table, builder.config, names, manager) for split, names in files.items()}
    builder.download_and_prepare()
    return {str(split): partial(_typed_table, rows) for split, rows in builder.as_dataset().items()}


def _typed_table(rows: Dataset) -> Table:
    return Table({name: rows[name] for name in rows.column_names})


def json_rows(text: str, field: str | None = None) -> Iterator[Row]:
    r"""The objects of a text of JSON: one a line, one after the other, or those of a list.

    A row of a list begins where the list does.

    Args:
        text: the whole file.
        field: the field of the only object that holds the list.

    Raises:
        ValueError: starting with the line, where the text is no JSON or something else than objects, or an object has
            one key twice. Objects within a row that have are no objects, but `Twice`.

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
                raise ValueError(f"{line}: no object, but {row!r:.60}, in row {number}")
            yield line, row
            number += 1


@dataclass(frozen=True, repr=False)
class Twice:
    """What stands in the place of an object of JSON that has one key twice: which of the two counts would be a guess.

    Attributes:
        key: the first such key.
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
        line, counted = line + text.count("\n", counted, at), at
        try:
            value, end = decoder.raw_decode(text, at)
        except json.JSONDecodeError as error:
            row = "" if number == 0 and text[at] == "[" else f" in row {number}"  # of a list it is not known
            raise ValueError(f"{error.lineno}: {error.msg} (column {error.colno}){row}") from error
        except (ValueError, RecursionError) as error:  # a number of too many digits, or too deep
            raise ValueError(f"{line}: {error} in row {number}") from error
        yield line, value
        at = _after_space(text, end)


def _after_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def csv_rows(text: str, config: CsvConfig) -> Iterator[Row]:
    r"""The rows of a text of CSV; blank lines are none.

    Args:
        text: the whole file.
        config: separator, quotes, and names of the columns where the first line does not hold them.

    Raises:
        ValueError: starting with the line, where quotes are wrong, or a row has more or fewer fields than there are
            columns; or naming a setting that is not served.

    >>> list(csv_rows("a,b\n05,NA\n", CsvConfig()))
    [(2, {'a': '05', 'b': 'NA'})]
    """
    rows = _csv_lines(text, config)
    names = config.names
    if config.header == 0 or (config.header == "infer" and names is None):
        _, written = next(rows, (1, []))
        names = written if names is None else names
    if names is None or config.header not in ("infer", 0, None):
        raise ValueError(f"1: the columns need names: header ({config.header}) must be 0, or column_names be given")
    if len(set(names)) < len(names):
        raise ValueError(f"1: two columns have the same name: {', '.join(names)}")
    for line, values in rows:
        if len(values) != len(names):
            raise ValueError(f"{line}: {len(values)} fields, and there are {len(names)} columns")
        yield line, dict(zip(names, values, strict=True))


def _csv_lines(text: str, config: CsvConfig) -> Iterator[tuple[int, list[str]]]:
    default = CsvConfig()
    for name in _UNUSED:
        if getattr(config, name) != getattr(default, name):
            raise ValueError(f"1: {name} ({getattr(config, name)}) of its configuration is not served")
    settings: dict[str, Any] = {name: getattr(config, name) for name in _FORMAT}
    limit, line = csv.field_size_limit(), 1
    try:
        csv.field_size_limit(max(limit, len(text)))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=config.sep, strict=True, **settings)
        for values in reader:
            if values:
                yield line, values
            line = reader.line_num + 1
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
        except ValueError as error:  # it starts with the line
            raise ValueError(f"{file}:{error}") from error
    names = dict.fromkeys(itertools.chain.from_iterable(rows))
    return Table({name: [row.get(name) for row in rows] for name in names}, places)


def _paths(files: Sequence[str], manager: DownloadManager) -> Iterator[tuple[str, str]]:
    """Each file by its name, and where it can be read; of an archive those within."""
    for file in files:
        inner = list(manager.iter_files(manager.download_and_extract(file)))
        yield from ((file if len(inner) == 1 else path, path) for path in inner)


def _rows(text: str, config: JsonConfig | CsvConfig) -> Iterable[Row]:
    return csv_rows(text, config) if isinstance(config, CsvConfig) else json_rows(text, config.field)


def _text(path: str, encoding: str, errors: str) -> str:
    """What a file holds, without a byte order mark; what is wrong is named behind the line."""
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
