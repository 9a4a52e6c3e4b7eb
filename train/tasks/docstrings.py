"""Summarization: functions of the Python standard library to the first lines of their docstrings."""

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
    """Python functions without their docstring, to the first line of the docstring.

    No function body occurs twice, even under another name, and no file is in two splits.
    """

    scores: ClassVar[frozenset[Literal["rouge"]]] = frozenset({"rouge"})

    max_source: int = 1_000
    """maximum number of characters of a function; longer functions are left out of every split"""
    first: int | None = None
    """number of characters to keep from the start of each function; None keeps all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.first is not None:
            check_integer("first", self.first, 1, hint=", or None for whole functions")

    def load(self) -> dict[str, Dataset]:
        """Cuts the splits from the source files.

        Raises:
            FileNotFoundError: the root folder does not exist.
            ValueError: a split is empty, because the folder has too few functions with docstrings.
        """
        return self.cut(self._examples)

    def _examples(self, file: SourceFile) -> Iterator[Example]:
        for example in functions(file.text):
            if len(example.source) <= self.max_source:
                yield example._replace(source=example.source[: self.first])


def functions(text: str) -> Iterator[Example]:
    r'''Yields the functions of a Python file that have a docstring and at least one more statement.

    The source of an example starts at "def". The indentation of that line is removed from every line that has it; a
    line inside a string may lack it. The key is the body, without the indentation of its first statement. A text that
    is not valid Python yields nothing.

    >>> text = 'class A:\n    def one(self):\n        """The\n        number."""\n        return 1\n'
    >>> next(functions(text))
    Example(source='def one(self):\n    return 1', target='The', key='return 1')
    '''
    try:
        with warnings.catch_warnings(action="ignore"):  # about invalid escapes in strings of the file
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    rows = list(split_lines(text))
    for node in ast.walk(tree):
        if isinstance(node, Function) and (docstring := ast.get_docstring(node, clean=False)) and len(node.body) > 1:
            summary = inspect.cleandoc(docstring).strip().partition("\n")[0].strip()
            document, first = node.body[0], node.body[1]
            # The docstring is removed by lines, so its lines must hold nothing more.
            alone = (
                rows[document.lineno - 1][: document.col_offset].isspace() and (document.end_lineno or 0) < first.lineno
            )
            if summary and alone:
                body = rows[document.end_lineno : node.end_lineno]
                source = _outdented([*rows[node.lineno - 1 : document.lineno - 1], *body], rows, node).rstrip()
                yield Example(source, summary, key=_outdented(body, rows, first).strip())


def _outdented(lines: list[str], rows: list[str], statement: ast.stmt) -> str:
    """Joins lines of a file and removes the indentation of `statement` from each line that has it."""
    indentation = rows[statement.lineno - 1][: statement.col_offset]
    return "".join(line.removeprefix(indentation) for line in lines)
