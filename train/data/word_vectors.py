"""Vectors of words from files of word2vec, GloVe and fastText, into the table of a model."""

import logging
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float

from seqattn.checks import check_integer
from seqattn.nn import TokenEmbedding
from train.tasks.lines import read_lines

log = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)
Table = Float[np.ndarray, "V D"]
Found = Bool[np.ndarray, "V"]


def load_table(path: Path, tokens: Sequence[str], dim: int) -> tuple[Table, Found]:
    r"""The vectors that a file of text has for these tokens; the file is read line by line and never held.

    A line is a word and its values with spaces between (Pennington 2014); word2vec and fastText have a first line more,
    of the number of words and of values (Mikolov 2013). Of a word that occurs twice the first line counts, and a
    warning says how many did. In a file without that first line words may hold spaces, as in GloVe's of 840 billion.

    Args:
        path: text in UTF-8, read as gzip where the name ends in ".gz".
        tokens: the V words to look for; equal ones get the same vector. They are compared with the file's in NFC.
        dim: D, values of a vector.

    Returns:
        The vectors `[V, D]` in float32, zeros where a word is not in the file, and whether it is `[V]`.

    Raises:
        ValueError: naming file and line, where a line has another number of values, the first line promises other
            vectors than there are, or a value of a token is no finite number.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "vectors.txt")
    ...     _ = path.write_text("the 0.5 1\ncat -2 3\n")
    ...     load_table(path, ["cat", "dog"], 2)
    (array([[-2.,  3.], [ 0.,  0.]], dtype=float32), array([ True, False]))
    """
    check_integer("dim", dim, 1)
    rows: dict[str, list[int]] = {}
    for row, token in enumerate(tokens):
        rows.setdefault(unicodedata.normalize("NFC", token), []).append(row)
    table, found = np.zeros((len(tokens), dim), np.float32), np.zeros(len(tokens), bool)
    header: int | None = None
    words = repeated = number = 0
    for number, line in enumerate(read_lines(path), start=1):
        line, where = line.rstrip(" "), f"{path}:{number}"
        if number == 1 and (header := _header(line, dim, where)) is not None:
            continue
        words += 1
        word, values = _split(line, dim, spaces=header is None and number > 1, where=where)
        if (places := rows.get(unicodedata.normalize("NFC", word))) is None:
            continue
        if found[places[0]]:
            repeated += 1
            continue
        table[places], found[places] = _vector(values, word, where), True
    if not words or (header is not None and header != words):
        raise ValueError(f"{path}:{number}: the file ends after {words} words, not {header or 'one or more'}")
    if repeated:
        log.warning("%s: %d lines give a word again; its first line counts", path, repeated)
    return table, found


def put_vectors(embedding: TokenEmbedding, table: Table, found: Found) -> None:
    """Writes the vectors that were found into a model's table; its other rows stay.

    The model multiplies its table by `sqrt(D)` on the way in, so the vectors are divided by it: what the model then
    sees of a token is the file's vector.

    Args:
        embedding: the table `[V, D]` of a model; changed.
        table: vectors `[V, D]`, as of `load_table`.
        found: which rows to write, `[V]`.

    Raises:
        ValueError: the shapes differ.
    """
    current = embedding.table[...]
    if table.shape != current.shape or found.shape != current.shape[:1]:
        raise ValueError(
            f"vectors {list(table.shape)} and found {list(found.shape)} must fit the model's table "
            f"{list(current.shape)}"
        )
    scaled = (table / math.sqrt(table.shape[1])).astype(current.dtype)
    embedding.table[...] = current.at[np.flatnonzero(found)].set(scaled[found])


def _header(line: str, dim: int, where: str) -> int | None:
    """How many words the first line promises; None where it is a word's."""
    fields = line.split(" ")
    if len(fields) != 2 or not all(field.isdecimal() for field in fields):
        return None
    if int(fields[1]) != dim:
        raise ValueError(f"{where}: the file has vectors of {fields[1]} values, not of dim ({dim})")
    return int(fields[0])


def _split(line: str, dim: int, *, spaces: bool, where: str) -> tuple[str, str]:
    """A word, and its values in one text."""
    more = line.count(" ") - dim
    if more == 0:
        word, _, values = line.partition(" ")
        return word, values
    parts = line.rsplit(" ", dim)
    if more < 0 or not spaces or _is_number(parts[0].rpartition(" ")[2]):
        raise ValueError(f"{where}: {dim + more} values, not dim ({dim}): {line[:60]!r}")
    return parts[0], " ".join(parts[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _vector(values: str, word: str, where: str) -> Float[np.ndarray, "D"]:
    numbers = []
    for value in values.split(" "):
        if not _is_number(value) or not abs(float(value)) <= _LARGEST:
            raise ValueError(f"{where}: {value!r} is no finite number, in the vector of {word!r}")
        numbers.append(float(value))
    return np.array(numbers, np.float32)
