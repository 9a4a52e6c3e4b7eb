"""Functions of the standard library to what their docstrings say."""

import ast
import inspect
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal

from datasets import Dataset

from seqattn.checks import check_integer
from train.tasks.standard_library import Example, SourceFile, SourceTask, split_lines

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Docstrings(SourceTask):
    """Python functions without their docstring, to the first line of it.

    No body is in two examples, under whatever name, and no file in two splits.
    """

    scores: ClassVar[frozenset[Literal["rouge"]]] = frozenset({"rouge"})

    max_source: int = 1_000
    """characters of a function; longer ones are left out, of every split"""
    first: int | None = None
    """characters of a function that are kept, from its start on; None for all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first is not None:
            check_integer("first", self.first, 1, hint=", or None for whole functions")

    def load(self) -> dict[str, Dataset]:
        """The splits; FileNotFoundError or ValueError where there is no folder, or too few functions in it."""
        return self.cut(self._examples)

    def _examples(self, file: SourceFile) -> Iterator[Example]:
        for example in functions(file.text):
            if len(example.source) <= self.max_source:
                yield example._replace(source=example.source[: self.first])


def functions(text: str) -> Iterator[Example]:
    r'''The functions of a file of Python source that have a docstring and something beside it; none if it is none.

    The source starts at "def"; the indentation of that line is cut from every other line that has it, which a line of
    a string may not. The key is the body, without the indentation of its first statement likewise.

    >>> text = 'class A:\n    def one(self):\n        """The\n        number."""\n        return 1\n'
    >>> next(functions(text))
    Example(source='def one(self):\n    return 1', target='The', key='return 1')
    '''
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that the file's strings get wrong
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    rows = list(split_lines(text))
    for node in ast.walk(tree):
        if isinstance(node, Function) and (docstring := ast.get_docstring(node, clean=False)) and len(node.body) > 1:
            summary = inspect.cleandoc(docstring).strip().partition("\n")[0].strip()
            document, first = node.body[0], node.body[1]
            # A line that holds more than the docstring could not be taken out whole.
            alone = (
                rows[document.lineno - 1][: document.col_offset].isspace() and (document.end_lineno or 0) < first.lineno
            )
            if summary and alone:
                body = rows[document.end_lineno : node.end_lineno]
                source = _outdented([*rows[node.lineno - 1 : document.lineno - 1], *body], rows, node).rstrip()
                yield Example(source, summary, key=_outdented(body, rows, first).strip())


def _outdented(lines: list[str], rows: list[str], statement: ast.stmt) -> str:
    """Some lines of a file, without the indentation of one of its statements where they have it."""
    indentation = rows[statement.lineno - 1][: statement.col_offset]
    return "".join(line.removeprefix(indentation) for line in lines)
