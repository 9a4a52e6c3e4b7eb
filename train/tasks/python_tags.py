"""Python source to the kind of each of its characters: a task of tagging, as of an editor that colours code."""

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
"""What each letter of a target says about the character at its place."""

# Also what only the interactive prompt has: `site` adds it to some Pythons.
_BUILTINS = frozenset(name for name in dir(builtins) if not name.startswith("_")) - frozenset(
    "copyright credits exit help license quit".split()
)
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_KINDS = {tokenize.NUMBER: "d", tokenize.STRING: "s", tokenize.OP: "o", tokenize.COMMENT: "r"}


@dataclass(frozen=True)
class PythonTags(SourceTask):
    """Some lines of Python source to a letter of `LABELS` for each character: "x = 1 # a" to "nwowdwrrr".

    Source and target have the same length. What a character is depends on others: "or" is a keyword, but not in
    "for", in a string or after a dot. No piece is in two splits, and no file.
    """

    characters: int = 160
    """most characters of a piece: as many whole statements and comments as fit; one that is longer is left out"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("characters", self.characters, 1)

    def encoder_objective(self) -> Literal["Tagging"]:
        """A label for each character."""
        return "Tagging"

    def load(self) -> dict[str, Dataset]:
        """The splits; FileNotFoundError or ValueError where there is no folder, or too few files in it."""
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
    r"""A letter for each character of a whole file, and where its statements, comments and blank lines end.

    Raises:
        SyntaxError or tokenize.TokenError: it is no Python source.

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
            # From Python 3.12 on, a formatted string is several tokens; before, and here, it is one.
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
    if previous == "." and not keyword.iskeyword(name):  # only `import` may follow a dot: `from . import x`
        return "a"
    if previous in ("def", "class"):
        return previous.replace("def", "f")[0]
    return "k" if keyword.iskeyword(name) else "b" if name in _BUILTINS else "n"


def _spans(ends: list[int], characters: int) -> Iterator[tuple[int, int]]:
    """Starts and ends of as many consecutive units as fit; a unit that does not fit alone is in none."""
    start = 0
    for last, end in itertools.pairwise([0, *ends]):
        if end - start > characters:
            if last > start:
                yield start, last
            start = last if end - last <= characters else end
    if ends and ends[-1] > start:
        yield start, ends[-1]
