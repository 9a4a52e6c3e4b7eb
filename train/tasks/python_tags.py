"""Tagging: the kind of each character of Python source, as an editor needs it to highlight code."""

import builtins
import io
import itertools
import keyword
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.standard_library import Example, SourceFile, SourceTask

LABELS = {
    "w": "white space, and the backslash that joins two lines",
    "k": "keyword",
    "b": "name that Python has built in",
    "n": "any other name",
    "a": "attribute: a name after a dot",
    "f": "name of a function where it is defined",
    "c": "name of a class where it is defined",
    "d": "number",
    "s": "string, its quotes and letters before them too",
    "o": "operator or punctuation",
    "r": "comment",
}
"""The meaning of each letter of a target, which labels the character at the same place of the source."""

# Without the names that `site` adds for the interactive prompt: some Pythons have them, some do not.
_BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_")) - frozenset(
    "copyright credits exit help license quit".split()
)
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_KINDS = {tokenize.NUMBER: "d", tokenize.STRING: "s", tokenize.OP: "o", tokenize.COMMENT: "r"}


@dataclass(frozen=True)
class PythonTags(SourceTask):
    """Lines of Python source to one letter of `LABELS` per character: "x = 1 # a" to "nwowdwrrr".

    Source and target have the same length. The label of a character depends on its context: "or" is a keyword, but not
    in "for", in a string or after a dot. No piece and no file is in two splits.
    """

    characters: int = 160
    """maximum number of characters of a piece, which holds as many whole statements and comments as fit; a longer
    statement is left out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("characters", self.characters, 1)

    def encoder_objective(self) -> Literal["Tagging"]:
        """Returns "Tagging": one label for each character."""
        return "Tagging"

    def load(self) -> dict[str, Dataset]:
        """Cuts the splits from the source files.

        Raises:
            FileNotFoundError: the root folder does not exist.
            ValueError: a split is empty, because the folder has too few files.
        """
        return self.cut(self._examples)

    def _examples(self, file: SourceFile) -> Iterator[Example]:
        try:
            labels, ends = tag(file.text)
        except (SyntaxError, tokenize.TokenError):
            return
        for start, end in _spans(ends, self.characters):
            piece = file.text[start:end]
            first, last = start + len(piece) - len(piece.lstrip("\n")), start + len(piece.rstrip("\n"))
            if piece.strip():
                yield Example(file.text[first:last], labels[first:last], key=file.text[first:last])


def tag(text: str) -> tuple[str, list[int]]:
    r"""Labels each character of a Python file.

    Args:
        text: the whole file.

    Returns:
        One letter of `LABELS` per character, and the offsets at which statements, comments and blank lines end.

    Raises:
        SyntaxError: the text is not valid Python; or `tokenize.TokenError`.

    >>> tag("def f(x):\n    return x.real\n")
    ('kkkwfonoowwwwwkkkkkkwnoaaaaw', [10, 28])
    """
    starts = [0, *(place + 1 for place, character in enumerate(text) if character == "\n"), len(text)]
    labels, ends = ["w"] * len(text), []
    previous, brackets, nested, string_start = "", 0, 0, 0
    for token in tokenize.generate_tokens(io.StringIO(text, newline="\n").readline):
        start, end = (min(starts[row - 1] + column, len(text)) for row, column in (token.start, token.end))
        kind = tokenize.tok_name[token.type]
        if kind.endswith("STRING_START"):
            # From Python 3.12 on, an f-string is several tokens. It is labelled as one string, as before 3.12.
            string_start = start if nested == 0 else string_start
            nested += 1
        elif kind.endswith("STRING_END"):
            nested -= 1
            labels[string_start:end] = "s" * (end - string_start)
        elif nested:
            continue
        elif token.type in (tokenize.NEWLINE, tokenize.NL) and not brackets:
            ends.append(end)
        else:
            label = _name(token.string, previous) if token.type == tokenize.NAME else _KINDS.get(token.type)
            if label is not None:
                labels[start:end] = label * (end - start)
                brackets += (token.string in _OPENING) - (token.string in _CLOSING)
                previous = previous if label == "r" else token.string
    return "".join(labels), ends


def _name(name: str, previous: str) -> str:
    if previous == "." and not keyword.iskeyword(name):  # `import` is the only keyword after a dot: `from . import x`
        return "a"
    if previous in ("def", "class"):
        return previous.replace("def", "f")[0]
    return "k" if keyword.iskeyword(name) else "b" if name in _BUILTINS else "n"


def _spans(ends: list[int], characters: int) -> Iterator[tuple[int, int]]:
    """Yields (start, end) of pieces of as many consecutive units as fit; a unit longer than a piece is skipped."""
    start = 0
    for last, end in itertools.pairwise([0, *ends]):
        if end - start > characters:
            if last > start:
                yield start, last
            start = last if end - last <= characters else end
    if ends and ends[-1] > start:
        yield start, ends[-1]
