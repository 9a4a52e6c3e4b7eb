"""Pretrained word vectors from text files of word2vec, GloVe and fastText, for the embedding table of a model."""

import logging
import math
import unicodedata
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jaxtyping import Bool, Float

from seqattn.checks import check_integer
from train.tasks.lines import read_lines

log = logging.getLogger(__name__)

_LARGEST = float(np.finfo(np.float32).max)
Table = Float[np.ndarray, "V D"]
Found = Bool[np.ndarray, "V"]


def load_table(path: Path, tokens: Sequence[str], dim: int) -> tuple[Table, Found]:
    r"""Reads the vectors of some tokens from a text file, line by line.

    A line is a word and its values, separated by spaces (Pennington 2014). Files of word2vec and fastText have a header
    line with the number of words and of values (Mikolov 2013). If a word occurs twice, its first line counts, and a
    warning has the number of such lines. In files without a header, words may contain spaces, as in GloVe's file of 840
    billion tokens.

    Args:
        path: a UTF-8 text file, read as gzip if its name ends in ".gz".
        tokens: the V words to look for, compared with those of the file in NFC; equal words get the same vector.
        dim: D, the number of values of a vector.

    Returns:
        The vectors, float32 `[V, D]`, zero for words that are not in the file; and whether the word was found,
        bool `[V]`.

    Raises:
        ValueError: a line has another number of values, the header does not match the file, or a value of a token is
            not a finite number. The message names file and line.

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
        log.warning("%s: ignored %d lines of repeated words; the first line of a word counts", path, repeated)
    return table, found


def as_rows(table: Table, found: Found, like: jax.ShapeDtypeStruct) -> tuple[Table, Found]:
    """Converts vectors to the rows of the embedding table of a model.

    The model multiplies embeddings by `sqrt(D)`. The vectors are divided by it here, so that the model sees the values
    of the file.

    Args:
        table: vectors `[V, D]`, as from `load_table`.
        found: the rows that have a vector, bool `[V]`.
        like: shape and dtype of the model's table.

    Returns:
        The rows `[V, D]`, and which of them count, bool `[V]`.

    Raises:
        ValueError: the shapes do not fit the table.
    """
    if table.shape != like.shape or found.shape != like.shape[:1]:
        raise ValueError(
            f"vectors {list(table.shape)} and found {list(found.shape)} must fit the model's table {list(like.shape)}"
        )
    return (table / math.sqrt(table.shape[1])).astype(like.dtype), found


def _header(line: str, dim: int, where: str) -> int | None:
    """Returns the number of words in the header; None if the first line is not a header."""
    fields = line.split(" ")
    if len(fields) != 2 or not all(field.isdecimal() for field in fields):
        return None
    if int(fields[1]) != dim:
        raise ValueError(f"{where}: the vectors of the file have {fields[1]} values, not dim ({dim})")
    return int(fields[0])


def _split(line: str, dim: int, *, spaces: bool, where: str) -> tuple[str, str]:
    """Splits a line into the word and the text of its values."""
    # More spaces than values: the word contains spaces, if the last of its parts is not itself a number.
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
            raise ValueError(f"{where}: {value!r} in the vector of {word!r} is not a finite number")
        numbers.append(float(value))
    return np.array(numbers, np.float32)
